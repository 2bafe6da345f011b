"""Weights in 8 bits: the rounding is as the formula says, and the product is that of the rounded matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.compression import dequantize, linear, quantize, quantize_weights, take_rows


@pytest.fixture(scope="module")
def matrix():
    # Rows of very different sizes, each with its own scale.
    size = 10.0 ** jnp.arange(-3, 3)[:, None]
    return size * jax.random.normal(jax.random.key(0), (6, 40))


def test_each_weight_is_off_by_half_a_step_at_most(matrix):
    small = quantize(matrix)
    assert small.q.dtype == jnp.int8
    step = jnp.abs(matrix).max(-1, keepdims=True) / 127
    assert (jnp.abs(dequantize(small) - matrix) <= 0.5001 * step).all()
    assert int(jnp.abs(small.q).max()) == 127
    np.testing.assert_allclose(take_rows(small, jnp.array([[4, 0]])), dequantize(small)[jnp.array([[4, 0]])])


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 70])
def test_products_are_those_of_the_rounded_matrix(matrix, rows):
    x = jax.random.normal(jax.random.key(rows), (rows, 40)) * 10.0 ** jnp.linspace(-4, 4, rows)[:, None]
    small = quantize(matrix)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(small), np.float64).T
    bound = np.abs(x).max(-1, keepdims=True) * np.abs(np.asarray(dequantize(small))).sum(-1)
    # Two pieces hold 1/(2·127·254) of the largest entry of a row; float32 sums lose less.
    assert (np.abs(linear(x, small) - wanted) <= bound / (2 * 127 * 254) + 1e-6 * bound).all()


@pytest.mark.parametrize("rows", [1, 3, 32, 33])
def test_plain_products(matrix, rows):
    x = jax.random.normal(jax.random.key(1), (2, rows, 40))
    bias = jnp.arange(6.0)
    wanted = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T + np.asarray(bias)
    np.testing.assert_allclose(linear(x, matrix, bias), wanted, rtol=1e-5, atol=1e-4)
    half = linear(x.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_zero_rows_and_zero_inputs_give_zero(matrix):
    small = quantize(matrix.at[2].set(0))
    assert not np.asarray(linear(jnp.ones((1, 40)), small))[:, 2].any()
    assert not np.asarray(linear(jnp.zeros((3, 40)), small)).any()


def test_gradient_and_vmap(matrix):
    x = jax.random.normal(jax.random.key(2), (4, 40))
    gradient = jax.grad(lambda x: linear(x, matrix).sum())(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(matrix.sum(0), x.shape), rtol=1e-5, atol=1e-4)
    together = jax.vmap(lambda row: linear(row[None], quantize(matrix))[0])(x)
    np.testing.assert_allclose(together, linear(x, quantize(matrix)), rtol=1e-5, atol=1e-4)


def test_trees():
    tree = {"matrix": jnp.ones((4, 3)), "stack": jnp.ones((2, 4, 3)), "norm": jnp.ones(3)}
    small = quantize_weights(tree)
    assert small["stack"].scale.shape == (2, 4)
    assert small["norm"].dtype == jnp.float32
    assert quantize_weights(tree, "bfloat16")["norm"].dtype == jnp.bfloat16


def test_bad_input(matrix):
    with pytest.raises(ValueError, match="dtype is 'int4', expected 'int8', 'bfloat16' or 'float32'"):
        quantize_weights({"w": matrix}, "int4")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(matrix.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"x has shape .1, 39. and weight .6, 40."):
        linear(jnp.ones((1, 39)), quantize(matrix))
