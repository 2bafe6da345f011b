"""Losses of boosting: residuals, Newton steps and starts against the reference's numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel.boosting import Loss, encode_targets, mean_loss, newton_step, residuals
from jaxaccel.boosting.losses import get_loss, logistic, softmax, squared

# Sums of 40 to 160 float64 terms of order 1: 1e-12 leaves room for their order.
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


def problem(vectors, kind, x64=True):
    v = vectors("gbnn")
    f = jnp.asarray(v[f"p_{kind}_F"])
    f = f[:, None] if f.ndim == 1 else f
    h = v.get(f"p_{kind}_f")
    if h is not None:
        h = jnp.asarray(h[:, None] if h.ndim == 1 else h)
    return v, f, h


@pytest.mark.usefixtures("x64")
def test_binary_equals_the_reference(vectors):
    v, f, h = problem(vectors, "bin")
    y = jnp.asarray(v["p_bin_y"])
    np.testing.assert_allclose(residuals(logistic, f, y)[:, 0], v["p_bin_resid"], **DOUBLE)
    np.testing.assert_allclose(newton_step(logistic, f, y, h), v["p_bin_rho"], **DOUBLE)
    np.testing.assert_allclose(logistic.value(f, y), v["p_bin_loss"], **DOUBLE)
    np.testing.assert_allclose(logistic.initial(y, jnp.ones(40)), v["p_bin_F0"], **DOUBLE)


@pytest.mark.usefixtures("x64")
def test_softmax_equals_the_reference(vectors):
    v, f, h = problem(vectors, "mc")
    y = jnp.asarray(v["p_mc_Y"], jnp.float64)
    np.testing.assert_allclose(residuals(softmax, f, y), v["p_mc_resid"], **DOUBLE)
    np.testing.assert_allclose(newton_step(softmax, f, y, h), v["p_mc_rho"], **DOUBLE)
    # The reference sums over rows.
    np.testing.assert_allclose(softmax.value(f, y).sum(), v["p_mc_loss"], **DOUBLE)


@pytest.mark.usefixtures("x64")
def test_squared_equals_the_reference(vectors):
    v, f, _ = problem(vectors, "sq")
    y = encode_targets(v["p_sq_y"], "squared", dtype=jnp.float64)
    np.testing.assert_allclose(residuals(squared, f, y)[:, 0], v["p_sq_resid"], **DOUBLE)
    np.testing.assert_allclose(squared.initial(y, jnp.ones(40)), v["p_sq_F0"], **DOUBLE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_newton_step_is_one_iteration_from_zero(name):
    keys = jax.random.split(jax.random.key(0), 3)
    outputs = 1 if name == "logistic" else 3
    f, h = (jax.random.normal(k, (30, outputs), jnp.float64) for k in keys[:2])
    y = encode_targets(jax.random.randint(keys[2], 30, 0, max(2, outputs)), name, dtype=jnp.float64)
    loss = get_loss(name)._replace(curvature=None)  # the exact second derivative

    def along(rho):
        return loss.value(f + rho * h, y).sum()

    expected = -jax.grad(along)(0.0) / jax.grad(jax.grad(along))(0.0)
    np.testing.assert_allclose(newton_step(loss, f, y, h), expected, **DOUBLE)


@given(st.integers(0, 2**30), st.floats(-60, 60))
@settings(max_examples=20, deadline=None)
def test_logistic_stays_finite_far_from_zero(seed, shift):
    y = 2.0 * jax.random.bernoulli(jax.random.key(seed), shape=(4,)) - 1
    f = shift * jnp.ones((4, 1))
    r = residuals(logistic, f, y)
    assert np.isfinite(r).all()
    assert (np.abs(r) <= 2).all()
    assert np.isfinite(logistic.value(f, y)).all()
    assert np.isfinite(newton_step(logistic, f, y, r))


@pytest.mark.parametrize("h", [0.0, np.nan])
def test_no_step_where_there_is_nothing_to_fit(h):
    y = encode_targets([0, 1], "logistic")
    assert newton_step(logistic, jnp.zeros((2, 1)), y, jnp.full((2, 1), h)) == 0


def test_weights_are_repetitions():
    keys = jax.random.split(jax.random.key(1), 2)
    f, h = (jax.random.normal(k, (6, 3)) for k in keys)
    y = encode_targets([0, 1, 2, 0, 1, 2], "softmax")
    weight = jnp.array([1.0, 2, 0, 3, 1, 1])
    rows = np.repeat(np.arange(6), weight.astype(int))
    # Sums of ten float32 terms in another order.
    np.testing.assert_allclose(
        newton_step(softmax, f, y, h, weight), newton_step(softmax, f[rows], y[rows], h[rows]), rtol=1e-5
    )
    np.testing.assert_allclose(mean_loss(softmax, f, y, weight), softmax.value(f[rows], y[rows]).mean(), rtol=1e-5)


def test_base_rate_is_where_binary_boosting_starts():
    y = encode_targets(np.array([0, 0, 0, 1]), "logistic")
    np.testing.assert_allclose(jax.nn.sigmoid(2 * logistic.initial(y, jnp.ones(4))), [0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("y", "loss", "error", "message"),
    [
        ([0.0, np.nan], "squared", ValueError, "finite"),
        ([0, 2], "logistic", ValueError, "must be 0 and 1"),
        ([1, 1], "logistic", ValueError, "at least two classes"),
        ([0, 0], "softmax", ValueError, "at least two classes"),
        ([0.5, 1.0], "softmax", TypeError, "integers"),
        ([-1, 1], "softmax", ValueError, "labels must be 0 to 1"),
        ([[0], [1]], "logistic", ValueError, r"labels \[n\]"),
        (["a", "b"], "softmax", TypeError, "numbers"),
        ([[[1.0]]], "squared", ValueError, r"\[n\] or \[n, K\]"),
    ],
)
def test_bad_targets(y, loss, error, message):
    with pytest.raises(error, match=message):
        encode_targets(np.array(y), loss)


def test_unknown_loss():
    with pytest.raises(ValueError, match="squared, logistic, softmax"):
        get_loss("hinge")
    own = Loss(lambda f, y: jnp.sum((f - y) ** 4, -1), lambda y, w: jnp.zeros(1))
    assert get_loss(own) is own


def test_traced_labels_need_a_number_of_classes():
    with pytest.raises(ValueError, match="num_classes"):
        jax.jit(lambda y: encode_targets(y, "softmax"))(jnp.array([0, 1]))
    encoded = jax.jit(lambda y: encode_targets(y, "softmax", num_classes=3))(jnp.array([0, 1]))
    np.testing.assert_array_equal(encoded, [[1, 0, 0], [0, 1, 0]])
