"""Bad input, hostile numbers in slots that do not count, sharding, and the kernels' refusals and gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import block_topk_attention as op
from kernels_pallas.block_topk_attention import block_topk_attention, gpu, select_blocks, tpu
from kernels_pallas.block_topk_attention.plan import Plan
from kernels_pallas.block_topk_attention.select import block_means
from tests.kernels_pallas.block_topk_attention.test_xla import H, K, N, S, expected, random

OPTIONS = {"block_size": 8, "num_blocks": 3, "num_local": 3}
attend = functools.partial(block_topk_attention, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"block_size": 0}, "block_size is 0, expected at least 1"),
        ({"num_blocks": 0}, "num_blocks is 0, expected at least 1"),
        ({"num_sink": -1}, "num_sink is -1, expected at least 0"),
        ({"num_local": -2}, "num_local is -2, expected at least 0"),
        ({"block_offset": 3}, "block_offset is 3, expected at least num_sink = 4"),
        ({"block_size": 7}, "block_size is 7, which does not divide the cache's 96 positions"),
        ({"num_blocks": 12}, "the budget is 107 positions .8 before the first block . 12 blocks of 8 . 3 local."),
        ({"length": 97}, "length is 97, expected 0 up to the 96 positions"),
        ({"length": -1}, "length is -1"),
        ({"length": jnp.array([1, 2])}, r"length has shape \(2,\), expected \(\) or \(3,\)"),
        ({"implementation": "cuda"}, "implementation is 'cuda', expected one of"),
        ({"implementation": "pallas_tpu"}, "cannot run on platform 'cpu'"),
        ({"centroids": jnp.ones((3, K, 5, H))}, r"centroids has shape \(3, 2, 5, 16\), expected \(3, 2, 12, 16\)"),
    ],
)
def test_bad_numbers(change, match):
    q, k, v = random(30)
    with pytest.raises(ValueError, match=match):
        block_topk_attention(q, k, v, **{**OPTIONS, **change})


def test_bad_shapes_and_types():
    q, k, v = random(31)
    with pytest.raises(ValueError, match="query has 6 heads, which the 4 heads of key do not divide"):
        attend(q, jnp.concatenate([k, k], 2), jnp.concatenate([v, v], 2))
    with pytest.raises(ValueError, match="query has head size 16, but key has 12: expected equal ones"):
        attend(q, k[..., :12], v)
    with pytest.raises(ValueError, match="one token per sequence"):
        attend(jnp.concatenate([q, q], 1), k, v)
    with pytest.raises(ValueError, match=r"value has shape \(3, 88, 2, 16\)"):
        attend(q, k, v[:, :88])
    with pytest.raises(ValueError, match="value is given with layout BKSHV"):
        attend(q, jnp.concatenate([k, v], -1).swapaxes(1, 2), v, layout="BKSHV")
    with pytest.raises(ValueError, match="value is None with layout BSKH"):
        attend(q, k, None)
    with pytest.raises(TypeError, match="length has dtype float32, expected integers"):
        attend(q, k, v, length=jnp.float32(4))


def test_traced_numbers_do_not_crash_and_stay_inside():
    q, k, v = random(32)
    out = jax.jit(lambda n: attend(q, k, v, length=n))(jnp.int32(1000))
    np.testing.assert_allclose(out, attend(q, k, v), atol=1e-6)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, 1e30])
@pytest.mark.parametrize("cached", [False, True])
def test_unused_slots_are_never_chosen_and_never_poison(poison, cached):
    q, k, v = random(33, batch=4)
    length = jnp.array([0, 3, 45, 90])
    want = attend(q, k, v, length=length)
    unused = (jnp.arange(S) >= length[:, None])[..., None, None]
    bad_k, bad_v = jnp.where(unused, poison, k), jnp.where(unused, poison, v)
    means = block_means(bad_k, Plan.make(S, 8, 3, 4, 3, None), "BSKH") if cached else None

    def loss(q, k, v):
        out = attend(q, k, v, length=length, centroids=means)
        return (out * 2).sum(), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, bad_k, bad_v)
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert not np.asarray(out[0]).any()
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)
    for grad in grads[1:]:
        assert not np.asarray(jnp.where(unused, grad, 0)).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_query_head_spoils_its_own_row_only(bad):
    q, k, v = random(34)
    length = jnp.array([50, 70, 96])
    out = np.asarray(attend(q.at[1, 0, 2, 5].set(bad), k, v, length=length))
    assert np.isnan(out[1, 0, 2]).all()
    rest = np.ones(out.shape[:3], bool)
    rest[1, 0, 2] = False
    assert np.isfinite(out[rest]).all()
    clean = np.asarray(attend(q, k, v, length=length))
    np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])
    # The other heads of its group choose without its vote.
    alone = attend(q.at[1, 0, 2].set(0), k, v, length=length)
    np.testing.assert_allclose(out[1, 0, :2], alone[1, 0, :2], atol=1e-6)


def test_no_position_counts_twice():
    """With equal logits everywhere the output is the plain mean of the values that are kept."""
    k = jnp.zeros((1, S, 1, H))
    v = jnp.arange(float(S)).reshape(1, S, 1, 1)
    for length in (7, 8, 9, 39, 40, 41, 43, 44, 95, 96):
        # Five blocks are more than there are between sink and tail at most of these lengths.
        out = block_topk_attention(
            jnp.ones((1, 1, 1, H)), k, v, length=length, block_size=8, num_blocks=5, num_local=11, num_sink=9
        )
        chosen = [*range(min(length, 16)), *range(16, min(16 + 40, (length - 11) // 8 * 8))]
        kept = sorted({*chosen, *range(max((length - 11) // 8 * 8, 0), length)})
        np.testing.assert_allclose(out[0, 0, 0, 0], np.mean(kept), rtol=1e-6)


def test_duplicates_in_a_list_of_choices_do_not_exist():
    q, k, _ = random(35)
    means = block_means(k, Plan.make(S, 8, 5, 4, 0, None), "BSKH")
    chosen = np.asarray(select_blocks(q, means * 0, length=55, size=S, block_size=8, num_blocks=5))
    assert (np.sort(chosen, -1) == np.arange(1, 6)).all()
    few = np.asarray(select_blocks(q, means * 0, length=20, size=S, block_size=8, num_blocks=5))
    assert (few == [1, -1, -1, -1, -1]).all()


def mesh():
    return jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharded_inputs():
    q, k, v = random(36, batch=8, heads=4)
    return q, k, v, jnp.arange(8) * 12 + 5


def loss(attend, q, k, v, length):
    out = attend(q, k, v, length=length)
    return (out * jnp.arange(H)).sum(), out


def test_named_sharding_over_batch_and_heads():
    arrays = sharded_inputs()
    step = jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))
    want = step(*arrays)
    specs = [PartitionSpec("batch", None, "heads")] * 3 + [PartitionSpec("batch")]
    placed = [jax.device_put(x, NamedSharding(mesh(), spec)) for x, spec in zip(arrays, specs, strict=True)]
    got = step(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # Heads and sequences do not need each other: nothing of the cache is sent. (XLA gathers the scores of all heads and
    # sequences, one number a block, before it takes the largest.)
    text = jax.jit(attend).lower(*placed[:3], length=placed[3]).compile().as_text()
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    for sizes in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text):
        assert math.prod(map(int, sizes.split(","))) <= 8 * K * S // 8


@pytest.mark.parametrize("name", ["xla", "pallas_tpu", "pallas_gpu"])
def test_shard_map(name):
    q, k, v, length = sharded_inputs()
    q, k, v = (jnp.tile(x, 8) for x in (q, k, v))
    plan = Plan.make(S, 16, 2, 4, 3, None)

    def one(q, k, v, length):
        if name == "xla":
            return block_topk_attention(q, k, v, length=length, block_size=16, num_blocks=2, num_local=3)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return op._attend(q, k, v, None, 1.0, length, plan, None, "BKSH", name, interpret=True)

    rows = PartitionSpec("batch", None, "heads")
    specs = {"in_specs": (rows, rows, rows, PartitionSpec("batch")), "out_specs": rows}
    # Interpreted kernels do not carry the axes that their values vary over; compiled ones do.
    out = jax.jit(jax.shard_map(one, mesh=mesh(), check_vma=name == "xla", **specs))(q, k, v, length)
    np.testing.assert_allclose(out, expected(q, k, v, length, block_size=16, num_blocks=2, num_local=3), atol=1e-5)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_gradient_of_a_kernel_is_that_of_xla(name):
    q, k, v = random(37, batch=2, width=128, value=128)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    length = jnp.array([40, 96])
    plan = Plan.make(S, 16, 2, 4, 3, None)

    def loss(q, k, v, scale, implementation):
        out = op._attend(
            q, k, v, None, 1.0, length, plan, scale, "BKSH", implementation, interpret=implementation != "xla"
        )
        return (out * jnp.cos(jnp.arange(128))).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=4)
    for a, b in zip(grad(q, k, v, 0.1, name), grad(q, k, v, 0.1, "xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_vmap_of_a_kernel(name):
    q, k, v = (jnp.stack([x, x * 0.5]) for x in random(38, batch=2, width=128, value=128))
    length = jnp.array([[40, 96], [3, 70]])
    plan = Plan.make(S, 16, 2, 4, 0, None)

    def one(implementation, q, k, v, length):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        interpret = implementation != "xla"
        return op._attend(q, k, v, None, 1.0, length, plan, None, "BKSH", implementation, interpret=interpret)

    got, want = (jax.jit(jax.vmap(functools.partial(one, i)))(q, k, v, length) for i in (name, "xla"))
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_what_kernels_refuse():
    def refusals(width=128, dtype=jnp.bfloat16, layout="BKSH", size=4096, batch=1, **options):
        q = jax.ShapeDtypeStruct((batch, 1, N, width), dtype)
        k = jax.ShapeDtypeStruct((batch, K, size, width) if layout != "BSKH" else (batch, size, K, width), dtype)
        merged = {"block_size": 16, "num_blocks": 64, "num_sink": 4, "num_local": 0, "block_offset": None, **options}
        plan = Plan.make(size, **merged)
        return tpu.refusal(q, k, k, plan, layout), gpu.refusal(q, k, k, plan, layout)

    assert refusals() == (None, None)
    for options, on_tpu, on_gpu in [
        ({"layout": "BSKH"}, "swapping axes would copy the whole cache", None),
        ({"width": 64}, "turning them would copy the whole cache", None),
        ({"width": 96}, "turning them", "key has head size 96, expected a power of two"),
        ({"dtype": jnp.float16}, "expected all float32 or all bfloat16", None),
        ({"dtype": jnp.float64}, "expected all float32 or all bfloat16", "all float16"),
        ({"block_size": 8}, "block_size is 8, expected a multiple of 16 for bfloat16", None),
        ({"block_size": 48, "size": 4800}, None, "block_size is 48, expected a power of two"),
        ({"block_offset": 4}, "block_offset is 4, expected a multiple of block_size = 16", None),
        ({"size": 65536, "num_blocks": 2048}, "bytes of VMEM", None),
        ({"batch": 2048}, "bytes of scalar memory", None),
    ]:
        for found, wanted in zip(refusals(**options), (on_tpu, on_gpu), strict=True):
            assert (found is None) == (wanted is None), (options, found)
            assert wanted is None or wanted in found
