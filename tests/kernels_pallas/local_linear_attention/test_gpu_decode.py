"""The GPU decoding kernels in interpret mode against moments and Cholesky factors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.local_linear_attention import gpu_decode
from kernels_pallas.local_linear_attention.problem import Options
from tests.kernels_pallas.local_linear_attention.problems import Case, cache, error, expected_step


def run(case: Case, parts: int | None = None, **options) -> jax.Array:
    options = Options(is_causal=False, **{"max_iters": 64, **options})
    return jax.jit(lambda *a: gpu_decode.decode(*a, options, interpret=True, parts=parts)[0])(*case)


# float32: 2^-24 a product times a condition of some ten. 16-bit caches: 16 bits of the weights, 2^-17.
@pytest.mark.parametrize(
    ("dtype", "sizes", "lengths", "parts", "bound"),
    [
        ("float32", (2, 300, 4, 2, 32, 48), [300, 77], 2, 1e-5),  # a value size that is no power of two
        ("bfloat16", (2, 300, 4, 2, 64, 64), [0, 129], 3, 1e-4),  # an empty cache gives zeros
        ("bfloat16", (1, 75, 2, 1, 128, 128), [75], None, 1e-4),  # columns in programs of their own
        ("float32", (1, 75, 6, 2, 40, 24), [64], 5, 1e-5),  # more parts than blocks of keys
        ("float16", (2, 130, 2, 2, 16, 32), [130, 1], 1, 1e-4),
    ],
)
def test_decode(dtype, sizes, lengths, parts, bound):
    case = cache(dtype, sizes, lengths)
    assert error(run(case, parts), expected_step(case)[1]) < bound


@pytest.mark.parametrize("options", [{"preconditioner": "jacobi"}, {"solver": "cholesky"}])
def test_other_solvers_give_the_same_output(options):
    case = cache("float32", (1, 150, 2, 1, 16, 16), [130])
    assert error(run(case, **options), expected_step(case)[1]) < 1e-5


def test_the_solver_stops_at_max_iters():
    case = cache("float32", (1, 150, 2, 1, 16, 16), [130], ridge=0.01)
    exact = expected_step(case)[1]
    assert error(run(case, max_iters=1), exact) > 1e-3
    assert error(run(case, max_iters=64), exact) < 1e-4  # 2^-24 times a condition of 10^3


def test_large_heads_are_solved_by_xla():
    case = cache("float32", (1, 30, 1, 1, 136, 16), [30])
    assert error(run(case), expected_step(case)[1]) < 1e-5


def test_a_float32_query_meets_a_bfloat16_cache_unrounded():
    q, k, v, length, scale, ridge = cache("bfloat16", (1, 150, 2, 1, 32, 32), [150])
    case = (q.astype(jnp.float32) * (1 + 2.0**-7 / 3), k, v, length, scale, ridge)
    assert error(run(case), expected_step(case)[1]) < 1e-4


def test_nan_in_a_query_stays_in_its_head():
    case = cache("float32", (2, 70, 2, 1, 16, 16), [70, 33])
    q, *rest = case
    out = np.asarray(run((q.at[0, 1, 3].set(jnp.nan), *rest)))
    assert np.isnan(out[0, 1]).all()
    np.testing.assert_array_equal(np.delete(out.reshape(4, -1), 1, 0), np.delete(run(case).reshape(4, -1), 1, 0))


def test_batches_of_calls():
    cases = [cache("float32", (1, 70, 2, 1, 16, 16), [length]) for length in (70, 33)]
    together = jax.vmap(lambda *a: gpu_decode.decode(*a, Options(), interpret=True)[0])(
        *(jnp.stack(x) for x in zip(*cases, strict=True))
    )
    for out, case in zip(together, cases, strict=True):
        assert error(out, expected_step(case)[1]) < 1e-5


def test_the_programs_of_a_small_batch_share_the_keys():
    def parts(batch: int, slots: int = 32768) -> int:
        shape = jax.ShapeDtypeStruct((batch, slots, 2, 64), jnp.bfloat16)
        return gpu_decode.plan_of(jax.ShapeDtypeStruct((batch, 8, 64), jnp.float32), shape, shape).parts

    assert parts(1) == 33
    assert parts(8) == 4
    assert parts(256) == 1
    # A part has eight times as many keys as a moment has rows, or its moments would cost more than its keys.
    assert parts(1, 1024) == 2


def test_refusals():
    q, k, v, length, scale, ridge = cache("float32", (1, 20, 2, 1, 16, 16), [20])
    assert gpu_decode.refusal(q, k, v, Options(solver="cholesky")) is None
    assert "float64" in gpu_decode.refusal(q, *[jax.ShapeDtypeStruct(k.shape, np.float64)] * 2, Options())
    wide = jnp.zeros((1, 20, 1, 257))
    assert "257" in gpu_decode.refusal(wide[:, 0], wide, v, Options())
    with pytest.raises(ValueError, match=r"pallas_gpu.*float16"):
        gpu_decode.decode(q, k, v.astype(jnp.float16), length, scale, ridge, Options(), interpret=True)
