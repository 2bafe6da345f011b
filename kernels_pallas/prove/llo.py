"""Reads the schedules that the TPU compiler dumps: what a kernel needs, loop by loop.

The dump of a kernel has one line per *bundle* (the instructions that issue in the same cycle), marked with the loops
around it, and a table with one row per bundle that says how many slots of each unit are busy.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

UNITS = {"MXU": "MXU", "MATMUL": "MXU", "MATPUSH": "MXU push", "XLU": "XLU", "VALU": "VPU", "EUP": "EUP",
         "VLOAD": "load", "VSTORE": "store", "SALU": "scalar"}  # fmt: skip
"""The compilers' names of the units that can limit a loop (older ones say MXU, newer ones MATMUL), and ours."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a kernel's schedule; the code outside all loops counts as one that runs once, at depth 0.

    Attributes:
        depth: loops around its body, itself included.
        bundles: scheduled bundles of its body without the loops inside.
        trips: how often the body runs in one call of the kernel, all outer loops multiplied in; ``None`` if unknown.
        busy: fraction of its slots that each unit uses in the body.
        spills: register spills to VMEM in the body.
        fills: loads of spilled registers in the body.
    """

    depth: int
    bundles: int
    trips: float | None
    busy: dict[str, float]
    spills: int
    fills: int

    @property
    def bottleneck(self) -> str:
        """The busiest unit."""
        return max(self.busy, key=lambda unit: self.busy[unit]) if any(self.busy.values()) else "none"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel as the TPU compiler scheduled it.

    Attributes:
        kernel: name of the kernel.
        vmem: bytes of VMEM that it takes: windows with their double buffers, scratch, the compiler's own.
        scratch: bytes of those that are scratch, the kernel's and the compiler's.
        limit: bytes that it may take, ``None`` for the chip's default.
        loops: in program order, the code outside all loops first.
    """

    kernel: str
    vmem: int
    scratch: int
    limit: int | None
    loops: tuple[Loop, ...]

    @property
    def spills(self) -> int:
        """Spills in the text of the program."""
        return sum(loop.spills for loop in self.loops)

    @property
    def cycles(self) -> float | None:
        """Bundles times trips; ``None`` if a loop's trips are unknown."""
        if any(loop.trips is None for loop in self.loops):
            return None
        return sum(loop.bundles * (loop.trips or 0.0) for loop in self.loops)

    @property
    def hottest(self) -> Loop:
        """The loop where most cycles go; the longest one while trips are unknown."""
        return max(self.loops, key=lambda loop: loop.bundles * (1.0 if loop.trips is None else loop.trips))


_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0)(?: (?P<mark>[A-Z]{2}))? *: (?P<depth>>*) *(?P<text>.*)")
_ALLOCATION = re.compile(r"#allocation\d+ \[.*?space=vmem, size = 0x(?P<size>[0-9a-f]+).*?tag = '(?P<tag>[^']*)'")
_STATIC = re.compile(r"^ *loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)")


