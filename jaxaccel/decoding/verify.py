"""Proposing a tree of tokens and deciding how much of it stands: the two ends of a step of speculative decoding.

    tokens, candidates = propose(head_logits, base_logits, tree)   # one token per node
    ...                                                            # one forward pass of all nodes with tree.attn_mask
    result = verify_greedy(logits, tokens, tree)                   # or verify_typical, verify_nucleus

A step emits the tokens of nodes ``result.nodes[: result.accepted + 1]``, keeps the cache entries of these nodes, takes
the heads' next guesses at the last of them, and starts the next tree from ``result.next_token``.

- **Greedy**: a guess stands if it is the model's argmax after its parent. The output is that of plain greedy decoding,
  up to ties that a forward pass of n tokens may round differently from one of a single token.
- **Nucleus** and any other sampling: one token is drawn after each node, and a guess stands if it is the one drawn
  after its parent. ``next_token`` is the one drawn after the last node that stands, which makes the output distributed
  exactly as that of sampling token by token. (The reference code draws the next root anew, and so favours tokens that
  the tree held.)
- **Typical**: a guess c stands if p(c) > min(epsilon, alpha·exp(−H(p))), p the softmax of logits/temperature after its
  parent and H its entropy. It accepts most; it does *not* preserve the distribution, and with ``key=None`` there is
  no randomness in it at all.

Rows of short paths are padded. The reference code compares padding, which holds id 0, with the argmax after the last
node of the tree, and emits a spurious token 0 where they agree; here padding never stands.

All functions take leading batch axes, and work under ``jit`` and ``vmap`` with the tree as a constant.

Source: Cai et al., Medusa, arXiv 2401.10774; typical sampling: Hewitt et al., arXiv 2210.15191; nucleus: Holtzman et
al., arXiv 1904.09751.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxaccel.decoding.tree import TreeBuffers


class Verification(NamedTuple):
    """Which path of the tree stands; leading axes are those of the input."""

    row: Int[Array, "*B"]  # int32, row of ``tree.retrieve``; the first where several are as good
    nodes: Int[Array, "*B columns"]  # int32, nodes of that row; after ``accepted`` the last accepted one, repeated
    accepted: Int[Array, "*B"]  # int32, guesses that stand, 0 to max_depth; the root stands always
    next_token: Int[Array, "*B"]  # int32, what follows the last accepted node: root of the next tree


def _check_number(name: str, value: ArrayLike, low: float, high: float, expected: str) -> None:
    """Raise unless a number lies in (low, high]; traced values and arrays on a device are not looked at."""
    if isinstance(value, (int, float, np.number)) and not low < float(value) <= high:
        raise ValueError(f"{name} must be {expected}, got {name}={value!r}")


def _check_temperature(temperature: ArrayLike) -> None:
    _check_number("temperature", temperature, 0.0, sys.float_info.max, "finite and > 0; use verify_greedy for 0")


def _check_typical(temperature: ArrayLike, epsilon: ArrayLike, alpha: ArrayLike) -> None:
    _check_temperature(temperature)
    _check_number("epsilon", epsilon, 0.0, 1.0, "in (0, 1]")
    _check_number("alpha", alpha, 0.0, 1.0, "in (0, 1]")


def _check_nodes(name: str, size: int, tree: TreeBuffers) -> None:
    if size != tree.num_nodes:
        raise ValueError(f"{name} must have one entry per node of the tree ({tree.num_nodes}), got {size}")


def _scaled(logits: Float[Array, "*B V"], temperature: ArrayLike) -> Float[Array, "*B V"]:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature


def _argmax(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    return jnp.argmax(logits, -1).astype(jnp.int32)


def propose(
    head_logits: Float[Array, "heads *B guessed"],
    base_logits: Float[Array, "*B V"] | None,
    tree: TreeBuffers,
    *,
    root: Int[Array, "*B"] | None = None,
    token_ids: Int[Array, " guessed"] | None = None,
) -> tuple[Int[Array, "*B n"], Int[Array, "*B rows columns"]]:
    """Fill a tree with tokens: the root from the model itself, a node at depth k + 1 from the best of head k.

    Args:
        head_logits: guesses of the heads at the last accepted node, heads first as `medusa_logits` returns them; heads
            beyond the tree's depth are not read.
        base_logits: the model's own logits there; read only where ``root`` is ``None``.
        tree: of `make_tree`.
        root: the token to start from, ``Verification.next_token`` of the last step or a sampled one; the argmax of
            ``base_logits`` if ``None``.
        token_ids: what the heads' entries stand for, where they guess among a part of the vocabulary only.

    Returns:
        The token of every node, and of every entry of ``tree.retrieve``, 0 where that is padding. The second is for
        inspection: verification reads the first.

    Raises:
        ValueError: if there are fewer heads than the tree is deep, or fewer tokens than ``tree.top_k``.

    >>> import jax.numpy as jnp
    >>> from jaxaccel.decoding.tree import make_tree
    >>> heads = jnp.array([[0.0, 1.0, 2.0, 3.0], [5.0, 1.0, 2.0, 3.0]])
    >>> tokens, candidates = propose(heads, jnp.array([0.0, 9.0, 0.0, 0.0]), make_tree([(0,), (1,), (0, 0)], top_k=2))
    >>> tokens.tolist(), candidates.tolist()
    ([1, 3, 2, 0], [[1, 3, 0], [1, 2, 0]])
    """
    depth, vocab = tree.max_depth, head_logits.shape[-1]
    if head_logits.shape[0] < depth:
        raise ValueError(f"head_logits must hold a head for each of the tree's {depth} levels, got {head_logits.shape}")
    if depth and vocab < tree.top_k:
        raise ValueError(f"head_logits must have at least top_k = {tree.top_k} tokens, got {vocab}")
    if root is None:
        if base_logits is None:
            raise ValueError("expected base_logits or root: where the tree starts")
        root = _argmax(base_logits)
    root = root.astype(jnp.int32)
    table = root[..., None]
    if depth:
        best = jnp.moveaxis(jax.lax.top_k(head_logits[:depth], tree.top_k)[1], 0, -2)  # [*B, depth, top_k]
        best = best if token_ids is None else token_ids[best]
        table = jnp.concatenate([table, best.reshape(*root.shape, -1).astype(jnp.int32)], -1)
    tokens = table[..., tree.tree_index]
    return tokens, jnp.where(tree.valid, tokens[..., tree.retrieve], 0)


def _longest(
    stands: Bool[Array, "*B n"], scores: Float[Array, "*B n"] | None, tree: TreeBuffers
) -> tuple[Int[Array, "*B"], Int[Array, "*B columns"], Int[Array, "*B"]]:
    """Return row, nodes and length of the longest leading run of nodes that stand; ``scores`` break ties."""
    # Padding is masked by its place, never by the token that happens to fill it.
    run = jnp.cumprod(stands[..., tree.retrieve[:, 1:]] & tree.valid[:, 1:], -1, dtype=jnp.int32)
    lengths = run.sum(-1, dtype=jnp.int32)
    accepted = lengths.max(-1)
    if scores is None:
        row = jnp.argmax(lengths, -1)
    else:
        totals = jnp.where(run == 1, scores[..., tree.retrieve[:, 1:]], 0).sum(-1)
        row = jnp.argmax(jnp.where(lengths == accepted[..., None], totals, -jnp.inf), -1)
    path = jnp.asarray(tree.retrieve)[row]
    steps = jnp.arange(path.shape[-1], dtype=jnp.int32)
    nodes = jnp.take_along_axis(path, jnp.minimum(steps, accepted[..., None]), -1)
    return row.astype(jnp.int32), nodes, accepted


def verify_greedy_ids(ids: Int[Array, "*B n"], tree_tokens: Int[Array, "*B n"], tree: TreeBuffers) -> Verification:
    """Accept the longest path on which every guess equals the token chosen after its parent.

    Args:
        ids: the token that the model chose after each node: the argmax of its logits, so that they need not be kept, or
            one drawn from them, for exact sampling.
        tree_tokens: of `propose`.
        tree: of `make_tree`.

    Returns:
        The path that stands. Siblings hold different tokens, so there is only one longest.

    Raises:
        ValueError: if an argument does not have an entry for every node.

    >>> import jax.numpy as jnp
    >>> from jaxaccel.decoding.tree import chain
    >>> result = verify_greedy_ids(jnp.array([5, 7, 2]), jnp.array([4, 5, 6]), chain(2))  # 4, then 5, but then 7
    >>> int(result.accepted), result.nodes.tolist(), int(result.next_token)
    (1, [0, 1, 1], 7)
    """
    _check_nodes("ids", ids.shape[-1], tree)
    _check_nodes("tree_tokens", tree_tokens.shape[-1], tree)
    row, nodes, accepted = _longest(tree_tokens == ids[..., tree.parent], None, tree)
    after = jnp.take_along_axis(ids, nodes[..., -1:], -1)[..., 0]
    return Verification(row, nodes, accepted, after.astype(jnp.int32))


def verify_greedy(logits: Float[Array, "*B n V"], tree_tokens: Int[Array, "*B n"], tree: TreeBuffers) -> Verification:
    """Accept the longest path on which every guess is the model's argmax after its parent (the lowest id on ties).

    Args:
        logits: of the model, after each node.
        tree_tokens: of `propose`.
        tree: of `make_tree`.

    Returns:
        The path that stands, and the argmax after it.

    Raises:
        ValueError: if an argument does not have an entry for every node.

    >>> import jax
    >>> from jaxaccel.decoding.tree import chain
    >>> logits = jax.nn.one_hot(jnp.array([5, 6, 2]), 8)
    >>> result = verify_greedy(logits, jnp.array([4, 5, 6]), chain(2))
    >>> int(result.accepted), int(result.next_token)
    (2, 2)
    """
    return verify_greedy_ids(_argmax(logits), tree_tokens, tree)


def _typical_threshold(probabilities: Float[Array, "*B V"], epsilon: ArrayLike, alpha: ArrayLike) -> Float[Array, "*B"]:
    """Return min(epsilon, alpha·exp(−H)), with H = −Σ p·log(p + 1e-5) as in the reference code."""
    # The offset keeps 0·log 0 away.
    negative_entropy = (probabilities * jnp.log(probabilities + 1e-5)).sum(-1)
    return jnp.minimum(epsilon, alpha * jnp.exp(negative_entropy))


def verify_typical(
    logits: Float[Array, "*B n V"],
    tree_tokens: Int[Array, "*B n"],
    tree: TreeBuffers,
    *,
    temperature: ArrayLike,
    epsilon: ArrayLike = 0.09,
    alpha: ArrayLike = 0.3,
    key: PRNGKeyArray | None = None,
) -> Verification:
    """Accept the longest path whose guesses are all typical; among equally long ones, the likeliest.

    Args:
        logits: of the model, after each node.
        tree_tokens: of `propose`.
        tree: of `make_tree`.
        temperature: > 0. As it falls to 0 this becomes `verify_greedy`.
        epsilon: probability above which a token is always typical, in (0, 1].
        alpha: share of exp(−H) above which it is too, in (0, 1]; the authors take √epsilon.
        key: if given, ``next_token`` is drawn by `sample_typical`; it is the argmax if ``None``.

    Returns:
        The path that stands.

    Raises:
        ValueError: if a number is out of range or an argument does not have an entry for every node.

    >>> import jax.numpy as jnp
    >>> from jaxaccel.decoding.tree import chain
    >>> logits = jnp.log(jnp.array([[0.6, 0.3, 0.1], [0.98, 0.01, 0.01], [0.2, 0.2, 0.6]]))
    >>> result = verify_typical(logits, jnp.array([0, 1, 2]), chain(2), temperature=1.0)  # 0.3 is enough, 0.01 is not
    >>> int(result.accepted), int(result.next_token)
    (1, 0)
    """
    _check_typical(temperature, epsilon, alpha)
    _check_nodes("logits", logits.shape[-2], tree)
    _check_nodes("tree_tokens", tree_tokens.shape[-1], tree)
    # Only what follows inner nodes decides; leaves, most of the nodes, need no softmax.
    inner = np.unique(tree.parent)
    scaled = _scaled(logits[..., inner, :], temperature)
    normaliser = jax.nn.logsumexp(scaled, -1)
    threshold = _typical_threshold(jnp.exp(scaled - normaliser[..., None]), epsilon, alpha)
    slot = np.searchsorted(inner, tree.parent).astype(np.int32)
    # One number per node, picked from the flat array: no [n, V] copy of the parents' logits.
    place = slot * scaled.shape[-1] + tree_tokens
    picked = jnp.take_along_axis(scaled.reshape(*scaled.shape[:-2], -1), place, -1)
    scores = picked - normaliser[..., slot]
    row, nodes, accepted = _longest(jnp.exp(scores) > threshold[..., slot], scores, tree)
    last = jnp.take_along_axis(logits, nodes[..., -1:, None], -2)[..., 0, :]
    after = (
        _argmax(last)
        if key is None
        else sample_typical(key, last, temperature=temperature, epsilon=epsilon, alpha=alpha)
    )
    return Verification(row, nodes, accepted, after)


def sample_typical(
    key: PRNGKeyArray,
    logits: Float[Array, "*B V"],
    *,
    temperature: ArrayLike,
    epsilon: ArrayLike = 0.09,
    alpha: ArrayLike = 0.3,
) -> Int[Array, "*B"]:
    """Draw a token among those that `verify_typical` would accept; the likeliest is always one of them.

    Args:
        key: of the draw; the same key gives the same tokens.
        logits: of the model.
        temperature: > 0.
        epsilon: as in `verify_typical`, also the next.
        alpha: see there.

    Returns:
        Tokens, int32. Drawn after every node and given to `verify_greedy_ids` they make typical sampling exact.

    Raises:
        ValueError: if a number is out of range.

    >>> import jax, jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([0.0, 0.95, 0.05]))
    >>> int(sample_typical(jax.random.key(0), logits, temperature=1.0))
    1
    """
    _check_typical(temperature, epsilon, alpha)
    scaled = _scaled(logits, temperature)
    p = jax.nn.softmax(scaled, -1)
    # Over huge, flat vocabularies the offset inside H can lift the threshold above every token.
    threshold = jnp.minimum(_typical_threshold(p, epsilon, alpha), p.max(-1))
    kept = jnp.where(p >= threshold[..., None], scaled, -jnp.inf)
    return jax.random.categorical(key, kept).astype(jnp.int32)


def _nucleus(p: Float[Array, "*B V"], top_p: ArrayLike) -> Bool[Array, "*B V"]:
    """Return the smallest set {p >= t} whose mass is at least ``top_p``; tokens as likely as the last are all in it."""
    p = p.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)  # the order of floats >= 0 is that of their bits

    # 30 passes over V find the threshold to the last bit, without sorting V.
    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle[..., None], p, 0).sum(-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(p.shape[:-1], jnp.int32)
    # Rounding may lift a probability above 1 by a few units; all are below 2, whose bits are 2^30.
    high = jnp.full_like(low, np.float32(2.0).view(np.int32))
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return bits >= low[..., None]


def nucleus_logits(logits: Float[Array, "*B V"], *, temperature: ArrayLike, top_p: ArrayLike) -> Float[Array, "*B V"]:
    """Logits whose softmax is the law that `sample_nucleus` draws from: scaled, and -inf outside the nucleus.

    Args:
        logits: of the model.
        temperature: > 0.
        top_p: in (0, 1].

    Raises:
        ValueError: if a number is out of range.

    >>> import jax.numpy as jnp
    >>> nucleus_logits(jnp.array([0.0, 2.0]), temperature=2.0, top_p=0.5).tolist()
    [-inf, 1.0]
    """
    _check_temperature(temperature)
    _check_number("top_p", top_p, 0.0, 1.0, "in (0, 1]")
    scaled = _scaled(logits, temperature)
    # Everything is kept if p >= 0: no test of a sum against 1, which rounding would decide.
    whole = isinstance(top_p, (int, float)) and top_p == 1
    return scaled if whole else jnp.where(_nucleus(jax.nn.softmax(scaled, -1), top_p), scaled, -jnp.inf)


def sample_nucleus(
    key: PRNGKeyArray, logits: Float[Array, "*B V"], *, temperature: ArrayLike, top_p: ArrayLike
) -> Int[Array, "*B"]:
    """Draw a token from the nucleus: the fewest, likeliest tokens that together have probability ``top_p``.

    Args:
        key: of the draw; the same key gives the same tokens.
        logits: of the model.
        temperature: > 0.
        top_p: in (0, 1]; 1 is plain sampling.

    Returns:
        Tokens, int32.

    Raises:
        ValueError: if a number is out of range.

    >>> import jax, jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([0.3, 0.6, 0.1]))
    >>> int(sample_nucleus(jax.random.key(0), logits, temperature=1.0, top_p=0.5))
    1
    """
    kept = nucleus_logits(logits, temperature=temperature, top_p=top_p)
    return jax.random.categorical(key, kept).astype(jnp.int32)


def verify_nucleus(
    logits: Float[Array, "*B n V"],
    tree_tokens: Int[Array, "*B n"],
    tree: TreeBuffers,
    *,
    temperature: ArrayLike,
    top_p: ArrayLike = 0.8,
    key: PRNGKeyArray,
) -> Verification:
    """Draw a token after each node and accept the longest path of guesses that were drawn.

    Args:
        logits: of the model, after each node.
        tree_tokens: of `propose`, with ``root`` the last step's ``next_token``.
        tree: of `make_tree`.
        temperature: > 0.
        top_p: in (0, 1]; 1 is plain sampling.
        key: of the draws.

    Returns:
        The path that stands, and the token drawn after it: exactly what sampling token by token would give.

    Raises:
        ValueError: if a number is out of range or an argument does not have an entry for every node.

    >>> import jax, jax.numpy as jnp
    >>> from jaxaccel.decoding.tree import chain
    >>> logits = 9.0 * jax.nn.one_hot(jnp.array([5, 6, 2]), 8)
    >>> result = verify_nucleus(logits, jnp.array([4, 5, 6]), chain(2), temperature=1.0, key=jax.random.key(0))
    >>> int(result.accepted), int(result.next_token)
    (2, 2)
    """
    return verify_greedy_ids(sample_nucleus(key, logits, temperature=temperature, top_p=top_p), tree_tokens, tree)
