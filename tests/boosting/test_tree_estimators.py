"""The faces that scikit-learn knows: its own checks, and equality with the functions behind them."""

import functools

import numpy as np
import pytest
from sklearn import datasets
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import estimator_checks_generator

from jaxaccel.boosting.tree_estimators import (
    BoostedTreesClassifier,
    BoostedTreesRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from jaxaccel.boosting.trees import boosted_fit, boosted_predict, fit_bins

# Enough for the checks' easy problems. Compiling is what takes time, once for each shape.
TINY = {"n_trees": 8, "max_depth": 2, "n_bins": 15, "random_state": 0}
BOOSTED = TINY | {"learning_rate": 0.5}
FOREST = TINY | {"feature_fraction": 1.0}
# Each kind of tree, of target and of drawing once: the other two faces are the same classes put together otherwise.
ESTIMATORS = [
    BoostedTreesRegressor(**BOOSTED), BoostedTreesClassifier(**BOOSTED), RandomForestRegressor(**FOREST),
    ExtraTreesClassifier(**FOREST),
]  # fmt: skip
# Seven digits of equality with repeated rows are more than float32 has, and a bootstrap draws other rows:
# `test_weights_count_as_repeated_rows` says what holds.
TOO_EXACT = "check_sample_weight_equivalence_on_dense_data"
ARRAY_API = "check_array_api_input"  # scikit-learn skips it unless an environment variable is set


def checks():
    for estimator in ESTIMATORS:
        for instance, check in estimator_checks_generator(estimator, legacy=True, mark=None):
            name = (check.func if isinstance(check, functools.partial) else check).__name__
            if name not in (TOO_EXACT, ARRAY_API):
                yield pytest.param(instance, check, id=f"{type(estimator).__name__}-{name}")


@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_equal_to_the_functions():
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = x[:64].astype(np.float32), y[:64].astype(np.float32)
    model = BoostedTreesRegressor(**BOOSTED).fit(x, y)
    bins = fit_bins(x, n_bins=15, method="midpoint")
    fit = boosted_fit(bins, x, y, n_trees=8, max_depth=2, learning_rate=0.5)
    np.testing.assert_allclose(model.predict(x), boosted_predict(fit, x)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(model.predict(x[:7]), model.predict(x)[:7], rtol=0)
    assert model.feature_importances_.shape == (10,)


@pytest.mark.parametrize(
    "estimator", [BoostedTreesRegressor(**BOOSTED), RandomForestClassifier(**FOREST, bootstrap=False)]
)
def test_weights_count_as_repeated_rows(estimator):
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(15, 3)), np.arange(15) % 2, rng.integers(0, 5, 15)
    name = "predict_proba" if hasattr(estimator, "predict_proba") else "predict"
    weighted = getattr(estimator.fit(x, y, sample_weight=weight), name)(x)
    repeated = getattr(estimator.fit(np.repeat(x, weight, 0), np.repeat(y, weight)), name)(x)
    np.testing.assert_allclose(weighted, repeated, rtol=1e-4, atol=1e-5)  # float32 sums in other orders


def test_forests_know_their_error_out_of_the_bag():
    x, y = datasets.load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    for kind in (RandomForestClassifier, ExtraTreesClassifier):
        model = kind(16, max_depth=3, n_bins=15, feature_fraction=0.5, bootstrap=True, random_state=0).fit(x, names)
        known = ~np.isnan(model.out_of_bag_[:, 0])
        assert known.mean() > 0.95
        assert (model.out_of_bag_.argmax(1) == y)[known].mean() > 0.85
        assert model.score(x, names) > 0.9
        np.testing.assert_allclose(model.predict_proba(x).sum(1), 1, rtol=1e-6)


def test_in_a_grid():
    x, y = datasets.load_iris(return_X_y=True)
    model = BoostedTreesClassifier(**BOOSTED)
    search = GridSearchCV(model, {"learning_rate": [0.01, 0.5]}, cv=2).fit(x, y)
    assert search.best_params_ == {"learning_rate": 0.5}
    assert search.score(x, y) > 0.9


def test_bad_input():
    x, y = np.arange(4.0)[:, None], np.array([0.0, 1, 0, 1])
    with pytest.raises(ValueError, match="one class"):
        RandomForestClassifier().fit(x, np.ones(4, int))
    with pytest.raises(ValueError, match="one class"):
        BoostedTreesClassifier().fit(x, [0, 1, 0, 0], sample_weight=[1, 0, 1, 1])
    with pytest.raises(ValueError, match="at least one"):
        BoostedTreesRegressor().fit(x, y, sample_weight=np.zeros(4))
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        ExtraTreesRegressor().fit(x, y, sample_weight=[1, -1, 1, 1])
    with pytest.raises(ValueError, match="too large for float32"):
        BoostedTreesRegressor().fit(x, 1e39 * y)
    with pytest.raises(ValueError, match="too large for float32"):
        BoostedTreesRegressor().fit(1e39 * x, y)
    with pytest.raises(ValueError, match="max_depth is 0"):
        RandomForestRegressor(max_depth=0).fit(x, y)
    with pytest.raises(ValueError, match="column 0 has 4 categories"):
        RandomForestRegressor(n_bins=2, categorical=(0,)).fit(x, y)
