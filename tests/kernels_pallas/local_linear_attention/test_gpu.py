"""The GPU forward kernel in interpret mode against the reference in float64; more calls: test_gpu_backward."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas.local_linear_attention import gpu, gpu_plan, gpu_tile
from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options
from tests.kernels_pallas.local_linear_attention.problems import error, expected, problem


@functools.cache
def compiled(options: Options, **sizes: int):
    return jax.jit(lambda i: gpu.forward(i, options, interpret=True, **sizes))


def run(inputs: Inputs, options: Options, **sizes: int) -> Forward:
    return compiled(options, **sizes)(inputs)


def assert_close(inputs: Inputs, options: Options, out: float, x: float) -> Forward:
    result, wanted = run(inputs, options), expected(inputs, options)
    assert result.out.dtype == inputs.q.dtype
    assert error(result.out, wanted.out) < out
    assert error(result.x, wanted.x) < x
    assert error(result.mean, wanted.mean) < x
    assert error(result.lse, wanted.lse) < 1e-5
    return result


# A call that the tests below share, so that it is compiled once: 20 queries, the last of which sees 30 of 36 keys.
SIZES, OFFSET = (1, 20, 36, 4, 2, 16, 16), 10


def shared(**changes: float) -> Inputs:
    return problem("float32", SIZES, offset=OFFSET, **changes)


def test_sizes_that_are_no_powers_of_two():
    # float32: 2^-24 a product, and 1 + x·c cancels where x is large: first rows.
    assert_close(problem("float32", (1, 67, 67, 3, 1, 20, 40)), Options(max_iters=64), 5e-5, 5e-6)


def test_accuracy_is_that_of_float32_and_not_of_bfloat16():
    # The rule of the solve: casting its operands to bfloat16 costs 6 % at ridge 1 and 34 % at 0.1. Two pieces keep 16
    # bits, 2^-17, times a condition of some ten.
    inputs = problem("bfloat16", (1, 80, 80, 2, 1, 64, 64), ridge=0.1)
    options = Options(max_iters=128)
    assert error(run(inputs, options).x, expected(inputs, options).x) < 2e-4


@pytest.mark.parametrize(("mean", "bound"), [(0, 5e-6), (30, 5e-5)])
def test_keys_far_from_zero(mean, bound):
    # A product with k is off by 2^-24 of |k|, here 30 times its spread, and the condition multiplies that as before.
    # Rounding of Σ w (p·c) times the mean, if it were left in, would make it 30² times. Logits lose more: they are 900.
    inputs = shared()
    inputs = inputs._replace(k=inputs.k + mean, q=inputs.q + mean, scale=inputs.scale / 4)
    result, wanted = run(inputs, Options()), expected(inputs, Options())
    assert error(result.x, wanted.x) < bound
    assert error(result.out, wanted.out) < 10 * bound


def test_nan_stays_in_its_row_and_ends():
    inputs = shared()
    clean = run(inputs, Options())
    dirty = run(inputs._replace(q=inputs.q.at[0, 7, 1, 3].set(jnp.nan)), Options())
    assert np.isnan(np.asarray(dirty.out[0, 7, 1])).all()
    assert np.isnan(float(dirty.lse[0, 7, 1]))
    others = np.ones(SIZES[1:2] + SIZES[3:4], bool)
    others[7, 1] = False
    for name in ("out", "x", "mean", "lse"):
        got, wanted = (np.asarray(getattr(result, name))[0][others] for result in (dirty, clean))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # the tile may stop a turn earlier
    assert (np.asarray(dirty.iterations) < 32).all()


@pytest.mark.parametrize("rubbish", [1e30, np.nan, np.inf], ids=str)
def test_keys_that_no_query_sees_are_never_used(rubbish):
    inputs = shared()
    seen = OFFSET + SIZES[1]
    dirty = inputs._replace(k=inputs.k.at[:, seen:].set(rubbish), v=inputs.v.at[:, seen:].set(rubbish))
    for got, wanted in zip(run(dirty, Options()), run(inputs, Options()), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_a_tile_stops_when_its_rows_have_converged():
    few, many = run(shared(ridge=100.0), Options()), run(shared(ridge=0.1), Options())
    assert np.asarray(few.iterations).max() < np.asarray(many.iterations).min()
    assert (np.asarray(many.iterations) > 0).all()
    capped = run(shared(ridge=0.1), Options(max_iters=2))
    assert (np.asarray(capped.iterations) == 2).all()


def test_tiles_and_blocks_do_not_change_the_result():
    inputs = shared()
    plain, small = run(inputs, Options()), run(inputs, Options(), tile=16, block=16)
    assert len(np.unique(np.asarray(small.iterations))) > 1  # every tile counts for itself
    np.testing.assert_allclose(np.asarray(small.out), np.asarray(plain.out), rtol=1e-4, atol=1e-5)


def test_batched_calls():
    inputs = problem("float32", (2, 20, 36, 4, 2, 16, 16))
    offsets, scales = jnp.array([10, -3], jnp.int32), jnp.array([0.2, 0.4], jnp.float32)

    def one(q, k, v, ridge, offset, scale):
        part = Inputs(q=q[None], k=k[None], v=v[None], scale=scale, ridge=ridge[None], offset=offset)
        return gpu.forward(part, Options(), interpret=True)

    arrays = (inputs.q, inputs.k, inputs.v, inputs.ridge, offsets, scales)
    batched = jax.jit(jax.vmap(one))(*arrays)
    for i in range(2):
        q, k, v, ridge, offset, scale = (a[i] for a in arrays)
        part = Inputs(q=q[None], k=k[None], v=v[None], scale=scale, ridge=ridge[None], offset=offset)
        wanted = expected(part, Options())
        assert error(batched.out[i], wanted.out) < 5e-5
        assert error(batched.lse[i], wanted.lse) < 1e-5


def _described(inputs: Inputs, **changes: tuple[tuple[int, ...], str]) -> Inputs:
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in inputs._asdict().items() if a is not None}
    shapes |= {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (shape, dtype) in changes.items()}
    return Inputs(**shapes)


def test_refusals():
    inputs, options = shared(), Options()
    assert gpu.refusal(inputs, options) is None
    masked = inputs._replace(mask=jnp.ones((1, 1, 20, 36), bool))
    assert "mask" in gpu.refusal(masked, options)
    assert "cholesky" in gpu.refusal(inputs, Options(solver="cholesky"))
    assert gpu.refusal(inputs, Options(solver="cholesky", solve=False)) is None
    assert "q is float64" in gpu.refusal(inputs._replace(q=np.zeros(inputs.q.shape)), options)
    wide = ((1, 36, 2, 300), "bfloat16")
    assert "v has head size 300" in gpu.refusal(_described(inputs, v=wide), options)
    with pytest.raises(ValueError, match=r"pallas_gpu.*mask is given"):
        gpu.forward(masked, options, interpret=True)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tiles_fit_the_chip_that_is_compiled_for(device, dtype):
    sizes = {"NVIDIA H100 80GB HBM3": 227, "NVIDIA A100-SXM4-80GB": 163, "NVIDIA L40S": 99}
    platform = {"platform": "cuda"} if "platform" in inspect.signature(AbstractDevice).parameters else {}  # since 0.9
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device, 132, **platform))
    with jax.sharding.use_abstract_mesh(mesh):
        assert gpu_plan.shared_memory_limit() == sizes[device] * 1024
        for head in (16, 64, 128):
            rows, keys = ((1, 512, 8, head), dtype), ((1, 512, 8, head), dtype)
            inputs = _described(shared(), q=rows, k=keys, v=keys)
            assert gpu.refusal(inputs, Options()) is None, head
            for kernel in ("forward", "rows", "keys"):
                layout = gpu_plan.plan_of(inputs, Options(), kernel).layout
                assert (layout.rows % layout.tile, layout.padded_keys % layout.block) == (0, 0)


def test_products_in_pieces():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((16, 32)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    bounds = {1: 2.0**-7, 2: 2.0**-14, 3: 2.0**-21}  # 8, 16 and 24 bits, and sums of 32 terms that cancel
    errors = []
    for order, bound in bounds.items():
        parts = [gpu_tile.pieces_of(jnp.asarray(x), order) for x in (a, b)]
        product = gpu_tile.add_product(jnp.asarray(a[:, :16]), *parts, order, gpu_tile.NT)
        errors.append(np.max(np.abs(np.asarray(product, np.float64) - exact - a[:, :16])))
        assert errors[-1] < bound * np.max(np.abs(exact)), order
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]  # a piece that is lost would be seen
