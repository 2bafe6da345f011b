"""Visual tokens chosen by relevance and diversity, and a sequence without the others."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel.compression import prune_tokens, select_visual_tokens, token_relevance

DATA = np.load(pathlib.Path(__file__).parent.parent / "data" / "efficient_vla.npz")
ATTENTION = np.asarray(DATA["tokens/attention"], np.float32)[None]
FEATURES = np.asarray(DATA["tokens/features"], np.float32)[None]
relevance = jax.jit(token_relevance, static_argnames="normalize")
select = jax.jit(select_visual_tokens, static_argnames=("num_keep", "num_key", "task_ratio", "diversity"))
choose = functools.partial(select_visual_tokens, jnp.arange(6.0)[None], jnp.ones((1, 6, 2)))


def test_scores_and_choices_are_those_of_the_vectors():
    scores = relevance(ATTENTION)
    np.testing.assert_allclose(scores[0], DATA["tokens/scores"], atol=1e-6)  # float32
    assert float(scores.min()) == 0
    assert float(scores.max()) == 1
    for case in range(5):
        keep, key, ratio = DATA[f"tokens/{case}/params"]
        for found in (scores, relevance(ATTENTION, normalize=False)):  # scaling keeps the order
            kept = select(found, FEATURES, num_keep=int(keep), num_key=int(key), task_ratio=float(ratio))
            assert kept[0].tolist() == DATA[f"tokens/{case}/kept"].tolist(), case
            assert kept.dtype == jnp.int32


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.booleans(), st.sampled_from(["key", "greedy"]))
def test_exactly_k_distinct_tokens_whatever_the_ties(seed, tied, diversity):
    keys = jax.random.split(jax.random.key(seed), 3)
    scores = jax.random.uniform(keys[0], (2, 9))
    features = jax.random.normal(keys[1], (2, 9, 3))
    if tied:
        scores, features = jnp.round(scores), jnp.round(features) * 0
    kept = select(scores, features, num_keep=6, num_key=2, task_ratio=0.5, diversity=diversity)
    assert (np.diff(kept) > 0).all()
    assert ((kept >= 0) & (kept < 9)).all()
    if tied:  # without distances, the relevant ones and then the first of the others
        order = np.argsort(-np.asarray(scores), axis=-1, kind="stable")[:, :4]
        for row, first in zip(np.asarray(kept), order, strict=True):
            rest = [i for i in range(9) if i not in first][:2]
            assert sorted([*first.tolist(), *rest]) == row.tolist()
    else:
        places = np.asarray(jax.random.permutation(keys[2], 9))
        moved = select(
            scores[:, places], features[:, places], num_keep=6, num_key=2, task_ratio=0.5, diversity=diversity
        )
        assert np.array_equal(np.sort(places[np.asarray(moved)], -1), kept)


def test_greedy_counts_chosen_tokens_and_key_does_not():
    features = jnp.array([[[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0.1, 0, 1]]])
    scores = jnp.array([[1.0, 0.3, 0.2, 0.1]])
    options = {"num_keep": 3, "num_key": 1, "task_ratio": 0.0}
    assert select(scores, features, **options, diversity="key").tolist() == [[0, 1, 2]]
    assert select(scores, features, **options, diversity="greedy").tolist() == [[0, 1, 3]]


def test_limits():
    scores = relevance(ATTENTION)
    assert select(scores, FEATURES, num_keep=36).tolist() == [list(range(36))]
    top = np.sort(np.argsort(-np.asarray(scores[0]), kind="stable")[:10])
    assert select(scores, FEATURES, num_keep=10, task_ratio=1.0)[0].tolist() == top.tolist()
    assert select(scores, FEATURES, num_keep=10, num_key=0, task_ratio=1.0)[0].tolist() == top.tolist()
    np.testing.assert_allclose(relevance(ATTENTION[:, ::-1]), scores, atol=1e-6)  # heads in another order
    assert relevance(jnp.ones((1, 2, 3, 4))).tolist() == [[0.0] * 4]


def test_masked_queries_do_not_count_even_if_nan():
    mask = np.array([[True, False, True, False, False]])
    broken = ATTENTION.copy()
    broken[:, :, ~mask[0]] = np.nan
    np.testing.assert_allclose(relevance(broken, query_mask=mask), relevance(ATTENTION[:, :, mask[0]]), atol=1e-6)
    assert relevance(ATTENTION, query_mask=jnp.zeros((1, 5), bool)).tolist() == [[0.0] * 36]  # jit: zeros
    nothing = jnp.full((1, 6), jnp.nan)
    assert select(nothing, jnp.zeros((1, 6, 2)), num_keep=3, num_key=2).tolist() == [[0, 1, 2]]


def test_pruned_sequence_keeps_order_and_old_places():
    x = jnp.arange(2 * 8.0).reshape(2, 8, 1)
    short, positions = jax.jit(prune_tokens, static_argnames=("num_visual", "visual_start"))(
        x, jnp.array([[0, 3], [1, 2]]), num_visual=4, visual_start=2
    )
    assert positions.tolist() == [[0, 1, 2, 5, 6, 7], [0, 1, 3, 4, 6, 7]]
    assert positions.dtype == jnp.int32
    assert jnp.array_equal(short[:, :, 0], positions + jnp.array([[0], [8]]))
    same, places = prune_tokens(x, jnp.array([[0, 1, 2, 3]] * 2), num_visual=4, visual_start=2)
    assert jnp.array_equal(same, x)
    assert places[0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose(num_keep=7), "num_keep is 7, expected 1 to 6"),
        (lambda: choose(num_keep=0), "num_keep is 0"),
        (lambda: choose(num_keep=2.0), "num_keep is 2.0"),
        (lambda: choose(num_keep=3), "num_key is 4, expected 0 to 3"),
        (lambda: choose(num_keep=3, num_key=-1), "num_key is -1"),
        (lambda: choose(num_keep=3, num_key=0), "num_key is 0, expected at least 1"),
        (lambda: choose(num_keep=5, task_ratio=1.5), "task_ratio is 1.5"),
        (lambda: choose(num_keep=5, task_ratio=-0.1), "task_ratio is -0.1"),
        (lambda: choose(num_keep=5, diversity="far"), "diversity is 'far'"),
        (lambda: select_visual_tokens(jnp.ones((1, 6)), jnp.ones((1, 5, 2)), num_keep=4), "features has shape"),
        (lambda: select_visual_tokens(jnp.full((1, 6), jnp.nan), jnp.ones((1, 6, 2)), num_keep=4), "relevance has NaN"),
        (lambda: token_relevance(jnp.ones((2, 3, 4))), "attention has shape"),
        (lambda: token_relevance(jnp.ones((1, 2, 0, 4))), "attention has shape"),
        (lambda: token_relevance(ATTENTION, query_mask=jnp.ones((1, 4))), "query_mask has shape"),
        (lambda: token_relevance(ATTENTION, query_mask=jnp.zeros((1, 5))), "without queries"),
        (lambda: prune_tokens(jnp.ones((1, 5, 2)), jnp.ones((2, 2), int), num_visual=3), "indices has shape"),
        (lambda: prune_tokens(jnp.ones((1, 5, 2)), jnp.ones((1, 4), int), num_visual=3), "expected at most"),
        (lambda: prune_tokens(jnp.ones((1, 5, 2)), jnp.ones((1, 2), int), num_visual=6), "num_visual is 6"),
        (
            lambda: prune_tokens(jnp.ones((1, 5, 2)), jnp.ones((1, 2), int), num_visual=3, visual_start=3),
            "visual_start 3",
        ),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
