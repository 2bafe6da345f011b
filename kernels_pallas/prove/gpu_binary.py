"""Reads what XLA's GPU compiler made of a Triton kernel: launch sizes, registers, spills, instructions."""

import collections
import dataclasses
import pathlib
import re
import subprocess
from collections.abc import Mapping

_CLASSES: dict[str, tuple[str, ...]] = {
    "tensor": ("HGMMA", "HMMA", "QGMMA", "QMMA", "IMMA", "IGMMA", "DMMA"),
    "fp32": ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"),
    "special": ("MUFU",),
    "global load": ("LDG", "LDGSTS", "UBLKCP", "UTMALDG"),
    "global store": ("STG", "UTMASTG", "RED", "ATOMG"),
    "shared load": ("LDS", "LDSM"),
    "shared store": ("STS", "STSM"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL",),
    "barrier": ("BAR",),
}
"""Instructions of NVIDIA's machine code, by the unit that they load."""


@dataclasses.dataclass(frozen=True)
class Binary:
    """A GPU kernel as compiled.

    Attributes:
        kernel: its name.
        grid: blocks.
        warps: warps of a block.
        stages: stages of the software pipeline that Triton was asked for.
        registers: of a thread.
        spills: bytes of spill stores of a thread.
        fills: bytes of spill loads of a thread.
        stack: bytes of stack of a thread.
        shared_memory: bytes of a block.
        instructions: instructions in the text of the binary by class; empty where there is no disassembler.
    """

    kernel: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int
    spills: int
    fills: int
    stack: int
    shared_memory: int
    instructions: Mapping[str, int]

    def blocks_per_core(self, shared_memory: int, threads: int = 2048) -> int:
        """Blocks that fit on a multiprocessor at once, by registers, shared memory and threads."""
        by_registers = 65536 // (max(1, self.registers) * 32 * self.warps)
        by_memory = shared_memory // (self.shared_memory + 1024) if self.shared_memory else by_registers
        return min(by_registers, by_memory, threads // (32 * self.warps), 32)


def count_instructions(assembly: str) -> dict[str, int]:
    r"""Instructions by class in what nvdisasm prints.

    >>> count_instructions("/*0000*/  @!P0 FFMA R1, R2, R3, R1 ;\n/*0010*/ HMMA.16816.F32.BF16 R4, R8, R2, RZ ;")
    {'tensor': 1, 'fp32': 1, 'all': 2}
    """
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", assembly)
    counted = collections.Counter(mnemonics)
    by_class = {name: sum(counted[m] for m in members) for name, members in _CLASSES.items()}
    return {**{name: n for name, n in by_class.items() if n}, "all": len(mnemonics)}


def read_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Registers, spills and stack of each entry function, from what ``ptxas -v`` prints.

    >>> read_ptxas('''ptxas info    : Compiling entry function 'f' for 'sm_90a'
    ... ptxas info    : Function properties for f
    ...     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 40 registers, used 1 barriers''')
    {'f': {'stack': 8, 'spills': 4, 'fills': 12, 'registers': 40}}
    """
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            name = match[1]
            found[name] = {}
        elif name and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)):
            found[name].update(stack=int(match[1]), spills=int(match[2]), fills=int(match[3]))
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(match[1])
    return found


def read_launches(thunks: str, program: str) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Grid, warps, stages and shared memory of each Triton kernel, from XLA's list of launches and its last program.

    Kernels that XLA made itself, around ours, are left out.
    """
    found: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for match in re.finditer(
        r"(\w+) grid: \[([\d, ]+)\] threads: \[(\d+)[\d, ]*\]\s+shared_memory: (\d+) bytes", thunks
    ):
        grid = tuple(int(n) for n in match[2].split(","))
        found[match[1]] = {"grid": grid, "warps": -(-int(match[3]) // 32), "shared_memory": int(match[4])}
    stages = dict(re.findall(r'name = "(\w+)", num_stages = (\d+)', program))
    return {name: {**launch, "stages": int(stages[name])} for name, launch in found.items() if name in stages}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{pathlib.Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout + done.stderr


def read_binaries(dump: pathlib.Path, program: str, arch: str, ptxas: str, nvdisasm: str | None) -> tuple[Binary, ...]:
    """Assemble the PTX that XLA dumped and read what comes out.

    Args:
        dump: folder that ``--xla_dump_to`` names.
        program: the compiled program's text.
        arch: architecture, such as ``sm_90a``.
        ptxas: path of NVIDIA's assembler.
        nvdisasm: path of its disassembler, or ``None``: then there are no instruction counts.
    """
    thunks = "\n".join(path.read_text() for path in sorted(dump.glob("*thunk_sequence.txt")))
    launches = read_launches(thunks, program)
    found = []
    for path in sorted(dump.glob("*.ptx")):
        names = re.findall(r"\.entry (\w+)", path.read_text())
        if not any(name in launches for name in names):
            continue
        cubin = path.with_suffix(".cubin")
        sizes = read_ptxas(_run([ptxas, "-v", f"-arch={arch}", str(path), "-o", str(cubin)]))
        for name in names:
            if name not in launches:
                continue
            launch, size = launches[name], sizes[name]
            counts = count_instructions(_section(_run([nvdisasm, "-c", str(cubin)]), name)) if nvdisasm else {}
            found.append(
                Binary(
                    kernel=name,
                    grid=launch["grid"],  # type: ignore[arg-type]
                    warps=launch["warps"],  # type: ignore[arg-type]
                    stages=launch["stages"],  # type: ignore[arg-type]
                    registers=size["registers"],
                    spills=size.get("spills", 0),
                    fills=size.get("fills", 0),
                    stack=size.get("stack", 0),
                    shared_memory=launch["shared_memory"],  # type: ignore[arg-type]
                    instructions=counts,
                )
            )
    return tuple(found)


def _section(assembly: str, name: str) -> str:
    """The part of a disassembly that holds one function."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", assembly, flags=re.MULTILINE)
    return next((parts[i + 1] for i in range(1, len(parts) - 1, 2) if parts[i] == name), assembly)
