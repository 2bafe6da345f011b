"""The TPU decoding kernel in interpret mode against moments and Cholesky factors in float64."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.local_linear_attention import tpu_decode
from kernels_pallas.local_linear_attention.problem import Options
from tests.kernels_pallas.local_linear_attention.problems import Case, cache, error, expected_step


def run(case: Case, **options) -> jax.Array:
    options = Options(is_causal=False, max_iters=64, **options)
    return jax.jit(lambda *a: tpu_decode.decode(*a, options, interpret=True, block=256)[0])(*case)


# float32: 2^-24 a product times a condition of some ten. bfloat16 caches: 16 bits of the weights, 2^-17.
@pytest.mark.parametrize(
    ("dtype", "sizes", "lengths", "bound"),
    [
        ("float32", (2, 300, 4, 2, 32, 48), [300, 77], 1e-5),
        ("bfloat16", (2, 300, 4, 2, 64, 64), [0, 129], 1e-4),  # an empty cache gives zeros
        ("bfloat16", (1, 300, 2, 2, 128, 128), [300], 1e-4),
        ("float32", (1, 300, 10, 5, 40, 24), [256], 1e-5),  # more heads than are solved together, odd sizes
    ],
)
def test_decode(dtype, sizes, lengths, bound):
    case = cache(dtype, sizes, lengths)
    assert error(run(case), expected_step(case)[1]) < bound


def test_blocks_that_end_in_the_middle_of_their_parts():
    case = cache("float32", (3, 1300, 1, 1, 16, 16), [1100, 1024, 700])
    assert tpu_decode.sizes_of(1300, 3 * 16, 1024) == (1024, 1024, 512)
    out = jax.jit(lambda *a: tpu_decode.decode(*a, Options(is_causal=False), interpret=True, block=1024)[0])(*case)
    assert error(out, expected_step(case)[1]) < 1e-5


def test_jacobi_gives_the_same_output():
    case = cache("float32", (1, 150, 2, 1, 16, 16), [130])
    assert error(run(case, preconditioner="jacobi"), expected_step(case)[1]) < 1e-5


def test_a_float32_query_meets_a_bfloat16_cache_unrounded():
    q, k, v, length, scale, ridge = cache("bfloat16", (1, 150, 6, 1, 32, 32), [150])
    q = q.astype(jnp.float32) * (1 + 2.0**-7 / 3)
    for heads in (2, 6):  # on the vector unit, on the matrix unit
        case = (q[:, :heads], k, v, length, scale, ridge[:, :heads])
        assert error(run(case), expected_step(case)[1]) < 1e-4


def test_refusals():
    q, k, v, length, scale, ridge = cache("float32", (1, 20, 2, 1, 16, 16), [20])
    assert tpu_decode.refusal(q, k, v, Options()) is None
    assert "float16" in tpu_decode.refusal(q, k.astype(jnp.float16), v.astype(jnp.float16), Options())
    with pytest.raises(ValueError, match=r"pallas_tpu.*cholesky"):
        tpu_decode.decode(q, k, v, length, scale, ridge, Options(solver="cholesky"), interpret=True)
