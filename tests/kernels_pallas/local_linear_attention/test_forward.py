"""Values of local linear attention: vectors, closed forms, limits, invariances, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from kernels_pallas.local_linear_attention import local_linear_attention
from kernels_pallas.local_linear_attention.problem import Inputs, Options
from kernels_pallas.local_linear_attention.reference import forward as reference
from kernels_pallas.local_linear_attention.reference import naive
from kernels_pallas.local_linear_attention.solve import CHUNK

# float64: CG stops at a relative residual of rtol; the systems' condition numbers are below 1e3.
EXACT = {"max_iters": 100, "rtol": 1e-13}
SOLVERS = ({"solver": "cg", **EXACT}, {"solver": "cg", "preconditioner": "jacobi", **EXACT}, {"solver": "cholesky"})


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def arrays(batch=2, queries=7, keys=11, heads=4, kv_heads=2, size=5, value_size=3):
    q = random(batch, queries, heads, size, seed=1)
    k, v = random(batch, keys, kv_heads, size, seed=2), random(batch, keys, kv_heads, value_size, seed=3)
    return q, k, v


run_reference = jax.jit(reference, static_argnums=1)  # its equations one by one would compile one by one


def by_reference(q, k, v, ridge=1.0, scale=None, is_causal=True, offset=0, mask=None, probe=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    full = jnp.broadcast_to(jnp.asarray(ridge, q.dtype), q.shape[:3])
    inputs = Inputs(q, k, v, jnp.asarray(scale, q.dtype), full, jnp.int32(offset), mask, probe)
    return run_reference(inputs, Options(is_causal=is_causal, solve=probe is None))


@pytest.mark.parametrize("options", SOLVERS, ids=lambda o: o.get("preconditioner") or o["solver"])
@pytest.mark.parametrize("case", "abcd")
def test_vectors(x64, vectors, case, options):
    data = vectors("local_linear_attention")
    q, k, v = (jnp.asarray(data[f"{case}_{n}"])[:, :, None] for n in "qkv")
    out, state = local_linear_attention(
        q, k, v, ridge=data[f"{case}_ridge"][..., None], scale=data[f"{case}_scale"], return_state=True, **options
    )
    np.testing.assert_allclose(out[:, :, 0], data[f"{case}_out"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(state.x[:, :, 0], data[f"{case}_x"], rtol=0, atol=1e-10)
    lse = data[f"{case}_m"] + np.log(data[f"{case}_omega"])
    np.testing.assert_allclose(state.lse[:, :, 0], lse, rtol=0, atol=1e-12)


def test_the_papers_uncentred_solution_is_ours(x64, vectors):
    """It is x = −(ω/d) ρ: so the centred form is the paper's, without its denominator d."""
    data = vectors("local_linear_attention")
    for case in "abcd":
        x = -(data[f"{case}_omega"] / data[f"{case}_denom"])[..., None] * data[f"{case}_rho"]
        np.testing.assert_allclose(x, data[f"{case}_x"], rtol=0, atol=1e-10)


CALLS = {
    "causal": {},
    "not causal": {"is_causal": False},
    "offset": {"offset": 4},
    "before": {"offset": -1},
    "ridges": {"ridge": jnp.array([0.1, 1.0, 3.0, 10.0])},
    "mask": {"mask": jax.random.bernoulli(jax.random.key(5), 0.6, (2, 4, 7, 11)), "is_causal": False},
    "mask per head": {"mask": jax.random.bernoulli(jax.random.key(6), 0.6, (1, 4, 1, 11))},
    "mask of keys": {"mask": jnp.arange(11)[None, None, None] % 3 > 0, "offset": 4},
    "mask of rows": {"mask": jnp.arange(7)[None, None, :, None] % 2 > 0, "is_causal": False},
    "probe": {"probe": random(2, 7, 4, 5, seed=9)},
}


