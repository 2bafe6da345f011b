"""Whole layers left out of a trained network, and MLPs with fewer channels, without training.

    I_l = 1 − mean cos(x_l, x_{l+1})

x_l is the residual stream that enters block l: a block that hardly turns it is dropped first. Cosines do not see scale,
so that a block which only rescales looks idle, too.

When to use it: deep networks (30 layers and more) with little time for tuning; calibrate on 32 samples or more. When
not: small networks have no idle layers, and each dropped one costs quality.

Yang et al., EfficientVLA, arXiv 2506.10100, equation 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FLOOR = 1e-12
"""Norms below it count as zero; a zero vector is taken as not turned."""


class ImportanceState(NamedTuple):
    """Sums over the samples seen so far."""

    total: Float[Array, "L"]  # sum over samples of the mean cosine of a sample, float32 at least
    samples: Float[Array, ""]  # number of samples with at least one position


def init_importance(num_layers: Any, dtype: Any = jnp.float32) -> ImportanceState:
    """No samples yet.

    Args:
        num_layers: L, at least 1.
        dtype: of the sums.

    Raises:
        ValueError: for fewer than one layer.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}, expected at least 1")
    return ImportanceState(jnp.zeros(num_layers, dtype), jnp.zeros((), dtype))


def _cosines(hidden_states: Any, mask: Any) -> tuple[Array, Array]:
    """Mean cosine of each layer and sample [L, B], and which samples count [B]."""
    hidden = jnp.asarray(hidden_states)
    if hidden.ndim != 4 or hidden.shape[0] < 2:
        raise ValueError(f"hidden_states has shape {hidden.shape}, expected [L+1, B, S, D] with at least one layer")
    if mask is not None and tuple(mask.shape) != tuple(hidden.shape[1:3]):
        raise ValueError(f"mask has shape {mask.shape}, expected {hidden.shape[1:3]} as hidden_states")
    x = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    # The largest entry first: squares of large or tiny activations would overflow or vanish.
    scale = jnp.max(jnp.abs(x), -1, keepdims=True)
    x = x / jnp.where(scale > FLOOR, scale, 1)
    norms = jnp.linalg.norm(x, axis=-1)
    dots = jnp.sum(x[:-1] * x[1:], -1)
    still = (scale[:-1, ..., 0] <= FLOOR) | (scale[1:, ..., 0] <= FLOOR)
    cosines = jnp.where(still, 1, dots / jnp.maximum(norms[:-1] * norms[1:], FLOOR))
    if mask is None:
        return jnp.mean(cosines, -1), jnp.ones(hidden.shape[1], bool)
    real = jnp.asarray(mask, bool)
    count = jnp.sum(real, -1)
    mean = jnp.sum(jnp.where(real, cosines, 0), -1) / jnp.maximum(count, 1)
    return mean, count > 0


def accumulate_importance(state: ImportanceState, hidden_states: Any, *, mask: Any = None) -> ImportanceState:
    """Add a batch of calibration samples.

    Args:
        state: from `init_importance`.
        hidden_states: residual streams [L+1, B, S, D]: what enters block 0, …, what leaves the last.
        mask: bool [B, S], real positions; all by default. Samples without any do not count.

    Raises:
        ValueError: for other shapes, or another number of layers than the state's.
    """
    mean, counted = _cosines(hidden_states, mask)
    if mean.shape[0] != state.total.shape[0]:
        raise ValueError(f"hidden_states has {mean.shape[0]} layers, expected {state.total.shape[0]} as state")
    return ImportanceState(
        state.total + jnp.sum(jnp.where(counted, mean, 0), -1).astype(state.total.dtype),
        state.samples + jnp.sum(counted).astype(state.samples.dtype),
    )


def finalize_importance(state: ImportanceState) -> Float[Array, "L"]:
    """I of each layer, in [0, 2]; NaN without samples."""
    return 1 - state.total / state.samples


def layer_importance(hidden_states: Any, *, mask: Any = None) -> Float[Array, "L"]:
    """How much each layer turns the residual stream: the mean over positions, then over samples.

    Args:
        hidden_states: residual streams [L+1, B, S, D], not normalised.
        mask: bool [B, S], real positions; all by default.

    Returns:
        I [L] in [0, 2], float32 at least: 0 for an identity, 2 for x → −x.

    Raises:
        ValueError: for other shapes.

    >>> x = jnp.ones((1, 2, 4))
    >>> layer_importance(jnp.stack([x, 3 * x, -x])).round(3).tolist()
    [0.0, 2.0]
    """
    mean, counted = _cosines(hidden_states, mask)
    return 1 - jnp.sum(jnp.where(counted, mean, 0), -1) / jnp.sum(counted)


