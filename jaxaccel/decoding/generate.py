"""Generation of text as one compiled loop: plain or speculative decoding of any model with a cache.

A step passes a small tree of tokens through the model: its root is the last token that was emitted, the other nodes
are guesses of a cheaper source (`jaxaccel.decoding.drafts`). The path that the model itself would have taken stands;
its tokens are emitted, and one more, which the model chose after the last of them. A tree of the root alone is plain
decoding, so that both are the same loop, and with greedy verification they give the same text.

The loop knows a model by its functions (`CachedModel`) and never looks into its cache. State is a pytree whose buffers
are given away at each call, so the cache is updated in place.

When speculation helps: small batches, where a pass of several tokens costs little more than that of one, as weights are
read once for all of them. When not: large batches, and sources that guess badly.

Source: Cai et al., Medusa, arXiv 2401.10774; Leviathan et al., arXiv 2211.17192.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaccel.decoding.sampling import Sampling, law_logits, next_tokens
from jaxaccel.decoding.speculative import emitted_tokens, verify_drawn
from jaxaccel.decoding.tree import TreeBuffers, chain
from jaxaccel.decoding.verify import Verification, verify_greedy_ids, verify_typical

PLAIN = chain(0)
"""The tree of one node: a token at a time."""


class CachedModel(NamedTuple):
    """What the loop needs of a model. Keep the same functions between calls: they are part of what is compiled."""

    forward: Callable[..., Any]
    """``(params, tokens [B, n], cache, positions [B, n], mask [n, n], live [B]) -> (hidden [B, n, D], new)``; reads the
    cache. What it gives for sequences that are not ``live``, finished ones, is not read."""
    logits: Callable[..., Any]
    """``(params, hidden [..., D]) -> [..., V]``."""
    append: Callable[..., Any]
    """``(cache, new, nodes [B, m] or None, count [B] or None) -> cache`` with those of the n tokens stored."""
    rewind: Callable[..., Any] | None = None
    """``(cache, count [B]) -> cache`` without its last tokens; a model that guesses needs it."""


@dataclasses.dataclass(frozen=True)
class Typical:
    """Typical acceptance of guesses: faster than sampling, but not distribution preserving. See `verify_typical`."""

    epsilon: float = 0.09
    alpha: float = 0.3


class GenerationState(NamedTuple):
    """Between two steps: a pytree. The last emitted token of each sequence is not in the cache yet."""

    cache: Any  # with int32 [B] `position` of the next token
    hidden: Any  # [B, D], at the last token that the cache holds: what speculative heads guess from
    last: Any  # int32 [B], the last emitted token
    tokens: Any  # int32 [B, max_new_tokens], emitted tokens; padding after `count`
    count: Any  # int32 [B]
    done: Any  # bool [B]
    seen: Any  # bool [B, V] tokens that occurred, for a repetition penalty; else ()
    key: Any  # of the next step; () for greedy decoding
    steps: Any  # int32, passes through the model after the prompt
    histogram: Any  # int32 [max_depth + 1], how often 0, 1, ... guesses of a step stood, over unfinished sequences
    draft: Any = ()  # what the source of guesses remembers, e.g. a cache of its own


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is compiled into the loop: hashable."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    tree: TreeBuffers = PLAIN
    typical: Typical | None = None

    def __post_init__(self) -> None:
        if self.typical is not None and self.sampling.greedy:
            raise ValueError("typical acceptance needs a temperature above 0: greedy decoding accepts by argmax")
        if self.typical is not None and (self.sampling.top_k, self.sampling.top_p) != (None, None):
            raise ValueError("typical acceptance has no top_k and top_p: its own threshold takes their place")


class Proposal(NamedTuple):
    """Guesses of a source."""

    tokens: Any  # int32 [B, n], of all nodes of the tree; the root is the last emitted token
    logits: Any  # [B, n - 1, V], whose softmax each guess was drawn from; None where guesses were not drawn
    draft: Any  # what the source remembers, until it is told what stood


@runtime_checkable
class DraftSource(Protocol):
    """Where guesses come from: a pytree that is compiled into the loop. See `jaxaccel.decoding.drafts`."""

    def check(self, rules: Rules, state: GenerationState) -> None:
        """Raise a `ValueError` if it cannot fill the tree for this state."""

    def propose(self, model: CachedModel, params: Any, state: GenerationState, rules: Rules, key: Any) -> Proposal:
        """Fill the tree. ``key`` is ``None`` where guesses should not be drawn."""

    def accept(
        self, draft: Any, last: Int[Array, "B"], emitted: Int[Array, "B m"], accepted: Int[Array, "B"], rules: Rules
    ) -> Any:
        """What it remembers once ``accepted`` guesses stood and ``accepted`` + 1 tokens were emitted after ``last``."""


def _record(
    state: GenerationState, emitted: Int[Array, "B m"], count: Int[Array, "B"], rules: Rules
) -> GenerationState:
    """Write the first ``count`` new tokens of each sequence, up to a stop token and to the end of the buffer."""
    columns = jnp.arange(emitted.shape[1])
    room = state.tokens.shape[1] - state.count
    count = jnp.where(state.done, 0, jnp.minimum(count, room))
    stops = jnp.zeros(emitted.shape, bool)
    for stop in rules.stop_ids:
        stops |= emitted == stop
    stops &= columns < count[:, None]
    stopped = stops.any(-1)
    count = jnp.where(stopped, jnp.argmax(stops, -1) + 1, count)
    at = jnp.where(columns < count[:, None], state.count[:, None] + columns, state.tokens.shape[1])
    rows = jnp.arange(len(emitted))[:, None]
    tokens = state.tokens.at[rows, at].set(emitted, mode="drop")
    seen = state.seen
    if rules.sampling.repetition_penalty != 1:
        kept = jnp.where(columns < count[:, None], emitted, seen.shape[-1])
        seen = seen.at[rows, kept].set(True, mode="drop")
    total = state.count + count
    done = state.done | stopped | (total >= tokens.shape[1])
    return state._replace(tokens=tokens, count=total, done=done, seen=seen)


def start(
    logits: Float[Array, "B V"],
    hidden: Float[Array, "B D"],
    cache: Any,
    *,
    rules: Rules,
    max_new_tokens: int,
    key: Key[Array, ""] | None = None,
    seen: Bool[Array, "B V"] | None = None,
) -> GenerationState:
    """The state after a prompt, its first token chosen.

    Args:
        logits: after the last token of each prompt.
        hidden: there.
        cache: of the prompts.
        rules: of the loop.
        max_new_tokens: most tokens to emit, at least 1.
        key: for sampling.
        seen: which tokens the prompts hold, for a repetition penalty.

    Raises:
        ValueError: for fewer than 1 new tokens, or a missing ``key`` or ``seen``.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    sampling, batch = rules.sampling, len(logits)
    if not sampling.greedy and key is None:
        raise ValueError(f"temperature is {sampling.temperature}: sampling needs a key")
    now, later = (None, ()) if key is None else tuple(jax.random.split(key))
    first = next_tokens(logits, sampling, key=now, seen=seen)
    zeros = jnp.zeros(batch, jnp.int32)
    state = GenerationState(
        cache,
        hidden,
        first,
        jnp.full((batch, max_new_tokens), rules.pad_id, jnp.int32),
        zeros,
        jnp.zeros(batch, bool),
        () if sampling.repetition_penalty == 1 else seen,
        () if sampling.greedy else later,
        jnp.int32(0),
        jnp.zeros(rules.tree.max_depth + 1, jnp.int32),
    )
    return _record(state, first[:, None], zeros + 1, rules)


