"""BlockFFN against the reference's numbers, closed forms and the dense formula.

What would be wrong without anyone noticing: experts of a negative scale dropped at decoding, pairs across documents,
statistics of padding, sums in bfloat16, a gradient that skips too much.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.moe import (
    BlockFFN,
    BlockFFNParams,
    activation_locality_loss,
    block_ffn,
    block_ffn_init,
    chunk_sparsification_loss,
    chunk_sparsity,
    route,
    token_sparsity,
)

# The reference takes the variance in float32 also where everything else is float64.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def case(vectors, name):
    v = {k.split("/")[1]: a for k, a in vectors("blockffn").items() if k.startswith(f"{name}/")}
    up = jnp.asarray(v["w_up"])
    experts, size, width = up.shape
    down = jnp.asarray(v["w_down"]).T.reshape(experts, size, width)
    params = BlockFFNParams(jnp.asarray(v["w_router"]).T, jnp.asarray(v["gamma"]), up, down)
    return v, params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("sparse", [True, False])
def test_equal_to_the_reference(vectors, name, sparse):
    v, params = case(vectors, name)
    chunk, sharpness, weight, eps = (float(x) for x in v["hyper"])
    x = jnp.asarray(v["x"])
    documents = jnp.asarray(np.cumsum(v["segment_shift"] < 0))
    real = jnp.asarray(v["seq_mask"].astype(bool))
    line = jnp.linspace(-1, 1, x.shape[1]).astype(x.dtype)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def objective(params, x):
        y, routing = block_ffn(params, x, eps=eps, sparse=sparse)
        local = activation_locality_loss(routing.logits, sharpness=sharpness, segment_ids=documents, mask=real)
        chunks = chunk_sparsification_loss(routing.hidden, chunk_size=int(chunk), mask=real)
        return (y * line).sum() + weight * local + chunks, (y, routing, local, chunks)

    (_, (y, routing, local, chunks)), (slopes, slope_x) = jax.jit(objective)(params, x)
    np.testing.assert_allclose(routing.logits, v["router_logits"], **CLOSE)
    np.testing.assert_allclose(routing.scores, v["router_scores"], **CLOSE)
    np.testing.assert_allclose(y, v["y"], **CLOSE)
    np.testing.assert_allclose(weight * local, v["al_loss_times_lambda"], **CLOSE)
    np.testing.assert_allclose(chunks, v["cs_loss"], **CLOSE)
    experts, size, width = params.up.shape
    # Gradients sum over tokens and through a sharpened sigmoid.
    wide = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(slope_x, v["g_x"], **wide)
    np.testing.assert_allclose(slopes.router.T, v["g_router"], **wide)
    np.testing.assert_allclose(slopes.gamma, v["g_gamma"], **wide)
    np.testing.assert_allclose(slopes.up, v["g_up"], **wide)
    np.testing.assert_allclose(slopes.down.reshape(experts * size, width).T, v["g_down"], **wide)
    # Metrics: the reference's windows leave out tokens without a neighbour on the left.
    np.testing.assert_allclose(token_sparsity(routing.scores), v["tls"], atol=1e-6)
    left = jnp.asarray(v["segment_shift"] >= 0)
    for length, active, total in zip(v["window_sizes"], v["window_active"], v["window_total"], strict=True):
        found = chunk_sparsity(routing.scores, chunk_size=int(length), mask=left)
        np.testing.assert_allclose(found, 1 - active / total, atol=1e-6)


@functools.cache
def random(tokens=12, width=16, experts=6, size=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = block_ffn_init(keys[0], dim=width, num_experts=experts, expert_dim=size)
    gamma = jax.random.normal(keys[1], (experts,))  # of both signs
    return params._replace(gamma=gamma), jax.random.normal(keys[2], (tokens, width))


def test_negative_scales_count_when_the_union_is_read():
    params, x = random()
    assert float(params.gamma.min()) < 0
    sparse, dense = (block_ffn(params, x, sparse=s)[0] for s in (True, False))
    np.testing.assert_allclose(sparse, dense, rtol=1e-5, atol=1e-5)
    positive, _ = block_ffn(params._replace(gamma=jnp.maximum(params.gamma, 0)), x, sparse=True)
    assert np.abs(positive - dense).max() > 1e-2


def test_a_scale_of_zero_still_learns():
    params, x = random()
    params = params._replace(gamma=jnp.zeros_like(params.gamma))
    sparse, dense = (
        jax.grad(lambda p: (block_ffn(p, x, sparse=s)[0] ** 2).sum() + block_ffn(p, x, sparse=s)[0].sum())(params)  # noqa: B023
        for s in (True, False)
    )
    np.testing.assert_allclose(sparse.gamma, dense.gamma, rtol=1e-4, atol=1e-5)
    assert np.abs(dense.gamma).max() > 1e-3


def test_one_expert_is_a_gated_network():
    params, x = random(experts=1)
    y, routing = block_ffn(params, x)
    on = routing.logits[:, 0] > 0
    assert on.any()
    assert not on.all()
    plain = jax.nn.silu(x @ params.up[0].T) @ params.down[0]
    # eps beside the mean square: below 1e-5 for logits of order 1.
    np.testing.assert_allclose(y, params.gamma[0] * jnp.where(on[:, None], plain, 0), rtol=1e-2, atol=1e-3)


def test_no_expert_gives_zero_and_finite_gradients():
    params, x = random()
    params = params._replace(router=-jnp.abs(params.router))
    x = jnp.abs(x)
    for sparse in (True, False):
        y, routing = block_ffn(params, x, sparse=sparse)
        assert not np.any(y)
        assert not np.any(routing.scores)
        slopes = jax.grad(lambda p: block_ffn(p, x, sparse=sparse)[0].sum())(params)  # noqa: B023
        assert all(np.isfinite(s).all() for s in jax.tree.leaves(slopes))


def test_the_router_does_not_care_for_scale():
    params, x = random()
    one, ten = (route(params._replace(router=c * params.router), x, eps=1e-12) for c in (1.0, 10.0))
    np.testing.assert_allclose(ten.scores, one.scores, rtol=1e-5)
    losses = [float(activation_locality_loss(r.logits, sharpness=1.0)) for r in (one, ten)]
    assert losses[0] != pytest.approx(losses[1], rel=0.05)


def test_nan_shows_and_stays_with_its_token():
    params, x = random()
    y, routing = block_ffn(params, x.at[3, 2].set(jnp.nan), sparse=True)
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(np.asarray(y), 3, 0)).all()
    assert np.isnan(routing.scores[3]).all()


@given(st.integers(0, 2**20), st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_a_mask_of_active_experts_changes_nothing(seed, tokens):
    params, x = random(tokens=9, seed=seed % 5)
    x = x[:tokens]
    np.testing.assert_allclose(
        block_ffn(params, x, sparse=True)[0], block_ffn(params, x, sparse=False)[0], rtol=1e-5, atol=1e-5
    )


def test_too_few_slabs_give_the_whole_sum():
    params, x = random()
    wanted = block_ffn(params, x, sparse=False)[0]
    np.testing.assert_allclose(block_ffn(params, x, sparse=True, max_active=1)[0], wanted, rtol=1e-5, atol=1e-5)


def test_jit_vmap_bfloat16_and_module():
    params, x = random()
    y, routing = block_ffn(params, x)
    batched = jax.jit(jax.vmap(lambda x: block_ffn(params, x)[0]))(jnp.stack([x, -x]))
    np.testing.assert_allclose(batched[0], y, rtol=1e-5, atol=1e-5)
    low, _ = block_ffn(params, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), y, atol=0.05)  # eight bits
    module = BlockFFN(params=params)
    graph, state = nnx.split(module)
    assert hash(graph) == hash(nnx.split(BlockFFN(params=params))[0])  # a static argument of jit
    again, routed = nnx.merge(graph, state)(x)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(routed.scores, routing.scores)


@pytest.mark.parametrize("split", ["tokens", "neurons"])
def test_eight_devices(split):
    params, x = random(tokens=16, size=8)
    mesh = Mesh(jax.devices(), ("d",))
    put = {"tokens": PartitionSpec("d"), "neurons": PartitionSpec()}[split]
    slabs = {"tokens": PartitionSpec(), "neurons": PartitionSpec(None, "d")}[split]
    sharded = params._replace(
        **{n: jax.device_put(getattr(params, n), NamedSharding(mesh, slabs)) for n in ("up", "down")},
        **{n: jax.device_put(getattr(params, n), NamedSharding(mesh, PartitionSpec())) for n in ("router", "gamma")},
    )
    got = jax.jit(lambda p, x: block_ffn(p, x, sparse=True)[0])(sharded, jax.device_put(x, NamedSharding(mesh, put)))
    np.testing.assert_allclose(got, block_ffn(params, x)[0], rtol=1e-5, atol=1e-5)


GOOD = random()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": jnp.ones(5)}, "gamma has shape"),
        ({"router": jnp.ones((16, 5))}, "router has shape"),
        ({"router": jnp.ones(16)}, r"expected \[D, Ne\]"),
        ({"down": jnp.ones((6, 4, 15))}, "up has shape"),
        ({"up": jnp.ones((6, 4, 15)), "down": jnp.ones((6, 4, 15))}, "router has shape"),
    ],
)
def test_parameters_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        block_ffn(GOOD[0]._replace(**changes), GOOD[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_active": 0}, "max_active is 0"),
        ({"max_active": 7}, "max_active is 7"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"sparse": False, "max_active": 2}, "does not use it"),
        ({"implementation": "pallas_tpu"}, "cannot run on platform 'cpu'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        block_ffn(*GOOD, **options)


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_experts is 0"):
        block_ffn_init(jax.random.key(0), dim=4, num_experts=0, expert_dim=2)
    with pytest.raises(ValueError, match="init_std is -1"):
        block_ffn_init(jax.random.key(0), dim=4, num_experts=2, expert_dim=2, init_std=-1.0)
    with pytest.raises(ValueError, match="expected dim, num_experts, expert_dim and rngs, or params"):
        BlockFFN(4, 2, 2)
    with pytest.raises(ValueError, match="params are given"):
        BlockFFN(4, params=GOOD[0])
