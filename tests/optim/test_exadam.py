"""EXAdam against vectors of the reference code, closed forms, and the wrappers of optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccel.optim.exadam import ScaleByExadamState, _power, _scaled, exadam, exadam_v1_schedule, scale_by_exadam

CASES = ("v2_f32", "v2_f64_wd", "v1_f32", "v1_f64_const", "v2_f64_const")


def run(tx, params, gradients, jit=True):
    """Parameters and states after each step; ``gradients`` has a leading axis of steps."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    carry = params, tx.init(params)
    if jit:
        return jax.jit(lambda carry, g: jax.lax.scan(step, carry, g))(carry, gradients)[1]
    outputs = []
    for t in range(jax.tree.leaves(gradients)[0].shape[0]):
        carry, output = step(carry, jax.tree.map(lambda g, t=t: g[t], gradients))
        outputs.append(output)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def constant(tx, gradient, steps):
    """Updates of the first ``steps`` steps under a constant gradient."""

    def step(state, _):
        updates, state = tx.update(gradient, state)
        return state, updates

    return jax.jit(lambda state: jax.lax.scan(step, state, length=steps)[1])(tx.init(gradient))


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_code(case, jit, vectors, x64):
    data = vectors("exadam")
    leaves = sum(key.startswith(f"{case}/p0_") for key in data)
    params = [jnp.asarray(data[f"{case}/p0_{i}"]) for i in range(leaves)]
    gradients = [jnp.asarray(data[f"{case}/g_{i}"]) for i in range(leaves)]
    lr, b1, b2, eps, decay = (float(data[f"{case}/{name}"]) for name in ("lr", "b1", "b2", "eps", "wd"))
    tx = exadam(lr, b1, b2, eps, weight_decay=decay, step_growth="log" if case.startswith("v1") else "none")
    got, (state, *_) = run(tx, params, gradients, jit)
    # float64: rounding only. float32: the reference takes its powers of b1 and b2 in float64.
    double = params[0].dtype == jnp.float64
    tolerance = 1e-12 if double else 2e-6
    for i in range(leaves):
        assert got[i].dtype == params[i].dtype
        for value, name in ((got[i], "p"), (state.mu[i], "m"), (state.nu[i], "v")):
            expected = data[f"{case}/{name}_{i}"]
            # Relative to the array's scale: single entries pass through zero.
            np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_constant_gradient_has_a_closed_form(x64):
    b1, b2, eps, t = 0.9, 0.999, 1e-8, np.arange(1, 201)
    gradient = jnp.array([3.0, -0.02, 1e-5], jnp.float64)
    updates = constant(scale_by_exadam(b1, b2, eps), gradient, len(t))
    g, t = np.asarray(gradient), t[:, None].astype(float)
    m, v = (1 - b1**t) * g, (1 - b2**t) * g**2
    d1, d2 = 1 + b2**t * v / (v + eps), 1 + b1**t * m**2 / (m**2 + eps)
    expected = (g + g / (1 - b1**t)) * d1 / (np.sqrt(g**2 * d2) + eps)
    # The recurrence and 1 - b^t accumulate a few hundred roundings of 1e-16, magnified by 1/(1 - b2).
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_documented_step_sizes(x64):
    updates = np.asarray(constant(scale_by_exadam(eps=1e-30), jnp.ones((), jnp.float64), 40))
    first = (1 + 1 / (1 - 0.9)) * (1 + 0.999) / math.sqrt(1 + 0.9)
    np.testing.assert_allclose(updates[0], first, rtol=1e-12)
    # The numbers printed in the documentation, to the digits printed there.
    np.testing.assert_allclose(updates[[0, 1, 9, 39]], [15.9525, 9.301, 4.345, 3.922], rtol=2e-4)


def test_step_tends_to_twice_the_sign():
    gradient = jnp.array([0.5, -2.0, 30.0])
    updates = constant(scale_by_exadam(), gradient, 12_000)
    np.testing.assert_allclose(updates[-1], 2 * np.sign(gradient), atol=1e-3)  # b2^12000 = 6e-6; float32 moments
    assert float(jnp.abs(updates[2_000] - 2 * jnp.sign(gradient)).min()) > 0.1  # and not much earlier


def test_is_adam_bit_for_bit_without_its_corrections():
    b1, b2, eps = 0.9, 0.999, 1e-8
    adam = optax.scale_by_adam(b1, b2, eps, eps_root=0.0)
    params = jnp.zeros(7)
    state = adam.init(params)
    for key in jax.random.split(jax.random.key(0), 5):
        expected, state = adam.update(jax.random.normal(key, (7,)), state)
        bias1, bias2 = 1 - _power(b1, state.count), 1 - _power(b2, state.count)
        np.testing.assert_array_equal(_scaled(state.mu, state.nu, bias1, bias2, 1.0, 1.0, eps), expected)


