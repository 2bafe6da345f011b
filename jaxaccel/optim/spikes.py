"""Loss spikes: recognise them, skip the step, or draw another batch.

They make training cheaper by letting small batches and few devices go through without restarts from checkpoints.

    a spike               L > f·m   or   L > m + n·s   or   L not finite
    running statistics    w_t = (1 − d)/(1 − d^t);  δ = L − m;  m ← m + w·δ;  s² ← (1 − w)·(s² + w·δ²)
    at a spike            statistics, parameters and the optimizer's state stay as they were

with L the loss, m and s² its running mean and variance. The weights w_t make both free of start-up bias: m is exactly
the exponentially weighted mean. Measures of GEB-1.3B, Wu et al., arXiv 2406.09900, which names them without numbers;
f = 2, n = 6 and the window of 100 steps are this library's choice. A third measure of the paper, smaller gradients of
the embedding, is in `jaxaccel.optim.embedding_shrink`.

**What they cannot do.** The loss of a step shows what the step before did. Skipping protects from a bad batch; where
the parameters are already spoilt the loss stays high whatever is skipped, and the way back is a checkpoint.

The loss must be that of the whole batch: under `jax.shard_map` take its mean over devices first, or they disagree.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.optim import _checks

# Recognising spikes --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SpikeRule:
    """What counts as a spike. Numbers may be traced.

    Attributes:
        ema_decay: decay d of the running mean and variance, in [0, 1); 0.99 is a window of about 100 steps.
        factor: f > 1; a loss above m + (f − 1)·|m|, which is f·m where m is positive, is a spike. ``None`` leaves it
            out.
        num_std: n > 0; a loss above m + n·s is a spike. ``None`` leaves it out.
        warmup_steps: calm losses that must have been seen before a finite loss can be a spike, >= 1.
        max_consecutive: after that many spikes in a row the next finite loss is taken for the new level, and statistics
            start again from it, so that a shift cannot block training for ever. ``None`` never gives in. A loss that is
            not finite is never let through.

    Raises:
        ValueError: for a number that is out of range.

    >>> SpikeRule(num_std=None).factor
    2.0
    """

    ema_decay: ArrayLike = 0.99
    factor: ArrayLike | None = 2.0
    num_std: ArrayLike | None = 6.0
    warmup_steps: ArrayLike = 20
    max_consecutive: ArrayLike | None = 10

    def __post_init__(self) -> None:
        _checks.check_beta("ema_decay", self.ema_decay)
        factor = _checks.concrete(self.factor)
        if factor is not None and not (math.isfinite(factor) and factor > 1):
            raise ValueError(f"factor must be a finite number > 1 or None, got factor={self.factor!r}")
        _checks.check_positive("num_std", self.num_std, " or None")
        for name in ("warmup_steps", "max_consecutive"):
            number = _checks.concrete(getattr(self, name))
            if number is not None and not number >= 1:
                raise ValueError(f"{name} must be at least 1, got {name}={getattr(self, name)!r}")


class SpikeState(NamedTuple):
    """Running statistics of the loss.

    Attributes:
        calm: losses that the statistics hold.
        mean: their exponentially weighted mean, free of start-up bias.
        var: their variance with the same weights.
        consecutive: spikes since the last loss that was none.
        spikes: all spikes so far.
    """

    calm: Int[Array, ""]  # int32
    mean: Float[Array, ""]  # float32
    var: Float[Array, ""]  # float32
    consecutive: Int[Array, ""]  # int32
    spikes: Int[Array, ""]  # int32


def init_spike_state() -> SpikeState:
    """Return the state before the first loss.

    >>> int(init_spike_state().calm)
    0
    """
    return SpikeState(*(jnp.zeros([], d) for d in (jnp.int32, jnp.float32, jnp.float32, jnp.int32, jnp.int32)))


def _stands_out(state: SpikeState, loss: Float[Array, ""], rule: SpikeRule) -> Bool[Array, ""]:
    """Whether a finite loss is too high for the statistics."""
    limit = jnp.asarray(jnp.inf, jnp.float32)
    if rule.factor is not None:
        limit = jnp.minimum(limit, state.mean + (rule.factor - 1) * jnp.abs(state.mean))
    if rule.num_std is not None:
        limit = jnp.minimum(limit, state.mean + rule.num_std * jnp.sqrt(state.var))
    return (state.calm >= rule.warmup_steps) & (loss > limit)


def is_spike(state: SpikeState, loss: ArrayLike, rule: SpikeRule) -> Bool[Array, ""]:
    """Return whether a loss is a spike.

        L > m + (f − 1)·|m|   or   L > m + n·s   or   L not finite

    Source: this library's rule for arXiv 2406.09900, which gives none. Where all losses so far are the same to the last
    bit, s = 0 and anything above counts: leave ``num_std`` out if yours are like that.

    Args:
        state: statistics of earlier losses.
        loss: of this step.
        rule: what counts.

    Returns:
        True for a spike; false for the finite loss that ends ``max_consecutive`` of them.

    >>> state = init_spike_state()
    >>> rule = SpikeRule(warmup_steps=2)
    >>> for loss in (2.0, 1.8):
    ...     state = update_spike_state(state, loss, rule)
    >>> [bool(is_spike(state, loss, rule)) for loss in (1.9, 4.0, float("nan"))]
    [False, True, True]
    """
    loss = jnp.asarray(loss, jnp.float32)
    high = _stands_out(state, loss, rule)
    if rule.max_consecutive is not None:
        high &= state.consecutive < rule.max_consecutive
    return high | ~jnp.isfinite(loss)


def update_spike_state(state: SpikeState, loss: ArrayLike, rule: SpikeRule) -> SpikeState:
    """Return the statistics with a loss in them, or, at a spike, with nothing but its count.

    Source: this library's rule for arXiv 2406.09900. A spike does not enter the mean: a few would else raise it until
    nothing is one any more.

    Args:
        state: statistics of earlier losses.
        loss: of this step.
        rule: what counts.

    Returns:
        The new state.

    >>> rule = SpikeRule(ema_decay=0.5)
    >>> state = update_spike_state(update_spike_state(init_spike_state(), 1.0, rule), 4.0, rule)
    >>> float(state.mean)  # (1·0.5 + 4)/(0.5 + 1)
    3.0
    """
    loss = jnp.asarray(loss, jnp.float32)
    spike = is_spike(state, loss, rule)
    restart = ~spike & _stands_out(state, loss, rule)
    calm = jnp.where(restart, 0, state.calm)
    count = optax.safe_increment(calm)
    decay = jnp.asarray(rule.ema_decay, jnp.float32)
    weight = (1 - decay) / (1 - decay ** count.astype(jnp.float32))
    delta = loss - state.mean
    # The first weight is 1 but for rounding: exactly the loss then, and no variance.
    first = calm == 0
    after = SpikeState(
        calm=count,
        mean=jnp.where(first, loss, state.mean + weight * delta),
        var=jnp.where(first, 0.0, (1 - weight) * (state.var + weight * delta**2)),
        consecutive=jnp.zeros_like(state.consecutive),
        spikes=state.spikes,
    )
    kept = state._replace(
        consecutive=optax.safe_increment(state.consecutive), spikes=optax.safe_increment(state.spikes)
    )
    return jax.tree.map(lambda old, new: jnp.where(spike, old, new), kept, after)


# Skipping ------------------------------------------------------------------------------------------------------------


class SkipOnSpikeState(NamedTuple):
    """State of `skip_on_spike`.

    Attributes:
        spikes: running statistics of the loss; ``spikes.spikes`` is the number of steps skipped.
        inner_state: state of the wrapped transformation.
    """

    spikes: SpikeState
    inner_state: Any


def skip_on_spike(
    inner: optax.GradientTransformation,
    *,
    ema_decay: ArrayLike = 0.99,
    factor: ArrayLike | None = 2.0,
    num_std: ArrayLike | None = 6.0,
    warmup_steps: ArrayLike = 20,
    max_consecutive: ArrayLike | None = 10,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that a step whose loss spikes changes nothing.

        spike:  update = 0, inner state untouched to the bit;   otherwise: the inner update

    Source: GEB-1.3B, arXiv 2406.09900 (skipping of data around spikes; the rule is this library's). ``update`` takes
    the loss as the extra argument ``value``, as ``optax.contrib.reduce_on_plateau`` does, and passes all extra
    arguments on.

    When: single batches are bad. When not: the loss rises because parameters are already spoilt (see the module); or
    gradients overflow under a finite loss, for which there is ``optax.apply_if_finite``. Weight decay inside ``inner``
    is skipped too; schedules inside do not advance.

    Args:
        inner: the optimizer, outermost: clipping and decay belong inside.
        ema_decay: decay of the loss's running mean and variance, in [0, 1).
        factor: a loss above factor times the mean is a spike, > 1; ``None`` leaves it out.
        num_std: a loss above the mean by that many standard deviations is a spike, > 0; ``None`` leaves it out.
        warmup_steps: calm losses before a finite one can be a spike.
        max_consecutive: spikes in a row after which the next finite loss is taken for the new level; see `SpikeRule`.

    Returns:
        A transformation with state `SkipOnSpikeState`.

    Raises:
        ValueError: for a number that is out of range.
        TypeError: in ``update``, if ``value`` is missing.

    >>> import jax.numpy as jnp, optax
    >>> tx = skip_on_spike(optax.sgd(1.0), warmup_steps=1)
    >>> w = jnp.ones(2)
    >>> _, state = tx.update(w, tx.init(w), w, value=2.0)
    >>> updates, state = tx.update(w, state, w, value=9.0)
    >>> updates.tolist(), int(state.spikes.spikes)
    ([0.0, 0.0], 1)
    """
    rule = SpikeRule(ema_decay, factor, num_std, warmup_steps, max_consecutive)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipOnSpikeState:
        return SkipOnSpikeState(init_spike_state(), inner.init(params))

    def update(
        updates: Any, state: SkipOnSpikeState, params: Any = None, *, value: ArrayLike, **extra: Any
    ) -> tuple[Any, SkipOnSpikeState]:
        def step(updates: Any, inner_state: Any) -> tuple[Any, Any]:
            return inner.update(updates, inner_state, params, value=value, **extra)

        shapes, _ = jax.eval_shape(step, updates, state.inner_state)

        def skip(updates: Any, inner_state: Any) -> tuple[Any, Any]:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), inner_state

        spike = is_spike(state.spikes, value, rule)
        # A branch and not a choice between two results: the optimizer's state is then neither read nor copied.
        updates, inner_state = jax.lax.cond(spike, skip, step, updates, state.inner_state)
        return updates, SkipOnSpikeState(update_spike_state(state.spikes, value, rule), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


# Replacing batches ---------------------------------------------------------------------------------------------------


class CalmDraw(NamedTuple):
    """What `draw_until_calm` found.

    Attributes:
        loss: of the last candidate tried.
        out: what was computed along with it.
        candidate: which of the candidates that was.
        spiked: whether even that one was a spike, so that all were.
    """

    loss: Float[Array, ""]
    out: Any
    candidate: Int[Array, ""]  # int32
    spiked: Bool[Array, ""]


def draw_until_calm(
    evaluate: Callable[[Any], tuple[Any, Any]], state: SpikeState, candidates: Any, *, rule: SpikeRule
) -> CalmDraw:
    """Try candidate batches in turn until one has a calm loss.

    Source: the first measure of GEB-1.3B, arXiv 2406.09900: discard a batch whose loss spikes and draw another before
    updating. Usually the first candidate will do: the cost is that of one evaluation, and the memory of all candidates.

    Args:
        evaluate: ``batch -> (loss, out)``, such as ``jax.value_and_grad`` of a loss; compiled once, nothing is computed
            twice.
        state: statistics of earlier losses; only read.
        candidates: a pytree of arrays [R, ...], R >= 1 batches.
        rule: what counts as a spike.

    Returns:
        Loss and ``out`` of the first calm candidate, or of the last one if all spike.

    Raises:
        ValueError: if candidates have no arrays, or different or no rows.

    >>> import jax.numpy as jnp
    >>> state, rule = init_spike_state(), SpikeRule(warmup_steps=1)
    >>> state = update_spike_state(state, 1.0, rule)
    >>> draw = draw_until_calm(lambda x: (x, 2 * x), state, jnp.array([50.0, 1.0, 3.0]), rule=rule)
    >>> int(draw.candidate), float(draw.out), bool(draw.spiked)
    (1, 2.0, False)
    """
    rows = {leaf.shape[0] if leaf.ndim else 0 for leaf in map(jnp.asarray, jax.tree.leaves(candidates))}
    if len(rows) != 1 or min(rows) < 1:
        raise ValueError(
            f"candidates must have one leading axis of at least 1 batch in common, got sizes {sorted(rows)}"
        )
    (count,) = rows

    def batch(i: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(jnp.asarray(leaf), i, keepdims=False), candidates)

    def attempt(draw: CalmDraw) -> CalmDraw:
        loss, out = evaluate(batch(draw.candidate + 1))
        return CalmDraw(loss, out, draw.candidate + 1, is_spike(state, loss, rule))

    loss, out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(evaluate, jax.eval_shape(batch, 0)))
    start = CalmDraw(loss, out, jnp.full([], -1, jnp.int32), jnp.ones([], bool))
    return jax.lax.while_loop(lambda draw: draw.spiked & (draw.candidate < count - 1), attempt, start)