def static_trips(text: str) -> list[int | None]:
    r"""Trip counts of all loops in program order, from the compiler's program; ``None`` where they depend on data.

    >>> static_trips("loop: start=0, step=2, limit=10\n $region1: #{f} // loop_pre_header\n x // loop_pre_header")
    [5, None]
    """
    trips: list[int | None] = []
    pending: int | None = None
    for line in text.splitlines():
        if match := _STATIC.match(line):
            start, step, limit = map(int, match.groups())
            pending = max(0, -(-(limit - start) // step)) if step else None
        elif "// loop_pre_header" in line:
            trips.append(pending)
            pending = None
    return trips


def bundle_loops(text: str) -> tuple[list[int], list[int]]:
    r"""The loop that each bundle belongs to, and the depth of each loop; loop 0 is the code outside all loops.

    >>> bundle_loops("  0   : { a }\n  0x1 LB: > { b }\n  0x2 LB: >> { c }\n  0x3   :  {}\n  0x4   : > { d }")
    ([0, 1, 2, 2, 1], [0, 1, 2])
    """
    owners: list[int] = []
    depths = [0]
    open_loops = [0]
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        depth = len(match["depth"])
        empty = match["text"].startswith("{}")
        if match["mark"] == "LB":
            while len(open_loops) > depth:
                open_loops.pop()
            depths.append(depth)
            open_loops.append(len(depths) - 1)
        elif not empty:  # an empty bundle carries no mark and belongs to what comes before it
            while len(open_loops) - 1 > depth:
                open_loops.pop()
        owners.append(open_loops[-1])
    return owners, depths


def utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Names of the units, slots of each per bundle, and the busy slots of each bundle."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    return names, capacity, [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]


def vmem_use(text: str) -> tuple[int, int]:
    """Bytes of VMEM that a kernel allocates: all, and scratch alone."""
    sizes = {match.group(0): (int(match["size"], 16), match["tag"]) for match in _ALLOCATION.finditer(text)}
    scratch = sum(size for size, tag in sizes.values() if "scratch" in tag)
    return sum(size for size, _ in sizes.values()), scratch


def _multiply(own: Sequence[float | None], depths: Sequence[int]) -> list[float | None]:
    """Trips of each loop with those of the loops around it; ``own[0]`` is the code outside all loops."""
    total: list[float | None] = []
    around: list[float | None] = []
    for trips, depth in zip(own, depths, strict=True):
        del around[depth:]
        outer = around[-1] if around else 1.0
        total.append(None if trips is None or outer is None else trips * outer)
        around.append(total[-1])
    return total


def read_schedule(
    kernel: str,
    original: str,
    bundles: str,
    utilization_table: str,
    *,
    vmem: int | None = None,
    limit: int | None = None,
    trips: Sequence[float | None] = (),
    busy: float = 1.0,
) -> Schedule:
    """Put a kernel's dumps together.

    Args:
        kernel: its name.
        original: the compiler's first program, with allocations and loop bounds.
        bundles: its last one, bundle by bundle.
        utilization_table: slots of each unit, bundle by bundle.
        vmem: bytes of VMEM that the compiled program states; the sum of the allocations if ``None``.
        limit: VMEM limit that the kernel asked for, bytes.
        trips: trip counts of the loops, outermost and first ones first; ``None`` or a missing one is taken from the
            compiler's loop bounds.
        busy: fraction of the outermost loop's trips that do its work.

    Raises:
        ValueError: if ``trips`` has more entries than the schedule has loops (the author's list is out of date).
    """
    owners, depths = bundle_loops(bundles)
    names, capacity, rows = utilization(utilization_table)
    if len(rows) != len(owners):
        raise ValueError(f"{kernel}: {len(owners)} bundles, but {len(rows)} rows of utilization: the format changed")
    known = static_trips(original)
    if len(known) != len(depths) - 1:  # the compiler unrolled or merged loops: only the grid's is still known for sure
        known = [*known[:1], *[None] * (len(depths) - 2)] if len(depths) > 1 else []
    if len(trips) > len(depths) - 1:
        raise ValueError(
            f"{kernel}: trips has {len(trips)} entries, but the schedule has {len(depths) - 1} loops, "
            f"of depths {depths[1:]}"
        )
    given = [*trips, *[None] * (len(depths) - 1 - len(trips))]
    own = [1.0, *(b if a is None else a for a, b in zip(given, known, strict=True))]
    if len(own) > 1 and own[1] is not None:
        own[1] *= busy
    total = _multiply(own, depths)
    loops = []
    for index, depth in enumerate(depths):
        chosen = [row for row, owner in zip(rows, owners, strict=True) if owner == index]
        sums = dict(zip(names, (sum(column) for column in zip(*chosen, strict=True)), strict=False)) if chosen else {}
        slots = {name: max(1, n * len(chosen)) for name, n in zip(names, capacity, strict=True)}
        loops.append(
            Loop(
                depth=depth,
                bundles=len(chosen),
                trips=total[index],
                busy={label: sums.get(name, 0) / slots[name] for name, label in UNITS.items() if name in slots},
                spills=sums.get("VSTORE:SPILL", 0),
                fills=sums.get("VLOAD:FILL", 0),
            )
        )
    allocated, scratch = vmem_use(original)
    return Schedule(kernel, allocated if vmem is None else vmem, scratch, limit, tuple(loops))


_FILE = re.compile(r"^(?P<stamp>\d+)-(?P<kernel>.+?)-(?P<pass>\d+)-(?P<what>original|final_bundles|"
                   r"final_hlo-static-per-bundle-utilization)\.txt$")  # fmt: skip


def read_dump(folder: pathlib.Path, kernels: Sequence[str]) -> dict[str, dict[str, str]]:
    """The three files of each kernel that the prover reads, by the name of the kernel's instruction.

    Args:
        folder: where libtpu wrote its dumps.
        kernels: names of the instructions that are kernels, as the compiled program has them.
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.match(path.name)
        if match and match["kernel"] in kernels:
            found.setdefault(match["kernel"], {})[match["what"]] = path.read_text()
    return found
