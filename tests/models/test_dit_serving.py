"""Samples of one batch at different steps: each is what it would be alone, and only rows that compute are computed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.caching import Sampler, random_schedule, sample, uniform_schedule
from jaxaccel.diffusion import (
    ddim_step,
    double_batch,
    guide_denoiser,
    linear_betas,
    noise_schedule,
    respace,
    uniform_timesteps,
)
from jaxaccel.models import (
    DiTConfig,
    dit_admit,
    dit_denoiser,
    dit_forward_rows,
    dit_modulation,
    dit_requests,
    dit_serve_step,
    init_dit,
    rows_needed,
    stack_blocks,
)

STEPS = 4
CONFIG = DiTConfig.tiny(width=16, heads=2)
LEVELS = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, STEPS))
SAMPLER = Sampler(lambda x, out, i: ddim_step(LEVELS, x, out[..., : CONFIG.channels], i), STEPS)
SCHEDULE = random_schedule(jax.random.key(3), STEPS, CONFIG.num_branches, utilization=0.5)
FLAGS = np.asarray(SCHEDULE)


@functools.cache
def params():
    """No gate is zero, so that every branch counts."""
    start = init_dit(jax.random.key(0), CONFIG)
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    )


@functools.cache
def drawn(count):
    noise = jax.random.normal(jax.random.key(2), (count, 8, 8, 1))
    return noise, jnp.arange(count) % CONFIG.num_classes


@functools.cache
def alone(count, scale=None, schedule=SCHEDULE):
    """The samples by the sampler of caches, all of them at the same step."""
    noise, labels = drawn(count)
    network = dit_denoiser(CONFIG, LEVELS)
    if scale is None:
        return sample(network, params(), noise, labels, schedule=schedule, sampler=SAMPLER)
    network = guide_denoiser(network, scale=scale)
    x, labels = double_batch(noise, labels, CONFIG.null_label)
    return sample(network, params(), x, labels, schedule=schedule, sampler=SAMPLER)[:count]


step = jax.jit(
    dit_serve_step, static_argnames=("config", "schedule", "limit", "scale", "cfg_channels", "implementation")
)  # fmt: skip


def assert_close(found, expected, tolerance=2e-6):
    """Differences over the largest number, as weights are random and samples large.

    By default float32 over four steps, whose prologues of branches round otherwise.
    """
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def serve(arrivals, slots, limit, flags=FLAGS, **options):
    """Samples of requests that arrive in the given rounds, into the first slots that are free."""
    guided = options.get("scale") is not None
    stacked, requests = stack_blocks(params()), dit_requests(CONFIG, slots, is_guided=guided)
    noise, labels = drawn(len(arrivals))
    waiting, where, found, mixed = list(range(len(arrivals))), {}, {}, False
    for now in itertools.count():
        for slot in np.flatnonzero(np.asarray(requests.step) < 0):
            if int(slot) in where:
                found[where.pop(int(slot))] = requests.x[slot]
            if waiting and arrivals[waiting[0]] <= now:
                which = waiting.pop(0)
                where[int(slot)] = which
                requests = dit_admit(requests, int(slot), noise[which], labels[which], num_steps=STEPS)
        if not where and not waiting:
            assert mixed, "requests were never at different steps: the test shows nothing"
            return jnp.stack([found[i] for i in range(len(arrivals))])
        under_way = np.asarray(requests.step)
        mixed |= len(set(under_way[under_way >= 0])) > 1
        assert rows_needed(flags, under_way, is_guided=guided) <= limit
        requests = step(stacked, requests, flags, CONFIG, LEVELS, limit=limit, **options)


def test_every_sample_is_what_it_would_be_alone():
    """Six requests in three slots, which are taken again; some slots stay free for a while."""
    found = serve([0, 0, 1, 2, 3, 9], slots=3, limit=3)
    assert_close(found, alone(6))
    everything = alone(6, schedule=uniform_schedule(STEPS, CONFIG.num_branches, interval=1))
    assert np.abs(np.asarray(found - everything)).max() > 1e-3  # reuse does something


def test_the_same_with_guidance():
    found = serve([0, 1, 3], slots=2, limit=4, scale=1.5)
    assert_close(found, alone(3, scale=1.5))
    assert np.abs(np.asarray(found - alone(3))).max() > 1e-3  # guidance does something


def test_half_of_the_rows_are_enough_where_half_is_reused():
    flags = np.asarray(uniform_schedule(STEPS, CONFIG.num_branches, interval=2))
    found = serve([0, 1, 4, 5], slots=2, limit=1, flags=flags)  # always one that computes and one that reuses
    expected = alone(4, schedule=uniform_schedule(STEPS, CONFIG.num_branches, interval=2))
    assert_close(found, expected)


def test_rows_that_are_reused_are_not_in_the_program():
    stacked, requests = stack_blocks(params()), dit_requests(CONFIG, 8)

    def flops(limit):
        lowered = step.lower(stacked, requests, FLAGS, CONFIG, LEVELS, limit=limit)
        return lowered.compile().cost_analysis()["flops"]

    few, half, all_ = flops(1), flops(4), flops(8)
    # What each row of a branch costs is the same; the rest does not depend on the limit.
    assert (all_ - few) / 7 == pytest.approx((all_ - half) / 4, rel=0.02)
    assert few < 0.4 * all_


def test_schedules_and_steps_are_data():
    stacked, requests = stack_blocks(params()), dit_requests(CONFIG, 2)
    traces = []

    def counted(params, requests, flags):
        traces.append(1)
        return dit_serve_step(params, requests, flags, CONFIG, LEVELS, limit=2)

    run = jax.jit(counted)
    run(stacked, requests, FLAGS)
    later = dit_admit(requests, jnp.array([0, 1]), *drawn(2), num_steps=STEPS)
    run(stacked, run(stacked, later, np.ones_like(FLAGS)), FLAGS)
    assert len(traces) == 1


def test_more_rows_than_there_is_room_for_are_seen():
    requests = dit_admit(dit_requests(CONFIG, 3), jnp.array([0, 1]), *drawn(2), num_steps=STEPS)
    after = step(stack_blocks(params()), requests, FLAGS, CONFIG, LEVELS, limit=1)
    assert jnp.isnan(after.x[:2]).all()
    assert jnp.isfinite(after.x[2]).all()  # the free slot
    assert after.step.tolist() == [STEPS - 2, STEPS - 2, -1]


def test_free_slots_stay_as_they_are():
    requests = dit_requests(CONFIG, 2)._replace(x=jnp.full((2, 8, 8, 1), jnp.nan))
    requests = dit_admit(requests, 1, drawn(1)[0][0], 0, num_steps=STEPS)
    after = step(stack_blocks(params()), requests, FLAGS, CONFIG, LEVELS, limit=1)
    assert jnp.isnan(after.x[0]).all()
    assert (after.cache[:, 0] == requests.cache[:, 0]).all()
    assert jnp.isfinite(after.x[1]).all()
    assert after.step.tolist() == [-1, STEPS - 2]


def test_bfloat16():
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), stack_blocks(params()))
    requests = dit_admit(dit_requests(CONFIG, 1, dtype=jnp.bfloat16), 0, drawn(1)[0][0], 0, num_steps=STEPS)
    for _ in range(STEPS):
        requests = step(narrow, requests, FLAGS, CONFIG, LEVELS, limit=1)
    assert requests.cache.dtype == jnp.bfloat16
    assert requests.x.dtype == jnp.float32
    assert_close(requests.x[0], alone(1)[0], 0.03)  # eight bits over four steps


def forward(**changes):
    arguments = {
        "params": stack_blocks(params()), "x": drawn(2)[0], "compute": jnp.ones((4, 2), bool), "limit": 2,
        "modulation": dit_modulation(params(), jnp.array([9, 99]), jnp.arange(2), CONFIG),
        "cache": jnp.zeros((4, 2, CONFIG.tokens, CONFIG.width)),
    } | changes  # fmt: skip
    return dit_forward_rows(
        arguments.pop("params"), arguments.pop("x"), arguments.pop("modulation"), CONFIG, **arguments
    )  # fmt: skip


def test_blocks_that_are_not_stacked_give_the_same():
    np.testing.assert_array_equal(forward(params=params())[0], forward()[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: forward(x=jnp.ones((2, 4, 4, 1))), r"x has shape \(2, 4, 4, 1\), expected \[B, 8, 8, 1\]"),
        (
            lambda: forward(modulation=dit_modulation(params(), jnp.array([9]), jnp.array([0]), CONFIG)),
            "each sample's own step",
        ),
        (lambda: forward(cache=jnp.zeros((4, 3, 16, 16))), r"cache has shape \(4, 3, 16, 16\), expected \(4, 2"),
        (lambda: forward(compute=jnp.ones((4, 3), bool)), r"compute is bool\[4, 3\], expected bool\[4, 2\]"),
        (lambda: forward(compute=jnp.ones((4, 2))), "compute is float32"),
        (lambda: forward(limit=3), "limit is 3, expected an integer from 1 to the 2 samples"),
        (lambda: forward(implementation="cuda"), "expected one of"),
        (lambda: dit_requests(CONFIG, 0), "slots is 0"),
        (
            lambda: step(params(), dit_requests(CONFIG, 1), FLAGS[:2], CONFIG, LEVELS, limit=1),
            r"flags is bool\[2, 4\], expected bool\[4, 4\]",
        ),
        (
            lambda: step(params(), dit_requests(CONFIG, 1), FLAGS, CONFIG, LEVELS, limit=1, scale=2.0),
            r"cache has 1 rows, expected 2: dit_requests\(is_guided=True\)",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
