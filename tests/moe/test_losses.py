"""Losses, metrics, the adaptive factor and the conversion of dense layers: closed forms and bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel.moe import (
    activation_locality_loss,
    adaptive_factor,
    block_ffn,
    chunk_sparsification_loss,
    chunk_sparsity,
    cluster_neurons,
    dead_experts,
    from_dense,
    reuse_ratio,
    route,
    token_sparsity,
)


@pytest.mark.parametrize("name", ["sched_a", "sched_b"])
def test_the_factor_is_the_references(vectors, name):
    v = vectors("blockffn")
    start, stable, every, most, least = v[f"{name}/params"]
    factor = adaptive_factor(
        float(start), stable_steps=int(stable), adjust_every=int(every), max_factor=float(most), min_ratio=float(least)
    )

    def step(state, loss):
        value, state = factor.update(state, loss)
        return state, value

    _, values = jax.jit(lambda losses: jax.lax.scan(step, factor.init(), losses))(
        jnp.asarray(v[f"{name}/losses"], jnp.float32)
    )
    np.testing.assert_allclose(values, v[f"{name}/lambda"], rtol=1e-5)  # float32 sums of a window


def test_a_constant_loss_keeps_the_factor():
    factor = adaptive_factor(0.1, stable_steps=4, adjust_every=2)
    state = factor.init()
    for _ in range(12):
        value, state = factor.update(state, 0.7)
    np.testing.assert_allclose(value, 0.1, rtol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adjust_every": 0}, ValueError, "adjust_every is 0"),
        ({"stable_steps": -1}, ValueError, "stable_steps is -1"),
        ({"stable_steps": 150}, ValueError, "at least 2·adjust_every = 200"),
        ({"max_factor": 0.5}, ValueError, "max_factor is 0.5"),
        ({"min_ratio": float("nan")}, ValueError, "min_ratio is nan"),
        ({"init_value": 0.0}, ValueError, "init_value is 0.0"),
    ],
)
def test_factors_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        adaptive_factor(**options)


def test_locality_of_constant_logits_is_an_entropy():
    p = jax.nn.sigmoid(100 * 0.01)
    wanted = -p * jnp.log(p) - (1 - p) * jnp.log(1 - p)
    np.testing.assert_allclose(activation_locality_loss(jnp.full((2, 5, 3), 0.01)), wanted, rtol=1e-5)


def test_gradient_of_locality_flows_through_both_sides():
    logits = 0.02 * jax.random.normal(jax.random.key(0), (4, 3))
    slope = jax.grad(activation_locality_loss)(logits)
    np.testing.assert_allclose(
        slope[0, 1],  # only as the left one of a pair
        (jax.nn.sigmoid(100 * logits[0, 1]) - jax.nn.sigmoid(100 * logits[1, 1])) * 100 / 9,
        rtol=1e-4,
    )
    assert np.abs(slope[3]).max() > 0  # only as the target


def test_no_pair_crosses_documents_or_padding():
    logits = jax.random.normal(jax.random.key(0), (6, 3))
    whole = activation_locality_loss(logits, segment_ids=jnp.array([0, 0, 0, 1, 1, 1]))
    parts = [activation_locality_loss(logits[a:b]) for a, b in ((0, 3), (3, 6))]
    np.testing.assert_allclose(whole, sum(parts) / 2, rtol=1e-6)
    real = jnp.array([True, True, True, False, False, False])
    broken = logits.at[4].set(jnp.nan)
    value, slope = jax.value_and_grad(lambda x: activation_locality_loss(x, mask=real))(broken)
    np.testing.assert_allclose(value, parts[0], rtol=1e-6)
    assert np.isfinite(slope).all()
    assert activation_locality_loss(logits, mask=jnp.zeros(6, bool)) == 0


def test_chunks_in_closed_form():
    experts, length = 5, 8
    one = jnp.zeros((16, experts)).at[:, 2].set(3.0)
    even = jnp.ones((16, experts))
    # Each factor 1 − p + 1e-5, eight times, for experts that are not used.
    np.testing.assert_allclose(chunk_sparsification_loss(one, chunk_size=length), 1 / experts, atol=1e-4)
    wanted = 1 - (1 - 1 / experts) ** length
    np.testing.assert_allclose(chunk_sparsification_loss(even, chunk_size=length), wanted, atol=1e-4)
    hidden = jax.nn.relu(jax.random.normal(jax.random.key(0), (16, experts)))
    np.testing.assert_allclose(chunk_sparsification_loss(hidden, chunk_size=1), 1 / experts, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_sixteen_bits_are_worked_in_float32(dtype):
    hidden = jax.nn.relu(jax.random.normal(jax.random.key(0), (16, 40))).astype(dtype)
    for loss in (activation_locality_loss, lambda x: chunk_sparsification_loss(x, chunk_size=8)):
        low, high = loss(hidden), loss(hidden.astype(jnp.float32))
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, high)
        assert np.isfinite(low)


def test_padding_and_filling_up():
    hidden = jax.nn.relu(jax.random.normal(jax.random.key(0), (12, 4)))
    filled = chunk_sparsification_loss(hidden, chunk_size=8, pad=True)
    longer = jnp.pad(hidden, ((0, 4), (0, 0)))
    np.testing.assert_allclose(filled, chunk_sparsification_loss(longer, chunk_size=8), rtol=1e-6)
    masked = chunk_sparsification_loss(longer + 1, chunk_size=8, mask=jnp.zeros(16, bool))
    np.testing.assert_allclose(masked, 0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: chunk_sparsification_loss(x, chunk_size=5), "does not divide the 12 tokens"),
        (lambda x: chunk_sparsification_loss(x, chunk_size=0), "chunk_size is 0"),
        (lambda x: chunk_sparsification_loss(x, chunk_size=4, mask=jnp.ones(11, bool)), "mask has shape"),
        (lambda x: chunk_sparsification_loss(x, chunk_size=4, eps=0.0), "eps is 0.0"),
        (lambda x: activation_locality_loss(x, segment_ids=jnp.zeros(11, int)), "segment_ids has shape"),
        (lambda x: activation_locality_loss(x[:1]), "at least 2 tokens"),
        (lambda x: activation_locality_loss(x, sharpness=0.0), "sharpness is 0.0"),
        (lambda x: chunk_sparsity(x, chunk_size=13), "chunk_size is 13"),
        (lambda x: token_sparsity(x, mask=jnp.ones(11, bool)), "mask has shape"),
        (lambda x: reuse_ratio(x, segment_ids=jnp.zeros(11, int)), "segment_ids has shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((12, 4)))


@given(st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_sparsity_of_chunks_falls_with_their_length(seed):
    scores = jnp.where(jax.random.uniform(jax.random.key(seed), (16, 6)) < 0.3, -1.0, 0.0)
    values = [float(chunk_sparsity(scores, chunk_size=n)) for n in (1, 2, 4, 8, 16)]
    assert values[0] == pytest.approx(float(token_sparsity(scores)), abs=1e-6)
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(float(dead_experts(scores)), abs=1e-6)


# From a dense layer ---------------------------------------------------------------------------------------------------


def planted():
    """A layer whose neurons work in four groups, each on a direction of its own."""
    keys = jax.random.split(jax.random.key(2), 4)
    directions = jnp.eye(16)[:4]
    up = jnp.repeat(directions, 6, 0) + 0.05 * jax.random.normal(keys[0], (24, 16))
    down = jax.random.normal(keys[1], (24, 16))
    x = jnp.repeat(directions, 64, 0) * 4 + 0.1 * jax.random.normal(keys[2], (256, 16))
    order = jax.random.permutation(keys[3], 24)
    return up[order], down[order], x, np.asarray(order) // 6


def test_neurons_that_fire_together_become_an_expert():
    up, down, x, group = planted()
    found = cluster_neurons(np.asarray(jax.nn.relu(x @ up.T)).T, 4)
    assert sorted(found.ravel().tolist()) == list(range(24))
    assert all(len({int(group[n]) for n in members}) == 1 for members in found)
    params = from_dense(up, down, x, num_experts=4, active=1, activation="relu", key=jax.random.key(0))
    wanted = jax.nn.relu(x @ up.T) @ down
    got, routing = block_ffn(params, x, activation="relu")
    assert float((routing.hidden != 0).mean()) < 0.5
    assert float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)) < 0.3


def test_a_router_that_sees_a_constant_can_keep_all_experts_on():
    keys = jax.random.split(jax.random.key(0), 3)
    up, down = (jax.random.normal(k, (12, 8)) for k in keys[:2])
    x = jax.random.normal(keys[2], (300, 8)).at[:, 0].set(5.0)
    params = from_dense(up, down, x, num_experts=3, active=3, key=jax.random.key(0))
    assert (route(params, x).hidden > 0).mean() > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 5}, "expected a divisor of the 24 neurons"),
        ({"active": 9}, "active is 9"),
        ({"down": jnp.ones((24, 15))}, "down"),
        ({"inputs": jnp.ones((256, 15))}, r"expected \[N, 16\]"),
        ({"inputs": jnp.ones((3, 16))}, "at least one for each of 4"),
        ({"inputs": jnp.full((256, 16), jnp.nan)}, "finite"),
        ({"activation": "tanh"}, "tanh"),
    ],
)
def test_dense_layers_that_cannot_be_cut(change, message):
    up, down, x, _ = planted()
    arguments = {"up": up, "down": down, "inputs": x, "num_experts": 4, "active": 2} | change
    with pytest.raises((ValueError, TypeError), match=message):
        from_dense(
            arguments.pop("up"), arguments.pop("down"), arguments.pop("inputs"), key=jax.random.key(0), **arguments
        )
