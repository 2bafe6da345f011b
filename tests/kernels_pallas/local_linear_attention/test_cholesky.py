"""The solve of many small systems that lie along the last axis, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.local_linear_attention.cholesky import PANEL, solve_positive
from kernels_pallas.local_linear_attention.solve import COLUMNS, System, matrices


def problem(size, batch=(2,), systems=3):
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((*batch, systems, size, size + 2))
    return roots @ roots.swapaxes(-1, -2) + 0.1 * np.eye(size), rng.standard_normal((*batch, systems, size))


@pytest.mark.parametrize("size", [1, 3, PANEL, PANEL + 1, 3 * PANEL - 2])
def test_equals_numpy(x64, size):
    a, b = problem(size)
    # What lies above the diagonal is not used, whatever it is.
    lower = jnp.moveaxis(jnp.asarray(np.where(np.tri(size) > 0, a, np.nan)), 1, -1)
    x = jax.jit(solve_positive)(lower, jnp.moveaxis(jnp.asarray(b), 1, -1))
    # float64 times the condition of the systems, at most about 1e4.
    np.testing.assert_allclose(np.moveaxis(x, -1, 1), np.linalg.solve(a, b[..., None])[..., 0], rtol=0, atol=1e-10)


def test_a_system_that_is_not_positive_definite_is_alone_with_it(x64):
    a, b = problem(12)
    bad = a.copy()
    bad[1, 2, 5, 5] = -1.0
    good, x = (jax.jit(solve_positive)(jnp.moveaxis(jnp.asarray(m), 1, -1), jnp.moveaxis(jnp.asarray(b), 1, -1))
               for m in (a, bad))  # fmt: skip
    assert jnp.isnan(x[1, :, 2]).any()
    others = np.ones((2, 12, 3), bool)
    others[1, :, 2] = False
    np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(good)[others])


@pytest.mark.parametrize("size", [3, COLUMNS + 5])
def test_matrices_are_covariances_plus_ridge(x64, size):
    rng = np.random.default_rng(1)
    p, k, ridge = rng.random((2, 4, 150)), rng.standard_normal((2, 150, size)), rng.random((2, 4, 1))
    p /= p.sum(-1, keepdims=True)
    mean = p @ k
    a = jax.jit(matrices)(System(*map(jnp.asarray, (p, k, mean, ridge))))
    centred = k[:, None] - mean[:, :, None]
    expected = np.einsum("brs,brsh,brsg->bhgr", p, centred, centred)
    expected += ridge.swapaxes(1, 2)[:, None] * np.eye(size)[..., None]
    lower = np.tri(size, dtype=bool)
    np.testing.assert_allclose(np.asarray(a)[:, lower], expected[:, lower], rtol=0, atol=1e-12)
