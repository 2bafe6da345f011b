"""HarmoniCa on a DiT, against what the authors' code computes in float64 (weights, labels and noise are in dit.npz)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccel.caching import (
    Sampler,
    cache_utilization,
    harmonica,
    router_schedule,
    sample,
    sdt_loss,
    soft_sample,
    step_weights,
    uniform_schedule,
)
from jaxaccel.diffusion import ddim_step, guide_denoiser, linear_betas, noise_schedule, respace, uniform_timesteps
from jaxaccel.models import DiTConfig, dit_denoiser, dit_params_from_names

IMAGE, PATCH, WIDTH, DEPTH, HEADS, CLASSES, T, B = 4, 2, 32, 2, 4, 5, 5, 4
SCALE, THRESHOLD, BETA = 1.5, 0.1, 1e-3
NB = 2 * DEPTH
CONFIG = DiTConfig(WIDTH, DEPTH, HEADS, patch=PATCH, image_size=IMAGE, num_classes=CLASSES)
LEVELS = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, T))
SAMPLER = Sampler(lambda x, out, i: ddim_step(LEVELS, x, out[..., :4], i), T)
NETWORK = guide_denoiser(dit_denoiser(CONFIG, LEVELS), scale=SCALE, cfg_channels=3)


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def read(reference):
    """Parameters of the reference in this library's tree, its noise and its labels."""
    tensors = {key.removeprefix("param/"): reference[key] for key in reference.files if key.startswith("param/")}
    params = jax.tree.map(jnp.asarray, dit_params_from_names(tensors, CONFIG, dtype=np.float64))
    return params, channels_last(reference["noise"]), jnp.asarray(reference["labels"])


@pytest.fixture
def problem(x64, vectors):
    """Reference arrays; parameters, noise and labels."""
    return vectors("harmonica"), read(vectors("dit"))


GENERATE = jax.jit(
    lambda params, x, cond, weights: soft_sample(
        NETWORK, params, x, cond, weights=weights, sampler=SAMPLER, threshold=THRESHOLD
    )
)


def test_samples_with_a_soft_and_a_hard_table(problem, vectors):
    reference, data = problem
    logits = jnp.asarray(reference["router_logits"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)  # float64, errors grow 157 times
    close(GENERATE(*data, jax.nn.sigmoid(logits)), channels_last(reference["sample_soft_router"]))
    close(GENERATE(*data, jnp.ones((T, NB))), channels_last(vectors("dit")["ddim_full"]))
    for threshold in ("0.1", "0.5"):
        schedule = router_schedule(logits, threshold=float(threshold))
        expected = reference[f"infer_{threshold}/schedule"]
        np.testing.assert_array_equal(np.asarray(schedule), expected)
        assert cache_utilization(schedule) == pytest.approx(1 - expected.mean(), abs=1e-15)
        out = sample(NETWORK, *data, schedule=schedule, sampler=SAMPLER, implementation="cond")
        close(out, channels_last(reference[f"infer_{threshold}/sample"]))
    for implementation in ("static", "reference"):  # bit for bit
        other = sample(NETWORK, *data, schedule=schedule, sampler=SAMPLER, implementation=implementation)
        np.testing.assert_array_equal(other, out)
    whole = sample(NETWORK, *data, schedule=uniform_schedule(T, NB, interval=1), sampler=SAMPLER, implementation="cond")
    close(whole, channels_last(vectors("dit")["ddim_full"]))


def test_weights_of_steps(problem):
    reference, data = problem
    logits = jnp.asarray(reference["router_logits"])
    for proxy in ("sequential", "leave_one_out"):
        found = jax.jit(
            lambda params, x, cond, logits, proxy=proxy: step_weights(
                NETWORK, params, x, cond, logits=logits, sampler=SAMPLER, proxy=proxy, threshold=THRESHOLD
            )
        )(*data, logits)
        # Squares of differences of samples of size 400: the smallest, 2e-12, has nine digits.
        np.testing.assert_allclose(found[:-1], reference[f"lambda_{proxy}"], rtol=1e-8)


def test_an_epoch_of_training(problem):
    """Steps of plain gradient descent at rate 1 leave the gradients in the table."""
    reference, (params, x, cond) = problem
    logits = jnp.asarray(reference["router_logits"])
    training = harmonica(
        NETWORK, SAMPLER, num_branches=NB, beta=BETA, threshold=THRESHOLD, optimizer=optax.sgd(1.0)
    )  # fmt: skip
    state = training.init(jax.random.key(0))._replace(logits=logits)
    after, info = jax.jit(training.epoch)(state, params, x, cond)
    order = reference["sdt/step_index"]  # as executed
    np.testing.assert_allclose(after.lam[:-1], reference["lambda_sequential"], rtol=1e-8)
    np.testing.assert_allclose(info.data_loss[order], reference["sdt/data_loss"], rtol=1e-10)
    np.testing.assert_allclose(info.usage[order], reference["sdt/l1"], rtol=1e-12)
    expected = after.lam[order] * info.data_loss[order] + BETA * info.usage[order]
    np.testing.assert_allclose(info.loss[order], expected, rtol=1e-14)
    slopes = (logits - after.logits)[order]
    np.testing.assert_allclose(slopes, reference["sdt/grad_router_logits"], rtol=1e-10)
    np.testing.assert_allclose(info.x0, channels_last(reference["sdt/trajectory"][-1]), rtol=1e-11, atol=1e-11)

    # The whole trajectory, step by step: those gradients are nearly all price, so the data's part is looked at alone.
    @jax.jit
    def first(params, x):
        out, cache = NETWORK(params, x, jnp.int32(T - 1), cond)
        return SAMPLER.step(x, out, T - 1), cache

    @jax.jit
    def one(row, x, i, cache, lam):
        def loss(row, beta):
            return sdt_loss(NETWORK, params, row, x, i, cond, cache, lam=lam, beta=beta, threshold=THRESHOLD)

        slope, left = jax.grad(loss, has_aux=True)(row, 0.0)
        ahead, behind = (loss(row.at[0].add(h), 0.0)[0] for h in (1e-4, -1e-4))
        return slope, (ahead - behind) / 2e-4, SAMPLER.step(x, left.out, i), left.cache

    x, cache = first(params, x)
    for number, i in enumerate(order):
        np.testing.assert_allclose(x, channels_last(reference["sdt/trajectory"][number]), rtol=1e-11, atol=1e-11)
        slope, difference, x, cache = one(logits[i], x, int(i), cache, 1.0)
        np.testing.assert_allclose(slope[0], difference, rtol=1e-5)
        price = BETA * jax.nn.sigmoid(logits[i]) * (1 - jax.nn.sigmoid(logits[i]))
        data_part = reference["sdt/grad_router_logits"][number] - price
        np.testing.assert_allclose(after.lam[i] * slope, data_part, rtol=1e-5, atol=1e-16)
