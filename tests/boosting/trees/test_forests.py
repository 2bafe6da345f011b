"""Forests: scikit-learn's trees in the limit, rows out of the bag, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn import datasets
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeRegressor

from jaxaccel.boosting.trees import feature_importances, fit_bins, forest_fit, forest_predict

KEY = jax.random.key(0)


def table(n=64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, (n, 3)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] + rng.normal(size=n)).astype(np.float32)


def fit(x, y, bins=None, key=KEY, **settings):
    bins = fit_bins(x, n_bins=7, method="midpoint") if bins is None else bins
    return forest_fit(bins, x, y[:, None], key, **({"n_trees": 4, "max_depth": 3} | settings))


def test_one_tree_without_drawing_is_scikit_learns():
    x, y = table()
    forest = fit(x, y, n_trees=1, bootstrap=False)
    oracle = DecisionTreeRegressor(max_depth=3, random_state=0).fit(x, y)
    # Means of float32 against float64.
    np.testing.assert_allclose(forest_predict(forest, x)[:, 0], oracle.predict(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(feature_importances(forest.trees, 3), oracle.feature_importances_, rtol=1e-3, atol=1e-4)
    assert np.isnan(forest.out_of_bag).all()  # every row was seen


def test_as_good_as_scikit_learn_and_out_of_bag_says_so():
    x, y = datasets.load_diabetes(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, random_state=0)
    bins = fit_bins(x, n_bins=32, method="midpoint")
    forest = fit(x, y, bins, n_trees=60, max_depth=6, feature_fraction=0.34)
    found = 1 - np.mean((forest_predict(forest, test_x)[:, 0] - test_y) ** 2) / test_y.var()
    oracle = RandomForestRegressor(60, max_depth=6, max_features=0.34, random_state=0).fit(x, y)
    assert found > oracle.score(test_x, test_y) - 0.03  # the spread over seeds of 60 trees
    outside = 1 - np.mean((np.asarray(forest.out_of_bag)[:, 0] - y) ** 2) / y.var()
    inside = 1 - np.mean((forest_predict(forest, x)[:, 0] - y) ** 2) / y.var()
    assert 0.3 < outside < inside - 0.1


def test_classes_are_probabilities_and_importances_find_the_column():
    x, _ = table()
    labels = (x[:, 1] > 2).astype(int)
    bins = fit_bins(x, n_bins=7, method="midpoint")
    forest = forest_fit(bins, x, np.eye(2)[labels], KEY, n_trees=4, max_depth=3, feature_fraction=0.7)
    p = np.asarray(forest_predict(forest, x))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert p.min() > -1e-5
    assert (p.argmax(1) == labels).mean() > 0.95
    assert feature_importances(forest.trees, 3).argmax() == 1


def test_random_thresholds_differ_between_trees():
    x, y = table()
    forest = fit(x, y, random_thresholds=True, bootstrap=False)
    roots = {(int(f), float(t)) for f, t in zip(forest.trees.feature[:, 0], forest.trees.threshold[:, 0], strict=True)}
    assert len(roots) > 1
    assert np.mean((forest_predict(forest, x)[:, 0] - y) ** 2) < 0.5 * y.var()


def test_rows_of_no_weight():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    half = fit(x, y, bins, sample_weight=np.arange(64) % 2, min_data_in_leaf=3)
    kept = fit(x[1::2], y[1::2], bins, min_data_in_leaf=3)  # which draws the same rows
    np.testing.assert_allclose(forest_predict(half, x), forest_predict(kept, x), rtol=1e-4, atol=1e-4)


def test_seeds_side_by_side_and_rows_sharded():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    keys = jax.random.split(KEY, 3)
    several = jax.jit(jax.vmap(lambda key: forest_predict(fit(x, y, bins, key), x)))(keys)
    alone = forest_predict(fit(x, y, bins, keys[1]), x)
    np.testing.assert_allclose(several[1], alone, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(several[0] - several[1]).max()) > 0.1
    rows = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    placed = forest_fit(bins, jax.device_put(x, rows), jax.device_put(y[:, None], rows), keys[1], n_trees=4,
                        max_depth=3)  # fmt: skip
    np.testing.assert_allclose(forest_predict(placed, x), alone, rtol=1e-4, atol=1e-4)


def test_nan_constant_columns_one_row_and_categories_never_seen():
    x, y = table()
    x[:, 2] = 1
    x[::5, 0] = np.nan
    forest = fit(x, y, fit_bins(x, n_bins=7, method="midpoint", categorical=(1,)))
    assert (forest.trees.feature != 2).all()
    new = np.array([[-9, 99, 1], [np.nan, 98, 1]], np.float32)
    values = np.asarray(forest_predict(forest, new))
    np.testing.assert_array_equal(values[0], values[1])
    single = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(forest_predict(fit(single, np.array([7.0])), single), 7.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": np.array([[0.0], [np.nan], [1], [2]])}, ValueError, "y must be finite"),
        ({"y": np.ones(4)}, ValueError, r"y has shape \(4,\), expected \[4, outputs\]"),
        ({"sample_weight": np.array([1.0, -1, 1, 1])}, ValueError, "sample_weight must be finite and >= 0"),
        ({"sample_weight": np.zeros(4)}, ValueError, "not zero for all rows"),
        ({"max_depth": 0}, ValueError, "max_depth is 0"),
        ({"max_depth": 2.0}, TypeError, r"max_depth is 2\.0"),
        ({"n_trees": 0}, ValueError, "n_trees is 0"),
        ({"feature_fraction": 0.0}, ValueError, "feature_fraction is 0"),
        ({"min_data_in_leaf": -1}, ValueError, "min_data_in_leaf is -1"),
        ({"x": np.full((4, 1), np.inf)}, ValueError, "holds infinities"),
    ],
)
def test_bad_input(change, error, message):
    x = np.arange(4.0, dtype=np.float32)[:, None]
    settings = {"x": x, "y": np.ones((4, 1)), "key": KEY, "n_trees": 1, "max_depth": 1} | change
    args = [settings.pop(name) for name in ("x", "y", "key")]
    with pytest.raises(error, match=message):
        forest_fit(fit_bins(x, n_bins=3), *args, **settings)
