"""Embedding gradient shrink (EGS): multiply the gradient of the embedding by a small factor, against loss spikes.

It makes training cheaper by letting small batches and few devices go through without restarts from checkpoints.

    g_E ← α·g_E    before clipping and before the moments;   the same inside a model: e ← α·e + (1 − α)·stop_gradient(e)

GLM-130B, Zeng et al., arXiv 2210.02414 (α = 0.1); a measure of GEB-1.3B, Wu et al., arXiv 2406.09900, without a number.

**Adam does not see the scale of a parameter's gradient.** With Adam, EGS acts only through clipping by the global norm
and through eps. With Adam alone, and eps = 0, it changes nothing.
"""

import re
from typing import Any

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxaccel.optim import _checks


def embedding_mask(params: Any) -> Any:
    """Return a tree of booleans that is true at leaves whose path contains "embed", whatever the case.

    "unembed" does not count: that is the output layer, whose gradient is not to be shrunk.

    Args:
        params: parameters, or anything of their structure.

    Returns:
        Booleans in the same structure.

    Raises:
        ValueError: if no path does.

    >>> embedding_mask({"embedding": 1.0, "layers": [{"q": 2.0}]})
    {'embedding': True, 'layers': [{'q': False}]}
    """
    found = re.compile("(?<!un)(?<!un_)embed", re.IGNORECASE)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: bool(found.search(jax.tree_util.keystr(path))), params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError('no leaf has "embed" in its path: give a mask that says which leaves are embeddings')
    return mask


def scale_by_embedding_shrink(alpha: ArrayLike = 0.1, mask: Any = None) -> optax.GradientTransformation:
    """Multiply the gradients of embeddings by α (EGS). To be placed before clipping and before the moments.

        g_E ← α·g_E

    Source: GLM-130B, arXiv 2210.02414, used by GEB-1.3B, arXiv 2406.09900. `shrink_embedding_gradient` is the same
    inside a model.

    When: gradients of the embedding dominate the global norm while training is unstable; clipping then shrinks the
    others less. When not: with Adam and without clipping, where it does nothing at all but through eps. A mask that
    includes a matrix that is also the output layer shrinks that layer's part of the gradient as well; the form inside
    the model does not.

    Args:
        alpha: factor >= 0; 1 changes nothing, 0 freezes.
        mask: which leaves are embeddings: a tree of booleans, or a function of the parameters; `embedding_mask` by
            default.

    Returns:
        A transformation; gradients keep their dtypes.

    Raises:
        ValueError: if alpha is negative or not finite; in ``init``, if the default finds no embedding.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(scale_by_embedding_shrink(0.1), optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    >>> params = {"embedding": jnp.ones(2), "head": jnp.ones(2)}
    >>> shrink = scale_by_embedding_shrink(0.5)
    >>> shrink.update(params, shrink.init(params))[0]
    {'embedding': Array([0.5, 0.5], dtype=float32), 'head': Array([1., 1.], dtype=float32)}
    """
    _checks.check_non_negative("alpha", alpha)
    # Multiplied in the wider of both dtypes: a traced float32 alpha must not widen bfloat16 gradients.
    scale = optax.stateless(lambda updates, params: jax.tree.map(lambda g: (alpha * g).astype(g.dtype), updates))
    return optax.masked(scale, embedding_mask if mask is None else mask)


def shrink_embedding_gradient(e: Float[Array, "*shape"], alpha: ArrayLike = 0.1) -> Float[Array, "*shape"]:
    """Return ``e`` itself, whose gradient is multiplied by α: EGS inside a model.

        e ← α·e + (1 − α)·stop_gradient(e)

    Source: GLM-130B, arXiv 2210.02414. It is worked as s + α·(e − s), s = stop_gradient(e), whose value is e to the
    bit, while the sum above rounds. Apply it to the table or to the rows looked up.

    Args:
        e: an embedding, finite.
        alpha: factor >= 0 of the gradient.

    Returns:
        The same values.

    Raises:
        ValueError: if alpha is negative or not finite.

    >>> import jax, jax.numpy as jnp
    >>> round(float(jax.grad(lambda e: shrink_embedding_gradient(e, 0.1) ** 2)(jnp.array(3.0))), 4)
    0.6
    """
    _checks.check_non_negative("alpha", alpha)
    still = jax.lax.stop_gradient(e)
    return still + (alpha * (e - still)).astype(e.dtype)
