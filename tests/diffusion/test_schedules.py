"""Schedules: the reference's numbers, closed forms, and every bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.diffusion import (
    NoiseSchedule,
    cosine_betas,
    linear_betas,
    noise_schedule,
    respace,
    stride_timesteps,
    uniform_timesteps,
)

FULL = noise_schedule(linear_betas())


def test_the_reference_of_dit(vectors):
    reference = vectors("dit")
    thin = respace(FULL, uniform_timesteps(1000, 5))
    np.testing.assert_array_equal(thin.timesteps, reference["timestep_map"])
    # The reference multiplies 1 − β of the thinned steps anew: float64 rounding of a few factors.
    np.testing.assert_allclose(thin.alphas_cumprod, reference["alphas_cumprod"], rtol=1e-12)


def test_the_reference_of_cogact(vectors):
    reference = vectors("dit")
    thin = respace(noise_schedule(cosine_betas(100)), stride_timesteps(100, 10))
    np.testing.assert_array_equal(thin.timesteps, reference["cosine/timesteps"])
    np.testing.assert_allclose(thin.alphas_cumprod, reference["cosine/alphas_cumprod"], rtol=1e-12)


def test_closed_forms():
    assert FULL.num_steps == FULL.train_steps == 1000
    assert FULL.timesteps == tuple(range(1000))
    np.testing.assert_allclose(FULL.alphas_cumprod[999], 4.03582977e-5, rtol=1e-8)  # DDPM's last ᾱ
    # Without the cap, ᾱ of the cosine schedule is f(u)/f(0).
    alphas = np.array(noise_schedule(cosine_betas(50)).alphas_cumprod)
    level = np.cos((np.arange(1, 51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas[:-1], level[:-1] / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, rtol=1e-12)
    assert 0 < alphas[-1] < alphas[-2] * 0.0011


def test_timesteps_reach_both_ends_or_stride():
    for count in range(2, 60):
        steps = uniform_timesteps(1000, count)
        assert (steps[0], steps[-1], len(set(steps))) == (0, 999, count)
    assert uniform_timesteps(1000, 1) == (999,)
    assert uniform_timesteps(7, 7) == stride_timesteps(7, 7) == tuple(range(7))
    assert stride_timesteps(1000, 50) == tuple(range(0, 1000, 20))
    assert stride_timesteps(100, 1) == (0,)


def test_a_schedule_is_a_constant_of_compiled_programs():
    thin = respace(FULL, uniform_timesteps(1000, 5))
    assert hash(thin) == hash(respace(FULL, uniform_timesteps(1000, 5)))
    assert thin == respace(thin, thin.timesteps)
    assert thin.timestep(jnp.array([4, 0])).tolist() == [999, 0]
    like = jnp.zeros((3, 2), jnp.bfloat16)
    found = jax.jit(lambda s, i: s.look_up(s.table("alpha_next"), i, like), static_argnums=0)(
        thin, jnp.array([0, 4, 5])
    )
    assert found.shape == (3, 1)
    assert found.dtype == jnp.float32
    # Beyond the schedule there is no level, and no silent neighbour.
    np.testing.assert_allclose(found[:, 0], [1, thin.alphas_cumprod[3], np.nan], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear_betas(0), "num_steps is 0"),
        (lambda: linear_betas(2.5), "num_steps is 2.5"),
        (lambda: linear_betas(start=0.1, end=0.01), "start and end"),
        (lambda: cosine_betas(True), "num_steps is True"),
        (lambda: cosine_betas(max_beta=1.0), "max_beta is 1.0"),
        (lambda: noise_schedule([]), "at least 1 entry"),
        (lambda: noise_schedule([0.1, 1.0]), "betas must lie in"),
        (lambda: noise_schedule([[0.1]]), "one axis"),
        (lambda: uniform_timesteps(1000, 0), "num_steps is 0"),
        (lambda: uniform_timesteps(1000, -3), "num_steps is -3"),
        (lambda: uniform_timesteps(10, 11), "at most train_steps = 10"),
        (lambda: uniform_timesteps(0, 1), "train_steps is 0"),
        (lambda: stride_timesteps(100, 0), "num_steps is 0"),
        (lambda: stride_timesteps(100, 99), "no whole stride"),
        (lambda: respace(FULL, [3, 1000]), r"timesteps \[1000\] are not"),
        (lambda: respace(FULL, [3, 3]), "must rise"),
        (lambda: respace(FULL, []), "at least 1"),
        (lambda: NoiseSchedule((0.5, 0.6), (0, 1), 2), "must fall"),
        (lambda: NoiseSchedule((1.5,), (0,), 2), "must fall from step to step and lie"),
        (lambda: NoiseSchedule((0.5,), (0, 1), 2), "same number"),
        (lambda: NoiseSchedule((0.5, 0.4), (1, 0), 2), "timesteps must rise"),
        (lambda: NoiseSchedule((0.5,), (2,), 2), "less than 2"),
        (lambda: FULL.table("beta"), "expected one of signal"),
        (lambda: FULL.timestep(1000), "i is 1000"),
        (lambda: FULL.look_up(FULL.table("alpha"), -1, jnp.zeros(2)), "i is -1"),
        (lambda: FULL.look_up(FULL.table("alpha"), jnp.zeros(3, int), jnp.zeros((2, 2))), "one per sample"),
    ],
)
def test_bad_inputs_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