def call(q, k, v, offset=0, **options):
    return local_linear_attention(q, k, v, query_offset=offset, return_state=True, **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_equals_the_reference(x64, name, solver):
    options = {n: jnp.asarray(a, jnp.float64) if n in ("ridge", "probe") else a for n, a in CALLS[name].items()}
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays())
    expected = by_reference(q, k, v, **options)
    out, state = call(q, k, v, solver=solver, **EXACT, **options)
    for got, wanted in ((out, expected.out), (state.x, expected.x), (state.lse, expected.lse)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)
    traced = {n: options[n] for n in options if n == "offset"}
    fixed = {n: options[n] for n in options if n != "offset"}
    jitted = jax.jit(functools.partial(call, solver=solver, **EXACT, **fixed))
    np.testing.assert_allclose(jitted(q, k, v, **traced)[0], out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_several_tiles_and_stretches(x64, solver):
    """More queries than a tile, an odd number of them, and keys beyond several chunks of outer products."""
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 300, 2 * CHUNK + 75, 2, 1))
    keys = k.shape[1]
    for offset in (0, keys - 300):
        expected = by_reference(q, k, v, offset=offset).out
        out = jax.jit(lambda q, k, v: call(q, k, v, offset=offset, solver=solver, **EXACT)[0])(q, k, v)  # noqa: B023
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)


def test_rows_are_weighted_ridge_regressions(x64):
    """scikit-learn fits the same line: its intercept, with keys measured from the query, is the output."""
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 4, 30, 1, 1))
    out = local_linear_attention(q, k, v, ridge=0.3, is_causal=False, **EXACT)
    for row in range(4):
        logits = np.asarray(k[0, :, 0] @ q[0, row, 0]) * 5**-0.5
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        fit = Ridge(alpha=0.3).fit(np.asarray(k[0, :, 0] - q[0, row, 0]), np.asarray(v[0, :, 0]), sample_weight=weights)
        np.testing.assert_allclose(out[0, row, 0], fit.intercept_, rtol=0, atol=1e-10)


def test_a_large_ridge_is_softmax_attention(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(value_size=5))
    softmax = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    gaps = [float(jnp.abs(local_linear_attention(q, k, v, ridge=r) - softmax).max()) for r in (1e2, 1e4, 1e6)]
    # The difference falls as 1/ridge: a hundredth at each step, up to terms of second order.
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(100, rel=0.01)


def test_without_weights_it_is_ridge_regression(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 6, 40, 1, 1))
    out = local_linear_attention(q, k, v, ridge=0.2, scale=0.0, is_causal=False, **EXACT)
    fit = Ridge(alpha=0.2 * 40).fit(k[0, :, 0], v[0, :, 0])  # our weights sum to one, theirs to 40
    np.testing.assert_allclose(out[0, :, 0], fit.predict(q[0, :, 0]), rtol=0, atol=1e-10)
    tiny = local_linear_attention(q, k, v, ridge=1e-9, scale=0.0, is_causal=False, solver="cholesky")
    line = LinearRegression().fit(k[0, :, 0], v[0, :, 0]).predict(q[0, :, 0])
    np.testing.assert_allclose(tiny[0, :, 0], line, rtol=0, atol=1e-7)


def test_affine_and_constant_values_are_reproduced(x64):
    q, k, _ = (jnp.asarray(a, jnp.float64) for a in arrays(1, 6, 40, 1, 1))
    matrix, shift = random(5, 3, seed=7).astype(jnp.float64), random(3, seed=8).astype(jnp.float64)
    out = local_linear_attention(q, k, k @ matrix + shift, ridge=1e-9, is_causal=False, solver="cholesky")
    np.testing.assert_allclose(out, q @ matrix + shift, rtol=0, atol=1e-6)  # the bias is of the order of the ridge
    constant = local_linear_attention(q, k, jnp.full((1, 40, 1, 3), 2.5), ridge=0.1)
    np.testing.assert_allclose(constant, 2.5, rtol=0, atol=1e-12)


def test_invariances(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays())
    out = local_linear_attention(q, k, v, is_causal=False, **EXACT)
    order = jax.random.permutation(jax.random.key(0), 11)
    shuffled = local_linear_attention(q, k[:, order], v[:, order], is_causal=False, **EXACT)
    np.testing.assert_allclose(shuffled, out, rtol=0, atol=1e-11)
    # A part of the key that all keys share shifts all logits of a row alike, and q − k̄ not at all if q shares it.
    both = [jnp.concatenate([a, jnp.full((*a.shape[:-1], 1), 3.0)], -1) for a in (q, k)]
    same = local_linear_attention(*both, v, scale=5**-0.5, is_causal=False, **EXACT)
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-11)