def test_moments_are_adams():
    gradients = jax.random.normal(jax.random.key(1), (6, 5))
    states = [run(tx, jnp.zeros(5), gradients, jit=False)[1] for tx in (scale_by_exadam(), optax.scale_by_adam())]
    np.testing.assert_array_equal(states[0].mu, states[1].mu)
    np.testing.assert_array_equal(states[0].nu, states[1].nu)


@pytest.mark.parametrize("growth", ["none", "log"])
def test_sign_and_order_of_leaves_do_not_matter(growth):
    gradients = {"a": jax.random.normal(jax.random.key(2), (8, 3)), "b": jax.random.normal(jax.random.key(3), (8, 3))}
    params = jax.tree.map(lambda g: jnp.zeros(3), gradients)
    tx = exadam(0.1, step_growth=growth)
    got, _ = run(tx, params, gradients)
    negated, _ = run(tx, params, jax.tree.map(jnp.negative, gradients))
    swapped, _ = run(tx, params, {"a": gradients["b"], "b": gradients["a"]})
    np.testing.assert_array_equal(got["a"], -negated["a"])
    np.testing.assert_array_equal(got["a"], swapped["b"])


def test_version_1_is_version_2_times_a_logarithm(x64):
    gradient = jnp.array([0.3, -4.0], jnp.float64)
    steps = 100
    ratio = constant(scale_by_exadam(step_growth="log"), gradient, steps) / constant(scale_by_exadam(), gradient, steps)
    expected = 0.5 * np.log(2.0 * (np.arange(1, steps + 1) + 1))
    np.testing.assert_allclose(ratio, np.stack([expected] * 2, axis=1), rtol=1e-14)
    np.testing.assert_allclose([exadam_v1_schedule(0.01)(t) for t in range(steps)], 0.01 * expected, rtol=1e-14)


def test_version_1_schedule_scales_schedules_and_drives_optimizers():
    rate = exadam_v1_schedule(optax.linear_schedule(0.0, 1.0, 10))
    np.testing.assert_allclose(rate(5), 0.5 * 0.5 * math.log(14), rtol=1e-6)  # float32
    gradients = jax.random.normal(jax.random.key(4), (9, 4))
    outside, _ = run(exadam(exadam_v1_schedule(0.1)), jnp.zeros(4), gradients)
    inside, _ = run(exadam(0.1, step_growth="log"), jnp.zeros(4), gradients)
    np.testing.assert_allclose(outside, inside, rtol=1e-5)  # float32: the same product in another order
    assert np.isfinite(rate(jnp.int32(2**31 - 1)))  # a saturated counter does not wrap around


def test_weight_decay_is_decoupled_masked_and_not_multiplied_by_the_logarithm():
    params = {"w": jnp.full(2, 3.0), "b": jnp.full(2, 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    mask = {"w": True, "b": False}
    for growth in ("none", "log"):
        tx = exadam(0.1, weight_decay=0.5, mask=mask, step_growth=growth)
        updates, _ = tx.update(zero, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 3.0, rtol=1e-6)  # float32
        np.testing.assert_array_equal(updates["b"], 0.0)
    tx = exadam(0.1, weight_decay=optax.constant_schedule(0.5), mask=lambda tree: jax.tree.map(lambda x: True, tree))
    np.testing.assert_allclose(tx.update(zero, tx.init(params), params)[0]["b"], -0.15, rtol=1e-6)
    with pytest.raises(ValueError, match="params"):
        tx.update(zero, tx.init(params))  # optax's own message: decay reads the parameters
    exadam(0.1).update(zero, exadam(0.1).init(params))  # without decay none are needed


def quadratic(tx, params, steps=3, **extra):
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = update(params, state, params, **extra)  # the gradient of half the squared norm
        params = optax.apply_updates(params, updates)
    return params, state


PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([0.1, 0.2])}


def assert_close(got, expected, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=atol), got, expected)  # float32


