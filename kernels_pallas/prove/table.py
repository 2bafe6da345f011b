"""Proofs as text: one row a kernel, in columns that say which numbers are estimates."""

from collections.abc import Sequence

from kernels_pallas.prove.gpu_binary import Binary
from kernels_pallas.prove.llo import Schedule
from kernels_pallas.prove.measuring import Measured
from kernels_pallas.prove.proving import Job, Proof
from kernels_pallas.prove.targets import GpuTarget, TpuTarget

TPU_COLUMNS = ("program", "chip", "shape", "kernel", "VMEM / limit", "scratch", "spills", "hottest loop", "unit",
               "cycles*", "static*", "HBM", "roofline*", "static/roofline*")  # fmt: skip
GPU_COLUMNS = ("program", "chip", "shape", "kernel", "registers", "spills", "shared / limit", "stages", "warps",
               "blocks", "instructions", "HBM", "roofline*")  # fmt: skip

MEASURED_COLUMNS = ("program", "shape", "time", "spread", "roofline*", "time/roofline*", "error", "unequal")

LOOP_COLUMNS = ("program", "chip", "kernel", "loop", "bundles", "trips*", "cycles*", "spills / fills", "busy slots")

TPU_NOTE = (
    "* estimates: cycles are scheduled bundles times trip counts (no stalls, no waiting for memory); static time is"
    " cycles over the clock;\n  the roofline is the longer of FLOPs over the bf16 peak and bytes over the bandwidth,"
    " both counted by the kernel's author."
)
GPU_NOTE = (
    "* estimate: the longer of FLOPs over the bf16 peak and bytes over the bandwidth, both counted by the kernel's"
    " author.\n  Blocks: as many as fit on a multiprocessor at once. Instructions: in the text of the binary, not"
    " executed ones."
)

MEASURED_NOTE = (
    "Time: median over calls of the mean turn, with the same arguments in all turns. Error: largest difference from the"
    " equation in float32\n  over its largest number; unequal: share of whole numbers that differ from it.\n"
    "* estimate: as when compiling, see the authors' counts."
)


def size(count: int | float) -> str:
    """Bytes for people.

    >>> size(512), size(1536), size(2.5 * 2**20)
    ('512 B', '1.5 KiB', '2.5 MiB')
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: int | float) -> str:
    """Seconds for people.

    >>> duration(1.5e-6), duration(0.0123)
    ('1.5 µs', '12.3 ms')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _shape(job: Job) -> str:
    return " ".join(f"{name}={value}" for name, value in job.shape.items())


def _without_kernel(proof: Proof, columns: Sequence[str]) -> list[str]:
    """The row of a program that XLA compiles alone: what is known is what it keeps in memory outside the chip."""
    kernel = f"(XLA, {size(proof.temp_bytes)} of temporaries)"
    return [proof.job.name, proof.job.target, _shape(proof.job), kernel, *[""] * (len(columns) - 4)]


def _tpu_rows(proof: Proof, chip: TpuTarget) -> list[list[str]]:
    rows = []
    for kernel in proof.kernels:
        if not isinstance(kernel, Schedule):
            continue
        hot = kernel.hottest
        cycles = kernel.cycles
        rows.append(
            [
                proof.job.name, proof.job.target, _shape(proof.job), kernel.kernel,
                f"{size(kernel.vmem)} / {size(kernel.limit or chip.scoped_vmem)}", size(kernel.scratch),
                str(kernel.spills), f"{hot.bundles} bundles"
                + (f" x {hot.trips:.4g}" if hot.trips is not None else " x ?"),
                f"{hot.bottleneck} {hot.busy[hot.bottleneck]:.0%}" if hot.bottleneck != "none" else "none",
                f"{cycles:.4g}" if cycles is not None else "?",
                duration(cycles / chip.clock) if cycles is not None else "?", "", "", "",
            ]
        )  # fmt: skip
    rows = rows or [_without_kernel(proof, TPU_COLUMNS)]
    rows[0][11:13] = [size(proof.bytes), f"{duration(proof.roofline)} ({proof.bound})"]
    if proof.static_seconds is not None:
        rows[0][13] = f"{proof.static_seconds / proof.roofline:.2f}" if proof.roofline else "?"
    return rows


