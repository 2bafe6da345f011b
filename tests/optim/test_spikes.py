"""Measures against loss spikes: rules and statistics, skipped steps to the bit, batches replaced, embeddings shrunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccel.optim import (
    SkipOnSpikeState,
    SpikeRule,
    draw_until_calm,
    embedding_mask,
    exadam,
    init_spike_state,
    is_spike,
    lion_lowp,
    scale_by_embedding_shrink,
    shrink_embedding_gradient,
    skip_on_spike,
    update_spike_state,
    with_batch_replacement,
)


@functools.cache
def stream(rule):
    """``losses -> (spikes, states)``, one program per rule."""

    def step(state, loss):
        after = update_spike_state(state, loss, rule)
        return after, (is_spike(state, loss, rule), after)

    return jax.jit(lambda losses: jax.lax.scan(step, init_spike_state(), losses)[1])


def flags(losses, **options):
    return np.asarray(stream(SpikeRule(**options))(jnp.asarray(losses, jnp.float32))[0]).astype(int).tolist()


# The rule -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_statistics_are_those_of_exponential_weights(decay):
    losses = np.random.default_rng(0).uniform(1, 2, 60).astype(np.float32)
    _, states = stream(SpikeRule(ema_decay=decay, factor=None, num_std=None))(losses)
    for t in (1, 2, 17, 60):
        weights = np.float64(decay) ** np.arange(t)[::-1]
        mean = np.average(losses[:t], weights=weights)
        # float32: a few dozen updates; with decay 0.99 each weight is a difference that loses two digits.
        np.testing.assert_allclose(states.mean[t - 1], mean, rtol=1e-5)
        variance = np.average((losses[:t] - mean) ** 2, weights=weights)
        np.testing.assert_allclose(states.var[t - 1], variance, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(states.calm, np.arange(1, 61))


def test_what_counts_as_a_spike():
    calm = [1.0, 1.2, 0.8, 1.0]
    only_factor, only_std = {"num_std": None}, {"factor": None}
    assert flags([*calm, 1.9, 2.5], warmup_steps=4, **only_factor) == [0, 0, 0, 0, 0, 1]
    # Deviation of the calm ones: 0.14; of them and 1.1: 0.13, around 1.02.
    assert flags([*calm, 1.7, 1.9], warmup_steps=4, num_std=6, **{"factor": None}) == [0, 0, 0, 0, 0, 0]
    assert flags([*calm, 1.1, 1.9], warmup_steps=4, **only_std) == [0, 0, 0, 0, 0, 1]
    assert flags([*calm, 1.1, 0.0, -5.0], warmup_steps=4) == [0] * 7  # below is never one
    assert flags([*calm, 1e30], warmup_steps=4, factor=None, num_std=None) == [0] * 5
    assert flags([*calm, np.inf, np.nan, -np.inf], factor=None, num_std=None) == [0] * 4 + [1] * 3
    # Negative losses: twice the mean would be below it.
    assert flags([-1.0, -1.0, -0.9, 0.1], warmup_steps=2, **only_factor) == [0, 0, 0, 1]


def test_warmup_lets_everything_finite_through():
    assert flags([1.0, 50.0, np.nan, 1.0, 900.0], warmup_steps=3) == [0, 0, 1, 0, 1]


def test_spikes_do_not_enter_the_statistics():
    losses = np.array([1.0, 1.1, 0.9, 100.0, np.nan, 1.0, 100.0], np.float32)
    _, states = stream(SpikeRule(warmup_steps=3))(losses)
    _, without = stream(SpikeRule(warmup_steps=3))(losses[[0, 1, 2, 5]])
    for with_spikes, calm in ((4, 2), (6, 3)):
        assert states.mean[with_spikes] == without.mean[calm]
        assert states.var[with_spikes] == without.var[calm]
    assert states.consecutive.tolist() == [0, 0, 0, 1, 2, 0, 1]
    assert states.spikes.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert states.calm.tolist() == [1, 2, 3, 3, 3, 4, 4]


def test_a_shift_of_level_is_accepted_after_some_spikes():
    losses = [1.0, 1.1, 0.9] + [10.0] * 4 + [9.0, 50.0]
    assert flags(losses, warmup_steps=3, max_consecutive=3) == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    _, states = stream(SpikeRule(warmup_steps=3, max_consecutive=3))(jnp.array(losses))
    assert (float(states.mean[6]), float(states.var[6]), int(states.calm[6])) == (10.0, 0.0, 1)  # starts again
    assert flags(losses, warmup_steps=3, max_consecutive=None) == [0, 0, 0] + [1] * 6
    # What is not finite is never let through, and does not use up the patience of what is.
    assert flags([1.0, 1.1, 0.9] + [np.nan] * 5 + [1.0], warmup_steps=3, max_consecutive=2) == [0] * 3 + [1] * 5 + [0]


def test_a_calm_loss_after_spikes_keeps_the_statistics():
    losses = [1.0, 1.1, 0.9, 10.0, 10.0, 1.0]
    _, states = stream(SpikeRule(warmup_steps=3, max_consecutive=2))(jnp.array(losses))
    assert int(states.calm[-1]) == 4


def test_a_saturated_counter_does_no_harm():
    state = init_spike_state()._replace(calm=jnp.int32(2**31 - 1), mean=jnp.float32(1), var=jnp.float32(1))
    after = update_spike_state(state, 2.0, SpikeRule())
    assert int(after.calm) == 2**31 - 1
    np.testing.assert_allclose([after.mean, after.var], [1.01, 0.99 * 1.01], rtol=1e-5)  # float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got ema_decay=1.0"),
        ({"ema_decay": float("nan")}, "ema_decay"),
        ({"factor": 1.0}, r"factor must be a finite number > 1 or None, got factor=1.0"),
        ({"factor": float("inf")}, "factor"),
        ({"factor": float("nan")}, "factor"),
        ({"num_std": 0.0}, "num_std must be a finite number > 0 or None, got num_std=0.0"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got warmup_steps=0"),
        ({"max_consecutive": 0}, "max_consecutive must be at least 1, got max_consecutive=0"),
        ({"max_consecutive": float("nan")}, "max_consecutive"),
    ],
)
def test_wrong_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpikeRule(**options)
    with pytest.raises(ValueError, match=message):
        skip_on_spike(optax.sgd(0.1), **options)


# Skipping -------------------------------------------------------------------------------------------------------------

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([0.1, 0.2])}


def same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@functools.cache
def adam_skipping():
    tx = skip_on_spike(optax.adamw(0.1), warmup_steps=2, max_consecutive=3)
    return tx, jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))


def gradient(i):
    return jax.tree.map(lambda p: jnp.sin(p + i), PARAMS)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("bad", [100.0, np.nan, np.inf])
def test_a_skipped_step_changes_nothing_to_the_bit(bad, jit):
    tx, update = adam_skipping()
    update = update if jit else lambda g, s, p, value: tx.update(g, s, p, value=value)
    state = tx.init(PARAMS)
    assert isinstance(state, SkipOnSpikeState)
    for i, loss in enumerate((1.0, 1.1, 0.9)):
        _, state = update(gradient(i), state, PARAMS, loss)
    spoilt = jax.tree.map(lambda g: g * bad, gradient(3))
    updates, after = update(spoilt, state, PARAMS, bad)
    same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    same(after.inner_state, state.inner_state)
    assert (int(after.spikes.spikes), int(after.spikes.consecutive)) == (1, 1)
    same(optax.apply_updates(PARAMS, updates), PARAMS)
    # And it leaves no trace in the step after.
    got, expected = update(gradient(4), after, PARAMS, 1.0), update(gradient(4), state, PARAMS, 1.0)
    same(got[0], expected[0])
    same(got[1].inner_state, expected[1].inner_state)
    assert int(got[1].spikes.consecutive) == 0


def test_calm_steps_are_the_inner_ones():
    tx, update = adam_skipping()
    state, inner = tx.init(PARAMS), optax.adamw(0.1)
    plain, inner_state = jax.jit(inner.update), inner.init(PARAMS)
    for i in range(6):
        updates, state = update(gradient(i), state, PARAMS, 1.0)
        expected, inner_state = plain(gradient(i), inner_state, PARAMS)
        # float32: inside a branch and outside of one, XLA fuses differently.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_patience_ends():
    tx, update = adam_skipping()
    state, moved = tx.init(PARAMS), []
    for i, loss in enumerate([1.0, 1.0, 1.0] + [9.0] * 5 + [np.nan] * 5):
        updates, state = update(gradient(i), state, PARAMS, loss)
        moved.append(bool(jnp.any(updates["w"] != 0)))
    assert moved == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 5
    assert int(state.spikes.spikes) == 8


def counting():
    """Adds the extra arguments to its updates, and needs the parameters."""

    def update(updates, state, params, *, value, scale, **extra):
        return jax.tree.map(lambda g, p: g * scale + p * value, updates, params), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def test_extra_arguments_and_the_loss_are_passed_on():
    tx = skip_on_spike(counting())
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=2.0, scale=3.0, accuracy=0.0)
    same(updates, jax.tree.map(lambda p: p * 3 + p * 2, PARAMS))
    assert int(state.inner_state) == 1
    with pytest.raises(TypeError, match="value"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def last_updates(tx, params=PARAMS, losses=(1.0, 1.1, 50.0, 1.0)):
    """Updates of each step, and the last state."""
    update, state, found = jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value)), tx.init(params), []
    for i, loss in enumerate(losses):
        updates, state = update(jax.tree.map(lambda p, i=i: (p + i).astype(p.dtype), params), state, params, loss)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 10))),
        lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 10)),
        lambda: optax.masked(optax.sgd(0.1, momentum=0.9), {"w": True, "b": False}),
        lambda: optax.partition({"x": optax.adam(0.1), "y": optax.set_to_zero()}, {"w": "x", "b": "y"}),
        lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        lambda: exadam(0.01),
        lambda: lion_lowp(0.01),
        lambda: optax.contrib.reduce_on_plateau(),
    ],
    ids=["chain", "inject", "masked", "partition", "multi", "exadam", "lion", "plateau"],
)
def test_any_transformation_can_be_inside(inner):
    tx = skip_on_spike(inner(), warmup_steps=2)
    updates, state = last_updates(tx)
    assert not any(np.any(u) for u in jax.tree.leaves(updates[2]))
    assert int(state.spikes.spikes) == 1
    expected, plain = last_updates(optax.with_extra_args_support(inner()), losses=(1.0, 1.1))
    # float32: another program around it
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates[:2], expected)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain)


def test_inside_a_chain_and_scan():
    tx = optax.chain(optax.clip_by_global_norm(1e9), skip_on_spike(optax.sgd(1.0), warmup_steps=2), optax.scale(2.0))
    losses = jnp.array([1.0, 1.1, 50.0, 1.0])

    def step(carry, loss):
        params, state = carry
        updates, state = tx.update(PARAMS, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), params["b"]

    (_, state), found = jax.jit(lambda carry: jax.lax.scan(step, carry, losses))((PARAMS, tx.init(PARAMS)))
    # float32, sums of three
    np.testing.assert_allclose(found, np.array([-1, -3, -3, -5])[:, None] * np.array([0.1, 0.2]), rtol=1e-5)
    assert int(state[1].spikes.spikes) == 1


def test_inject_hyperparams_around_it_traces_every_number():
    def optimizer(learning_rate, ema_decay, factor, num_std, warmup_steps, max_consecutive):
        return skip_on_spike(
            optax.sgd(learning_rate),
            ema_decay=ema_decay,
            factor=factor,
            num_std=num_std,
            warmup_steps=warmup_steps,
            max_consecutive=max_consecutive,
        )

    wrapped = optax.inject_hyperparams(optimizer)(
        learning_rate=0.1, ema_decay=0.9, factor=3.0, num_std=50.0, warmup_steps=2, max_consecutive=1
    )
    updates, state = last_updates(wrapped, losses=(1.0, 1.1, 2.9, 50.0, 50.0))
    assert [bool(np.any(u["w"])) for u in updates] == [True, True, True, False, True]
    assert set(state.hyperparams) == {
        "learning_rate", "ema_decay", "factor", "num_std", "warmup_steps", "max_consecutive",
    }  # fmt: skip


def test_bfloat16_losses_and_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    losses = tuple(jnp.asarray(loss, jnp.bfloat16) for loss in (1.0, 1.1, 50.0, 1.0))
    updates, state = last_updates(skip_on_spike(optax.adam(0.1), warmup_steps=2), params, losses)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert int(state.spikes.spikes) == 1
    assert state.spikes.mean.dtype == jnp.float32


def test_float64(x64):
    params = {"w": jnp.ones(3, jnp.float64)}
    updates, state = last_updates(skip_on_spike(optax.adam(0.1), warmup_steps=2), params)
    assert updates[2]["w"].dtype == jnp.float64
    assert state.spikes.spikes.dtype == jnp.int32
    assert int(state.spikes.spikes) == 1


def test_none_leaves_and_empty_trees():
    tx = skip_on_spike(optax.sgd(0.1))
    params = {"w": jnp.ones(2), "static": None}
    updates, _ = tx.update(params, tx.init(params), params, value=jnp.nan)
    assert updates["static"] is None
    assert tx.update({}, tx.init({}), {}, value=1.0)[0] == {}


def test_vmap_skips_row_by_row():
    tx, _ = adam_skipping()
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
    update = jax.jit(jax.vmap(lambda s, value: tx.update(PARAMS, s, PARAMS, value=value)))
    for losses in ([1.0, 1.0], [1.0, 1.0], [9.0, 1.0]):
        updates, after = update(states, jnp.array(losses))
        states, before = after, states
    assert not np.any(updates["w"][0])
    assert np.all(updates["w"][1])
    same(*(jax.tree.map(lambda x: x[0], s.inner_state) for s in (after, before)))


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tx = skip_on_spike(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), warmup_steps=2)
    params = jax.random.normal(jax.random.key(6), (16, 3))
    expected, _ = last_updates(tx, params)
    sharded = jax.device_put(params, sharding)
    state, update = jax.jit(tx.init)(sharded), jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))
    for i, loss in enumerate((1.0, 1.1, 50.0, 1.0)):
        updates, state = update(sharded + i, state, sharded, loss)
        assert updates.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(updates, expected[i], rtol=1e-5, atol=1e-7)  # float32, sums over devices
    assert state.inner_state[1][0].mu.sharding.is_equivalent_to(sharding, 2)


def test_skipping_protects_training_from_a_bad_batch():
    x = jax.random.normal(jax.random.key(0), (100, 8, 4))
    y = (x @ jnp.array([1.0, -2.0, 0.5, 3.0]) + 0.1).at[60].multiply(-1e4)  # one broken batch

    def last_loss(tx):
        def step(carry, batch):
            w, state = carry
            loss, slope = jax.value_and_grad(lambda w: jnp.mean((batch[0] @ w - batch[1]) ** 2) + 0.1)(w)
            updates, state = tx.update(slope, state, w, value=loss)
            return (optax.apply_updates(w, updates), state), loss

        w = jnp.zeros(4)
        return jax.jit(lambda carry: jax.lax.scan(step, carry, (x, y))[1])((w, tx.init(w)))[-1]

    plain = optax.with_extra_args_support(optax.sgd(0.05))
    assert last_loss(skip_on_spike(optax.sgd(0.05))) < 0.2 < 100 * 0.2 < last_loss(plain)


# Batch replacement ----------------------------------------------------------------------------------------------------

RULE = SpikeRule(warmup_steps=1)


def calm_state():
    return update_spike_state(init_spike_state(), 1.0, RULE)


@pytest.mark.parametrize(
    ("losses", "candidate", "spiked"),
    [
        ([1.0, 0.5, 0.4], 0, False),
        ([9.0, 0.5, 0.4], 1, False),
        ([np.nan, 9.0, 0.4], 2, False),
        ([9.0, np.inf, 7.0], 2, True),
        ([0.5], 0, False),
        ([9.0], 0, True),
    ],
)
def test_the_first_calm_batch_is_drawn(losses, candidate, spiked):
    batches = {"loss": jnp.array(losses), "x": jnp.arange(len(losses) * 2.0).reshape(-1, 2)}
    draw = jax.jit(
        lambda b: draw_until_calm(lambda one: (one["loss"], {"sum": one["x"].sum()}), calm_state(), b, rule=RULE)
    )(batches)
    assert (int(draw.candidate), bool(draw.spiked)) == (candidate, spiked)
    np.testing.assert_array_equal(draw.loss, np.float32(losses[candidate]))
    assert float(draw.out["sum"]) == batches["x"][candidate].sum()


def test_gradients_are_drawn_with_their_batch():
    w = jnp.array([1.0, 2.0])
    draw = draw_until_calm(
        jax.value_and_grad(lambda w_x: jnp.sum(w * w_x) ** 2),
        calm_state(),
        jnp.array([[3.0, 3.0], [0.1, 0.1]]),
        rule=RULE,
    )
    np.testing.assert_allclose(draw.out, 2 * 0.3 * w, rtol=1e-6)  # float32


def test_nothing_is_tried_after_the_first_calm_batch():
    seen = []

    def evaluate(x):
        jax.debug.callback(lambda value: seen.append(float(value)), x)
        return x, ()

    draw = draw_until_calm(evaluate, calm_state(), jnp.array([50.0, 1.0, 2.0]), rule=RULE)
    jax.block_until_ready(draw.loss)
    jax.effects_barrier()
    assert seen == [50.0, 1.0]


def train_step(carry, batch):
    """Carries what training carries: parameters, an optimizer's state, a key, a count."""
    params, state, key, count = carry
    key, _ = jax.random.split(key)
    loss, slope = jax.value_and_grad(lambda w: jnp.mean((batch @ w) ** 2))(params)
    updates, state = optax.adam(0.1).update(slope, state, params)
    return (optax.apply_updates(params, updates), state, key, count + 1), loss


