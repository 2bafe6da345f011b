"""The faces that scikit-learn knows: its own checks, and equality with the functions behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from jaxaccel.boosting import gbnn_apply, gbnn_fit
from jaxaccel.boosting.gbnn_estimators import GBNNClassifier, GBNNRegressor

# Enough for the checks' easy problems; each check has shapes of its own, and so a compilation.
CHECKED = {"n_steps": 12, "units_per_step": 2, "learning_rate": 0.5, "inner_steps": 60, "random_state": 0}


@parametrize_with_checks([GBNNRegressor(**CHECKED), GBNNClassifier(**CHECKED)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_equal_to_the_functions():
    x, y = datasets.load_diabetes(return_X_y=True)
    x = StandardScaler().fit_transform(x)[:80]
    y = (y[:80] - 150) / 80
    model = GBNNRegressor(3, inner_steps=5, random_state=0).fit(x, y)
    seed = np.random.RandomState(0).randint(2**31 - 1)
    fit = gbnn_fit(x.astype(np.float32), y.astype(np.float32), key=jax.random.key(seed), n_steps=3, inner_steps=5)
    for m in (None, 1):
        expected = gbnn_apply(fit.params, jnp.asarray(x, jnp.float32), n_active=m)[:, 0]
        # float32 sums of three units against float64
        np.testing.assert_allclose(model.set_params(n_active=m).predict(x), expected, rtol=1e-5, atol=1e-5)


def test_in_a_pipeline_and_a_grid():
    x, y = datasets.load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    pipe = make_pipeline(StandardScaler(), GBNNClassifier(6, learning_rate=0.5, inner_steps=40, random_state=0))
    search = GridSearchCV(pipe, {"gbnnclassifier__n_active": [1, 6]}, cv=2).fit(x, names)
    assert search.score(x, names) > 0.9
    np.testing.assert_allclose(search.predict_proba(x).sum(1), 1, rtol=1e-6)


def test_bad_settings():
    x, y = np.ones((4, 1)), np.array([0.0, 1, 0, 1])
    with pytest.raises(ValueError, match="logistic, tanh, relu, gelu"):
        GBNNRegressor(activation="swish").fit(x, y)
    with pytest.raises(ValueError, match="one class"):
        GBNNClassifier().fit(x, np.ones(4, int))
    model = GBNNRegressor(2, inner_steps=2).fit(x, y)
    with pytest.raises(ValueError, match="n_active must be 0 to 2"):
        model.set_params(n_active=3).predict(x)
