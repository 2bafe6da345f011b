"""A small vision-language-action model in the class of CogACT, and the same one with its parts cut (EfficientVLA).

    [W_v image tokens ; embedded words] → causal decoder → last hidden state c ("cognition") → diffusion of W actions

Image tokens come from any encoder. The policy is one pure function of arrays, `vla_policy`: language model and all
denoising steps are one compiled program, as robots act at batch 1 where launching programs would cost most.

CogACT: Li et al., arXiv 2411.19650; cuts: Yang et al., arXiv 2506.10100.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxaccel.caching.efficient_vla import EfficientVLAConfig
from jaxaccel.caching.interval import DDIM, cache_schedule, sample_actions
from jaxaccel.compression import (
    linear,
    prune_layers,
    prune_tokens,
    select_layers,
    select_visual_tokens,
    slice_mlp,
    token_relevance,
)
from jaxaccel.diffusion import NoiseSchedule, cosine_betas, noise_schedule, respace, stride_timesteps
from jaxaccel.models.decoder import Context, block, embed, init_params, prompt_context, rms_norm
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.rotary import rotary_angles
from jaxaccel.models.vla_head import HeadConfig, head_full, head_reuse, init_head

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLAConfig:
    """Numbers that make a policy.

    Raises:
        ValueError: for parts that do not fit together.
    """

    decoder: DecoderConfig
    """The causal language model, with ``scan_layers`` off."""
    head: HeadConfig
    """The action head; its ``token_size`` is the decoder's width."""
    num_visual: int
    """Image tokens N."""
    visual_size: int
    """Width of an image token before it is projected."""
    select_after: int = 2
    """Layers after which visual tokens are chosen."""
    train_steps: int = 100
    """Steps of the diffusion that the head is trained with."""
    sample_steps: int = 10
    """Of DDIM."""
    cfg_scale: float = 1.5
    """Guidance."""

    def __post_init__(self) -> None:
        if self.head.token_size != self.decoder.hidden_size:
            raise ValueError(
                f"head.token_size is {self.head.token_size}, expected hidden_size = {self.decoder.hidden_size}"
            )
        if self.decoder.scan_layers or not self.decoder.causal or self.decoder.norm != "pre":
            raise ValueError("decoder must be causal, pre-norm and without scan_layers")
        for name in ("num_visual", "visual_size", "select_after", "train_steps", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @classmethod
    def tiny(cls, **changes: Any) -> "VLAConfig":
        """A policy for tests and examples, with fields changed."""
        head = HeadConfig.tiny(token_size=32)
        numbers: dict[str, Any] = {
            "decoder": DecoderConfig.tiny(num_layers=3), "head": head, "num_visual": 6, "visual_size": 5,
        }  # fmt: skip
        return cls(**(numbers | changes))

    def noise(self) -> NoiseSchedule:
        """All noise levels of training."""
        return noise_schedule(cosine_betas(self.train_steps))

    def sampler(self) -> DDIM:
        """The steps that are sampled."""
        return DDIM(respace(self.noise(), stride_timesteps(self.train_steps, self.sample_steps)))


def init_vla(key: Key[Array, ""], config: VLAConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: ``decoder``, ``head``, and ``visual`` [D, E], the projection of image tokens.

    >>> sorted(init_vla(jax.random.key(0), VLAConfig.tiny()))
    ['decoder', 'head', 'visual', 'visual_bias']
    """
    first, second, third = jax.random.split(key, 3)
    shape = (config.decoder.hidden_size, config.visual_size)
    return {
        "decoder": init_params(first, config.decoder, dtype),
        "head": init_head(second, config.head, dtype),
        "visual": config.visual_size**-0.5 * jax.random.normal(third, shape, dtype),
        "visual_bias": jnp.zeros(shape[0], dtype),
    }


def _sequence(params: Params, visual: Array, text: Array, config: VLAConfig) -> Array:
    if visual.ndim != 3 or visual.shape[1:] != (config.num_visual, config.visual_size):
        raise ValueError(f"visual has shape {visual.shape}, expected [B, {config.num_visual}, {config.visual_size}]")
    if text.ndim != 2 or text.shape[0] != visual.shape[0] or not text.shape[1]:
        raise ValueError(f"text has shape {text.shape}, expected [{visual.shape[0]}, T]")
    images = linear(visual, params["visual"], params["visual_bias"])
    return jnp.concatenate([images, embed(params["decoder"], text, config.decoder).astype(images.dtype)], 1)


def vla_hidden_states(
    params: Params, visual: Float[Array, "..."], text: Int[Array, "..."], config: VLAConfig
) -> Float[Array, "L1 B S D"]:
    """Residual streams before, between and after the layers, for `layer_importance`."""
    x = _sequence(params, visual, text, config)
    context, states = prompt_context(x, config.decoder), [x]
    for layer in range(config.decoder.num_layers):
        x, _ = block(params["decoder"]["layers"][layer], x, None, context, config.decoder)
        states.append(x)
    return jnp.stack(states)


def text_attention(
    queries: Float[Array, "B Q N H"], keys: Float[Array, "B K S H"], rows: Int[Array, "B Q"], num_visual: int
) -> Float[Array, "B N Q V"]:
    """Causal attention weights of a few rows to the first ``num_visual`` keys, from rotated queries and keys.

    Only these rows are computed, so that the layer itself keeps its fused attention.
    """
    share = queries.shape[2] // keys.shape[1]
    repeated = jnp.repeat(keys, share, 1)
    scores = jnp.einsum("bqnh,bnsh->bnqs", queries, repeated).astype(jnp.float32) / np.sqrt(queries.shape[-1])
    seen = jnp.arange(keys.shape[2]) <= rows[:, None, :, None]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)[..., :num_visual]


def vla_cognition(
    params: Params,
    visual: Float[Array, "..."],
    text: Int[Array, "..."],
    config: VLAConfig,
    *,
    cuts: EfficientVLAConfig | None = None,
    choice: Any = None,
) -> tuple[Float[Array, "B D"], Any]:
    """The language model's last hidden state, which conditions the head.

    Args:
        params: from `init_vla`, or those of `cut_vla`.
        visual: image tokens [B, N, E].
        text: words [B, T]; the last one stands for the cognition token.
        config: of the policy, or the one of `cut_vla`.
        cuts: which visual tokens stay, after ``select_after`` layers (or as many as are left); all by default.
        choice: take these tokens instead [B, K], for comparison.

    Returns:
        The state, and the visual tokens that were kept [B, K], or ``None``.

    Raises:
        ValueError: for shapes that do not fit, or more tokens to keep than there are.
    """
    x = _sequence(params, visual, text, config)
    decoder, keep = config.decoder, None if cuts is None else cuts.num_keep_tokens
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    rows, kept = positions[:, config.num_visual :], None
    after = min(config.select_after, decoder.num_layers)
    context = Context(rotary_angles(positions, decoder), None, None, None, None)
    for layer in range(decoder.num_layers):
        choosing = keep is not None and layer == after - 1
        own = context._replace(query_rows=rows) if choosing and choice is None else context
        x, (keys, _, queries, _) = block(params["decoder"]["layers"][layer], x, None, own, decoder)
        if not choosing:
            continue
        if choice is not None:
            kept = choice
        else:
            assert cuts is not None
            relevance = token_relevance(text_attention(queries, keys, rows, config.num_visual))
            kept = select_visual_tokens(
                relevance, x[:, : config.num_visual], num_keep=keep, num_key=cuts.num_key, task_ratio=cuts.task_ratio
            )
        x, positions = prune_tokens(x, kept, num_visual=config.num_visual)
        context = context._replace(angles=rotary_angles(positions, decoder))
    return rms_norm(x[:, -1], params["decoder"]["final_norm"], decoder.norm_eps), kept


def vla_policy(
    params: Params,
    visual: Float[Array, "..."],
    text: Int[Array, "..."],
    noise: Float[Array, "..."],
    config: VLAConfig,
    *,
    cuts: EfficientVLAConfig | None = None,
    choice: Any = None,
) -> Float[Array, "B W C"]:
    """Images and words to actions; compile it as a whole, with ``config`` and ``cuts`` static.

    Args:
        params: as for `vla_cognition`.
        visual: image tokens [B, N, E].
        text: words [B, T].
        noise: standard normal [B, W, C].
        config: of the policy.
        cuts: tokens and denoising steps that are left out; layers and channels are those of ``params``.
        choice: as for `vla_cognition`.

    Returns:
        Actions.

    Raises:
        ValueError: as `vla_cognition` and `sample_actions`.

    >>> config = VLAConfig.tiny()
    >>> params, visual = init_vla(jax.random.key(0), config), jnp.ones((1, 6, 5))
    >>> vla_policy(params, visual, jnp.array([[1, 2]]), jnp.ones((1, 4, 2)), config).shape
    (1, 4, 2)
    """
    cognition, _ = vla_cognition(params, visual, text, config, cuts=cuts, choice=choice)
    return head_actions(params["head"], noise, cognition, config, interval=1 if cuts is None else cuts.cache_interval)


def head_actions(
    head: Params, noise: Float[Array, "..."], cond: Float[Array, "B D"], config: VLAConfig, *, interval: int = 1
) -> Float[Array, "B W C"]:
    """Guided actions from cognition tokens, with blocks computed in one of ``interval`` steps."""

    def full(params: Params, x: Array, t: Array, cond: Array) -> tuple[Array, Array]:
        return head_full(params, x, t, cond, config=config.head)

    def reuse(params: Params, x: Array, residual: Array) -> Array:
        return head_reuse(params, x, residual, config=config.head)

    schedule, sampler = cache_schedule(config.sample_steps, interval=interval), config.sampler()
    return sample_actions(
        full, reuse, head, noise, cond, schedule=schedule, sampler=sampler, cfg_scale=config.cfg_scale,
        null=head["null"],
    )  # fmt: skip


def cut_vla(
    params: Params, config: VLAConfig, cuts: EfficientVLAConfig, *, importance: Any = None, kept: Sequence[int] = ()
) -> tuple[Params, VLAConfig]:
    """Leave out layers and channels of the language model: parameters and configuration of the smaller policy.

    Args:
        params: from `init_vla`.
        config: of the policy.
        cuts: how many; tokens and denoising steps are left out by `vla_policy`.
        importance: [L] from `layer_importance`; needed if layers are dropped and ``kept`` is not given.
        kept: take these layers instead.

    Raises:
        ValueError: for layers to drop without ``importance``, or too many.
    """
    decoder = params["decoder"]
    layers = [decoder["layers"][i] for i in range(config.decoder.num_layers)]
    if not kept and cuts.num_drop_layers:
        if importance is None:
            raise ValueError(f"num_drop_layers is {cuts.num_drop_layers}, but importance is None")
        if len(importance) != len(layers):
            raise ValueError(f"importance has {len(importance)} entries, expected {len(layers)} layers")
        kept = select_layers(importance, num_drop=cuts.num_drop_layers)
    layers = prune_layers(layers, kept) if kept else layers
    inner = config.decoder.intermediate_size
    if cuts.mlp_keep_ratio < 1:
        layers = [slice_mlp(layer, keep_ratio=cuts.mlp_keep_ratio) for layer in layers]
        inner = layers[0]["down"].shape[-1]
    smaller = dataclasses.replace(config.decoder, num_layers=len(layers), intermediate_size=inner)
    return params | {"decoder": decoder | {"layers": layers}}, dataclasses.replace(config, decoder=smaller)


class VLA(nnx.Module):
    """The policy as a Flax NNX module, with one `nnx.Param` per array of the tree.

    >>> model = VLA(VLAConfig.tiny(), rngs=nnx.Rngs(0))
    >>> model(jnp.ones((1, 6, 5)), jnp.array([[1, 2]]), jnp.ones((1, 4, 2))).shape
    (1, 4, 2)
    """

    def __init__(self, config: VLAConfig, *, rngs: nnx.Rngs | None = None, params: Params | None = None) -> None:
        if (rngs is None) == (params is None):
            raise ValueError("expected either rngs, for random parameters, or params")
        self.config = config
        if params is None:
            assert rngs is not None
            params = init_vla(rngs.params(), config)
        self.tree = nnx.data(jax.tree.map(nnx.Param, params))

    def parameters(self) -> Params:
        """The tree of arrays, for the pure functions."""
        arrays: Params = jax.tree.map(lambda p: p[...], self.tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return arrays

    def __call__(
        self,
        visual: Float[Array, "..."],
        text: Int[Array, "..."],
        noise: Float[Array, "..."],
        *,
        cuts: EfficientVLAConfig | None = None,
    ) -> Float[Array, "B W C"]:
        """Actions, from images, words and noise."""
        return vla_policy(self.parameters(), visual, text, noise, self.config, cuts=cuts)