def test_the_first_causal_row_is_the_first_value():
    q, k, v = arrays()
    np.testing.assert_allclose(local_linear_attention(q, k, v)[:, 0], jnp.repeat(v[:, 0], 2, 1), rtol=0, atol=1e-6)
    assert local_linear_attention(q[:, :1], k[:, :1], v[:, :1]).shape == (2, 1, 4, 3)


def test_normalize_qk_is_normalising_first(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays())
    unit = [a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k)]
    expected = local_linear_attention(*unit, v, scale=4.0)
    got = local_linear_attention(q, k, v, scale=4.0, normalize_qk=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    zero = local_linear_attention(q.at[0, 3].set(0), k, v, normalize_qk=True)
    assert jnp.isfinite(zero).all()


def test_naive_is_the_same_function(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(heads=2, keys=7))
    np.testing.assert_allclose(naive(q, k, v, 0.5), local_linear_attention(q, k, v, ridge=0.5, **EXACT), atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Inputs are rounded to the dtype (relative 2⁻⁹ and 2⁻¹²), and the output once more; all between is float32.
    [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3), (jnp.float32, 2e-5)],
    ids=["bf16", "fp16", "fp32"],
)
def test_low_precision(dtype, tolerance):
    q, k, v = arrays(1, 200, 200, 2, 1, 32, 16)
    exact = by_reference(q, k, v, ridge=0.1).out
    rounded = [a.astype(dtype) for a in (q, k, v)]
    out = local_linear_attention(*rounded, ridge=0.1, max_iters=64)
    assert out.dtype == dtype
    scale = float(jnp.abs(exact).max())
    assert float(jnp.abs(out.astype(jnp.float32) - exact).max()) < tolerance * scale
    # The solve adds nothing to the rounding of the inputs: the reference on rounded inputs is met at float32's error,
    # up to the output's own rounding.
    same = by_reference(*(a.astype(jnp.float32) for a in rounded), ridge=0.1).out.astype(dtype).astype(jnp.float32)
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(jnp.float32), same, rtol=2 * unit, atol=2e-5 * scale)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_keys_with_a_large_mean_lose_only_what_float32_cannot_hold(solver):
    q, k, v = arrays(1, 40, 60, 2, 1, 8, 4)
    far = [a + 1000.0 for a in (q, k)]
    out = local_linear_attention(*far, v, ridge=0.1, scale=1e-6, is_causal=False, solver=solver)
    with jax.enable_x64(True):
        exact = by_reference(*(jnp.asarray(a, jnp.float64) for a in (*far, v)), ridge=0.1, scale=1e-6, is_causal=False)
    # Keys are given to 2⁻²⁴ · 1000 = 6e-5; raw second moments would lose 2⁻²⁴ · 1000² = 6 % of a unit.
    np.testing.assert_allclose(out, exact.out, rtol=0, atol=1e-3)


def test_iterations_stop_early_and_say_so():
    q, k, v = arrays(1, 300, 300, 1, 1, 16, 4)
    easy = local_linear_attention(q, k, v, ridge=100.0, return_state=True)[1].iterations
    hard = local_linear_attention(q, k, v, ridge=0.01, max_iters=40, return_state=True)[1].iterations
    assert 1 <= int(easy.max()) <= 6
    assert int(hard.max()) > int(easy.max())
    assert int(local_linear_attention(q, k, v, ridge=0.01, max_iters=3, return_state=True)[1].iterations.max()) == 3
    assert int(local_linear_attention(q, k, v, solver="cholesky", return_state=True)[1].iterations.max()) == 0
    assert (easy[0, :128, 0] == easy[0, 0, 0]).all()  # a tile's rows stop together


def test_more_iterations_come_closer(x64):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(1, 60, 60, 1, 1, 16, 4))
    exact = local_linear_attention(q, k, v, ridge=0.1, solver="cholesky")
    gaps = [
        float(jnp.abs(local_linear_attention(q, k, v, ridge=0.1, max_iters=n, rtol=0) - exact).max())
        for n in (2, 6, 12, 24)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6 < gaps[0]


@pytest.mark.slow
def test_scratch_is_linear_in_length():
    def scratch(length):
        shape = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
        return jax.jit(local_linear_attention).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    small, large = scratch(1024), scratch(2048)
    assert large < 100e6  # the bound: [T, H, H] for 8 heads would be 268 MB
    assert large < 2.5 * small
