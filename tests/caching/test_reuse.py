"""Schedules as data, and the branch that computes, mixes or takes over."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel.caching import (
    ReuseSchedule,
    Sampler,
    cache_utilization,
    load_schedule,
    random_schedule,
    reuse_branch,
    save_schedule,
    schedule_from_array,
    uniform_schedule,
)


def step(x, out, i):
    return x - out


def test_uniform_counts_from_the_step_that_is_executed_first():
    for steps, interval in ((10, 2), (10, 3), (7, 3), (4, 9), (1, 1)):
        flags = np.asarray(uniform_schedule(steps, 3, interval=interval))
        computed = sorted({steps - 1 - k for k in range(0, steps, interval)})
        assert flags.any(1).nonzero()[0].tolist() == computed
        assert (flags.all(1) == flags.any(1)).all()  # all branches of a step alike
        assert cache_utilization(flags) == pytest.approx(1 - len(computed) / steps, abs=1e-15)
    assert np.asarray(uniform_schedule(5, 2, interval=1)).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_random_reuses_the_wanted_share_and_never_the_first(steps, branches, share, seed):
    wanted = share * (steps - 1) / steps
    schedule = random_schedule(jax.random.key(seed), steps, branches, utilization=wanted)
    flags = np.asarray(schedule)
    assert (~flags).sum() == round(wanted * steps * branches)
    assert flags[-1].all()
    assert schedule == random_schedule(jax.random.key(seed), steps, branches, utilization=wanted)


def test_a_schedule_is_a_static_value():
    flags = np.array([[True, False], [True, True]])
    schedule = schedule_from_array(flags, sampler="heun")
    assert hash(schedule) == hash(ReuseSchedule(((True, False), (True, True)), "heun"))
    assert schedule != schedule_from_array(flags)
    assert schedule.utilization == 0.25
    assert np.asarray(schedule, np.float32).dtype == np.float32
    with pytest.raises(AttributeError):
        schedule.sampler = "ddim"
    schedule.check(Sampler(step, 2, "heun"))


def test_files(tmp_path):
    path = tmp_path / "new" / "schedule.json"
    schedule = random_schedule(jax.random.key(0), 6, 4, utilization=0.5, sampler="dpm")
    save_schedule(path, schedule)
    assert load_schedule(path) == schedule
    assert [p.name for p in path.parent.iterdir()] == ["schedule.json"]  # nothing half-written is left
    content = json.loads(path.read_text())
    for broken, message in (
        ("{", "truncated, or not JSON"),
        ("[]", "not a file of a reuse schedule"),
        ("{}", "not a file of a reuse schedule"),
        (json.dumps(content | {"version": 2}), "version 2, expected 1"),
        (json.dumps(content | {"rows": ["01x"]}), "strings of 0 and 1"),
        (json.dumps(content | {"rows": "0101"}), "strings of 0 and 1"),
        (json.dumps(content | {"rows": ["11", "01"]}), r"rows\[1\] is executed first and must be all true"),
        (json.dumps(content | {"rows": ["11", "1"]}), "equally long"),
        (json.dumps(content | {"rows": []}), "at least one"),
        (json.dumps(content | {"sampler": None}), "sampler must be a name"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message) as error:
            load_schedule(path)
        assert str(path) in str(error.value)
    with pytest.raises(OSError, match=r"nothing\.json"):
        load_schedule(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule_from_array([[True, True], [True, False]]), r"rows\[1\] is executed first.*branches \[1\]"),
        (lambda: schedule_from_array([[1, 0], [1, 1]]), r"table .* of booleans, got int64"),
        (lambda: schedule_from_array([True]), "table"),
        (lambda: schedule_from_array(np.ones((0, 2), bool)), "at least one"),
        (lambda: schedule_from_array(np.ones((2, 0), bool)), "not empty"),
        (lambda: ReuseSchedule(((1, 1),)), "Python booleans"),
        (lambda: uniform_schedule(0, 1, interval=1), "num_steps must be at least 1, got 0"),
        (lambda: uniform_schedule(1, 0, interval=1), "num_branches must be at least 1, got 0"),
        (lambda: uniform_schedule(1, 1, interval=0), "interval must be at least 1, got 0"),
        (lambda: uniform_schedule(4, 1, interval=1.5), "interval must be an integer"),
        (lambda: random_schedule(jax.random.key(0), 4, 2, utilization=0.8), r"in \[0, 0.75\] for 4 steps, got 0.8"),
        (lambda: random_schedule(jax.random.key(0), 4, 2, utilization=-0.1), "utilization must be in"),
        (lambda: uniform_schedule(4, 2, interval=2).check(Sampler(step, 5)), "for 4 steps, the sampler takes 5"),
        (lambda: uniform_schedule(4, 2, interval=2).check(Sampler(step, 4, "dpm")), "sampler 'ddim', got 'dpm'"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_branch_is_computed_mixed_or_taken_over():
    x, cache = jnp.arange(3.0), (jnp.zeros(3), jnp.full(3, 8.0))

    def branch(x):
        return 2 * x

    np.testing.assert_array_equal(reuse_branch(branch, x, 1), 2 * x)
    np.testing.assert_array_equal(reuse_branch(branch, x, 1, compute=(False, True)), 2 * x)
    np.testing.assert_array_equal(reuse_branch(branch, x, 1, cache=cache, compute=(True, False)), cache[1])
    mixed = jax.jit(lambda w: reuse_branch(branch, x, 1, cache=cache, weights=w))
    for weight in (0.0, 0.25, 1.0):
        np.testing.assert_allclose(mixed(jnp.array([0.0, weight])), (1 - weight) * cache[1] + weight * 2 * x, rtol=1e-6)
    low = reuse_branch(lambda x: x.astype(jnp.bfloat16), x, 0, cache=(x.astype(jnp.bfloat16),), weights=jnp.ones(1))
    assert low.dtype == jnp.bfloat16

    chosen = jax.jit(lambda flags: reuse_branch(branch, x, 1, cache=cache, compute=flags))
    np.testing.assert_array_equal(chosen(jnp.array([False, True])), 2 * x)
    np.testing.assert_array_equal(chosen(jnp.array([True, False])), cache[1])
    batched = jax.vmap(lambda x, flag: reuse_branch(branch, x, 0, cache=(cache[1],), compute=[flag]))
    np.testing.assert_array_equal(batched(jnp.stack([x, x]), jnp.array([True, False])), [2 * x, cache[1]])


def test_what_is_reused_is_not_in_the_program():
    def network(x, cache, compute):
        return reuse_branch(lambda x: x @ x, x, 0, cache=cache, compute=compute)

    x = jnp.ones((4, 4))
    assert "dot_general" not in str(jax.make_jaxpr(network, static_argnums=2)(x, (x,), (False,)))
    assert "dot_general" in str(jax.make_jaxpr(network, static_argnums=2)(x, (x,), (True,)))
    assert "cond" in str(jax.make_jaxpr(network)(x, (x,), jnp.ones(1, bool)))  # a real branch, not a selection


def test_a_cache_that_does_not_fit_is_refused():
    def call(cache, **how):
        return reuse_branch(jnp.tanh, jnp.ones((2, 3)), 0, cache=cache, **how)

    with pytest.raises(ValueError, match="both be given"):
        call(None, weights=jnp.ones(1), compute=(True,))
    with pytest.raises(ValueError, match="cache must hold an output of branch 0"):
        call(None, compute=(False,))
    for how in ({"compute": (False,)}, {"compute": jnp.ones(1, bool)}, {"weights": jnp.ones(1)}):
        with pytest.raises(ValueError, match=r"cache\[0\] has float32\[4, 3\], expected float32\[2, 3\]"):
            call((jnp.ones((4, 3)),), **how)


def test_booleans_as_weights_select_without_rounding():
    """Also what is not finite in the output that is not taken."""
    cache = (jnp.array([1.5, jnp.inf]), jnp.array([2.5, 3.5]))
    for k, flag in ((0, False), (1, True)):
        found = reuse_branch(lambda x: x / 0, jnp.array([1.0, 7.0]), k, cache=cache, weights=jnp.array([False, True]))
        np.testing.assert_array_equal(found, [jnp.inf, jnp.inf] if flag else cache[0])