def with_batch_replacement(
    step: Callable[[Any, Any], tuple[Any, Any]], *, rule: SpikeRule | None = None
) -> Callable[[Any, SpikeState, Any], tuple[Any, SpikeState, CalmDraw]]:
    """Wrap a training step so that it discards batches whose loss spikes.

    Source: the first measure of GEB-1.3B, arXiv 2406.09900. The step is tried with each candidate in turn, always from
    the same carry; the first one with a calm loss counts. If all spike, the step changes nothing.

    When: training on data with rare broken batches, with memory for two copies of the carry. When not: for large
    models, where `draw_until_calm` around ``jax.value_and_grad`` needs gradients only.

    Args:
        step: ``(carry, batch) -> (carry, loss)``; pure, its carry of fixed shapes and dtypes.
        rule: what counts as a spike; `SpikeRule` with its defaults by default.

    Returns:
        ``(carry, spike_state, candidates [R, ...]) -> (carry, spike_state, draw)``; ``draw.candidate`` is the candidate
        that was used, ``draw.out`` is the carry after the last attempt.

    >>> import jax.numpy as jnp
    >>> step = with_batch_replacement(lambda total, x: (total + x, x), rule=SpikeRule(warmup_steps=1))
    >>> total, state = jnp.zeros(()), init_spike_state()
    >>> for candidates in ([1.0, 1.0], [99.0, 1.0], [99.0, 98.0]):
    ...     total, state, draw = step(total, state, jnp.array(candidates))
    >>> float(total), int(state.spikes)  # 1 + 1 + nothing
    (2.0, 1)
    """
    rule = SpikeRule() if rule is None else rule

    def wrapped(carry: Any, state: SpikeState, candidates: Any) -> tuple[Any, SpikeState, CalmDraw]:
        def attempt(batch: Any) -> tuple[Any, Any]:
            after, loss = step(carry, batch)
            return loss, after

        draw = draw_until_calm(attempt, state, candidates, rule=rule)
        carry = jax.tree.map(lambda old, new: jnp.where(draw.spiked, old, new), carry, draw.out)
        return carry, update_spike_state(state, draw.loss, rule), draw

    return wrapped
