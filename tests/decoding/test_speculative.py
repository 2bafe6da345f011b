"""Draft and verify: the longest right path, and the exact law of what is emitted, by counting.

What would be wrong without anyone noticing: tokens that are each plausible but do not have the target's law (a wrong
residual, siblings judged by the wrong q), and a tree whose nodes are mixed up, which only shortens what stands.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxaccel.decoding.speculative import verify_draft, verify_drawn
from jaxaccel.decoding.tree import chain, make_tree, tree_from_parents
from jaxaccel.decoding.verify import propose

V, TRIALS = 4, 20_000


def fits(counts, law):
    """Whether counts agree with a law: the chi-square test, which a right sampler fails once in 10,000 seeds."""
    law = np.asarray(law, np.float64)
    assert counts[law == 0].sum() == 0
    counts, law = counts[law > 0], law[law > 0]
    expected = law * counts.sum()
    assert expected.min() > 5
    if len(law) == 1:
        return True
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(law) - 1) > 1e-4


def tables(seed):
    """Laws after each token, of target and draft: [V, V] each, none of them alike."""
    first, second = jax.random.split(jax.random.key(seed))
    p, q = jax.random.normal(first, (V, V)), 1.5 * jax.random.normal(second, (V, V))
    return p, q.at[:, 0].set(-jnp.inf)  # a token that the draft never writes


@functools.partial(jax.jit, static_argnames="draw")
def emitted_pairs(p, q, keys, *, draw):
    """First two tokens after token 1, and how many guesses stood, by many draws."""

    def one(key):
        guess, judge, go_on = jax.random.split(key, 3)
        accepted, tokens = draw(p, q, guess, judge)
        after = jax.random.categorical(go_on, p[tokens[0]])
        return tokens[0] * V + jnp.where(accepted == 0, after, tokens[1]), accepted

    return jax.vmap(one)(keys)


def chain_step(p, q, guess, judge):
    """A chain of two guesses."""
    one, two = jax.random.split(guess)
    a = jax.random.categorical(one, q[1])
    b = jax.random.categorical(two, q[a])
    rows = jnp.stack([jnp.int32(1), a, b])
    return verify_draft(rows[1:], p[rows], draft_logits=q[rows[:2]], key=judge)


def tree_step(p, q, guess, judge):
    """Two siblings without replacement, and a guess after each: in an order that is not that of levels."""
    one, two, three = jax.random.split(guess, 3)
    best = jax.lax.top_k(q[1] + jax.random.gumbel(one, (V,)), 2)[1]
    a, b = jax.random.categorical(two, q[best[0]]), jax.random.categorical(three, q[best[1]])
    tokens = jnp.stack([best[0], a, best[1], b])
    after = jnp.concatenate([jnp.array([1]), tokens])
    drawn_from = q[jnp.stack([jnp.int32(1), best[0], jnp.int32(1), best[1]])]
    return verify_draft(tokens, p[after], draft_logits=drawn_from, tree_parent=(-1, 0, -1, 2), key=judge)


def given_step(p, q, guess, judge):
    """The draft's two likeliest tokens and the likeliest after the first: not drawn at all."""
    best = jax.lax.top_k(q[1], 2)[1]
    tokens = jnp.stack([best[0], jnp.argmax(q[best[0]]), best[1]])
    after = jnp.concatenate([jnp.array([1]), tokens])
    return verify_draft(tokens, p[after], tree_parent=(-1, 0, -1), key=judge)


@pytest.mark.parametrize("draw", [chain_step, tree_step, given_step])
def test_emitted_tokens_have_the_law_of_the_target(draw):
    p, q = tables(0)
    pairs, accepted = emitted_pairs(p, q, jax.random.split(jax.random.key(1), TRIALS), draw=draw)
    law = np.asarray(jax.nn.softmax(p), np.float64)
    assert fits(np.bincount(pairs, minlength=V * V), (law[1][:, None] * law).reshape(-1))
    assert len(np.unique(accepted)) == 3  # every way of getting the two tokens occurs
    # The same counts tell laws apart that are a little off.
    other = np.asarray(jax.nn.softmax(p * 1.1), np.float64)
    assert not fits(np.bincount(pairs, minlength=V * V), (other[1][:, None] * other).reshape(-1))


