"""GBRL gives the reference's predictions, and what its equations promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.boosting.gbrl import (
    LinearSchedule,
    clip_gradients,
    gbrl_fit,
    gbrl_init,
    gbrl_predict,
    gbrl_step,
)

# Of the largest prediction. Both sides are sums in float32 of some dozens of rows, in another order.
CLOSE = 1e-6


@pytest.fixture
def reference(vectors):
    return vectors("gbrl")


def error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("method", ["Quantile", "Uniform"])
@pytest.mark.parametrize("score", ["L2", "cosine"])
@pytest.mark.parametrize("policy", ["oblivious", "greedy"])
def test_three_steps(reference, policy, score, method):
    name = f"A_{policy}_{score}_{method}_"
    depth, n_bins, least = map(int, reference[name + "cfg"])
    state = gbrl_init(
        4, 3, capacity=3, learning_rate=0.5, max_depth=depth, n_bins=n_bins, min_data_in_leaf=least, policy=policy,
        score=score.lower(), method=method.lower(),
    )  # fmt: skip
    for x, g, expected in zip(*(reference[name + k] for k in ("X", "G", "pred")), strict=True):
        state = gbrl_step(state, x, g)
        assert error(gbrl_predict(state, reference[name + "Xeval"]), expected) < CLOSE
    if policy == "oblivious":
        np.testing.assert_array_equal(state.trees.feature[-1], reference[name + "lastfeat"])
        np.testing.assert_allclose(state.trees.threshold[-1], reference[name + "lastthr"], rtol=1e-6)
        assert error(state.trees.leaf_value[-1], reference[name + "lastleaf"]) < CLOSE


def test_categories(reference):
    state = gbrl_init(4, 2, capacity=1, learning_rate=1.0, max_depth=3, n_bins=8, categorical=(2, 3))
    x = np.concatenate([reference["B_Xnum"], reference["B_codes"]], 1)
    state = gbrl_step(state, x, reference["B_G"])
    assert error(gbrl_predict(state, x), reference["B_pred"]) < CLOSE


def follow(reference, name, **settings):
    """Errors after each step."""
    x, g, expected = (reference[f"{name}_{k}"] for k in ("X", "G", "pred"))
    settings = {"max_depth": 3, "n_bins": 16, "capacity": 5} | settings
    state = gbrl_init(3, g.shape[2], **settings)
    evaluated = reference[f"{name}_Xeval"]
    if len(expected) > len(x):
        np.testing.assert_allclose(gbrl_predict(state, evaluated), expected[0], rtol=1e-6)
        expected = expected[1:]
    for i in range(len(x)):
        state = gbrl_step(state, x[i], g[i])
        yield error(gbrl_predict(state, evaluated), expected[i])


BIAS = (0.1, -0.2, 0.3, 1.0)


def test_two_learning_rates(reference):
    assert max(follow(reference, "C", learning_rate=[0.3, 0.3, 0.3, 0.02], bias=BIAS)) < CLOSE


def test_a_range_of_trees(reference):
    state = gbrl_init(3, 4, capacity=4, learning_rate=1.0, max_depth=3, n_bins=16)
    for x, g in zip(reference["C_X"], reference["C_G"], strict=True):
        state = gbrl_step(state, x, g)
    x = reference["C_Xeval"]
    assert error(gbrl_predict(state, x, start=1, stop=3), reference["C_pred_range_1_3"]) < CLOSE
    parts = gbrl_predict(state, x, stop=1) + gbrl_predict(state, x, start=1)
    assert error(parts, np.asarray(gbrl_predict(state, x))) < CLOSE
    with pytest.raises(ValueError, match="start and stop are 2 and 5"):
        gbrl_predict(state, x, start=2, stop=5)


def test_linear_schedule(reference):
    assert max(follow(reference, "D", learning_rate=LinearSchedule(0.5, 0.1, 3), bias=BIAS)) < CLOSE


def test_adam(reference):
    # Adam divides by roots of squares of 1e-3·v², so that the rounding of each leaf is seen whole; the reference works
    # in float32 as well. Four steps differ by 2.1e-6 at most.
    assert max(follow(reference, "D2", learning_rate=0.1, optimizer="adam", bias=BIAS)) < 4e-6


def test_control_variates(reference):
    assert max(follow(reference, "E", learning_rate=1.0, max_depth=2, n_bins=8, control_variates=True)) < CLOSE
    # and without them the vectors are not met, so that the test can fail
    assert max(follow(reference, "E", learning_rate=1.0, max_depth=2, n_bins=8)) > 1e-3


def test_clipping(reference):
    assert error(clip_gradients(reference["F_g"], 1.5), reference["F_clip1.5"]) < CLOSE
    assert error(clip_gradients(reference["F_g1d"], 1.0), reference["F_clip1d_1.0"]) < CLOSE
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_gradients(reference["F_g"], 0)


@pytest.mark.parametrize("policy", ["oblivious", "greedy"])
def test_least_squares(reference, policy):
    state = gbrl_init(4, 2, capacity=10, learning_rate=0.3, max_depth=3, n_bins=16, policy=policy, score="l2")
    state, loss = gbrl_fit(state, reference["G_X"], reference["G_Y"], steps=10)
    assert error(loss, reference[f"G_{policy}_loss"]) < CLOSE
    assert error(gbrl_predict(state, reference["G_X"]), reference[f"G_{policy}_pred"]) < CLOSE


small = functools.partial(gbrl_init, 3, 2, max_depth=2, n_bins=4, learning_rate=1.0)


def data(n=24):
    rng = np.random.default_rng(n)
    return rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=(n, 2)).astype(np.float32)


def test_full_ensembles_raise_outside_jit_and_keep_their_trees_inside():
    x, g = data()
    state = gbrl_step(small(capacity=1), x, g)
    with pytest.raises(ValueError, match="capacity is 1"):
        gbrl_step(state, x, g)
    full = jax.jit(gbrl_step)(state, x, 2 * g)
    assert int(full.n_trees) == 2
    np.testing.assert_array_equal(gbrl_predict(full, x), gbrl_predict(state, x))


def test_steps_inside_a_scan_equal_those_outside():
    x, g = data()

    def body(state, _):
        state = gbrl_step(state, x, gbrl_predict(state, x) + g)
        return state, gbrl_predict(state, x)

    _, inside = jax.lax.scan(body, small(capacity=3), None, length=3)
    state = small(capacity=3)
    for expected in inside:
        state = gbrl_step(state, x, gbrl_predict(state, x) + g)
        np.testing.assert_allclose(gbrl_predict(state, x), expected, rtol=1e-5, atol=1e-6)


def test_an_unsplittable_batch_gives_its_mean_once():
    """The reference loses the gradient there, and counts the tree after it twice."""
    x, g = data()
    state = gbrl_step(small(capacity=2, policy="greedy", min_data_in_leaf=20), x, g)
    np.testing.assert_allclose(gbrl_predict(state, x), np.broadcast_to(-g.mean(0), g.shape), rtol=1e-5, atol=1e-6)


def test_a_column_of_equal_gradients_counts_for_nothing_under_l2():
    x, g = data()
    states = [gbrl_step(small(capacity=1, score="l2"), x, np.stack([g[:, 0], np.full(24, c)], 1)) for c in (0, 7)]
    np.testing.assert_array_equal(states[0].trees.feature, states[1].trees.feature)
    assert np.isfinite(states[1].trees.leaf_value).all()


def test_one_row_and_another_batch_size():
    x, g = data()
    for score in ("l2", "cosine"):
        state = gbrl_step(small(capacity=2, score=score, control_variates=True), x[:1], g[:1])
        np.testing.assert_allclose(gbrl_predict(state, x[:1]), -g[:1], rtol=1e-6)
        state = gbrl_step(state, x, g)
        assert np.isfinite(gbrl_predict(state, x)).all()


def test_more_categories_than_bins_keep_those_that_matter_and_unseen_ones_go_left():
    codes = np.repeat(np.arange(6), 4).astype(np.float32)[:, None]
    g = np.where(codes == 5, 3.0, 0.01).astype(np.float32)
    state = gbrl_init(1, 1, capacity=1, max_depth=1, n_bins=1, learning_rate=1.0, categorical=(0,))
    state = gbrl_step(state, codes, g)
    np.testing.assert_allclose(gbrl_predict(state, codes)[:, 0], -g[:, 0], rtol=1e-5)
    np.testing.assert_allclose(gbrl_predict(state, np.array([[17.0], [np.nan]])), -0.01, rtol=1e-5)


def test_learning_rates_may_be_changed_and_differ_by_column():
    x, g = data()
    state = gbrl_step(small(capacity=1), x, g)
    halved = dataclasses.replace(state, rate=state.rate * jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(gbrl_predict(halved, x), gbrl_predict(state, x) * np.array([0.5, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity is 0"),
        ({"max_depth": 0}, ValueError, "max_depth is 0"),
        ({"max_depth": 13}, ValueError, "max_depth is 13"),
        ({"n_bins": 0}, ValueError, "n_bins is 0"),
        ({"n_bins": 2.5}, TypeError, "n_bins is 2.5"),
        ({"min_data_in_leaf": -1}, ValueError, "min_data_in_leaf is -1"),
        ({"optimizer": "lion"}, ValueError, "optimizer is 'lion'"),
        ({"optimizer": ("sgd",)}, ValueError, "or 2 of them"),
        ({"policy": "lossguide"}, ValueError, "'lossguide'"),
        ({"learning_rate": [0.1, 0.2, 0.3]}, ValueError, r"learning_rate has shape \(3,\)"),
        ({"learning_rate": [LinearSchedule(0.1, 0.0, 3)]}, ValueError, "learning_rate has 1 entries"),
        ({"bias": float("nan")}, ValueError, "bias is"),
        ({"categorical": (3,)}, ValueError, "categorical is"),
        ({"cv_beta": 1.0}, ValueError, "cv_beta is 1.0"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        small(**{"capacity": 2} | change)


@pytest.mark.parametrize(
    ("obs", "gradients", "message"),
    [
        (np.ones((4, 3)), np.full((4, 2), np.nan), "gradients must be finite"),
        (np.ones((4, 3)), np.ones((3, 2)), r"gradients have shape \(3, 2\), expected \(4, 2\)"),
        (np.ones((4, 3)), np.ones((4, 3)), "gradients have shape"),
        (np.ones((4, 2)), np.ones((4, 2)), "x has 2 columns, expected 3"),
        (np.full((4, 3), np.inf), np.ones((4, 2)), "x holds infinities"),
        (np.ones((0, 3)), np.ones((0, 2)), "expected \\[rows, columns\\]"),
    ],
)
def test_bad_batches(obs, gradients, message):
    with pytest.raises(ValueError, match=message):
        gbrl_step(small(capacity=2), obs, gradients)


def test_schedules_that_rise_are_refused():
    with pytest.raises(ValueError, match="init, stop and trees are"):
        LinearSchedule(0.1, 0.5, 3)
