"""The contenders of the experiment `trees`: the same rows and settings, three libraries, one core each.

Settings that have one name in two libraries need not mean the same. What is equal here are the equations: xgboost's
softmax counts each second derivative twice, and our logistic loss is one of half the log-odds, whose second derivatives
are four times those of log-odds. Rates and penalties are translated, so that all take the same step.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from experiments.data.tables import Tabular, TaskKind
from experiments.runner import cost
from jaxaccel.boosting.trees import boosted_fit, boosted_predict, fit_bins, forest_fit, forest_predict

Model = Literal["boosting", "random forest", "extra-trees"]
MODELS: tuple[Model, ...] = ("boosting", "random forest", "extra-trees")
OURS, SKLEARN, XGBOOST = "jaxaccel", "scikit-learn", "xgboost"
LOSSES = {"regression": "squared", "binary": "logistic", "classes": "softmax"}
MAIN_SCORE = {"regression": "R²", "binary": "accuracy", "classes": "accuracy"}
SCRIPT = pathlib.Path(__file__).with_name("trees_xgboost.py")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all libraries are given."""

    n_trees: int
    depth: int
    bins: int
    """Of each column; exact splits of scikit-learn's forests have none."""
    min_leaf: int
    learning_rate: float
    """Of boosting."""
    reg_lambda: float
    """Of boosting: leaves are −Σg/(Σh + λ), with g and h of log-odds."""
    feature_fraction: float
    """Of forests: share of columns that a node sees."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Training and test rows of one split; every contender gets these arrays."""

    kind: TaskKind
    classes: int
    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """One fit. Predictions are targets ``[n]``, or probabilities ``[n, classes]``."""

    fit_s: float
    predict_s: float
    prediction: np.ndarray
    staged: tuple[np.ndarray, ...] = ()
    """Predictions with the first trees alone, of boosting."""
    out_of_bag: np.ndarray | None = None
    """Predictions of training rows by trees that have not drawn them; NaN where there is none."""


Contender = Callable[[Rows, int], Run]
"""Fits the rows with a seed."""


def rows_of(split: Tabular) -> Rows:
    """Nothing is tuned, so that validation rows are trained on as well."""
    x, y = (np.concatenate([getattr(p, name) for p in (split.train, split.validation)]) for name in ("x", "y"))
    return Rows(split.kind, split.classes, x, y, split.test.x, split.test.y)


