"""The TPU forward kernel in interpret mode against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.local_linear_attention import tpu, tpu_pieces, tpu_rows
from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options
from tests.kernels_pallas.local_linear_attention.problems import error, expected, problem


def run(inputs: Inputs, options: Options, **static) -> Forward:
    static = {"interpret": True, "block": 128, **static}
    return jax.jit(lambda i: tpu.forward(i, options, **static))(inputs)


def assert_close(inputs: Inputs, options: Options, out: float, x: float, **static) -> Forward:
    result, wanted = run(inputs, options, **static), expected(inputs, options)
    assert result.out.dtype == inputs.q.dtype
    assert error(result.out, wanted.out) < out
    assert error(result.x, wanted.x) < x
    assert error(result.mean, wanted.mean) < x
    assert error(result.lse, wanted.lse) < 1e-5
    return result


# float32: 2^-24 a product, and 1 + x·c cancels where x is large (first rows): 5e-5. bfloat16: half a unit of the last
# place of the output, 2^-8 of it at worst; x keeps 16 bits of every product, 2^-17, times a condition of some ten.
# float16: 2^-11 and the same 16 bits.
@pytest.mark.parametrize(
    ("dtype", "sizes", "out", "x"),
    [
        ("float32", (2, 70, 70, 4, 2, 16, 24), 5e-5, 5e-6),  # GQA, Hv != H
        ("float32", (1, 131, 131, 2, 2, 80, 130), 1e-4, 5e-6),  # sizes beyond 64 and 128, odd length of two blocks
        ("bfloat16", (1, 150, 150, 4, 2, 64, 64), 4e-3, 1e-4),
        ("bfloat16", (1, 150, 150, 2, 1, 128, 64), 4e-3, 1e-4),
        ("float16", (1, 40, 40, 2, 2, 32, 32), 1e-3, 1e-4),
    ],
)
def test_causal(dtype, sizes, out, x):
    result = assert_close(problem(dtype, sizes), Options(max_iters=64), out, x)
    assert (np.asarray(result.iterations) > 0).all()
    assert (np.asarray(result.iterations) < 64).all()


@pytest.mark.parametrize(
    ("options", "sizes", "offset"),
    [
        (Options(is_causal=False), (1, 30, 150, 2, 2, 32, 32), 0),
        (Options(), (2, 30, 150, 2, 1, 32, 32), 120),
        (Options(preconditioner="jacobi"), (1, 30, 150, 2, 1, 32, 32), 120),
        (Options(), (1, 30, 20, 2, 1, 32, 32), -4),  # the first rows see no key
        (Options(solve=False), (1, 30, 150, 2, 1, 32, 32), 100),
    ],
)
def test_options(options, sizes, offset):
    inputs = problem("float32", sizes, offset=offset, probe=not options.solve)
    result = assert_close(inputs, options, 5e-5, 5e-6)
    if offset < 0:
        for array in (result.out, result.x, result.mean):
            assert not np.asarray(array[:, :-offset]).any()
        assert (np.asarray(result.lse[:, :-offset]) == -np.inf).all()
    if not options.solve:
        assert not np.asarray(result.iterations).any()


def test_weights_computed_again_are_the_same_ones():
    inputs, options = problem("bfloat16", (1, 150, 150, 2, 1, 64, 64)), Options()
    kept, again = run(inputs, options, is_cached=True), run(inputs, options, is_cached=False)
    np.testing.assert_array_equal(np.asarray(kept.x), np.asarray(again.x))


def test_accuracy_is_that_of_float32_and_not_of_bfloat16():
    # The rule of the solve: casting its operands to bfloat16 costs 6 % at ridge 1 and 34 % at 0.1.
    inputs = problem("bfloat16", (1, 150, 150, 2, 1, 64, 64), ridge=0.1)
    result = run(inputs, Options(max_iters=128))
    assert error(result.x, expected(inputs, Options()).x) < 2e-4  # 2^-17 times a condition of some ten


def test_a_tile_stops_when_its_rows_have_converged():
    sizes = (1, 256, 256, 1, 1, 16, 16)
    few = run(problem("float32", sizes, ridge=100.0), Options(), tile=128)
    many = run(problem("float32", sizes, ridge=0.1), Options(), tile=128)
    assert np.asarray(few.iterations).max() < np.asarray(many.iterations).min()
    capped = run(problem("float32", sizes, ridge=0.1), Options(max_iters=2), tile=128)
    assert (np.asarray(capped.iterations) == 2).all()


def test_simulated_memories_give_the_same_numbers():
    inputs, options = problem("float32", (1, 20, 140, 2, 1, 16, 16), offset=120), Options(max_iters=4)
    simulated = run(inputs, options, interpret=pltpu.InterpretParams(detect_races=True))
    plain = run(inputs, options)
    # Sums of float32 products, in another order.
    np.testing.assert_allclose(np.asarray(simulated.out), np.asarray(plain.out), rtol=1e-4, atol=1e-5)


def test_batched_calls():
    inputs, options = problem("float32", (2, 20, 20, 2, 1, 16, 16)), Options()
    plain = run(inputs, options)
    batched = jax.jit(
        jax.vmap(
            lambda q, k, v, r: tpu.forward(
                inputs._replace(q=q[None], k=k[None], v=v[None], ridge=r[None]), options, interpret=True, block=128
            )
        )
    )(*(inputs[i] for i in (0, 1, 2, 4)))
    np.testing.assert_allclose(np.asarray(batched.out[:, 0]), np.asarray(plain.out), rtol=1e-5, atol=1e-6)


def test_refusals():
    inputs, options = problem("float32", (1, 8, 8, 1, 1, 8, 8)), Options()
    assert tpu.refusal(inputs, options) is None
    masked = inputs._replace(mask=jnp.ones((1, 1, 8, 8), bool))
    assert "mask" in tpu.refusal(masked, options)
    assert "cholesky" in tpu.refusal(inputs, Options(solver="cholesky"))
    assert tpu.refusal(inputs, Options(solver="cholesky", solve=False)) is None
    shapes = Inputs(*(None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs))
    assert tpu.refusal(shapes, options) is None
    assert "float64" in tpu.refusal(shapes._replace(q=jax.ShapeDtypeStruct((1, 8, 1, 8), np.float64)), options)
    long = jax.ShapeDtypeStruct((1, 2**20, 1, 128), jnp.bfloat16)
    assert "VMEM" in tpu.refusal(shapes._replace(k=long, v=long), options)
    with pytest.raises(ValueError, match=r"pallas_tpu.*mask is given"):
        tpu.forward(masked, options, interpret=True)


@pytest.mark.parametrize(("order", "bound"), [(2, 2.0**-16), (3, 2.0**-23)])
def test_pieces_add_up(order, bound):
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    pieces = [np.asarray(p.astype(jnp.bfloat16), np.float64) for p in tpu_pieces.split(jnp.asarray(x), order)]
    assert np.max(np.abs(sum(pieces) - x) / np.abs(x)) < bound
    exact = tpu_pieces.split_input(jnp.asarray(x)[None, None], 3)
    np.testing.assert_array_equal(np.asarray(exact, np.float64).sum(axis=2)[0, 0], x)


def test_rows_of_a_group_share_a_tile_and_come_back():
    layout = tpu_rows.layout_of((2, 50, 6, 8), (2, 300, 2, 8), 256, 128)
    x = jnp.arange(2 * 50 * 6 * 8).reshape(2, 50, 6, 8)
    packed = tpu_rows.pack_rows(x, layout)
    assert packed.shape == (2, 2, 256, 8)
    np.testing.assert_array_equal(np.asarray(packed[1, 1, 3 * 7 + 2]), np.asarray(x[1, 7, 5]))
    np.testing.assert_array_equal(np.asarray(tpu_rows.unpack_rows(packed, layout)), np.asarray(x))
    last = np.asarray(tpu_rows.last_keys(layout, jnp.array([250, -2]), True))
    assert (last[0, 0], last[0, 149], last[0, 150]) == (250, 299, -1)
    assert (last[1, 5], last[1, 6]) == (-1, 0)
    bounds = np.asarray(tpu_rows.key_bounds(jnp.asarray(last), layout)).tolist()
    assert bounds == [0, 3, 0, 1]  # rows of the padding see no key, so no block is seen by all


def test_nan_stays_in_its_row_and_ends():
    inputs = problem("float32", (1, 20, 36, 4, 2, 16, 16), offset=10)
    call = jax.jit(lambda i: tpu.forward(i, Options(), interpret=True, block=128))
    clean, dirty = call(inputs), call(inputs._replace(q=inputs.q.at[0, 7, 1, 3].set(jnp.nan)))
    assert np.isnan(np.asarray(dirty.out[0, 7, 1])).all()
    assert np.isnan(float(dirty.lse[0, 7, 1]))
    others = np.ones((20, 4), bool)
    others[7, 1] = False
    for name in ("out", "x", "mean", "lse"):
        got, wanted = (np.asarray(getattr(result, name))[0][others] for result in (dirty, clean))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # the tile may stop a turn earlier
    assert (np.asarray(dirty.iterations) < 32).all()
