"""DDIM, guidance and training: closed forms, limits, transformations, bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.diffusion import (
    add_noise,
    cosine_betas,
    ddim_sample,
    ddim_step,
    double_batch,
    drop_labels,
    epsilon_loss,
    guide,
    linear_betas,
    noise_schedule,
    predict_x0,
    respace,
    uniform_timesteps,
    with_guidance,
)

FULL = noise_schedule(linear_betas())
THIN = respace(FULL, uniform_timesteps(1000, 6))
MILD = noise_schedule(cosine_betas(8, max_beta=0.9))
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3, 2))


def for_point(schedule, point):
    """The exact noise where all data are one point."""

    def eps_fn(x, i):
        level = [schedule.look_up(schedule.table(name), i, x) for name in ("signal", "noise")]
        return (x - level[0] * point) / level[1]

    return eps_fn


step = jax.jit(ddim_step, static_argnums=0, static_argnames=("eta", "clip"))


def test_noise_is_added_and_taken_away(x64):
    x0, noise = (jax.random.normal(jax.random.key(k), (8, 3, 2), jnp.float64) for k in (1, 2))
    steps = jnp.array([0, 1, 2, 3, 4, 5, 0, 5])
    noisy = add_noise(THIN, x0, noise, steps)
    alphas = np.array(THIN.alphas_cumprod)[np.asarray(steps)][:, None, None]
    np.testing.assert_allclose(noisy, np.sqrt(alphas) * x0 + np.sqrt(1 - alphas) * noise, rtol=1e-14)
    # 1/√ᾱ is 157 at the last step: 157 roundings of float64.
    np.testing.assert_allclose(predict_x0(THIN, noisy, noise, steps), x0, rtol=0, atol=1e-13)
    # The same noise at the level below, and at i = 0 the data.
    lower = add_noise(THIN, x0, noise, jnp.maximum(steps - 1, 0))
    lower = jnp.where(steps[:, None, None] == 0, x0, lower)
    np.testing.assert_allclose(ddim_step(THIN, noisy, noise, steps), lower, rtol=0, atol=1e-13)


def test_all_data_at_one_point_take_one_step_or_many(x64):
    x = jnp.asarray(X, jnp.float64)
    for schedule in (THIN, FULL, respace(FULL, (999,))):
        samples = ddim_sample(for_point(schedule, 0.7), schedule, x)
        np.testing.assert_allclose(samples, 0.7, rtol=1e-11)
    samples = ddim_sample(for_point(THIN, 0.7), THIN, x, eta=1.0, key=KEY)  # fresh noise is taken away again
    np.testing.assert_allclose(samples, 0.7, rtol=1e-11)


def test_normal_data_stay_normal():
    # For x₀ ~ N(0, 1) every level is N(0, 1), ε = √(1−ᾱ) x, and η = 1 has the posterior's variance.
    def eps_fn(x, i):
        return FULL.look_up(FULL.table("noise"), i, x) * x

    noise = jax.random.normal(KEY, (20_000, 1))
    exact = jax.jit(lambda x, key: ddim_sample(eps_fn, FULL, x, eta=1.0, key=key))(noise, jax.random.key(3))
    # Deviations of the mean and of the variance of 20,000 draws: 0.007 and 0.01.
    assert abs(float(exact.mean())) < 0.03
    assert abs(float(exact.var()) - 1) < 0.04
    assert not np.allclose(exact, noise, atol=0.1)


def test_clipping_bounds_the_estimate_and_its_noise():
    eps = jnp.zeros_like(X)
    x0 = predict_x0(MILD, 10 * X, eps, 4, clip=1.0)
    assert float(jnp.abs(x0).max()) <= 1
    alpha, later = MILD.alphas_cumprod[4], MILD.alphas_cumprod[3]
    noise = (10 * X - np.sqrt(alpha) * x0) / np.sqrt(1 - alpha)
    np.testing.assert_allclose(
        step(MILD, 10 * X, eps, 4, clip=1.0), np.sqrt(later) * x0 + np.sqrt(1 - later) * noise, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(step(MILD, 10 * X, eps, 0, clip=1.0), predict_x0(MILD, 10 * X, eps, 0, clip=1.0))


@settings(max_examples=15, deadline=None)
@given(i=st.integers(0, 7), scale=st.floats(-3, 3), seed=st.integers(0, 9))
def test_a_step_is_linear_in_sample_and_noise(i, scale, seed):
    eps = jax.random.normal(jax.random.key(seed), X.shape)
    out = step(MILD, scale * X, scale * eps, jnp.int32(i))
    np.testing.assert_allclose(out, scale * step(MILD, X, eps, jnp.int32(i)), rtol=1e-4, atol=1e-4)


def test_transformations():
    eps = jax.random.normal(jax.random.key(1), X.shape)
    plain = step(MILD, X, eps, jnp.int32(3))
    np.testing.assert_allclose(plain, ddim_step(MILD, X, eps, 3), rtol=1e-6, atol=1e-6)
    many = jax.vmap(lambda x, e, i: ddim_step(MILD, x[None], e[None], i)[0])(X, eps, jnp.full(8, 3))
    np.testing.assert_allclose(many, plain, rtol=1e-6, atol=1e-6)
    # √ᾱ′ ∂x̂₀/∂x is the slope of a step.
    slope = jax.grad(lambda x: ddim_step(MILD, x, eps, 3).sum())(X)
    alphas = MILD.alphas_cumprod
    np.testing.assert_allclose(slope, np.sqrt(alphas[2] / alphas[3]), rtol=1e-5)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = step(MILD, jax.device_put(X, rows), jax.device_put(eps, rows), jnp.int32(3))
    np.testing.assert_array_equal(spread, plain)
    assert spread.sharding.is_equivalent_to(rows, 3)
    half = step(MILD, X.astype(jnp.bfloat16), eps.astype(jnp.bfloat16), jnp.int32(3))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), plain, rtol=0.02, atol=0.02)  # 8 bits
    assert bool(jnp.isnan(step(MILD, X, eps, jnp.int32(8))).all())  # no such step
    keyed = [step(MILD, X, eps, jnp.int32(3), eta=0.5, key=jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert not np.allclose(keyed[0], keyed[2])
    np.testing.assert_array_equal(  # the last step adds none
        step(MILD, X, eps, jnp.int32(0), eta=0.5, key=KEY),
        step(MILD, X, eps, jnp.int32(0), eta=0.5, key=jax.random.key(9)),
    )


# Guidance -------------------------------------------------------------------------------------------------------------


def by_label(x, i, cond):
    return x * cond["label"][:, None, None] + cond["vector"][:, None]


COND = {"label": jnp.arange(8.0), "vector": jnp.ones((8, 2))}
NULL = {"label": 10.0, "vector": jnp.array([0.0, 5.0])}


def test_guidance_is_a_line_through_both_predictions():
    nothing = jax.tree.map(lambda leaf, empty: jnp.broadcast_to(jnp.asarray(empty), leaf.shape), COND, NULL)
    with_cond, without = by_label(X, 0, COND), by_label(X, 0, nothing)
    for scale in (0.0, 1.0, 2.5):
        guided = with_guidance(by_label, scale=scale, null=NULL)(X, 0, COND)
        np.testing.assert_allclose(guided, without + scale * (with_cond - without), rtol=1e-5, atol=1e-5)
    assert with_guidance(by_label, scale=1.0) is by_label
    traced = jax.jit(lambda s: with_guidance(by_label, scale=s, null=NULL)(X, 0, COND))(1.0)
    np.testing.assert_allclose(traced, with_cond, rtol=1e-5, atol=1e-5)


def test_channels_that_are_not_guided_stay_those_of_their_half():
    both = jnp.concatenate([X, -X])
    out = guide(both, 2.0, cfg_channels=1)
    np.testing.assert_allclose(out[..., 0], jnp.concatenate([3 * X, 3 * X])[..., 0], rtol=1e-6)
    np.testing.assert_array_equal(out[..., 1], both[..., 1])
    np.testing.assert_array_equal(guide(both, 2.0, cfg_channels=2), guide(both, 2.0))


def test_steps_per_sample_are_doubled():
    seen = with_guidance(lambda x, i, cond: x + i[:, None, None] + cond[:, None, None], scale=2.0, null=0)
    out = seen(jnp.zeros((2, 1, 1)), jnp.array([3, 5]), jnp.array([1, 2]))
    np.testing.assert_array_equal(out[:, 0, 0], [5, 9])


# Training -------------------------------------------------------------------------------------------------------------


def test_the_loss_of_networks_that_know(x64):
    x0 = jnp.full((16, 3, 2), 0.7, jnp.float64)

    def knows(x, i, cond):
        return for_point(FULL, 0.7)(x, i)

    assert float(epsilon_loss(knows, FULL, KEY, x0, jnp.zeros(16, int), null=5)) < 1e-20
    # More channels than the data have: variances, which the loss leaves alone.
    wide = epsilon_loss(
        lambda x, i, cond: jnp.concatenate([knows(x, i, cond), 1e3 * x], -1),
        FULL,
        KEY,
        x0,
        jnp.zeros(16, int),
        dropout=0.0,
    )
    assert float(wide) < 1e-20


def test_training_sees_all_steps_and_few_null_labels():
    seen = {}

    def spy(x, i, cond):
        seen.update(i=i, cond=cond)
        return 0 * x

    x0 = jnp.zeros((4000, 1))
    loss = epsilon_loss(spy, FULL, KEY, x0, jnp.zeros(4000, jnp.int32), null=7, dropout=0.1)
    assert loss.dtype == jnp.float32
    assert abs(float(loss) - 1) < 0.1
    counts = np.bincount(np.asarray(seen["i"]) // 100, minlength=10)
    assert counts.sum() == 4000
    assert counts.min() > 300
    assert set(np.unique(seen["cond"])) == {0, 7}
    assert abs(float((seen["cond"] == 7).mean()) - 0.1) < 0.02  # ± 0.005
    labels = {"a": jnp.ones((3, 2))}
    np.testing.assert_array_equal(drop_labels(KEY, labels, {"a": 0}, 0)["a"], labels["a"])
    gradient = jax.grad(
        lambda w: epsilon_loss(lambda x, i, c: w * x, FULL, KEY, x0, jnp.zeros(4000)[:, None], dropout=0.0)
    )(jnp.float32(0))
    assert gradient < 0  # noise points along the noisy sample
    half = epsilon_loss(spy, FULL, KEY, x0.astype(jnp.bfloat16), jnp.zeros(4000, jnp.int32), null=7)
    assert half.dtype == jnp.float32


# Bad inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ddim_step(MILD, X, X, 8), "i is 8"),
        (lambda: ddim_step(MILD, X, X, jnp.zeros(3, int)), "one per sample"),
        (lambda: ddim_step(MILD, X, X[..., :1], 0), "eps has shape"),
        (lambda: ddim_step(MILD, X, jnp.concatenate([X, X], -1), 0), "take the first channels"),
        (lambda: ddim_step(MILD, X, X, 0, eta=1.5, key=KEY), "eta is 1.5"),
        (lambda: ddim_step(MILD, X, X, 0, eta=0.5), "no key"),
        (lambda: ddim_sample(lambda x, i: x, MILD, X, eta=0.5), "no key"),
        (lambda: ddim_step(MILD, X, X, 0, clip=0), "clip is 0"),
        (lambda: predict_x0(MILD, X, X, 0, clip=-1.0), "clip is -1.0"),
        (lambda: add_noise(MILD, X, X[:2], 0), "noise has shape"),
        (lambda: with_guidance(by_label, scale=1.5), "null is None"),
        (lambda: with_guidance(by_label, scale=jnp.float32(1.5)), "null is None"),
        (lambda: double_batch(X, jnp.zeros(8), None), "null is None"),
        (lambda: double_batch(X, jnp.zeros(7), 0), "expected 8 rows"),
        (lambda: guide(X[:3], 2.0), "3 rows"),
        (lambda: guide(X, 2.0, cfg_channels=3), "cfg_channels is 3"),
        (lambda: guide(X, 2.0, cfg_channels=0), "cfg_channels is 0"),
        (lambda: drop_labels(KEY, jnp.zeros(8), 0, 1.5), "rate is 1.5"),
        (lambda: epsilon_loss(by_label, MILD, KEY, X, COND), "null is None"),
        (lambda: epsilon_loss(lambda x, i, c: x[..., :1], MILD, KEY, X, COND, dropout=0.0), "or more channels"),
    ],
)
def test_bad_inputs_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
