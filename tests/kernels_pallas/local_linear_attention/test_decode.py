"""Decoding: one pass over the cache, in parts if need be, equals the full call's last row."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas.local_linear_attention import (
    lla_finish,
    lla_merge,
    lla_partial,
    local_linear_attention,
    local_linear_decode,
)
from kernels_pallas.local_linear_attention.decode import CHUNK
from kernels_pallas.local_linear_attention.problem import Options
from kernels_pallas.local_linear_attention.vjp import Step, decode_step
from tests.kernels_pallas.local_linear_attention.test_forward import EXACT, arrays


def step(keys=11, **sizes):
    q, k, v = (jnp.asarray(a, jnp.float64) for a in arrays(queries=1, keys=keys, **sizes))
    return q, k, v


@pytest.mark.parametrize("options", [EXACT, {"solver": "cholesky"}, {"preconditioner": "jacobi", **EXACT}], ids=str)
def test_vectors(x64, vectors, options):
    data = vectors("local_linear_attention")
    q, k, v = (jnp.asarray(data[f"dec_{n}"]) for n in "qkv")
    out = local_linear_decode(q, k, v, ridge=float(data["dec_ridge"]), **options)
    np.testing.assert_allclose(out, data["dec_out"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("keys", [11, CHUNK, 2 * CHUNK + 13], ids=["one chunk", "whole chunks", "odd"])
def test_equals_the_full_call(x64, keys):
    q, k, v = step(keys)
    lengths = jnp.array([keys, keys // 2 + 1])
    ridge = jnp.array([0.2, 1.0, 2.0, 5.0], jnp.float64)
    out = jax.jit(functools.partial(local_linear_decode, ridge=ridge, **EXACT))(q, k, v, length=lengths)
    for row, length in enumerate(lengths.tolist()):
        part = (q[row : row + 1], k[row : row + 1, :length], v[row : row + 1, :length])
        full = local_linear_attention(*part, ridge=ridge, is_causal=False, **EXACT)
        np.testing.assert_allclose(out[row], full[0], rtol=0, atol=1e-10)


def test_unused_slots_are_never_used(x64):
    q, k, v = step(40)
    for rubbish in (1e30, jnp.nan, jnp.inf):
        dirty = [a.at[:, 9:].set(rubbish) for a in (k, v)]
        out = local_linear_decode(q, *dirty, length=9)
        np.testing.assert_array_equal(out, local_linear_decode(q, k, v, length=9))
    assert (local_linear_decode(q, k, v, length=0) == 0).all()
    mixed = local_linear_decode(q, k, v, length=jnp.array([0, 9]))
    assert (mixed[0] == 0).all()
    assert jnp.isfinite(mixed).all()


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 30), (0, 17)], ids=str)
def test_parts_merge(x64, cuts):
    q, k, v = step(40)
    edges = [0, *cuts, 40]
    states = [
        lla_partial(q, k[:, a : max(b, a + 1)], v[:, a : max(b, a + 1)], length=b - a)
        for a, b in itertools.pairwise(edges)
    ]
    expected = local_linear_decode(q, k, v, ridge=0.3, **EXACT)
    for order in (states, states[::-1]):
        out = lla_finish(functools.reduce(lla_merge, order), q, ridge=0.3, **EXACT)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-11)


def test_parts_on_several_devices_merge(x64):
    """A cache that is cut over eight devices: each makes its moments, which are all that is exchanged."""
    q, k, v = step(64, batch=1, heads=2, kv_heads=1)
    mesh = jax.make_mesh((8,), ("part",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.PartitionSpec(None, "part")

    def local(q, k, v):
        states = jax.lax.all_gather(lla_partial(q, k, v), "part")
        parts = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(8)]
        return lla_finish(functools.reduce(lla_merge, parts), q, **EXACT)

    whole = jax.sharding.PartitionSpec()
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(whole, cut, cut), out_specs=whole, check_vma=False))
    np.testing.assert_allclose(run(q, k, v), local_linear_decode(q, k, v, **EXACT), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The state is float32 (2⁻²⁴, times the condition of the system, about 30); then the rounding of the output.
    [(jnp.bfloat16, 8e-3), (jnp.float16, 1e-3), (jnp.float32, 2e-5)],
    ids=["bf16", "fp16", "fp32"],
)
def test_low_precision(dtype, tolerance):
    q, k, v = (a.astype(dtype) for a in arrays(queries=1, keys=300, size=16))
    out = local_linear_decode(q, k, v, ridge=0.3)
    with jax.enable_x64(True):
        exact = local_linear_decode(*(a.astype(jnp.float64) for a in (q, k, v)), ridge=0.3, **EXACT)
    assert out.dtype == dtype
    gap = np.abs(np.asarray(out, np.float64) - np.asarray(exact))
    assert gap.max() < tolerance * np.abs(np.asarray(exact)).max()


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_decoding_differentiates(x64, solver):
    q, k, v = step(6, batch=1, heads=2, kv_heads=1, size=3, value_size=2)

    @jax.jit
    def function(q, k, v, ridge):
        return local_linear_decode(q, k, v, ridge=ridge, length=5, solver=solver, rtol=1e-13)

    check_grads(function, (q, k, v, jnp.float64(0.5)), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_kernels_borrow_the_gradient():
    """The TPU kernel in interpret mode: its own value, and the gradient of XLA's version."""
    q, k, v = arrays(1, 1, 20, 2, 1, 8, 8)
    arguments = Step(q[:, 0], k, v, jnp.array([17], jnp.int32), jnp.float32(0.3), jnp.full((1, 2), 0.5))

    def loss(name, step):
        return jnp.sum(jnp.sin(decode_step(name, Options(is_causal=False), name != "xla", step)))

    values = [jax.value_and_grad(functools.partial(loss, name), allow_int=True)(arguments)
              for name in ("xla", "pallas_tpu")]  # fmt: skip
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-5)
    for name in ("q", "k", "v", "scale", "ridge"):
        wanted, got = (getattr(grads, name) for _, grads in values)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * float(jnp.abs(wanted).max()))
        assert jnp.abs(wanted).max() > 0


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_nan_stays_in_its_row(solver):
    q, k, v = arrays(queries=1)
    clean, out = (local_linear_decode(a, k, v, solver=solver) for a in (q, q.at[1, 0, 2, 0].set(jnp.nan)))
    assert jnp.isnan(out[1, 0, 2]).all()
    others = jnp.ones((2, 4), bool).at[1, 2].set(False)
    np.testing.assert_allclose(out[:, 0][others], clean[:, 0][others], rtol=0, atol=1e-6)


def test_sharded_over_batch_and_heads(x64):
    q, k, v = step(30, batch=2, heads=8, kv_heads=4)
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "heads"))
    out = jax.jit(functools.partial(local_linear_decode, **EXACT))(*(jax.device_put(a, split) for a in (q, k, v)))
    np.testing.assert_allclose(out, local_linear_decode(q, k, v, **EXACT), rtol=0, atol=1e-11)
    assert out.sharding.is_equivalent_to(split, 4)