def test_guesses_stand_as_often_as_the_laws_overlap():
    p, q = tables(2)
    _, accepted = emitted_pairs(p, q, jax.random.split(jax.random.key(3), TRIALS), draw=chain_step)
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (p, q))
    overlap = np.minimum(p, q)  # [before, token]
    both = (overlap[1] * overlap.sum(-1)).sum()
    law = [1 - overlap[1].sum(), overlap[1].sum() - both, both]
    assert fits(np.bincount(accepted, minlength=3), law)


def test_what_replaces_a_fallen_guess_has_the_law_of_the_rest():
    """For each guess by itself: it stands with min(1, p/q), else norm(max(p - q, 0)) is drawn."""
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.1, 0.3, 0.2])
    target, draft = jnp.log(jnp.array([p, p])), jnp.log(jnp.array([q]))
    keys = jax.random.split(jax.random.key(4), TRIALS)
    judge = jax.jit(
        jax.vmap(lambda key, guess: verify_draft(guess, target, draft_logits=draft, key=key), in_axes=(0, None))
    )
    rest = np.maximum(p - q, 0)
    for guess in range(V):
        accepted, tokens = judge(keys, jnp.array([guess]))
        stands = min(1, p[guess] / q[guess])
        law = (1 - stands) * rest / rest.sum()
        law[guess] += stands
        assert fits(np.bincount(tokens[:, 0], minlength=V), law)
        assert abs(float(accepted.mean()) - stands) < 4.5 * np.sqrt(stands * (1 - stands) / TRIALS) + 1e-9
        assert (np.asarray(tokens[:, 1])[np.asarray(accepted) == 0] == -1).all()


