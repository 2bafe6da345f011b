"""Forward pass without Pallas: a loop over tiles of queries, where a solver iteration is two products with keys."""

import jax
import jax.numpy as jnp

from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options
from kernels_pallas.local_linear_attention.solve import dot, rows_keys, solve, weights_keys
from kernels_pallas.local_linear_attention.tiles import Tile, run
from kernels_pallas.local_linear_attention.xla_backward import backward

__all__ = ["backward", "forward", "refusal"]


def refusal(inputs: Inputs, options: Options) -> None:
    """XLA's version takes every call."""


def forward(inputs: Inputs, options: Options) -> Forward:
    """See `Forward`; scratch is that of one tile: a few arrays of [B, N, 128, S]."""

    def body(tile: Tile, carry: None) -> tuple[None, tuple[jax.Array, ...]]:
        system, lse = tile.weigh()
        seen = lse > -jnp.inf
        if inputs.probe is None:
            # NaN rows are not `seen` but not masked either: they solve 0, and their p makes the output NaN.
            b = jnp.where(seen, tile.rows(inputs.q) - tile.shift - system.mean, 0)
            x, count = solve(system, b, options)
        else:
            x, count = jnp.where(seen, tile.rows(inputs.probe), 0), jnp.int32(0)
        weights = system.p * (1 + rows_keys(x, system.k) - dot(x, system.mean))
        out = weights_keys(weights, tile.values).astype(inputs.q.dtype)
        mean = jnp.where(lse != -jnp.inf, system.mean + tile.shift, 0)
        return None, (out, x, mean, lse[..., 0], jnp.full(lse.shape[:-1], count))

    parts = [rows for _, _, rows in run(inputs, options, body, lambda keys: None)]
    return Forward(*(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True)))