def select_layers(importance: Any, *, num_drop: Any) -> tuple[int, ...]:
    """Layers to keep: all but the ``num_drop`` least important; of equals the lower index is dropped first.

    Works on the host, as which layers there are shapes the program.

    Args:
        importance: [L], concrete.
        num_drop: n, 0 … L − 1.

    Returns:
        Kept indices, ascending.

    Raises:
        ValueError: for NaN, another shape, or ``num_drop`` outside 0 … L − 1.

    >>> select_layers([0.3, 0.1, 0.2, 0.1], num_drop=1)
    (0, 2, 3)
    """
    values = np.asarray(importance)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"importance has shape {values.shape}, expected [L]")
    if np.isnan(values).any():
        raise ValueError(f"importance of layers {np.flatnonzero(np.isnan(values)).tolist()} is NaN")
    if isinstance(num_drop, bool) or not isinstance(num_drop, (int, np.integer)) or not 0 <= num_drop < values.size:
        raise ValueError(f"num_drop is {num_drop}, expected 0 to {values.size - 1} of {values.size} layers")
    dropped = set(np.argsort(values, kind="stable")[:num_drop].tolist())
    return tuple(layer for layer in range(values.size) if layer not in dropped)


def prune_layers(params: Any, kept: Sequence[int]) -> Any:
    """Keep some layers of a stack.

    Args:
        params: a list or tuple of layers, or a tree of arrays stacked [L, ...] (`kv` caches of unpruned networks do not
            fit pruned ones).
        kept: from `select_layers`, ascending.

    Returns:
        As ``params``, with fewer layers.

    Raises:
        ValueError: for none, indices that do not rise or do not exist, or leaves of different lengths.

    >>> prune_layers(["a", "b", "c"], (0, 2))
    ['a', 'c']
    """
    plain = isinstance(params, (list, tuple)) and not hasattr(params, "_fields")
    lengths = {len(params)} if plain else {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(params)}
    if len(lengths) != 1:
        raise ValueError(f"params has leaves with {sorted(lengths)} layers, expected equal numbers")
    (count,) = lengths
    chosen = [int(k) for k in kept]
    if not chosen:
        raise ValueError("kept is empty, expected at least one layer")
    if sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"kept is {tuple(chosen)}, expected rising indices from 0 to {count - 1}")
    if plain:
        return type(params)(params[k] for k in chosen)
    return jax.tree.map(lambda x: x[np.array(chosen)], params)


def slice_mlp(
    params: Mapping[str, Any],
    *,
    keep_ratio: Any,
    scores: Any = None,
    inputs: Sequence[str] = ("gate", "up", "up_bias"),
    output: str = "down",
) -> dict[str, Any]:
    """Keep the ceil(``keep_ratio``·F) best of an MLP's F channels. Ours, a stand-in for PruneNet.

    EfficientVLA removes a quarter of the channels by PruneNet, which learns a policy that could not be read; the
    speeds of the paper need this part, too. Here channels have ``scores``; by default the product of the norms of their
    weights, Π ‖W_in[c]‖ · ‖W_out[:, c]‖. Dropped channels are zero from then on, and nothing makes up for them.

    Args:
        params: a layer; matrices are [out, in], or stacked [L, out, in]. Other entries stay.
        keep_ratio: in (0, 1].
        scores: [F] or, of stacked layers, [L, F]; higher is kept, of equals the lower index.
        inputs: entries whose rows are channels; those that are absent are skipped.
        output: entry whose columns are channels.

    Returns:
        The layer with fewer channels, in their old order.

    Raises:
        ValueError: for a ratio outside (0, 1], entries that are absent or of different lengths, NaN scores on the host.

    >>> layer = {"up": jnp.array([[1.0], [3.0], [2.0]]), "down": jnp.ones((1, 3))}
    >>> slice_mlp(layer, keep_ratio=0.5)["up"].tolist()
    [[3.0], [2.0]]
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}, expected a number in (0, 1]")
    rows = [name for name in inputs if name in params]
    matrices = [name for name in rows if not name.endswith("bias")]
    if output not in params or not matrices:
        raise ValueError(f"params has {sorted(params)}, expected {output} and one of {', '.join(inputs)}")
    down = params[output]
    lead, width = down.shape[:-2], down.shape[-1]
    for name in rows:
        axis = -1 if name.endswith("bias") else -2
        if params[name].shape[axis] != width:
            raise ValueError(f"{name} has {params[name].shape[axis]} channels, expected {width} as {output}")
    if scores is None:
        scores = jnp.linalg.norm(down, axis=-2)
        for name in matrices:
            scores = scores * jnp.linalg.norm(params[name], axis=-1)
    scores = jnp.asarray(scores)
    if scores.shape != (*lead, width):
        raise ValueError(f"scores has shape {scores.shape}, expected {(*lead, width)}")
    if not isinstance(scores, jax.core.Tracer) and bool(jnp.isnan(scores).any()):
        raise ValueError("scores has NaN")
    count = math.ceil(round(keep_ratio * width, 9))
    kept = jnp.sort(jax.lax.top_k(scores, count)[1], -1)
    result = dict(params)
    for name in rows:
        index = kept if name.endswith("bias") else kept[..., None]
        result[name] = jnp.take_along_axis(params[name], index, -1 if name.endswith("bias") else -2)
    result[output] = jnp.take_along_axis(down, kept[..., None, :], -1)
    return result
