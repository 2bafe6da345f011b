"""Losses of alignment: vectors, optax, closed forms, what is kept for the backward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxaccel import posttraining
from jaxaccel.posttraining import dpo_loss, implicit_reward

# Compiled once for all tests. It also turns into JAX arrays the NumPy arrays that check_grads hands over.
sft_loss, sequence_logps = jax.jit(posttraining.sft_loss), jax.jit(posttraining.sequence_logps)
sft_slope = jax.jit(jax.value_and_grad(posttraining.sft_loss))


def batch(dtype=jnp.float32, rows=3, length=7, vocabulary=11):
    logits = (3 * jax.random.normal(jax.random.key(0), (rows, length, vocabulary))).astype(dtype)
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, vocabulary)
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, (rows, length)).at[:, -1].set(True)
    return logits, tokens, mask


@jax.jit
def by_optax(logits, tokens, mask):
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(entropy * mask[:, 1:]) / jnp.sum(mask[:, 1:])


# DPO ------------------------------------------------------------------------------------------------------------------


def test_dpo_equals_the_vectors(vectors, x64):
    data = vectors("geb_dpo")
    np.testing.assert_allclose(dpo_loss(*jnp.asarray(data["dpo_logps"])), data["dpo_loss_beta01"], rtol=1e-12)


def test_dpo_of_a_policy_that_is_its_reference(x64):
    chosen, rejected = jnp.array([-4.0, -70.0]), jnp.array([-5.0, -1.0])
    beta = 0.3

    def total(c, r, ref_c, ref_r):
        return dpo_loss(c, r, ref_c, ref_r, beta=beta).sum()

    arguments = chosen, rejected, chosen, rejected
    np.testing.assert_allclose(dpo_loss(*arguments, beta=beta), math.log(2), rtol=1e-15)
    slopes = jax.grad(total, argnums=(0, 1, 2, 3))(*arguments)
    for slope, expected in zip(slopes, (-beta / 2, beta / 2, 0, 0), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-14)


def test_dpo_gradient_is_minus_beta_times_the_share_still_wrong(x64):
    policy = jnp.array([-3.0, -9.0, -2.5]), jnp.array([-4.0, -3.0, -60.0])
    reference = jnp.array([-3.5, -8.0, -2.0]), jnp.array([-4.5, -3.0, -40.0])
    slope = jax.grad(lambda c: dpo_loss(c, policy[1], *reference, beta=0.5).sum())(policy[0])
    margin = implicit_reward(policy[0], reference[0], beta=0.5) - implicit_reward(policy[1], reference[1], beta=0.5)
    np.testing.assert_allclose(slope, -0.5 / (1 + np.exp(margin)), rtol=1e-12)
    check_grads(jax.jit(lambda c, r: dpo_loss(c, r, *reference)), policy, order=2, modes=("fwd", "rev"))


def test_dpo_of_large_margins_stays_finite():
    policy, zero = jnp.array([-3e4, 3e4]), jnp.zeros(2)
    losses, pull = jax.vjp(lambda c: dpo_loss(c, zero, zero, zero), policy)
    np.testing.assert_allclose(losses, [3e3, 0.0], rtol=1e-6)  # float32
    np.testing.assert_allclose(pull(jnp.ones(2))[0], [-0.1, 0.0], rtol=1e-6)


@pytest.mark.parametrize("beta", [0, -0.1, float("nan"), float("inf"), np.float32(-1)])
def test_beta_must_be_positive(beta):
    one = jnp.zeros(1)
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got beta="):
        dpo_loss(one, one, one, one, beta=beta)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        implicit_reward(one, one, beta=beta)


def test_beta_may_be_traced():
    one = jnp.ones(2)
    got = jax.jit(lambda beta: dpo_loss(one, 0 * one, 0 * one, 0 * one, beta=beta))(0.5)
    np.testing.assert_allclose(got, math.log1p(math.exp(-0.5)), rtol=1e-6)  # float32


# Log-probabilities and SFT --------------------------------------------------------------------------------------------


def test_sequence_logps_are_sums_of_log_softmax():
    logits, tokens, mask = batch()
    wide, ids, marks = (np.asarray(x) for x in (jax.nn.log_softmax(logits), tokens, mask))
    expected = [sum(wide[b, t - 1, ids[b, t]] for t in range(1, 7) if marks[b, t]) for b in range(3)]
    got = sequence_logps(logits, tokens, mask)
    np.testing.assert_allclose(got, expected, rtol=2e-6)  # float32, sums of six
    np.testing.assert_array_equal(sequence_logps(logits, tokens, mask.at[:, 0].set(~mask[:, 0])), got)
    np.testing.assert_array_equal(sequence_logps(logits, tokens, mask.astype(jnp.int32)), got)
    np.testing.assert_allclose(sequence_logps(logits, tokens, 2.0 * mask), 2 * got, rtol=1e-6)
    np.testing.assert_array_equal(sequence_logps(logits, tokens, jnp.zeros_like(mask)), 0.0)


def test_logits_of_the_last_position_do_not_count():
    logits, tokens, mask = batch()
    slope = sft_slope(logits, tokens, mask)[1]
    np.testing.assert_array_equal(slope[:, -1], 0.0)
    assert np.abs(slope[:, :-1]).max() > 0.01


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sft_equals_optax(dtype):
    logits, tokens, mask = batch(dtype)
    loss, slope = sft_slope(logits, tokens, mask)
    # The same numbers in float32: bfloat16 logits are rounded once, before both.
    expected, wanted = jax.value_and_grad(by_optax)(logits.astype(jnp.float32), tokens, mask)
    assert (loss.dtype, slope.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)  # float32
    # bfloat16: the two parts of a gradient, p and the one-hot, are each rounded to 2^-9, and so is their sum.
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(slope.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_sft_in_float64_and_its_gradients(x64):
    logits, tokens, mask = batch(jnp.float64)
    assert sft_loss(logits, tokens, mask).dtype == jnp.float64
    np.testing.assert_allclose(sft_loss(logits, tokens, mask), by_optax(logits, tokens, mask), rtol=1e-14)
    check_grads(lambda z: sft_loss(z, tokens, mask), (logits,), order=1, modes=("fwd", "rev"))


def test_a_mask_that_selects_nothing():
    logits, tokens, mask = batch()
    for empty in (jnp.zeros_like(mask), jnp.zeros_like(mask).at[:, 0].set(True)):
        loss, slope = sft_slope(logits, tokens, empty)
        assert float(loss) == 0.0
        np.testing.assert_array_equal(slope, 0.0)


def test_a_mean_over_tokens_not_over_sequences():
    logits, tokens, _ = batch()
    mask = jnp.zeros((3, 7), bool).at[0, 1:].set(True).at[1, 3].set(True)
    each = -sequence_logps(logits, tokens, mask)  # sums of 6 tokens and of 1
    np.testing.assert_allclose(sft_loss(logits, tokens, mask), each.sum() / 7, rtol=1e-6)  # float32


def test_impossible_and_padded_tokens_outside_the_mask_do_no_harm():
    logits, tokens, mask = batch()
    mask = mask.at[:, 3].set(False)
    expected, wanted = sft_slope(logits, tokens, mask)
    banned = logits.at[jnp.arange(3), 2, tokens[:, 3]].set(-jnp.inf)
    assert float(sft_loss(banned, tokens, mask)) == float(expected)
    assert np.isfinite(sft_slope(banned, tokens, mask)[1]).all()
    padded = tokens.at[:, 3].set(-100)  # torch's mark for tokens to be ignored
    loss, slope = sft_slope(logits, padded, mask)
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(slope, wanted)
    # An impossible token inside the mask is an infinite loss, not NaN.
    assert float(sft_loss(banned, tokens, mask.at[:, 3].set(True))) == math.inf


def test_large_logits_do_not_overflow():
    logits, tokens, mask = batch()
    # 2^-11 is the spacing of float32 around 1e4: that much is lost in the shifted logits themselves.
    np.testing.assert_allclose(sft_loss(logits + 1e4, tokens, mask), sft_loss(logits, tokens, mask), atol=2**-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_of_the_size_of_the_logits_is_kept_but_the_logits(dtype):
    logits, tokens, mask = batch(dtype, length=8, vocabulary=1000)
    _, pull = jax.vjp(lambda z: sft_loss(z, tokens, mask), logits)
    # In bytes: exponentials of bfloat16 logits in float32 would be twice as large.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) < logits.nbytes + 100 * tokens.size


def test_vmap_over_batches():
    logits, tokens, mask = batch()
    got = jax.vmap(sft_loss, in_axes=(0, None, None))(jnp.stack([logits, 2 * logits]), tokens, mask)
    np.testing.assert_allclose(got, [sft_loss(logits, tokens, mask), sft_loss(2 * logits, tokens, mask)], rtol=1e-6)


@pytest.mark.parametrize("function", [sft_loss, sequence_logps])
def test_one_token_predicts_nothing(function):
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 1\), expected at least 2 per sequence"):
        function(jnp.zeros((2, 1, 5)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool))
