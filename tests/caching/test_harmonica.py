"""HarmoniCa on a small residual network of another kind than a transformer: training, λ, and three ways to sample."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxaccel.caching import (
    Sampler,
    harmonica,
    random_schedule,
    reuse_branch,
    router_init,
    router_schedule,
    sample,
    schedule_from_array,
    sdt_loss,
    soft_sample,
    step_weights,
    uniform_schedule,
)

T, NB, B, D = 5, 3, 8, 4
TRACES: list[tuple[bool, ...] | str] = []


def network(params, x, i, cond, *, cache=None, weights=None, compute=None):
    """Three tanh branches with gates that depend on the step; the output has a channel too many, as learned sigmas."""
    TRACES.append(compute if isinstance(compute, tuple) else "all")
    outputs, h = [], x + cond
    for k in range(NB):
        scale = 1 + 0.1 * (i + k)
        outputs.append(
            reuse_branch(
                lambda h, k=k, scale=scale: jnp.tanh(scale * h @ params["w"][k]), h, k,
                cache=cache, weights=weights, compute=compute,
            )
        )  # fmt: skip
        h = h + params["gate"][k] * outputs[k]
    return jnp.concatenate([h, h[:, :1]], -1), tuple(outputs)


def step(x, out, i):
    return x - (0.1 + 0.02 * i) * out[:, :D]


SAMPLER = Sampler(step, T)
EVERYTHING = uniform_schedule(T, NB, interval=1)
OTHER = schedule_from_array(
    [[True, False, True], [False, False, False], [True, False, True], [False, True, True], [True, True, True]]
)
MIXED = random_schedule(jax.random.key(3), T, NB, utilization=0.6)


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": 0.7 * jax.random.normal(keys[0], (NB, D, D), dtype), "gate": jnp.array([0.5, -0.4, 0.3], dtype)}
    return params, jax.random.normal(keys[1], (B, D), dtype), 0.3 * jax.random.normal(keys[2], (B, D), dtype)


def draw(schedule, implementation="static", data=None, **more):
    params, x, cond = problem() if data is None else data
    return sample(network, params, x, cond, schedule=schedule, sampler=SAMPLER, implementation=implementation, **more)


# Sampling ------------------------------------------------------------------------------------------------------------


@jax.jit
def plain_step(params, x, i, cond):
    return step(x, network(params, x, i, cond)[0], i)


def plain(params, x, cond):
    for i in reversed(range(T)):
        x = plain_step(params, x, np.int32(i), cond)
    return x


def by_hand(schedule, params, x, cond):
    """The schedule applied in NumPy, in double precision."""
    params, x, cond = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, cond))
    cache = [None] * NB
    for i in reversed(range(T)):
        h = x + cond
        for k in range(NB):
            if schedule.rows[i][k]:
                cache[k] = np.tanh((1 + 0.1 * (i + k)) * h @ params["w"][k])
            h = h + params["gate"][k] * cache[k]
        x = x - (0.1 + 0.02 * i) * h
    return x


def test_bits_of_three_implementations_and_of_the_plain_sampler():
    """In a process of its own: the suite's machine code is not optimised, and then rounds from program to program."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{jax.config.jax_compilation_cache_dir}"
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    script = pathlib.Path(__file__).parent / "same_bits.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["equal:", "float32"] * 2


@pytest.mark.parametrize("schedule", [EVERYTHING, OTHER, MIXED])
def test_three_implementations_are_the_schedule_by_hand(schedule):
    for implementation in ("static", "cond", "reference"):
        # Five steps in float32 against float64.
        out = draw(schedule, implementation)
        np.testing.assert_allclose(out, by_hand(schedule, *problem()), rtol=0, atol=2e-6)
    if schedule != EVERYTHING:
        assert np.abs(out - draw(EVERYTHING)).max() > 1e-3  # the schedule does something


