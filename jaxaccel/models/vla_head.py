"""CogACT's action head: a small diffusion transformer over the next actions, whose condition is a token.

    z = [time(t) + W_z c ; W_x x] + positions,   z ← z + A(n(z)),   z ← z + M(n(z)),   ε = W_f n(z) without token 0

n is LayerNorm without parameters, A and M the branches of `dit_blocks`. There is no adaLN and there are no gates, so
that what all blocks add, z_out − z_in, is all that a step which reuses them needs (`jaxaccel.caching.interval`).

Li et al., CogACT, arXiv 2411.19650; Peebles and Xie, DiT, 2212.09748.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxaccel.compression import linear
from jaxaccel.models.dit_blocks import attention_branch, layer_norm, mlp_branch, time_features

Params = dict[str, Any]
SIZES = {"S": (384, 6, 4), "B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, depth and heads of the published heads."""
TIME_FEATURES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Numbers that make a head; the defaults are those of CogACT-Base.

    Raises:
        ValueError: for numbers that do not fit together.
    """

    width: int = 768
    """D."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Of attention; they share D."""
    token_size: int = 4096
    """Width of the condition: the language model's."""
    window: int = 16
    """W, actions that are predicted: this one and 15 later ones."""
    channels: int = 7
    """Numbers of one action."""
    mlp_ratio: int = 4
    """Width of the MLPs in units of D."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}, expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads = {self.heads}")

    @classmethod
    def preset(cls, size: str, **changes: Any) -> "HeadConfig":
        """DiT-S, -B or -L, with fields changed.

        Raises:
            ValueError: for another size.

        >>> HeadConfig.preset("S").depth
        6
        """
        if size not in SIZES:
            raise ValueError(f"size is {size!r}, expected one of {', '.join(SIZES)}")
        width, depth, heads = SIZES[size]
        return cls(**({"width": width, "depth": depth, "heads": heads} | changes))

    @classmethod
    def tiny(cls, **changes: Any) -> "HeadConfig":
        """A head of 2 blocks for tests and examples, with fields changed."""
        numbers = {"width": 16, "depth": 2, "heads": 2, "token_size": 12, "window": 4, "channels": 2}
        return cls(**(numbers | changes))


def head_shapes(config: HeadConfig) -> Params:
    """The tree of parameters; matrices are [out, in]."""
    width, inner = config.width, config.mlp_ratio * config.width
    shapes = {
        "action": (width, config.channels),
        "condition": (width, config.token_size),
        "time_in": (width, TIME_FEATURES),
        "time_out": (width, width),
        "final": (config.channels, width),
    }
    block = {"qkv": (3 * width, width), "out": (width, width), "up": (inner, width), "down": (width, inner)}

    def biased(matrices: dict[str, tuple[int, int]]) -> Params:
        return matrices | {f"{name}_bias": shape[:1] for name, shape in matrices.items()}

    rest = {"positions": (config.window + 1, width), "null": (config.token_size,)}
    return biased(shapes) | rest | {"blocks": [biased(block) for _ in range(config.depth)]}


def init_head(key: Key[Array, ""], config: HeadConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: Xavier's uniform matrices, the output zero, biases zero, positions with deviation D^−½.

    >>> init_head(jax.random.key(0), HeadConfig.tiny())["blocks"][1]["up"].shape
    (64, 16)
    """
    shapes = head_shapes(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    arrays = []
    for number, (path, shape) in enumerate(leaves):
        name, own = str(getattr(path[-1], "key", "")), jax.random.fold_in(key, number)
        if name.endswith("bias") or name in ("final", "null"):
            arrays.append(jnp.zeros(shape, dtype))
        elif name == "positions":
            arrays.append(config.width**-0.5 * jax.random.normal(own, shape, dtype))
        elif name.startswith("time"):
            arrays.append(0.02 * jax.random.normal(own, shape, dtype))
        else:
            limit = (6 / sum(shape)) ** 0.5
            arrays.append(jax.random.uniform(own, shape, dtype, -limit, limit))
    params: Params = jax.tree.unflatten(tree, arrays)
    return params


def _tokens(params: Params, x: Array, config: HeadConfig) -> Array:
    """The action tokens as they enter the blocks."""
    if x.ndim != 3 or x.shape[1:] != (config.window, config.channels):
        raise ValueError(f"x has shape {x.shape}, expected [B, {config.window}, {config.channels}]")
    return linear(x, params["action"], params["action_bias"]) + params["positions"][1:]


def _output(params: Params, tokens: Array) -> Array:
    return linear(layer_norm(tokens), params["final"], params["final_bias"])


def head_full(
    params: Params, x: Float[Array, "..."], t: Any, cond: Float[Array, "..."], *, config: HeadConfig
) -> tuple[Float[Array, "B W C"], Float[Array, "B W D"]]:
    """All blocks.

    Token 0, which carries time and condition, does not reach the output; the residual is that of the others.

    Args:
        params: from `init_head`, or loaded.
        x: noisy actions [B, W, C].
        t: time steps of the trained model, a number or [B].
        cond: conditions [B, E]: cognition tokens, or ``params["null"]``.
        config: of the head.

    Returns:
        Predicted noise, and z_out − z_in of the action tokens.

    Raises:
        ValueError: for other shapes.

    >>> config = HeadConfig.tiny()
    >>> params = init_head(jax.random.key(0), config)
    >>> head_full(params, jnp.ones((1, 4, 2)), 3, jnp.ones((1, 12)), config=config)[0].shape
    (1, 4, 2)
    """
    start = _tokens(params, x, config)
    if cond.ndim != 2 or cond.shape != (x.shape[0], config.token_size):
        raise ValueError(f"cond has shape {cond.shape}, expected [{x.shape[0]}, {config.token_size}]")
    times = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
    time = linear(time_features(times, TIME_FEATURES, x.dtype), params["time_in"], params["time_in_bias"])
    time = linear(jax.nn.silu(time), params["time_out"], params["time_out_bias"])
    first = time + linear(cond, params["condition"], params["condition_bias"]) + params["positions"][0]
    z = jnp.concatenate([first[:, None], start], 1)
    for number in range(config.depth):
        block = params["blocks"][number]
        z = z + attention_branch(block, layer_norm(z), config.heads)
        z = z + mlp_branch(block, layer_norm(z))
    return _output(params, z[:, 1:]), z[:, 1:] - start


def head_reuse(
    params: Params, x: Float[Array, "..."], residual: Float[Array, "..."], *, config: HeadConfig
) -> Float[Array, "B W C"]:
    """No block: what they added in an earlier step is added again.

    Args:
        params: as for `head_full`.
        x: noisy actions [B, W, C].
        residual: from `head_full`.
        config: of the head.

    Raises:
        ValueError: for other shapes.
    """
    tokens = _tokens(params, x, config)
    if residual.shape != tokens.shape:
        raise ValueError(f"residual has shape {residual.shape}, expected {tokens.shape}")
    return _output(params, tokens + residual)


class ActionHead(nnx.Module):
    """The head as a Flax NNX module, with one `nnx.Param` per array of the tree.

    >>> head = ActionHead(HeadConfig.tiny(), rngs=nnx.Rngs(0))
    >>> head(jnp.ones((1, 4, 2)), 3, jnp.ones((1, 12))).shape
    (1, 4, 2)
    """

    def __init__(self, config: HeadConfig, *, rngs: nnx.Rngs | None = None, params: Params | None = None) -> None:
        if (rngs is None) == (params is None):
            raise ValueError("expected either rngs, for random parameters, or params")
        self.config = config
        if params is None:
            assert rngs is not None
            params = init_head(rngs.params(), config)
        self.tree = nnx.data(jax.tree.map(nnx.Param, params))

    def parameters(self) -> Params:
        """The tree of arrays, for the pure functions."""
        arrays: Params = jax.tree.map(lambda p: p[...], self.tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return arrays

    def __call__(self, x: Float[Array, "..."], t: Any, cond: Float[Array, "..."]) -> Float[Array, "B W C"]:
        """Predicted noise."""
        return head_full(self.parameters(), x, t, cond, config=self.config)[0]
