"""The masks equal the reference's vectors; the XLA formulation equals the masked equation, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas.block_topk_attention import (
    block_topk_attention,
    block_topk_mask,
    local_mask,
    masked_attention,
    select_blocks,
    topk_mask,
)
from kernels_pallas.block_topk_attention.plan import Plan
from kernels_pallas.block_topk_attention.select import block_means

S, K, N, H = 96, 2, 6, 16

# Rounding of the number format times a few dozen operations on values of order one.
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 2e-6, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}


def random(seed, batch=3, size=S, heads=N, groups=K, width=H, value=H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, 1, heads, width), jnp.float32).astype(dtype),
        jax.random.normal(keys[1], (batch, size, groups, width), jnp.float32).astype(dtype),
        jax.random.normal(keys[2], (batch, size, groups, value), jnp.float32).astype(dtype),
    )


@functools.partial(jax.jit, static_argnames=("block_size", "num_blocks", "num_sink", "num_local", "block_offset"))
def expected(q, k, v, length, scale=None, **options):
    """The equation: full logits, `block_topk_mask`, softmax over what it keeps; float64 where it is on."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = jnp.repeat(k, q.shape[2] // k.shape[2], 2).astype(wide)
    logits = jnp.einsum("btnh,bsnh->bnts", q.astype(wide) * scale, keys, precision="highest")
    keep = block_topk_mask(logits, num_kv_heads=k.shape[2], length=jnp.asarray(length).reshape(-1, 1), **options)
    return masked_attention(q, k, v, keep, scale)


OPTIONS = {
    "aligned": {"block_size": 8, "num_blocks": 3},
    "reference layout": {"block_size": 8, "num_blocks": 3, "block_offset": 4},
    "offset past a page": {"block_size": 8, "num_blocks": 2, "block_offset": 13, "num_sink": 3},
    "no sink": {"block_size": 8, "num_blocks": 3, "num_sink": 0},
    "local": {"block_size": 8, "num_blocks": 2, "num_local": 11},
    "sink of two pages": {"block_size": 8, "num_blocks": 1, "num_sink": 9, "num_local": 1},
    "single keys": {"block_size": 1, "num_blocks": 12, "num_local": 2},
    "odd block": {"block_size": 12, "num_blocks": 2, "num_local": 5},
}


def test_masks_equal_the_vectors(x64, vectors):
    data = vectors("kinetics")
    heads, groups, topk, block, count, local, sink = data["sp_cfg"].tolist()
    logits, length = jnp.asarray(data["sp_logits"])[:, :, None], data["sp_lengths"][:, None]
    assert logits.shape[1] == heads
    common = {"num_sink": sink, "num_local": local, "length": length}
    block_keep = block_topk_mask(
        logits, num_kv_heads=groups, block_size=block, num_blocks=count, block_offset=sink, **common
    )
    np.testing.assert_array_equal(block_keep[:, :, 0], data["sp_block_keep"])
    np.testing.assert_array_equal(
        topk_mask(logits, num_kv_heads=groups, topk=topk, **common)[:, :, 0], data["sp_topk_keep"]
    )
    np.testing.assert_array_equal(local_mask(logits, **common)[:, :, 0], data["sp_local_keep"])


def test_masks_are_causal_and_agree_with_single_queries():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 37, 37))
    options = {"num_kv_heads": 2, "block_size": 4, "num_blocks": 3, "num_local": 2}
    mask = jax.jit(functools.partial(block_topk_mask, **options))
    full = mask(logits)
    for t in (0, 20, 36):
        alone = mask(logits[:, :, t : t + 1, : t + 1])
        np.testing.assert_array_equal(full[:, :, t : t + 1, : t + 1], alone)
        assert not full[:, :, t, t + 1 :].any()
    one = topk_mask(logits, num_kv_heads=2, topk=6)
    assert (np.asarray(one.sum(-1)) == np.minimum(np.arange(37) + 1, 10)).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_equation_at_every_length(x64, name):
    q, k, v = random(1, batch=97, dtype=jnp.float64)
    length = jnp.arange(97)
    out = jax.jit(functools.partial(block_topk_attention, **OPTIONS[name]))(q, k, v, length=length)
    np.testing.assert_allclose(out, expected(q, k, v, length, **OPTIONS[name]), atol=TOLERANCE[jnp.float64])
    assert not np.asarray(out[0]).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "groups", "value"), [(6, 2, 16), (2, 2, 5), (4, 1, 24)])