def bits(carry):
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, carry)


def test_a_step_is_repeated_from_the_same_carry():
    params = jnp.array([1.0, -1.0])
    carry = params, optax.adam(0.1).init(params), jax.random.key(0), jnp.int32(0)
    good, bad = jnp.full((4, 2), 0.1).at[:, 0].set(0.5), jnp.full((4, 2), 300.0).at[:, 0].set(0.5)
    step = jax.jit(with_batch_replacement(train_step, rule=RULE))
    got, state, draw = step(carry, calm_state(), jnp.stack([bad, good, bad]))
    expected, loss = jax.jit(train_step)(carry, good)
    # float32: a loop and no loop
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), bits(got), bits(expected))
    assert (int(draw.candidate), bool(draw.spiked), int(state.spikes), int(state.calm)) == (1, False, 0, 2)
    np.testing.assert_allclose(draw.loss, loss, rtol=1e-6)
    kept, state, draw = step(carry, calm_state(), jnp.stack([bad, bad, bad]))
    same(bits(kept), bits(carry))
    assert (int(draw.candidate), bool(draw.spiked), int(state.spikes)) == (2, True, 1)


def test_default_rule_of_replacement():
    step = with_batch_replacement(lambda total, x: (total + x, x))
    total, state, _ = step(jnp.zeros(()), init_spike_state(), jnp.array([99.0, 1.0]))
    assert (float(total), int(state.calm)) == (99.0, 1)  # warming up


