"""A masked-diffusion language model on the decoder's blocks: LLaDA, which fills in masks and sees all of a text.

The blocks are those of `decoder` without a causal mask (``DecoderConfig(causal=False)``). Training masks a random share
of the answer and asks for what was there; text comes from `jaxaccel.decoding.learn2pd`, which reveals masks step by
step:

    t ~ U(0, 1) for each sample;  each token of the answer is masked with probability t
    loss = Σ over masked tokens of CE / t / length of the answer,   a mean over samples

For one sample the expectation over t and masks is an upper bound of −log p(answer | prompt) per token.

When to use it: texts that need not come from left to right, and many tokens per pass. When not: short answers at batch
1 from a causal model of the same size, whose cache makes each pass cheap.

Nie et al., Large Language Diffusion Models, arXiv 2502.09992.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaccel.decoding.learn2pd.confidence import DiffusionModel
from jaxaccel.models.decoder import (
    Context,
    Params,
    decoder_logits,
    embed,
    is_stacked,
    output_matrix,
    rms_norm,
    run_layers,
)
from jaxaccel.models.decoder_attention import Slots
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.rotary import rotary_angles

LLADA_MASK, LLADA_END = 126_336, 126_081
"""Token ids of LLaDA-8B: the mask, and the end of text."""


def masked_diffusion_hidden(
    params: Params,
    tokens: Int[Array, "B n"],
    config: DecoderConfig,
    *,
    kv: Any = None,
    positions: Int[Array, "B n"] | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    return_kv: bool = False,
) -> Any:
    """Hidden states of a text, or of some of its tokens beside the kept keys and values of the others.

    Args:
        params: of `init_params`, `load_pretrained`, or those `fuse`d, quantised, stacked.
        tokens: ids, with masks among them.
        config: of a model that is not causal.
        kv: keys and values of the whole text as an earlier call returned them, [B, S, K, H] per layer. Those of
            ``tokens`` are replaced.
        positions: of the tokens in the text; from 0 on by default. With ``kv``, a token whose position is S or more is
            computed but its keys and values are not kept.
        key_mask: which positions are seen, of ``kv`` or of the tokens; all by default.
        return_kv: also return keys and values.

    Returns:
        [B, n, D] after the final norm; with ``return_kv`` a tuple of it and keys and values, keys rotated.

    Raises:
        ValueError: for a causal configuration, more tokens than the model has positions, ``kv`` without positions.

    >>> config = DecoderConfig.tiny(causal=False)
    >>> from jaxaccel.models import init_params
    >>> params = init_params(jax.random.key(0), config)
    >>> hidden, kv = masked_diffusion_hidden(params, jnp.array([[1, 2, 3]]), config, return_kv=True)
    >>> hidden.shape, kv[0].keys.shape
    ((1, 3, 32), (1, 3, 2, 8))
    """
    if config.causal:
        raise ValueError("config.causal is True, expected a model that is not causal")
    batch, count = tokens.shape
    if not 0 < count <= config.max_positions:
        raise ValueError(f"tokens has {count} positions, expected 1 to max_positions = {config.max_positions}")
    if positions is None:
        if kv is not None:
            raise ValueError("kv is given without positions: which of the text's tokens are these?")
        positions = jnp.broadcast_to(jnp.arange(count), (batch, count))
    context = Context(rotary_angles(positions, config), key_mask, None, None, None, positions=positions)
    x, (keys, values, *_) = run_layers(params, embed(params, tokens, config), kv, context, config)
    hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    if not return_kv:
        return hidden
    return hidden, Slots(keys, values) if is_stacked(params) else tuple(map(Slots, keys, values))


@functools.cache
def diffusion_model(config: DecoderConfig) -> DiffusionModel:
    """The model as `jaxaccel.decoding.learn2pd.decode` likes it: only the rows that are asked for become logits.

    The same object for equal configurations.

    Raises:
        ValueError: for a causal configuration.
    """
    if config.causal:
        raise ValueError("config.causal is True, expected a model that is not causal")
    return DiffusionModel(functools.partial(masked_diffusion_hidden, config=config), output_matrix)


@functools.cache
def masked_diffusion_apply(config: DecoderConfig) -> Callable[..., Any]:
    """The model as one function ``(params, tokens, *, kv, positions, key_mask, return_kv) -> logits[, kv]``.

    Logits are [B, n, V]; the rest is as for `masked_diffusion_hidden`. The same object for equal configurations.
    """
    if config.causal:
        raise ValueError("config.causal is True, expected a model that is not causal")

    def apply(params: Params, tokens: Array, *, return_kv: bool = False, **options: Any) -> Any:
        out = masked_diffusion_hidden(params, tokens, config, return_kv=return_kv, **options)
        if return_kv:
            return decoder_logits(params, out[0]), out[1]
        return decoder_logits(params, out)

    return apply


# Training ------------------------------------------------------------------------------------------------------------


def mask_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, "B T"],
    *,
    mask_id: int,
    answer: Bool[Array, "B T"] | None = None,
    min_ratio: float = 1e-3,
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Float[Array, "B"]]:
    """Mask each token of the answer with a probability t ~ U(``min_ratio``, 1), drawn for each sample.

    Args:
        key: of t and of the masks.
        tokens: ids.
        mask_id: of the mask.
        answer: which tokens may be masked; all by default. A prompt is never masked.
        min_ratio: least t, as the loss divides by it.

    Returns:
        Tokens with masks, where they are, and t.

    Raises:
        ValueError: for a negative ``mask_id``, or ``min_ratio`` outside (0, 1].
    """
    if mask_id < 0:
        raise ValueError(f"mask_id is {mask_id}, expected a token id of at least 0")
    if not 0 < min_ratio <= 1:
        raise ValueError(f"min_ratio is {min_ratio}, expected a number in (0, 1]")
    ratio_key, mask_key = jax.random.split(key)
    ratio = jax.random.uniform(ratio_key, (len(tokens),), minval=min_ratio)
    masked = jax.random.uniform(mask_key, tokens.shape) < ratio[:, None]
    masked = masked if answer is None else masked & answer
    return jnp.where(masked, mask_id, tokens), masked, ratio


def masked_diffusion_loss(
    apply_fn: Callable[..., Any],
    params: Any,
    tokens: Int[Array, "B T"],
    key: Key[Array, ""],
    *,
    mask_id: int,
    answer: Bool[Array, "B T"] | None = None,
    min_ratio: float = 1e-3,
) -> Float[Array, ""]:
    """LLaDA's training loss: Σ of the cross-entropy at masked tokens / t / length, a mean over samples.

    Args:
        apply_fn: ``(params, tokens [B, T]) -> logits [B, T, V]``.
        params: of the model.
        tokens: what the model should fill in.
        key: of the masks.
        mask_id: of the mask.
        answer: which tokens are to be learned, the padding with end-of-text among them; all by default.
        min_ratio: as for `mask_tokens`.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError: if the mask is no token of the model, or as `mask_tokens`.

    >>> uniform = lambda params, tokens: jnp.zeros((*tokens.shape, 16))
    >>> loss = masked_diffusion_loss(uniform, (), jnp.ones((512, 8), int), jax.random.key(0), mask_id=15)
    >>> abs(float(loss) - float(jnp.log(16))) < 0.3  # in expectation
    True
    """
    noisy, masked, ratio = mask_tokens(key, tokens, mask_id=mask_id, answer=answer, min_ratio=min_ratio)
    logits = apply_fn(params, noisy)
    if mask_id >= logits.shape[-1]:
        raise ValueError(f"mask_id is {mask_id}, expected an id below the vocabulary's {logits.shape[-1]}")
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(wide, tokens[..., None], -1)[..., 0]
    losses = jnp.where(masked, jax.nn.logsumexp(wide, -1) - chosen, 0)
    length = jnp.maximum(jnp.sum(answer, -1), 1) if answer is not None else tokens.shape[1]
    return jnp.mean(losses.sum(-1) / ratio / length)
