"""Pallas kernels for GPUs (Triton): one pass over the activations, rows whole in registers.

A program takes a run of tokens of one sample, a few rows at a time; gates, shift and scale stay in its registers. Rows
are padded to a power of two by a mask, which moves no bytes. In the backward pass each program sums the gradients of
gates, shift and scale over its own tokens, and XLA adds what the programs of a sample found.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.modulated_residual.problem import dtype_refusal, normed, pull

AT_ONCE = 2048  # elements of a turn: rows times their padded width
TURNS = 8  # of a program
MAX_WIDTH = 8192
MAX_BRANCHES = 8


def refusal(x: Shaped, branches: Sequence[Shaped], gates: Sequence[Shaped], shift: Shaped, scale: Shaped) -> str | None:
    """Why the kernels cannot take a call, or ``None``."""
    if reason := dtype_refusal((x, *branches), (jnp.float32, jnp.bfloat16, jnp.float16)):
        return reason
    if reason := dtype_refusal((*gates, shift, scale), (jnp.float32, jnp.bfloat16, jnp.float16)):
        return reason
    if len(branches) > MAX_BRANCHES:
        return f"there are {len(branches)} branches, expected at most {MAX_BRANCHES}: their gates stay in registers"
    if x.shape[2] > MAX_WIDTH:
        return f"rows have {x.shape[2]} elements, expected at most {MAX_WIDTH}: they stay in registers"
    return None


class _Plan:
    """Sizes of a launch, and how a program reads and writes its rows."""

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width
        self.padded = int(pl.next_power_of_2(width))
        self.rows = max(1, min(AT_ONCE // self.padded, int(pl.next_power_of_2(length))))
        self.turns = min(TURNS, -(-length // self.rows))
        self.tiles = -(-length // (self.rows * self.turns))
        warps = max(1, min(16, self.rows * self.padded // 256))
        self.options = plt.CompilerParams(num_warps=warps, num_stages=2)

    def place(self, tile: Array, turn: Array) -> tuple[Array, Array, Array]:
        """Tokens, columns and mask of a turn of the program that has this tile."""
        token = ((tile * self.turns + turn) * self.rows + jnp.arange(self.rows))[:, None]
        column = jnp.arange(self.padded)[None, :]
        return token, column, (token < self.length) & (column < self.width)

    def read(self, ref: Any, sample: Array, place: tuple[Array, Array, Array]) -> Array:
        token, column, inside = place
        return plt.load(ref.at[sample, token, column], mask=inside, other=0.0).astype(jnp.float32)

    def write(self, ref: Any, sample: Array, place: tuple[Array, Array, Array], value: Array) -> None:
        token, column, inside = place
        plt.store(ref.at[sample, token, column], value.astype(ref.dtype), mask=inside)

    def modulations(self, ref: Any, sample: Array) -> list[Array]:
        """Gates, shift and scale of a sample, [1, padded] each."""
        column = jnp.arange(self.padded)[None, :]
        return [
            plt.load(ref.at[sample, k, column], mask=column < self.width, other=0.0).astype(jnp.float32)
            for k in range(ref.shape[1])
        ]


def _body(*refs: Any, plan: _Plan, branches: int, eps: float, limit: int | None) -> None:
    if limit is None:
        sample = slot = pl.program_id(0)
        writes = None
    else:
        order_ref, count_ref, *refs = refs  # type: ignore[assignment]
        slot = pl.program_id(0)
        sample = order_ref[slot]
        writes = slot < jnp.minimum(count_ref[0], limit)
        slot = jnp.minimum(slot, limit - 1)
    tile = pl.program_id(1)
    mods_ref, x_ref, *branch_refs, new_ref, h_ref = refs
    *gates, shift, scale = plan.modulations(mods_ref, sample)

    def turn(index: Array, carry: None) -> None:
        place = plan.place(tile, index)
        total = plan.read(x_ref, sample, place)
        for gate, ref in zip(gates, branch_refs, strict=True):
            total += gate * plan.read(ref, sample, place)
        rounded = total.astype(new_ref.dtype)
        plan.write(new_ref, sample, place, rounded)
        unit, _ = normed(rounded.astype(jnp.float32), plan.width, eps)
        if writes is not None:
            place = (*place[:2], place[2] & writes)
        plan.write(h_ref, slot, place, unit * (1 + scale) + shift)

    jax.lax.fori_loop(0, plan.turns, turn, None)


def _modulations(gates: Sequence[Array], shift: Array, scale: Array) -> Array:
    """[B, K + 2, D]: gates, shift, scale."""
    return jnp.stack([*gates, shift, scale], 1)


def _launch(
    x: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    eps: float,
    scalars: tuple[Array, ...],
    limit: int | None,
    interpret: Any,
) -> tuple[Array, Array]:
    samples, length, width = x.shape
    plan = _Plan(length, width)
    mods = _modulations(gates, shift, scale)
    like = functools.partial(kernel_output, [*scalars, x, *branches, mods])
    new, h = pl.pallas_call(
        functools.partial(_body, plan=plan, branches=len(branches), eps=eps, limit=limit),
        grid=(samples, plan.tiles),
        out_shape=[like(x.shape, x.dtype), like((samples if limit is None else limit, length, width), x.dtype)],
        compiler_params=plan.options,
        interpret=interpret,
        name="modulated_residual" if limit is None else "modulated_residual_rows",
    )(*scalars, mods, x, *branches)
    return new, h


def forward(
    x: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    eps: float,
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """x′ and h; see `refusal` for what it takes."""
    return _launch(x, branches, gates, shift, scale, eps, (), None, interpret)


def forward_rows(
    x: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    eps: float,
    order: Array,
    count: Array,
    limit: int,
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """x′ of all samples and h of those that compute, which come first in ``order``."""
    return _launch(x, branches, gates, shift, scale, eps, (order, count[None]), limit, interpret)


def _backward_body(*refs: Any, plan: _Plan, branches: int, eps: float) -> None:
    mods_ref, new_ref, into_new_ref, into_h_ref, *rest = refs
    branch_refs, (x_ref, *into_refs), mods_out = rest[:branches], rest[branches:-1], rest[-1]
    sample, tile = pl.program_id(0), pl.program_id(1)
    *gates, _, scale = plan.modulations(mods_ref, sample)

    def turn(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        place = plan.place(tile, index)
        into_h = plan.read(into_h_ref, sample, place)
        unit, inverse = normed(plan.read(new_ref, sample, place), plan.width, eps)
        slope = pull(unit, inverse, scale, plan.read(into_new_ref, sample, place), into_h, plan.width)
        plan.write(x_ref, sample, place, slope)
        found = []
        for gate, ref, out_ref in zip(gates, branch_refs, into_refs, strict=True):
            plan.write(out_ref, sample, place, gate * slope)
            found.append(slope * plan.read(ref, sample, place))
        found += [into_h, into_h * unit]
        return tuple(total + value.sum(0, keepdims=True) for total, value in zip(sums, found, strict=True))

    start = tuple(jnp.zeros((1, plan.padded), jnp.float32) for _ in range(branches + 2))
    sums = jax.lax.fori_loop(0, plan.turns, turn, start)
    column = jnp.arange(plan.padded)[None, :]
    for k, total in enumerate(sums):
        plt.store(mods_out.at[sample, tile, k, column], total, mask=column < plan.width)


def backward(
    new: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    into_new: Array,
    into_h: Array,
    eps: float,
    *,
    interpret: Any = False,
) -> tuple[Array, list[Array], Array]:
    """Gradients of x, of the branches, and of gates, shift and scale [B, K + 2, D] float32; ``new`` is x′."""
    samples, length, width = new.shape
    plan = _Plan(length, width)
    mods = _modulations(gates, shift, scale)
    like = functools.partial(kernel_output, [new, *branches, mods, into_new, into_h])
    parts = (samples, plan.tiles, len(branches) + 2, width)
    into_x, *into_branches, into_mods = pl.pallas_call(
        functools.partial(_backward_body, plan=plan, branches=len(branches), eps=eps),
        grid=(samples, plan.tiles),
        out_shape=[*[like(new.shape, new.dtype)] * (1 + len(branches)), like(parts, jnp.float32)],
        compiler_params=plan.options,
        interpret=interpret,
        name="modulated_residual_backward",
    )(mods, new, into_new, into_h, *branches)
    return into_x, into_branches, into_mods.sum(1)