@pytest.mark.parametrize("candidates", [{}, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}, jnp.ones((0, 3)), jnp.ones(())])
def test_candidates_must_be_batches(candidates):
    with pytest.raises(ValueError, match="candidates must have one leading axis of at least 1 batch in common"):
        draw_until_calm(lambda x: (1.0, ()), init_spike_state(), candidates, rule=RULE)


# Embedding gradient shrink --------------------------------------------------------------------------------------------

MODEL = {"embedding": jnp.array([3.0, -4.0]), "layers": [{"q": jnp.array([1.0, 2.0])}]}


def after_steps(tx, steps=4):
    """Parameters after some steps on gradients that differ from step to step."""

    def step(carry, i):
        params, state = carry
        slopes = jax.tree.map(lambda p: jnp.sin(3 * p + i), params)
        updates, state = tx.update(slopes, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[0][0])((MODEL, tx.init(MODEL)))


def test_alpha_one_is_the_identity():
    tx = scale_by_embedding_shrink(1.0)
    same(tx.update(MODEL, tx.init(MODEL))[0], MODEL)


def test_with_sgd_the_embedding_moves_by_exactly_alpha():
    tx = optax.chain(scale_by_embedding_shrink(0.125), optax.sgd(0.1))
    plain = optax.sgd(0.1)
    got, _ = tx.update(MODEL, tx.init(MODEL), MODEL)
    expected, _ = plain.update(MODEL, plain.init(MODEL), MODEL)
    np.testing.assert_array_equal(got["embedding"], 0.125 * expected["embedding"])  # a power of two: no rounding
    same(got["layers"], expected["layers"])