def test_equal_rows_share_a_program_and_flags_are_data():
    fresh = functools.partial(network)  # a new object: nothing is compiled for it yet
    call = functools.partial(sample, fresh, *problem(), sampler=SAMPLER)
    repeated = schedule_from_array(
        [[False, True, False], [False, True, False], [True] * 3, [False, True, False], [True] * 3]
    )
    TRACES.clear()
    call(schedule=repeated)
    assert sorted(TRACES) == [(False, True, False), (True, True, True)]  # one trace for each distinct row
    call(schedule=schedule_from_array([repeated.rows[0]] * 4 + [repeated.rows[4]]))
    assert len(TRACES) == 2
    call(schedule=repeated, implementation="cond")
    count = len(TRACES)
    for schedule in (OTHER, MIXED, EVERYTHING):
        call(schedule=schedule, implementation="cond")
    assert len(TRACES) == count


def test_reuse_in_a_branch_whose_gate_is_zero_changes_nothing():
    params, x, cond = problem()
    params["gate"] = params["gate"].at[1].set(0)
    skipped = schedule_from_array(np.array([[True, False, True]] * (T - 1) + [[True] * NB]))
    np.testing.assert_allclose(draw(skipped, data=(params, x, cond)), plain(params, x, cond), rtol=0, atol=3e-7)


def test_inside_a_callers_jit_vmap_and_grad():
    params, x, cond = problem()

    @jax.jit
    def both(params, x, cond):
        return [draw(OTHER, how, (params, x, cond)) for how in ("static", "cond")]

    static, cond_ = both(params, x, cond)
    np.testing.assert_allclose(static, draw(OTHER), rtol=0, atol=1e-6)  # other fusions may round otherwise
    np.testing.assert_allclose(cond_, draw(OTHER), rtol=0, atol=1e-6)
    mapped = jax.vmap(lambda x, cond: draw(OTHER, "cond", (params, x, cond)))(x[:, None], cond[:, None])
    np.testing.assert_allclose(mapped[:, 0], draw(OTHER), rtol=0, atol=1e-6)
    slopes = [
        jax.grad(lambda x, how=how: draw(OTHER, how, (params, x, cond)).sum())(x) for how in ("cond", "reference")
    ]
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-5)


def test_sharded_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params, x, cond = problem()
    spread = jax.device_put(params, everywhere), *jax.device_put((x, cond), rows)
    for implementation in ("static", "cond"):
        out = draw(OTHER, implementation, spread)
        assert out.sharding.is_equivalent_to(rows, out.ndim)
        np.testing.assert_allclose(out, draw(OTHER, implementation), rtol=0, atol=1e-6)
    state = TRAINING.init(jax.random.key(1))
    alone, together = EPOCH(state, params, x, cond), EPOCH(state, *spread)
    # Adam divides by the gradient's size: float32 sums in another order change 1e-7 of it.
    np.testing.assert_allclose(together[0].logits, alone[0].logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together[1].x0, alone[1].x0, rtol=0, atol=1e-6)


def test_in_bfloat16_the_cache_is_bfloat16():
    data = problem(jnp.bfloat16)
    outputs = [np.asarray(draw(OTHER, how, data), np.float32) for how in ("static", "cond", "reference")]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=0.05)  # eight bits over five steps
    np.testing.assert_allclose(outputs[2], outputs[0], rtol=0, atol=0.05)
    assert draw(OTHER, data=data).dtype == jnp.bfloat16


# Training ------------------------------------------------------------------------------------------------------------

TRAINING = harmonica(network, SAMPLER, num_branches=NB, beta=1e-3, refresh_every=2 * T)
EPOCH = jax.jit(TRAINING.epoch)
WEIGHTS = jax.jit(
    lambda params, x, cond, logits, proxy: step_weights(
        network, params, x, cond, logits=logits, sampler=SAMPLER, proxy=proxy
    ),
    static_argnames="proxy",
)  # fmt: skip
SOFT = jax.jit(lambda params, x, cond, weights: soft_sample(network, params, x, cond, weights=weights, sampler=SAMPLER))
SLOPE = jax.jit(
    jax.value_and_grad(
        lambda row, params, x, i, cond, cache, lam, beta: sdt_loss(
            network, params, row, x, i, cond, cache, lam=lam, beta=beta
        ),
        has_aux=True,
    )
)


def first_step(params, x, cond):
    out, cache = network(params, x, T - 1, cond)
    return step(x, out, T - 1), cache


