"""The tree builder against scikit-learn and xgboost: the same rows and settings, one core each, in turn.

xgboost is no dependency: ``JAXACCEL_PEERS_PYTHON`` names an interpreter that has it. It times itself there.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np

from experiments import trees_models as models
from experiments.benchmarks import BenchOptions, Measurement, one_core
from experiments.runner import cost
from experiments.trees_models import OURS, SKLEARN, XGBOOST, Model, Rows, Run, Settings

BOOSTING = Settings(n_trees=100, depth=6, bins=255, min_leaf=1, learning_rate=0.1, reg_lambda=1.0, feature_fraction=1.0)
FOREST = dataclasses.replace(BOOSTING, n_trees=10, depth=10)
CASES: tuple[tuple[Model, int, int, Settings, str], ...] = (
    ("boosting", 20_000, 20, BOOSTING, "<= 1.3"),
    ("boosting", 20_000, 20, dataclasses.replace(BOOSTING, bins=64), "<= 1.3"),
    ("boosting", 100_000, 20, BOOSTING, "<= 1.3"),
    ("random forest", 17_000, 81, FOREST, "<= 0.667"),
    ("random forest", 17_000, 81, dataclasses.replace(FOREST, feature_fraction=1 / 3), "<= 0.667"),
)
TEST_ROWS = 5_000
MOST_REPEATS = 7
"""Fits take seconds."""


def friedman(rows: int, columns: int, seed: int = 0) -> Rows:
    """Friedman's first function of five columns, with noise and columns that say nothing, scaled to unit variance."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(rows + TEST_ROWS, columns, noise=1.0, random_state=seed)
    x, y = x.astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)
    return Rows("regression", 1, x[:rows], y[:rows], x[rows:], y[rows:])


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Every case: ours over the fastest of the others."""
    yield from one_core.on_one_core(__name__, here, options)


def here(options: BenchOptions) -> Iterator[Measurement]:
    """The same in this process."""
    peer = models.xgboost_python(os.environ.get("JAXACCEL_PEERS_PYTHON", ""))
    for case in CASES:
        yield _case(*case, peer and peer[0], options)


def _case(
    model: Model, rows: int, columns: int, settings: Settings, goal: str, xgboost: str | None, options: BenchOptions
) -> Measurement:
    table = friedman(rows, columns)
    mine, spent = models.ours(model, settings, table, ())
    contenders = {OURS: mine, SKLEARN: models.sklearns(model, settings, ())}
    if xgboost and model == "boosting":
        contenders[XGBOOST] = models.xgboosts(xgboost, settings, ())
    calls: dict[str, Callable[[], Run]] = {
        name: functools.partial(contender, table, 0) for name, contender in contenders.items()
    }
    with models.one_core():
        runs, _ = cost.results_in_turn(calls, min(options.repeats, MOST_REPEATS))
    timed = {name: cost.Timing(tuple(run.fit_s for run in found)) for name, found in runs.items()}
    fastest = min((name for name in timed if name != OURS), key=lambda name: timed[name].median)
    value, interval = cost.ratio(timed, OURS, fastest)
    scores = {name: models.scores("regression", found[0].prediction, table.test_y) for name, found in runs.items()}
    parts = [f"{name} {timing.median:.3f} s, R² {scores[name]['R²']:.3f}" for name, timing in timed.items()]
    what = f"{settings.n_trees} trees of depth {settings.depth}"
    if model == "boosting":
        what += f", {settings.bins} bins"
    elif settings.feature_fraction < 1:
        what += f", {settings.feature_fraction:.0%} of columns a node"
    missing = "" if model != "boosting" or xgboost else "; xgboost is not installed"
    return Measurement(
        f"{model}, {rows} x {columns}, {what}: ours / {fastest}", value, interval, goal,
        f"{', '.join(parts)}; compiled in {spent.compile_s:.1f} s{missing}",
    )  # fmt: skip


if __name__ == "__main__":
    one_core.main(here, sys.argv[1])
