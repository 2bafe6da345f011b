"""Trees are those of a search over all rows and thresholds; bins and leaves agree with raw values, NaN included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from jaxaccel.boosting.trees import Bins, apply_bins, fit_bins, grow_tree, predict_trees, tree_leaves
from jaxaccel.boosting.trees.splitting import cells, running_sums, spread


def table(n=64, columns=3, values=6, seed=0):
    """Few distinct values, so that all thresholds between them are candidates."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, values, (n, columns)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] + rng.normal(size=n)).astype(np.float32)


def statistics(y):
    return jnp.stack([jnp.asarray(y), jnp.ones(len(y))], 1)


def grow(x, stats, bins=None, **settings):
    bins = fit_bins(x, n_bins=7, method="midpoint") if bins is None else bins
    return grow_tree(bins, apply_bins(bins, x), stats, **({"max_depth": 3} | settings))


def values(tree, x):
    return np.asarray(predict_trees(jax.tree.map(lambda a: a[None], tree), jnp.asarray(x)))


def test_equal_to_scikit_learns_trees():
    x, y = table()
    tree, leaf = grow(x, statistics(y - y.mean()))
    oracle = DecisionTreeRegressor(max_depth=3, random_state=0).fit(x, y)
    # Means of float32 against float64.
    np.testing.assert_allclose(values(tree, x)[:, 0] + y.mean(), oracle.predict(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tree_leaves(tree, jnp.asarray(x)), leaf)


def test_one_hot_classes_split_by_gini():
    x, y = table(seed=1)
    labels = (y > np.median(y)).astype(int) + (y > 12)
    stats = jnp.concatenate([jax.nn.one_hot(labels, 3), jnp.ones((len(y), 1))], 1)
    tree, _ = grow(x, stats)
    oracle = DecisionTreeClassifier(max_depth=3, random_state=0).fit(x, labels)
    assert (tree.feature[0], tree.threshold[0]) == (oracle.tree_.feature[0], oracle.tree_.threshold[0])
    np.testing.assert_allclose(values(tree, x).sum(1), 1, rtol=1e-6)
    impurity = np.sum(values(tree, x) * (1 - values(tree, x)))
    assert impurity <= np.sum(oracle.predict_proba(x) * (1 - oracle.predict_proba(x))) + 1e-4  # ties may differ


def test_enough_depth_and_bins_reproduce_cell_means():
    x, y = table(n=40)
    x = x[:, :1]
    tree, _ = grow(x, statistics(y), max_depth=5)
    expected = [y[x[:, 0] == v].mean() for v in x[:, 0]]
    np.testing.assert_allclose(values(tree, x)[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_newton_leaves_and_shrinkage():
    x, y = table()
    h = np.linspace(0.5, 2, len(y)).astype(np.float32)
    tree, leaf = grow(x, jnp.stack([y, h], 1), score="newton", reg_lambda=2.0)
    for number in np.unique(leaf):
        here = np.asarray(leaf) == number
        np.testing.assert_allclose(tree.leaf_value[number, 0], -y[here].sum() / (h[here].sum() + 2), rtol=1e-5)


def test_oblivious_equals_greedy_at_depth_one_and_cosine_equals_l2():
    x, y = table()
    trees = [
        grow(x, statistics(y), max_depth=1, policy=policy, score=score)[0]
        for policy, score in (("oblivious", "l2"), ("greedy", "l2"), ("depthwise", "cosine"))
    ]
    for tree in trees:
        assert (tree.feature[0], tree.threshold[0]) == (trees[0].feature[0], trees[0].threshold[0])


def test_permuting_columns_permutes_the_tree():
    x, y = table()
    order = np.array([2, 0, 1])
    first, second = grow(x, statistics(y))[0], grow(x[:, order], statistics(y))[0]
    np.testing.assert_array_equal(first.feature, np.where(second.feature < 0, -1, order[second.feature]))


@pytest.mark.parametrize("policy", ["depthwise", "oblivious"])
def test_least_rows_of_a_leaf(policy):
    x, y = table()
    _, leaf = grow(x, statistics(y), policy=policy, min_data_in_leaf=9)
    assert np.unique(leaf, return_counts=True)[1].min() >= 9


def test_weights_count_as_repeated_rows():
    x, y = table()
    weight = np.arange(len(y)) % 3
    bins = fit_bins(x, n_bins=7, method="midpoint")
    weighted, _ = grow(x, statistics(y) * weight[:, None], bins)
    repeated, _ = grow(np.repeat(x, weight, 0), statistics(np.repeat(y, weight)), bins)
    np.testing.assert_allclose(values(weighted, x), values(repeated, x), rtol=1e-5, atol=1e-5)


def test_nan_goes_left_in_bins_and_in_trees():
    x, y = table()
    x[::7, 0] = np.nan
    tree, leaf = grow(x, statistics(y))
    np.testing.assert_array_equal(tree_leaves(tree, jnp.asarray(x)), leaf)
    np.testing.assert_array_equal(leaf[::7] // 4, 0) if tree.feature[0] == 0 else None
    bins = fit_bins(x, n_bins=7, method="midpoint")
    assert np.all(apply_bins(bins, x)[0, ::7] == 0)
    empty = fit_bins(np.full((3, 1), np.nan), n_bins=2)
    assert empty.n_valid.tolist() == [0]


@pytest.mark.parametrize("x", [np.ones((5, 2)), np.ones((1, 2))])
def test_constant_columns_and_one_row_are_not_split(x):
    y = jnp.arange(len(x), dtype=jnp.float32)
    tree, leaf = grow(x.astype(np.float32), statistics(y))
    assert (tree.feature == -1).all()
    assert (leaf == 0).all()
    assert tree.leaf_value[0, 0] == y.mean()


def test_categories_are_split_by_equality():
    x = np.array([[3], [7], [5], [7], [3], [5]], np.float32)
    y = jnp.array([0.0, 9, 0, 9, 0, 0])
    bins = fit_bins(x, n_bins=3, categorical=(0,))
    tree, leaf = grow(x, statistics(y), bins, max_depth=1)
    assert (float(tree.threshold[0]), bool(tree.is_categorical[0])) == (7.0, True)
    np.testing.assert_array_equal(leaf, [0, 1, 0, 1, 0, 0])
    assert values(tree, np.array([[6.0], [8.0], [np.nan]], np.float32))[:, 0].tolist() == [0, 0, 0]  # never seen


def test_masks_fractions_and_random_thresholds_use_what_they_may():
    x, y = table(n=200, columns=4, values=30)
    bins = fit_bins(x, n_bins=31, method="midpoint")
    tree, _ = grow(x, statistics(y), bins, feature_mask=jnp.array([False, True, False, True]))
    assert set(np.unique(tree.feature)) <= {-1, 1, 3}
    draw = functools.partial(grow, x, statistics(y), bins, feature_fraction=0.5, random_thresholds=True)
    a, b, same = (draw(key=jax.random.key(k))[0] for k in (0, 1, 0))
    assert not np.array_equal(a.threshold, b.threshold)
    np.testing.assert_array_equal(a.threshold, same.threshold)


def test_deep_trees_and_their_groups_of_levels():
    x = np.arange(128, dtype=np.float32)[:, None]
    y = jnp.asarray(np.random.default_rng(0).permutation(128), jnp.float32)
    bins = fit_bins(x, n_bins=127, method="midpoint")
    tree, leaf = grow(x, statistics(y - y.mean()), bins, max_depth=7)
    np.testing.assert_array_equal(tree_leaves(tree, jnp.asarray(x)), leaf)
    oracle = DecisionTreeRegressor(max_depth=7, random_state=0).fit(x, y)
    ours = values(tree, x)[:, 0] + float(y.mean())
    # Equal gains are told apart by rounding, and so structures may differ: what is left of the error does not.
    assert np.mean((ours - y) ** 2) <= 1.05 * np.mean((oracle.predict(x) - y) ** 2) + 1e-3


def test_rows_sharded_over_devices():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    mesh = Mesh(jax.devices(), ("rows",))
    binned = jax.device_put(apply_bins(bins, x), NamedSharding(mesh, PartitionSpec(None, "rows")))
    stats = jax.device_put(statistics(y), NamedSharding(mesh, PartitionSpec("rows", None)))
    tree, _ = grow_tree(bins, binned, stats, max_depth=3)
    expected, _ = grow(x, statistics(y))
    np.testing.assert_array_equal(tree.feature, expected.feature)
    np.testing.assert_allclose(tree.leaf_value, expected.leaf_value, rtol=1e-5, atol=1e-5)


def test_several_trees_under_vmap():
    x, y = table()
    bins = fit_bins(x, n_bins=7, method="midpoint")
    binned = apply_bins(bins, x)
    many, _ = jax.vmap(lambda s: grow_tree(bins, binned, s, max_depth=3))(jnp.stack([statistics(y), statistics(-y)]))
    np.testing.assert_allclose(predict_trees(many, jnp.asarray(x)), 0, atol=1e-4)


def test_predictions_do_not_depend_on_the_rows_beside():
    x, y = table()
    trees = jax.tree.map(lambda a: jnp.stack([a] * 5), grow(x, statistics(y))[0])
    whole = predict_trees(trees, jnp.asarray(x), scale=0.3)
    for i in (0, 9):
        np.testing.assert_array_equal(predict_trees(trees, jnp.asarray(x[i : i + 1]), scale=0.3)[0], whole[i])


@pytest.mark.parametrize("length", [1, 5, 8, 9, 70, 600])
def test_running_sums(length):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, length)), jnp.float32)
    groups = -(-length // 8)
    order = spread(jnp.arange(length), length)
    sums = running_sums(cells(x, groups, 0)).reshape(2, -1)
    np.testing.assert_array_equal(cells(x, groups, 0).reshape(2, -1)[:, order], x)
    np.testing.assert_array_equal(sums[:, order], np.cumsum(x, -1))
    assert len(set(np.asarray(order).tolist())) == length


@pytest.mark.parametrize("method", ["quantile", "uniform", "midpoint"])
def test_bins_count_the_thresholds_below(method):
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    bins = fit_bins(x, n_bins=6, method=method)
    expected = (np.asarray(bins.thresholds)[:, None] < x.T[..., None]).sum(-1)
    np.testing.assert_array_equal(apply_bins(bins, x), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_depth": 0}, ValueError, "max_depth is 0, expected 1 to 12"),
        ({"max_depth": 13}, ValueError, "max_depth is 13"),
        ({"max_depth": 2.0}, TypeError, "max_depth is 2.0"),
        ({"policy": "lossguide"}, ValueError, "policy is 'lossguide'"),
        ({"score": "gini"}, ValueError, "score is 'gini'"),
        ({"reg_lambda": -1.0}, ValueError, "reg_lambda is -1.0"),
        ({"min_data_in_leaf": -1}, ValueError, "min_data_in_leaf is -1"),
        ({"feature_fraction": 0.0}, ValueError, "feature_fraction is 0.0"),
        ({"feature_fraction": 0.5}, ValueError, "key is None"),
        ({"random_thresholds": True, "policy": "oblivious"}, ValueError, "random_thresholds is True"),
        ({"count": np.ones(3)}, ValueError, r"count has shape \(3,\)"),
        ({"feature_mask": np.ones(2)}, ValueError, r"feature_mask has shape \(2,\), expected \(3,\)"),
    ],
)
def test_bad_settings(change, error, message):
    x, y = table(n=8)
    with pytest.raises(error, match=message):
        grow(x, statistics(y), **change)


@pytest.mark.parametrize(
    ("x", "change", "error", "message"),
    [
        (np.ones((0, 2)), {}, ValueError, r"expected \[rows, columns\]"),
        (np.full((2, 2), np.inf), {}, ValueError, "holds infinities"),
        (np.ones((2, 2)), {"n_bins": 0}, ValueError, "n_bins is 0"),
        (np.ones((2, 2)), {"n_bins": 2.0}, TypeError, r"n_bins is 2\.0"),
        (np.ones((2, 2)), {"method": "random"}, ValueError, "method is 'random'"),
        (np.ones((2, 2)), {"categorical": (2,)}, ValueError, "categorical is"),
        (np.arange(8.0).reshape(4, 2), {"categorical": (0,), "n_bins": 2}, ValueError, "column 0 has 4 categories"),
    ],
)
def test_bad_tables(x, change, error, message):
    with pytest.raises(error, match=message):
        fit_bins(x, **change)


def test_other_columns_are_refused():
    with pytest.raises(ValueError, match="x has 2 columns, expected 1"):
        apply_bins(Bins(jnp.zeros((1, 1)), jnp.ones(1, jnp.int32), jnp.zeros(1, bool)), np.ones((3, 2)))
