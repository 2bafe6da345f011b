"""Layer-wise distillation: closed forms, limits, gradients, and what must not be looked at."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxaccel.compression.distillation import (
    init_projections,
    layerwise_kd_loss,
    logit_kd_loss,
    progressive_weights,
    uniform_layer_map,
)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Compiled: eager calls would compile every operation by itself.
states_loss = jax.jit(layerwise_kd_loss, static_argnums=2)
logit_loss = jax.jit(logit_kd_loss)


@pytest.fixture
def states():
    """Three student layers of width 6, five teacher layers of width 8, on [2, 4] tokens."""
    return [normal(i, 2, 4, 6) for i in range(3)], [normal(10 + i, 2, 4, 8) for i in range(5)]


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 7), (4, 12), (3, 4), (5, 7), (24, 24)])
def test_layer_map_is_increasing_even_and_ends_at_the_top(student, teacher):
    layers = uniform_layer_map(student, teacher)
    assert len(layers) == student
    assert layers[0] >= 0
    assert layers[-1] == teacher - 1
    gaps = np.diff([-1, *layers])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_layers_join_one_at_a_time_under_jit():
    weights = jax.jit(progressive_weights, static_argnums=(1, 2))
    shares = [weights(step, 5, 3).tolist() for step in (0, 4, 5, 9, 10, 1000)]
    assert shares == [[1, 0, 0]] * 2 + [[1, 1, 0]] * 2 + [[1, 1, 1]] * 2


def test_states_loss_is_two_minus_two_correlations(states):
    student, teacher = [s @ normal(5, 6, 8) for s in states[0]], states[1]
    expected = 0.0
    for i, j in enumerate((0, 2, 4)):
        pairs = zip(np.reshape(student[i], (-1, 8)), np.reshape(teacher[j], (-1, 8)), strict=True)
        expected += np.mean([2 - 2 * np.corrcoef(a, b)[0, 1] for a, b in pairs]) / 3
    # float32, and eps = 1e-6 of variances of about 1
    np.testing.assert_allclose(states_loss(student, teacher, (0, 2, 4)), expected, rtol=1e-5)


def test_scale_and_offset_of_states_do_not_matter(states):
    student, teacher = states[1][:2], states[1][2:4]
    loss = states_loss(student, teacher, (0, 1))
    moved = states_loss([5.0 * s + 3.0 for s in student], [0.5 * t - 2.0 for t in teacher], (0, 1))
    np.testing.assert_allclose(loss, moved, rtol=1e-4)  # float32; eps counts four times as much at half the size
    same = states_loss([5.0 * t + 3.0 for t in teacher], teacher, (0, 1))
    assert abs(same) < 1e-10


def test_projections_are_out_by_in(states):
    student, teacher = states
    matrices = init_projections(jax.random.key(0), 3, 6, 8)
    assert not np.array_equal(matrices[0], matrices[1])
    loss = states_loss(student, teacher, (0, 2, 4), matrices)
    by_hand = states_loss([s @ p.T for s, p in zip(student, matrices, strict=True)], teacher, (0, 2, 4))
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
    large = init_projections(jax.random.key(1), 1, 400, 300)[0]
    np.testing.assert_allclose(large.std(), 1 / 20, rtol=0.02)  # 120 000 draws


def test_weights_and_mask_select(states):
    student, teacher = [s @ normal(5, 6, 8) for s in states[0]], states[1]

    def loss(**options):
        return states_loss(student, teacher, (0, 2, 4), **options)

    each = [states_loss([s], teacher, (j,)) for s, j in zip(student, (0, 2, 4), strict=True)]
    np.testing.assert_allclose(loss(weights=jnp.array([1.0, 0.0, 3.0])), (each[0] + 3 * each[2]) / 4, rtol=1e-6)
    mask = jnp.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    chosen = states_loss([s[mask == 1] for s in student], [t[mask == 1] for t in teacher], (0, 2, 4))
    np.testing.assert_allclose(loss(mask=mask), chosen, rtol=1e-6)
    np.testing.assert_array_equal(loss(mask=mask.astype(bool)), loss(mask=mask))
    assert loss(mask=jnp.zeros((2, 4))) == loss(weights=jnp.zeros(3)) == 0.0
    slopes = jax.grad(lambda s: states_loss(s, teacher, (0, 2, 4), mask=jnp.zeros((2, 4), bool)))(student)
    assert not any(np.any(slope) for slope in slopes)


def test_gradients_of_states_and_projections(states, x64):
    student, teacher = ([x.astype(jnp.float64) for x in part] for part in states)
    matrices = init_projections(jax.random.key(0), 3, 6, 8, dtype=jnp.float64)
    mask = jnp.array([[1, 1, 0, 0], [1, 0, 0, 1]])

    def loss(student, matrices):
        return states_loss(student, teacher, (0, 2, 4), matrices, weights=jnp.array([1.0, 0.5, 2.0]), mask=mask)

    check_grads(jax.jit(loss), (student, matrices), order=1, modes=("rev",))
    slopes = jax.grad(lambda t: states_loss(student, t, (0, 2, 4), matrices))(teacher)
    assert not any(np.any(slope) for slope in slopes)


def test_projections_learn_what_is_linear():
    teacher = [normal(0, 64, 8)]
    student = [teacher[0] @ normal(1, 8, 6)]  # loses two of eight dimensions
    tx = optax.adam(0.05)
    matrices = init_projections(jax.random.key(2), 1, 6, 8)

    @jax.jit
    def run(matrices):
        def step(carry, _):
            matrices, state = carry
            loss, slopes = jax.value_and_grad(lambda p: states_loss(student, teacher, (0,), p))(matrices)
            updates, state = tx.update(slopes, state)
            return (optax.apply_updates(matrices, updates), state), loss

        return jax.lax.scan(step, (matrices, tx.init(matrices)), length=200)[1]

    losses = run(matrices)
    assert losses[0] > 1.0
    assert losses[-1] < 0.5 * losses[0]


def test_kl_of_two_outcomes():
    p, q = np.array([0.9, 0.2]), np.array([0.6, 0.7])
    expected = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    student, teacher = (jnp.log(jnp.stack([x, 1 - x], -1)) for x in (q, p))
    np.testing.assert_allclose(logit_loss(student, teacher), expected, rtol=1e-6)
    np.testing.assert_allclose(logit_loss(student + 7.0, teacher - 3.0), expected, rtol=1e-5)  # offsets cancel


def test_kl_of_gaussian_like_logits_equals_optax():
    student, teacher = normal(0, 3, 5, 11), normal(1, 3, 5, 11)
    for heat in (0.5, 1.0, 4.0):
        log_q, log_p = jax.nn.log_softmax(student / heat), jax.nn.log_softmax(teacher / heat)
        expected = heat**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()
        np.testing.assert_allclose(logit_loss(student, teacher, heat), expected, rtol=1e-5)
    np.testing.assert_allclose(logit_loss(student, student), 0.0, atol=1e-7)


def test_hot_limit_is_half_the_variance_of_the_difference(x64):
    student, teacher = normal(0, 4, 9, dtype=jnp.float64), normal(1, 4, 9, dtype=jnp.float64)
    limit = 0.5 * jnp.var(student - teacher, axis=-1).mean()
    errors = [abs(logit_loss(student, teacher, heat) - limit) for heat in (1e2, 1e3, 1e4)]
    np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.1)  # the next term is of order 1 / T
    assert errors[2] < 1e-3 * limit


def test_cold_limit_is_the_margin_times_t(x64):
    """T·(margin of the student): for T → 0 the teacher's choice costs z_max − z_choice, in units of T."""
    student = jnp.array([[0.0, 2.0, -1.0]], jnp.float64)
    teacher = jnp.array([[3.0, 1.0, 0.0]], jnp.float64)
    np.testing.assert_allclose(logit_loss(student, teacher, 0.01) / 0.01, 2.0, rtol=1e-9)


