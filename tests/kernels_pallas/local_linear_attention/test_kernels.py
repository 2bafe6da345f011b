"""What the kernels of both chips have in common, interpreted: the custom gradient under transformations, merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels_pallas.local_linear_attention import decode, gpu, gpu_decode, tpu, tpu_decode
from kernels_pallas.local_linear_attention.problem import Cotangents, Inputs, Options
from kernels_pallas.local_linear_attention.vjp import attend
from tests.kernels_pallas.local_linear_attention.problems import cache, error, expected_step, problem

NAMES = ("q", "k", "v", "ridge")


def _loss(name: str, inputs: Inputs, *arrays: jax.Array) -> jax.Array:
    result = attend(name, Options(), name != "xla", inputs._replace(**dict(zip(NAMES, arrays, strict=True))))
    return jnp.sum(result.out**2) + jnp.sum(result.lse)


@functools.cache
def sharded_problem() -> tuple[Inputs, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    inputs = problem("float32", (8, 20, 20, 4, 2, 16, 16))
    arrays = tuple(getattr(inputs, name) for name in NAMES)
    wanted = jax.jit(jax.grad(functools.partial(_loss, "xla", inputs), range(4)))(*arrays)
    return inputs, arrays, wanted


def _assert_same(actual: tuple[jax.Array, ...], wanted: tuple[jax.Array, ...]) -> None:
    for name, a, b in zip(NAMES, actual, wanted, strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-4, name  # both in float32, by different sums


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_under_vmap_through_the_custom_gradient(name):
    inputs, arrays, wanted = sharded_problem()
    one = jax.grad(lambda *a: _loss(name, inputs, *(x[None] for x in a)), range(4))
    _assert_same(jax.jit(jax.vmap(one))(*arrays), wanted)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_under_shard_map_through_the_custom_gradient(name):
    inputs, arrays, wanted = sharded_problem()
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec, rows = PartitionSpec("data", None, "heads", None), PartitionSpec("data", None, "heads")
    specs = (spec, spec, spec, rows)

    def local(*arrays):
        return jax.grad(functools.partial(_loss, name, inputs), range(4))(*arrays)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    _assert_same(jax.jit(sharded)(*arrays), wanted)


def test_the_gpu_kernels_say_over_which_axes_they_vary():
    inputs, arrays, _ = sharded_problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(*arrays):
        given = inputs._replace(**dict(zip(NAMES, arrays, strict=True)))
        fwd = gpu.forward(given, Options())
        return tuple(gpu.backward(given, Options(), fwd, Cotangents(fwd.out, fwd.x, fwd.lse)))

    spec = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4, check_vma=True)
    # Lowered, not run: the interpreter's own slices do not pass this check.
    text = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_the_tpu_forward_kernel_says_over_which_axes_it_varies():
    inputs, arrays, _ = sharded_problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(*arrays):
        return tpu.forward(inputs._replace(**dict(zip(NAMES, arrays, strict=True))), Options(), interpret=True).out

    spec = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=True)
    plain = tpu.forward(inputs, Options(), interpret=True).out
    np.testing.assert_allclose(np.asarray(jax.jit(sharded)(*arrays)), np.asarray(plain), rtol=1e-5, atol=1e-5)


MOMENTS = {
    "tpu": functools.partial(tpu_decode.partial_state, interpret=True),
    "gpu": functools.partial(gpu_decode.partial_state, interpret=True, parts=2),
}


@pytest.mark.parametrize("chip", MOMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_cache_merge(chip, dtype):
    q, k, v, _, scale, ridge = case = cache(dtype, (2, 300, 4, 2, 32, 16), [300, 120])
    moments = MOMENTS[chip]

    @jax.jit
    def parts():
        first = moments(q, k[:, :200], v[:, :200], jnp.array([200, 120]), scale)
        second = moments(q, k[:, 200:], v[:, 200:], jnp.array([100, 0]), scale)
        return first, decode.merge(first, second)

    first, merged = parts()
    wanted, out = expected_step(case)
    # Their m may differ in the last bit, and their sums with it.
    factor = np.exp(np.asarray(merged.m, np.float64) - wanted.m)
    for name in ("weight", "k_sum", "v_sum", "kk", "vk"):
        sums = np.asarray(getattr(merged, name), np.float64)
        sums = sums * factor.reshape(*factor.shape, *[1] * (sums.ndim - 2))
        assert error(sums, getattr(wanted, name)) < 5e-5, name  # 2^-17 for bfloat16
    np.testing.assert_allclose(np.asarray(merged.m), wanted.m, rtol=1e-6)
    assert first.kk.shape == (2, 4, 32, 32)
    assert first.vk.shape == (2, 4, 16, 32)
    finished, _ = decode.finish(merged, q.astype(jnp.float32), ridge, Options(solver="cholesky"))
    assert error(finished, out) < 1e-4


@pytest.mark.parametrize("chip", MOMENTS)
def test_an_empty_part_has_no_largest_logit(chip):
    q, k, v, _, scale, _ = cache("float32", (1, 40, 2, 1, 16, 16), [0])
    state = MOMENTS[chip](q, k, v, jnp.array([0]), scale)
    assert (np.asarray(state.m) == -np.inf).all()
    assert not any(np.asarray(sums).any() for sums in state[1:])
