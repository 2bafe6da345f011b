"""Proposing and verifying against the reference code, plain decoding, and the exact law of sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.decoding.tree import chain, make_tree
from jaxaccel.decoding.verify import (
    _nucleus,
    propose,
    sample_nucleus,
    sample_typical,
    verify_greedy,
    verify_greedy_ids,
    verify_nucleus,
    verify_typical,
)

CASES = ["med_small", "med_vicuna7b"]
# Trees are hashable: constants of the compiled functions.
proposal = jax.jit(propose, static_argnames="tree")
greedy = jax.jit(verify_greedy, static_argnames="tree")
greedy_ids = jax.jit(verify_greedy_ids, static_argnames="tree")
typical = jax.jit(verify_typical, static_argnames="tree")
SMALL = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]


def reference_tree(data, case):
    return make_tree([tuple(int(rank) for rank in row if rank >= 0) for row in data[f"{case}_choices"]])


@pytest.mark.parametrize("case", CASES)
def test_proposal_equals_the_reference(case, vectors, x64):
    data = vectors("llm_acceleration")
    tree = reference_tree(data, case)
    heads, base = jnp.asarray(data[f"{case}_head_logits"]), jnp.asarray(data[f"{case}_base_logits"])
    tokens, candidates = proposal(heads, base, tree)
    np.testing.assert_array_equal(tokens, data[f"{case}_tree"])
    np.testing.assert_array_equal(candidates, data[f"{case}_cart"])
    assert tokens.dtype == candidates.dtype == jnp.int32
    other, _ = proposal(heads, base, tree, root=jnp.asarray(3))
    np.testing.assert_array_equal(other, [3, *data[f"{case}_tree"][1:]])


@pytest.mark.parametrize("case", CASES)
def test_verification_equals_the_reference(case, vectors, x64):
    data = vectors("llm_acceleration")
    tree = reference_tree(data, case)
    logits, tokens = jnp.asarray(data[f"{case}_tree_logits"]), jnp.asarray(data[f"{case}_tree"])
    result = greedy(logits, tokens, tree)
    assert (int(result.row), int(result.accepted)) == tuple(data[f"{case}_greedy"])
    for temperature, epsilon, alpha, row, accepted in data[f"{case}_typical"].tolist():
        result = typical(logits, tokens, tree, temperature=temperature, epsilon=epsilon, alpha=alpha)
        assert (int(result.row), int(result.accepted)) == (row, accepted)
        nodes = tree.retrieve[int(row)][: int(accepted) + 1]
        np.testing.assert_array_equal(result.nodes[: int(accepted) + 1], nodes)
        assert set(result.nodes[int(accepted) :].tolist()) == {nodes[-1]}
        assert int(result.next_token) == int(logits[nodes[-1]].argmax())


def reference_greedy(logits, tokens, tree):
    """The reference's formula, written down from its description: padding has id 0 and reads the last node's logits."""
    retrieve = np.where(tree.valid, tree.retrieve, -1)
    candidates = np.append(tokens, 0)[retrieve]
    chosen = logits.argmax(-1)[retrieve]
    runs = np.cumprod(candidates[:, 1:] == chosen[:, :-1], 1).sum(1)
    return int(runs.argmax()), int(runs.max())


def test_padding_is_never_accepted():
    tree = make_tree([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])  # row 1 is (0, 0), with one entry of padding
    row = 1
    assert tree.valid[row].tolist() == [True, True, True, False]
    tokens = np.array([6, 6, 7, 8, 9, 3])  # the root is right about itself: no excuse for padding with the root either
    chosen = np.array([6, 8, 1, 0, 1, 0])  # the path (0, 0) stands; id 0 follows it, and the last node
    logits = np.eye(10)[chosen]
    assert reference_greedy(logits, tokens, tree) == (row, 3)  # a token that nobody proposed
    result = greedy(jnp.asarray(logits), jnp.asarray(tokens), tree)
    assert (int(result.row), int(result.accepted), int(result.next_token)) == (row, 2, 0)
    result = typical(jnp.asarray(logits), jnp.asarray(tokens), tree, temperature=0.01)
    assert (int(result.row), int(result.accepted), int(result.next_token)) == (row, 2, 0)


def test_reference_formula_agrees_where_padding_cannot_match():
    tree = make_tree(SMALL)
    rng = np.random.default_rng(0)
    check = functools.partial(greedy_ids, tree=tree)
    for _ in range(30):
        tokens, chosen = rng.integers(1, 4, (2, tree.num_nodes))
        result = check(jnp.asarray(chosen), jnp.asarray(tokens))
        # Random siblings may hold the same token, which proposals never do: this also tests the order of ties.
        assert (int(result.row), int(result.accepted)) == reference_greedy(np.eye(4)[chosen], tokens, tree)


def markov(vocab, order_key):
    """A model whose logits depend on the last two tokens only, so that a whole text needs no cache."""
    return jax.random.normal(order_key, (vocab, vocab, vocab))


def decode(table, heads, tree, prompt, steps):
    """Emit tokens with a tree, greedily: a loop as plain as can be."""
    out, root = list(prompt), None
    for _ in range(steps):
        base = table[out[-2], out[-1]]
        tokens, _ = proposal(heads[:, out[-2], out[-1]], base, tree, root=root)
        parents = np.asarray(tokens)[tree.parent]
        before = np.where(np.arange(tree.num_nodes) == 0, out[-1], parents)
        result = greedy(table[before, tokens], tokens, tree)
        stands = np.asarray(result.nodes)[: int(result.accepted) + 1]
        out += np.asarray(tokens)[stands].tolist()
        root = result.next_token
    return out


@pytest.mark.parametrize("paths", [SMALL, chain(3).paths, ()], ids=["tree", "chain", "root"])
def test_any_tree_decodes_as_greedily_as_one_token_at_a_time(paths):
    vocab = 7
    table = np.asarray(markov(vocab, jax.random.key(1)))
    # Heads guess from the true future, disturbed: sometimes right, sometimes not.
    guess = np.empty((3, vocab, vocab, vocab))
    for a in range(vocab):
        for b in range(vocab):
            x, y = b, int(table[a, b].argmax())
            for k in range(3):
                guess[k, a, b] = table[x, y]
                x, y = y, int(table[x, y].argmax())
    guess += 0.7 * np.random.default_rng(2).normal(size=guess.shape)
    tree = make_tree(paths, top_k=vocab)
    plain = [1, 2]
    for _ in range(60):
        plain.append(int(table[plain[-2], plain[-1]].argmax()))
    got = decode(jnp.asarray(table), jnp.asarray(guess), tree, [1, 2], 15)
    assert len(got) == 17 if not paths else len(got) > 20
    assert got[:62] == plain[: len(got)]


def test_sampling_with_a_tree_has_the_law_of_sampling_without():
    vocab, trials, top_p = 4, 6_000, 0.9
    table = markov(vocab, jax.random.key(3))
    tree = make_tree([(0,), (1,), (0, 0)], top_k=2)
    best = table[1, 2].argmax()

    def two_tokens(key):
        """Tokens after (0, 1) and the root 2: of the tree where it stands, and then of a second step."""
        tokens, _ = proposal(jnp.stack([table[1, 2], table[2, best]]), table[0, 1], tree, root=jnp.asarray(2))
        before = jnp.where(jnp.arange(4) == 0, 1, tokens[tree.parent])
        first, second = jax.random.split(key)
        result = verify_nucleus(table[before, tokens], tokens, tree, temperature=1.0, top_p=top_p, key=first)
        emitted = jnp.append(tokens[result.nodes[1:]], 0).at[result.accepted].set(result.next_token)
        last = sample_nucleus(second, table[2, emitted[0]], temperature=1.0, top_p=top_p)
        return emitted[0] * vocab + jnp.where(result.accepted == 0, last, emitted[1]), result.accepted

    pairs, accepted = jax.jit(jax.vmap(two_tokens))(jax.random.split(jax.random.key(4), trials))
    assert len(np.unique(accepted)) == 3  # each way of getting the two tokens occurs

    def law(logits):
        p = np.asarray(jax.nn.softmax(logits), np.float64)
        order = np.argsort(-p)
        p[order[1:][np.cumsum(p[order])[:-1] >= top_p]] = 0
        return p / p.sum()

    expected = np.concatenate([p * law(table[2, i]) for i, p in enumerate(law(table[1, 2]))])
    got = np.bincount(np.asarray(pairs), minlength=vocab**2) / trials
    assert got[expected == 0].sum() == 0
    # 4.5 standard errors of the largest share.
    np.testing.assert_allclose(got, expected, atol=4.5 * np.sqrt(0.25 / trials))


def test_typical_tends_to_greedy():
    tree = make_tree(SMALL, top_k=3)
    keys = jax.random.split(jax.random.key(5), 20)

    def both(key):
        a, b, c = jax.random.split(key, 3)
        heads, base = jax.random.normal(a, (3, 3)), jax.random.normal(b, (3,))
        logits = jax.random.normal(c, (tree.num_nodes, 3))
        tokens, _ = proposal(heads, base, tree)
        cold = typical(logits, tokens, tree, temperature=1e-4)
        warm = typical(logits, tokens, tree, temperature=2.0)
        return greedy(logits, tokens, tree), cold, warm

    expected, cold, warm = jax.jit(jax.vmap(both))(keys)
    for got, want in zip(cold, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert expected.accepted.max() > 0
    assert (warm.accepted > expected.accepted).any()


def test_equally_long_typical_paths_go_by_likelihood():
    tree = make_tree([(0,), (1,)])
    logits = jnp.log(jnp.array([[0.3, 0.5, 0.2]] * 3))
    for tokens, node in (([0, 0, 1], 2), ([0, 1, 0], 1)):  # rows are in reverse order: the first holds node 2
        result = typical(logits, jnp.array(tokens), tree, temperature=1.0)
        assert result.nodes.tolist() == [0, node]


def test_batches_are_rows():
    tree = make_tree(SMALL, top_k=4)
    a, b, c = jax.random.split(jax.random.key(6), 3)
    heads, base = jax.random.normal(a, (4, 2, 5, 9)), jax.random.normal(b, (2, 5, 9))
    logits = 2 * jax.random.normal(c, (2, 5, tree.num_nodes, 9))
    tokens, candidates = proposal(heads, base, tree)
    assert tokens.shape == (2, 5, 7)
    assert candidates.shape == (2, 5, 3, 4)

    def single(heads, base, logits):
        tokens, candidates = proposal(heads, base, tree)
        return (
            tokens,
            candidates,
            greedy(logits, tokens, tree),
            typical(logits, tokens, tree, temperature=1),
        )

    mapped = jax.jit(jax.vmap(jax.vmap(single, in_axes=(1, 0, 0)), in_axes=(1, 0, 0)))(heads, base, logits)
    whole = tokens, candidates, greedy(logits, tokens, tree), typical(logits, tokens, tree, temperature=1)
    for got, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == jnp.int32
    # The ids alone are enough.
    alone = greedy_ids(logits.argmax(-1), tokens, tree)
    for got, expected in zip(alone, whole[2], strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_is_that_of_sorting(top_p):
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(7), (20, 50)), -1)
    kept = np.asarray(_nucleus(p, top_p))
    for row, probabilities in zip(kept, np.asarray(p, np.float64), strict=True):
        order = np.argsort(-probabilities)
        size = 1 + int((np.cumsum(probabilities[order]) < top_p).sum())
        assert set(np.flatnonzero(row)) == set(order[:size])


def test_nucleus_at_its_limits():
    assert _nucleus(jnp.array([0.25, 0.25, 0.25, 0.25]), 0.3).all()  # equals are kept together
    assert _nucleus(jnp.array([1.0, 0.0, 0.0]), 1.0).tolist() == [True, False, False]
    assert _nucleus(jnp.array([0.4, 0.3, 0.1]), 1.0).all()  # mass that never reaches top_p
    logits = jnp.zeros((2_000, 8))
    tokens = sample_nucleus(jax.random.key(8), logits, temperature=1.0, top_p=1.0)
    assert set(tokens.tolist()) == set(range(8))


def test_typical_samples_are_typical_and_reproducible():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    key = jax.random.key(9)
    draw = jax.jit(lambda key: sample_typical(key, jnp.broadcast_to(logits, (3_000, 4)), temperature=1.0))
    tokens = draw(key)
    # H = 1.14, 0.3·exp(−H) = 0.096 > epsilon = 0.09: the threshold is epsilon.
    np.testing.assert_allclose(
        np.bincount(tokens, minlength=4) / 3_000, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.04
    )
    np.testing.assert_array_equal(tokens, draw(key))
    # Flat and large: the offset in the entropy would put the threshold above every token.
    flat = sample_typical(key, jnp.zeros((50, 3_000_000 // 50)), temperature=1.0, alpha=1.0)
    assert len(set(flat.tolist())) > 40
    tree = chain(1)
    result = typical(jnp.stack([logits, logits]), jnp.array([0, 3]), tree, temperature=1.0, key=key)
    assert int(result.accepted) == 0
    assert int(result.next_token) == int(sample_typical(key, logits, temperature=1.0))


def test_bfloat16_logits():
    tree = make_tree(SMALL)
    logits = (4 * jax.random.normal(jax.random.key(10), (tree.num_nodes, 16))).astype(jnp.bfloat16)
    tokens = jnp.concatenate([jnp.array([1]), logits[tree.parent[1:]].argmax(-1)])
    same = greedy(logits.astype(jnp.float32), tokens, tree)
    assert int(greedy(logits, tokens, tree).accepted) == int(same.accepted) == 3
    a, b = (typical(x, tokens, tree, temperature=0.7) for x in (logits, logits.astype(jnp.float32)))
    assert jax.tree.map(int, a[2:]) == jax.tree.map(int, b[2:])  # arithmetic is float32 in both


def test_bad_arguments_are_refused():
    tree = make_tree(SMALL)
    n = tree.num_nodes
    logits, tokens, key = jnp.zeros((n, 12)), jnp.zeros(n, jnp.int32), jax.random.key(0)
    with pytest.raises(ValueError, match="a head for each of the tree's 3 levels"):
        propose(jnp.zeros((2, 12)), jnp.zeros(12), tree)
    with pytest.raises(ValueError, match="at least top_k = 10 tokens, got 9"):
        propose(jnp.zeros((3, 9)), jnp.zeros(9), tree)
    with pytest.raises(ValueError, match=rf"ids must have one entry per node of the tree \({n}\), got 3"):
        verify_greedy_ids(tokens[:3], tokens[:3], tree)
    with pytest.raises(ValueError, match="logits must have one entry per node"):
        verify_typical(logits[:3], tokens[:3], tree, temperature=1.0)
    with pytest.raises(ValueError, match="use verify_greedy"):
        verify_typical(logits, tokens, tree, temperature=0.0)
    with pytest.raises(ValueError, match=r"epsilon must be in \(0, 1\]"):
        verify_typical(logits, tokens, tree, temperature=1.0, epsilon=0.0)
    with pytest.raises(ValueError, match="alpha"):
        sample_typical(key, logits, temperature=1.0, alpha=1.5)
    with pytest.raises(ValueError, match="top_p"):
        verify_nucleus(logits, tokens, tree, temperature=1.0, top_p=1.1, key=key)
    with pytest.raises(ValueError, match="temperature"):
        sample_nucleus(key, logits, temperature=float("nan"), top_p=0.5)