def test_adam_alone_does_not_see_it_and_clipping_does():
    plain = after_steps(optax.adam(0.1, eps=0.0))
    shrunk = after_steps(optax.chain(scale_by_embedding_shrink(0.1), optax.adam(0.1, eps=0.0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), shrunk, plain)  # float32
    clip = optax.clip_by_global_norm(0.5)  # reached in some steps, not in all: else Adam would not see that either
    clipped = after_steps(optax.chain(clip, optax.adam(0.1, eps=0.0)))
    both = after_steps(optax.chain(scale_by_embedding_shrink(0.1), clip, optax.adam(0.1, eps=0.0)))
    assert np.abs(both["layers"][0]["q"] - clipped["layers"][0]["q"]).max() > 1e-3


def test_with_sgd_clipping_shrinks_the_others_less():
    clip, shrink = optax.clip_by_global_norm(1.0), scale_by_embedding_shrink(0.1)
    one, _ = clip.update(MODEL, clip.init(MODEL))
    tx = optax.chain(shrink, clip)
    two, _ = tx.update(MODEL, tx.init(MODEL))
    ratio = np.asarray(two["layers"][0]["q"] / one["layers"][0]["q"])
    np.testing.assert_allclose(ratio, np.sqrt(30) / np.sqrt(5.25), rtol=1e-6)  # norms before and after, float32


def test_inside_the_model_is_the_same_gradient_and_the_same_values():
    table = jnp.array([[0.1, 0.2], [0.3, -0.7]], jnp.float32)
    same(shrink_embedding_gradient(table, 0.1), table)

    def loss(table, alpha):
        return jnp.sum(jnp.tanh(shrink_embedding_gradient(table, alpha)[jnp.array([0, 1, 1])]) ** 2)

    plain = jax.grad(loss)(table, 1.0)
    tx = scale_by_embedding_shrink(0.1)
    expected, _ = tx.update({"embed": plain}, tx.init({"embed": table}))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(table, 0.1), expected["embed"], rtol=1e-6)  # float32
    same(jax.grad(loss)(table, 0.0), jnp.zeros((2, 2)))


