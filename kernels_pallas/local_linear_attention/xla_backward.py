"""Backward pass without Pallas: the same loop over tiles, with one more solve and the exact gradients.

With G = dO·v, c = k − k̄, g = Σ p G and t = Σ p G c + dx (dx: the cotangent of x itself),

    A y = t                                         the only solve
    h  = G(1 + x·c) − (y·c)(x·c) − (g x + y)·c      how the loss depends on p
    ds = p (h − Σ p h + d(lse))                     and so on the logits
    dv = Σᵢ p (1 + x·c) dO
    dk = Σᵢ [p(G − g) − p(y·c)] x − p (1 + x·c) y + scale·ds·q
"""

import jax
import jax.numpy as jnp

from kernels_pallas.local_linear_attention.problem import Backward, Cotangents, Forward, Inputs, Options
from kernels_pallas.local_linear_attention.solve import HIGH, dot, rows_keys, solve, weights_keys
from kernels_pallas.local_linear_attention.tiles import Tile, run

Sums = tuple[jax.Array, jax.Array]


def _keys_rows(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums of rows [..., R, H] with weights [..., R, S]: [..., S, H]."""
    return jnp.einsum("...rs,...rh->...sh", weights, rows, precision=HIGH)


def backward(inputs: Inputs, options: Options, fwd: Forward, cot: Cotangents) -> Backward:
    """See `Backward`; scratch is that of one tile and the gradients of keys and values in the solver's precision."""
    acc = inputs.ridge.dtype

    def body(tile: Tile, carry: Sums) -> tuple[Sums, tuple[jax.Array, jax.Array]]:
        x, lse = tile.rows(fwd.x), tile.rows(fwd.lse)
        mean = tile.rows(fwd.mean) - tile.shift
        seen = lse != -jnp.inf
        logits, less = tile.logits()
        p = jnp.where(seen, jnp.exp(logits - jnp.where(seen, lse - less, 0)), 0)
        out, dlse = tile.rows(cot.out), jnp.where(seen, tile.rows(cot.lse), 0)

        gain = rows_keys(out, tile.values)  # G
        weighted = p * gain
        mean_gain = weighted.sum(-1, keepdims=True)  # g
        t = weights_keys(weighted, tile.keys) - mean_gain * mean + tile.rows(cot.x)
        t = jnp.where(seen, t, 0)
        along_x = rows_keys(x, tile.keys) - dot(x, mean)
        reach = p * (1 + along_x)
        if options.solve:
            y, _ = solve(tile.system(p, mean), t, options)
            along_y = rows_keys(y, tile.keys) - dot(y, mean)
            h = gain * (1 + along_x) - along_y * along_x - mean_gain * along_x - along_y
        else:
            y, along_y = t, jnp.zeros_like(along_x)
            h = gain * (1 + along_x) - mean_gain * along_x
        ds = p * (h - jnp.sum(p * h, -1, keepdims=True) + dlse)
        dk, dv = carry
        dk += _keys_rows(p * (gain - mean_gain - along_y), x) + _keys_rows(ds, inputs.scale * tile.rows(inputs.q))
        if options.solve:
            dk -= _keys_rows(reach, y)
        dv += _keys_rows(reach, out)
        return (dk, dv), (y, weights_keys(ds, tile.keys) + dlse * tile.shift)  # Σ ds = d(lse)

    def start(keys: int) -> Sums:
        return tuple(jnp.zeros((*a.shape[:1], a.shape[2], keys, a.shape[3]), acc) for a in (inputs.k, inputs.v))  # type: ignore[return-value]

    dk, dv = start(inputs.k.shape[1])
    rows = []
    for stretch, (k_part, v_part), part in run(inputs, options, body, start):
        rest = [(0, 0), (0, 0), (0, inputs.k.shape[1] - stretch.keys), (0, 0)]
        dk, dv = dk + jnp.pad(k_part, rest), dv + jnp.pad(v_part, rest)
        rows.append(part)
    solved, logit = (jnp.concatenate(part, axis=1) for part in zip(*rows, strict=True))
    return Backward(
        solved, logit, dk.swapaxes(1, 2).astype(inputs.k.dtype), dv.swapaxes(1, 2).astype(inputs.v.dtype)
    )  # fmt: skip
