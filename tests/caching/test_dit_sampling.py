"""Schedules on a diffusion transformer with guidance: programs are shared, schedules are data, devices do not matter.

That all ways of execution give the same bits is checked in a process of its own, see `same_bits`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.caching import Sampler, random_schedule, sample, schedule_from_array, uniform_schedule
from jaxaccel.diffusion import (
    ddim_step,
    double_batch,
    guide_denoiser,
    linear_betas,
    noise_schedule,
    respace,
    uniform_timesteps,
)
from jaxaccel.models import DiTConfig, dit_apply, dit_denoiser, init_dit

T, B = 4, 4
CONFIG = DiTConfig(16, 2, 2, patch=2, image_size=8, channels=2, num_classes=10, learn_sigma=True)
NB = CONFIG.num_branches
LEVELS = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, T))
TRACES = []


def traced(params, x, i, cond, **options):
    compute = options.get("compute")
    TRACES.append(compute if isinstance(compute, tuple) else "all")
    return dit_denoiser(CONFIG, LEVELS)(params, x, i, cond, **options)


NETWORK = guide_denoiser(traced, scale=1.5, cfg_channels=1)


def step(x, out, i):
    """Variances are the last channels of the output."""
    return ddim_step(LEVELS, x, out[..., : CONFIG.channels], i)


SAMPLER = Sampler(step, T)
EVERYTHING = uniform_schedule(T, NB, interval=1)
MIXED = random_schedule(jax.random.key(3), T, NB, utilization=0.5)
OTHER = random_schedule(jax.random.key(4), T, NB, utilization=0.5)


@functools.cache
def problem():
    """No gate is zero, so that every branch counts; samples stay of order 1."""
    leaves, tree = jax.tree.flatten(init_dit(jax.random.key(0), CONFIG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    spread = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    noise = jax.random.normal(jax.random.key(2), (B, 8, 8, 2))
    return jax.tree.unflatten(tree, spread), *double_batch(noise, jnp.arange(B), CONFIG.null_label)


def draw(schedule, implementation="static", data=None, network=NETWORK):
    params, x, cond = problem() if data is None else data
    return sample(network, params, x, cond, schedule=schedule, sampler=SAMPLER, implementation=implementation)


@jax.jit
def plain_step(params, x, i, cond):
    return step(x, NETWORK(params, x, i, cond)[0], i)


def plain(params, x, cond):
    for i in reversed(range(T)):
        x = plain_step(params, x, np.int32(i), cond)
    return x


def assert_close(found, expected, tolerance=2e-6):
    """Differences over the largest number: float32 over four steps by default."""
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def test_three_implementations_are_the_schedule_by_hand():
    """Against a cache that is a Python list of outputs, filled from calls that compute everything."""
    params, x, cond = problem()
    cache = [None] * NB
    whole = jax.jit(lambda x, i, weights, cache: NETWORK(params, x, i, cond, cache=cache, weights=weights))
    for i in reversed(range(T)):
        flags = MIXED.rows[i]
        old = jnp.stack([jnp.zeros_like(cache[0]) if c is None else c for c in cache]) if i < T - 1 else None
        if old is None:
            out, outputs = NETWORK(params, x, i, cond)
        else:
            out, outputs = whole(x, i, jnp.array(flags, jnp.float32), old)
        cache = [outputs[k] if flags[k] else cache[k] for k in range(NB)]
        x = step(x, out, i)
    for implementation in ("static", "cond", "reference"):
        assert_close(draw(MIXED, implementation), x)
    assert float(jnp.abs(x - plain(*problem())).max()) > 1e-3  # reuse does something


def test_equal_rows_share_a_program_and_schedules_are_data():
    def fresh(*arguments, **options):  # a new object: nothing is compiled for it yet
        return NETWORK(*arguments, **options)

    first, second = (True, False, False, True), (True,) * NB
    TRACES.clear()
    draw(schedule_from_array([first, first, second, second]), network=fresh)
    assert sorted(TRACES) == sorted([first, second])  # one trace for each distinct row
    draw(schedule_from_array([first, second, first, second]), network=fresh)
    assert len(TRACES) == 2
    draw(MIXED, "cond", network=fresh)
    count = len(TRACES)
    for schedule in (OTHER, EVERYTHING):
        draw(schedule, "cond", network=fresh)
    assert len(TRACES) == count


def test_sharded_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params, x, cond = problem()
    spread = jax.device_put(params, everywhere), *jax.device_put((x, cond), rows)
    for implementation in ("static", "cond"):
        out = draw(MIXED, implementation, spread)
        assert len(out.sharding.device_set) == 8
        assert_close(out, draw(MIXED, implementation))


def test_the_unguided_variances_are_those_of_their_half():
    """Channels beyond those of `cfg_channels` come from the half with labels."""
    params, x, cond = problem()
    guided, _ = NETWORK(params, x, 2, cond)
    half = jnp.concatenate([x[:B], x[:B]])
    alone, _ = dit_apply(params, half, LEVELS.timestep(2), cond, CONFIG)
    assert_close(guided[:B, ..., 1:], alone[:B, ..., 1:])
    assert_close(guided[:B, ..., 0], alone[B:, ..., 0] + 1.5 * (alone[:B, ..., 0] - alone[B:, ..., 0]))
