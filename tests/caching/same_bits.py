"""Three ways to execute a schedule, compared bit for bit; a script, as XLA's flags are read when JAX starts."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    """Print what was equal, or fail."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    from jaxaccel.caching import Sampler, sample, schedule_from_array, uniform_schedule
    from jaxaccel.diffusion import (
        ddim_step,
        double_batch,
        guide_denoiser,
        linear_betas,
        noise_schedule,
        respace,
        uniform_timesteps,
    )
    from jaxaccel.models.dit import dit_denoiser, init_dit
    from jaxaccel.models.dit_config import DiTConfig
    from tests.caching.test_harmonica import MIXED, SAMPLER, T, network, plain, problem

    def compare(name, call, schedules, expected):
        for schedule in schedules:
            static, cond, reference = (
                np.asarray(call(schedule=schedule, implementation=how)) for how in ("static", "cond", "reference")
            )
            np.testing.assert_array_equal(static, cond)
            np.testing.assert_array_equal(static, reference)
        np.testing.assert_array_equal(static, expected)  # the last schedule computes everything
        print(name, static.dtype)

    jax.config.update("jax_platforms", "cpu")
    data = problem()
    everything = uniform_schedule(T, 3, interval=1)
    compare(
        "network",
        lambda **how: sample(network, *data, sampler=SAMPLER, **how),
        (MIXED, everything),
        plain(*data),
    )

    config, key = DiTConfig.tiny(depth=1), jax.random.key(0)
    params = jax.tree.map(
        lambda a: 0.1 * jax.random.normal(jax.random.fold_in(key, a.size), a.shape), init_dit(key, config)
    )
    levels = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, T))
    sampler = Sampler(lambda x, out, i: ddim_step(levels, x, out, i), T)
    x, labels = double_batch(jax.random.normal(key, (4, 8, 8, 1)), jnp.arange(4), config.null_label)
    guided = guide_denoiser(dit_denoiser(config, levels), scale=1.5)
    one = jax.jit(lambda params, x, i: sampler.step(x, guided(params, x, i, labels)[0], i))
    expected = x
    for i in reversed(range(T)):
        expected = one(params, expected, np.int32(i))
    rows = [[False, True], [True, True]]  # two distinct rows: each is a program to compile
    schedules = (schedule_from_array([rows[i in (2, 4)] for i in range(T)]), uniform_schedule(T, 2, interval=1))
    compare("dit", lambda **how: sample(guided, params, x, labels, sampler=sampler, **how), schedules, expected)


if __name__ == "__main__":
    main()