def test_the_router_starts_open_at_the_first_executed_step():
    logits = router_init(jax.random.key(0), num_steps=40, num_branches=50)
    assert (logits[-1] == 5).all()
    assert abs(float(logits[:-1].mean())) < 0.1  # 1950 draws: standard error 0.023
    assert abs(float(logits[:-1].std()) - 1) < 0.1
    table = jnp.array([[0.0, 3.0, -3.0], [5.0, 5.0, 5.0]])
    assert router_schedule(table).rows == ((True, True, False), (True,) * 3)  # σ(−3) = 0.047
    assert router_schedule(table, threshold=0.5, sampler="dpm").rows[0] == (False, True, False)  # σ(0) is not above
    assert router_schedule(table, sampler="dpm").sampler == "dpm"


def test_scores_of_one_leave_the_price_alone(x64):
    params, x, cond = problem(jnp.float64)
    x, cache = first_step(params, x, cond)
    (loss, info), _ = SLOPE(jnp.full(NB, 800.0), params, x, 2, cond, cache, 3.0, 0.25)
    assert float(loss) == 0.25 * NB
    assert float(info.data_loss) < 1e-31  # two programs' rounding, squared
    np.testing.assert_allclose(info.out, network(params, x, 2, cond)[0], rtol=1e-14)


def test_gradient_of_the_loss(x64):
    params, x, cond = problem(jnp.float64)
    x, cache = first_step(params, x, cond)
    row, lam, beta = jnp.array([0.3, -1.2, 2.5]), 3.0, 0.1

    def loss(row):
        return sdt_loss(network, params, jnp.asarray(row), x, 3, cond, cache, lam=lam, beta=beta)[0]

    check_grads(loss, (row,), order=1, modes=["rev"])
    r = jax.nn.sigmoid(row)

    def data(r):
        return jnp.mean((network(params, x, 3, cond)[0] - network(params, x, 3, cond, cache=cache, weights=r)[0]) ** 2)

    expected = (lam * jax.grad(data)(r) + beta) * r * (1 - r)
    np.testing.assert_allclose(jax.grad(loss)(row), expected, rtol=1e-12)
    assert np.abs(jax.grad(data)(r)).min() > 1e-4

    # What is left behind: mixed outputs, written where the score is above the threshold.
    (_, info), _ = SLOPE(jnp.array([0.3, -5.0, 2.5]), params, x, 3, cond, cache, lam, beta)
    np.testing.assert_array_equal(info.cache[1], cache[1])
    fresh = network(params, x, 3, cond)[1][0]
    np.testing.assert_allclose(info.cache[0], cache[0] * (1 - r[0]) + fresh * r[0], rtol=1e-12)
    assert float(info.usage) == pytest.approx(float(jax.nn.sigmoid(jnp.array([0.3, -5.0, 2.5])).sum()), rel=1e-12)


def test_weights_of_steps(x64):
    data = problem(jnp.float64)
    logits = router_init(jax.random.key(2), num_steps=T, num_branches=NB)
    scores = jax.nn.sigmoid(logits).at[-1].set(1)
    np.testing.assert_allclose(SOFT(*data, jnp.ones((T, NB))), plain(*data), rtol=1e-12)

    table, samples = jnp.ones((T, NB)), [SOFT(*data, jnp.ones((T, NB)))]
    for i in reversed(range(T - 1)):
        table = table.at[i].set(scores[i])
        samples.append(SOFT(*data, table))
    moves = np.diff(np.stack(samples), axis=0)
    sequential = WEIGHTS(*data, logits, "sequential")
    np.testing.assert_allclose(sequential[:-1][::-1], (moves**2).mean((1, 2)), rtol=1e-10)
    np.testing.assert_allclose(moves.sum(0), SOFT(*data, scores) - samples[0], atol=1e-14)  # they telescope
    left = [((samples[-1] - SOFT(*data, scores.at[i].set(1))) ** 2).mean() for i in range(T - 1)]
    np.testing.assert_allclose(WEIGHTS(*data, logits, "leave_one_out")[:-1], left, rtol=1e-10)
    assert WEIGHTS(*data, logits, None).tolist() == [1, 1, 1, 1, 0]
    for proxy in ("sequential", "leave_one_out"):  # nothing is reused: nothing moves
        np.testing.assert_array_equal(WEIGHTS(*data, jnp.full((T, NB), 800.0), proxy), 0)


