"""Experiments of block top-k attention: recall data and masks are as described, analyses on known numbers."""

import jax
import numpy as np
import optax
import pytest

from experiments import block_topk_latency as latency
from experiments import block_topk_recall as recall
from experiments.runner.cost import Timing
from experiments.runner.sweep import Sweep
from experiments.runner.train import Arm
from tests.experiments.test_sweep import trial

# Recall ------------------------------------------------------------------------------------------------------------


def test_every_question_has_its_answer_in_the_sequence():
    config = recall.BlockTopKRecallConfig()
    data = recall.Recall(config).chunk(0, 3, 2)
    assert data["tokens"].shape == (2, 32, 128)
    for row, scored in zip(data["tokens"][1], data["scored"][1], strict=True):
        first = 2 * config.pairs + config.noise
        pairs = {row[i]: row[i + 1] for i in range(0, first, 2) if row[i] < recall.SYMBOLS}
        assert len(pairs) == config.pairs
        assert scored.sum() == config.questions
        for place in np.flatnonzero(scored):
            assert row[place - 1] == 3 * recall.SYMBOLS
            assert row[place + 1] == pairs[row[place]]
    again = recall.Recall(config).chunk(0, 4, 1)
    np.testing.assert_array_equal(again["tokens"][0], data["tokens"][1])  # can be entered at any step


def test_a_selection_that_keeps_everything_is_dense_and_a_smaller_one_is_not():
    config = recall.BlockTopKRecallConfig(pairs=4, questions=2, noise=10, num_sink=4)
    params = recall.init_model(jax.random.key(0), vocabulary=97, width=16, layers=1)
    tokens = recall.Recall(config).sequences(np.random.default_rng(0), 2)["tokens"]
    model = jax.jit(recall.apply_model, static_argnums=2)
    dense = model(params, tokens, None)
    whole = model(params, tokens, recall.selection("block top-k", config.length + config.num_sink, config))
    np.testing.assert_allclose(whole, dense, rtol=1e-6, atol=1e-6)  # float32, the same sums
    some = model(params, tokens, recall.selection("block top-k", 8, config))
    assert not np.allclose(some, dense, atol=1e-3)
    np.testing.assert_allclose(some[:, :8], dense[:, :8], rtol=1e-6, atol=1e-6)  # all keys fit into the budget


@pytest.mark.parametrize(("kind", "more"), [("top-k", 0), ("block top-k", 3), ("sink and window", 0)])
@pytest.mark.parametrize("num_sink", [4, 5])
def test_masks_read_the_stated_budgets(kind, more, num_sink):
    """No query reads more than its budget (block top-k: and the tail), a group reads alike, and nothing looks ahead."""
    config = recall.BlockTopKRecallConfig(num_sink=num_sink, block_size=4, budgets=(16,))
    budget, length = num_sink + 8, 40
    logits = jax.random.normal(jax.random.key(0), (2, recall.HEADS, length, length))
    keep = np.asarray(jax.jit(recall.selection(kind, budget, config))(logits))
    read = keep.sum(-1)
    seen = np.arange(length) + 1
    assert (read <= np.minimum(budget + more, seen)).all()
    assert (read >= np.minimum(budget, seen)).all()
    assert not np.triu(keep, 1).any()
    assert keep[..., num_sink:, :num_sink].all()
    groups = keep.reshape(2, recall.KV_HEADS, -1, length, length)
    if kind != "sink and window":
        assert (groups[:, :, :1] == groups).all()
    whole = jax.jit(recall.selection(kind, num_sink + length, config))(logits)
    np.testing.assert_array_equal(whole, np.broadcast_to(np.tri(length, dtype=bool), whole.shape))
    scores = np.asarray(logits).reshape(groups.shape).mean(2)
    row = length - 1
    left = np.flatnonzero(~keep[0, 0, row])
    if kind == "top-k":
        chosen = np.flatnonzero(keep[0, 0, row])[num_sink:]
        assert scores[0, 0, row, chosen].min() > scores[0, 0, row, left].max()
    elif kind == "block top-k":  # whole blocks behind the sink, those with the largest means, and an unfilled one
        full = (length - num_sink) // 4
        kept = keep[0, 0, row, num_sink : num_sink + 4 * full].reshape(full, 4)
        means = scores[0, 0, row, num_sink : num_sink + 4 * full].reshape(full, 4).mean(1)
        assert set(np.flatnonzero(kept.all(1))) == set(np.argsort(means)[-2:])
        assert keep[0, 0, row, num_sink + 4 * full :].all()
    else:
        np.testing.assert_array_equal(left, np.arange(num_sink, length - 8))


