"""Draft and verify: how much of what a cheap model wrote a large model would have written itself.

What it makes cheaper: text of a large model, one sequence at a time. Each of its passes reads all weights once, whether
for one token or for a few. So a cheaper source writes n tokens ahead, one pass of the large model judges all of them,
and the beginning that stands is kept, with one more token from the large model.

    greedy     guess x stands if x = argmax of the target's logits after its parent
    sampling   guess x, drawn from q, stands with probability min(1, p(x)/q(x)), p the target's law after its parent;
               where it falls, the token is drawn from norm(max(p − q, 0)) instead

Both leave the target's text, or its law, as it is, whatever the draft: a bad draft only costs time. A guess stands with
probability Σₓ min(p(x), q(x)) in the mean, so a draft should be like the target.

**Trees.** Guesses that share a parent are judged one after the other, in the order in which they are given. Where one
falls, p becomes norm(max(p − q, 0)), q loses that token, and the next is judged by the new p and q: exact for siblings
that were drawn without replacement (one is drawn, taken out, and the next is drawn from the rest). A chain is a tree
without siblings.

**Guesses that were not drawn**, such as the likeliest of each head, have no q. Then one token is drawn after each node,
and a guess stands if it is that token. This is the rule above for a q that is certain.

When to use it: small batches, where a pass of n tokens costs little more than that of one. When not: large batches, and
drafts that are often wrong or not much cheaper than the target. With probability α that a guess stands, independently,
and a draft that costs c of the target's pass, n guesses make a step (1 − α^(n+1)) / ((1 − α)(nc + 1)) times as fast.

Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192; Chen et al.,
arXiv 2302.01318. Siblings: Miao et al., SpecInfer, arXiv 2305.09781; without replacement: Jeon et al., arXiv
2402.14160.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from jaxaccel.decoding.tree import TreeBuffers, chain, tree_from_parents
from jaxaccel.decoding.verify import Verification, verify_greedy, verify_nucleus


def _routes(tree: TreeBuffers) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n columns"]]:
    """For each node a row of ``tree.retrieve`` that passes through it, and the nodes down to it, itself repeated."""
    rows = np.zeros(tree.num_nodes, np.int32)
    for row in reversed(range(len(tree.retrieve))):
        rows[tree.retrieve[row][tree.valid[row]]] = row
    steps = np.minimum(np.arange(tree.retrieve.shape[1]), tree.depth[:, None])
    return rows, np.take_along_axis(tree.retrieve[rows], steps, 1)


def verify_drawn(
    target_logits: Float[Array, "*B n V"],
    draft_logits: Float[Array, "*_"],
    tree_tokens: Int[Array, "*_"],
    tree: TreeBuffers,
    *,
    key: Key[Array, ""],
) -> Verification:
    """Judge guesses that were drawn: the emitted tokens have the target's law.

    Args:
        target_logits: after each node; their softmax is the law of the text. Temperature and filters are in them.
        draft_logits: [*B, n − 1, V]; row i − 1 belongs to node i; its softmax is the law that the node's token was
            drawn from. Siblings have the same row: what was drawn before them is taken out here.
        tree_tokens: [*B, n], of the nodes, the root first.
        tree: of `make_tree` or `chain`.
        key: of the draws.

    Returns:
        The path that stands, and the token after it.

    Raises:
        ValueError: if an argument does not have an entry for every node, or vocabularies differ.

    >>> same = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9]]))  # draft and target agree: every guess stands
    >>> result = verify_drawn(same, same[:1], jnp.array([0, 1]), chain(1), key=jax.random.key(0))
    >>> int(result.accepted)
    1
    """
    n, vocab = target_logits.shape[-2:]
    batch = target_logits.shape[:-2]
    expected = {
        "target_logits": (target_logits.shape, (*batch, tree.num_nodes, vocab)),
        "draft_logits": (draft_logits.shape, (*batch, tree.num_nodes - 1, vocab)),
        "tree_tokens": (tree_tokens.shape, (*batch, tree.num_nodes)),
    }
    for name, (shape, wanted) in expected.items():
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape}, expected {wanted} for a tree of {tree.num_nodes} nodes")
    dtype = jnp.promote_types(target_logits.dtype, jnp.float32)
    rows, routes = _routes(tree)
    parents = jnp.asarray(tree.parent)

    def single(key: Array, target: Array, draft: Array, tokens: Array) -> tuple[Array, Array]:
        coin, draw = jax.random.split(key)
        coins = jax.random.uniform(coin, (n,), dtype)

        def judge(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
            node, p, out = carry
            token = tokens[i]
            # Where more siblings are given than the draft's law has tokens, nothing is left: the guess falls, p stays.
            q = jnp.nan_to_num(jax.nn.softmax(jnp.where(out, -jnp.inf, draft[i - 1].astype(dtype))), nan=0.0)
            child = parents[i] == node
            stands = child & (q[token] > 0) & (coins[i] * q[token] < p[token])
            falls = child & ~stands
            rest = jnp.maximum(p - q, 0)
            total = rest.sum()
            # p = q leaves nothing but what rounding made of it.
            p = jnp.where(falls & (total > 0), rest / jnp.where(total > 0, total, 1), p)
            p = jnp.where(stands, jax.nn.softmax(target[i].astype(dtype)), p)
            out = jnp.where(stands, False, out | (falls & (jnp.arange(vocab) == token)))
            return (jnp.where(stands, i, node), p, out), None

        first = (jnp.int32(0), jax.nn.softmax(target[0].astype(dtype)), jnp.zeros(vocab, bool))
        # Nodes come after their parents: one pass over them walks down the tree.
        (node, p, _), _ = jax.lax.scan(judge, first, jnp.arange(1, n))
        return node, jax.random.categorical(draw, jnp.log(p)).astype(jnp.int32)

    count = int(np.prod(batch))
    keys = jax.random.split(key, count)
    flat = (x.reshape(count, *x.shape[len(batch) :]) for x in (target_logits, draft_logits, tree_tokens))
    node, token = (part.reshape(batch) for part in jax.vmap(single)(keys, *flat))
    return Verification(jnp.asarray(rows)[node], jnp.asarray(routes)[node], jnp.asarray(tree.depth)[node], token)


def verify_draft(
    draft_tokens: Int[Array, "*B guesses"],
    target_logits: Float[Array, "*B n V"],
    *,
    draft_logits: Float[Array, "*_"] | None = None,
    tree_parent: Sequence[int] | Int[np.ndarray, "_"] | Int[Array, "_"] | None = None,
    key: Key[Array, ""] | None = None,
    temperature: ArrayLike | None = None,
) -> tuple[Int[Array, "*B"], Int[Array, "*B columns"]]:
    """Decide how many of the guesses stand, and which tokens a step emits.

    Args:
        draft_tokens: the guesses, without the last token of the text, which they follow.
        target_logits: of the target after the last token of the text, and after each guess: n = guesses + 1 rows.
        draft_logits: [*B, guesses, V], what each guess was drawn from; for sampling with guesses that were drawn.
            Without them a guess is taken as given, e.g. the likeliest of its source.
        tree_parent: [guesses], static; the guess before each guess, -1 for the text. A chain by default: -1, 0, 1, ...
            In the target's pass, a guess must have seen the text, the guesses on the way to it, and itself.
        key: for sampling; greedy without.
        temperature: for sampling: divides the logits of both models; 1 by default. A draft that was drawn at another
            temperature has its logits divided beforehand.

    Returns:
        How many guesses stand, and the tokens: these guesses, one more from the target, and then -1. Columns are the
        tree's depth + 1.

    Raises:
        ValueError: for fewer than 1 guess, shapes or vocabularies that do not fit, a tree whose parents do not come
            before their children, ``draft_logits`` or ``temperature`` without a ``key``, a temperature that is not > 0.
        TypeError: if ``tree_parent`` is traced.

    >>> target = jax.nn.one_hot(jnp.array([5, 7, 2]), 8)  # 5 comes next; after the guess 5 comes 7
    >>> accepted, tokens = verify_draft(jnp.array([5, 6]), target)
    >>> int(accepted), tokens.tolist()
    (1, [5, 7, -1])
    """
    batch, guesses = draft_tokens.shape[:-1], draft_tokens.shape[-1] if draft_tokens.ndim else 0
    if guesses < 1:
        raise ValueError(f"draft_tokens has shape {draft_tokens.shape}, expected at least 1 guess on the last axis")
    if target_logits.shape[:-1] != (*batch, guesses + 1):
        raise ValueError(
            f"target_logits has shape {target_logits.shape}, expected {(*batch, guesses + 1)} and the vocabulary: a "
            f"row for the text and one for each of the {guesses} guesses"
        )
    vocab = target_logits.shape[-1]
    if draft_logits is not None and draft_logits.shape != (*batch, guesses, vocab):
        raise ValueError(
            f"draft_logits has shape {draft_logits.shape}, expected {(*batch, guesses, vocab)}: draft and target have "
            "one vocabulary"
        )
    if key is None:
        for name, given in (("draft_logits", draft_logits), ("temperature", temperature)):
            if given is not None:
                raise ValueError(f"{name} is given without a key: sampling needs one, greedy acceptance has no {name}")
    if isinstance(tree_parent, jax.core.Tracer):
        raise TypeError("tree_parent is traced, expected integers that are known when the function is compiled")
    order = None
    if tree_parent is None:
        tree = chain(guesses)
    else:
        parents = np.asarray(tree_parent)
        if parents.shape != (guesses,):
            raise ValueError(f"tree_parent has shape {parents.shape}, expected {(guesses,)}: one for each guess")
        tree, order = tree_from_parents(parents)
        draft_tokens, target_logits = draft_tokens[..., order], target_logits[..., np.append(0, 1 + order), :]
        draft_logits = None if draft_logits is None else draft_logits[..., order, :]
    # What the root holds decides nothing.
    nodes = jnp.concatenate([jnp.zeros((*batch, 1), jnp.int32), draft_tokens.astype(jnp.int32)], -1)
    if key is None:
        result = verify_greedy(target_logits, nodes, tree)
    else:
        heat = 1.0 if temperature is None else temperature
        if isinstance(heat, (int, float)) and not 0 < heat < np.inf:
            raise ValueError(f"temperature is {heat}, expected a positive number; greedy acceptance has no key")
        if draft_logits is None:
            result = verify_nucleus(target_logits, nodes, tree, temperature=heat, top_p=1.0, key=key)
        else:
            result = verify_drawn(target_logits / heat, draft_logits / heat, nodes, tree, key=key)
    return result.accepted, emitted_tokens(nodes, result, pad=-1)


def emitted_tokens(
    tree_tokens: Int[Array, "*B n"], result: Verification, *, pad: int | None = None
) -> Int[Array, "*B columns"]:
    """Tokens that a step emits: the guesses that stand, and the token after them.

    Args:
        tree_tokens: of the nodes.
        result: of a verification.
        pad: fills what is left; anything may stand there by default.

    >>> from jaxaccel.decoding.verify import verify_greedy_ids
    >>> tokens = jnp.array([4, 5, 6])
    >>> emitted_tokens(tokens, verify_greedy_ids(jnp.array([5, 7, 2]), tokens, chain(2)), pad=-1).tolist()
    [5, 7, -1]
    """
    guesses = jnp.take_along_axis(tree_tokens, result.nodes, -1)[..., 1:]
    tokens = jnp.concatenate([guesses, result.next_token[..., None]], -1)
    columns = jnp.arange(tokens.shape[-1])
    tokens = jnp.where(columns == result.accepted[..., None], result.next_token[..., None], tokens)
    return tokens if pad is None else jnp.where(columns > result.accepted[..., None], pad, tokens)