def test_more_siblings_than_the_draft_has_tokens():
    """What follows the last token of the draft's law is judged by nothing: it falls, and the law stays."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    q = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])

    def one(key):
        guess, judge = jax.random.split(key)
        first = jax.random.bernoulli(guess).astype(jnp.int32)
        tokens = jnp.stack([first, 1 - first, jnp.int32(2)])
        target = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (4, V))
        out = verify_draft(tokens, target, draft_logits=jnp.stack([q] * 3), tree_parent=(-1, -1, -1), key=judge)
        return out[1][0]

    tokens = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), TRIALS))
    assert fits(np.bincount(tokens, minlength=V), p)


def test_equal_laws_accept_everything_and_temperature_is_for_both():
    logits = jax.random.normal(jax.random.key(6), (3, 4, V))
    tokens = jnp.zeros((3, 3), jnp.int32)
    for heat in (0.5, 3.0):
        accepted, out = verify_draft(
            tokens, logits, draft_logits=logits[:, :3], key=jax.random.key(7), temperature=jnp.float32(heat)
        )
        assert accepted.tolist() == [3, 3, 3]
        assert (out >= 0).all()
    cold = [verify_draft(tokens, logits, key=jax.random.key(k), temperature=1e-4) for k in (0, 1)]
    greedy = verify_draft(tokens, logits)
    for got in cold:
        for a, b in zip(got, greedy, strict=True):
            np.testing.assert_array_equal(a, b)


@st.composite
def guesses(draw):
    count = draw(st.integers(1, 6))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    small = st.lists(st.integers(0, 2), min_size=count + 1, max_size=count + 1)
    return parents, np.array(draw(small)[1:]), np.array(draw(small))


@settings(max_examples=15, deadline=None)
@given(guesses())
def test_greedy_takes_the_longest_right_path(case):
    parents, tokens, chosen = case
    lengths, paths = [], []
    for guess in range(len(parents)):
        parent = parents[guess]
        before, path = (0, []) if parent < 0 else (lengths[parent], paths[parent])
        right = tokens[guess] == chosen[1 + parent] and before >= 0
        lengths.append(before + 1 if right else -99)
        paths.append([*path, guess])
    longest = max([0, *lengths])
    accepted, out = verify_draft(jnp.asarray(tokens), jnp.asarray(np.eye(3)[chosen]), tree_parent=parents)
    assert int(accepted) == longest
    ends = [paths[i] for i, length in enumerate(lengths) if length == longest] or [[]]
    wanted = {(*tokens[path].tolist(), int(chosen[1 + path[-1]] if path else chosen[0])) for path in ends}
    assert tuple(out.tolist()[: longest + 1]) in wanted
    assert set(out.tolist()[longest + 1 :]) <= {-1}


@settings(max_examples=15, deadline=None)
@given(guesses())
def test_trees_from_parents_are_the_same_tree(case):
    parents = case[0]
    tree, order = tree_from_parents(parents)
    assert sorted(order.tolist()) == list(range(len(parents)))
    for node, guess in enumerate(order, 1):
        above = tree.parent[node]
        assert (order[above - 1] if above else -1) == parents[guess]


def test_rows_of_a_batch_are_judged_apart():
    tree = make_tree([(0,), (1,), (0, 0)], top_k=2)
    target = jax.random.normal(jax.random.key(8), (1, 4, 6))
    tokens, _ = propose(jax.random.normal(jax.random.key(9), (2, 1, 6)), target[:, 0], tree)
    parts = (target[:, None], target[:, None, :3], tokens[:, None])
    wide = [jnp.broadcast_to(x, (300, 2, *x.shape[2:])) for x in parts]
    result = jax.jit(functools.partial(verify_drawn, tree=tree))(*wide, key=jax.random.key(10))
    assert result.accepted.shape == (300, 2)
    assert result.nodes.shape == (300, 2, 3)
    assert len(np.unique(result.next_token)) > 2
    stands = np.asarray(result.nodes)
    for accepted, nodes in zip(np.asarray(result.accepted).ravel(), stands.reshape(-1, 3), strict=True):
        assert len(set(nodes.tolist())) == accepted + 1
        assert all(tree.parent[b] == a for a, b in itertools.pairwise(nodes[: accepted + 1]))
    rows = np.asarray(tree.retrieve)[np.asarray(result.row)]
    np.testing.assert_array_equal(np.where(np.arange(3) <= np.asarray(result.accepted)[..., None], rows - stands, 0), 0)


def test_bfloat16_logits_are_judged_in_float32():
    logits = jax.random.normal(jax.random.key(11), (2, 16)).astype(jnp.bfloat16)
    tokens = jnp.array([0, int(jnp.argmax(logits[0]))])  # which the sharper draft overrates
    judge = jax.jit(jax.vmap(lambda key, x: verify_drawn(x, x[:1] * 2, tokens, chain(1), key=key), in_axes=(0, None)))
    low, high = (judge(jax.random.split(jax.random.key(0), 20), x) for x in (logits, logits.astype(jnp.float32)))
    for got, wanted in zip(low, high, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert len(np.unique(high.accepted)) == 2


TOKENS, TARGET, KEY = jnp.array([1, 2]), jnp.zeros((3, V)), jax.random.key(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_tokens": jnp.zeros(0, jnp.int32)}, "expected at least 1 guess"),
        ({"target_logits": TARGET[:2]}, r"target_logits has shape \(2, 4\), expected \(3,\)"),
        (
            {"draft_logits": jnp.zeros((2, 5)), "key": KEY},
            r"draft_logits has shape \(2, 5\), expected \(2, 4\).*one",
        ),
        ({"draft_logits": jnp.zeros((3, 4)), "key": KEY}, r"draft_logits has shape \(3, 4\), expected \(2, 4\)"),
        ({"draft_logits": jnp.zeros((2, 4))}, "draft_logits is given without a key"),
        ({"temperature": 1.0}, "temperature is given without a key"),
        ({"temperature": 0.0, "key": KEY}, "temperature is 0.0, expected a positive number"),
        ({"tree_parent": [0, -1]}, r"tree_parent\[0\] is 0, expected -1 .* or the number of an earlier guess"),
        ({"tree_parent": [-1, 1]}, r"tree_parent\[1\] is 1"),
        ({"tree_parent": [-1, -2]}, r"tree_parent\[1\] is -2"),
        ({"tree_parent": [-1]}, r"tree_parent has shape \(1,\), expected \(2,\)"),
    ],
)
def test_bad_input(changes, message):
    given_ = {"draft_tokens": TOKENS, "target_logits": TARGET} | changes
    tokens, target = given_.pop("draft_tokens"), given_.pop("target_logits")
    with pytest.raises(ValueError, match=message):
        verify_draft(tokens, target, **given_)


def test_shapes_of_drawn_guesses_and_traced_parents():
    with pytest.raises(ValueError, match=r"draft_logits has shape \(2, 4\), expected \(1, 4\) for a tree of 2 nodes"):
        verify_drawn(TARGET[:2], TARGET[:2], TOKENS, chain(1), key=KEY)
    with pytest.raises(TypeError, match="tree_parent is traced"):
        jax.jit(lambda parents: verify_draft(TOKENS, TARGET, tree_parent=parents))(jnp.array([-1, 0]))
