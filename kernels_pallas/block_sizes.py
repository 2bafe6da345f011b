"""Block sizes from an analytic model: what fits on the chip, ordered by the bytes that it moves.

It makes tuning cheaper: of the hundreds of ways to cut a kernel into blocks a few are left to be compiled or timed, and
none of them is found out by running. High-level synthesis chooses loop tiles under the limits of a chip in the same
way; here the loops are a kernel's grid, and the limits are a TPU's vector memory or a GPU's shared memory.

A `LoopNest` has axes, the loops of the grid, and operands, arrays whose dimensions belong to axes. With blocks b, axis
a takes steps_a = ⌈size_a / b_a⌉ steps. TPU, with the grid in a given order, outermost axis first:

    fetches = Π steps of the axes from the outermost one to the innermost one on which the operand depends
              (an axis of a single step does not count): a block is fetched when its index changes, not before
    bytes   = Σ bytes of the array · fetches / (number of its blocks)
    memory  = Σ buffers · padded block + accumulators + held       buffers: 2, or 1 where the block never changes

``held`` is what Mosaic was seen to do with products of less than 32 bits: it keeps the left operand in vector memory a
second time, all of it where the product is wider than the matrix unit, about half of it otherwise. The tests hold the
estimate to within a quarter of what the compiler reports; blocks of a few hundred KiB can be further off.

GPU: every program of the grid loads its own blocks, reductions are a loop inside, accumulators are registers:

    bytes   = Σ bytes of the array · Π steps of the parallel axes on which it does not depend        (no help from L2)
    memory  = Σ stages · block of inputs that change in the loop + Σ block of the other inputs

with one stage less than was asked for before Hopper, whose tensor cores are the first to read shared memory directly.

Candidates are ordered by bytes, then by steps, then by memory.

When to use it: for kernels of the shape of a matrix product, before compiling or timing a few of the best. When not: as
a forecast of time. Once a kernel is limited by arithmetic all block sizes above some size are equally good, and the
model knows no latency, no spilling of registers and no bank conflicts.

The idea is that of Ye et al., ScaleHLS (HPCA 2022), and HIDA, arXiv 2311.03379; the model is our own.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.prove.targets import GpuTarget, Target, TpuTarget, get_target

LANES = 128
SUBLANE_BYTES = 32  # of a tile's column: 8 rows of 32 bits, 16 of 16 bits, 32 of 8 bits
MIN_GPU_SIDE = 16  # of a product on tensor cores
REGISTER_BYTES = 65_536 * 4  # of a block of threads, on every GPU of the targets; half of it is left to addresses


@dataclasses.dataclass(frozen=True)
class Axis:
    """A loop of the grid.

    Attributes:
        name: how operands and blocks call it.
        size: elements along it.
        is_reduction: whether outputs are sums over it. Its blocks must divide it on TPUs (what lies beyond the end of
            an array is not zero), and it is the innermost loop.
    """

    name: str
    size: int
    is_reduction: bool = False


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that a kernel reads or writes block by block.

    Attributes:
        name: for messages.
        axes: what each dimension belongs to: the name of an axis, or an integer for one that is taken whole.
        dtype: of the array.
        role: ``"accumulator"`` lives on the chip and takes no memory where the reduction is a single step.
        held_over: the axis along which a product uses this operand again and again, see ``held`` in the module.
    """

    name: str
    axes: tuple[str | int, ...]
    dtype: DTypeLike
    role: Literal["input", "output", "accumulator"] = "input"
    held_over: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class LoopNest:
    """A kernel as the model sees it.

    Attributes:
        axes: the loops of its grid.
        operands: its arrays, accumulators included.
    """

    axes: tuple[Axis, ...]
    operands: tuple[Operand, ...]

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"axes are {names}, expected at least one, with different names")
        for axis in self.axes:
            if axis.size < 1:
                raise ValueError(f"axis {axis.name!r} has size {axis.size}, expected at least 1")
        for operand in self.operands:
            if len(operand.axes) < 2:
                raise ValueError(f"operand {operand.name!r} has {len(operand.axes)} dimensions, expected at least 2")
            for name in (*operand.axes, *([operand.held_over] if operand.held_over else [])):
                if isinstance(name, str) and name not in names:
                    raise ValueError(f"operand {operand.name!r} has axis {name!r}, expected one of {names}")
            summed = [a.name for a in self.axes if a.is_reduction and a.name in operand.axes]
            if operand.role != "input" and summed:
                raise ValueError(f"{operand.role} {operand.name!r} has the reduction axis {summed[0]!r}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to cut a kernel up.

    Attributes:
        blocks: elements of a block along each axis.
        order: the grid's axes, outermost first. On GPUs the reductions at its end are loops inside a program.
        vmem_bytes: memory on the chip, estimated: vector memory of a TPU, shared memory of a GPU.
        hbm_bytes: bytes moved between the chip and the memory outside.
        steps: steps of the grid, those of loops inside programs included.
    """

    blocks: dict[str, int]
    order: tuple[str, ...]
    vmem_bytes: int
    hbm_bytes: int
    steps: int


def matmul_nest(
    m: int,
    k: int,
    n: int,
    dtype: DTypeLike,
    *,
    out_dtype: DTypeLike | None = None,
    accumulator: DTypeLike | None = None,
) -> LoopNest:
    """The nest of y[M, N] = x[M, K] @ w[K, N] with a block of sums on the chip.

    Args:
        m: rows of x.
        k: columns of x.
        n: columns of w.
        dtype: of x and w.
        out_dtype: of y; that of the sums for integers and of x for others if ``None``.
        accumulator: of the sums; int32 for integers and float32 for others if ``None``.

    Raises:
        ValueError: if a size is below 1.

    >>> [operand.axes for operand in matmul_nest(512, 256, 128, "bfloat16").operands]
    [('m', 'k'), ('k', 'n'), ('m', 'n'), ('m', 'n')]
    """
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    sums = accumulator or (jnp.int32 if is_integer else jnp.float32)
    result = out_dtype or (sums if is_integer else dtype)
    return LoopNest(
        (Axis("m", m), Axis("n", n), Axis("k", k, is_reduction=True)),
        (
            Operand("x", ("m", "k"), dtype, held_over="n"),
            Operand("w", ("k", "n"), dtype),
            Operand("y", ("m", "n"), result, "output"),
            Operand("sums", ("m", "n"), sums, "accumulator"),
        ),
    )


def memory_limit(target: str | Target) -> int:
    """Bytes on the chip that a kernel gets when it asks for no more than the default (TPU), or that a block may have.

    >>> memory_limit("v5e") // 2**20, memory_limit("h100") // 2**10
    (16, 227)
    """
    chip = _chip(target)
    return chip.scoped_vmem if isinstance(chip, TpuTarget) else chip.shared_memory_block


def estimate(
    nest: LoopNest,
    blocks: Mapping[str, int],
    target: str | Target,
    *,
    order: Sequence[str] | None = None,
    stages: int = 2,
) -> Candidate:
    """What one way to cut a kernel up costs, whether it fits or not.

    Args:
        nest: the kernel.
        blocks: elements of a block along each axis; one as large as the axis or larger is a single step.
        target: a chip of `kernels_pallas.prove`, or its name.
        order: the grid's axes, outermost first, reductions last; as in ``nest`` if ``None``.
        stages: blocks of each input that a GPU holds at once; TPUs have two.

    Raises:
        ValueError: if ``blocks`` or ``order`` does not name every axis once, a block or ``stages`` is below 1, or the
            order has a reduction outside of a parallel axis.

    >>> nest = matmul_nest(1024, 1024, 1024, "float32")
    >>> estimate(nest, {"m": 512, "n": 512, "k": 512}, "v5e")
    Candidate(blocks={'m': 512, 'n': 512, 'k': 512}, order=('m', 'n', 'k'), vmem_bytes=7340032, hbm_bytes=20971520,
        steps=8)
    """
    chip = _chip(target)
    sizes = {axis.name: axis.size for axis in nest.axes}
    order = tuple(_default_order(nest) if order is None else order)
    if set(blocks) != set(sizes) or sorted(order) != sorted(sizes):
        raise ValueError(
            f"blocks has {sorted(blocks)} and order {sorted(order)}, expected each of {sorted(sizes)} once"
        )
    for name, block in blocks.items():
        if block < 1:
            raise ValueError(f"block of axis {name!r} is {block}, expected at least 1")
    if stages < 1:
        raise ValueError(f"stages is {stages}, expected at least 1")
    reductions = {axis.name for axis in nest.axes if axis.is_reduction}
    if set(order[len(order) - len(reductions) :]) != reductions:
        raise ValueError(f"order is {order}, expected the reductions {sorted(reductions)} last")
    steps = {name: -(-sizes[name] // blocks[name]) for name in order}
    model = _tpu_cost if isinstance(chip, TpuTarget) else _gpu_cost
    memory = moved = 0
    for operand in nest.operands:
        shape = [name if isinstance(name, int) else min(blocks[name], sizes[name]) for name in operand.axes]
        whole = math.prod(name if isinstance(name, int) else sizes[name] for name in operand.axes) * operand.itemsize
        own = math.prod(steps[name] for name in operand.axes if isinstance(name, str))
        has_loop = any(steps[name] > 1 for name in reductions)
        held, fetches = model(operand, shape, blocks, steps, reductions if has_loop else set(), chip, stages)
        memory += held
        if operand.role != "accumulator":
            moved += whole * fetches // own
    return Candidate(dict(blocks), order, memory, moved, math.prod(steps.values()))


def choose_blocks(
    nest: LoopNest,
    target: str | Target,
    *,
    limit: int | None = None,
    headroom: float | int = 0.05,
    sizes: Mapping[str, Sequence[int]] | None = None,
    stages: int = 2,
) -> list[Candidate]:
    """All ways to cut a kernel up that fit on the chip, those that move the fewest bytes first.

    Blocks are multiples of the chip's tile that are powers of two times the tile, or divide the axis, or are all of it
    (TPU: 128 lanes by 32 bytes of sublanes; a reduction's blocks divide it), or powers of two of at least 16 (GPU). On
    TPUs all orders of the parallel axes are tried.

    Args:
        nest: the kernel.
        target: a chip of `kernels_pallas.prove`, or its name.
        limit: bytes on the chip that the kernel may use, such as the ``vmem_limit_bytes`` that it asks for;
            `memory_limit` if ``None``.
        headroom: fraction of the limit that is left to the compiler, in [0, 1).
        sizes: for some axes the only blocks to try, such as ``{"k": [512]}``.
        stages: blocks of each input that a GPU holds at once.

    Returns:
        Candidates, best first; at least one.

    Raises:
        ValueError: if nothing fits, a size that is asked for breaks the chip's tiling, or an argument is out of range.
        TypeError: if a TPU is asked for a dtype of 64 bits.

    >>> best = choose_blocks(matmul_nest(4096, 4096, 4096, "bfloat16"), "v5e")[0]
    >>> best.blocks, best.hbm_bytes // 2**20, best.steps
    ({'m': 1024, 'n': 1024, 'k': 512}, 288, 128)
    """
    chip = _chip(target)
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom is {headroom}, expected a fraction in [0, 1)")
    limit = memory_limit(chip) if limit is None else limit
    if limit < 1:
        raise ValueError(f"limit is {limit} bytes, expected at least 1")
    unknown = set(sizes or {}) - {axis.name for axis in nest.axes}
    if unknown:
        raise ValueError(f"sizes has axis {min(unknown)!r}, expected one of {[axis.name for axis in nest.axes]}")
    tried = [_blocks_of(axis, nest, chip, (sizes or {}).get(axis.name)) for axis in nest.axes]
    names = [axis.name for axis in nest.axes]
    found, smallest = [], None
    for shape in itertools.product(*tried):
        for order in _orders(nest, chip):
            candidate = estimate(nest, dict(zip(names, shape, strict=True)), chip, order=order, stages=stages)
            if smallest is None or candidate.vmem_bytes < smallest.vmem_bytes:
                smallest = candidate
            if candidate.vmem_bytes <= limit * (1 - headroom) and _fits_registers(nest, candidate, chip):
                found.append(candidate)
    if not found:
        assert smallest is not None
        raise ValueError(
            f"no blocks fit into {limit} bytes of {chip.name} less {headroom:.0%}: "
            f"the smallest, {smallest.blocks}, need {smallest.vmem_bytes}"
        )
    return sorted(found, key=lambda c: (c.hbm_bytes, c.steps, c.vmem_bytes))


def _chip(target: str | Target) -> Target:
    return get_target(target) if isinstance(target, str) else target


def _default_order(nest: LoopNest) -> tuple[str, ...]:
    return tuple(axis.name for axis in sorted(nest.axes, key=lambda axis: axis.is_reduction))


def _orders(nest: LoopNest, chip: Target) -> Iterable[tuple[str, ...]]:
    if isinstance(chip, GpuTarget):
        return (_default_order(nest),)  # programs of a GPU run in no order
    parallel = [axis.name for axis in nest.axes if not axis.is_reduction]
    reductions = tuple(axis.name for axis in nest.axes if axis.is_reduction)
    return ((*outer, *reductions) for outer in itertools.permutations(parallel))


def _granule(axis: Axis, nest: LoopNest) -> int:
    """What a TPU's blocks along an axis must be multiples of: the strictest tile of the arrays outside the chip."""
    granule = 1
    for operand in nest.operands:
        if operand.itemsize > 4:
            raise TypeError(f"operand {operand.name!r} is {jnp.dtype(operand.dtype)}, expected at most 32 bits on TPUs")
        if operand.role == "accumulator":
            continue
        if operand.axes[-1] == axis.name:
            granule = math.lcm(granule, LANES)
        if operand.axes[-2] == axis.name:
            granule = math.lcm(granule, SUBLANE_BYTES // operand.itemsize)
    return granule


def _blocks_of(axis: Axis, nest: LoopNest, chip: Target, asked: Sequence[int] | None) -> list[int]:
    """Blocks of an axis that the chip's tiling allows."""
    if isinstance(chip, GpuTarget):
        largest = max(MIN_GPU_SIDE, 1 << (axis.size - 1).bit_length())
        legal = {size for size in (MIN_GPU_SIDE << i for i in range(32)) if size <= largest}
        rule = f"powers of two from {MIN_GPU_SIDE} to {largest}"
    else:
        granule = _granule(axis, nest)
        legal = {granule << i for i in range(32) if granule << i <= axis.size}
        legal |= {size for size in range(granule, axis.size + 1, granule) if axis.size % size == 0} | {axis.size}
        rule = f"{axis.size} or multiples of {granule} up to it"
        if asked is not None:  # any multiple will do, not only those that are tried
            legal |= {size for size in asked if 0 < size <= axis.size and size % granule == 0}
        if axis.is_reduction:
            legal = {size for size in legal if axis.size % size == 0}
            rule += " that divide it"
    if asked is not None and not asked:
        raise ValueError(f"sizes has no block for axis {axis.name!r}, expected at least one")
    for size in asked or ():
        if size not in legal:
            raise ValueError(f"block of axis {axis.name!r} is {size}, which {chip.name} cannot have: expected {rule}")
    return sorted(legal if asked is None else set(asked))


def _matrix_unit(chip: TpuTarget) -> int:
    """Width of the matrix unit: a core does the work of four squares of it a cycle, see the clocks in targets."""
    return round(math.sqrt(chip.flops / (8 * chip.clock * chip.cores)))


def _tpu_cost(
    operand: Operand,
    shape: Sequence[int],
    blocks: Mapping[str, int],
    steps: Mapping[str, int],
    loop: set[str],
    chip: Target,
    stages: int,
) -> tuple[int, int]:
    """Bytes of vector memory and the number of fetches (or writes) of an operand."""
    assert isinstance(chip, TpuTarget)
    rows = SUBLANE_BYTES // operand.itemsize
    padded = [*shape[:-2], -(-shape[-2] // rows) * rows, -(-shape[-1] // LANES) * LANES]
    block = math.prod(padded) * operand.itemsize
    if operand.role == "accumulator":
        return (block if loop else 0), 0
    fetches, passed = 1, 1
    for name, count in steps.items():  # in the grid's order
        passed *= count
        if name in operand.axes and count > 1:
            fetches = passed
    memory = block * (2 if fetches > 1 else 1)
    if operand.held_over is not None and operand.itemsize < 4:
        memory += block if blocks[operand.held_over] > _matrix_unit(chip) else block // 2
    return memory, fetches


def _gpu_cost(
    operand: Operand,
    shape: Sequence[int],
    blocks: Mapping[str, int],
    steps: Mapping[str, int],
    loop: set[str],
    chip: Target,
    stages: int,
) -> tuple[int, int]:
    """Bytes of shared memory and the number of loads (or stores) of an operand."""
    fetches = math.prod(count for name, count in steps.items() if name in operand.axes or name not in loop)
    if operand.role != "input":
        return 0, fetches  # sums are registers, and leave through memory that the inputs no longer need
    sides = [size if isinstance(size, int) else blocks[size] for size in operand.axes]  # padded to powers of two
    changes = any(name in loop and steps[name] > 1 for name in operand.axes if isinstance(name, str))
    assert isinstance(chip, GpuTarget)
    held = stages if chip.capability >= (9, 0) else max(stages - 1, 1)
    return math.prod(sides) * operand.itemsize * (held if changes else 1), fetches


def _fits_registers(nest: LoopNest, candidate: Candidate, chip: Target) -> bool:
    if isinstance(chip, TpuTarget):
        return True
    sums = (operand for operand in nest.operands if operand.role == "accumulator")
    sizes = (
        math.prod(a if isinstance(a, int) else candidate.blocks[a] for a in operand.axes) * operand.itemsize
        for operand in sums
    )
    return 2 * sum(sizes) <= REGISTER_BYTES
