"""Recall from compressed prompts: what is kept, that keeping all changes nothing, and true positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import snapkv_recall as experiment
from experiments.block_topk_recall import apply_model, init_model
from experiments.recall_model import HEADS, KV_HEADS
from experiments.snapkv_recall import METHODS, OTHERS, SNAPKV, SnapKVRecallConfig, answer, choose

CONFIG = SnapKVRecallConfig(pairs=4, questions=2, noise=4, budgets=(8,), num_sink=3, capacities=(8,), width=8, layers=2)
assert CONFIG.prompt == 14


@pytest.fixture(scope="module")
def params():
    return init_model(jax.random.key(0), vocabulary=20, width=8, layers=2)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, CONFIG.prompt)))


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_is_kept_whole_gives_the_dense_answer(params, tokens, method):
    found = answer(params, tokens, method, CONFIG.prompt, CONFIG, jax.random.key(1))
    # Two orders of float32 sums of a few terms.
    np.testing.assert_allclose(found, apply_model(params, tokens)[:, -1], rtol=1e-5, atol=1e-6)


def test_the_last_token_stands_at_its_true_position(params, tokens, monkeypatch):
    right = answer(params, tokens, "recent", 8, CONFIG, jax.random.key(1))
    project = experiment.project
    monkeypatch.setattr(experiment, "project", lambda layer, x, start=0: project(layer, x, 0))
    wrong = answer(params, tokens, "recent", 8, CONFIG, jax.random.key(1))
    assert np.abs(np.asarray(right - wrong)).max() > 1e-4


def kept(method, q, k, capacity=5):
    selection = choose(method, q, k, capacity, CONFIG, jax.random.key(2))
    assert np.asarray(selection.kept).tolist() == [capacity]
    return np.sort(np.asarray(selection.indices), -1)


def test_what_each_method_keeps():
    """One key that the end of the prompt attends to stands at place 6, far from both ends."""
    q = jnp.ones((1, 14, HEADS, 4))
    k = jnp.zeros((1, 14, KV_HEADS, 4)).at[:, 6].set(5.0)
    for method in SNAPKV:
        indices = kept(method, q, k)
        assert indices.shape[1] == (HEADS if method.endswith("none") else KV_HEADS)
        assert (indices == 6).any(-1).all(), method
        assert (indices[..., -2:] == [12, 13]).all(), "the window stays"
    assert (kept("recent", q, k) == [9, 10, 11, 12, 13]).all()
    assert (kept("sink and recent", q, k) == [0, 1, 2, 12, 13]).all()
    random = kept("random", q, k)
    assert (random[..., -2:] == [12, 13]).all()
    assert (np.diff(random, axis=-1) > 0).all()


def test_bytes_of_a_row_count_the_heads_that_are_stored():
    class Found:
        """A sweep of one trial, all answers right."""

        class task:  # noqa: N801
            description, model = {"kind": "inference"}, {"family": "decoder"}

        trials = [type("Trial", (), {"status": "ok", "final": {}})]  # noqa: RUF012

        def failure_rows(self, baseline):
            return []

        def curves(self, metric):
            return experiment.Figure(metric, "", "", ())

    Found.trials[0].final = {f"test_{m} 8": 1.0 for m in METHODS} | {"test_full": 1.0}
    rows = experiment.compare(CONFIG, Found()).rows
    speedups = {r["method_config"]["aggregate"]: r["speedup"] for r in rows}
    assert speedups == {"mean": 14 / 8, "none": 14 / 8 * KV_HEADS / HEADS}
    assert len(rows) == len(METHODS) - len(OTHERS)


@pytest.mark.parametrize("changes", [{"window": 0}, {"capacities": (3,)}, {"capacities": (15,)}])
def test_bad_settings(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(CONFIG, **changes)
