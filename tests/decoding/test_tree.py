"""Trees against the reference's buffers, brute force over all trees, and the definition of their mask."""

import itertools
import math

import jax
import numpy as np
import pytest

from jaxaccel.decoding.tree import build_tree, chain, expected_length, make_tree


def choices(data, name):
    return [tuple(int(rank) for rank in row if rank >= 0) for row in data[name]]


@pytest.mark.parametrize("case", ["med_small", "med_vicuna7b"])
def test_equals_the_reference_buffers(case, vectors):
    data = vectors("llm_acceleration")
    paths = choices(data, f"{case}_choices")
    tree = make_tree(paths[::-1])  # any order will do
    np.testing.assert_array_equal(tree.attn_mask, data[f"{case}_attn_mask"])
    np.testing.assert_array_equal(tree.tree_index, data[f"{case}_tree_indices"])
    np.testing.assert_array_equal(tree.depth, data[f"{case}_position_ids"])
    np.testing.assert_array_equal(np.where(tree.valid, tree.retrieve, -1), data[f"{case}_retrieve_indices"])
    assert tree.num_nodes == len(paths) + 1
    assert tree.max_depth == max(map(len, paths))


def test_mask_is_the_ancestor_relation(vectors):
    tree = make_tree(choices(vectors("llm_acceleration"), "med_vicuna7b_choices"))
    n = tree.num_nodes
    step = np.zeros((n, n), bool)
    step[np.arange(1, n), tree.parent[1:]] = True
    closure = np.eye(n, dtype=bool)
    for _ in range(tree.max_depth):
        closure |= closure @ step
    np.testing.assert_array_equal(tree.attn_mask, closure)
    np.testing.assert_array_equal(tree.attn_mask.sum(1), tree.depth + 1)
    # Each row of ``retrieve`` is a way from the root to a leaf, and all leaves are there once.
    for row, valid in zip(tree.retrieve, tree.valid, strict=True):
        route = row[valid]
        assert route[0] == 0
        np.testing.assert_array_equal(tree.parent[route[1:]], route[:-1])
    leaves = [row[valid][-1] for row, valid in zip(tree.retrieve, tree.valid, strict=True)]
    assert sorted(leaves) == sorted(set(range(n)) - set(tree.parent[1:].tolist()))


def test_greedy_growth_equals_the_reference(vectors):
    data = vectors("llm_acceleration")
    paths = build_tree(data["tree_a_acc"], 20)
    assert list(paths) == choices(data, "tree_a_nodes")  # order of growth as well


def all_trees(paths, size):
    for subset in itertools.combinations(paths, size):
        if all(len(path) == 1 or path[:-1] in subset for path in subset):
            yield subset


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ordered", [True, False], ids=["falling", "any-order"])
def test_no_tree_of_the_same_size_is_better(seed, ordered):
    rng = np.random.default_rng(seed)
    accuracies = rng.dirichlet(np.ones(4), 2)[:, :3]  # the rest of the mass is beyond the third rank
    if ordered:
        accuracies = -np.sort(-accuracies, axis=1)
    paths = [path for length in (1, 2) for path in itertools.product(range(3), repeat=length)]
    grown = build_tree(accuracies, len(paths))
    assert set(grown) == set(paths)
    for size in range(1, 7):
        best = max(expected_length(tree, accuracies) for tree in all_trees(paths, size))
        # Every beginning of the list is the best tree of its size; sums of the same products in another order.
        assert math.isclose(expected_length(grown[:size], accuracies), best, rel_tol=1e-12)
        make_tree(build_tree(accuracies, size))  # and is a tree


def test_depth_limit_and_rows_of_different_length():
    assert build_tree([[0.9], [0.8, 0.1], [0.7]], 2, max_depth=1 + 1) == ((0,), (0, 0))
    assert build_tree([[0.5, 0.4], [0.9]], 2, max_depth=1) == ((0,), (1,))
    assert set(build_tree([[0.9], [0.8, 0.1], [0.7]], 5)) == {(0,), (0, 0), (0, 1), (0, 0, 0), (0, 1, 0)}
    assert build_tree([[0.0, 0.0], [0.0]], 4) == ((0,), (1,), (0, 0), (1, 0))  # ties: fewer guesses, then lower ranks


def test_expected_length_is_what_a_simulation_gives():
    rng = np.random.default_rng(0)
    accuracies = np.array([[0.5, 0.2, 0.1], [0.4, 0.3, 0.1], [0.3, 0.2, 0.2]])
    paths = build_tree(accuracies, 10)
    trials = 40_000
    # The rank that turns out right at each head; 3 where none does.
    shares = np.concatenate([accuracies, 1 - accuracies.sum(1, keepdims=True)], 1)
    truth = np.stack([rng.choice(4, trials, p=row) for row in shares], 1)
    lengths = np.ones(trials)
    for path in paths:
        lengths += (truth[:, : len(path)] == path).all(1)
    # Standard error is at most 1.1/√40000 = 0.0055.
    assert abs(lengths.mean() - expected_length(paths, accuracies)) < 0.02
    assert expected_length([(0,), (0, 0)], [[1.0], [1.0]]) == 3.0  # perfect heads: depth + 1
    assert expected_length([(7,)], [[0.6]]) == 1.0


def test_chain_and_root_alone():
    tree = chain(3)
    np.testing.assert_array_equal(tree.attn_mask, np.tril(np.ones((4, 4), bool)))
    np.testing.assert_array_equal(tree.tree_index, range(4))
    assert tree == make_tree([(0, 0), (0,), (0, 0, 0)], top_k=1)
    root = chain(0)
    assert (root.num_nodes, root.max_depth, root.retrieve.tolist()) == (1, 0, [[0]])


def test_is_a_static_argument():
    count = 0

    def nodes(tree):
        nonlocal count
        count += 1
        return tree.num_nodes

    compiled = jax.jit(nodes, static_argnums=0)
    assert compiled(make_tree([(0,), (1,)])) == compiled(make_tree([(1,), (0,)])) == 3
    assert count == 1  # equal trees share the compiled function
    assert make_tree([(0,)], top_k=2) != make_tree([(0,)])
    with pytest.raises(ValueError, match="read-only"):
        make_tree([(0,)]).depth[0] = 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0,)], r"\(0,\) more than once"),
        ([(0,), (1, 0)], r"\(1, 0\) without \(1,\)"),
        ([(0, 0)], "every ancestor"),
        ([()], "empty path"),
        ([(-1,)], ">= 0"),
        ([(10,)], "below top_k = 10"),
    ],
)
def test_what_is_no_tree_is_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        make_tree(paths)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        make_tree([(0,)], top_k=0)
    with pytest.raises(ValueError, match="depth must be at least 0"):
        chain(-1)
    for accuracies, message in (
        ([], "one non-empty row"),
        ([[0.5], []], "one non-empty row"),
        ([[0.5, -0.1]], r"accuracies\[0\]"),
        ([[0.5], [0.8, 0.3]], r"accuracies\[1\]"),
        ([[math.nan]], "shares"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tree(accuracies, 1)
    with pytest.raises(ValueError, match="between 1 and 6"):
        build_tree([[0.5, 0.1], [0.5, 0.1]], 7)
    with pytest.raises(ValueError, match="num_nodes"):
        build_tree([[0.5]], 0)
    for depth in (0, 3):
        with pytest.raises(ValueError, match="max_depth"):
            build_tree([[0.5], [0.5]], 1, max_depth=depth)
    with pytest.raises(ValueError, match="at most as long"):
        expected_length([(0,), (0, 0)], [[0.5]])
