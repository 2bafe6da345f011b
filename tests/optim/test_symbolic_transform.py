"""Programs as optax transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxaccel.optim import symbolic
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, LION_PROGRAM

PARAMS = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.linspace(0.1, 2, 8)}


def gradients(i):
    return jax.tree.map(lambda x: jnp.sin(3 * x + i) * 0.3, PARAMS)


def run(tx, steps=10, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        grads = optax.tree.cast_like(gradients(i), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("rate", [0.01, optax.cosine_decay_schedule(0.02, 12)])
def test_the_lion_program_is_optax_lion(rate):
    ours, state = run(symbolic.as_transform(LION_PROGRAM, rate))
    theirs, _ = run(optax.lion(rate, weight_decay=0.1))
    assert_close(ours, theirs, 1e-6)  # float32, ten steps
    assert state.v is None  # half of Adam's state
    assert state.count == 10


def test_the_adamw_program_is_its_chain():
    """No bias correction, and 1e-8 added by the division."""

    def chain(rate):
        def init(params):
            return {k: jax.tree.map(jnp.zeros_like, params) for k in "mv"}

        def update(g, state, params):
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], g)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state["v"], g)
            u = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), m, v)
            return u, {"m": m, "v": v}

        return optax.chain(
            optax.GradientTransformation(init, update), optax.add_decayed_weights(0.01), optax.scale(-0.001 * rate)
        )

    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), PARAMS)
        ours, state = run(symbolic.as_transform(ADAMW_PROGRAM, 2.0), params=double)
        theirs, _ = run(chain(2.0), params=double)
        # float64 throughout
        assert_close(ours, theirs, 1e-12)
        assert state.v["a"].dtype == jnp.float64
    # Under a constant gradient optax's Adam differs by its bias correction alone.
    adam = optax.chain(optax.scale_by_adam(eps=1e-8), optax.add_decayed_weights(0.01), optax.scale(-0.001))
    g = jax.tree.map(jnp.ones_like, PARAMS)
    states = [tx.init(PARAMS) for tx in (adam, symbolic.as_transform(ADAMW_PROGRAM, 1.0))]
    for _ in range(3):
        u, states[0] = adam.update(g, states[0], PARAMS)
        z, states[1] = symbolic.as_transform(ADAMW_PROGRAM, 1.0).update(g, states[1], PARAMS)
    correction = (1 - 0.9**3) / np.sqrt(1 - 0.999**3)
    zero_decay = jax.tree.map(lambda z, p: (z + 1e-5 * p) / correction - 1e-5 * p, z, PARAMS)
    assert_close(zero_decay, u, 1e-7)  # float32 numbers of size 1e-3


def test_bfloat16_parameters_have_float32_states():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = symbolic.as_transform(ADAMW_PROGRAM, 1.0)
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    assert {x.dtype for x in jax.tree.leaves((new.m, new.v))} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_it_composes_with_optax():
    tx = optax.inject_hyperparams(lambda lr: symbolic.as_transform(LION_PROGRAM, lr))(lr=0.01)
    assert_close(run(tx)[0], run(symbolic.as_transform(LION_PROGRAM, 0.01))[0], 1e-6)  # float32
    multi = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), symbolic.as_transform(LION_PROGRAM, 0.01)), 2)
    assert run(optax.GradientTransformation(multi.init, multi.update), 4)[1].gradient_step == 2


def test_leaf_and_tree_norms_see_the_users_leaves():
    program = symbolic.parse("""
    def train(w, g, m, v, lr):
      n = norm(g)
      u = g / n
      c = clip_by_global_norm(u, 1.0)
      u = c * lr
      return u, m, v
    """)
    tx = symbolic.as_transform(program, 1.0)
    updates, state = tx.update(PARAMS, tx.init(PARAMS))
    assert state.m is None
    # two leaves of norm one, clipped to a norm of one in all
    for leaf in jax.tree.leaves(updates):
        assert float(jnp.linalg.norm(leaf)) == pytest.approx(2**-0.5, rel=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown function"):
        symbolic.as_transform(symbolic.Program((symbolic.Statement("u", "f", ("g",)),)), 0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        symbolic.as_transform(LION_PROGRAM, -0.1)
    tx = symbolic.as_transform(LION_PROGRAM, 0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="params=None"):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match="missing"):
        tx.update({"a": PARAMS["a"]}, state, PARAMS)
    with pytest.raises(TypeError, match="floating"):
        tx.init({"a": jnp.arange(3)})


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_over_eight_devices(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    placed = {"a": PARAMS["a"], "b": jax.device_put(PARAMS["b"], sharding)}
    tx = symbolic.as_transform(ADAMW_PROGRAM, 1.0)
    got, state = run(tx, 3, placed)
    assert state.v["b"].sharding.is_equivalent_to(sharding, 1)
    assert_close(got, run(tx, 3)[0], 1e-7)  # float32, the same arithmetic


def test_gradients_pass_through_a_step():
    def after(rate):
        tx = symbolic.as_transform(LION_PROGRAM, rate)
        updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    assert jnp.isfinite(jax.grad(after)(0.1))
