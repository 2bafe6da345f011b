"""AccelAT's controller, the policies it is compared with, and what tells it from optax's plateau controller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccel.optim import epoch_policies
from jaxaccel.optim.accelat import (
    AccelATConfig,
    AccelATState,
    accelat_init,
    accelat_update,
    scale_by_accuracy_gradient,
)

SCENARIOS = ("sat", "step", "flat", "up", "custom")


@functools.partial(jax.jit, static_argnames="cfg")
def used(accuracies, cfg):
    """The rate used in each epoch, and the state after it."""

    def epoch(state, accuracy):
        after = accelat_update(state, accuracy, cfg=cfg)
        return after, (state.learning_rate, after)

    return jax.lax.scan(epoch, accelat_init(cfg), jnp.asarray(accuracies, jnp.float32))[1]


def reference(vectors, scenario):
    data = {k.split("/")[1]: v for k, v in vectors("accelat").items() if k.startswith(f"accelat_{scenario}/")}
    cfg = AccelATConfig()
    if scenario == "custom":
        cfg = AccelATConfig(
            learning_rate=float(data["in_lr"]),
            factor=float(data["factor"]),
            min_learning_rate=float(data["min_lr"]),
            window=int(data["window"]),
            quiet=int(data["quiet"]),
            threshold=float(data["thr"]),
        )
    return data, cfg


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_equals_the_reference_code(scenario, vectors):
    data, cfg = reference(vectors, scenario)
    rates, states = used(data["val_acc"], cfg)
    # Both are float32; only the order of two roundings in repeated products may differ.
    np.testing.assert_allclose(rates, data["lr_used"], rtol=1e-6)
    # Full windows only: the reference's partial ones are slices with a negative start. float32 against float64.
    np.testing.assert_allclose(states.prev_mean[cfg.window - 1 :], data["moving_mean"][cfg.window - 1 :], rtol=1e-6)


def test_eager_equals_jit(vectors):
    data, cfg = reference(vectors, "custom")
    state, rates = accelat_init(cfg), []
    for accuracy in data["val_acc"][:25]:
        rates.append(float(state.learning_rate))
        state = accelat_update(state, accuracy, cfg=cfg)
    np.testing.assert_array_equal(rates, used(data["val_acc"], cfg)[0][:25])
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, accelat_init(cfg))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(0, 7), st.floats(0, 1))
def test_constant_accuracy_has_a_closed_form(window, quiet, accuracy):
    cfg = AccelATConfig(learning_rate=1.0, factor=0.5, min_learning_rate=0.5**4, window=window, quiet=quiet)
    rates = np.asarray(used([accuracy] * 30, cfg)[1].learning_rate)
    n = np.arange(1, 31)
    reductions = np.where(n < window + 2, 0, 1 + (n - window - 2) // max(quiet, 1))
    np.testing.assert_array_equal(rates, 0.5 ** np.minimum(reductions, 4))  # powers of two are exact


@pytest.mark.parametrize("window", [1, 3, 5, 8])
def test_a_rise_of_exactly_the_threshold_never_lowers_the_rate(window):
    cfg = AccelATConfig(window=window, threshold=0.01)
    accuracies = 0.03 + 0.01 * np.arange(90)  # not representable: float32 rounds each of them
    rates, _ = used(accuracies, cfg)
    np.testing.assert_array_equal(rates, np.float32(cfg.learning_rate))
    slower, _ = used(0.03 + 0.0099 * np.arange(90), cfg)
    assert float(slower[window + 2]) < cfg.learning_rate


def test_rates_only_fall_and_falling_accuracy_counts():
    accuracies = jax.random.uniform(jax.random.key(0), (60,))
    rates, _ = used(accuracies, AccelATConfig())
    assert (np.diff(rates) <= 0).all()
    falling, _ = used(np.linspace(0.9, 0.1, 10), AccelATConfig())
    np.testing.assert_allclose(falling[6:8], [1e-3, 8e-4], rtol=1e-6)  # the end of epoch window + 2 is the first chance


def test_vmap_over_runs():
    cfg = AccelATConfig()
    runs = jax.random.uniform(jax.random.key(1), (3, 20))
    together = jax.vmap(lambda accuracies: used(accuracies, cfg)[0])(runs)
    for run, rates in zip(runs, together, strict=True):
        np.testing.assert_array_equal(rates, used(run, cfg)[0])


@pytest.mark.parametrize("bad", [float("nan"), 1.01, 65.0, -0.1])
def test_accuracies_that_are_no_fractions(bad):
    cfg = AccelATConfig()
    state = accelat_init(cfg)
    for value in (bad, np.float32(bad), jnp.float32(bad)):
        with pytest.raises(ValueError, match=r"accuracy must be in \[0, 1\]"):
            accelat_update(state, value, cfg=cfg)
    # Under jit they change nothing and are counted.
    after = jax.jit(lambda s, a: accelat_update(s, a, cfg=cfg))(state, bad)
    assert int(after.ignored) == 1
    for got, expected in zip(after._replace(ignored=state.ignored), state, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got factor=1.0"),
        ({"factor": 0.0}, "factor"),
        ({"min_learning_rate": -1.0}, "min_learning_rate"),
        (
            {"min_learning_rate": 0.1},
            "min_learning_rate must be at most learning_rate=0.001, got min_learning_rate=0.1",
        ),
        ({"window": 0}, "window must be >= 1, got window=0"),
        ({"quiet": -1}, "quiet must be >= 0, got quiet=-1"),
        ({"threshold": float("nan")}, "threshold must be finite"),
    ],
)
def test_wrong_parameters_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AccelATConfig(**kwargs)


def epochs(tx, params, accuracies, steps=3):
    """Drive ``tx`` with unit gradients as a training loop does; return every update's size."""
    step = jax.jit(lambda state, accuracy, end: tx.update(params, state, params, accuracy=accuracy, epoch_end=end))
    state, sizes = tx.init(params), []
    for epoch in range(len(accuracies) + 1):
        for i in range(steps):
            measured = accuracies[epoch - 1] if epoch else float("nan")
            updates, state = step(state, measured, epoch > 0 and i == 0)
            sizes.append(jax.tree.leaves(updates)[0])
    return np.stack(sizes), state


