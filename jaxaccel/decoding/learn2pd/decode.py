"""Block-wise parallel decoding of a masked-diffusion language model: the public function, its checks and its result."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxaccel.decoding.learn2pd.end_of_text import EotRule
from jaxaccel.decoding.learn2pd.loop import Cache, Remasking, Rules, run
from jaxaccel.decoding.learn2pd.policies import Oracle, Policy, check_policy


class DecodeResult(NamedTuple):
    """Texts, and what they cost."""

    tokens: Any  # int32 [B, P + G], prompt and answer; padding after the end of the text
    lengths: Any  # int32 [B], tokens of prompt and answer up to where the text was cut
    num_forwards: Any  # int32 [B], passes in which a row took part
    tokens_processed: Any  # int32 [B], Σ over passes of their tokens: a cost that no machine changes
    revealed_at: Any  # int32 [B, G], the pass that revealed each token of the answer; -1 beyond its end
    query_lengths: Any  # int32 [B, F], tokens of each pass; -1 after the last


def check_shape(
    prompt: Any, *, gen_length: int, block_length: int, steps: int, mask_id: int, eot_id: int | None
) -> None:
    """Raise unless the numbers of a decoding fit together.

    Raises:
        ValueError: naming what does not fit.
    """
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt is {prompt.dtype} {prompt.shape}, expected whole numbers [B, P]")
    for name, value in (("gen_length", gen_length), ("block_length", block_length), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if gen_length % block_length:
        raise ValueError(f"block_length is {block_length}, which does not divide gen_length = {gen_length}")
    if steps > gen_length:
        raise ValueError(
            f"steps is {steps}, expected at most gen_length = {gen_length}: a pass reveals a token at least"
        )
    if steps % (gen_length // block_length):
        raise ValueError(f"steps is {steps}, expected a multiple of the number of blocks, {gen_length // block_length}")
    if mask_id < 0:
        raise ValueError(f"mask_id is {mask_id}, expected a token id of at least 0")
    if eot_id is not None and eot_id < 0:
        raise ValueError(f"eot_id is {eot_id}, expected a token id of at least 0, or None")
    if eot_id == mask_id:
        raise ValueError(f"eot_id is {eot_id}, which is also the mask")
    if not isinstance(prompt, jax.core.Tracer) and np.any(np.asarray(prompt) == mask_id):
        raise ValueError(f"prompt contains the mask, token {mask_id}, which is for what is to be generated")


def buckets(num_blocks: int, most: int) -> tuple[int, ...]:
    """At most so many numbers of blocks, evenly spread, the last one all of them.

    >>> buckets(4, 8), buckets(32, 4)
    ((1, 2, 3, 4), (8, 16, 24, 32))
    """
    count = min(num_blocks, most)
    return tuple(-(-num_blocks * (i + 1) // count) for i in range(count))


def decode(
    apply_fn: Any,
    params: Any,
    prompt: Int[Array, "B P"] | np.ndarray,
    *,
    gen_length: int,
    block_length: int,
    steps: int | None = None,
    policy: Policy,
    mask_id: int,
    eot_id: int | None = None,
    eot_rule: EotRule | None = "reference",
    cache: Cache | None = None,
    mask_removed: bool = False,
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    remasking: Remasking = "low_confidence",
    key: Key[Array, ""] | None = None,
    pad_id: int = 0,
    max_buckets: int = 8,
) -> DecodeResult:
    """Fill G masks after each prompt, block by block, several tokens per pass.

    Rows are independent: each gets what it would get alone, up to draws, whose keys depend on the row. Works under
    `jax.jit`, where the prompt's tokens are not checked.

    Args:
        apply_fn: ``(params, tokens [B, n], *, kv, positions [B, n], key_mask [B, S], return_kv) -> logits [B, n, V][,
            kv]``, or a `DiffusionModel`, which computes logits only where they are read. Arguments that a mode does not
            need are not passed: without cache and end-of-text rule it is ``(params, tokens)``. With ``kv`` [..., S, K,
            H], the keys and values of the whole text, it replaces those at ``positions`` below S and attends to all.
            Keep the same function between calls: it is part of what is compiled.
        params: of the model.
        prompt: token ids without masks, all of one length.
        gen_length: G, tokens to fill in; a multiple of ``block_length``.
        block_length: b.
        steps: passes of the fixed schedule, at most G and a multiple of the number of blocks; G by default. With
            another policy than `TopK`: each pass reveals at least as much as this schedule would.
        policy: `TopK`, `Threshold`, `Filter` or `Oracle`.
        mask_id: of the mask. It is never predicted, unlike in the reference, which could spin on it.
        eot_id: end of text. ``None``: texts are never cut.
        eot_rule: where to cut, see `learn2pd.end_of_text`; ``None``: nowhere.
        cache: ``None`` computes all of the text in each pass; ``"prefix"`` keeps keys and values of what is before the
            block while the block is worked on; ``"dual"`` also of what is after it, and computes the block alone. Both
            are approximations; a block's first pass is exact.
        mask_removed: with a dual cache, stop attending to what was cut away at once. The reference goes on until the
            next block.
        cfg_scale: strength w of classifier-free guidance, l_u + (w + 1)(l − l_u); 0 for none.
        temperature: 0 takes the likeliest token.
        remasking: ``"random"`` reveals by chance instead of by confidence what the schedule demands.
        key: for a temperature or random remasking.
        pad_id: stands after the end of a text.
        max_buckets: most lengths for which a pass is compiled. More save more after a cut, and compile longer.

    Returns:
        Tokens, lengths and costs. With guidance a pass counts once in ``num_forwards``, twice in ``tokens_processed``.

    Raises:
        ValueError: for numbers that do not fit together, a mask that is no token or stands in the prompt, a filter for
            another block length, a fraction outside (0, 1), a missing key.
        TypeError: for a policy that is none.

    >>> from jaxaccel.models import DecoderConfig, init_params
    >>> from jaxaccel.models.masked_diffusion import diffusion_model
    >>> config = DecoderConfig.tiny(causal=False)
    >>> params, prompt = init_params(jax.random.key(0), config), jnp.array([[1, 2, 3]])
    >>> from jaxaccel.decoding.learn2pd import Threshold
    >>> out = decode(diffusion_model(config), params, prompt, gen_length=8, block_length=4, policy=Threshold(0.9),
    ...     mask_id=60)
    >>> out.tokens.shape, int(out.num_forwards[0]), int(out.tokens_processed[0])  # nothing is sure: a token per pass
    ((1, 11), 8, 88)
    """
    prompt = jnp.asarray(prompt)
    steps = gen_length if steps is None else steps
    check_shape(prompt, gen_length=gen_length, block_length=block_length, steps=steps, mask_id=mask_id, eot_id=eot_id)
    check_policy(policy, block_length=block_length, batch=len(prompt), gen_length=gen_length)
    for name, value, known in (
        ("eot_rule", eot_rule, ("reference", "confident", None)),
        ("cache", cache, ("prefix", "dual", None)),
        ("remasking", remasking, ("low_confidence", "random")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
    for name, number in (("cfg_scale", cfg_scale), ("temperature", temperature)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name} is {number}, expected 0 or a positive number")
    if max_buckets < 1:
        raise ValueError(f"max_buckets is {max_buckets}, expected at least 1")
    if key is None and (temperature or remasking == "random"):
        raise ValueError(f"temperature is {temperature} and remasking {remasking!r}: sampling needs a key")
    if isinstance(policy, Oracle) and remasking == "random":
        raise ValueError("remasking is 'random', but an oracle reveals what is right")
    num_blocks = gen_length // block_length
    rules = Rules(
        gen_length, block_length, steps // num_blocks, mask_id, eot_id, eot_rule, cache, mask_removed, float(cfg_scale),
        float(temperature), remasking, buckets(num_blocks, max_buckets), oracle=isinstance(policy, Oracle),
    )  # fmt: skip
    needs_key = temperature or remasking == "random"
    state = run(params, prompt, policy, key if needs_key else None, model=apply_fn, rules=rules)
    size = prompt.shape[1]
    inside = jnp.arange(size + gen_length) < state.length[:, None]
    processed = jnp.sum(jnp.maximum(state.query_lengths, 0), -1) * (2 if cfg_scale else 1)
    return DecodeResult(
        jnp.where(inside, state.text, pad_id),
        state.length,
        state.forwards,
        processed,
        jnp.where(inside[:, size:], state.revealed_at, -1),
        state.query_lengths,
    )