def test_rows_have_optimizers_of_their_own(x64):
    """Against Adam written out for each row, as torch treats rows without a gradient; a masked one differs."""
    params, x, cond = problem(jnp.float64)
    training = harmonica(network, SAMPLER, num_branches=NB, beta=1e-3, proxy=None, optimizer=optax.adam(0.05))
    epoch, state = jax.jit(training.epoch), training.init(jax.random.key(4))
    rows = np.array(state.logits)
    assert rows.dtype == np.float64
    moments = np.zeros((2, T, NB))
    masked, tx = state.logits, optax.adam(0.05)
    masked_state = tx.init(masked)
    for number in range(1, 4):
        noise = x + number
        state, info = epoch(state, params, noise, cond)
        now, cache = first_step(params, noise, cond)
        masked_now, masked_cache = now, cache
        for i in reversed(range(T - 1)):
            (loss, left), slope = SLOPE(jnp.asarray(rows[i]), params, now, i, cond, cache, 1.0, 1e-3)
            np.testing.assert_allclose(info.loss[i], loss, rtol=1e-9)
            np.testing.assert_allclose(info.data_loss[i], left.data_loss, rtol=1e-9)
            np.testing.assert_allclose(info.usage[i], left.usage, rtol=1e-9)
            slope = np.asarray(slope)
            moments[0, i] = 0.9 * moments[0, i] + 0.1 * slope
            moments[1, i] = 0.999 * moments[1, i] + 0.001 * slope**2
            first, second = moments[0, i] / (1 - 0.9**number), moments[1, i] / (1 - 0.999**number)
            rows[i] = np.clip(rows[i] - 0.05 * first / (np.sqrt(second) + 1e-8), -5, 5)
            now, cache = step(now, left.out, i), left.cache
            (_, left), slope = SLOPE(masked[i], params, masked_now, i, cond, masked_cache, 1.0, 1e-3)
            updates, masked_state = tx.update(jnp.zeros_like(masked).at[i].set(slope), masked_state)
            masked = optax.apply_updates(masked, updates)
            masked_now, masked_cache = step(masked_now, left.out, i), left.cache
        np.testing.assert_allclose(info.x0, now, rtol=1e-9)
    np.testing.assert_allclose(state.logits, rows, rtol=1e-9)
    assert np.abs(np.asarray(masked) - rows).max() > 0.02  # momentum moved rows that took no part
    assert np.abs(np.asarray(masked)[-1] - 5).max() == 0
    assert (state.logits[-1] == 5).all()
    assert int(state.epoch) == 3


def test_weights_are_refreshed_every_so_many_steps():
    params, x, cond = problem()
    states = [TRAINING.init(jax.random.key(5))]
    for number in range(4):
        states.append(EPOCH(states[-1], params, x + number, cond)[0])
    for start in (0, 2):  # two epochs of five steps are ten
        expected = WEIGHTS(params, x + start, cond, states[start].logits, "sequential")
        np.testing.assert_allclose(states[start + 1].lam, expected, rtol=1e-3)  # squares of small differences
        np.testing.assert_array_equal(states[start + 2].lam, states[start + 1].lam)
    assert np.abs(states[3].lam - states[2].lam).max() > 0


