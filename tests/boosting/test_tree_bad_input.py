"""Tables and targets that are odd or wrong, for all six estimators on trees; the functions' own are in ``trees/``."""

import numpy as np
import pytest

from jaxaccel.boosting.tree_estimators import (
    BoostedTreesClassifier,
    BoostedTreesRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from jaxaccel.boosting.trees import apply_bins, fit_bins

CLASSIFIERS = [BoostedTreesClassifier, RandomForestClassifier, ExtraTreesClassifier]
REGRESSORS = [BoostedTreesRegressor, RandomForestRegressor, ExtraTreesRegressor]
SMALL = {"n_trees": 4, "max_depth": 2, "n_bins": 7, "random_state": 0}
every = pytest.mark.parametrize("kind", [*CLASSIFIERS, *REGRESSORS])


def outputs(model, x):
    return model.predict_proba(x)[:, 1] if hasattr(model, "predict_proba") else model.predict(x)


@every
def test_nan_goes_left_constant_columns_are_not_used_and_unseen_categories_are_the_others(kind):
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=80), np.ones(80), rng.integers(0, 4, 80)], 1)
    y = ((x[:, 0] > 0) | (x[:, 2] == 2)).astype(int)
    x[::7, 0] = np.nan
    model = kind(**SMALL | {"n_trees": 16}, categorical=(2,)).fit(x, y)
    assert model.feature_importances_[1] == 0
    assert model.feature_importances_[0] > 0
    new = np.array([[np.nan, 1, 2], [-9, 1, 2], [9, 1, 98], [9, 1, 99], [9, 1, np.nan], [-9, 1, 99]])
    found = outputs(model, new)
    assert found[0] == found[1]  # left of all
    assert found[2] == found[3] == found[4]
    assert found[3] > found[5]  # and the column counts


def test_a_missing_category_is_one_of_the_others():
    bins = fit_bins(np.array([[0.0], [1], [2]]), n_bins=3, categorical=(0,))
    np.testing.assert_array_equal(apply_bins(bins, np.array([[0.0], [2], [7], [np.nan]])), [[0, 2, 3, 3]])


@pytest.mark.parametrize("kind", REGRESSORS)
def test_one_row_is_its_own_prediction(kind):
    model = kind(**SMALL).fit(np.array([[1.0, 2]]), [5.0])
    np.testing.assert_allclose(model.predict([[9.0, 9]]), 5, rtol=1e-6)


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize(
    ("y", "weight"), [([1, 1, 1, 1], None), (["a", "a", "a", "a"], None), ([0, 1, 0, 0], [1, 0, 1, 1])]
)
def test_labels_of_one_class(kind, y, weight):
    with pytest.raises(ValueError, match=r"at least two classes .* got one class"):
        kind(**SMALL).fit(np.arange(4.0)[:, None], y, sample_weight=weight)


@every
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": [1, -1, 1, 1]}, "[Nn]egative"),
        ({"weight": [0, 0, 0, 0]}, "at least one|zero|two classes .* got no such row"),
        ({"weight": [1, np.nan, 1, 1]}, "NaN"),
        ({"weight": [1, 1, 1]}, "shape"),
        ({"y": [0, np.nan, 1, 1]}, "NaN"),
        ({"x": [[0.0], [np.inf], [1], [2]]}, "infinity"),
        ({"x": np.zeros((0, 1)), "y": []}, "0 sample"),
        ({"max_depth": 0}, "max_depth is 0, expected 1"),
        ({"n_trees": 0}, "n_trees is 0"),
        ({"n_bins": 0}, "n_bins is 0"),
        ({"categorical": (1,)}, "categorical is"),
        ({"categorical": (0,), "n_bins": 2}, "column 0 has 4 categories, expected at most n_bins, which is 2"),
        ({"feature_fraction": 0.0}, "feature_fraction is 0"),
        ({"min_data_in_leaf": -1}, "min_data_in_leaf is -1"),
    ],
)
def test_bad_input(kind, change, message):
    data = {"x": np.arange(4.0)[:, None], "y": [0, 1, 0, 1], "weight": None}
    settings = {name: value for name, value in change.items() if name not in data}
    data |= {name: value for name, value in change.items() if name in data}
    with pytest.raises(ValueError, match=message):
        kind(**SMALL | settings).fit(data["x"], data["y"], sample_weight=data["weight"])