@pytest.mark.parametrize("heat", [1.0, 3.0])
def test_gradient_is_the_difference_of_probabilities(heat, x64):
    student, teacher = normal(0, 2, 3, 7, dtype=jnp.float64), normal(1, 2, 3, 7, dtype=jnp.float64)
    mask = jnp.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    slope = jax.grad(logit_loss)(student, teacher, heat, mask)
    expected = heat * (jax.nn.softmax(student / heat) - jax.nn.softmax(teacher / heat)) * mask[..., None] / mask.sum()
    np.testing.assert_allclose(slope, expected, rtol=1e-12, atol=1e-15)
    check_grads(lambda s: logit_loss(s, teacher, heat, mask), (student,), order=2, modes=("rev",))
    assert not np.any(jax.grad(logit_loss, argnums=1)(student, teacher, heat, mask))


def test_masked_attention_scores():
    causal = jnp.tril(jnp.ones((5, 5), bool))
    student, teacher = (jnp.where(causal, normal(i, 2, 5, 5), -jnp.inf) for i in (0, 1))
    rows = [logit_loss(student[:, t, : t + 1], teacher[:, t, : t + 1]) for t in range(5)]
    loss, slope = jax.value_and_grad(logit_loss)(student, teacher)
    np.testing.assert_allclose(loss, np.mean(rows), rtol=1e-5)
    assert np.isfinite(slope).all()
    assert not np.any(np.where(causal, 0.0, slope))


