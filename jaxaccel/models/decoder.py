"""A Llama-class decoder: RMSNorm, rotary positions, grouped queries, SwiGLU; for training and for cached decoding.

    x ← x + Wₒ Attention(W_q n(x), W_k n(x), W_v n(x)),   x ← x + W₂ (silu(W₁ m(x)) ⊙ W₃ m(x)),   n, m = RMSNorm
    logits = W RMSNorm(x)

Post-norm is x ← n(x + f(x)). Sparse experts may take the place of the SwiGLU network (`BlockFFNConfig`). The model is a
pure function of a tree of arrays (`init_params`, `decoder_forward`); the module `Decoder` holds the same tree for those
who train with Flax NNX.

Llama (arXiv 2302.13971), GQA (2305.13245), GEB-1.3B (2406.09900).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaccel.compression import Int8Weight, linear, take_rows
from jaxaccel.models.decoder_attention import attend_all, attend_cached, attend_new
from jaxaccel.models.decoder_config import DecoderConfig, parameter_shapes
from jaxaccel.models.decoder_ffn import feed_forward
from jaxaccel.models.kv_cache import BlockTopK, KVCache, NewTokens, empty_cache
from jaxaccel.models.rotary import rotary_angles, rotate
from jaxaccel.moe import Routing

Params = dict[str, Any]
Layer = dict[str, Any]


class Forward(NamedTuple):
    """What a pass over n tokens gives."""

    hidden: Any  # [B, n, D], after the final norm: `decoder_logits` and speculative heads start from it
    new: NewTokens  # keys and values of the n tokens, for `append`
    queries: Any  # per layer [B, W, N, H], rotated queries at `query_rows`; () where none were asked for
    routing: Any = ()  # Routing of [L, B, n, Ne] each, for losses and metrics of sparse experts; () without them


# Parameters ----------------------------------------------------------------------------------------------------------


def init_params(key: Key[Array, ""], config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal with deviation 0.02, and 0.02/√(2L) for what is added to the residual; norms 1.

    >>> params = init_params(jax.random.key(0), DecoderConfig.tiny())
    >>> params["layers"][1]["gate"].shape
    (48, 32)
    """
    shapes = parameter_shapes(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    arrays = []
    for number, (path, shape) in enumerate(leaves):
        name = str(getattr(path[-1], "key", ""))
        if name.endswith("norm") or name == "gamma":
            arrays.append(jnp.ones(shape, dtype))
        elif name.endswith("bias"):
            arrays.append(jnp.zeros(shape, dtype))
        else:
            deviation = 0.02 * ((2 * config.num_layers) ** -0.5 if name in ("o", "down", "expert_down") else 1)
            arrays.append(deviation * jax.random.normal(jax.random.fold_in(key, number), shape, dtype))
    params: Params = jax.tree.unflatten(tree, arrays)
    return stack_layers(params) if config.scan_layers else params


def is_stacked(params: Params) -> bool:
    """Whether the layers are stacked for a scan."""
    return isinstance(params["layers"], dict) and "attention_norm" in params["layers"]


def has_experts(params: Params) -> bool:
    """Whether the feed-forward networks are sparse experts."""
    return "router" in (params["layers"] if is_stacked(params) else params["layers"][0])


def stack_layers(params: Params) -> Params:
    """The same parameters with layers as arrays [L, ...]: what ``scan_layers`` takes."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`: what decodes fastest on CPU."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return params | {"layers": [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]}


def fuse(params: Params) -> Params:
    """Join the products that share an input, q, k, v and gate, up: fewer, larger products decode faster.

    The decoder takes either form. Quantise after fusing or before, as you like: scales belong to rows.
    """

    def join(layer: Layer, names: tuple[str, ...], suffix: str = "") -> Any:
        parts = [layer[name + suffix] for name in names]
        if isinstance(parts[0], Int8Weight):
            return Int8Weight(
                *(jnp.concatenate(leaves, -1 - (i == 0)) for i, leaves in enumerate(zip(*parts, strict=True)))
            )
        return jnp.concatenate(parts, -1 if suffix else -2)

    def fused(layer: Layer) -> Layer:
        if "qkv" in layer:
            return layer
        rest = {
            name: leaf
            for name, leaf in layer.items()
            if name.removesuffix("_bias") not in ("q", "k", "v", "gate", "up")
        }
        rest["qkv"] = join(layer, ("q", "k", "v"))
        if "gate" in layer:
            rest["gate_up"] = join(layer, ("gate", "up"))
        return rest | ({"qkv_bias": join(layer, ("q", "k", "v"), "_bias")} if "q_bias" in layer else {})

    layers = params["layers"]
    if is_stacked(params) or (isinstance(layers, dict) and "qkv" in layers):
        return params | {"layers": fused(layers)}
    return params | {"layers": [fused(layers[i]) for i in range(len(layers))]}


# The blocks ----------------------------------------------------------------------------------------------------------


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x/√(mean x² + eps) · weight, worked in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return (normed * weight).astype(x.dtype)


def _qkv(layer: Layer, x: Array, config: DecoderConfig) -> tuple[Array, Array, Array]:
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    if "qkv" in layer:
        both = linear(x, layer["qkv"], layer.get("qkv_bias"))
        q, k, v = jnp.split(both, (heads * size, (heads + kv_heads) * size), -1)
    else:
        q, k, v = (linear(x, layer[name], layer.get(f"{name}_bias")) for name in ("q", "k", "v"))
    return tuple(part.reshape(*x.shape[:2], -1, size) for part in (q, k, v))  # type: ignore[return-value]


class Context(NamedTuple):
    """What all layers of a pass share."""

    angles: Any  # (cos, sin) at the tokens' positions
    mask: Any  # bool [n, n]; None without a cache. Which keys are seen [B, S] in a model that is not causal
    length: Any  # int32 [B]; None without a cache
    query_rows: Any  # int32 [B, W]; None where no queries are asked for
    sparse: Any  # BlockTopK or None
    real: Any = None  # bool [B, n], tokens that are no padding; None for all
    positions: Any = None  # int32 [B, n], where a model that is not causal keeps the tokens' keys and values


def prompt_context(
    x: Float[Array, "B T D"], config: DecoderConfig, query_rows: Any = None, real: Bool[Array, "B T"] | None = None
) -> Context:
    """The context of a prompt: positions from 0 on, no cache."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return Context(rotary_angles(positions, config), None, None, query_rows, None, real)


def embed(params: Params, tokens: Int[Array, "B n"], config: DecoderConfig) -> Float[Array, "B n D"]:
    """What the first block takes."""
    x = take_rows(params["embedding"], tokens)
    return x.astype(config.dtype) if config.dtype is not None else x


def block(layer: Layer, x: Array, cached: Any, context: Context, config: DecoderConfig) -> tuple[Array, Any]:
    """One block; also returns the new keys and values, queries if they are asked for, and the routing of experts.

    Args:
        layer: parameters.
        x: residual stream [B, n, D].
        cached: a layer of a `KVCache`, or ``None`` for a prompt; `Slots` for a model that is not causal.
        context: shared by all layers.
        config: of the model.

    Returns:
        The stream after it; keys and values [B, K, n, H], queries [B, W, N, H] or (), and a `Routing` or (). A model
        that is not causal gives keys and values [B, S, K, H] of all slots.
    """
    pre = config.norm == "pre"
    q, k, v = _qkv(layer, rms_norm(x, layer["attention_norm"], config.norm_eps) if pre else x, config)
    q, k = (rotate(part, context.angles, config.rope_layout) for part in (q, k))
    if not config.causal:
        mixed, (k, v) = attend_all(q, k, v, cached, context.positions, context.mask)
    elif cached is None:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        mixed = attend_new(q, k, v, config)
    else:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        heads = jax.tree.leaves(cached)[0].shape[1]  # those of the queries, where a prompt was compressed for each
        k, v = (jnp.repeat(part, heads // part.shape[1], 1) for part in (k, v))
        mixed = attend_cached(q, k, v, cached, context.length, context.mask, config, context.sparse)
    added = linear(mixed.reshape(*x.shape[:2], -1), layer["o"])
    if pre:
        x = x + added
        changed, routing = feed_forward(layer, rms_norm(x, layer["mlp_norm"], config.norm_eps), config, context.real)
        x = x + changed
    else:
        x = rms_norm(x + added, layer["attention_norm"], config.norm_eps)
        changed, routing = feed_forward(layer, x, config, context.real)
        x = rms_norm(x + changed, layer["mlp_norm"], config.norm_eps)
    rows = context.query_rows
    kept = () if rows is None else jnp.take_along_axis(q, rows[:, :, None, None], 1)
    return x, (k, v, kept, routing)


def run_layers(
    params: Params, x: Float[Array, "B n D"], cached: Any, context: Context, config: DecoderConfig
) -> tuple[Float[Array, "B n D"], tuple[Any, Any, Any, Any]]:
    """All blocks, one after the other or as a scan.

    Keys, values and queries are tuples over layers, or stacked; the routing of sparse experts is always stacked.

    Args:
        params: of the model.
        x: from `embed`.
        cached: what `block` takes for each layer, in a sequence or stacked; or ``None``.
        context: shared by all layers.
        config: of the model.
    """
    layers = params["layers"]
    if isinstance(layers, dict) and "attention_norm" in layers:

        def scanned(x: Array, xs: tuple[Layer, Any]) -> tuple[Array, Any]:
            return block(xs[0], x, xs[1], context, config)

        return jax.lax.scan(scanned, x, (layers, cached))
    outputs = []
    for i in range(config.num_layers):
        x, output = block(layers[i], x, None if cached is None else cached[i], context, config)
        outputs.append(output)
    keys, values, queries, routings = zip(*outputs, strict=True)
    return x, (keys, values, queries, jax.tree.map(lambda *parts: jnp.stack(parts), *routings))


def decoder_forward(
    params: Params,
    tokens: Int[Array, "B n"],
    config: DecoderConfig,
    *,
    positions: Int[Array, "B n"] | None = None,
    cache: KVCache | None = None,
    mask: Bool[Array, "_ _"] | None = None,
    query_rows: Int[Array, "B W"] | None = None,
    real: Bool[Array, "B n"] | None = None,
) -> Forward:
    """Pass tokens through the decoder: a text or a prompt without a cache, further tokens with one.

    Args:
        params: from `init_params`, `load_pretrained`, or those `fuse`d, quantised, stacked.
        tokens: ids. Prompts of different lengths are padded on the right, with any id.
        config: of the model.
        positions: of the tokens; from 0 on, or from where the cache ends, by default.
        cache: earlier tokens. It is read only: store the new ones with `append`.
        mask: which new token sees which; causal by default. Only with a cache: a tree of drafts, for example.
        query_rows: at which tokens to return the rotated queries, for compressing a prompt.
        real: which tokens are no padding; all by default. Only sparse experts look at it: padding takes no expert, and
            so none is read for it. What it gives means nothing.

    Returns:
        Hidden states, keys, values, queries, and of sparse experts the routing of all layers.

    Raises:
        ValueError: for more tokens than the model has positions, shapes that do not fit, a mask without a cache.

    >>> config = DecoderConfig.tiny()
    >>> params = init_params(jax.random.key(0), config)
    >>> decoder_forward(params, jnp.array([[1, 2, 3]]), config).hidden.shape
    (1, 3, 32)
    """
    batch, count = tokens.shape
    if count > config.max_positions or not count:
        raise ValueError(f"tokens has {count} positions, expected 1 to max_positions = {config.max_positions}")
    if not config.causal and cache is not None:
        raise ValueError("cache is given, but the model is not causal: what it has seen changes with each new token")
    if mask is not None and cache is None:
        raise ValueError("mask is given without a cache: a prompt attends causally")
    if mask is not None and mask.shape != (count, count):
        raise ValueError(f"mask has shape {mask.shape}, expected {(count, count)}")
    if cache is not None and mask is None:
        mask = jnp.tril(jnp.ones((count, count), bool))
    if positions is None:
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.position
        positions = start[:, None] + jnp.arange(count)
    positions = jnp.broadcast_to(positions, (batch, count))
    context = Context(
        rotary_angles(positions, config),
        mask,
        None if cache is None else cache.length,
        query_rows,
        None if cache is None else cache.sparse,
        real,
        positions,
    )
    cached = None if cache is None else cache.layers
    x, (keys, values, queries, routing) = run_layers(params, embed(params, tokens, config), cached, context, config)
    hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    return Forward(hidden, NewTokens(keys, values), queries if query_rows is not None else (), routing)


def output_matrix(params: Params) -> Any:
    """Rows [V, D] that give logits: ``head``, or the embedding where parameters have none."""
    return params["head"] if "head" in params else params["embedding"]


def float_dtype(params: Params) -> Any:
    """The dtype of what is not quantised: that of the cache, by default."""
    return jax.tree.leaves(params["final_norm"])[0].dtype


def decoder_logits(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits of the next token from hidden states; with the embedding where parameters have no ``head``."""
    return linear(hidden, output_matrix(params))


def default_sparse(config: DecoderConfig) -> BlockTopK | None:
    """How a model of this configuration reads a cache where the caller does not say."""
    return BlockTopK() if config.attention == "block_topk" else None


def new_cache(
    config: DecoderConfig, batch: int, size: int, *, dtype: Any = jnp.float32, sparse: BlockTopK | None = None
) -> KVCache:
    """An empty cache for a model.

    Raises:
        ValueError: if ``size`` is more than the model has positions.

    >>> new_cache(DecoderConfig.tiny(), 1, 32).size
    32
    """
    if size > config.max_positions:
        raise ValueError(f"size is {size}, but the model has max_positions = {config.max_positions}")
    sparse = default_sparse(config) if sparse is None else sparse
    return empty_cache(
        config.num_layers, batch, size, config.num_kv_heads, config.head_dim,
        dtype=dtype, sparse=sparse, stacked=config.scan_layers,
    )  # fmt: skip


# The module ----------------------------------------------------------------------------------------------------------


class Decoder(nnx.Module):
    """The decoder as a Flax NNX module, with one `nnx.Param` per array of the tree.

    >>> model = Decoder(DecoderConfig.tiny(), rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 61)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs | None = None, params: Params | None = None) -> None:
        if (rngs is None) == (params is None):
            raise ValueError("expected either rngs, for random parameters, or params")
        self.config = config
        if params is None:
            assert rngs is not None
            params = init_params(rngs.params(), config)
        wrapped = jax.tree.map(nnx.Param, params)
        self.embedding, self.final_norm = wrapped["embedding"], wrapped["final_norm"]
        self.layers = nnx.data(wrapped["layers"])
        self.head = wrapped.get("head")

    def parameters(self) -> Params:
        """The tree of arrays, for the pure functions."""
        tree = {"embedding": self.embedding, "layers": self.layers, "final_norm": self.final_norm}
        tree |= {} if self.head is None else {"head": self.head}
        arrays: Params = jax.tree.map(lambda p: p[...], tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return arrays

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at each position."""
        return self.with_routing(tokens)[0]

    def with_routing(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], Routing | tuple[()]]:
        """Logits, and the routing of sparse experts in all layers, for their losses; () without them."""
        params = self.parameters()
        result = decoder_forward(params, tokens, self.config)
        return decoder_logits(params, result.hidden), result.routing