def scores(kind: TaskKind, prediction: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """R² and root of the mean squared error, or accuracy and log-loss (natural logarithms)."""
    if kind == "regression":
        error = float(np.mean((prediction - y) ** 2))
        return {"R²": 1 - error / float(np.var(y)), "RMSE": error**0.5}
    p = np.clip(prediction, 1e-7, None)
    p = p / p.sum(1, keepdims=True)
    return {
        "accuracy": float(np.mean(p.argmax(1) == y)),
        "log-loss": float(-np.log(p[np.arange(len(y)), y]).mean()),
    }


TASKS = pathlib.Path("/proc/self/task")


def can_pin() -> bool:
    """Whether `one_core` has an effect on this system."""
    return hasattr(os, "sched_setaffinity") and TASKS.exists()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """All threads of this process, and processes that it starts, on one core, where the system can do that."""
    if not can_pin():
        yield
        return
    before = os.sched_getaffinity(0)

    def place(cores: Any) -> None:
        for task in TASKS.iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setaffinity(int(task.name), cores)

    place({max(before)})
    try:
        yield
    finally:
        place(before)


def _timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The result, and the median of the seconds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return result, float(np.median(seconds))


PREDICTIONS = 5
"""Times that test rows are predicted."""


# jaxaccel ------------------------------------------------------------------------------------------------------------


def ours(model: Model, settings: Settings, rows: Rows, stops: Sequence[int]) -> tuple[Contender, cost.ProgramCost]:
    """Ours, compiled for rows of this shape; bins are found within the fit."""
    kind = rows.kind
    bins = settings.bins - 1  # so many thresholds
    shared: dict[str, Any] = {
        "n_trees": settings.n_trees, "max_depth": settings.depth, "min_data_in_leaf": settings.min_leaf,
        "categorical": False,
    }  # fmt: skip
    if model == "boosting":
        penalty = settings.reg_lambda * (4 if kind == "binary" else 1)

        def fit(x: Any, y: Any, key: Any) -> Any:
            return boosted_fit(
                fit_bins(x, n_bins=bins, method="midpoint"), x, y, loss=LOSSES[kind], num_classes=rows.classes,
                learning_rate=settings.learning_rate, reg_lambda=penalty, key=key, **shared,
            )  # fmt: skip

        def predict(fitted: Any, x: Any, stop: Any) -> Any:
            f = boosted_predict(fitted, x, stop=stop)
            if kind == "regression":
                return f[:, 0]
            # Half the log-odds of two classes, F, is a softmax of −F and F.
            return jax.nn.softmax(jax.numpy.concatenate([-f, f], 1) if kind == "binary" else f)
    else:

        def fit(x: Any, y: Any, key: Any) -> Any:
            targets = y[:, None] if kind == "regression" else jax.nn.one_hot(y, rows.classes)
            return forest_fit(
                fit_bins(x, n_bins=bins, method="midpoint"), x, targets, key, bootstrap=model == "random forest",
                random_thresholds=model == "extra-trees", feature_fraction=settings.feature_fraction, **shared,
            )  # fmt: skip

        def predict(fitted: Any, x: Any, stop: Any) -> Any:
            del stop
            values = forest_predict(fitted, x)
            return values[:, 0] if kind == "regression" else values

    train, spent = cost.compile_with_cost(jax.jit(fit), rows.x, rows.y, jax.random.key(0))
    apply = jax.jit(predict)

    def contender(rows: Rows, seed: int) -> Run:
        key = jax.random.key(seed)
        fitted, fit_s = _timed(lambda: train(rows.x, rows.y, key))
        whole = np.int32(settings.n_trees)
        jax.block_until_ready(apply(fitted, rows.test_x, whole))  # compiles once
        prediction, predict_s = _timed(lambda: apply(fitted, rows.test_x, whole), PREDICTIONS)
        staged: tuple[np.ndarray, ...] = ()
        outside = None
        if model == "boosting":
            staged = tuple(np.asarray(apply(fitted, rows.test_x, np.int32(stop))) for stop in stops)
        elif model == "random forest":
            outside = np.asarray(fitted.out_of_bag)
            outside = outside[:, 0] if kind == "regression" else outside
        return Run(fit_s, predict_s, np.asarray(prediction), staged, outside)

    return contender, spent


# scikit-learn --------------------------------------------------------------------------------------------------------


def sklearn_estimator(model: Model, settings: Settings, kind: TaskKind, seed: int) -> Any:
    """scikit-learn's estimator with these settings."""
    from sklearn import ensemble

    regression = kind == "regression"
    if model == "boosting":
        make = ensemble.HistGradientBoostingRegressor if regression else ensemble.HistGradientBoostingClassifier
        return make(
            max_iter=settings.n_trees, max_depth=settings.depth, max_leaf_nodes=None, max_bins=settings.bins,
            min_samples_leaf=settings.min_leaf, learning_rate=settings.learning_rate,
            l2_regularization=settings.reg_lambda, early_stopping=False, random_state=seed,
        )  # fmt: skip
    name = {"random forest": "RandomForest", "extra-trees": "ExtraTrees"}[model]
    bagged = model == "random forest"
    return getattr(ensemble, name + ("Regressor" if regression else "Classifier"))(
        settings.n_trees, max_depth=settings.depth, min_samples_leaf=settings.min_leaf,
        max_features=settings.feature_fraction, bootstrap=bagged, oob_score=bagged, random_state=seed,
    )  # fmt: skip


def sklearns(model: Model, settings: Settings, stops: Sequence[int]) -> Contender:
    """scikit-learn's, with one thread."""
    from threadpoolctl import threadpool_limits

    def contender(rows: Rows, seed: int) -> Run:
        estimator = sklearn_estimator(model, settings, rows.kind, seed)
        regression = rows.kind == "regression"
        with threadpool_limits(1), _few_trees_warn():
            _, fit_s = _timed(lambda: estimator.fit(rows.x, rows.y))
            predict = estimator.predict if regression else estimator.predict_proba
            prediction, predict_s = _timed(lambda: predict(rows.test_x), PREDICTIONS)
            staged: tuple[np.ndarray, ...] = ()
            outside = None
            if model == "boosting":
                stages = (estimator.staged_predict if regression else estimator.staged_predict_proba)(rows.test_x)
                staged = tuple(p for number, p in enumerate(stages, 1) if number in stops)
            elif model == "random forest":
                outside = estimator.oob_prediction_ if regression else estimator.oob_decision_function_
        return Run(fit_s, predict_s, prediction, staged, outside)

    return contender


@contextlib.contextmanager
def _few_trees_warn() -> Iterator[None]:
    """With few trees some rows are in all bags, which scikit-learn warns of; their estimates are left out here."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some inputs do not have OOB scores")
        warnings.filterwarnings("ignore", message="invalid value encountered in divide")
        yield


# xgboost -------------------------------------------------------------------------------------------------------------


def xgboost_parameters(settings: Settings, kind: TaskKind, seed: int) -> dict[str, Any]:
    """The parameters with which xgboost takes the same steps.

    Where there are classes it has no least number of rows of a leaf, only a least sum of second derivatives, which is
    left at 0.
    """
    twice = 2 if kind == "classes" else 1
    objective = {"regression": "reg:squarederror", "binary": "binary:logistic", "classes": "multi:softprob"}[kind]
    return {
        "objective": objective, "tree_method": "hist", "grow_policy": "depthwise", "n_estimators": settings.n_trees,
        "max_depth": settings.depth, "max_bin": settings.bins, "learning_rate": twice * settings.learning_rate,
        "reg_lambda": twice * settings.reg_lambda, "n_jobs": 1, "random_state": seed,
        "min_child_weight": settings.min_leaf if kind == "regression" else 0,
    }  # fmt: skip


def xgboost_python(python: str) -> tuple[str, str] | None:
    """The interpreter that has xgboost, and its version; ``None`` if none has it.

    Args:
        python: an interpreter, or an empty string for this one.

    Raises:
        ValueError: if the interpreter that is named cannot import xgboost.
    """
    if not python and importlib.util.find_spec("xgboost") is None:
        return None
    command = [python or sys.executable, "-c", "import xgboost; print(xgboost.__version__)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"xgboost_python is {python!r}, expected an interpreter that can import xgboost") from error
    return command[0], found.stdout.strip()


def xgboosts(python: str, settings: Settings, stops: Sequence[int]) -> Contender:
    """xgboost's, in a process of its own, which times itself."""

    def contender(rows: Rows, seed: int) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            source, target = pathlib.Path(folder, "rows.npz"), pathlib.Path(folder, "found.npz")
            np.savez(source, x=rows.x, y=rows.y, test_x=rows.test_x, stops=np.array(stops),
                     repeats=np.array(PREDICTIONS))  # fmt: skip
            parameters = json.dumps(xgboost_parameters(settings, rows.kind, seed))
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [python, str(SCRIPT), str(source), str(target), parameters], capture_output=True, text=True,
                env=environment, timeout=3600, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"xgboost failed: {done.stderr.strip()[-1000:]}")
            with np.load(target) as found:
                return Run(float(found["fit_s"]), float(found["predict_s"]), found["prediction"],
                           tuple(found["staged"]))  # fmt: skip

    return contender