def _seen_by_node(seen: Bool[Array, "B V"], tokens: Int[Array, "B n"], tree: TreeBuffers) -> Bool[Array, "B n V"]:
    """Tokens that occurred before the token after each node: those of the text and of the path to the node."""
    batch, nodes = tokens.shape
    each = jnp.broadcast_to(seen[:, None], (batch, nodes, seen.shape[-1]))
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(nodes)[:, None]
    ancestor = jnp.where(tree.attn_mask, tokens[:, None], seen.shape[-1])
    return each.at[rows, columns, ancestor].set(True, mode="drop")


def _verify(
    logits: Float[Array, "B n V"], proposal: Proposal, state: GenerationState, rules: Rules, key: Any
) -> Verification:
    tree, sampling, tokens = rules.tree, rules.sampling, proposal.tokens
    seen = _seen_by_node(state.seen, tokens, tree) if sampling.repetition_penalty != 1 else None
    if rules.typical is not None:
        if seen is not None or sampling.vocab_size is not None:
            raise ValueError("typical acceptance takes no repetition penalty and no vocab_size")
        return verify_typical(
            logits, tokens, tree, temperature=sampling.temperature, epsilon=rules.typical.epsilon,
            alpha=rules.typical.alpha, key=key,
        )  # fmt: skip
    if proposal.logits is not None:
        return verify_drawn(law_logits(logits, sampling, seen=seen), proposal.logits, tokens, tree, key=key)
    # Drawn after every node: a guess stands if it is what was drawn after its parent, so the law of the text is that of
    # drawing token by token. Greedily, what is drawn is the argmax.
    drawn = next_tokens(logits, sampling, key=key, seen=seen)
    return verify_greedy_ids(drawn, tokens, tree)