def test_inject_hyperparams_traces_every_number():
    wrapped = optax.inject_hyperparams(exadam, static_args=("mask", "mu_dtype"))(
        0.01, b1=0.8, b2=0.95, eps=1e-6, weight_decay=1e-2, step_growth="log"
    )
    got, state = quadratic(wrapped, PARAMS)
    assert set(state.hyperparams) == {"learning_rate", "b1", "b2", "eps", "weight_decay"}
    expected, _ = quadratic(exadam(0.01, 0.8, 0.95, 1e-6, weight_decay=1e-2, step_growth="log"), PARAMS)
    # 1 - b2 is now formed in float32: 6e-8/0.05 = 1e-6 of each step, and the steps here add up to about one.
    assert_close(got, expected, atol=1e-5)
    scheduled = optax.inject_hyperparams(exadam)(optax.linear_schedule(0.0, 0.1, 5), b1=optax.constant_schedule(0.9))
    assert_close(
        quadratic(scheduled, PARAMS)[0], quadratic(exadam(optax.linear_schedule(0.0, 0.1, 5)), PARAMS)[0], 1e-4
    )


def test_wrappers_of_optax():
    plain, _ = quadratic(exadam(0.01), PARAMS)
    assert_close(quadratic(optax.masked(exadam(0.01), {"w": True, "b": True}), PARAMS)[0], plain)
    split = optax.partition({"x": exadam(0.01), "none": optax.set_to_zero()}, {"w": "x", "b": "none"})
    assert_close(quadratic(split, PARAMS)[0], {"w": plain["w"], "b": PARAMS["b"]})
    chained = optax.chain(optax.clip_by_global_norm(1e9), scale_by_exadam(), optax.scale_by_learning_rate(0.01))
    assert_close(quadratic(chained, PARAMS)[0], plain)
    # MultiSteps: the mean of two equal gradients is the gradient; parameters move in every second call only.
    every = optax.MultiSteps(exadam(0.01), every_k_schedule=2)
    assert_close(quadratic(every, PARAMS, 1)[0], PARAMS)
    assert_close(quadratic(every, PARAMS, 2)[0], quadratic(exadam(0.01), PARAMS, 1)[0])
    finite = optax.apply_if_finite(exadam(0.01), 3)
    assert_close(quadratic(finite, PARAMS)[0], plain)


def test_none_leaves_and_empty_trees():
    params = {"w": jnp.ones(2), "static": None}
    tx = exadam(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["static"] is None
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_vmap_over_learning_rates_and_gradients():
    rates, gradients = jnp.array([0.1, 0.2, 0.4]), jax.random.normal(jax.random.key(5), (3, 4))

    def first(rate, b1, g):
        tx = exadam(rate, b1)
        return tx.update(g, tx.init(g), g)[0]

    got = jax.jit(jax.vmap(first, in_axes=(0, None, 0)))(rates, 0.9, gradients)
    for i in range(3):
        np.testing.assert_allclose(got[i], first(rates[i], 0.9, gradients[i]), rtol=2e-6)  # float32


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.random.normal(jax.random.key(6), (16, 3))
    gradients = jax.random.normal(jax.random.key(7), (5, 16, 3))
    expected, _ = run(exadam(0.01, weight_decay=0.1), params, gradients)
    tx, sharded = exadam(0.01, weight_decay=0.1), jax.device_put(params, sharding)
    state = jax.jit(tx.init)(sharded)
    step = jax.jit(lambda p, s, g: tx.update(g, s, p))
    for g in gradients:
        updates, state = step(sharded, state, jax.device_put(g, sharding))
        sharded = optax.apply_updates(sharded, updates)
    assert sharded.sharding.is_equivalent_to(sharding, 2)
    assert state[0].nu.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(sharded, expected[-1], rtol=2e-6, atol=1e-7)  # float32, other loop splits


def test_bfloat16_parameters_keep_a_float32_second_moment():
    params = jnp.ones(64, jnp.bfloat16)
    tx = exadam(1e-2)
    state = tx.init(params)
    assert (state[0].mu.dtype, state[0].nu.dtype) == (jnp.bfloat16, jnp.float32)
    gradients = jax.random.normal(jax.random.key(8), (20, 64), jnp.bfloat16)
    got, (states, *_) = run(tx, params, gradients)
    assert got.dtype == jnp.bfloat16
    expected = (1 - 0.999) * sum(0.999 ** (19 - t) * np.asarray(gradients[t], np.float64) ** 2 for t in range(20))
    np.testing.assert_allclose(states.nu[-1], expected, rtol=1e-5)  # float32 sums of exact squares
    updates, _ = tx.update(gradients[0], state, params)
    assert updates.dtype == jnp.bfloat16
    # One step, against float32: the only roundings are of the gradient (shared) and of the result (2^-9).
    exact = exadam(1e-2).update(gradients[0].astype(jnp.float32), exadam(1e-2).init(jnp.ones(64)), None)[0]
    np.testing.assert_allclose(updates.astype(jnp.float32), exact, rtol=2**-7)


@pytest.mark.parametrize("mu_dtype", [jnp.float32, "bfloat16"])
def test_mu_dtype(mu_dtype):
    tx = scale_by_exadam(mu_dtype=mu_dtype)
    state = tx.init(jnp.ones(3, jnp.bfloat16))
    _, after = tx.update(jnp.ones(3, jnp.bfloat16), state)
    assert state.mu.dtype == after.mu.dtype == jnp.dtype(mu_dtype)
    assert after.nu.dtype == jnp.float32


def test_gradients_flow_through_training_steps():
    def loss(rate, w):
        tx = exadam(rate)
        state = tx.init(w)
        for _ in range(3):
            updates, state = tx.update(w * jnp.array([1.0, 2.0, 0.0]), state, w)  # the last unit is dead
            w = optax.apply_updates(w, updates)
        return jnp.sum(w**2)

    rate, w = 0.01, jnp.array([1.0, -0.5, 2.0])
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(rate, w)
    assert all(np.isfinite(slope).all() for slope in slopes)
    step = 1e-3
    numeric = (loss(rate + step, w) - loss(rate - step, w)) / (2 * step)
    np.testing.assert_allclose(slopes[0], numeric, rtol=5e-3)  # central difference in float32


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_zero_gradient_gives_zero(b1):
    updates = constant(scale_by_exadam(b1=b1), jnp.zeros(3), 5)
    np.testing.assert_array_equal(updates, 0.0)


def test_state_is_a_named_tuple_and_inputs_are_untouched():
    tx, gradient = scale_by_exadam(), jnp.ones(2)
    state = tx.init(gradient)
    _, after = tx.update(gradient, state)
    assert isinstance(after, ScaleByExadamState)
    assert (int(state.count), int(after.count), float(state.mu.sum())) == (0, 1, 0.0)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got b1=1.0"),
        ({"b1": -0.1}, "b1"),
        ({"b2": float("nan")}, "b2"),
        ({"b2": np.float32(1.5)}, "b2"),
        ({"eps": 0.0}, "eps must be a finite number > 0; with eps=0"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": float("inf")}, "eps"),
        ({"learning_rate": -1e-3}, "learning_rate must be a finite number >= 0, got learning_rate=-0.001"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"step_growth": "ln"}, "step_growth must be one of 'none', 'log', got step_growth='ln'"),
    ],
)
def test_wrong_numbers_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        exadam(**{"learning_rate": 0.1, **kwargs})


