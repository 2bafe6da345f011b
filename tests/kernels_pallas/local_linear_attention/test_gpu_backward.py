"""The GPU kernels, forward and backward, in interpret mode against the reference and its gradients in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels_pallas.local_linear_attention import gpu
from kernels_pallas.local_linear_attention.problem import Cotangents, Forward, Inputs, Options
from kernels_pallas.local_linear_attention.vjp import attend
from tests.kernels_pallas.local_linear_attention.test_gpu import FAST
from tests.kernels_pallas.local_linear_attention.tpu_problems import (
    cotangents,
    error,
    expected,
    expected_gradients,
    problem,
)


def forward_and_gradients(inputs: Inputs, options: Options) -> tuple[Forward, dict[str, jax.Array]]:
    @functools.partial(jax.jit, compiler_options=FAST)
    def run(inputs, cot):
        fwd = gpu.forward(inputs, options, interpret=True)
        back = gpu.backward(inputs, options, fwd, cot, interpret=True)
        dq = inputs.scale * back.logit + (back.solved if options.solve else 0)
        grads = {"q": dq, "k": back.dk, "v": back.dv, "scale": jnp.sum(inputs.q.astype(jnp.float32) * back.logit)}
        if options.solve:
            return fwd, grads | {"ridge": -jnp.sum(fwd.x * back.solved, -1)}
        return fwd, grads | {"probe": back.solved}

    return run(inputs, cotangents(inputs))


# Results: float32: 2^-24 a product, and 1 + x·c cancels where x is large (first rows): 5e-5. bfloat16: half a unit of
# the last place of what is rounded to it, 2^-8 of it at worst; x keeps 16 bits of every product, 2^-17, times a
# condition of some ten. float16: 2^-11 and the same 16 bits.
# Gradients: the same, times sums of terms that cancel, most of all in those of scale and ridge.
@pytest.mark.parametrize(
    ("dtype", "options", "sizes", "offset", "rounded", "x", "kept"),
    [
        ("float32", Options(max_iters=64), (2, 70, 70, 4, 2, 16, 24), 0, 5e-5, 5e-6, 5e-5),  # GQA, Hv != H
        ("bfloat16", Options(max_iters=64), (1, 150, 150, 2, 1, 64, 64), 0, 4e-3, 1e-4, 5e-4),
        ("float16", Options(max_iters=64), (1, 40, 40, 2, 2, 32, 32), 0, 1e-3, 1e-4, 1e-3),
        # No key is masked, not even padding.
        ("float32", Options(False, preconditioner="jacobi"), (1, 30, 128, 2, 1, 32, 32), 0, 5e-5, 5e-6, 5e-5),
        ("float32", Options(), (1, 30, 20, 2, 1, 32, 32), -4, 5e-5, 5e-6, 5e-5),  # the first rows see no key
        ("bfloat16", Options(solve=False), (1, 30, 90, 2, 1, 20, 32), 50, 4e-3, 1e-5, 5e-4),
    ],
)
def test_values_and_gradients(dtype, options, sizes, offset, rounded, x, kept):
    inputs = problem(dtype, sizes, offset=offset, probe=not options.solve)
    (result, actual), fwd = forward_and_gradients(inputs, options), expected(inputs, options)
    assert result.out.dtype == inputs.q.dtype
    assert error(result.out, fwd.out) < rounded
    assert error(result.x, fwd.x) < x
    assert error(result.mean, fwd.mean) < x
    assert error(result.lse, fwd.lse) < 1e-5
    iterations = np.asarray(result.iterations)
    assert ((iterations > 0) & (iterations < options.max_iters)).all() if options.solve else not iterations.any()
    wanted = expected_gradients(inputs, options, cotangents(inputs))
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert error(gradient, wanted[name]) < (rounded if name in "kv" else kept), name
    if offset < 0:
        for array in (result.out, result.x, result.mean, actual["q"]):
            assert not np.asarray(array[:, :-offset]).any()
        assert (np.asarray(result.lse[:, :-offset]) == -np.inf).all()


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
    one = jax.grad(lambda *a: _loss("pallas_gpu", inputs, *(x[None] for x in a)), range(4))
    _assert_same(jax.jit(jax.vmap(one), compiler_options=FAST)(*arrays), wanted)


def test_under_shard_map_through_the_custom_gradient():
    inputs, arrays, wanted = _sharded_problem()
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec, rows = PartitionSpec("data", None, "heads", None), PartitionSpec("data", None, "heads")
    specs = (spec, spec, spec, rows)

    def local(*arrays):
        return jax.grad(functools.partial(_loss, "pallas_gpu", inputs), range(4))(*arrays)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    _assert_same(jax.jit(sharded, compiler_options=FAST)(*arrays), wanted)


def test_the_kernels_say_over_which_axes_they_vary():
    inputs, arrays, _ = _sharded_problem()
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