def test_the_transform_applies_the_controller(vectors):
    data, cfg = reference(vectors, "custom")
    tx = optax.chain(optax.clip_by_global_norm(1e6), scale_by_accuracy_gradient(cfg))
    sizes, state = epochs(tx, {"w": jnp.ones(1)}, data["val_acc"][:30])
    np.testing.assert_allclose(sizes[:, 0], -np.repeat(data["lr_used"][:31], 3), rtol=1e-6)  # float32
    assert isinstance(state[1], AccelATState)
    assert int(state[1].epoch) == 30
    assert int(state[1].ignored) == 0  # the NaN of the first epoch was never read


def test_the_transform_keeps_dtypes_and_works_in_wrappers():
    cfg = AccelATConfig(learning_rate=0.3)
    params = {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(2), "none": None}
    tx = scale_by_accuracy_gradient(cfg)
    updates, state = tx.update(params, tx.init(params), accuracy=0.5, epoch_end=True)
    assert jax.tree.map(lambda u: u.dtype, updates) == {"w": jnp.bfloat16, "b": jnp.float32, "none": None}
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), -0.3, rtol=2**-8)  # bfloat16
    assert int(state.epoch) == 1
    split = optax.partition({"x": tx, "y": optax.set_to_zero()}, {"w": "x", "b": "y", "none": "y"})
    updates, _ = split.update(params, split.init(params), params, accuracy=0.5, epoch_end=False)
    np.testing.assert_array_equal(updates["b"], 0.0)
    every = optax.MultiSteps(tx, 2)
    state = every.init(params)
    for _ in range(2):
        updates, state = every.update(params, state, params, accuracy=0.5, epoch_end=False)
    np.testing.assert_allclose(updates["b"], -0.3, rtol=1e-6)  # float32
    batch = jax.vmap(lambda g, a: tx.update(g, tx.init(g), accuracy=a, epoch_end=True)[0])(
        jnp.ones((2, 3)), jnp.ones(2)
    )
    np.testing.assert_allclose(batch, -0.3, rtol=1e-6)


def test_the_transform_checks_what_it_can_see():
    tx = scale_by_accuracy_gradient(AccelATConfig())
    state = tx.init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"a fraction and not a percentage, got accuracy=72.0"):
        tx.update(jnp.ones(2), state, accuracy=72.0, epoch_end=True)
    tx.update(jnp.ones(2), state, accuracy=float("nan"), epoch_end=False)  # not read
    with pytest.raises(TypeError, match="accuracy"):
        tx.update(jnp.ones(2), state, epoch_end=True)


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tx = scale_by_accuracy_gradient(AccelATConfig(learning_rate=0.1))
    gradient = jax.random.normal(jax.random.key(2), (16, 3))
    step = jax.jit(lambda g, s: tx.update(g, s, accuracy=0.5, epoch_end=True)[0])
    got = step(jax.device_put(gradient, sharding), tx.init(gradient))
    assert got.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(got, step(gradient, tx.init(gradient)))


