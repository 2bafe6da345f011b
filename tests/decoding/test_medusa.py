"""Medusa heads against their equations, the losses against NumPy, gradients, and a training run with known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxaccel.decoding.medusa import (
    MedusaConfig,
    MedusaParams,
    init_medusa_heads,
    medusa2_loss,
    medusa_adam,
    medusa_hidden,
    medusa_logits,
    medusa_loss,
    medusa_schedule,
    medusa_targets,
    rank_accuracies,
)
from jaxaccel.decoding.tree import build_tree, expected_length

D, V = 6, 11
logits_of = jax.jit(medusa_logits)
loss_of = jax.jit(medusa_loss, static_argnames=("decay", "coefficient"))
loss2_of = jax.jit(medusa2_loss, static_argnames=("decay", "coefficient"))
targets_of = jax.jit(medusa_targets, static_argnames=("num_heads", "first"))


def some_heads(layers=1, heads=3, share=False, dtype=jnp.float32):
    """Heads with random parameters."""
    config = MedusaConfig(heads, layers)
    start = init_medusa_heads(jax.random.key(0), D, V, config=config, share_vocab=share, dtype=dtype)
    keys = iter(jax.random.split(jax.random.key(1), 3))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, dtype) / D**0.5, start)


def unchecked(function):
    """The function as users have it, without the shape checks that the suite adds to annotations."""
    return function.__wrapped__


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("layers", [1, 3])
def test_equals_the_equations(layers, share, x64):
    params = some_heads(layers, share=share, dtype=jnp.float64)
    hidden = jax.random.normal(jax.random.key(2), (2, 4, D), jnp.float64)
    lm_head = jax.random.normal(jax.random.key(3), (V, D), jnp.float64) if share else None
    states = medusa_hidden(params, hidden)
    logits = logits_of(params, hidden, lm_head=lm_head)
    assert states.shape == (3, 2, 4, D)
    assert logits.shape == (3, 2, 4, V)
    for k in range(3):
        h = np.asarray(hidden)
        for layer in range(layers):
            z = h @ np.asarray(params.weight[k, layer]).T + np.asarray(params.bias[k, layer])
            h = h + z / (1 + np.exp(-z))
        np.testing.assert_allclose(states[k], h, rtol=1e-12)  # rounding of float64
        matrix = lm_head if share else params.vocab[k]
        np.testing.assert_allclose(logits[k], h @ np.asarray(matrix).T, rtol=1e-11, atol=1e-12)
    # A single vector is a batch without axes.
    np.testing.assert_allclose(logits_of(params, hidden[1, 2], lm_head=lm_head), logits[:, 1, 2], rtol=1e-12)


def test_untrained_heads_are_the_lm_head():
    lm_head = jax.random.normal(jax.random.key(3), (V, D))
    hidden = jax.random.normal(jax.random.key(2), (4, D))
    for config in (MedusaConfig(), MedusaConfig(2, 3)):
        own = init_medusa_heads(jax.random.key(0), D, V, config=config, lm_head=lm_head)
        shared = init_medusa_heads(jax.random.key(0), D, V, config=config, share_vocab=True)
        expected = np.broadcast_to(np.asarray(hidden @ lm_head.T), (config.num_heads, 4, V))
        # float32, sums of six products
        np.testing.assert_allclose(logits_of(own, hidden), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits_of(shared, hidden, lm_head=lm_head), expected, rtol=1e-5, atol=1e-6)


def test_random_start_has_unit_logits_and_depends_on_the_key_alone():
    a, b, c = (init_medusa_heads(jax.random.key(seed), 64, 500).vocab for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert abs(float(a.std()) * 8 - 1) < 0.02


def test_layers_have_weights_of_their_own():
    params = some_heads(layers=2)
    hidden = jax.random.normal(jax.random.key(2), (5, D))
    gradient = jax.grad(lambda p: logits_of(p, hidden).sum())(params)
    assert not np.allclose(gradient.weight[:, 0], gradient.weight[:, 1])
    # The reference repeats one block: exchanging, or changing, the second would not matter there.
    swapped = params._replace(weight=params.weight[:, ::-1], bias=params.bias[:, ::-1])
    assert float(jnp.abs(medusa_hidden(swapped, hidden) - medusa_hidden(params, hidden)).max()) > 0.1


def test_bfloat16_is_near_float32():
    params, hidden = some_heads(), jax.random.normal(jax.random.key(2), (5, D))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = logits_of(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low), hidden.astype(jnp.bfloat16))
    got = logits_of(low, hidden.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; state and logits are each rounded a few times, at values of up to about 8.
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.1, rtol=0.02)
    targets = targets_of(jnp.arange(5), 3)
    assert loss_of(got, *targets).dtype == jnp.float32


def test_targets_are_shifted_tokens():
    tokens = jnp.arange(1, 15).reshape(2, 7)
    mask = jnp.ones((2, 7), bool).at[0, 3].set(False)
    targets = targets_of(tokens, 3, mask=mask)
    for k in range(3):
        shift = 2 + k
        counts = np.zeros((2, 7), bool)
        counts[:, : 7 - shift] = np.asarray(mask)[:, shift:]
        np.testing.assert_array_equal(targets.mask[k], counts)
        expected = np.zeros((2, 7), int)
        expected[:, : 7 - shift] = np.asarray(tokens)[:, shift:]
        np.testing.assert_array_equal(targets.tokens[k], np.where(counts, expected, 0))
    both = targets_of(tokens, 4, mask=mask, first=1)
    np.testing.assert_array_equal(both.tokens[1:], targets.tokens)
    assert not targets_of(tokens[:, :1], 2).mask.any()


def reference_medusa_loss(logits, tokens, mask, decay, coefficient):
    """Σ c·decay^(k+1)·CE(logits_k[:, :-(2+k)], tokens[:, 2+k:]), with slices in place of masks."""
    total = 0.0
    for k, rows in enumerate(logits):
        shift = 2 + k
        losses = -np.take_along_axis(log_softmax(rows)[:, :-shift], np.asarray(tokens)[:, shift:, None], -1)[..., 0]
        total += decay ** (k + 1) * losses[np.asarray(mask)[:, shift:]].mean()
    return coefficient * total


def test_loss_is_the_weighted_cross_entropy_of_later_tokens(x64):
    logits = 2 * jax.random.normal(jax.random.key(4), (3, 2, 9, V), jnp.float64)
    tokens = jax.random.randint(jax.random.key(5), (2, 9), 0, V)
    mask = jax.random.bernoulli(jax.random.key(6), 0.7, (2, 9))
    got = loss_of(logits, *targets_of(tokens, 3, mask=mask))
    np.testing.assert_allclose(got, reference_medusa_loss(logits, tokens, mask, 0.8, 1.0), rtol=1e-12)
    got = loss_of(logits, *targets_of(tokens, 3, mask=mask), decay=1.0, coefficient=0.2)
    np.testing.assert_allclose(got, reference_medusa_loss(logits, tokens, mask, 1.0, 0.2), rtol=1e-12)
    # Positions may be chosen: the same few from targets and logits.
    some = jnp.array([0, 2, 3])
    targets = targets_of(tokens, 3, mask=mask)
    picked = loss_of(logits[:, :, some], targets.tokens[..., some], targets.mask[..., some])
    only = jnp.zeros_like(targets.mask).at[..., some].set(True)
    np.testing.assert_allclose(picked, loss_of(logits, targets.tokens, targets.mask & only), rtol=1e-12)


def test_nothing_to_learn_gives_zero_and_no_nan():
    targets = targets_of(jnp.zeros((1, 2), jnp.int32), 2)  # too short for any head
    value, gradient = jax.value_and_grad(lambda x: loss_of(x, *targets))(jnp.ones((2, 1, 2, V)))
    assert float(value) == 0.0
    assert not gradient.any()


def test_gradients(x64):
    params = some_heads(2, heads=2, dtype=jnp.float64)
    shared = some_heads(1, heads=2, share=True, dtype=jnp.float64)
    hidden = jax.random.normal(jax.random.key(2), (2, 5, D), jnp.float64)
    lm_head = jax.random.normal(jax.random.key(3), (V, D), jnp.float64)
    tokens = jax.random.randint(jax.random.key(5), (2, 5), 0, V)
    targets, both = targets_of(tokens, 2), targets_of(tokens, 3, first=1)
    teacher = jax.random.normal(jax.random.key(7), (2, 5, V), jnp.float64)

    def first(params):
        return loss_of(logits_of(params, hidden), *targets)

    def second(shared, hidden, lm_head):
        logits = logits_of(shared, hidden, lm_head=lm_head)
        return loss2_of(hidden @ lm_head.T, logits, *both, strength=0.5, teacher_logits=teacher)

    check_grads(jax.jit(first), (params,), 1, ["rev"])
    check_grads(jax.jit(second), (shared, hidden, lm_head), 1, ["rev"])


def test_medusa2_adds_the_models_own_loss(x64):
    base = jax.random.normal(jax.random.key(4), (2, 6, V), jnp.float64)
    heads = jax.random.normal(jax.random.key(5), (2, 2, 6, V), jnp.float64)
    teacher = jax.random.normal(jax.random.key(6), (2, 6, V), jnp.float64)
    tokens = jax.random.randint(jax.random.key(7), (2, 6), 0, V)
    mask = jnp.array([[False, False, True, True, True, True]] * 2)
    targets = targets_of(tokens, 3, mask=mask, first=1)
    counts = np.asarray(mask)[:, 1:]
    rest = 0.3 * 0.01 * reference_medusa_loss(heads, tokens, mask, 0.8, 1.0)

    losses = -np.take_along_axis(log_softmax(base)[:, :-1], np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    got = loss2_of(base, heads, *targets, strength=0.3, coefficient=0.01)
    np.testing.assert_allclose(got, losses[counts].mean() + rest, rtol=1e-12)

    p = np.exp(log_softmax(teacher))
    kl = (p * (log_softmax(teacher) - log_softmax(base))).sum(-1)[:, :-1]
    got = loss2_of(base, heads, *targets, strength=0.3, coefficient=0.01, teacher_logits=teacher)
    np.testing.assert_allclose(got, kl[counts].mean() + rest, rtol=1e-12)
    # The reference divides by masked positions too, so that its term is weaker by their share.
    reference = (kl * counts).sum() / counts.size
    np.testing.assert_allclose((float(got) - rest) * counts.mean(), reference, rtol=1e-10)

    same = loss2_of(base, heads, *targets, strength=0.0, teacher_logits=base)
    assert abs(float(same)) < 1e-12
    gradient = jax.grad(lambda t: loss2_of(base, heads, *targets, teacher_logits=t))(teacher)
    assert not gradient.any()
    excluded = teacher.at[..., 0].set(-jnp.inf)  # a teacher that never says token 0
    assert np.isfinite(loss2_of(base, heads, *targets, teacher_logits=excluded))


def test_schedules():
    steps = jnp.array([0, 10, 50, 100, 130])
    for kind, fraction, expected in (
        ("constant", 1.0, [1, 1, 1, 1, 1]),
        ("linear", 1.0, [0, 0.1, 0.5, 1, 1]),
        ("sine", 1.0, np.sin(np.pi / 2 * np.array([0, 0.1, 0.5, 1, 1]))),
        ("sine", 0.2, [0, np.sin(np.pi / 4), 1, 1, 1]),
    ):
        got = jax.jit(jax.vmap(medusa_schedule(kind, 100, fraction=fraction)))(steps)
        np.testing.assert_allclose(got, expected, atol=1e-6)  # float32


def test_optimizer_multiplies_the_rate_of_matrices():
    params = some_heads()
    keys = iter(jax.random.split(jax.random.key(8), 3))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-4, 2, 10)
    ours, plain = medusa_adam(schedule), optax.adam(schedule)
    state, expected_state = ours.init(params), plain.init(params)
    for _ in range(3):
        got, state = ours.update(gradients, state)
        expected, expected_state = plain.update(gradients, expected_state)
    for name, factor in (("weight", 4.0), ("vocab", 4.0), ("bias", 1.0)):
        np.testing.assert_allclose(getattr(got, name), factor * getattr(expected, name), rtol=1e-6)


def test_rank_accuracies_count_what_sorting_finds():
    # With ties; + 0.0, as jax.lax.top_k ranks -0.0 below 0.0.
    logits = jnp.round(2 * jax.random.normal(jax.random.key(4), (2, 3, 8, V))) + 0.0
    targets = targets_of(jax.random.randint(jax.random.key(5), (3, 8), 0, V), 2)
    got = jax.jit(rank_accuracies, static_argnames="top_k")(logits, *targets, top_k=5)
    best = np.asarray(jax.lax.top_k(logits, 5)[1])
    for k in range(2):
        hits = best[k] == np.asarray(targets.tokens)[k][..., None]
        np.testing.assert_allclose(got[k], hits[np.asarray(targets.mask)[k]].mean(0), rtol=1e-6)  # float32 division
    assert rank_accuracies(logits, targets.tokens, jnp.zeros_like(targets.mask), top_k=V).sum() == 0


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
def test_training_learns_a_cycle(share):
    """Hidden states that say where in a cycle of tokens one is: heads can become perfect, and do."""
    tokens = jnp.arange(40) % 8
    hidden, lm_head = jnp.eye(8)[tokens], jnp.roll(jnp.eye(8), 1, 0) * 3.0  # the model knows the next token
    matrix = None if share else lm_head
    params = init_medusa_heads(jax.random.key(0), 8, 8, lm_head=matrix, share_vocab=share)
    targets = targets_of(tokens, 3)
    tx = medusa_adam(0.02)

    def loss(params):
        return loss_of(logits_of(params, hidden, lm_head=lm_head if share else None), *targets)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (trained, _), values = jax.jit(lambda c: jax.lax.scan(step, c, length=150))((params, tx.init(params)))
    assert values[-1] < 0.2 * values[0]
    logits = logits_of(trained, hidden, lm_head=lm_head if share else None)
    accuracies = rank_accuracies(logits, *targets, top_k=2)
    np.testing.assert_array_equal(accuracies, [[1, 0]] * 3)
    assert expected_length(build_tree(accuracies, 3), accuracies) == 4.0  # perfect heads: depth + 1


def test_parameters_shard_and_map():
    params = some_heads()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    hidden = jax.random.normal(jax.random.key(2), (5, D))
    got = jax.vmap(medusa_logits, in_axes=(0, None))(stacked, hidden)
    np.testing.assert_allclose(got[0], logits_of(params, hidden), rtol=1e-5, atol=1e-5)  # float32 sums
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    wide = MedusaParams(params.weight, params.bias, jnp.pad(params.vocab, ((0, 0), (0, 1), (0, 0))))
    sharded = wide._replace(weight=jax.device_put(wide.weight, place))
    np.testing.assert_allclose(logits_of(sharded, hidden), logits_of(wide, hidden), rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_refused():
    key = jax.random.key(0)
    lm_head, hidden = jnp.zeros((V, D)), jnp.zeros((2, D))
    own, shared = some_heads(), some_heads(share=True)
    logits = jnp.zeros((3, 5, V))
    targets, both = (medusa_targets(jnp.zeros(5, jnp.int32), n, first=5 - n) for n in (3, 4))
    for message, call in (
        ("num_heads must be at least 1", lambda: MedusaConfig(0)),
        ("num_layers must be at least 1", lambda: MedusaConfig(1, 0)),
        ("hidden and vocab", lambda: init_medusa_heads(key, 0, V)),
        ("lm_head must have shape", lambda: init_medusa_heads(key, V, D, lm_head=lm_head)),
        ("lm_head must be given if and only if", lambda: medusa_logits(shared, hidden)),
        ("lm_head must be given if and only if", lambda: medusa_logits(own, hidden, lm_head=lm_head)),
        ("lm_head must have 6 columns", lambda: unchecked(medusa_logits)(shared, hidden, lm_head=lm_head[:, :3])),
        ("targets must have shape", lambda: unchecked(medusa_loss)(logits, targets.tokens[:2], targets.mask)),
        ("mask must have shape", lambda: unchecked(medusa_loss)(logits, targets.tokens, targets.mask[0])),
        ("targets must have shape", lambda: unchecked(medusa2_loss)(logits[0], logits, *targets)),
        ("base_logits must have shape", lambda: unchecked(medusa2_loss)(logits[0, 1:], logits, *both)),
        (
            "teacher_logits must have shape",
            lambda: unchecked(medusa2_loss)(logits[0], logits, *both, teacher_logits=logits),
        ),
        ("hidden must have 6 features", lambda: medusa_hidden(own, hidden[:, :3])),
        ("num_heads and first", lambda: medusa_targets(jnp.zeros(5, jnp.int32), 0)),
        ("decay", lambda: medusa_loss(logits, *targets, decay=0.0)),
        ("coefficient", lambda: medusa_loss(logits, *targets, coefficient=-1.0)),
        ("kind must be one of", lambda: medusa_schedule("cosine", 10)),
        ("fraction", lambda: medusa_schedule("sine", 10, fraction=0.0)),
        ("matrix_multiplier", lambda: medusa_adam(1e-3, matrix_multiplier=0.0)),
        ("top_k must be between 1 and the vocabulary", lambda: rank_accuracies(logits, *targets, top_k=V + 1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
