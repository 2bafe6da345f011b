"""From pass rates and costs to decisions: coverage of repeated trials, cost frontiers, allocation of a budget.

A *configuration* is one way to answer (a model, a number of trials, a length, an attention); it has a cost and a
score on every question. The frontier is the best score that a budget buys. It comes in two kinds, and they answer
different questions:

- **oracle** (``per_question=True``), the paper's: every question gets the configuration that scores best *on it* among
  those that cost at most the budget on it. Nobody knows that before answering: it is a bound, not a plan.
- **honest** (``per_question=False``): one configuration for all questions, whose mean cost is within the budget.

The oracle's budget is a limit for each question, the honest one's is a mean. Where questions cost alike the oracle is
never worse; where they do not, it can be, since it may not spend on a long question what a short one saved.

Both choose on the scores that they report. With few questions that flatters; choose on one set and report on another.

Source: Sadhukhan et al., Kinetics, arXiv 2506.05333; pass@k: Chen et al., arXiv 2107.03374.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxaccel.forecasting.kinetics import as_float, check_number


def pass_at_k(num_correct: ArrayLike, num_trials: ArrayLike, k: int) -> Float[Array, "..."]:
    """Probability that at least one of ``k`` trials is right, without bias, from ``num_trials`` recorded ones.

    pass@k = 1 − C(n−c, k)/C(n, k) = 1 − Πᵢ₌₀..ₖ₋₁ (1 − c/(n−i)); 1 where n − c < k.

    Args:
        num_correct: right answers among the recorded ones, per question; any shape.
        num_trials: recorded answers per question; broadcasts.
        k: trials that are bought; at most ``num_trials``.

    Returns:
        Probabilities, of the broadcast shape. Average over questions for the coverage of a data set.

    Raises:
        TypeError: if ``k`` is not an integer.
        ValueError: if ``k`` is below 1 or above ``num_trials``, or ``num_correct`` is not within 0 to ``num_trials``.

    >>> print([round(float(pass_at_k(4, 32, k)), 4) for k in (1, 2, 32)])
    [0.125, 0.2379, 1.0]
    """
    k = operator.index(k)  # a fraction of a trial would be rounded up in silence
    check_number("k", k, low=1)
    check_number("num_trials", num_trials, low=1)
    check_number("num_correct", num_correct, low=0)
    if not any(isinstance(value, jax.core.Tracer) for value in (num_trials, num_correct)):
        if np.min(num_trials) < k:
            raise ValueError(f"k must be at most num_trials, got k = {k} of {np.min(num_trials)} recorded trials")
        if np.any(np.asarray(num_correct) > np.asarray(num_trials)):
            raise ValueError(
                f"num_correct must be at most num_trials, got {np.max(num_correct)} of {np.min(num_trials)}"
            )
    correct, trials = as_float(num_correct)[..., None], as_float(num_trials)[..., None]
    share = correct / (trials - jnp.arange(k, dtype=trials.dtype))
    hit = share >= 1  # fewer wrong answers than trials: one must be right
    # Logarithms keep small probabilities exact, where 1 − Π(1 − ε) would round them away.
    logs = jnp.log1p(-jnp.where(hit, 0.0, share)).sum(-1)
    return jnp.where(hit.any(-1), 1.0, -jnp.expm1(logs))


def beta_coverage(pass_rate: ArrayLike, num_trials: ArrayLike, concentration: ArrayLike = 1.0) -> Float[Array, "..."]:
    """Expected pass@N over questions whose difficulty follows Beta(s·p, s·(1−p)), with mean p and concentration s.

    1 − E[(1−q)ᴺ] = 1 − B(s(1−p) + N, s·p) / B(s(1−p), s·p). With s = 1 most questions are nearly always or nearly
    never solved, as in reasoning benchmarks; s → ∞ makes all questions equally hard: 1 − (1−p)ᴺ.

    Args:
        pass_rate: mean pass@1, strictly between 0 and 1.
        num_trials: trials N, at least 0; need not be whole.
        concentration: s, positive. In float32 the result is good to 10⁻⁶ up to s of about 100, to 10⁻² at 10⁵.

    >>> print(f"{beta_coverage(0.75, 1):.3f} {beta_coverage(0.75, 2):.3f}")
    0.750 0.844
    """
    tiny = float(np.finfo(np.float32).tiny)
    check_number("pass_rate", pass_rate, low=tiny, high=1 - 1e-7)
    check_number("num_trials", num_trials, low=0)
    check_number("concentration", concentration, low=tiny)
    p, n, s = as_float(pass_rate), as_float(num_trials), as_float(concentration)
    right, wrong = s * p, s * (1 - p)
    # By Beta functions: logarithms of four Gamma functions are in the millions for a million trials, and their
    # difference has no digit left in float32.
    return -jnp.expm1(betaln(wrong + n, right) - betaln(wrong, right))


class Frontier(NamedTuple):
    """The best score for each budget.

    ``choice`` is the configuration's index, −1 where the budget buys none; with ``per_question`` it has a column per
    question.
    """

    best_score: Float[Array, "K"]  # mean over questions
    choice: Int[Array, "K *Q"]


def cost_frontier(
    cost: ArrayLike, score: ArrayLike, budgets: ArrayLike, *, per_question: bool = True, smooth: int = 1
) -> Frontier:
    """The best score that each budget buys, among C configurations of one model on Q questions.

    A configuration that is too dear scores 0. Of equally good ones the cheapest is chosen.

    Args:
        cost: ``[Q, C]``, or ``[C]`` where it is the same for all questions; any unit.
        score: ``[Q, C]``.
        budgets: ``[K]``, in the unit of ``cost``.
        per_question: the oracle that chooses for every question (the paper's), or one configuration for all.
        smooth: width of a moving average over budgets, odd; the paper draws its curves with 3.

    Raises:
        ValueError: if shapes do not fit, costs or scores are not finite, or ``smooth`` is not odd and positive.

    >>> import jax.numpy as jnp
    >>> cost, score = jnp.array([1.0, 4.0]), jnp.array([[1.0, 0.9], [0.0, 0.6]])
    >>> print(cost_frontier(cost, score, jnp.array([0.5, 1.0, 4.0])).best_score)
    [0.   0.5  0.8]
    >>> print(cost_frontier(cost, score, jnp.array([0.5, 1.0, 4.0]), per_question=False).best_score)
    [0.   0.5  0.75]
    """
    if smooth < 1 or smooth % 2 == 0:
        raise ValueError(f"smooth must be odd and positive, got {smooth}")
    check_number("cost", cost, low=0)
    check_number("score", score, low=-np.inf)
    if np.ndim(score) != 2 or np.shape(cost) not in (np.shape(score), np.shape(score)[1:]):
        raise ValueError(f"cost must be [Q, C] or [C] for a score [Q, C], got {np.shape(cost)} and {np.shape(score)}")
    if np.ndim(budgets) != 1:
        raise ValueError(f"budgets must be [K], got shape {np.shape(budgets)}")
    check_number("budgets", budgets, low=0)
    return _cost_frontier(as_float(cost), as_float(score), as_float(budgets), per_question, smooth)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _cost_frontier(costs: Array, scores: Array, limits: Array, per_question: bool, smooth: int) -> Frontier:
    costs = jnp.broadcast_to(costs, scores.shape)
    if not per_question:
        costs, scores = costs.mean(0, keepdims=True), scores.mean(0, keepdims=True)
    order = jnp.argsort(costs, axis=-1, stable=True)  # cheapest first, so that argmax settles ties by cost
    costs, scores = jnp.take_along_axis(costs, order, -1), jnp.take_along_axis(scores, order, -1)

    def best(limit: Array) -> tuple[Array, Array]:
        affordable = costs <= limit
        masked = jnp.where(affordable, scores, -jnp.inf)
        pick = jnp.argmax(masked, -1)
        any_left = affordable.any(-1)
        value = jnp.where(any_left, jnp.max(masked, -1), 0.0)
        chosen = jnp.take_along_axis(order, pick[:, None], -1)[:, 0]
        return value.mean(), jnp.where(any_left, chosen, -1)

    value, choice = jax.lax.map(best, limits)
    if smooth > 1:
        half = smooth // 2
        value = jnp.convolve(jnp.pad(value, half, mode="symmetric"), jnp.full(smooth, 1 / smooth), mode="valid")
    return Frontier(value, choice if per_question else choice[:, 0])


class ConfigTable(NamedTuple):
    """What one model can do: C configurations on Q questions."""

    cost: ArrayLike  # f[Q, C] or f[C]
    score: ArrayLike  # f[Q, C]
    settings: tuple[Any, ...]  # C entries: what a configuration is, for people


class Allocation(NamedTuple):
    """How a budget is best spent."""

    model: str | None  # None where the budget buys nothing at all
    setting: Any  # the configuration's entry in ``settings``; with ``per_question`` one entry (or None) per question
    score: float  # mean over questions
    cost: float  # mean over questions


def allocate(tables: Mapping[str, ConfigTable], budget: float | int, *, per_question: bool = False) -> Allocation:
    """Choose a model and its configuration for a budget per question, by trying all of them: costs are cheap.

    Args:
        tables: for each model its configurations.
        budget: in the unit of the tables' costs.
        per_question: let an oracle choose the configuration question by question (the model is one for all).

    Returns:
        The best allocation; of equally good ones the cheapest.

    Raises:
        ValueError: if there is no table, or a table's settings do not fit its scores.

    >>> import numpy as np
    >>> small = ConfigTable(np.array([1.0, 2.0]), np.array([[0.1, 0.2]]), ("1 trial", "2 trials"))
    >>> large = ConfigTable(np.array([4.0]), np.array([[0.7]]), ("1 trial",))
    >>> allocate({"small": small, "large": large}, 3.0)
    Allocation(model='small', setting='2 trials', score=0.2..., cost=2.0)
    """
    if not tables:
        raise ValueError("tables is empty: there is no model to choose")
    check_number("budget", budget, low=0)
    found = [_allocation(name, table, budget, per_question) for name, table in tables.items()]
    return max(found, key=lambda a: (a.model is not None, a.score, -a.cost))


def _allocation(name: str, table: ConfigTable, budget: float | int, per_question: bool) -> Allocation:
    score = np.asarray(table.score)
    if score.ndim != 2 or score.shape[1] != len(table.settings):
        raise ValueError(f"{name}: {len(table.settings)} settings do not fit a score of shape {score.shape}")
    front = cost_frontier(table.cost, table.score, np.array([budget]), per_question=per_question)
    choice = np.atleast_1d(np.asarray(front.choice[0]))
    cost = np.broadcast_to(np.asarray(table.cost), score.shape)
    if not per_question:
        cost = cost.mean(0, keepdims=True)
    bought = choice >= 0
    spent = float(np.where(bought, np.take_along_axis(cost, np.maximum(choice, 0)[:, None], 1)[:, 0], 0.0).mean())
    settings = [table.settings[i] if i >= 0 else None for i in choice.tolist()]
    return Allocation(
        name if bought.any() else None, settings if per_question else settings[0], float(front.best_score[0]), spent
    )
