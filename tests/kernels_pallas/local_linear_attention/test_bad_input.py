"""What is wrong with a call is named; what is wrong with a row stays in its row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.local_linear_attention import lla_finish, lla_merge, lla_partial, local_linear_attention
from kernels_pallas.local_linear_attention import local_linear_decode as decode
from tests.kernels_pallas.local_linear_attention.test_forward import arrays

Q, K, V = arrays(2, 7, 7, 4, 2, 5, 3)

WRONG = {
    "heads": (lambda: (Q[:, :, :3], K, V, {}), "query has 3 heads, which the 2 heads of key do not divide"),
    "head size": (lambda: (Q[..., :4], K, V, {}), "query has head size 4, but key has 5"),
    "values": (lambda: (Q, K, V[:, :6], {}), r"value has shape \(2, 6, 2, 3\), expected \(2, 7, 2\) before"),
    "batch": (lambda: (Q[:1], K, V, {}), "have batches 1, 2, 2"),
    "empty": (lambda: (Q, K[:, :0], V[:, :0], {}), "one is empty"),
    "short keys": (lambda: (Q, K[:, :5], V[:, :5], {}), "key has 5 positions, fewer than the 7 of query.*such as -2"),
    "ridge 0": (lambda: (Q, K, V, {"ridge": 0.0}), "ridge is 0 somewhere, expected positive"),
    "ridge < 0": (lambda: (Q, K, V, {"ridge": np.array([1.0, -1.0, 1.0, 1.0])}), "ridge is -1 somewhere"),
    "ridge NaN": (lambda: (Q, K, V, {"ridge": float("nan")}), "ridge is nan somewhere"),
    "ridge shape": (lambda: (Q, K, V, {"ridge": jnp.ones(3)}), r"ridge has shape \(3,\), expected .*\(2, 7, 4\)"),
    "ridge axes": (lambda: (Q, K, V, {"ridge": jnp.ones((1, 2, 7, 4))}), r"ridge has shape \(1, 2, 7, 4\)"),
    "mask shape": (lambda: (Q, K, V, {"mask": jnp.ones((2, 3, 7, 7), bool)}), r"mask has shape \(2, 3, 7, 7\)"),
    "mask axes": (lambda: (Q, K, V, {"mask": jnp.ones((7, 7), bool)}), r"mask has shape \(7, 7\), expected four axes"),
    "solver": (lambda: (Q, K, V, {"solver": "lu"}), "solver is 'lu', expected one of cg, cholesky"),
    "preconditioner": (lambda: (Q, K, V, {"preconditioner": "ilu"}), "preconditioner is 'ilu'"),
    "both": (lambda: (Q, K, V, {"preconditioner": "jacobi", "solver": "cholesky"}), "only solver 'cg' has"),
    "max_iters": (lambda: (Q, K, V, {"max_iters": 0}), "max_iters is 0, expected an integer of at least 1"),
    "rtol": (lambda: (Q, K, V, {"rtol": -1.0}), "rtol is -1.0"),
    "scale": (lambda: (Q, K, V, {"scale": float("inf")}), "scale is inf, expected a finite number"),
    "scale shape": (lambda: (Q, K, V, {"scale": jnp.ones(4)}), r"scale has shape \(4,\)"),
    "offset": (lambda: (Q, K, V, {"query_offset": 1.5}), "query_offset is 1.5, expected one integer"),
    "probe": (lambda: (Q, K, V, {"probe": Q[:, :3]}), r"probe has shape \(2, 3, 4, 5\)"),
    "implementation": (lambda: (Q, K, V, {"implementation": "triton"}), "implementation is 'triton', expected one of"),
    "kernel on CPU": (lambda: (Q, K, V, {"implementation": "pallas_tpu"}), "cannot run on platform 'cpu'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    make, message = WRONG[name]
    q, k, v, options = make()
    with pytest.raises(ValueError, match=message):
        local_linear_attention(q, k, v, **options)


def test_wrong_steps():
    q = Q[:, :1]
    with pytest.raises(ValueError, match="query has 7 positions, expected one"):
        decode(Q, K, V)
    with pytest.raises(ValueError, match=r"length is \[8, 3\], expected 0 up to the 7 positions"):
        decode(q, K, V, length=np.array([8, 3]))
    with pytest.raises(ValueError, match=r"length is 2\.5"):
        decode(q, K, V, length=2.5)
    with pytest.raises(ValueError, match=r"ridge is 0 somewhere"):
        decode(q, K, V, ridge=0)
    with pytest.raises(ValueError, match="implementation is 'cuda', expected one of"):
        decode(q, K, V, implementation="cuda")
    for function in (decode, lla_partial):
        with pytest.raises(ValueError, match="'pallas_gpu', which cannot run on platform 'cpu'"):
            function(q, K, V, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="solver is 'qr'"):
        decode(q, K, V, solver="qr")
    with pytest.raises(ValueError, match="max_iters is 0"):
        decode(q, K, V, max_iters=0)
    with pytest.raises(ValueError, match="the parts have shapes"):
        lla_merge(lla_partial(q, K, V), lla_partial(q[:1], K[:1], V[:1]))
    with pytest.raises(ValueError, match="does not fit moments"):
        lla_finish(lla_partial(q, K, V), q[:, :, :2])


def test_wrong_dtypes():
    with pytest.raises(ValueError, match=r"key has shape \(7, 2, 5\), expected four axes"):
        unchecked()(Q, K[0], V)
    with pytest.raises(TypeError, match="mask has dtype"):
        jax.eval_shape(lambda m: unchecked()(Q, K, V, mask=m), jnp.ones((2, 4, 7, 7), jnp.int32))
    with pytest.raises(TypeError, match="key has dtype int32, expected a real floating type"):
        unchecked()(Q, K.astype(jnp.int32), V)


def unchecked():
    """The function without the suite's run-time type checks, as users call it."""
    return (
        local_linear_attention.__wrapped__ if hasattr(local_linear_attention, "__wrapped__") else local_linear_attention
    )


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_rows_that_see_nothing_are_zero(solver):
    mask = jnp.ones((2, 1, 7, 7), bool).at[0, 0, 3].set(False)

    def function(q, k, v, ridge):
        return local_linear_attention(q, k, v, ridge=ridge, mask=mask, solver=solver, return_state=True)

    out, state = function(Q, K, V, 1.0)
    assert (out[0, 3] == 0).all()
    assert (state.x[0, 3] == 0).all()
    assert (state.lse[0, 3] == -jnp.inf).all()
    grads = jax.grad(lambda *a: jnp.sum(function(*a)[0] ** 2), argnums=(0, 1, 2, 3))(Q, K, V, jnp.float32(1.0))
    assert all(jnp.isfinite(g).all() for g in grads)
    assert (grads[0][0, 3] == 0).all()


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_nan_stays_in_its_row(solver):
    run = jax.jit(functools.partial(local_linear_attention, solver=solver))
    out, clean = run(Q.at[0, 2, 1, 0].set(jnp.nan), K, V), run(Q, K, V)
    assert jnp.isnan(out[0, 2, 1]).all()
    others = jnp.ones(out.shape[:3], bool).at[0, 2, 1].set(False)[..., None]
    np.testing.assert_allclose(jnp.where(others, out, 0), jnp.where(others, clean, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize("rubbish", [1e30, jnp.nan, jnp.inf], ids=str)
def test_keys_that_no_query_sees_are_never_used(solver, rubbish):
    """A cache that is filled to its fifth slot, read through an offset or a mask."""
    q = Q[:, :3]
    visible = {"query_offset": 2}, {"mask": (jnp.arange(7) < 5)[None, None, None], "query_offset": 4}

    def function(q, k, v, options):
        out = local_linear_attention(q, k, v, solver=solver, **options)
        return jnp.sum(out**2), out

    for options in visible:
        dirty = [a.at[:, 5:].set(rubbish) for a in (K, V)]
        results = [jax.grad(function, argnums=(0, 1, 2), has_aux=True)(q, k, v, options)
                   for k, v in ((K, V), dirty)]  # fmt: skip
        for clean, got in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
            np.testing.assert_allclose(got, clean, rtol=0, atol=1e-6)


def test_large_logits_are_fine():
    out = local_linear_attention(60 * Q, 60 * K, V, ridge=0.1)
    assert jnp.isfinite(out).all()
    grads = jax.grad(lambda q: local_linear_attention(q, 60 * K, V, ridge=0.1).sum())(60 * Q)
    assert jnp.isfinite(grads).all()
