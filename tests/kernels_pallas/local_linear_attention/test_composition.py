"""Under jit, vmap, sharding and shard_map, values and gradients are those of the plain call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.local_linear_attention import local_linear_attention
from tests.kernels_pallas.local_linear_attention.test_forward import arrays

# float32: sums over keys come in another order; the systems' condition is about 10.
CLOSE = {"rtol": 0, "atol": 2e-5}


def loss_and_grads(q, k, v, ridge):
    def loss(*a):
        out = local_linear_attention(*a[:3], ridge=a[3])
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, ridge)
    return out, *grads


@pytest.fixture(scope="module")
def problem():
    q, k, v = arrays(4, 33, 33, 8, 4)
    ridge = jnp.linspace(0.5, 2.0, 8)
    return (q, k, v, ridge), jax.jit(loss_and_grads)(q, k, v, ridge)


def test_eager_equals_jit(problem):
    inputs, expected = problem
    for got, wanted in zip(loss_and_grads(*inputs), expected, strict=True):
        np.testing.assert_allclose(got, wanted, **CLOSE)


def test_vmap(problem):
    (q, k, v, ridge), (out, *_) = problem
    each = jax.vmap(lambda q, k, v: local_linear_attention(q[None], k[None], v[None], ridge=ridge)[0])(q, k, v)
    np.testing.assert_allclose(each, out, **CLOSE)
    ridges = jnp.array([0.3, 3.0])
    stacked = jax.jit(jax.vmap(lambda r: local_linear_attention(q, k, v, ridge=r)))(ridges)
    for got, r in zip(stacked, ridges, strict=True):
        np.testing.assert_allclose(got, local_linear_attention(q, k, v, ridge=r), **CLOSE)


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "heads"), axis_types=(kind, kind))


@pytest.mark.parametrize("axes", [("data", None), (None, "heads"), ("data", "heads")], ids=str)
def test_named_sharding(problem, axes):
    (q, k, v, ridge), expected = problem
    mesh = mesh_of(AxisType.Auto)
    split = NamedSharding(mesh, P(axes[0], None, axes[1]))
    placed = [jax.device_put(a, split) for a in (q, k, v)]
    found = jax.jit(loss_and_grads)(*placed, jax.device_put(ridge, NamedSharding(mesh, P(axes[1]))))
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, **CLOSE)
    assert "all-gather" not in jax.jit(loss_and_grads).lower(*placed, ridge).compile().as_text()
    assert found[0].sharding.is_equivalent_to(split, 4)  # nothing was gathered on the way out


def test_cholesky_on_eight_devices(problem):
    """LAPACK's calls from several devices of a process wait for each other forever: ours must not need it."""
    (q, k, v, _), _ = problem
    run = jax.jit(functools.partial(local_linear_attention, solver="cholesky"))
    mesh = mesh_of(AxisType.Auto)
    placed = [jax.device_put(a, NamedSharding(mesh, P("data", None, "heads"))) for a in (q, k, v)]
    expected = run(q, k, v)
    for _ in range(5):
        np.testing.assert_allclose(run(*placed), expected, **CLOSE)
    text = run.lower(*placed).compile().as_text()
    assert "all-gather" not in text
    assert "lapack" not in text


def test_shard_map(problem):
    (q, k, v, ridge), expected = problem
    mesh = mesh_of(AxisType.Auto)
    split = P("data", None, "heads")

    def local(q, k, v, ridge):
        out, dq, dk, dv, dridge = loss_and_grads(q, k, v, ridge)
        return out, dq, dk, dv, jax.lax.psum(dridge, "data")

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split, P("heads")), out_specs=(split,) * 4 + (P("heads"),),
        check_vma=False,
    )  # fmt: skip
    for got, wanted in zip(jax.jit(run)(q, k, v, ridge), expected, strict=True):
        np.testing.assert_allclose(got, wanted, **CLOSE)


def test_in_a_scan_over_layers_with_checkpointing(problem):
    (q, k, _, _), _ = problem

    def layer(x, ridge):
        return x + local_linear_attention(x, k, k, ridge=ridge), None

    def loss(x, step):
        return jnp.sum(jax.lax.scan(step, x, jnp.array([0.5, 1.0]))[0] ** 2)

    plain = jax.jit(jax.grad(functools.partial(loss, step=layer)))(q)
    remat = jax.jit(jax.grad(functools.partial(loss, step=jax.checkpoint(layer))))(q)
    np.testing.assert_allclose(remat, plain, rtol=1e-5, atol=1e-4)
