"""HarmoniCa: a learned table of (sampling step × branch) says which outputs of a diffusion transformer are reused.

What it makes cheaper: sampling. Attention and MLP outputs of one step are good enough for the next in most places; the
table says where. It is trained without images, by sampling, with the network frozen.

    ρ [T, NB]   logits, r = σ(ρ) the score of computing; row T − 1, which is executed first, stays at 5
    o = C·(1 − r) + f·r          training: f computed, C cached; C ← stopgrad(o) where r > τ
    o = f if r > τ else C        sampling

*Step-wise denoising training.* One epoch is one trajectory x_T → x_0. At each step but the first

    loss_i = λ_i · mean (ε(x) − ε_r(x, C))² + β · Σ_k r_{i,k}

with ε the network without cache and ε_r the one with it, both after guidance; one step of the optimizer on row i alone;
then x goes on with ε_r, so that training sees what sampling will. No gradient crosses a step, so memory is that of one
backward pass.

*Weights.* λ_i is how much step i's reuse moves the final image, measured every ``refresh_every`` steps by T samplings:

    "sequential"      rows are switched from 1 to r_i one after the other, T − 2 first; λ_i = mean (x0_new − x0_before)²
    "leave_one_out"   λ_i = mean (x0(r) − x0(r with row i set to 1))²
    None              λ_i = 1: the objective of Learning-to-Cache on the same trajectories

The first is what the authors' code does, the second what the paper says; they differ where errors of steps interact.

When to use it: one network, sampler and number of steps that serve many samples; above half of the outputs reused a
learned table is better than a uniform one. When not: at half or less, `uniform_schedule` with an interval of 2 needs no
training and is as good or better on what was measured here; and fewer sampling steps are always worth a look first.
β depends on the scale of λ, and on the network: try a few.

Where we differ from the reference code (ModelTC/HarmoniCa): the cache is empty when λ is measured and when the epoch
after it starts, where the reference leaks a stale cache into the first step; means stand for the paper's squared norms,
which changes λ by a constant factor, to be absorbed in β.

Sources: Huang et al., HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion
Transformer Acceleration, arXiv 2410.01723; Ma et al., Learning-to-Cache, arXiv 2406.01733.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from jaxaccel.caching.harmonica_sampling import soft_sample
from jaxaccel.caching.reuse import (
    Cache,
    DenoiseFn,
    ReuseSchedule,
    Sampler,
    check_entry,
    check_threshold,
    schedule_from_array,
    write_cache,
)

BOUND = 5.0
"""Logits stay in [−5, 5]; the first executed row is at 5."""
PROXIES = ("sequential", "leave_one_out", None)


def router_init(key: Key[Array, ""], *, num_steps: int, num_branches: int) -> Float[Array, "T NB"]:
    """Logits to start with: standard normal, and 5 in row T − 1, which is executed first and never trained.

    Args:
        key: of the draw.
        num_steps: T, at least 2: with one step there is nothing to reuse.
        num_branches: NB, two for each block of a transformer.

    Raises:
        ValueError: if a number is too small.

    >>> router_init(jax.random.key(0), num_steps=3, num_branches=2)[-1].tolist()
    [5.0, 5.0]
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, since the first step computes everything; got {num_steps}")
    if num_branches < 1:
        raise ValueError(f"num_branches must be at least 1, got {num_branches}")
    return jax.random.normal(key, (num_steps, num_branches)).at[-1].set(BOUND)