def test_a_tied_matrix_shrinks_as_a_whole_outside_and_in_part_inside():
    table, x = jnp.array([[0.5, 0.2], [0.3, -0.7]]), jnp.array([0, 1])

    def loss(table, alpha):
        return jnp.sum(shrink_embedding_gradient(table, alpha)[x] @ table.T)

    head = jax.grad(lambda head: jnp.sum(table[x] @ head.T))(table)
    same(jax.grad(loss)(table, 0.0), head)
    tx = scale_by_embedding_shrink(0.0)
    same(tx.update({"embed": jax.grad(loss)(table, 1.0)}, tx.init({"embed": table}))[0]["embed"], jnp.zeros((2, 2)))


@pytest.mark.parametrize("alpha", [0.1, np.float32(0.1), jnp.float32(0.1)])
def test_bfloat16_gradients_keep_their_dtype(alpha):
    tx = scale_by_embedding_shrink(alpha)
    params = {"embed": jnp.ones(3, jnp.bfloat16), "w": jnp.ones(3, jnp.bfloat16)}
    got, _ = tx.update(params, tx.init(params))
    assert {g.dtype for g in got.values()} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(got["embed"], jnp.bfloat16(0.1))
    inside, pull = jax.vjp(lambda e: shrink_embedding_gradient(e, alpha), params["embed"])
    assert inside.dtype == pull(inside)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(pull(inside)[0].astype(jnp.float32), 0.1, rtol=2**-8)  # bfloat16