def test_the_model_is_causal_and_answers_from_what_it_keeps():
    params = recall.init_model(jax.random.key(0), vocabulary=9, width=16, layers=2)
    tokens = np.random.default_rng(0).integers(0, 9, (1, 12))
    changed = tokens.copy()
    changed[0, 7] = (tokens[0, 7] + 1) % 9
    model = jax.jit(recall.apply_model)
    one, two = (np.asarray(model(params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert np.abs(one - two)[:, 7:].max() > 1e-3


def test_texts_for_training_and_tests_do_not_overlap():
    config = recall.BlockTopKRecallConfig(language_length=64)
    task = recall.language_task(config)
    rows = {
        name: {row.tobytes() for row in data["tokens"]}
        for name, data in (("validation", task.validation), ("test", task.test))
    }
    assert all(len(found) > 10 for found in rows.values())
    assert not rows["validation"] & rows["test"]
    data = recall.recall_task(config)
    assert data.test["tokens"].shape == (128, config.length)
    assert not np.array_equal(data.test["tokens"][:64], data.validation["tokens"])


def test_recall_on_known_numbers():
    config = recall.BlockTopKRecallConfig(budgets=(32, 8), language_budgets=(32,))
    finals = {
        "dense": 1.0, "top-k 32": 1.0, "top-k 8": 0.9, "block top-k 32": 0.8, "block top-k 8": 0.5,
        "sink and window 32": 0.2, "sink and window 8": 0.1,
    }  # fmt: skip
    losses = {"dense": 1.6, "top-k 32": 1.61, "block top-k 32": 1.62, "sink and window 32": 1.63}

    def sweep(task, values, spread):
        trials = [trial("adam", config.learning_rate, seed, [0.5, 0.5]) for seed in range(2)]
        for made in trials:
            made.curves["val_accuracy"] = made.curves["val_loss"]
            # All kinds of a seed share its model, and with it its deviation.
            made.final.update({f"test_{name}": value + spread * made.seed for name, value in values.items()})
        return Sweep(task, (Arm("adam", optax.adam, (config.learning_rate,)),), tuple(trials))

    recalls = sweep(recall.recall_task(config), finals, 0.0)
    comparison = recall.compare(config, recalls, sweep(recall.language_task(config), losses, 0.1))
    values, language = comparison.tables
    assert values.rows[2] == ("block top-k", "0.800 ± 0.000", "0.500 ± 0.000")
    # Differences are taken seed by seed: the seeds' own deviation is not in them.
    assert ("block top-k", "0.020 ± 0.000") in language.rows
    rows = {row["method_config"]["budget"]: row for row in comparison.rows}
    assert rows[8]["quality"] == pytest.approx(0.5)
    assert rows[8]["quality_baseline"] == pytest.approx(1.0)
    assert rows[8]["speedup"] == pytest.approx(2 * 128 / (2 * 8 + 128 / 4))
    assert "top-k 1.00 / 0.90, block top-k 0.80 / 0.50, sink and window 0.20 / 0.10 (dense 1.00)" in comparison.headline
    assert "+0.010, +0.020, +0.030" in comparison.headline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 30}, "questions .* <= pairs"),
        ({"noise": 3}, "noise must be even"),
        ({"budgets": (6,)}, "a budget of 6 does not hold"),
        ({"width": 20}, "width must be a multiple of 8"),
        ({"learning_rate": 0.0}, "learning rates must be positive"),
    ],
)
def test_bad_settings_of_recall(changes, message):
    with pytest.raises(ValueError, match=message):
        recall.BlockTopKRecallConfig(**changes)


# Latency -----------------------------------------------------------------------------------------------------------


def test_law_of_known_timings():
    config = latency.BlockTopKLatencyConfig(seeds=1, lengths=(4096, 8192, 16_384), repeats=3)
    timings = {
        s: {
            latency.LIBRARY: Timing((2e-6 + 640e-9 * s,) * 3),
            latency.DENSE: Timing((1e-6 + 64e-9 * s,) * 3),
            latency.SPARSE: Timing((50e-6 + 2e-9 * s,) * 3),
        }
        for s in config.lengths
    }
    comparison = latency.compare(config, timings)
    _, law, _ = comparison.tables
    _, (_, start, slope, _), (_, sparse_start, sparse_slope, _) = law.rows
    np.testing.assert_allclose([start, slope, sparse_start, sparse_slope], [1, 64, 50, 2], rtol=1e-6)
    assert "slopes over the length differ by 32 (95 % 32 to 32), by traffic 32" in comparison.headline
    assert len(comparison.rows) == 6


def test_dense_attention_as_products_is_dense_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, t, n, 8)) for key, t, n in zip(keys, (1, 32, 32), (6, 3, 3), strict=True))
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(latency.dense_by_products(q, k, v), expected, atol=1e-6)  # sums of 32 float32 numbers


def test_traffic_is_counted_in_rows():
    config = latency.BlockTopKLatencyConfig()
    row = config.kv_heads * config.head_dim * 4
    read = latency.traffic(config, 32_768)
    # float32 keeps 24 bits of each of a handful of products
    assert read["dense"] == pytest.approx(2 * 32_768 * row, rel=1e-6)
    assert read["block top-k"] == pytest.approx((2 * 1040 + 32_768 / 16) * row, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (4096,)}, "lengths must be two or more"),
        ({"lengths": (512, 4096)}, "above a budget of 1040"),
        ({"lengths": (4096, 8200)}, "must divide lengths"),
        ({"kv_heads": 3}, "must divide heads"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_bad_settings_of_latency(changes, message):
    with pytest.raises(ValueError, match=message):
        latency.BlockTopKLatencyConfig(**changes)