def test_what_the_student_rules_out_costs_infinity_unless_masked():
    student = jnp.array([[0.0, -jnp.inf], [0.0, 1.0]])
    teacher = jnp.array([[0.0, 0.0], [0.0, 1.0]])
    assert logit_loss(student, teacher) == jnp.inf
    assert abs(logit_loss(student, teacher, mask=jnp.array([False, True]))) < 1e-7
    assert logit_loss(student, teacher, mask=jnp.zeros(2)) == 0.0
    assert np.isfinite(logit_loss(teacher, student))  # the other way round costs nothing


def test_bfloat16_is_summed_in_float32_and_jit_and_vmap_agree(states):
    student = states[0]
    matrices = init_projections(jax.random.key(0), 3, 6, 8, dtype=jnp.bfloat16)
    half = [[x.astype(jnp.bfloat16) for x in part] for part in states]
    loss = states_loss(*half, (0, 2, 4), matrices)
    assert loss.dtype == jnp.float32
    exact = states_loss(*[[x.astype(jnp.float32) for x in p] for p in half], (0, 2, 4), matrices)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)  # products of bfloat16 are exact in float32

    logits = half[1][0]
    assert logit_loss(logits, half[1][1], 2.0).dtype == jnp.float32
    slope = jax.grad(logit_loss)(logits, half[1][1], 2.0)
    assert slope.dtype == jnp.bfloat16

    by_row = jax.vmap(lambda s, t: logit_kd_loss(s, t, 2.0))(student[0], student[1])
    np.testing.assert_allclose(by_row.mean(), logit_loss(student[0], student[1], 2.0), rtol=1e-5)


A, B = jnp.zeros((2, 6)), jnp.zeros((2, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_layer_map(0, 3), "student_layers is 0"),
        (lambda: uniform_layer_map(4, 3), "student_layers is 4, expected .* at most teacher_layers = 3"),
        (lambda: progressive_weights(0, 0, 3), "steps_per_layer is 0"),
        (lambda: progressive_weights(0, 3, 0), "num_layers is 0"),
        (lambda: init_projections(jax.random.key(0), 1, 0, 3), "student_dim is 0"),
        (lambda: layerwise_kd_loss([], [B], ()), "0 student layers"),
        (lambda: layerwise_kd_loss([B], [B], (0, 0)), "layer_map has 2 entries for 1 student layers"),
        (lambda: layerwise_kd_loss([B], [B], (1,)), r"layer_map\[0\] is 1, expected one of the teacher's 1 layers"),
        (lambda: layerwise_kd_loss([B], [B], (-1,)), r"layer_map\[0\] is -1"),
        (lambda: layerwise_kd_loss([A], [B], (0,)), r"student_states\[0\] has shape \(2, 6\).*give projections"),
        (lambda: layerwise_kd_loss([B], [B[:1]], (0,)), r"expected \(1, 8\) of teacher layer 0"),
        (lambda: layerwise_kd_loss([A], [B], (0,), []), "projections has 0 matrices"),
        (lambda: layerwise_kd_loss([A], [B], (0,), [jnp.zeros((6, 8))]), r"projections\[0\] has shape \(6, 8\)"),
        (lambda: layerwise_kd_loss([B], [B], (0,), weights=[1.0, 1.0]), "weights has 2 entries"),
        (lambda: layerwise_kd_loss([B], [B], (0,), mask=jnp.ones(3)), r"mask has shape \(3,\), expected \(2,\)"),
        (lambda: layerwise_kd_loss([B], [B], (0,), eps=0.0), "eps is 0.0"),
        (lambda: logit_kd_loss(A, B), r"teacher_logits has shape \(2, 8\), expected \(2, 6\)"),
        (lambda: logit_kd_loss(A, A, 0.0), "temperature is 0.0"),
        (lambda: logit_kd_loss(A, A, math.inf), "temperature is inf"),
        (lambda: logit_kd_loss(A, A, mask=jnp.ones((2, 1))), r"mask has shape \(2, 1\)"),
    ],
)
def test_wrong_calls_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
