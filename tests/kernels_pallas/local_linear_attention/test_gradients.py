"""Gradients: exact where the paper's code is not, through every differentiable input and output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas.local_linear_attention import local_linear_attention
from tests.kernels_pallas.local_linear_attention.test_forward import CALLS, EXACT, SOLVERS, arrays, by_reference


@pytest.mark.parametrize("options", SOLVERS, ids=lambda o: o.get("preconditioner") or o["solver"])
@pytest.mark.parametrize("case", "abcd")
def test_vectors(x64, vectors, case, options):
    data = vectors("local_linear_attention")
    q, k, v, grad = (jnp.asarray(data[f"{case}_{n}"])[:, :, None] for n in ("q", "k", "v", "grad_out"))
    ridge, scale = data[f"{case}_ridge"][..., None], data[f"{case}_scale"]

    def loss(q, k, v, ridge):
        return jnp.sum(local_linear_attention(q, k, v, ridge=ridge, scale=scale, **options) * grad)

    found = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, jnp.asarray(ridge))
    for name, got in zip(("dq", "dk", "dv", "dridge"), found, strict=True):
        np.testing.assert_allclose(got[:, :, 0], data[f"{case}_{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", "abc")
def test_the_papers_code_is_not_the_gradient_of_its_forward(x64, vectors, case):
    """It takes λω for a constant. A directional derivative by differences decides: ours agrees, theirs does not."""
    data = vectors("local_linear_attention")
    q, k, v, grad = (jnp.asarray(data[f"{case}_{n}"])[:, :, None] for n in ("q", "k", "v", "grad_out"))
    direction = jax.random.normal(jax.random.key(0), q.shape)

    def loss(step):
        moved = q + step * direction
        out = local_linear_attention(
            moved, k, v, ridge=data[f"{case}_ridge"][..., None], scale=data[f"{case}_scale"], solver="cholesky"
        )
        return float(jnp.sum(out * grad))

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    ours = float(np.sum(data[f"{case}_dq"][:, :, None] * direction))
    theirs = float(np.sum(data[f"{case}_dq_reference_kernel"][:, :, None] * direction))
    assert ours == pytest.approx(numeric, rel=1e-6)  # central differences: 1e-10 of curvature, 1e-11 of rounding
    for name in ("dq", "dk"):
        exact, reference = data[f"{case}_{name}"], data[f"{case}_{name}_reference_kernel"]
        assert 0.08 < np.abs(reference - exact).max() / np.abs(exact).max() < 0.36
    assert abs(theirs - numeric) > 100 * abs(ours - numeric)


@pytest.mark.parametrize("name", CALLS)
def test_equals_autodiff_of_the_reference(x64, name):
    options = dict(CALLS[name])
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays())
    ridge = jnp.broadcast_to(jnp.asarray(options.pop("ridge", 0.7), jnp.float64), q.shape[:3])
    probe = options.pop("probe", None)
    probe = None if probe is None else probe.astype(jnp.float64)
    scale = jnp.float64(0.4)
    weights = [jax.random.normal(jax.random.key(i), s, jnp.float64) for i, s in enumerate([(2, 7, 4, 3), q.shape])]
    row_weights = jax.random.normal(jax.random.key(7), q.shape[:3], jnp.float64)

    def total(out, x, lse):
        # Rows without keys have lse −inf: no loss may use them.
        seen = lse > -jnp.inf
        return jnp.sum(out * weights[0]) + jnp.sum(x * weights[1]) + jnp.sum(jnp.where(seen, lse, 0) * row_weights)

    def ours(q, k, v, ridge, scale, probe):
        offset = options.get("offset", 0)
        rest = {n: o for n, o in options.items() if n != "offset"}
        out, state = local_linear_attention(
            q, k, v, ridge=ridge, scale=scale, query_offset=offset, probe=probe, return_state=True, **rest, **EXACT
        )
        return total(out, state.x, state.lse)

    def theirs(q, k, v, ridge, scale, probe):
        found = by_reference(q, k, v, ridge=ridge, scale=scale, probe=probe, **options)
        return total(found.out, found.x, found.lse)

    wanted = (0, 1, 2, 3, 4) if probe is None else (0, 1, 2, 3, 4, 5)
    got = jax.jit(jax.grad(ours, argnums=wanted))(q, k, v, ridge, scale, probe)
    expected = jax.jit(jax.grad(theirs, argnums=wanted))(q, k, v, ridge, scale, probe)
    for a, b in zip(got, expected, strict=True):
        # Autodiff of a naive softmax gives NaN for rows that see no key; ours gives zero there.
        np.testing.assert_allclose(a, np.where(np.isnan(b), 0, b), rtol=0, atol=1e-9)


def test_check_grads(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 5, 6, 2, 1, 3, 2))

    def function(*arrays):
        q, k, v, ridge, scale = map(jnp.asarray, arrays)
        return local_linear_attention(q, k, v, ridge=ridge, scale=scale, query_offset=1, **EXACT)

    check_grads(function, (q, k, v, jnp.float64(0.5), jnp.float64(0.6)), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_normalised_queries_differentiate(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 5, 6, 2, 1, 3, 2))
    check_grads(
        lambda q, k: local_linear_attention(jnp.asarray(q), jnp.asarray(k), v, scale=2.0, normalize_qk=True, **EXACT),
        (q, k), order=1, modes=["rev"], atol=1e-6, rtol=1e-6,
    )  # fmt: skip


def test_several_tiles(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 300, 331, 2, 1))

    def loss(function):
        return lambda *a: jnp.sum(jnp.sin(function(*a)))

    ours = jax.jit(jax.grad(loss(lambda *a: local_linear_attention(*a, **EXACT)), argnums=(0, 1, 2)))(q, k, v)
    theirs = jax.jit(jax.grad(loss(lambda *a: by_reference(*a).out), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_second_derivatives_are_refused(solver):
    q, k, v = arrays(1, 5, 6, 2, 1, 3, 2)

    def slope(q):
        return jnp.sum(jax.grad(lambda q: jnp.sum(local_linear_attention(q, k, v, solver=solver) ** 2))(q) ** 2)

    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.grad(slope)(q)


def test_first_row_has_no_gradient_to_query_and_key(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 1, 1, 2, 1))
    dq, dk = jax.grad(lambda q, k: jnp.sum(local_linear_attention(q, k, v) ** 2), argnums=(0, 1))(q, k)
    np.testing.assert_allclose(dq, 0, atol=1e-12)
    np.testing.assert_allclose(dk, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3), (jnp.float32, 5e-5)],
    ids=["bf16", "fp16", "fp32"],
)
def test_low_precision(dtype, tolerance):
    """Gradients carry the rounding of inputs and of themselves (2⁻⁹, 2⁻¹², 2⁻²⁴ relative) and no more."""
    q, k, v = (a.astype(dtype) for a in arrays(1, 150, 150, 2, 1, 16, 8))
    wide = [a.astype(jnp.float32) for a in (q, k, v)]

    def loss(q, k, v):
        return jnp.sum(local_linear_attention(q, k, v, max_iters=64).astype(jnp.float32) ** 2)

    for got, exact in zip(jax.grad(loss, (0, 1, 2))(q, k, v), jax.grad(loss, (0, 1, 2))(*wide), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=0, atol=tolerance * float(jnp.abs(exact).max()))
