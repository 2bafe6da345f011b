"""Boosting: losses fall, rows of no weight are not there, and scikit-learn is no better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import train_test_split

from jaxaccel.boosting.losses import Loss
from jaxaccel.boosting.trees import boosted_fit, boosted_predict, fit_bins

SMALL = {"n_trees": 6, "max_depth": 2, "learning_rate": 0.5}


def table(n=64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, (n, 3)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] + rng.normal(size=n)).astype(np.float32)


def fit(x, y, bins=None, **settings):
    bins = fit_bins(x, n_bins=7, method="midpoint") if bins is None else bins
    return boosted_fit(bins, x, y, **(SMALL | settings))


def test_loss_never_rises_and_is_that_of_the_predictions():
    x, y = table()
    model = fit(x, y)
    # float32 means of 64 rows
    assert (np.diff(np.concatenate([[0.5 * y.var()], model.train_loss])) <= 1e-5).all()
    f = boosted_predict(model, x)[:, 0]
    np.testing.assert_allclose(0.5 * np.mean((f - y) ** 2), model.train_loss[-1], rtol=1e-5)
    early = boosted_predict(model, x, stop=2)[:, 0]
    np.testing.assert_allclose(0.5 * np.mean((early - y) ** 2), model.train_loss[1], rtol=1e-5)
    np.testing.assert_allclose(boosted_predict(model, x, stop=0)[:, 0], y.mean(), rtol=1e-5)


def test_rows_of_no_weight_and_weights_as_repeated_rows():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    weight = np.arange(64) % 2
    half = boosted_predict(fit(x, y, bins, sample_weight=weight), x)
    kept = boosted_predict(fit(x[1::2], y[1::2], bins), x)
    np.testing.assert_allclose(half, kept, rtol=1e-4, atol=1e-4)  # other orders of float32 sums


def test_softmax_lowers_the_loss_of_three_classes():
    x, y = table()
    labels = (y > 3).astype(int) + (y > 9)
    model = fit(x, labels, loss="softmax")
    assert model.trees.feature.shape[:2] == (3, 6)
    assert (np.diff(np.concatenate([[np.log(3)], model.train_loss])) < 0).all()
    assert (boosted_predict(model, x).argmax(1) == labels).mean() > 0.9


def test_two_targets_are_two_models():
    x, y = table()
    both = boosted_predict(fit(x, np.stack([y, -y], 1)), x)
    np.testing.assert_allclose(both[:, 0], boosted_predict(fit(x, y), x)[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both.sum(1), 0, atol=1e-4)


def test_seeds_side_by_side_and_under_jit():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    drawn = {"subsample": 0.5, "feature_fraction": 0.7}
    several = jax.jit(jax.vmap(lambda key: fit(x, y, bins, key=key, **drawn).train_loss))
    losses = several(jax.random.split(jax.random.key(0), 3))
    alone = fit(x, y, bins, key=jax.random.split(jax.random.key(0), 3)[1], **drawn)
    np.testing.assert_allclose(losses[1], alone.train_loss, rtol=1e-4)
    assert len(set(np.asarray(losses[:, -1]).tolist())) == 3
    assert (losses[:, -1] < 0.25 * y.var()).all()


def test_rows_sharded_over_devices():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    rows = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    model = boosted_fit(bins, jax.device_put(x, rows), jax.device_put(y, rows), **SMALL)
    np.testing.assert_allclose(model.train_loss, fit(x, y, bins).train_loss, rtol=1e-4)


def test_as_good_as_scikit_learn():
    settings = {"n_trees": 60, "max_depth": 3, "min_data_in_leaf": 10}
    theirs = {"max_iter": 60, "max_depth": 3, "min_samples_leaf": 10, "early_stopping": False}
    x, y = datasets.load_diabetes(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, random_state=0)
    model = boosted_fit(fit_bins(x, n_bins=32, method="midpoint"), x, y, **settings)
    error = np.mean((boosted_predict(model, test_x)[:, 0] - test_y) ** 2)
    oracle = HistGradientBoostingRegressor(**theirs).fit(x, y).score(test_x, test_y)
    assert 1 - error / test_y.var() > oracle - 0.02
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, random_state=0)
    bins = fit_bins(x, n_bins=32, method="midpoint")
    model = boosted_fit(bins, x, y, loss="logistic", **settings)
    found = np.mean((boosted_predict(model, test_x)[:, 0] > 0) == test_y)
    assert found > HistGradientBoostingClassifier(**theirs).fit(x, y).score(test_x, test_y) - 0.02


def test_nan_constant_columns_and_categories_never_seen():
    x, y = table()
    x[:, 2] = 1
    x[::5, 0] = np.nan
    bins = fit_bins(x, n_bins=7, method="midpoint", categorical=(1,))
    model = fit(x, y, bins)
    assert np.isfinite(model.train_loss).all()
    assert (model.trees.feature != 2).all()
    new = np.array([[-9, 99, 1], [np.nan, 98, 1]], np.float32)
    f = np.asarray(boosted_predict(model, new))
    np.testing.assert_array_equal(f[0], f[1])  # NaN is left of all; all categories never seen are one


def test_one_row_and_constant_targets():
    for x, y in ((np.ones((1, 2)), [3.0]), (np.arange(8.0).reshape(4, 2), [2.0] * 4)):
        model = fit(x.astype(np.float32), np.array(y))
        np.testing.assert_allclose(boosted_predict(model, x)[:, 0], y, rtol=1e-6)


def _nan(f, y):
    return jnp.where(y > 1, jnp.nan, 0.5 * (f[:, 0] - y) ** 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": [0.0, np.nan, 1, 2]}, ValueError, "y must be finite"),
        ({"y": [0.0, 1, 2]}, ValueError, "y has 3 rows, expected 4"),
        ({"y": [0, 0, 0, 0], "loss": "logistic"}, ValueError, "at least two classes"),
        ({"y": [0, 0, 0, 0], "loss": "softmax"}, ValueError, "at least two classes"),
        ({"y": [0, 1, 0, 0], "loss": "logistic", "sample_weight": np.array([1.0, 0, 1, 1])}, ValueError,
         "among rows of positive weight"),
        ({"loss": Loss(_nan, lambda y, w: jnp.zeros(1), newton=False)}, ValueError, "the loss is not finite"),
        ({"y": [0.0, 1e30, 1, 2]}, ValueError, "the loss is not finite"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"sample_weight": np.array([1.0, -1, 1, 1])}, ValueError, "sample_weight must be finite and >= 0"),
        ({"sample_weight": np.zeros(4)}, ValueError, "not zero for all rows"),
        ({"sample_weight": np.ones(3)}, ValueError, r"shape \(4,\)"),
        ({"max_depth": 0}, ValueError, "max_depth is 0"),
        ({"max_depth": 2.0}, TypeError, r"max_depth is 2\.0"),
        ({"n_trees": 0}, ValueError, "n_trees is 0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0"),
        ({"subsample": 0.0}, ValueError, "subsample is 0"),
        ({"subsample": 0.5}, ValueError, "key is None"),
        ({"reg_lambda": -1.0}, ValueError, "reg_lambda is -1"),
        ({"x": np.full((4, 1), np.inf)}, ValueError, "holds infinities"),
        ({"x": np.ones((4, 2))}, ValueError, "x has 2 columns, expected 1"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    x = np.arange(4.0, dtype=np.float32)[:, None]
    settings = {"x": x, "y": [0.0, 1, 2, 3], "n_trees": 1, "max_depth": 1} | change
    with pytest.raises(error, match=message):
        boosted_fit(fit_bins(x, n_bins=3), settings.pop("x"), np.array(settings.pop("y")), **settings)


def test_more_categories_than_bins():
    with pytest.raises(ValueError, match="column 0 has 9 categories"):
        fit_bins(np.arange(9.0)[:, None], n_bins=4, categorical=(0,))
