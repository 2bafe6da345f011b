"""What a masked-diffusion model predicts at a position, and how sure it is.

x₀ = argmax l,   c = softmax(l)[x₀] = 1 / Σ exp(l − max l);   with a temperature x₀ = argmax (l + temperature·Gumbel)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxaccel.compression import linear
from kernels_pallas.lm_head_confidence import lm_head_confidence


class DiffusionModel(NamedTuple):
    """A model in two parts, so that only the rows that are asked for meet the output matrix.

    Keep the same functions between calls: they are part of what is compiled.
    """

    hidden: Callable[..., Any]
    """``(params, tokens [B, n], *, kv, positions [B, n], key_mask [B, S], return_kv) -> hidden [B, n, D][, kv]``."""
    matrix: Callable[[Any], Any]
    """``params -> [V, D]``."""


def confidence_and_token(
    logits: Float[Array, "*B V"],
    *,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
    forbid: int | None = None,
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
    """The predicted token and its probability.

    Args:
        logits: in any float type.
        temperature: 0 takes the likeliest token; above, a token is drawn from softmax(logits/temperature).
        key: needed with a temperature.
        dtype: in which probabilities are worked. bfloat16 would make many of them 1, and ties of them.
        forbid: a token that is never predicted (the mask: it would say nothing). Its share of probability stays.

    Returns:
        int32 ids; of equal logits the lowest. Probabilities under the softmax without temperature.

    Raises:
        ValueError: for a negative temperature, one without a key, or a forbidden token out of the vocabulary.

    >>> token, confidence = confidence_and_token(jnp.array([0.0, 0.0, jnp.log(2.0)]))
    >>> int(token), round(float(confidence), 6)
    (2, 0.5)
    >>> int(confidence_and_token(jnp.array([0.0, 0.0, 1.0]), forbid=2)[0])
    0
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected 0 or a positive number")
    if temperature and key is None:
        raise ValueError(f"temperature is {temperature}: sampling needs a key")
    if forbid is not None and not 0 <= forbid < logits.shape[-1]:
        raise ValueError(f"forbid is {forbid}, expected a token id below the vocabulary's {logits.shape[-1]}")
    wide = logits.astype(dtype)
    allowed = wide
    if temperature:
        assert key is not None
        allowed = allowed + temperature * jax.random.gumbel(key, wide.shape, wide.dtype)
    if forbid is not None:
        allowed = jnp.where(jnp.arange(wide.shape[-1]) == forbid, -jnp.inf, allowed)
    token = jnp.argmax(allowed, -1).astype(jnp.int32)
    chosen = jnp.take_along_axis(wide, token[..., None], -1)[..., 0]
    largest = jnp.max(wide, -1)
    # Not exp(chosen − logsumexp): that difference of large numbers loses digits.
    return token, jnp.exp(chosen - largest) / jnp.sum(jnp.exp(wide - largest[..., None]), -1)


def guided(logits: Float[Array, "B *n V"], scale: float) -> Float[Array, "B2 *n V"]:
    """Classifier-free guidance: of a batch with the prompt, then the same without it, l_u + (scale + 1)·(l − l_u)."""
    with_prompt, without = jnp.split(logits, 2)
    return without + (scale + 1) * (with_prompt - without)


def predict(
    model: Any,
    params: Any,
    rows: Float[Array, "B n _"],
    *,
    mask_id: int,
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    keys: Any = None,
) -> tuple[Int[Array, "_ n"], Float[Array, "_ n"]]:
    """Tokens and confidences from what a model returned at some positions: hidden states, or logits.

    Args:
        model: a `DiffusionModel`, whose rows are hidden states; else rows are logits.
        params: of the model.
        rows: with guidance, twice the batch.
        mask_id: never predicted.
        cfg_scale: strength of guidance; 0 for none.
        temperature: of `confidence_and_token`.
        keys: one for each position [B, n], with a temperature.
    """
    if isinstance(model, DiffusionModel):
        matrix = model.matrix(params)
        _check_mask(mask_id, matrix.shape[0])
        if isinstance(matrix, jax.Array) and not (cfg_scale or temperature):
            return lm_head_confidence(rows, matrix, forbid=mask_id)  # no logits are written
        logits = linear(rows, matrix)
    else:
        _check_mask(mask_id, rows.shape[-1])
        logits = rows
    if cfg_scale:
        logits = guided(logits, cfg_scale)
    if not temperature:
        return confidence_and_token(logits, forbid=mask_id)

    def draw(row: Array, key: Array) -> Any:
        return confidence_and_token(row, temperature=temperature, key=key, forbid=mask_id)

    return jax.vmap(jax.vmap(draw))(logits, keys)


def _check_mask(mask_id: int, size: int) -> None:
    if mask_id >= size:
        raise ValueError(f"mask_id is {mask_id}, expected an id below the vocabulary's {size}")
