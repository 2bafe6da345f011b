"""Serving a diffusion transformer to a batch whose samples are at different steps, each with its own reused branches.

A sample that arrives late does not wait for the others, and each of them follows the same schedule from its own start.
At any time some samples compute a branch and others reuse it: those that compute are packed together, the branch runs
on these R rows alone, and its outputs go to their places in the cache.

    rows of x        all samples: residual stream, pending outputs, modulations of their own step
    rows of branches the R samples whose schedule computes this branch at their step

R is static; with a schedule that reuses a share u and samples spread over its steps about (1 − u)·B rows are enough.
`rows_needed` says how many a batch needs, before it is run.

When to use it: requests that come one by one, and a schedule that reuses much. When not: samples that start together,
for which `jaxaccel.caching.sample` leaves branches out of the program.

The prologue of each branch is `kernels_pallas.modulated_residual`. The schedules are those of Huang et al., HarmoniCa,
arXiv 2410.01723; packing is this library's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel.compression import linear
from jaxaccel.diffusion import NoiseSchedule, ddim_step, guide
from jaxaccel.models.dit import Modulation, Params, dit_modulation, is_stacked, stack_blocks
from jaxaccel.models.dit_blocks import (
    EPS,
    attention_branch,
    from_patches,
    grid_positions,
    mlp_branch,
    to_patches,
)
from jaxaccel.models.dit_config import DiTConfig
from kernels_pallas.modulated_residual import modulated_residual, modulated_residual_rows


class DiTRequests(NamedTuple):
    """A batch of S slots; the state of `dit_serve_step`."""

    x: Any  # [S, H, W, C] noisy images; samples where step is −1
    step: Any  # int32 [S], the step that comes next, T − 1 … 0; −1: done, or free
    labels: Any  # int32 [S]
    cache: Any  # [2·depth, S or 2·S, N, D] outputs of branches; with guidance rows with labels, then without


def dit_forward_rows(
    params: Params,
    x: Float[Array, "..."],
    modulation: Modulation,
    config: DiTConfig,
    *,
    cache: Any,
    compute: Any,
    limit: Any,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H W O"], Float[Array, "M B N D"]]:
    """The network for samples each of which computes branches of its own choice.

    Args:
        params: as for `jaxaccel.models.dit_forward`; blocks that are not stacked are stacked here, which copies them.
        x: noisy images [B, H, W, C].
        modulation: of each sample's own step, blocks [B, depth, 6, D].
        config: of the model; static.
        cache: outputs of branches at earlier steps [2·depth, B, N, D].
        compute: bool [2·depth, B], data.
        limit: R, most samples that compute the same branch, 1 … B; static. If there are more, predictions are NaN.
        implementation: of `kernels_pallas.modulated_residual`; the best for the platform by default.

    Returns:
        As `dit_forward`. The prologue works in float32, where `dit_forward` rounds bfloat16 between its operations.

    Raises:
        ValueError: for images of another size, modulations, a cache or a choice that do not fit, a limit outside 1 … B.

    >>> config = DiTConfig.tiny()
    >>> from jaxaccel.models import init_dit
    >>> params = init_dit(jax.random.key(0), config)
    >>> modulation = dit_modulation(params, jnp.array([999, 500]), jnp.array([3, 7]), config)
    >>> cache = jnp.zeros((config.num_branches, 2, config.tokens, config.width))
    >>> compute = jnp.array([[True, False]] * config.num_branches)  # the second sample reuses all
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> eps, cache = dit_forward_rows(params, x, modulation, config, cache=cache, compute=compute, limit=1)
    >>> eps.shape, bool((cache[:, 1] == 0).all())
    ((2, 8, 8, 1), True)
    """
    batch, depth = x.shape[0], config.depth
    expected = (config.image_size, config.image_size, config.channels)
    if x.ndim != 4 or x.shape[1:] != expected:
        raise ValueError(f"x has shape {x.shape}, expected [B, {', '.join(map(str, expected))}]")
    if modulation.blocks.shape != (batch, depth, 6, config.width):
        raise ValueError(
            f"modulation.blocks has shape {modulation.blocks.shape}, expected {(batch, depth, 6, config.width)}: each "
            "sample's own step"
        )
    shape = (config.num_branches, batch, config.tokens, config.width)
    if jnp.shape(cache) != shape:
        raise ValueError(f"cache has shape {jnp.shape(cache)}, expected {shape} for this batch and model")
    if jnp.shape(compute) != shape[:2] or compute.dtype != jnp.bool_:
        raise ValueError(f"compute is {compute.dtype}{list(jnp.shape(compute))}, expected bool{list(shape[:2])}")
    params = params if is_stacked(params) else stack_blocks(params)
    dtype = params["patch_bias"].dtype
    stream = linear(to_patches(x.astype(dtype), config.patch), params["patch"], params["patch_bias"])
    side = config.image_size // config.patch
    stream = stream + jnp.asarray(grid_positions(side, config.width), dtype)
    options: dict[str, Any] = {"eps": EPS, "implementation": implementation}

    def block(carry: tuple[Array, Array, Array], xs: Any) -> tuple[tuple[Array, Array, Array], Array]:
        stream, pending, gate = carry
        own, parts, old, flags = xs
        outputs = []
        for j, branch in enumerate((lambda h: attention_branch(own, h, config.heads), lambda h: mlp_branch(own, h))):
            shift, scale = parts[:, 3 * j], parts[:, 3 * j + 1]
            packed = modulated_residual_rows(
                stream, [pending], [gate], shift, scale, flags[j], limit=limit, **options
            )  # fmt: skip
            # Rows past the number of those that compute have the id B, and are dropped.
            output = old[j].at[packed.rows].set(branch(packed.h).astype(old.dtype), mode="drop")
            outputs.append(output)
            stream, pending, gate = packed.x, output, parts[:, 3 * j + 2]
        return (stream, pending, gate), jnp.stack(outputs)

    nothing = jnp.zeros_like(stream), jnp.zeros((batch, config.width), dtype)
    by_block = jnp.asarray(cache, dtype).reshape(depth, 2, *shape[1:]), jnp.asarray(compute).reshape(depth, 2, batch)
    parts = jnp.moveaxis(modulation.blocks.astype(dtype), 1, 0)
    carry, outputs = jax.lax.scan(block, (stream, *nothing), (params["blocks"], parts, *by_block))
    stream, pending, gate = carry
    final = modulation.final.astype(dtype)
    h = modulated_residual(stream, [pending], [gate], final[:, 0], final[:, 1], **options).h
    last = linear(h, params["final"], params["final_bias"])
    # Those that found no room would go on with outputs that are too old: all must be seen to have failed.
    too_many = jnp.any(jnp.sum(compute, 1, dtype=jnp.int32) > limit)
    last = jnp.where(too_many, jnp.asarray(jnp.nan, last.dtype), last)
    return from_patches(last, side, config.patch).astype(x.dtype), outputs.reshape(shape)


def dit_requests(config: DiTConfig, slots: Any, *, is_guided: bool = False, dtype: Any = jnp.float32) -> DiTRequests:
    """Free slots.

    Args:
        config: of the model.
        slots: S.
        is_guided: whether `dit_serve_step` will guide: the cache then has two rows for each slot.
        dtype: of the cache: that of the parameters.

    Raises:
        ValueError: for a number of slots below 1.
    """
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ValueError(f"slots is {slots!r}, expected an integer of at least 1")
    images = jnp.zeros((slots, config.image_size, config.image_size, config.channels))
    rows = 2 * slots if is_guided else slots
    cache = jnp.zeros((config.num_branches, rows, config.tokens, config.width), dtype)
    return DiTRequests(images, jnp.full(slots, -1, jnp.int32), jnp.zeros(slots, jnp.int32), cache)


def dit_admit(
    requests: DiTRequests, slots: Any, noise: Float[Array, "..."], labels: Any, *, num_steps: Any
) -> DiTRequests:
    """Put new requests into slots; whatever was there is lost.

    Args:
        requests: of `dit_requests`.
        slots: int [k], or a number.
        noise: [k, H, W, C], or of one.
        labels: [k], or a number.
        num_steps: T.

    >>> requests = dit_admit(dit_requests(DiTConfig.tiny(), 3), 1, jnp.ones((8, 8, 1)), 7, num_steps=5)
    >>> requests.step.tolist(), requests.labels.tolist()
    ([-1, 4, -1], [0, 7, 0])
    """
    return requests._replace(
        x=requests.x.at[slots].set(noise),
        step=requests.step.at[slots].set(num_steps - 1),
        labels=requests.labels.at[slots].set(labels),
    )


def rows_needed(flags: Any, step: Any, *, is_guided: bool = False) -> int:
    """The most rows that compute the same branch next: the least ``limit`` of `dit_serve_step`.

    Args:
        flags: a schedule, [T, 2·depth] bool.
        step: of all slots, −1 where one is free.
        is_guided: whether each slot has two rows.

    >>> flags = np.array([[True, False], [False, True], [True, True]])
    >>> rows_needed(flags, [2, 1, 1, -1]), rows_needed(flags, [0, 1])
    (3, 1)
    """
    step = np.asarray(step)
    chosen = np.asarray(flags)[step[step >= 0]]
    return int(chosen.sum(0).max(initial=0)) * (2 if is_guided else 1)


def dit_serve_step(
    params: Params,
    requests: DiTRequests,
    flags: Any,
    config: DiTConfig,
    schedule: NoiseSchedule,
    *,
    limit: Any,
    scale: Any = None,
    cfg_channels: Any = None,
    sampler_step: Callable[..., Array] = ddim_step,
    implementation: str | None = None,
) -> DiTRequests:
    """One step of all samples that are under way, each at its own.

    Args:
        params: of the model, stacked.
        requests: their state. Slots with step −1 stay as they are and compute nothing.
        flags: bool [T, 2·depth], what is computed at each step, data: ``np.asarray`` of a
            `jaxaccel.caching.ReuseSchedule`. Row T − 1 must be all true.
        config: of the model; static.
        schedule: the T steps; static.
        limit: most rows that compute the same branch, see `rows_needed`; static. Of a batch with more all samples that
            are under way become NaN.
        scale: of classifier-free guidance; ``None`` for none.
        cfg_channels: as for `jaxaccel.diffusion.guide`.
        sampler_step: ``(schedule, x, eps, i)`` with a step for each sample.
        implementation: of `kernels_pallas.modulated_residual`.

    Returns:
        The state after it; samples whose step was 0 are done and have step −1.

    Raises:
        ValueError: for a schedule of another number of steps or branches, a cache that does not fit guidance, or as
            `dit_forward_rows`.

    >>> from jaxaccel.diffusion import linear_betas, noise_schedule, respace, uniform_timesteps
    >>> from jaxaccel.models import init_dit
    >>> config = DiTConfig.tiny()
    >>> schedule = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, 2))
    >>> params = stack_blocks(init_dit(jax.random.key(0), config))
    >>> requests = dit_admit(dit_requests(config, 2), 0, jnp.ones((8, 8, 1)), 3, num_steps=2)
    >>> flags = np.ones((2, config.num_branches), bool)
    >>> dit_serve_step(params, requests, flags, config, schedule, limit=1).step.tolist()
    [0, -1]
    """
    flags, steps = jnp.asarray(flags), schedule.num_steps
    if flags.shape != (steps, config.num_branches) or flags.dtype != jnp.bool_:
        raise ValueError(
            f"flags is {flags.dtype}{list(flags.shape)}, expected bool{[steps, config.num_branches]}: a row for each "
            "of the schedule's steps"
        )
    x, step, labels, cache = requests
    slots = x.shape[0]
    rows = slots if scale is None else 2 * slots
    if cache.shape[1] != rows:
        raise ValueError(
            f"cache has {cache.shape[1]} rows, expected {rows}: dit_requests(is_guided={scale is not None})"
        )
    busy, now = step >= 0, jnp.maximum(step, 0)
    compute = flags[now].T & busy
    images, times, own = x, now, labels
    if scale is not None:
        null = jnp.full(slots, config.null_label, labels.dtype)
        images, times, own = jnp.concatenate([x, x]), jnp.concatenate([now, now]), jnp.concatenate([labels, null])
        compute = jnp.concatenate([compute, compute], 1)
    modulation = dit_modulation(params, schedule.timestep(times), own, config)
    out, cache = dit_forward_rows(
        params, images, modulation, config, cache=cache, compute=compute, limit=limit, implementation=implementation
    )
    if scale is not None:
        out = guide(out, scale, cfg_channels=cfg_channels)[:slots]
    moved = sampler_step(schedule, x, out[..., : config.channels], now)
    return DiTRequests(
        jnp.where(busy[:, None, None, None], moved, x), jnp.where(busy, step - 1, step), labels, cache
    )  # fmt: skip
