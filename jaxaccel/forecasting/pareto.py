"""Search for student shapes: which small models are worth training, by quality and latency together.

It makes choosing a small model cheaper: instead of one architecture made by hand and trained to the end, many shapes
are scored by a short run (a few steps of layer-wise distillation, `jaxaccel.compression.distillation`) and a measured
latency, and only those on the front are kept. A point is on the Pareto front if no other one is at least as good in
both and better in one:

    front = {i : there is no j with q_j ≥ q_i, t_j ≤ t_i and (q_j > q_i or t_j < t_i)}

The search draws shapes at random, then changes one choice of a member of the front found so far, as in

    shape ← random,                          for the first part of the evaluations
    shape ← mutate(random member of front),  for the rest; a shape is never evaluated twice

`cost_frontier` of this folder answers another question: the best score for each *budget*, over tables of questions.

When to use it: a few choices each for depth, width, heads and so on, and an evaluation of seconds to minutes. When not:
for a single objective; with evaluations so dear that a model of the objective pays: AutoDistill uses Bayesian
optimisation there, this is its loop with a simpler proposal.

Source: Zhang et al., AutoDistill, arXiv 2201.08539, surveyed in Huang et al., arXiv 2406.10903.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool

MAX_DRAWS = 10_000
"""Draws in a row that may be refused or known before the search stops, or says that nothing is allowed."""


class Student(NamedTuple):
    """A shape that was evaluated."""

    shape: dict[str, Any]  # one of the choices for each name
    quality: float  # higher is better
    latency: float  # lower is better


class StudentSearch(NamedTuple):
    """What a search found."""

    points: list[Student]  # all that were evaluated, in that order
    front: list[Student]  # those on the Pareto front, fastest first


def pareto_front(
    values: ArrayLike | Sequence[Sequence[float | int]], maximise: Sequence[bool]
) -> Bool[np.ndarray, "N"]:
    """Which points no other one dominates.

    Args:
        values: objectives of N points, float [N, M].
        maximise: for each objective whether larger is better.

    Returns:
        True on the front. Equal points are on it together.

    Raises:
        ValueError: if shapes do not fit or a value is NaN (infinity is allowed: a model that does not run at all).

    >>> pareto_front([[0.9, 2.0], [0.8, 1.0], [0.8, 1.5]], (True, False)).tolist()
    [True, True, False]
    """
    points = np.asarray(values, np.float64)
    if points.ndim != 2 or points.shape[1] != len(maximise) or points.shape[1] < 1:
        raise ValueError(f"values has shape {points.shape}, expected [N, {len(maximise)}] with at least one objective")
    if np.isnan(points).any():
        raise ValueError(f"values has NaN in row {int(np.isnan(points).any(1).argmax())}, expected numbers")
    gains = np.where(np.asarray(maximise, bool), points, -points)
    front = np.ones(len(gains), bool)
    for i, own in enumerate(gains):  # a row at a time: N² numbers at once would not fit for a long search
        front[i] = not ((gains >= own).all(1) & (gains > own).any(1)).any()
    return front


def seconds_in_turn(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int = 9, min_seconds: float | int = 0.01
) -> dict[str, tuple[float, ...]]:
    """Seconds a call of some functions, timed in turn: A B A B ..., so that noise falls on all of them alike.

    Each is called twice before (that compiles it, and says how often it must run to be long enough for the clock).

    Args:
        contenders: functions without arguments, such as ``lambda: jitted(x)``; results are waited for.
        repeats: measurements of each.
        min_seconds: how long one measurement should last.

    Returns:
        All measurements, in order.

    Raises:
        ValueError: if ``repeats`` is below 1 or ``min_seconds`` negative.

    >>> times = seconds_in_turn({"square": lambda: jax.numpy.ones(8) ** 2}, repeats=2, min_seconds=0.0)
    >>> len(times["square"])
    2
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    if not min_seconds >= 0:
        raise ValueError(f"min_seconds is {min_seconds}, expected at least 0")

    def measure(call: Callable[[], Any], times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / times

    counts = {}
    for name, call in contenders.items():
        measure(call, 1)
        counts[name] = max(1, math.ceil(min_seconds / max(measure(call, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            seconds[name].append(measure(call, counts[name]))
    return {name: tuple(values) for name, values in seconds.items()}


def median_seconds(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int = 9, min_seconds: float | int = 0.01
) -> dict[str, float]:
    """Median seconds a call of some functions: see `seconds_in_turn`.

    >>> times = median_seconds({"square": lambda: jax.numpy.ones(8) ** 2}, repeats=1, min_seconds=0.0)
    >>> times["square"] > 0
    True
    """
    measured = seconds_in_turn(contenders, repeats=repeats, min_seconds=min_seconds)
    return {name: statistics.median(values) for name, values in measured.items()}


def search_student_shapes(
    space: Mapping[str, Sequence[Any]],
    evaluate: Callable[[dict[str, Any]], tuple[float, float]],
    *,
    num_evaluations: int | None = None,
    random_fraction: float | int = 0.5,
    is_allowed: Callable[[dict[str, Any]], bool] | None = None,
    seed: int | np.random.Generator = 0,
) -> StudentSearch:
    """Evaluate shapes of a space, all of them or some, and return them with their Pareto front.

    Args:
        space: the choices for each name, such as ``{"layers": (4, 6, 12), "width": (128, 256)}``.
        evaluate: ``shape -> (quality, latency)``; quality is to be high and latency low.
        num_evaluations: shapes to evaluate at most; all of the space if ``None`` or if it has no more.
        random_fraction: share of the evaluations that are drawn at random before mutations start, in (0, 1].
        is_allowed: a shape for which it is false is never evaluated, such as one whose heads do not divide its width.
        seed: of the draws, or a generator. The same seed and the same evaluations give the same search.

    Returns:
        All points and the front.

    Raises:
        ValueError: if the space or a choice is empty, a number is out of range, no shape is allowed, or an evaluation
            returns NaN; the shape is named.

    >>> def evaluate(shape):
    ...     return -1.0 / (shape["layers"] * shape["width"]), shape["layers"] * 1.0
    >>> found = search_student_shapes({"layers": (2, 4), "width": (8, 16)}, evaluate)
    >>> len(found.points), [point.shape for point in found.front]
    (4, [{'layers': 2, 'width': 16}, {'layers': 4, 'width': 16}])
    """
    names = list(space)
    counts = [len(space[name]) for name in names]
    if not names or 0 in counts:
        empty = names[counts.index(0)] if 0 in counts else None
        raise ValueError("space is empty" if empty is None else f"space has no choices for {empty!r}")
    if num_evaluations is not None and num_evaluations < 1:
        raise ValueError(f"num_evaluations is {num_evaluations}, expected at least 1")
    if not 0 < random_fraction <= 1:
        raise ValueError(f"random_fraction is {random_fraction}, expected a fraction in (0, 1]")
    generator = np.random.default_rng(seed)
    tried: dict[tuple[int, ...], Student] = {}

    def shape_of(picks: tuple[int, ...]) -> dict[str, Any]:
        return {name: space[name][pick] for name, pick in zip(names, picks, strict=True)}

    def is_new(picks: tuple[int, ...]) -> bool:
        return picks not in tried and (is_allowed is None or bool(is_allowed(shape_of(picks))))

    def run(picks: tuple[int, ...]) -> None:
        shape = shape_of(picks)
        quality, latency = (float(value) for value in evaluate(dict(shape)))
        if math.isnan(quality) or math.isnan(latency):
            raise ValueError(f"evaluate returned quality {quality} and latency {latency} for {shape}, expected numbers")
        tried[picks] = Student(shape, quality, latency)

    def random_picks() -> tuple[int, ...]:
        return tuple(int(generator.integers(count)) for count in counts)

    def mutation() -> tuple[int, ...]:
        keys = list(tried)
        best = np.flatnonzero(_front(list(tried.values())))
        picks = list(keys[int(generator.choice(best))])
        place = int(generator.choice([i for i, count in enumerate(counts) if count > 1]))
        picks[place] = (picks[place] + 1 + int(generator.integers(counts[place] - 1))) % counts[place]
        return tuple(picks)

    if num_evaluations is None or num_evaluations >= math.prod(counts):
        for index in np.ndindex(*counts):
            if is_new(index):
                run(index)
    else:
        num_random = math.ceil(random_fraction * num_evaluations)
        while len(tried) < num_evaluations:
            # Around a front that is exhausted every mutation is known; then a random shape goes on.
            proposals = [random_picks] if len(tried) < num_random else [mutation, random_picks]
            limits = [MAX_DRAWS] if len(proposals) == 1 else [4 * sum(counts), MAX_DRAWS]
            fresh = _first(proposals, limits, is_new)
            if fresh is None:
                break
            run(fresh)
    if not tried:
        raise ValueError("is_allowed is false for every shape that was drawn: there is nothing to evaluate")
    points = list(tried.values())
    front = [point for point, is_best in zip(points, _front(points), strict=True) if is_best]
    return StudentSearch(points, sorted(front, key=lambda point: point.latency))


def _front(points: Sequence[Student]) -> Bool[np.ndarray, "N"]:
    return pareto_front([(point.quality, point.latency) for point in points], (True, False))


def _first(
    proposals: Sequence[Callable[[], tuple[int, ...]]],
    limits: Sequence[int],
    is_new: Callable[[tuple[int, ...]], bool],
) -> tuple[int, ...] | None:
    """The first proposal that is new, of so many draws of each."""
    for propose, limit in zip(proposals, limits, strict=True):
        for _ in range(limit):
            picks = propose()
            if is_new(picks):
                return picks
    return None
