"""A cache filled token by token, in parts or at once is the same cache, and decoding from it is the equation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_topk_attention import (
    append,
    block_topk_decode,
    extend,
    init_cache,
    prefill,
    select_blocks,
    update_centroids,
)
from kernels_pallas.block_topk_attention.plan import LAYOUTS
from tests.kernels_pallas.block_topk_attention.test_xla import expected, random

S, K, N, H, V, BLOCK = 64, 2, 4, 8, 8, 8


def empty(layout="BSKH", offset=0, batch=3, dtype=jnp.float32, value=V):
    return init_cache(batch, S, K, H, value, block_size=BLOCK, block_offset=offset, dtype=dtype, layout=layout)


def stored(cache):
    """Keys and values as [B, S, K, ...], whatever the layout."""
    if cache.layout == "BSKH":
        return cache.k, cache.v
    k, v = (cache.k[..., :H], cache.k[..., H:]) if cache.v is None else (cache.k, cache.v)
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def full_sums(k, cache):
    """Sums of the blocks that are full, from scratch; zero elsewhere."""
    phase, total = cache.phase, cache.centroid_sum.shape[2]
    sums = k[:, phase : phase + total * BLOCK].reshape(k.shape[0], total, BLOCK, K, H).astype(jnp.float32).sum(2)
    full = phase + (jnp.arange(total) + 1) * BLOCK <= cache.length[:, None]
    return jnp.where(full[:, None, :, None], sums.swapaxes(1, 2), 0), full[:, None, :, None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 3])
def test_token_by_token_in_parts_and_at_once(layout, offset):
    _, k, v = random(20, size=S, groups=K, width=H, value=V)
    once = extend(empty(layout, offset), k[:, :37], v[:, :37])
    parts = extend(extend(empty(layout, offset), k[:, :21], v[:, :21]), k[:, 21:37], v[:, 21:37])
    step = jax.jit(append, donate_argnums=0)
    single = empty(layout, offset)
    for t in range(37):
        single = step(single, k[:, t : t + 1], v[:, t : t + 1])
    for cache in (once, parts, single):
        assert cache.length.tolist() == [37] * 3
        for got, want in zip(stored(cache), (k, v), strict=True):
            np.testing.assert_array_equal(got[:, :37], want[:, :37])
        want, full = full_sums(k, cache)
        # Sums of eight float32 numbers, in another order.
        np.testing.assert_allclose(jnp.where(full, cache.centroid_sum, 0), want, atol=5e-6)
        np.testing.assert_allclose(cache.centroid_sum, once.centroid_sum, atol=5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_of_different_lengths_decode_as_the_equation(layout):
    q, k, v = random(21, size=S, heads=N, groups=K, width=H, value=V)
    cache = extend(empty(layout), k, v, count=jnp.array([5, 30, 63]))
    last = jax.random.normal(jax.random.key(1), (2, 3, 1, K, H))
    cache = append(cache, last[0], last[1])
    assert cache.length.tolist() == [6, 31, 64]
    k, v = stored(cache)
    out = block_topk_decode(q, cache, num_blocks=3, num_local=2)
    want = expected(q, k, v, cache.length, block_size=BLOCK, num_blocks=3, num_local=2)
    np.testing.assert_allclose(out, want, atol=3e-6)


def test_the_layout_of_the_paper():
    q, k, v = random(22, size=S, heads=N, groups=K, width=H, value=V)
    cache = extend(empty(offset=4), k[:, :50], v[:, :50])
    out = block_topk_decode(q, cache, num_blocks=3, num_sink=4)
    want = expected(q, k, v, [50] * 3, block_size=BLOCK, num_blocks=3, block_offset=4)
    np.testing.assert_allclose(out, want, atol=3e-6)


def test_a_block_that_is_not_full_is_never_chosen():
    """Its sum is the largest by far, and it is read as part of the tail, once."""
    query = jnp.ones((1, 1, 1, H))
    cache = init_cache(1, S, 1, H, block_size=BLOCK)
    cache = extend(cache, jnp.ones((1, 39, 1, H)), jnp.ones((1, 39, 1, H)))
    cache = dataclasses.replace(cache, centroid_sum=cache.centroid_sum.at[:, :, 4:].set(1e6))
    options = {"size": S, "block_size": BLOCK, "num_blocks": 4}
    chosen = select_blocks(query, cache.centroid_sum / BLOCK, length=cache.length, **options)
    assert sorted(chosen[0, 0].tolist()) == [-1, 1, 2, 3]
    full = append(cache, jnp.ones((1, 1, 1, H)), jnp.ones((1, 1, 1, H)))
    chosen = select_blocks(query, full.centroid_sum / BLOCK, length=full.length, **options)
    assert sorted(chosen[0, 0].tolist()) == [1, 2, 3, 4]


def test_what_a_slot_held_before_is_forgotten():
    """Blocks of a cache that is used again (length set to zero) hold the sums of other keys, or NaN."""
    _, k, v = random(23, size=S, groups=K, width=H, value=V)
    fresh = extend(empty(), k[:, :20], v[:, :20])
    dirty = dataclasses.replace(empty(), centroid_sum=jnp.full_like(empty().centroid_sum, jnp.nan))
    again = dirty
    for t in range(20):
        again = append(again, k[:, t : t + 1], v[:, t : t + 1])
    np.testing.assert_allclose(again.centroid_sum[:, :, :3], fresh.centroid_sum[:, :, :3], atol=5e-6)
    np.testing.assert_array_equal(extend(dirty, k[:, :20], v[:, :20]).centroid_sum, fresh.centroid_sum)


def test_update_centroids_changes_sums_only():
    _, k, v = random(24, size=S, groups=K, width=H, value=V)
    cache = extend(empty(), k[:, :9], v[:, :9])
    updated = update_centroids(cache, k[:, 9:10])
    np.testing.assert_allclose(updated.centroid_sum[:, :, 1], k[:, 8:10].sum(1), atol=1e-6)
    assert updated.length is cache.length
    assert updated.k is cache.k


def test_sums_are_those_of_the_keys_as_stored():
    _, k, v = random(25, size=S, groups=K, width=H, value=V)
    cache = append(empty(dtype=jnp.bfloat16), k[:, :1], v[:, :1])
    assert cache.centroid_sum.dtype == jnp.float32
    np.testing.assert_array_equal(cache.centroid_sum[:, :, 0], k[:, 0].astype(jnp.bfloat16).astype(jnp.float32))


def test_prefill_is_dense_and_fills():
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (jax.random.normal(key, (3, 12, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True))
    out, cache = prefill(empty(), q, k, v, count=jnp.array([12, 7, 1]))
    np.testing.assert_array_equal(out, jax.nn.dot_product_attention(q, k, v, is_causal=True))
    assert cache.length.tolist() == [12, 7, 1]
    np.testing.assert_array_equal(cache.k[1, :7], k[1, :7])
    assert not np.asarray(cache.k[1, 7:]).any()
    with pytest.raises(ValueError, match="holds 12 tokens"):
        prefill(cache, q, k, v)


def test_generation_in_a_scan_equals_a_loop():
    q, k, v = (
        jax.random.normal(key, (3, 40, heads, H))
        for key, heads in zip(jax.random.split(jax.random.key(4), 3), (N, K, K), strict=True)
    )

    def step(cache, new):
        q, k, v = (x[:, None] for x in new)
        cache = append(cache, k, v)
        return cache, block_topk_decode(q, cache, num_blocks=2)[:, 0]

    _, out = jax.jit(functools.partial(jax.lax.scan, step))(
        empty(), jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v))
    )
    for t in (0, 11, 39):
        want = expected(q[:, t : t + 1], k, v, [t + 1] * 3, block_size=BLOCK, num_blocks=2)
        np.testing.assert_allclose(out[t], want[:, 0], atol=3e-6)


def test_a_full_cache():
    _, k, v = random(26, size=S, groups=K, width=H, value=V)
    cache = extend(empty(), k, v)
    with pytest.raises(ValueError, match="1 new tokens do not fit: the cache holds 64 of 64"):
        append(cache, k[:, :1], v[:, :1])
    after = jax.jit(append)(cache, k[:, :1] + 1, v[:, :1])
    assert after.length.tolist() == [64] * 3
    np.testing.assert_array_equal(after.k, cache.k)
    np.testing.assert_array_equal(after.centroid_sum, cache.centroid_sum)
    with pytest.raises(ValueError, match="60 new tokens do not fit"):
        extend(extend(empty(), k[:, :5], v[:, :5]), k[:, :60], v[:, :60])


def test_bad_input():
    for change, match in [
        ({"size": 60}, "block_size is 8, which does not divide the cache's 60 positions"),
        ({"batch": 0}, "batch is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_offset": -1}, "block_offset is -1"),
    ]:
        arguments = {"batch": 1, "size": 64, "num_kv_heads": 1, "head_dim": 8, "block_size": 8, **change}
        with pytest.raises(ValueError, match=match):
            init_cache(**arguments)
    cache = empty()
    rows = jnp.ones((3, 1, K, H))
    with pytest.raises(ValueError, match=r"key has shape \(3, 1, 1, 8\), expected \[3, 1, 2, 8\]"):
        append(cache, rows[:, :, :1], rows)
    with pytest.raises(ValueError, match=r"value has shape \(3, 1, 2, 4\), expected \[3, 1, 2, 8\]"):
        append(cache, rows, rows[..., :4])
    with pytest.raises(ValueError, match="new_key has shape"):
        update_centroids(cache, rows[..., :4])
    with pytest.raises(ValueError, match="the budget is 72 positions"):
        block_topk_decode(jnp.ones((3, 1, N, H)), cache, num_blocks=8)
