"""The TPU backward kernels in interpret mode against automatic differentiation of the reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels_pallas.local_linear_attention import tpu
from kernels_pallas.local_linear_attention.problem import Inputs, Options
from kernels_pallas.local_linear_attention.vjp import attend
from tests.kernels_pallas.local_linear_attention.tpu_problems import cotangents, error, expected_gradients, problem


def gradients(inputs: Inputs, options: Options, **static) -> dict[str, jax.Array]:
    cot = cotangents(inputs)
    static = {"interpret": True, "block": 128, **static}

    @jax.jit
    def run(inputs, cot):
        fwd = tpu.forward(inputs, options, **static)
        back = tpu.backward(inputs, options, fwd, cot, **static)
        dq = inputs.scale * back.logit + (back.solved if options.solve else 0)
        grads = {"q": dq, "k": back.dk, "v": back.dv, "scale": jnp.sum(inputs.q.astype(jnp.float32) * back.logit)}
        if options.solve:
            return grads | {"ridge": -jnp.sum(fwd.x * back.solved, -1)}
        return grads | {"probe": back.solved}

    return run(inputs, cot)


# float32: as the forward pass, times sums of cancelling terms. bfloat16: dk and dv are rounded, 2^-8 at worst; what is
# returned in float32 keeps 16 bits of every product, and terms of dscale and dridge cancel. float16: 2^-11 of rounding.
@pytest.mark.parametrize(
    ("dtype", "options", "sizes", "offset", "rounded", "kept"),
    [
        ("float32", Options(max_iters=64), (2, 70, 70, 4, 2, 16, 24), 0, 5e-5, 5e-5),
        ("float32", Options(max_iters=64), (1, 131, 131, 2, 1, 80, 130), 0, 5e-5, 5e-5),
        ("bfloat16", Options(max_iters=64), (1, 150, 150, 2, 1, 64, 64), 0, 4e-3, 5e-4),
        ("float16", Options(max_iters=64), (1, 40, 40, 2, 2, 32, 32), 0, 1e-3, 1e-3),
        ("float32", Options(is_causal=False), (1, 30, 150, 2, 2, 32, 32), 0, 5e-5, 5e-5),
        ("float32", Options(), (1, 30, 150, 2, 1, 32, 32), 120, 5e-5, 5e-5),
        ("float32", Options(), (1, 30, 20, 2, 1, 32, 32), -4, 5e-5, 5e-5),  # the first rows see no key
        ("float32", Options(solve=False), (1, 30, 150, 2, 1, 32, 32), 100, 5e-5, 5e-5),
        ("bfloat16", Options(is_causal=False, solve=False), (1, 30, 150, 2, 1, 128, 64), 0, 4e-3, 5e-4),
    ],
)
def test_gradients(dtype, options, sizes, offset, rounded, kept):
    inputs = problem(dtype, sizes, offset=offset, probe=not options.solve)
    actual, wanted = gradients(inputs, options), expected_gradients(inputs, options, cotangents(inputs))
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert error(gradient, wanted[name]) < (rounded if name in "kv" else kept), name
    if offset < 0:
        assert not np.asarray(actual["q"][:, :-offset]).any()


def test_weights_computed_again_give_the_same_gradients():
    inputs = problem("bfloat16", (1, 150, 150, 2, 1, 64, 64))
    kept, again = (gradients(inputs, Options(), is_cached=cached) for cached in (True, False))
    for name in kept:
        np.testing.assert_array_equal(np.asarray(kept[name], np.float32), np.asarray(again[name], np.float32))


NAMES = ("q", "k", "v", "ridge")


def _loss(name: str, inputs: Inputs, *arrays: jax.Array) -> jax.Array:
    result = attend(name, Options(), name != "xla", inputs._replace(**dict(zip(NAMES, arrays, strict=True))))
    return jnp.sum(result.out**2) + jnp.sum(result.lse)


@functools.cache
def _sharded_problem() -> tuple[Inputs, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    inputs = problem("float32", (8, 20, 20, 4, 2, 16, 16))
    arrays = tuple(getattr(inputs, name) for name in NAMES)
    wanted = jax.jit(jax.grad(functools.partial(_loss, "xla", inputs), range(4)))(*arrays)
    return inputs, arrays, wanted


def _assert_same(actual: tuple[jax.Array, ...], wanted: tuple[jax.Array, ...]) -> None:
    for name, a, b in zip(NAMES, actual, wanted, strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-4, name  # both in float32, by different sums


def test_under_vmap_through_the_custom_gradient():
    inputs, arrays, wanted = _sharded_problem()
    one = jax.grad(lambda *a: _loss("pallas_tpu", inputs, *(x[None] for x in a)), range(4))
    _assert_same(jax.jit(jax.vmap(one))(*arrays), wanted)


def test_under_shard_map_through_the_custom_gradient():
    inputs, arrays, wanted = _sharded_problem()
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec, rows = PartitionSpec("data", None, "heads", None), PartitionSpec("data", None, "heads")
    specs = (spec, spec, spec, rows)

    def local(*arrays):
        return jax.grad(functools.partial(_loss, "pallas_tpu", inputs), range(4))(*arrays)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    _assert_same(jax.jit(sharded)(*arrays), wanted)


def test_the_forward_kernel_says_over_which_axes_it_varies():
    inputs, arrays, _ = _sharded_problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(*arrays):
        return tpu.forward(inputs._replace(**dict(zip(NAMES, arrays, strict=True))), Options(), interpret=True).out

    spec = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=True)
    plain = tpu.forward(inputs, Options(), interpret=True).out
    np.testing.assert_allclose(np.asarray(jax.jit(sharded)(*arrays)), np.asarray(plain), rtol=1e-5, atol=1e-5)
