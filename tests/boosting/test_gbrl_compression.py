"""Smaller ensembles keep what they promise to keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.boosting.gbrl import LinearSchedule, gbrl_init, gbrl_predict, gbrl_step
from jaxaccel.boosting.gbrl_compression import gbrl_compress, gbrl_distil, gbrl_merge, gbrl_resize
from jaxaccel.boosting.trees import tree_leaves


def ensemble(trees=6, **settings):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (64, 3)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]) * x[:, 1], x[:, 2]], 1)
    state = gbrl_init(3, 2, **({"capacity": 8, "max_depth": 2, "n_bins": 8, "learning_rate": [0.5, 0.2]} | settings))
    for _ in range(trees):
        state = gbrl_step(state, x, gbrl_predict(state, x) - y)
    return state, x


def student(capacity=16, **settings):
    return gbrl_init(3, 2, capacity=capacity, max_depth=4, n_bins=8, learning_rate=0.6, score="l2", **settings)


def test_distillation_follows_the_teacher_and_stops_when_it_is_close():
    teacher, x = ensemble()
    small, error = gbrl_distil(teacher, student(), x, steps=16)
    wanted = gbrl_predict(teacher, x)
    gap = np.asarray(gbrl_predict(small, x) - wanted)
    np.testing.assert_allclose(error, np.sqrt(0.5 * (gap**2).sum() / 64), rtol=1e-5)
    assert float(error) < 0.2 * float(np.sqrt(0.5 * ((wanted - wanted.mean(0)) ** 2).sum() / 64))
    early, reached = jax.jit(lambda t, s: gbrl_distil(t, s, x, steps=16, tolerance=0.5))(teacher, student())
    assert float(error) <= float(reached) <= 0.5
    assert 0 < int(early.n_trees) < 16
    assert int(small.n_trees) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 17}, "steps is 17, and student has room for 16"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"student": gbrl_init(3, 1, capacity=16)}, "student has 3 columns and 1 outputs"),
        ({"student": dataclasses.replace(gbrl_init(3, 2, capacity=16), n_trees=jnp.int32(2))}, "student has 2 trees"),
        ({"obs": np.ones((4, 2))}, "x has 2 columns, expected 3"),
    ],
)
def test_bad_distillations(change, message):
    arguments = {"student": gbrl_init(3, 2, capacity=16), "obs": np.ones((4, 3)), "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        gbrl_distil(gbrl_init(3, 2, capacity=1), **arguments)


def test_compression_solves_its_least_squares_problem():
    state, x = ensemble()
    small, error = gbrl_compress(state, x, select=[1, 4], reg_lambda=0.5)
    assert (int(small.n_trees), small.capacity) == (2, 2)
    # The reference's closed form, with a projector on the leaves that are kept, in float64.
    leaf = np.asarray(tree_leaves(jax.tree.map(lambda a: a[:6], state.trees), jnp.asarray(x)))
    table = np.concatenate([np.ones((64, 1)), *(np.eye(4)[row] for row in leaf)], 1)
    value = np.concatenate(
        [np.asarray(state.bias)[None], *(-np.asarray(v) * [0.5, 0.2] for v in state.trees.leaf_value[:6])], 0
    )
    keep = np.diag([1.0, *np.repeat([0, 1, 0, 0, 1, 0], 4)])
    gram = keep @ table.T @ table @ keep + 0.5 * np.eye(25)
    w = np.linalg.pinv(gram) @ keep @ table.T @ table @ (np.eye(25) - keep) @ value
    expected = table @ keep @ (value + w)
    np.testing.assert_allclose(gbrl_predict(small, x), expected, atol=2e-5)
    np.testing.assert_allclose(gbrl_predict(state, x), table @ value, atol=2e-5)
    np.testing.assert_allclose(error, np.sqrt(np.mean((expected - table @ value) ** 2)), rtol=1e-3)
    _, dropped = gbrl_compress(state, x, select=[1, 4], refit=False)
    assert error < dropped


def test_selections_and_schedules():
    state, x = ensemble(learning_rate=LinearSchedule(0.5, 0.1, 6))
    before = gbrl_predict(state, x)
    same, error = gbrl_compress(state, x, keep=6, refit=False, capacity=9)
    assert same.capacity == 9
    assert error < 1e-6
    last, _ = gbrl_compress(state, x, keep=2, select="last", refit=False)
    # rates of the old numbers are kept, though the trees have new ones
    np.testing.assert_allclose(gbrl_predict(last, x), gbrl_predict(state, x, start=4), atol=1e-6)
    first, _ = gbrl_compress(state, x, keep=2, select="first", refit=False)
    np.testing.assert_allclose(gbrl_predict(first, x), gbrl_predict(state, x, stop=2), atol=1e-6)
    grown = gbrl_step(same, x, before)
    assert int(grown.n_trees) == 7
    errors = [float(gbrl_compress(state, x, keep=k)[1]) for k in (2, 5)]
    assert errors == sorted(errors, reverse=True)


def test_equal_trees_become_one():
    state, x = ensemble(trees=0)
    for scale in (1.0, 3.0, -0.5):
        state = gbrl_step(state, x, scale * x[:, :2])
    state = gbrl_step(state, x, x[:, 1:])
    merged = gbrl_merge(state)
    assert int(merged.n_trees) == 2
    np.testing.assert_allclose(gbrl_predict(merged, x), gbrl_predict(state, x), rtol=1e-5, atol=1e-5)
    assert gbrl_merge(state, capacity=5).capacity == 5


def test_room_is_made_and_taken():
    state, x = ensemble()
    with pytest.raises(ValueError, match="capacity is 5, expected at least 6"):
        gbrl_resize(state, 5)
    np.testing.assert_array_equal(gbrl_predict(gbrl_resize(state, 6), x), gbrl_predict(state, x))
    full = gbrl_resize(state, 6)
    with pytest.raises(ValueError, match="capacity is 6"):
        gbrl_step(full, x, x[:, :2])
    assert int(gbrl_step(gbrl_resize(full, 7), x, x[:, :2]).n_trees) == 7
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda s: gbrl_resize(s, 9))(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep is 0"),
        ({"keep": 7}, "keep is 7, expected at most 6"),
        ({"select": "best"}, "select is 'best'"),
        ({"select": [1, 1]}, "different numbers of trees from 0 to 5"),
        ({"select": [6]}, "different numbers of trees from 0 to 5"),
        ({"reg_lambda": 0.0}, "reg_lambda is 0.0"),
    ],
)
def test_bad_compressions(change, message):
    state, x = ensemble()
    with pytest.raises(ValueError, match=message):
        gbrl_compress(state, x, **({"keep": 2} | change))


def test_what_cannot_be_compressed():
    state, x = ensemble(optimizer=("sgd", "adam"))
    for call in (lambda: gbrl_compress(state, x, keep=1), lambda: gbrl_merge(state)):
        with pytest.raises(ValueError, match="use gbrl_distil"):
            call()
    with pytest.raises(ValueError, match="has no trees"):
        gbrl_merge(gbrl_init(3, 2, capacity=1))
    still, x = ensemble(learning_rate=[0.5, 0.0])
    with pytest.raises(ValueError, match="a learning rate is 0"):
        gbrl_compress(still, x, keep=1)
