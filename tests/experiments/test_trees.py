"""The experiment on trees: what is equal between libraries, what is measured, and what is shown."""

import json
import os
import sys

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from experiments import trees, trees_models
from experiments.data import tables
from experiments.trees_models import OURS, SKLEARN, Rows, Run, Settings

SETTINGS = Settings(n_trees=4, depth=3, bins=16, min_leaf=2, learning_rate=0.3, reg_lambda=3.0, feature_fraction=1.0)


def few_values(kind):
    """Rows with few values in each column, so that all libraries have the same borders of bins."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 12, (240, 3)).astype(np.float32)
    noisy = x @ np.array([1.0, -0.7, 0.3]) + rng.normal(size=240)
    if kind == "regression":
        y = noisy.astype(np.float32)
    else:
        classes = {"binary": 2, "classes": 3}[kind]
        order = noisy.argsort().argsort()  # balanced: softmax may start from zeros or from shares of classes
        y = (order * classes // 240).astype(np.int32)
    return Rows(kind, 1 if kind == "regression" else int(y.max()) + 1, x, y, x[:60], y[:60])


@pytest.mark.parametrize("kind", ["regression", "binary", "classes"])
def test_boosting_takes_the_same_steps_as_scikit_learns(kind):
    rows = few_values(kind)
    mine, _ = trees_models.ours("boosting", SETTINGS, rows, (1, 4))
    theirs = trees_models.sklearns("boosting", SETTINGS, (1, 4))
    a, b = mine(rows, 0), theirs(rows, 0)
    np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-4, atol=1e-5)  # sums of float32
    assert len(a.staged) == len(b.staged) == 2
    np.testing.assert_allclose(a.staged[0], b.staged[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(a.staged[1], a.prediction)


@pytest.mark.skipif(trees_models.xgboost_python("") is None, reason="xgboost is not installed")
@pytest.mark.parametrize("kind", ["regression", "binary", "classes"])
def test_boosting_takes_the_same_steps_as_xgboosts(kind):
    rows, settings = few_values(kind), Settings(**vars(SETTINGS) | {"min_leaf": 1})
    mine, _ = trees_models.ours("boosting", settings, rows, (1, 4))
    a, b = mine(rows, 0), trees_models.xgboosts(sys.executable, settings, (1, 4))(rows, 0)
    np.testing.assert_allclose(a.staged, b.staged, rtol=1e-4, atol=1e-5)


def test_forests_are_given_the_same_settings():
    rows = few_values("regression")
    mine, spent = trees_models.ours("extra-trees", SETTINGS, rows, (4,))
    run = mine(rows, 0)
    assert trees_models.scores("regression", run.prediction, rows.test_y)["R²"] > 0.5
    assert run.out_of_bag is None
    assert run.staged == ()
    assert spent.peak_bytes > rows.x.nbytes
    for model, bootstrap in (("random forest", True), ("extra-trees", False)):
        found = trees_models.sklearn_estimator(model, SETTINGS, "regression", 0).get_params()
        assert (found["n_estimators"], found["max_depth"], found["min_samples_leaf"]) == (4, 3, 2)
        assert (found["max_features"], found["bootstrap"], found["oob_score"]) == (1.0, bootstrap, bootstrap)


def test_xgboost_is_given_the_same_equations():
    for kind, rate, penalty, least in (("regression", 0.3, 3, 2), ("binary", 0.3, 3, 0), ("classes", 0.6, 6, 0)):
        found = trees_models.xgboost_parameters(SETTINGS, kind, 5)
        assert (found["learning_rate"], found["reg_lambda"], found["min_child_weight"]) == (rate, penalty, least)
        assert (found["max_depth"], found["n_estimators"], found["max_bin"], found["n_jobs"]) == (3, 4, 16, 1)


def test_an_interpreter_without_xgboost_is_refused():
    with pytest.raises(ValueError, match="expected an interpreter that can import xgboost"):
        trees_models.xgboost_python("no-such-python")
    if trees_models.importlib.util.find_spec("xgboost") is None:
        assert trees_models.xgboost_python("") is None
        with pytest.raises(ValueError, match="xgboost_python is"):
            trees_models.xgboost_python(sys.executable)


def test_scores_by_hand():
    found = trees_models.scores("regression", np.array([1.0, 2, 3]), np.array([1.0, 2, 6]))
    assert found["RMSE"] == pytest.approx(3**0.5)
    assert found["R²"] == pytest.approx(1 - 9 / 14)
    found = trees_models.scores("binary", np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([0, 1]))
    assert found == {"accuracy": 0.5, "log-loss": pytest.approx(-np.log(0.75 * 0.5) / 2)}


def test_one_core_and_back():
    if not trees_models.can_pin():
        pytest.skip("threads cannot be placed here")
    before = os.sched_getaffinity(0)
    with trees_models.one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_pixels_are_what_lies_around():
    x, y, kind = tables.read_table("pixels")
    image = load_sample_image("china.jpg")
    assert (x.shape, kind) == ((len(y), 24), "regression")
    assert y[0] == image[1, 1, 1]
    np.testing.assert_array_equal(x[0, :3], image[0, 0])
    np.testing.assert_array_equal(x[1, -3:], image[2, 6])


# The comparison -------------------------------------------------------------------------------------------------------


def compared(monkeypatch, xgboost=None):
    """A run with contenders that only write down what they are given."""
    given = []

    def contender(library, model, settings, stops):
        def call(rows, seed):
            given.append((library, model, settings, rows, seed))
            p = np.full(len(rows.test_y), rows.y.mean() + {OURS: 0.1}.get(library, 0))
            outside = np.where(np.arange(len(rows.y)) % 2, rows.y, np.nan) if model == "random forest" else None
            return Run(2.0 if library == OURS else 1.0, 0.001, p, (p,) * len(stops) * (model == "boosting"), outside)

        return call

    cost = trees_models.cost.ProgramCost(None, 1000, 1.5)
    monkeypatch.setattr(trees_models, "ours", lambda m, s, rows, stops: (contender(OURS, m, s, stops), cost))
    monkeypatch.setattr(trees_models, "sklearns", lambda m, s, stops: contender(SKLEARN, m, s, stops))
    monkeypatch.setattr(trees_models, "xgboosts", lambda p, s, stops: contender("xgboost", "boosting", s, stops))
    config = trees.TreesConfig(seeds=2, tables=("diabetes",), rows=60)
    work = trees.one_table(config, "diabetes", (0, 1), xgboost)
    try:
        while True:
            next(work)
    except StopIteration as end:
        return given, trees.compare(config, {"diabetes": end.value}, xgboost=xgboost and "3.2", pinned=True)


def test_all_get_the_same_rows_settings_and_seeds(monkeypatch):
    given, _ = compared(monkeypatch, "python")
    for model in trees.MODELS:
        for seed in (0, 1):
            turns = [g for g in given if g[1] == model and g[4] == seed]
            assert [g[0] for g in turns] == [OURS, SKLEARN, "xgboost"][: 3 if model == "boosting" else 2]
            assert len({id(g[3]) for g in turns}) == 1
            assert len({g[2] for g in turns}) == 1
    rows = {g[4]: g[3] for g in given}
    assert len(rows[0].x) == 48
    assert not np.array_equal(rows[0].y, rows[1].y)  # a split of its own for each seed
    known = {row.tobytes() for row in rows[0].x}
    assert not known & {row.tobytes() for row in rows[0].test_x}


def test_what_is_shown(monkeypatch):
    _, shown = compared(monkeypatch)
    table, outside, costs = shown.tables
    assert table.columns == ("model", "library", "R²", "RMSE", "training", "12 predictions")
    assert [row[1] for row in table.rows[:3]] == [OURS, SKLEARN, "xgboost: not installed"]
    assert table.rows[2][2:] == (None,) * 4
    assert (table.rows[0][4], table.rows[1][4]) == ("2 s", "1 s")
    assert [row[3] for row in outside.rows] == ["1.000 ± 0.000"] * 2  # NaN is left out
    assert costs.rows[0] == ("diabetes", "boosting", "1.5 s", "0.0 MB", "2.00")
    assert [f.title for f in shown.figures] == ["diabetes: boosting", "Seconds of training, ours / other library's"]
    assert {line.label: line.y for line in shown.figures[1].series} == {
        f"{model}, {SKLEARN}": (2.0,) for model in trees.MODELS
    } | {"equal": (1.0,)}
    assert {(row["baseline"], row["speedup"]) for row in shown.rows} == {(SKLEARN, 0.5)}
    assert "not installed here" in shown.notes[-1]
    assert "in 2 times its seconds" in shown.headline


def test_a_resumed_run_shows_the_same(monkeypatch):
    compare, kept = trees.compare, []
    monkeypatch.setattr(
        trees, "compare", lambda *words, **named: kept.append((words, named)) or compare(*words, **named)
    )
    _, shown = compared(monkeypatch)
    (config, found), named = kept[0]
    read = json.loads(json.dumps(found, sort_keys=True))  # as a session keeps it
    assert compare(config, read, **named) == shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": ("titanic",)}, "tables must be some of"),
        ({"models": ("lightgbm",)}, "models must be some of"),
        ({"bins": 256}, "bins must be 2 to 255"),
        ({"min_leaf": 0}, "min_leaf must be at least 1"),
        ({"boosted_depth": 13}, "boosted_depth must be 1 to 12"),
        ({"forest_depth": 65}, "forest_depth must be 1 to 64"),
        ({"learning_rate": 0.0}, "learning rates must be positive"),
        ({"reg_lambda": -1.0}, "reg_lambda must be 0 or more"),
        ({"feature_fraction": 0.0}, "feature_fraction must be in"),
        ({"stops": (10, 20)}, "end with boosted_trees"),
        ({"stops": (0, 50)}, "increase from 1 on"),
    ],
)
def test_settings(change, message):
    with pytest.raises(ValueError, match=message):
        trees.TreesConfig(**change)
