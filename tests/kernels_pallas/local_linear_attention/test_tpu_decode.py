"""The TPU decoding kernel in interpret mode against moments and Cholesky factors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.local_linear_attention import decode, tpu_decode
from kernels_pallas.local_linear_attention.decode import DecodeState
from kernels_pallas.local_linear_attention.problem import Options
from tests.kernels_pallas.local_linear_attention.tpu_problems import error, wide

Case = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def cache(dtype: str, sizes: tuple[int, ...], lengths: list[int], ridge: float = 1.0) -> Case:
    """q, k, v, length, scale, ridge; unused slots hold NaN and infinity."""
    batch, keys, heads, key_heads, head, value_head = sizes
    rng = np.random.default_rng(0)
    unused = (np.arange(keys) >= np.asarray(lengths)[:, None])[:, :, None, None]
    q = jnp.asarray(rng.standard_normal((batch, heads, head)), dtype)
    k = jnp.asarray(np.where(unused, np.nan, rng.standard_normal((batch, keys, key_heads, head))), dtype)
    v = jnp.asarray(np.where(unused, np.inf, rng.standard_normal((batch, keys, key_heads, value_head))), dtype)
    ridges = jnp.asarray(ridge * (0.5 + rng.random((batch, heads))), jnp.float32)
    return q, k, v, jnp.asarray(lengths, jnp.int32), jnp.float32(head**-0.5), ridges


def expected(case: Case) -> tuple[DecodeState, np.ndarray]:
    @jax.jit  # one by one, its operations would compile one by one
    def decoded(q, k, v, length, scale, ridge):
        state = decode.partial_state(q, k, v, length, scale)
        return state, decode.finish(state, q, ridge, Options(solver="cholesky"))[0]

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, decoded(*wide(case)))


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
    assert error(run(case), expected(case)[1]) < bound


def test_blocks_that_end_in_the_middle_of_their_parts():
    case = cache("float32", (3, 1300, 1, 1, 16, 16), [1100, 1024, 700])
    assert tpu_decode.sizes_of(1300, 3 * 16, 1024) == (1024, 1024, 512)
    out = jax.jit(lambda *a: tpu_decode.decode(*a, Options(is_causal=False), interpret=True, block=1024)[0])(*case)
    assert error(out, expected(case)[1]) < 1e-5


def test_jacobi_gives_the_same_output():
    case = cache("float32", (1, 150, 2, 1, 16, 16), [130])
    assert error(run(case, preconditioner="jacobi"), expected(case)[1]) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_cache_merge(dtype):
    q, k, v, _, scale, ridge = case = cache(dtype, (2, 300, 4, 2, 32, 16), [300, 120])

    @jax.jit
    def parts():
        first = tpu_decode.partial_state(q, k[:, :200], v[:, :200], jnp.array([200, 120]), scale, interpret=True)
        second = tpu_decode.partial_state(q, k[:, 200:], v[:, 200:], jnp.array([100, 0]), scale, interpret=True)
        return first, decode.merge(first, second)

    first, merged = parts()
    wanted, out = expected(case)
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


def test_an_empty_part_has_no_largest_logit():
    q, k, v, _, scale, _ = cache("float32", (1, 40, 2, 1, 16, 16), [0])
    state = tpu_decode.partial_state(q, k, v, jnp.array([0]), scale, interpret=True)
    assert (np.asarray(state.m) == -np.inf).all()
    assert not any(np.asarray(sums).any() for sums in state[1:])


def test_a_float32_query_meets_a_bfloat16_cache_unrounded():
    q, k, v, length, scale, ridge = cache("bfloat16", (1, 150, 6, 1, 32, 32), [150])
    q = q.astype(jnp.float32) * (1 + 2.0**-7 / 3)
    for heads in (2, 6):  # on the vector unit, on the matrix unit
        case = (q[:, :heads], k, v, length, scale, ridge[:, :heads])
        assert error(run(case), expected(case)[1]) < 1e-4


def test_refusals():
    q, k, v, length, scale, ridge = cache("float32", (1, 20, 2, 1, 16, 16), [20])
    assert tpu_decode.refusal(q, k, v, Options()) is None
    assert "float16" in tpu_decode.refusal(q, k.astype(jnp.float16), v.astype(jnp.float16), Options())
    with pytest.raises(ValueError, match=r"pallas_tpu.*cholesky"):
        tpu_decode.decode(q, k, v, length, scale, ridge, Options(solver="cholesky"), interpret=True)
