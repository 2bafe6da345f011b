"""A diffusion transformer (DiT, adaLN-Zero) whose branches can be reused from earlier steps.

    c = MLP(features(t)) + E[label],   (shift₁, scale₁, gate₁, shift₂, scale₂, gate₂) = W silu(c) + b, for each block
    o = Attention(LN(x)(1 + scale₁) + shift₁),   x ← x + gate₁ o
    o = MLP(LN(x)(1 + scale₂) + shift₂),         x ← x + gate₂ o
    ε = unpatch(W (LN(x)(1 + scale) + shift) + b)

What a step can take from an earlier one is ``o``, before the gate: modulations and gates are those of the current step.
A cache is an array [2·depth, B, N, D], branch 2b the attention of block b, 2b + 1 its MLP; the model holds no state, it
takes a cache and gives one back.

When to use it: images or latents of a fixed size with class labels, and all methods that reuse branches. When not: text
conditions, other conditions than a vector, images of several sizes.

Peebles and Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Num

from jaxaccel.compression import linear, take_rows
from jaxaccel.diffusion import NoiseSchedule
from jaxaccel.models.dit_blocks import (
    attention_branch,
    from_patches,
    grid_positions,
    layer_norm,
    mlp_branch,
    time_features,
    to_patches,
)
from jaxaccel.models.dit_config import FREQUENCIES, DiTConfig, dit_shapes

Params = dict[str, Any]


class Modulation(NamedTuple):
    """What a step's condition does to the stream; all steps' can be worked out ahead, [T, ...]."""

    blocks: Any  # [..., depth, 6, D]: shift, scale, gate of attention, then of the MLP
    final: Any  # [..., 2, D]: shift, scale


# Parameters ----------------------------------------------------------------------------------------------------------


def init_dit(key: Key[Array, ""], config: DiTConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: Xavier's uniform matrices, labels and time with deviation 0.02, modulations and output zero.

    With zero gates each block is the identity, and the output is zero, at first.

    >>> init_dit(jax.random.key(0), DiTConfig.tiny())["blocks"][1]["up"].shape
    (128, 32)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        dit_shapes(config), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    arrays = []
    for number, (path, shape) in enumerate(leaves):
        name = str(getattr(path[-1], "key", ""))
        own = jax.random.fold_in(key, number)
        if name.endswith("bias") or "modulation" in name or name == "final":
            arrays.append(jnp.zeros(shape, dtype))
        elif name in ("labels", "time_in", "time_out"):
            arrays.append(0.02 * jax.random.normal(own, shape, dtype))
        else:
            limit = (6 / sum(shape)) ** 0.5
            arrays.append(jax.random.uniform(own, shape, dtype, -limit, limit))
    params: Params = jax.tree.unflatten(tree, arrays)
    return params


def stack_blocks(params: Params) -> Params:
    """The same parameters with blocks as arrays [depth, ...]: they run as a scan, whose body is compiled once."""
    blocks = [params["blocks"][i] for i in range(len(params["blocks"]))]
    return params | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def is_stacked(params: Params) -> bool:
    """Whether blocks are arrays [depth, ...], see `stack_blocks`."""
    return hasattr(params["blocks"], "keys") and "qkv" in params["blocks"]


def _block(params: Params, index: int) -> Any:
    if is_stacked(params):
        return jax.tree.map(lambda leaf: leaf[index], params["blocks"])
    return params["blocks"][index]


# Conditions ----------------------------------------------------------------------------------------------------------


def dit_condition(
    params: Params, t: Num[Array, "..."], labels: Int[Array, "..."], config: DiTConfig
) -> Float[Array, "... D"]:
    """The vector c that time step and label become.

    Args:
        params: of the model.
        t: time steps of training (0 … 999 for the published models), of any shape; fractions are allowed.
        labels: 0 … K − 1, or K for no class; broadcasts with ``t``. Others give NaN.
        config: of the model.

    Returns:
        In the dtype of the parameters.
    """
    t, labels = jnp.broadcast_arrays(t, labels)
    features = time_features(t, FREQUENCIES, params["time_in_bias"].dtype)
    hidden = jax.nn.silu(linear(features, params["time_in"], params["time_in_bias"]))
    known = (labels >= 0) & (labels <= config.num_classes)
    rows = jnp.where(known[..., None], take_rows(params["labels"], jnp.clip(labels, 0, config.num_classes)), jnp.nan)
    return linear(hidden, params["time_out"], params["time_out_bias"]) + rows


def dit_modulation(params: Params, t: Num[Array, "..."], labels: Int[Array, "..."], config: DiTConfig) -> Modulation:
    """All shifts, scales and gates of a step, or of many: they depend on time and label only.

    For a whole sampling ``t = schedule.timestep(jnp.arange(T))[:, None]`` gives [T, B, ...]: the matrices of all blocks
    are read once, not once a step.

    Args:
        params: of the model.
        t: as for `dit_condition`.
        labels: as for `dit_condition`.
        config: of the model.

    Returns:
        Modulations [..., depth, 6, D] and [..., 2, D].

    >>> config = DiTConfig.tiny()
    >>> params = init_dit(jax.random.key(0), config)
    >>> dit_modulation(params, jnp.arange(5)[:, None], jnp.array([[3, 10]]), config).blocks.shape
    (5, 2, 2, 6, 32)
    """
    active = jax.nn.silu(dit_condition(params, t, labels, config))
    lead, width = active.shape[:-1], config.width

    def parts(matrix: Any, bias: Any) -> Array:
        return linear(active, matrix, bias).reshape(*lead, -1, width)

    if is_stacked(params):
        blocks = params["blocks"]
        each = jax.vmap(parts)(blocks["modulation"], blocks["modulation_bias"])
        stacked = jnp.moveaxis(each, 0, -3)
    else:
        every = [params["blocks"][i] for i in range(config.depth)]
        stacked = jnp.stack([parts(block["modulation"], block["modulation_bias"]) for block in every], -3)
    return Modulation(stacked, parts(params["final_modulation"], params["final_modulation_bias"]))


# The network ---------------------------------------------------------------------------------------------------------


def _is_static(compute: Any) -> bool:
    return compute is not None and not isinstance(compute, jax.Array)


def _check(images: Array, cache: Any, weights: Any, compute: Any, config: DiTConfig) -> tuple[bool, ...] | None:
    """Refuse what does not fit; return a static choice of branches as a tuple."""
    expected = (config.image_size, config.image_size, config.channels)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(f"x has shape {images.shape}, expected [B, {', '.join(map(str, expected))}]")
    branches = config.num_branches
    if weights is not None and compute is not None:
        raise ValueError("weights and compute are both given: expected a soft or a hard choice, not two")
    if weights is not None and jnp.shape(weights) != (branches,):
        raise ValueError(f"weights has shape {jnp.shape(weights)}, expected one per branch ({branches},)")
    static = None
    if _is_static(compute):
        static = tuple(compute)
        if not all(isinstance(flag, (bool, np.bool_)) for flag in static):
            raise ValueError(f"compute is {compute!r}, expected bools, or a JAX array of them")
    if compute is not None:
        shape = (len(static),) if static is not None else compute.shape
        if shape != (branches,):
            raise ValueError(f"compute has shape {shape}, expected one per branch ({branches},)")
        if static is None and compute.dtype != jnp.bool_:
            raise ValueError(f"compute has dtype {compute.dtype}, expected bool")
    needs = weights is not None or (compute is not None and not (static is not None and all(static)))
    if needs and cache is None:
        raise ValueError("cache is None, but some branches are to be reused: expected outputs of an earlier step")
    shape = (branches, images.shape[0], config.tokens, config.width)
    if cache is not None and jnp.shape(cache) != shape:
        raise ValueError(f"cache has shape {jnp.shape(cache)}, expected {shape} for this batch and model")
    return None if static is None else tuple(map(bool, static))


def _modulated(x: Array, modulation: Array, first: int) -> Array:
    """LN(x)(1 + scale) + shift, with the modulations ``first`` and the next; [B, parts, D]."""
    return layer_norm(x) * (1 + modulation[:, None, first + 1]) + modulation[:, None, first]


def _branches(block: Any, heads: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    return lambda h: attention_branch(block, h, heads), lambda h: mlp_branch(block, h)


def _run_block(block: Any, x: Array, modulation: Array, choice: Sequence[Any], heads: int) -> tuple[Array, list[Array]]:
    """A block: the stream after it, and the outputs of its two branches.

    ``choice`` is (cached outputs, weights, compute), which have two entries, or are ``None``. A flag that is a
    Python bool decides at once; an array decides when the program runs.
    """
    cached, weights, compute = choice
    outputs = []
    for j, branch in enumerate(_branches(block, heads)):

        def fresh(stream: Array, old: Any, j: int = j, branch: Callable[[Array], Array] = branch) -> Array:
            return branch(_modulated(stream, modulation, 3 * j))

        old: Any = None if cached is None else cached[j].astype(x.dtype)
        if weights is not None and weights.dtype == jnp.bool_:
            output: Any = jnp.where(weights[j], fresh(x, old), old)
        elif weights is not None:
            share = weights[j].astype(x.dtype)
            output = old * (1 - share) + fresh(x, old) * share
        elif compute is None or (isinstance(compute[j], bool) and compute[j]):
            output = fresh(x, old)
        elif isinstance(compute[j], bool):
            output = old
        else:
            output = jax.lax.cond(compute[j], fresh, lambda stream, old: old, x, old)
        outputs.append(output)
        x = x + modulation[:, None, 3 * j + 2] * output
    return x, outputs


def _scan_blocks(
    params: Params, x: Array, modulation: Array, cache: Any, weights: Any, compute: Any, config: DiTConfig
) -> tuple[Array, Array]:
    pairs = [None if a is None else a.reshape(config.depth, 2, *a.shape[1:]) for a in (cache, weights, compute)]

    def scanned(stream: Array, xs: Any) -> tuple[Array, Array]:
        block, own, *rest = xs
        stream, outputs = _run_block(block, stream, own, rest, config.heads)
        return stream, jnp.stack(outputs)

    x, outputs = jax.lax.scan(scanned, x, (params["blocks"], jnp.moveaxis(modulation, 1, 0), *pairs))
    return x, outputs.reshape(config.num_branches, *x.shape)


def _unrolled_blocks(
    params: Params, x: Array, modulation: Array, cache: Any, weights: Any, compute: Any, config: DiTConfig
) -> tuple[Array, Array]:
    outputs = []
    for b in range(config.depth):
        pair = [None if a is None else a[2 * b : 2 * b + 2] for a in (cache, weights, compute)]
        x, both = _run_block(_block(params, b), x, modulation[:, b], pair, config.heads)
        outputs += both
    if _is_static(compute) and cache is not None:
        # Only what is new is written, so that a program may update the cache in place.
        new = [k for k in range(config.num_branches) if compute[k]]
        if not new:
            return x, cache.astype(x.dtype)
        if len(new) < config.num_branches:
            return x, cache.astype(x.dtype).at[np.array(new)].set(jnp.stack([outputs[k] for k in new]))
    return x, jnp.stack(outputs)


def dit_forward(
    params: Params,
    x: Float[Array, "..."],
    modulation: Modulation,
    config: DiTConfig,
    *,
    cache: Any = None,
    weights: Any = None,
    compute: Any = None,
) -> tuple[Float[Array, "B H W O"], Float[Array, "M B N D"]]:
    """The network for given modulations, with branches that are computed, mixed or reused.

    Args:
        params: from `init_dit`, `load_dit` or `DiT.parameters`; stacked blocks (`stack_blocks`) run as a scan, except
            for a static ``compute``. Their dtype is that of the computation: cast them to bfloat16 for bfloat16.
        x: noisy images [B, H, W, C].
        modulation: of a step, blocks [B, depth, 6, D], from `dit_modulation`.
        config: of the model; static.
        cache: outputs of branches at an earlier step [2·depth, B, N, D], as returned here.
        weights: a soft choice r [2·depth]: o = cache·(1 − r) + fresh·r. Everything is computed. Booleans select without
            rounding.
        compute: a hard choice. A tuple of 2·depth Python bools is static: branches that are reused are no part of the
            program. A JAX array of bools is data: each branch is a ``lax.cond``, one program for all choices. Under
            `jax.vmap` over the array both sides are computed, and nothing is saved.

    With neither ``weights`` nor ``compute`` everything is computed, and a cache is not read.

    Returns:
        Predictions [B, H, W, C or 2·C] in the dtype of ``x``, and the outputs of all branches before their gates
        [2·depth, B, N, D]: mixed ones with ``weights``, old ones where they were reused. They are the next
        step's cache.

    Raises:
        ValueError: for images of another size, a cache of another batch or model, a choice of another length, two
            choices, or one without the cache it needs.

    >>> config = DiTConfig.tiny()
    >>> params = init_dit(jax.random.key(0), config)
    >>> modulation = dit_modulation(params, jnp.array([999]), jnp.array([3]), config)
    >>> eps, cache = dit_forward(params, jnp.ones((1, 8, 8, 1)), modulation, config)
    >>> eps.shape, cache.shape
    ((1, 8, 8, 1), (4, 1, 16, 32))
    """
    static = _check(x, cache, weights, compute, config)
    compute = compute if static is None else static
    if modulation.blocks.shape != (x.shape[0], config.depth, 6, config.width):
        raise ValueError(
            f"modulation.blocks has shape {modulation.blocks.shape}, expected "
            f"{(x.shape[0], config.depth, 6, config.width)} for one step of this batch"
        )
    weights = None if weights is None else jnp.asarray(weights)
    dtype = params["patch_bias"].dtype
    stream = linear(to_patches(x.astype(dtype), config.patch), params["patch"], params["patch_bias"])
    side = config.image_size // config.patch
    stream = stream + jnp.asarray(grid_positions(side, config.width), dtype)
    blocks = modulation.blocks.astype(dtype)
    run = _scan_blocks if is_stacked(params) and static is None else _unrolled_blocks
    stream, outputs = run(params, stream, blocks, cache, weights, compute, config)
    last = linear(_modulated(stream, modulation.final.astype(dtype), 0), params["final"], params["final_bias"])
    return from_patches(last, side, config.patch).astype(x.dtype), outputs


def dit_apply(
    params: Params,
    x: Float[Array, "..."],
    t: Any,
    labels: Any,
    config: DiTConfig,
    *,
    cache: Any = None,
    weights: Any = None,
    compute: Any = None,
) -> tuple[Float[Array, "B H W O"], Float[Array, "M B N D"]]:
    """`dit_forward` for time steps and labels.

    Args:
        params: of the model.
        x: noisy images [B, H, W, C].
        t: time steps of training, a number or [B].
        labels: [B], 0 … K − 1, or K for no class; others give NaN.
        config: of the model; static.
        cache: as for `dit_forward`.
        weights: as for `dit_forward`.
        compute: as for `dit_forward`.

    Returns:
        As `dit_forward`.

    Raises:
        ValueError: as `dit_forward`, or for labels or time steps of another batch.

    >>> config = DiTConfig.tiny()
    >>> params = init_dit(jax.random.key(0), config)
    >>> eps, _ = dit_apply(params, jnp.ones((2, 8, 8, 1)), 999, jnp.array([3, config.null_label]), config)
    >>> float(jnp.abs(eps).max())  # adaLN-Zero
    0.0
    """
    t, labels = jnp.asarray(t), jnp.asarray(labels)
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {x.shape[:1]}")
    if t.shape not in ((), x.shape[:1]):
        raise ValueError(f"t has shape {t.shape}, expected a number or {x.shape[:1]}")
    modulation = dit_modulation(params, t, labels, config)
    return dit_forward(params, x, modulation, config, cache=cache, weights=weights, compute=compute)


def dit_denoiser(config: DiTConfig, schedule: NoiseSchedule) -> Callable[..., Any]:
    """The model as samplers and cache methods like it, in steps of a schedule.

    Args:
        config: of the model.
        schedule: whose step i is the model's time step ``schedule.timestep(i)``.

    Returns:
        ``(params, x, i, cond, *, cache=None, weights=None, compute=None) -> (eps, outputs)``. ``cond`` are labels
        [B], or a `Modulation` of all T steps, [T, B, ...], of which it takes step i. Variances, where the model has
        them, are the last channels of ``eps``. For guidance see `jaxaccel.diffusion.guide_denoiser`.

    >>> from jaxaccel.diffusion import ddim_sample, linear_betas, noise_schedule, respace, uniform_timesteps
    >>> config = DiTConfig.tiny()
    >>> schedule = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, 4))
    >>> params, denoise = init_dit(jax.random.key(0), config), dit_denoiser(config, schedule)
    >>> noise, labels = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([3, 7])
    >>> ddim_sample(lambda x, i: denoise(params, x, i, labels)[0], schedule, noise).shape
    (2, 8, 8, 1)
    """

    def denoise(
        params: Params, x: Array, i: Any, cond: Any, *, cache: Any = None, weights: Any = None, compute: Any = None
    ) -> tuple[Array, Array]:
        choice = {"cache": cache, "weights": weights, "compute": compute}
        if isinstance(cond, Modulation):
            if cond.blocks.ndim != 5 or cond.blocks.shape[0] != schedule.num_steps:
                raise ValueError(
                    f"cond.blocks has shape {cond.blocks.shape}, expected [T, B, depth, 6, D] for the schedule's "
                    f"T = {schedule.num_steps}"
                )
            return dit_forward(params, x, Modulation(cond.blocks[i], cond.final[i]), config, **choice)
        return dit_apply(params, x, schedule.timestep(i), cond, config, **choice)

    return denoise


# The module ----------------------------------------------------------------------------------------------------------


class DiT(nnx.Module):
    """The transformer as a Flax NNX module, with one `nnx.Param` per array of the tree.

    >>> model = DiT(DiTConfig.tiny(), rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 8, 8, 1)), jnp.array([999, 0]), jnp.array([3, 10])).shape
    (2, 8, 8, 1)
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs | None = None, params: Params | None = None) -> None:
        if (rngs is None) == (params is None):
            raise ValueError("expected either rngs, for random parameters, or params")
        self.config = config
        if params is None:
            assert rngs is not None
            params = init_dit(rngs.params(), config)
        self.tree = nnx.data(jax.tree.map(nnx.Param, params))

    def parameters(self) -> Params:
        """The tree of arrays, for the pure functions."""
        arrays: Params = jax.tree.map(lambda p: p[...], self.tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return arrays

    def __call__(self, x: Float[Array, "B H W C"], t: Any, labels: Any) -> Float[Array, "B H W O"]:
        """Predict noise (and variances, if the model has them) for time steps of training and labels."""
        return dit_apply(self.parameters(), x, t, labels, self.config)[0]
