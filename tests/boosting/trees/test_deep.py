"""Deep trees are dense ones where both can grow, and scikit-learn's where dense ones cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.tree import DecisionTreeRegressor

from jaxaccel.boosting.trees import apply_bins, fit_bins, grow_deep_tree, grow_tree, predict_trees, tree_leaves


def table(n=300, columns=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, columns)).astype(np.float32)
    return x, (np.sin(3 * x[:, 0]) * x[:, 1] + 0.1 * rng.normal(size=n)).astype(np.float32)


def statistics(y):
    return jnp.stack([jnp.asarray(y), jnp.ones(len(y))], 1)


def grow(x, y, bins=None, grower=grow_deep_tree, **settings):
    bins = fit_bins(x, n_bins=31, method="midpoint") if bins is None else bins
    return grower(bins, apply_bins(bins, x), statistics(y), **({"max_depth": 6, "min_data_in_leaf": 1} | settings))


def values(tree, x):
    return np.asarray(predict_trees(jax.tree.map(lambda a: a[None], tree), jnp.asarray(x)))[:, 0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"min_data_in_leaf": 7}, {"min_gain": 0.5}, {"score": "newton", "reg_lambda": 2.0}, {"categorical": False}],
    ids=["plain", "least rows", "least gain", "newton", "no categories"],
)
def test_equal_to_dense_trees(settings):
    x, y = table()
    deep, leaf = grow(x, y, **settings)
    dense, _ = grow(x, y, grower=grow_tree, **settings)
    # Sums of float32 in another order.
    np.testing.assert_allclose(values(deep, x), values(dense, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(tree_leaves(deep, jnp.asarray(x)), leaf)
    # Dense trees also split where nothing is gained.
    assert (deep.feature >= 0).sum() <= (dense.feature >= 0).sum()


def test_as_deep_as_there_are_rows():
    x = np.arange(40, dtype=np.float32)[:, None]
    y = 3.0 ** np.arange(40, dtype=np.float32) / 3.0**39  # the largest is always apart from the rest: a chain
    bins = fit_bins(x, n_bins=39, method="midpoint")
    tree, leaf = grow(x, y.astype(np.float32), bins, max_depth=15)
    oracle = DecisionTreeRegressor(max_depth=15, random_state=0).fit(x, y)
    np.testing.assert_allclose(values(tree, x), oracle.predict(x), rtol=1e-4, atol=1e-7)
    assert len(np.unique(leaf)) == oracle.get_n_leaves()


def test_grown_to_the_end_each_row_has_its_value():
    x, y = table(n=200, columns=2)
    bins = fit_bins(x, n_bins=199, method="midpoint")
    tree, leaf = grow(x, y, bins, max_depth=40)
    # Rows are the same where they differ by a thousandth: squares of it are rounding.
    np.testing.assert_allclose(values(tree, x), y, rtol=1e-3)
    assert len(np.unique(leaf)) > 190
    # Nodes come level by level, and children are next to each other.
    inner = np.flatnonzero(tree.feature >= 0)
    assert sorted(np.asarray(tree.child)[inner].tolist()) == list(range(1, 2 * len(inner), 2))


def test_rows_that_want_the_same_are_not_split():
    x, _ = table()
    y = (x[:, 0] > 0).astype(np.float32)
    tree, _ = grow(x, y, fit_bins(x, n_bins=299, method="midpoint"), max_depth=20)
    assert int((tree.feature >= 0).sum()) == 1


def test_most_leaves_are_those_that_gain_most():
    x, y = table()
    errors = []
    for leaves in (1, 2, 5, 16):
        tree, leaf = grow(x, y, max_leaves=leaves, max_depth=20)
        assert len(np.unique(leaf)) == leaves
        assert tree.leaf_value.shape == (2 * leaves - 1, 1)
        errors.append(np.mean((values(tree, x) - y) ** 2))
    assert errors == sorted(errors, reverse=True)
    # A level of two nodes of which one may be split: the better one is.
    three, _ = grow(x, y, max_leaves=3, max_depth=2)
    whole, _ = grow(x, y, max_depth=2)
    taken = int(np.argmax(whole.gain[1:3]))
    assert three.feature[1 + taken] >= 0 > three.feature[2 - taken]


def test_columns_drawn_for_each_node():
    x, y = table(columns=6)
    bins = fit_bins(x, n_bins=31, method="midpoint")
    draw = functools.partial(grow, x, y, bins, feature_fraction=0.34)
    first, second, same = (draw(key=jax.random.key(k))[0] for k in (0, 1, 0))
    assert not np.array_equal(first.feature, second.feature)
    np.testing.assert_array_equal(first.feature, same.feature)
    allowed = jnp.arange(6) % 2 == 1
    tree, _ = draw(key=jax.random.key(0), feature_mask=allowed)
    assert set(np.unique(tree.feature)) <= {-1, 1, 3, 5}
    # Looked up (up to a half of them) or masked, what is drawn is drawn: one column that helps, in 1/3 or 2/3 of roots.
    helps = (x[:, 2] > 0).astype(np.float32)
    for fraction in (1 / 3, 2 / 3):
        trees = jax.vmap(
            lambda key, fraction=fraction: grow(x, helps, bins, feature_fraction=fraction, max_depth=1, key=key)[0]
        )(jax.random.split(jax.random.key(3), 200))
        share = float((trees.feature[:, 0] == 2).mean())
        assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / 200)


def test_categories_and_nan():
    x, y = table()
    x[:, 1] = np.round(np.abs(x[:, 1]) * 2)
    x[::9, 0] = np.nan
    bins = fit_bins(x, n_bins=31, method="midpoint", categorical=(1,))
    tree, leaf = grow(x, y, bins, max_depth=9)
    assert bool(tree.is_categorical.any())
    np.testing.assert_array_equal(tree_leaves(tree, jnp.asarray(x)), leaf)


def test_several_trees_under_vmap_and_rows_sharded():
    x, y = table()
    bins = fit_bins(x, n_bins=31, method="midpoint")
    binned = apply_bins(bins, x)
    grower = functools.partial(grow_deep_tree, bins, max_depth=9, min_data_in_leaf=3)
    many, _ = jax.vmap(lambda s: grower(binned, s))(jnp.stack([statistics(y), statistics(-y)]))
    np.testing.assert_allclose(predict_trees(many, jnp.asarray(x)), 0, atol=1e-4)
    mesh = Mesh(jax.devices()[:4], ("rows",))
    whole, _ = grower(binned, statistics(y))
    part, _ = grower(
        jax.device_put(binned, NamedSharding(mesh, PartitionSpec(None, "rows"))),
        jax.device_put(statistics(y), NamedSharding(mesh, PartitionSpec("rows", None))),
    )
    np.testing.assert_array_equal(part.feature, whole.feature)
    np.testing.assert_allclose(part.leaf_value, whole.leaf_value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_depth": 0}, "max_depth is 0, expected 1 to 64"),
        ({"max_depth": 65}, "max_depth is 65, expected 1 to 64"),
        ({"max_leaves": 0}, "max_leaves is 0, expected an integer"),
        ({"max_leaves": 2.0}, "max_leaves is 2.0, expected an integer"),
        ({"min_data_in_leaf": -1}, "min_data_in_leaf is -1"),
        ({"feature_fraction": 0.5}, "key is None"),
    ],
)
def test_bad_settings(settings, message):
    x, y = table(n=20)
    with pytest.raises(ValueError, match=message):
        grow(x, y, **settings)