def router_schedule(logits: Any, *, threshold: float = 0.1, sampler: str = "ddim") -> ReuseSchedule:
    """The schedule of a trained table: compute where σ(ρ) > τ.

    Args:
        logits: [T, NB], on the host or a device; not traced, as the result is static.
        threshold: τ in (0, 0.99).
        sampler: name of the sampler that the table was trained with.

    Raises:
        ValueError: if ``threshold`` is out of range, the table is not finite or has one step, or an entry of the first
            executed row is not above the threshold.

    >>> router_schedule(jnp.array([[-5.0, 1.0], [5.0, 5.0]])).rows
    ((False, True), (True, True))
    """
    check_threshold(threshold)
    table = np.asarray(logits, np.float64)
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(f"logits must be a table [steps, branches] with at least 2 steps, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("logits must be finite, got NaN or infinity")
    return schedule_from_array(1 / (1 + np.exp(-table)) > threshold, sampler=sampler)


class SDTStep(NamedTuple):
    """What one step of training leaves behind; no gradient flows through it."""

    out: Array  # the network's output with mixed branches, for the sampler's step
    cache: Cache
    data_loss: Float[Array, ""]  # mean squared difference from the network without cache, before λ
    usage: Float[Array, ""]  # Σ_k r_k


def sdt_loss(
    apply_fn: DenoiseFn,
    params: Any,
    logits_row: Float[Array, "NB"],
    x: Float[Array, "B ..."],
    i: Any,
    cond: Any,
    cache: Any,
    *,
    lam: ArrayLike,
    beta: ArrayLike,
    threshold: float = 0.1,
) -> tuple[Float[Array, ""], SDTStep]:
    """Loss of one row of the table at one step of a trajectory (arXiv 2410.01723, step-wise denoising training).

    Args:
        apply_fn: the network, see `DenoiseFn`.
        params: of the network, frozen.
        logits_row: ρ_i.
        x: noisy sample.
        i: number of the step.
        cond: labels, prompts, or ``None``.
        cache: that the steps before left.
        lam: λ_i.
        beta: β, price of computing one branch.
        threshold: τ; the cache is rewritten where r > τ.

    Returns:
        ``λ·mean (ε − ε_r)² + β·Σ r``, and a `SDTStep`.

    Raises:
        ValueError: if ``threshold`` or ``beta`` is out of range, or the cache is for another number of branches, batch
            size or dtype.
    """
    check_threshold(threshold)
    _check_beta(beta)
    plain, fresh = jax.lax.stop_gradient(apply_fn(params, x, i, cond))
    if cache is None or len(cache) != len(logits_row) or len(fresh) != len(logits_row):
        raise ValueError(
            f"logits_row has {len(logits_row)} entries, the network {len(fresh)} branches and cache "
            f"{None if cache is None else len(cache)} entries; they must agree"
        )
    check_entry(cache, fresh, "cache")
    scores = jax.nn.sigmoid(logits_row)
    out, outputs = apply_fn(params, x, i, cond, cache=cache, weights=scores)
    data = jnp.mean((plain - out) ** 2)
    usage = scores.sum()
    cache = write_cache(scores > threshold, outputs, cache)
    return jnp.asarray(lam * data + beta * usage), jax.lax.stop_gradient(SDTStep(out, cache, data, usage))


def _check_beta(beta: Any) -> None:
    if isinstance(beta, (int, float, np.floating)) and not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")


def step_weights(
    apply_fn: DenoiseFn,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any,
    *,
    logits: Float[Array, "T NB"],
    sampler: Sampler,
    proxy: Any = "sequential",
    threshold: float = 0.1,
) -> Float[Array, "T"]:
    """λ: how much reuse at each step moves the final sample, by T samplings with the soft table.

    Args:
        apply_fn: the network.
        params: of the network.
        x: noise.
        cond: labels, prompts, or ``None``.
        logits: ρ.
        sampler: with T steps.
        proxy: ``"sequential"``, ``"leave_one_out"``, or ``None`` for ones; see the module.
        threshold: τ.

    Returns:
        λ, with 0 for the first executed step.

    Raises:
        ValueError: if ``proxy`` is unknown, ``threshold`` out of range, or ``logits`` have not T rows.
    """
    _check_proxy(proxy)
    check_threshold(threshold)
    if logits.shape[0] != sampler.num_steps:
        raise ValueError(f"logits must have {sampler.num_steps} rows, one a step, got shape {logits.shape}")
    scores = jax.nn.sigmoid(logits).at[-1].set(1)
    if proxy is None:
        return jnp.ones(len(scores), scores.dtype).at[-1].set(0)

    def generate(table: Array) -> Array:
        return soft_sample(
            apply_fn, params, x, cond, weights=table, sampler=sampler, threshold=threshold
        )  # fmt: skip

    steps = jnp.arange(len(scores) - 1)
    if proxy == "leave_one_out":
        # The sample of the whole table is the last round, whose row T − 1 is at 1 anyway: one program for all.
        every = jax.lax.map(lambda i: generate(scores.at[i].set(1)), jnp.arange(len(scores)))
        found = jax.vmap(lambda x0: jnp.mean((x0 - every[-1]) ** 2))(every[:-1])
    else:

        def switch(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
            table, before = carry
            table = table.at[i].set(scores[i])
            after = generate(table)
            return (table, after), jnp.mean((after - before) ** 2)

        # Likewise: the first round switches nothing, and only gives the sample of ones.
        ones = jnp.ones_like(scores)
        order = jnp.concatenate([jnp.array([len(scores) - 1], steps.dtype), steps[::-1]])
        found = jax.lax.scan(switch, (ones, jnp.zeros_like(x)), order)[1][1:][::-1]
    return jnp.concatenate([found, jnp.zeros(1, found.dtype)]).astype(scores.dtype)


def _check_proxy(proxy: Any) -> None:
    if proxy not in PROXIES:
        raise ValueError(f"proxy must be one of {PROXIES}, got {proxy!r}")


class HarmonicaState(NamedTuple):
    """State of training."""

    logits: Float[Array, "T NB"]  # ρ
    opt_state: Any  # the optimizer's, each leaf with a leading axis T: rows have moments and counts of their own
    lam: Float[Array, "T"]  # λ
    epoch: Int[Array, ""]  # int32, finished trajectories


class EpochInfo(NamedTuple):
    """What one trajectory of training looked like; entries are by step i, 0 to T − 2."""

    loss: Float[Array, "T-1"]
    data_loss: Float[Array, "T-1"]  # before λ
    usage: Float[Array, "T-1"]  # Σ_k r
    x0: Array  # the trajectory's end


class Harmonica(NamedTuple):
    """Two pure functions; ``jax.jit(harmonica(...).epoch)`` compiles one program for all epochs."""

    init: Callable[[Any], HarmonicaState]  # key -> state
    epoch: Callable[[HarmonicaState, Any, Any, Any], tuple[HarmonicaState, EpochInfo]]  # state, params, noise, cond


def harmonica(
    apply_fn: DenoiseFn,
    sampler: Sampler,
    *,
    num_branches: int,
    beta: ArrayLike,
    threshold: float = 0.1,
    refresh_every: int = 500,
    proxy: Any = "sequential",
    optimizer: optax.GradientTransformation | None = None,
) -> Harmonica:
    """Train a table of what to reuse, image-free (arXiv 2410.01723).

    Args:
        apply_fn: the network, see `DenoiseFn`. For classifier-free guidance it evaluates both halves and combines them.
        sampler: T steps, at least 2.
        num_branches: NB.
        beta: β, the price of computing a branch, on the scale of λ·mean squared error; larger reuses more.
        threshold: τ in (0, 0.99), above which a branch is computed when sampling.
        refresh_every: λ is measured anew every so many optimizer steps, T to an epoch, rounded down to whole epochs.
        proxy: how, see the module.
        optimizer: of the table; ``None`` for AdamW at 0.01 without decay, the authors'.

    Returns:
        ``init(key)`` and ``epoch(state, params, noise, cond)``; noise and conditions are drawn by the caller, anew for
        each epoch. Then ``router_schedule(state.logits, threshold=threshold)``.

    Raises:
        ValueError: if ``beta`` is negative or not finite, ``threshold`` out of range, ``refresh_every`` below 1,
            ``proxy`` unknown, or the sampler takes one step only.

    Example:
        >>> from jaxaccel.caching import reuse_branch
        >>> def network(params, x, i, cond, *, cache=None, weights=None, compute=None):
        ...     out = reuse_branch(lambda x: params * x, x, 0, cache=cache, weights=weights, compute=compute)
        ...     return out, (out,)
        >>> training = harmonica(network, Sampler(lambda x, out, i: x - out, 4), num_branches=1, beta=1e-3)
        >>> epoch, state = jax.jit(training.epoch), training.init(jax.random.key(0))
        >>> for key in jax.random.split(jax.random.key(1), 3):
        ...     state, info = epoch(state, 0.1, jax.random.normal(key, (8, 2)), None)
        >>> router_schedule(state.logits).num_steps
        4
    """
    _check_beta(beta)
    check_threshold(threshold)
    _check_proxy(proxy)
    if refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
    if sampler.num_steps < 2:
        raise ValueError(f"sampler must take at least 2 steps, got {sampler.num_steps}: with one nothing is reused")
    last = sampler.num_steps - 1
    tx = optax.adamw(1e-2, weight_decay=0.0) if optimizer is None else optimizer
    period = max(1, refresh_every // sampler.num_steps)

    def init(key: Any) -> HarmonicaState:
        logits = router_init(key, num_steps=sampler.num_steps, num_branches=num_branches)
        return HarmonicaState(
            logits,
            jax.vmap(tx.init)(logits),
            jnp.ones(len(logits), logits.dtype).at[-1].set(0),
            jnp.zeros((), jnp.int32),
        )

    def weights_of(state: HarmonicaState, params: Any, noise: Array, cond: Any) -> Array:
        return step_weights(
            apply_fn, params, noise, cond, logits=state.logits, sampler=sampler, proxy=proxy, threshold=threshold
        )

    def epoch(state: HarmonicaState, params: Any, noise: Any, cond: Any) -> tuple[HarmonicaState, EpochInfo]:
        if state.logits.shape != (last + 1, num_branches):
            raise ValueError(f"state.logits must be [{last + 1}, {num_branches}], got {list(state.logits.shape)}")
        lam = state.lam
        if proxy is not None:
            lam = jax.lax.cond(
                state.epoch % period == 0, lambda: weights_of(state, params, noise, cond).astype(lam.dtype), lambda: lam
            )

        def train(carry: tuple[Array, Cache], now: Any) -> tuple[tuple[Array, Cache], Any]:
            (x, cache), (i, row, opt_state, weight) = carry, now
            (loss, step), slope = jax.value_and_grad(
                lambda row: sdt_loss(
                    apply_fn, params, row, x, i, cond, cache, lam=weight, beta=beta, threshold=threshold
                ),
                has_aux=True,
            )(row)
            updates, opt_state = tx.update(slope, opt_state, row)
            row = jnp.clip(optax.apply_updates(row, updates), -BOUND, BOUND)
            x = jax.lax.stop_gradient(sampler.step(x, step.out, i))
            return (x, step.cache), (row, opt_state, loss, step.data_loss, step.usage)

        out, cache = apply_fn(params, noise, jnp.int32(last), cond)
        start = (sampler.step(noise, out, jnp.int32(last)), cache)
        # Every row takes part once, so that rows and their optimizer states are what the loop runs over.
        head = jax.tree.map(lambda a: a[:-1], (state.logits, state.opt_state, lam))
        rows = (jnp.arange(last, dtype=jnp.int32), *head)
        (x, _), (logits, opt_state, loss, data, usage) = jax.lax.scan(train, start, rows, reverse=True)

        def restore(new: Array, old: Array) -> Array:
            return jnp.concatenate([new, old[-1:]])

        state = HarmonicaState(
            restore(logits, state.logits),
            jax.tree.map(restore, opt_state, state.opt_state),
            lam,
            state.epoch + 1,
        )
        return state, EpochInfo(loss, data, usage, x)

    return Harmonica(init, epoch)
