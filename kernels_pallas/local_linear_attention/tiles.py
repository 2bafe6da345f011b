"""How XLA's version cuts a call into tiles of query rows, so that no tensor of [T, S] rows for all T is ever held."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.local_linear_attention.problem import Inputs, Options
from kernels_pallas.local_linear_attention.solve import System, dot, rows_keys, weights_keys

TILE = 128  # query positions of a tile
STRETCHES = 8  # causal calls are cut into stretches of queries, each of which reads only the keys up to its end


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive queries that are worked on against the same keys, all of them in one loop over tiles.

    Attributes:
        start: first query.
        tiles: tiles in it; the last one may reach beyond T.
        tile: queries of a tile.
        keys: keys that it reads, from the first on.
    """

    start: int
    tiles: int
    tile: int
    keys: int


def stretches(queries: int, keys: int, options: Options) -> Iterator[Stretch]:
    """Cut T queries into stretches; a causal one reads no key that all of its rows are too early to see."""
    tile = min(TILE, queries)
    total = -(-queries // tile)
    offset = options.static_offset if options.is_causal else None
    # At least two tiles each: a loop of one round is no loop to XLA, which then holds the arrays of several at once.
    parts = 1 if offset is None else min(STRETCHES, -(-total // 2))
    edges = [round(i * total / parts) for i in range(parts + 1)]
    for first, last in itertools.pairwise(edges):
        seen = keys if offset is None else min(keys, max(1, last * tile + offset))
        yield Stretch(first * tile, last - first, tile, seen)


def by_heads(x: Array, heads: int) -> Array:
    """[B, T, N, ...] -> [B, K, T, N/K, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, x.shape[2] // heads, *x.shape[3:]), 2, 1)


def from_heads(x: Array) -> Array:
    """[B, K, T, N/K, ...] -> [B, T, N, ...]."""
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


class Keys(NamedTuple):
    """Keys and values of a call as tiles use them; zero where no query sees them, whatever they were (NaN as well)."""

    k: Array  # [B, K, S, H] acc, less the shift: covariances of keys with a large mean then lose no digits
    v: Array  # [B, K, S, Hv] acc
    shift: Array  # [B, K, 1, H] acc, the mean of the keys that are seen

    def first(self, count: int) -> "Keys":
        """The first ``count`` of them."""
        return Keys(self.k[:, :, :count], self.v[:, :, :count], self.shift)


def keys_of(inputs: Inputs, options: Options) -> Keys:
    """Bring keys and values into the solver's precision and layout."""
    k, v = (x.astype(inputs.ridge.dtype).swapaxes(1, 2) for x in (inputs.k, inputs.v))
    queries, heads, keys = inputs.q.shape[1], k.shape[1], k.shape[2]
    mask = jnp.ones((1, 1, 1, 1), bool) if inputs.mask is None else inputs.mask
    seen = jnp.broadcast_to(mask, (*mask.shape[:3], keys))
    if options.is_causal:
        rows = jnp.arange(queries) if mask.shape[2] > 1 else jnp.full(1, queries - 1)
        seen = seen & (jnp.arange(keys) <= rows[:, None] + inputs.offset)
    seen = seen.any(2)  # [B|1, N|1, S]
    if mask.shape[1] > 1:
        seen = seen.reshape(seen.shape[0], heads, -1, keys).any(2)
    seen = seen[..., None]
    k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    shift = k.sum(2, keepdims=True) / jnp.maximum(seen.sum(2, keepdims=True), 1).astype(k.dtype)
    return Keys(jnp.where(seen, k - shift, 0), v, shift)


class Tile:
    """One tile of a stretch: its rows (queries of a group's heads together) and what they see."""

    def __init__(self, inputs: Inputs, options: Options, stretch: Stretch, keys: Keys, index: Array):
        self.inputs, self.options, self.stretch = inputs, options, stretch
        self.keys, self.values, self.shift = keys
        self.first = stretch.start + index * stretch.tile

    def rows(self, x: Array, fill: int = 0) -> Array:
        """Rows of the tile from [B, T, N, ...]: [B, K, R, ...] with R = tile · N/K; ``fill`` beyond T."""
        x = x[:, :, :, None] if x.ndim == 3 else x
        take = self.first + jnp.arange(self.stretch.tile)
        part = jnp.take(x, take, axis=1, mode="fill", fill_value=fill)
        part = by_heads(part, self.keys.shape[1])
        return part.reshape(*part.shape[:2], -1, part.shape[-1]).astype(self.keys.dtype)

    def keep(self) -> Array:
        """Which keys each row sees, broadcastable to [B, K, R, S]."""
        group = self.inputs.q.shape[2] // self.keys.shape[1]
        position = self.first + jnp.arange(self.stretch.tile)
        keep = jnp.broadcast_to((position < self.inputs.q.shape[1])[:, None], (self.stretch.tile, self.stretch.keys))
        if self.options.is_causal:
            keep &= jnp.arange(self.stretch.keys) <= position[:, None] + self.inputs.offset
        mask = self.inputs.mask
        if mask is None:
            return jnp.repeat(keep, group, 0)[None, None]
        if mask.shape[2] > 1:
            mask = jnp.take(mask, position, axis=2, mode="fill", fill_value=False)
        mask = (mask[..., : self.stretch.keys] if mask.shape[3] > 1 else mask) & keep
        heads = self.keys.shape[1] if mask.shape[1] > 1 else 1
        each = mask.shape[1] // heads if mask.shape[1] > 1 else 1
        mask = jnp.moveaxis(mask.reshape(mask.shape[0], heads, each, *mask.shape[2:]), 2, 3)
        mask = jnp.broadcast_to(mask, (*mask.shape[:3], group, mask.shape[-1]))
        return mask.reshape(*mask.shape[:2], -1, mask.shape[-1])

    def logits(self) -> tuple[Array, Array]:
        """Logits of what each row sees and −inf elsewhere, less a number per row; and that number [B, K, R, 1]."""
        q = self.rows(self.inputs.q)
        logits = jnp.where(self.keep(), self.inputs.scale * rows_keys(q, self.keys), -jnp.inf)
        return logits, self.inputs.scale * dot(q, self.shift)

    def system(self, p: Array, mean: Array) -> System:
        """The rows' systems; ``mean`` is relative to the shift, as the keys are."""
        return System(p, self.keys, mean, self.rows(self.inputs.ridge, fill=1))

    def weigh(self) -> tuple[System, Array]:
        """The rows' systems with softmax weights, and log Σ exp [B, K, R, 1]."""
        logits, less = self.logits()
        top = logits.max(-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)  # a row that sees no key
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        p = weights / jnp.where(total == 0, 1, total)
        return self.system(p, weights_keys(p, self.keys)), top + less + jnp.log(total)


def run(
    inputs: Inputs, options: Options, body: Callable[[Tile, Any], tuple[Any, Any]], carry: Callable[[int], Any]
) -> Iterator[tuple[Stretch, Any, Any]]:
    """Run ``body`` on every tile.

    Args:
        inputs: the call.
        options: its options.
        body: (tile, carry) -> (carry, results per row [B, K, R, ...]).
        carry: start of the carry for a number of keys; each stretch has one of its own.

    Yields:
        For each stretch its last carry and its results as [B, T of the stretch, N, ...].
    """
    keys = keys_of(inputs, options)
    group = inputs.q.shape[2] // inputs.k.shape[2]
    for stretch in stretches(inputs.q.shape[1], inputs.k.shape[1], options):

        def step(state: Any, index: Array, stretch: Stretch = stretch) -> tuple[Any, Any]:
            return body(Tile(inputs, options, stretch, keys.first(stretch.keys), index), state)

        def back(x: Array, stretch: Stretch = stretch) -> Array:
            tiles, batch, heads = x.shape[:3]  # [tiles, B, K, tile · group, ...]
            x = x.reshape(tiles, batch, heads, stretch.tile, group, *x.shape[4:])
            x = jnp.moveaxis(x, 0, 2).reshape(batch, heads, tiles * stretch.tile, group, *x.shape[5:])
            return from_heads(x)[:, : inputs.q.shape[1] - stretch.start]

        last, rows = jax.lax.scan(step, carry(stretch.keys), jnp.arange(stretch.tiles))
        yield stretch, last, jax.tree.map(back, rows)