def test_types_groups_and_value_sizes(x64, dtype, heads, groups, value):
    q, k, v = random(2, heads=heads, groups=groups, value=value, dtype=dtype)
    length = jnp.array([33, 50, 96])
    out = block_topk_attention(q, k, v, length=length, **OPTIONS["aligned"])
    assert out.dtype == dtype
    assert out.shape == (3, 1, heads, value)
    want = expected(q, k, v, length, **OPTIONS["aligned"])
    np.testing.assert_allclose(
        np.asarray(out, np.float64), np.asarray(want, np.float64), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_both_layouts_agree_and_so_do_given_centroids():
    q, k, v = random(3)
    plain = block_topk_attention(q, k, v, length=77, **OPTIONS["local"])
    swapped = block_topk_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), length=77, layout="BKSH", **OPTIONS["local"])
    plan = Plan.make(S, 8, 2, 4, 11, None)
    means = block_means(k, plan, "BSKH")
    np.testing.assert_allclose(means, block_means(k.swapaxes(1, 2), plan, "BKSH"), atol=1e-6)
    given = block_topk_attention(q, k, v, length=77, centroids=means, **OPTIONS["local"])
    for other in (swapped, given):
        np.testing.assert_allclose(other, plain, atol=TOLERANCE[jnp.float32])


def test_score_of_a_centroid_is_the_mean_of_the_logits(x64):
    q, k, _ = random(4, batch=1, dtype=jnp.float64)
    means = block_means(k, Plan.make(S, 8, 3, 4, 0, None), "BSKH")
    by_mean = jnp.einsum("kh,kmh->km", q[0, 0].reshape(K, N // K, H).mean(1), means[0])
    logits = jnp.einsum("krh,skh->krs", q[0, 0].reshape(K, N // K, H), k[0])
    np.testing.assert_allclose(by_mean, logits.reshape(K, N // K, S // 8, 8).mean((1, 3)), atol=1e-13)
    chosen = select_blocks(q, means, size=S, block_size=8, num_blocks=3)
    np.testing.assert_array_equal(chosen[0], 1 + np.argsort(-np.asarray(by_mean)[:, 1:], axis=-1)[:, :3])


def test_blocks_of_one_key_are_oracle_topk(x64):
    q, k, v = random(5, dtype=jnp.float64)
    length = jnp.array([[20], [64], [96]])
    logits = jnp.einsum("btnh,bsnh->bnts", q / 4, jnp.repeat(k, N // K, 2))
    keep = topk_mask(logits, num_kv_heads=K, topk=10, num_sink=4, num_local=3, length=length)
    out = block_topk_attention(q, k, v, length=length[:, 0], block_size=1, num_blocks=10, num_local=3)
    np.testing.assert_allclose(out, masked_attention(q, k, v, keep), atol=1e-12)


@pytest.mark.parametrize("options", [{"num_blocks": 12, "num_sink": 0}, {"num_blocks": 11}, {"num_blocks": 5}])
def test_a_budget_of_everything_is_dense(options):
    q, k, v = random(6)
    # The last case: longer than the budget is the cache, not the sequence (5 blocks, 1 of sinks, and the tail).
    length = jnp.array([7, 31, 55] if options["num_blocks"] == 5 else [7, 31, 96])
    out = block_topk_attention(q, k, v, length=length, block_size=8, **options)
    dense = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length)
    np.testing.assert_allclose(out, dense, atol=TOLERANCE[jnp.float32])


def test_gradients_are_those_of_the_equation_and_of_differences(x64):
    q, k, v = random(7, dtype=jnp.float64)
    length = jnp.array([11, 60, 90])
    options = OPTIONS["local"]
    ours = functools.partial(block_topk_attention, length=length, **options)

    def loss(attend, q, k, v, scale):
        return (attend(q, k, v, scale=scale) * jnp.cos(jnp.arange(H))).sum()

    arguments = (q, k, v, 0.3)
    got = jax.grad(functools.partial(loss, ours), (0, 1, 2, 3))(*arguments)
    naive = functools.partial(expected, length=length, **options)
    want = jax.grad(functools.partial(loss, naive), (0, 1, 2, 3))(*arguments)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
    # No score is close enough to another for a step of 1e-6 to change what is chosen.
    check_grads(jax.jit(lambda q, k, v: ours(q, k, v)), (q, k, v), order=1, modes=("rev", "fwd"), atol=1e-6, rtol=1e-6)


def test_vmap_and_traced_lengths():
    q, k, v = (jnp.stack([x, x + 1]) for x in random(8))
    lengths = jnp.array([[5, 40, 96], [96, 33, 17]])
    attend = functools.partial(block_topk_attention, **OPTIONS["aligned"])
    mapped = jax.jit(jax.vmap(lambda q, k, v, n: attend(q, k, v, length=n)))(q, k, v, lengths)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], attend(q[i], k[i], v[i], length=lengths[i]), atol=1e-6)