def step(
    model: CachedModel, params: Any, source: DraftSource | None, state: GenerationState, rules: Rules
) -> GenerationState:
    """One pass through the model: emits one token for each sequence, and one for each guess that stands."""
    tree, guess = rules.tree, None
    key, later = (None, ()) if rules.sampling.greedy else tuple(jax.random.split(state.key))
    if tree.max_depth:
        assert source is not None
        if key is not None:
            key, guess = jax.random.split(key)
        # Typical acceptance judges guesses by the model alone: the likeliest ones are the best.
        proposal = source.propose(model, params, state, rules, None if rules.typical is not None else guess)
    else:
        proposal = Proposal(state.last[:, None], None, state.draft)
    tokens = proposal.tokens
    positions = state.cache.position[:, None] + tree.depth
    hidden, new = model.forward(params, tokens, state.cache, positions, jnp.asarray(tree.attn_mask), ~state.done)
    result = _verify(model.logits(params, hidden), proposal, state, rules, key)
    draft = state.draft
    if tree.max_depth:
        assert source is not None
        emitted = emitted_tokens(tokens, result)
        cache = model.append(state.cache, new, result.nodes, result.accepted + 1)
        hidden = jnp.take_along_axis(hidden, result.nodes[:, -1:, None], 1)[:, 0]
        draft = source.accept(proposal.draft, state.last, emitted, result.accepted, rules)
    else:
        emitted, hidden = result.next_token[:, None], hidden[:, 0]
        # Always 1, but known only once the token is: by then the cache has been read, and can be written in place.
        cache = model.append(state.cache, new, None, jnp.where(result.next_token >= 0, 1, 0))
    histogram = state.histogram.at[result.accepted].add(jnp.where(state.done, 0, 1))
    state = _record(state, emitted, result.accepted + 1, rules)
    return state._replace(
        cache=cache, hidden=hidden, last=result.next_token, key=later, steps=state.steps + 1, histogram=histogram,
        draft=draft,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "rules"), donate_argnames=("state",))
def advance(
    params: Any,
    source: DraftSource | None,
    state: GenerationState,
    max_steps: Int[Array, ""],
    *,
    model: CachedModel,
    rules: Rules,
) -> GenerationState:
    """At most ``max_steps`` steps, fewer if all sequences are finished. ``state`` is given away."""
    end = state.steps + max_steps

    def going(state: GenerationState) -> Bool[Array, ""]:
        return ~state.done.all() & (state.steps < end)

    return jax.lax.while_loop(going, lambda s: step(model, params, source, s, rules), state)


def run(
    params: Any,
    state: GenerationState,
    *,
    model: CachedModel,
    rules: Rules,
    source: DraftSource | None = None,
    callback: Callable[[np.ndarray, np.ndarray], None] | None = None,
    every: int = 8,
) -> GenerationState:
    """Step until all sequences are finished.

    Args:
        params: of the model.
        state: from `start`; it is given away.
        model: its functions.
        rules: of the loop.
        source: of guesses, for a tree that has any.
        callback: is told tokens [B, max_new_tokens] and counts [B] about every ``every`` steps, and at the end, for
            showing text as it comes. Without it the whole generation is one call.
        every: steps between two calls.

    Returns:
        The last state.

    Raises:
        ValueError: if the source is missing or cannot fill the tree, ``every`` is below 1.
    """
    depth = rules.tree.max_depth
    if depth and source is None:
        raise ValueError(f"the tree guesses {depth} tokens ahead, but no source of guesses is given")
    if source is not None:
        source.check(rules, state)
    if every < 1:
        raise ValueError(f"every is {every}, expected at least 1")
    length = state.tokens.shape[1]
    if callback is None:
        return advance(params, source, state, jnp.int32(length), model=model, rules=rules)
    callback(np.asarray(state.tokens), np.asarray(state.count))
    while not bool(state.done.all()):
        state = advance(params, source, state, jnp.int32(every), model=model, rules=rules)
        callback(np.asarray(state.tokens), np.asarray(state.count))
    return state