def _gpu_rows(proof: Proof, chip: GpuTarget) -> list[list[str]]:
    rows = []
    for kernel in proof.kernels:
        if not isinstance(kernel, Binary):
            continue
        counts = ", ".join(f"{name} {n}" for name, n in kernel.instructions.items())
        rows.append(
            [
                proof.job.name, proof.job.target, _shape(proof.job), kernel.kernel, f"{kernel.registers}",
                f"{kernel.spills} B / {kernel.fills} B" if kernel.spills or kernel.fills else "0",
                f"{size(kernel.shared_memory)} / {size(chip.shared_memory_block)}", str(kernel.stages),
                str(kernel.warps), str(kernel.blocks_per_core(chip.shared_memory, chip.threads)), counts, "", "",
            ]
        )  # fmt: skip
    rows = rows or [_without_kernel(proof, GPU_COLUMNS)]
    rows[0][11:13] = [size(proof.bytes), f"{duration(proof.roofline)} ({proof.bound})"]
    return rows


def _align(columns: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (columns, ["-" * width for width in widths], *rows)
    )


def _loop_rows(proof: Proof) -> list[list[str]]:
    rows = []
    for kernel in proof.kernels:
        for index, loop in enumerate(kernel.loops if isinstance(kernel, Schedule) else ()):
            name = "(outside loops)" if loop.depth == 0 else f"{'> ' * loop.depth}loop {index}"
            busy = ", ".join(f"{unit} {share:.0%}" for unit, share in loop.busy.items() if share >= 0.005)
            trips = "?" if loop.trips is None else f"{loop.trips:.6g}"
            cycles = "?" if loop.trips is None else f"{loop.bundles * loop.trips:.4g}"
            spilled = f"{loop.spills} / {loop.fills}"
            rows.append(
                [proof.job.name, proof.job.target, kernel.kernel, name, str(loop.bundles), trips, cycles, spilled, busy]
            )
    return rows


def render(proofs: Sequence[Proof], *, markdown: bool = False, loops: bool = False) -> str:
    """The tables of some proofs: TPUs, GPUs, then what was refused, in the compilers' words.

    What all rows of a table share (one shape, one chip) stays in its columns: a row can be read alone.

    Args:
        proofs: what to show.
        markdown: tables for Markdown instead of a terminal.
        loops: also a row for every loop of a TPU kernel, with the share of its slots that each unit uses.
    """
    accepted = [proof for proof in proofs if proof.accepted]
    tpu = [row for proof in accepted if isinstance(proof.chip, TpuTarget) for row in _tpu_rows(proof, proof.chip)]
    gpu = [row for proof in accepted if isinstance(proof.chip, GpuTarget) for row in _gpu_rows(proof, proof.chip)]
    parts = []
    if tpu:
        parts.append(_align(TPU_COLUMNS, tpu, markdown) + "\n\n" + TPU_NOTE)
    if loops and (rows := [row for proof in accepted for row in _loop_rows(proof)]):
        parts.append(_align(LOOP_COLUMNS, rows, markdown))
    if gpu:
        parts.append(_align(GPU_COLUMNS, gpu, markdown) + "\n\n" + GPU_NOTE)
    notes = dict.fromkeys(f"{proof.job.name}: {proof.note}" for proof in proofs if proof.note)
    if notes:
        parts.append("\n".join(notes))
    for proof in proofs:
        if not proof.accepted:
            parts.append(
                f"REFUSED {proof.job.name} on {proof.job.target}, {_shape(proof.job)}:\n{_shorten(proof.message)}"
            )
    return "\n\n".join(parts)


def render_measured(results: Sequence[Measured], *, markdown: bool = False) -> str:
    """The table of what ran, and what failed in the words of the compiler or the runtime."""
    rows = []
    for result in results:
        if not result.seconds:
            continue
        low, high = min(result.seconds), max(result.seconds)
        rows.append([
            result.job.name, _shape(result.job), duration(result.median), f"{duration(low)} to {duration(high)}",
            duration(result.roofline) if result.roofline else "",
            f"{result.median / result.roofline:.2f}" if result.roofline else "",
            "" if result.error is None else f"{result.error:.1e}",
            "" if result.unequal is None else f"{result.unequal:.2%}",
        ])  # fmt: skip
    parts = [_align(MEASURED_COLUMNS, rows, markdown) + "\n\n" + MEASURED_NOTE] if rows else []
    for result in results:
        if not result.seconds:
            parts.append(f"FAILED {result.job.name}, {_shape(result.job)}:\n{_shorten(result.message)}")
    return "\n\n".join(parts)


def _shorten(message: str, limit: int = 1500) -> str:
    """A compiler's message without the middle of long lines, which hold the kernel's serialised body."""
    lines = [line if len(line) < 600 else f"{line[:200]} ... {line[-400:]}" for line in message.splitlines()]
    text = "\n".join("  " + line for line in lines if line.strip())
    return text if len(text) <= limit else text[:limit] + "\n  ..."