def test_wrong_learning_rate_of_the_schedule_is_named():
    with pytest.raises(ValueError, match="learning_rate"):
        exadam_v1_schedule(-1.0)


def test_checks_are_skipped_for_traced_values():
    def update(learning_rate, b1, b2, eps):
        tx = exadam(learning_rate, b1, b2, eps)
        return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]

    assert jax.jit(update)(-0.1, 0.9, 0.999, 1e-8).shape == (2,)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.ones(2, jnp.complex64), r"params\['net'\]\[0\] must be real floating point, got dtype complex64"),
        (jnp.ones(2, jnp.int32), r"params\['net'\]\[0\] must be real floating point, got dtype int32"),
        (jnp.ones(2, bool), "bool"),
    ],
)
def test_leaves_that_are_not_real_floats_are_named(leaf, message):
    with pytest.raises(TypeError, match=message):
        exadam(0.1).init({"net": [leaf]})
    good = {"net": [jnp.ones(2)]}
    with pytest.raises(TypeError, match=r"updates\["):
        exadam(0.1).update({"net": [leaf]}, exadam(0.1).init(good))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_mu_dtype_must_be_real_floating(dtype):
    with pytest.raises(TypeError, match="mu_dtype must be a real floating dtype"):
        exadam(0.1, mu_dtype=dtype)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a": jnp.ones(2)}, r"leaf updates\['b'\] is missing"),
        ({"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}, r"leaf updates\['c'\] is not in the state"),
        ({"a": jnp.ones(2), "b": jnp.ones((3, 1))}, r"updates\['b'\] has shape \(3, 1\), expected \(3,\)"),
        ({"a": jnp.ones(2), "b": jnp.ones(3), "d": None}, "got tree"),
    ],
)
def test_gradients_must_match_the_state(updates, message):
    tx = scale_by_exadam()
    with pytest.raises(ValueError, match=message):
        tx.update(updates, tx.init({"a": jnp.ones(2), "b": jnp.ones(3)}))