def test_price_decides_in_the_limits(x64):
    params, x, cond = problem(jnp.float64)

    def train(beta, logits):
        training = harmonica(network, SAMPLER, num_branches=NB, beta=beta, proxy=None, optimizer=optax.adam(2.0))
        state, epoch = training.init(jax.random.key(0))._replace(logits=logits), jax.jit(training.epoch)
        for _ in range(12):
            state, info = epoch(state, params, x, cond)
        return state, info

    start = router_init(jax.random.key(6), num_steps=T, num_branches=NB)
    state, _ = train(1e6, start)
    assert (state.logits[:-1] == -5).all()
    assert router_schedule(state.logits).utilization == pytest.approx((T - 1) / T, abs=1e-15)
    state, info = train(0.0, start)
    assert (info.loss == info.data_loss).all()  # λ = 1, no price
    np.testing.assert_array_less(info.usage, NB)
    assert float(info.data_loss.sum()) < 1e-3
    # Where reuse does no harm and costs nothing, nothing moves.
    silent = params | {"gate": jnp.zeros(NB)}
    training = harmonica(network, SAMPLER, num_branches=NB, beta=0.0, proxy=None)
    state, _ = jax.jit(training.epoch)(training.init(jax.random.key(7)), silent, x, cond)
    np.testing.assert_array_equal(state.logits, training.init(jax.random.key(7)).logits)


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.99, 0.9933, 1.0, -0.1, float("nan")])
def test_thresholds_out_of_range_are_refused(threshold):
    for call in (
        lambda: router_schedule(jnp.full((2, 3), 5.0), threshold=threshold),
        lambda: harmonica(network, SAMPLER, num_branches=NB, beta=0.1, threshold=threshold),
    ):
        with pytest.raises(ValueError, match=r"threshold must be a number in \(0, 0.99\)"):
            call()


def train_with(**more):
    return lambda: harmonica(network, more.pop("sampler", SAMPLER), **({"num_branches": NB, "beta": 0.1} | more))


def loss_with(cache=None, **more):
    params, x, cond = problem()
    now, full = first_step(params, x, cond)
    entries = full if cache is None else cache(full)
    return sdt_loss(network, params, jnp.zeros(NB), now, 1, cond, entries, **({"lam": 1.0, "beta": 0.1} | more))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (train_with(beta=-1e-9), "beta must be a finite number >= 0, got -1e-09"),
        (train_with(beta=float("inf")), "beta must be a finite number"),
        (train_with(refresh_every=0), "refresh_every must be at least 1, got 0"),
        (train_with(proxy="lpips"), "proxy must be one of .*got 'lpips'"),
        (train_with(sampler=Sampler(step, 1)), "at least 2 steps, got 1"),
        (lambda: router_init(jax.random.key(0), num_steps=1, num_branches=2), "num_steps must be at least 2"),
        (lambda: router_init(jax.random.key(0), num_steps=2, num_branches=0), "num_branches must be at least 1"),
        (lambda: router_schedule(jnp.full((1, 3), 5.0)), "at least 2 steps"),
        (lambda: router_schedule(jnp.full((2, 3), jnp.nan)), "must be finite"),
        (lambda: router_schedule(jnp.array([[5.0], [-5.0]])), r"rows\[1\] is executed first and must be all true"),
        (lambda: loss_with(beta=-1.0), "beta must be"),
        (lambda: loss_with(threshold=0.0), "threshold must be"),
        (lambda: loss_with(lambda c: c[:2]), "3 entries, the network 3 branches and cache 2 entries"),
        (
            lambda: loss_with(lambda c: jax.tree.map(lambda a: a[:4], c)),
            r"cache has float32\[4, 4\], .* expected float32\[8, 4\], .* the batch that filled it",
        ),
        (lambda: draw(uniform_schedule(T + 1, NB, interval=2)), "schedule is for 6 steps, the sampler takes 5"),
        (lambda: draw(uniform_schedule(T, NB, interval=2, sampler="dpm")), "for the sampler 'dpm', got 'ddim'"),
        (lambda: draw(np.ones((T, NB), bool)), "must be a ReuseSchedule, got ndarray"),
        (lambda: draw(OTHER, "where"), "implementation must be one of"),
        (lambda: SOFT(*problem(), jnp.ones((T + 1, NB))), "weights must have 5 rows"),
        (lambda: WEIGHTS(*problem(), jnp.ones((T + 1, NB)), None), "logits must have 5 rows"),
        (lambda: WEIGHTS(*problem(), jnp.ones((T, NB)), "both"), "proxy must be one of"),
        (
            lambda: EPOCH(TRAINING.init(jax.random.key(0))._replace(logits=jnp.zeros((4, NB))), *problem()),
            r"state.logits must be \[5, 3\], got \[4, 3\]",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