def test_plateau_controller_of_optax_is_something_else():
    """Accuracy creeps to a new record every epoch: AccelAT lowers the rate, the plateau controller does not."""
    creeping = 0.5 + 0.002 * np.arange(30)
    rates, _ = used(creeping, AccelATConfig(learning_rate=1.0))
    assert float(rates[-1]) < 0.5
    plateau = optax.contrib.reduce_on_plateau(factor=0.8, patience=5, cooldown=5)
    state = plateau.init(jnp.ones(1))
    for accuracy in creeping:
        _, state = plateau.update(jnp.ones(1), state, value=1.0 - accuracy)
    assert float(state.scale) == 1.0
    # And the other way round: a single early peak keeps the plateau controller waiting for a better best value,
    # while steady recovery from below satisfies AccelAT.
    recovering = np.concatenate([[0.9], 0.1 + 0.02 * np.arange(29)])
    rates, _ = used(recovering, AccelATConfig(learning_rate=1.0))
    state = plateau.init(jnp.ones(1))
    for accuracy in recovering:
        _, state = plateau.update(jnp.ones(1), state, value=1.0 - accuracy)
    assert (float(rates[-1]), float(state.scale) < 1.0) == (1.0, True)


def policies(total):
    """The five policies with the reference's base rates."""
    return {
        "constant": epoch_policies.constant(1e-4),
        "piecewise": epoch_policies.piecewise(1e-4, total),
        "linear": epoch_policies.cyclic_linear(1e-4, total),
        "exponential": epoch_policies.exponential(1e-8, total),
        "one_cycle": epoch_policies.one_cycle(1e-4, total),
    }


@pytest.mark.parametrize("name", ["constant", "piecewise", "linear", "exponential", "one_cycle"])
def test_policies_equal_the_reference_code(name, vectors, x64):
    data = vectors("accelat")
    total = int(data["schedule/total_epochs"])
    policy = policies(total)[name]
    expected = data[f"schedule/{name}"]
    got = [policy(epoch) for epoch in range(total)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)  # float64
    np.testing.assert_allclose(jax.jit(jax.vmap(policy))(jnp.arange(total)), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["constant", "piecewise", "linear", "exponential", "one_cycle"])
def test_policies_drive_optimizers(name):
    schedule = epoch_policies.epoch_schedule(policies(4)[name], steps_per_epoch=3)
    tx = optax.sgd(schedule)
    state, rates = tx.init(jnp.zeros(())), []
    update = jax.jit(tx.update)
    for _ in range(12):
        step, state = update(jnp.ones(()), state)
        rates.append(-float(step))
    np.testing.assert_allclose(rates, np.repeat([policies(4)[name](e) for e in range(4)], 3), rtol=1e-6)  # float32


def test_policies_take_traced_rates():
    for make in (epoch_policies.piecewise, epoch_policies.cyclic_linear, epoch_policies.one_cycle):
        traced = jax.jit(lambda rate, make=make: make(rate, 10)(jnp.int32(4)))(0.1)
        np.testing.assert_allclose(traced, make(0.1, 10)(4), rtol=1e-6)  # float32
    slope = jax.grad(lambda rate: epoch_policies.one_cycle(rate, 10)(4))(0.1)
    np.testing.assert_allclose(slope, 10.0, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda r: epoch_policies.constant(r)(3))(0.1), 0.1, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda r: epoch_policies.polynomial(r, 4)(1))(0.1), 0.075, rtol=1e-6)


def test_cyclic_linear_has_teeth_that_start_lower_and_end_at_the_final_rate():
    rates = np.array([epoch_policies.cyclic_linear(1.0, 20, final=0.1, cycles=4)(e) for e in range(20)]).reshape(4, 5)
    np.testing.assert_allclose(rates[:, -1], 0.1, rtol=1e-6)  # float32
    assert (np.diff(rates, axis=1) < 0).all()
    assert (np.diff(rates[:, 0]) < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epoch_policies.constant(-1.0), "learning_rate"),
        (lambda: epoch_policies.piecewise(0.1, 0), "epochs must be >= 1, got epochs=0"),
        (lambda: epoch_policies.piecewise(0.1, 5, middle=float("nan")), "middle"),
        (lambda: epoch_policies.piecewise(0.1, 5, final=-1.0), "final"),
        (lambda: epoch_policies.cyclic_linear(0.1, 5, cycles=0), "cycles must be >= 1"),
        (lambda: epoch_policies.polynomial(0.1, 5, power=0.0), "power"),
        (lambda: epoch_policies.exponential(0.1, 5, base=-2.0), "base"),
        (lambda: epoch_policies.one_cycle(0.1, 5, peak=-1.0), "peak"),
        (lambda: epoch_policies.epoch_schedule(lambda e: e, 0), "steps_per_epoch must be >= 1, got steps_per_epoch=0"),
    ],
)
def test_wrong_policies_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