def test_wrappers_of_optax_around_the_shrink():
    def optimizer(learning_rate, alpha):
        return optax.chain(scale_by_embedding_shrink(alpha), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(optimizer)(learning_rate=1.0, alpha=optax.linear_schedule(0.0, 1.0, 2))
    state, found = tx.init(MODEL), []
    for _ in range(3):
        updates, state = jax.jit(tx.update)(MODEL, state, MODEL)
        found.append(float(updates["embedding"][0]))
    np.testing.assert_allclose(found, [0.0, -1.5, -3.0])
    with_none = {"embed": jnp.ones(2), "static": None}
    assert (
        scale_by_embedding_shrink().update(with_none, scale_by_embedding_shrink().init(with_none))[0]["static"] is None
    )


def test_eight_devices_keep_sharded_embeddings():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {"embedding": jax.device_put(jnp.ones((16, 3)), sharding)}
    tx = scale_by_embedding_shrink(0.5)
    got, _ = jax.jit(tx.update)(params, tx.init(params))
    assert got["embedding"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(got["embedding"], 0.5)


def test_which_leaves_are_embeddings():
    params = {
        "wte": {"Embed_0": 1.0}, "token_embedder": 1.0, "position_embeddings": [1.0], "q": 1.0,
        "unembed": 1.0, "un_embedding": {"kernel": 1.0}, "Unembedding": 1.0,
    }  # fmt: skip
    assert embedding_mask(params) == {
        "wte": {"Embed_0": True}, "token_embedder": True, "position_embeddings": [True], "q": False,
        "unembed": False, "un_embedding": {"kernel": False}, "Unembedding": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match='no leaf has "embed" in its path: give a mask'):
        embedding_mask({"q": 1.0})
    with pytest.raises(ValueError, match="no leaf has"):
        scale_by_embedding_shrink().init({"q": jnp.ones(1)})
    tx = scale_by_embedding_shrink(0.5, mask={"q": True, "embed": False})
    got, _ = tx.update({"q": jnp.ones(1), "embed": jnp.ones(1)}, tx.init({"q": jnp.ones(1), "embed": jnp.ones(1)}))
    assert (float(got["q"][0]), float(got["embed"][0])) == (0.5, 1.0)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_wrong_alphas_are_named(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, got alpha="):
        scale_by_embedding_shrink(alpha)
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0"):
        shrink_embedding_gradient(jnp.ones(1), alpha)
