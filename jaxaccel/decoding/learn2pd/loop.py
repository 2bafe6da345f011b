"""The compiled loop of block-wise parallel decoding: shapes never change, and what was cut away is not computed.

The text stays [B, S]; a row's ``length`` says where it ends. A pass over the whole text runs on the shortest of a few
prefixes that holds all unfinished rows (`jax.lax.switch`, of which one branch is executed); with a prefix cache the
same holds for the part from the block on, with a dual cache a pass is one block. Rows go through blocks together, and
a block ends when its last row is done; rows that are done are not counted.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxaccel.decoding.learn2pd.confidence import DiffusionModel, predict
from jaxaccel.decoding.learn2pd.end_of_text import EotRule, best_end, new_length
from jaxaccel.decoding.learn2pd.policies import Oracle, Policy, chosen_by, most_confident, num_transfer_tokens

Cache = Literal["prefix", "dual"]
Remasking = Literal["low_confidence", "random"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is compiled into the loop: hashable."""

    gen_length: int
    block_length: int
    block_steps: int
    mask_id: int
    eot_id: int | None = None
    eot_rule: EotRule | None = None
    cache: Cache | None = None
    mask_removed: bool = False
    cfg_scale: float = 0.0
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    buckets: tuple[int, ...] = ()
    record: bool = False
    oracle: bool = False

    @property
    def cuts(self) -> bool:
        """Whether rows can become shorter."""
        return self.eot_id is not None and self.eot_rule is not None

    @property
    def whole(self) -> bool:
        """Whether predictions of later blocks matter."""
        return self.cuts and self.eot_rule == "reference" and self.cache is None

    @property
    def num_blocks(self) -> int:
        """Blocks of the generated part."""
        return self.gen_length // self.block_length

    @property
    def max_steps(self) -> int:
        """Most passes of a block. Each reveals a token; an oracle's may reveal none and then ends the block."""
        return 2 * self.block_length + 2 if self.oracle else self.block_length


class State(NamedTuple):
    """Between two passes."""

    text: Any  # int32 [B, S]
    length: Any  # int32 [B], tokens that are left of S
    forwards: Any  # int32 [B]
    revealed_at: Any  # int32 [B, G], number of the pass, -1 where still masked
    query_lengths: Any  # int32 [B, F], -1 after the last pass
    confidence: Any  # float32 [B, blocks, steps, b] of each pass; () unless it records
    correct: Any  # bool [B, blocks, steps, b], whether the prediction equals the oracle's answer
    recorded: Any  # bool [B, blocks, steps]


class Prediction(NamedTuple):
    """What a pass says about a block."""

    tokens: Any  # int32 [B, b]
    confidence: Any  # float32 [B, b]
    end: Any  # int32 [B], position of the most confident end of text, S where there is none; None without rule (b)


class Passes:
    """Passes through the model, for one prompt length: static numbers beside the arrays that each call is given."""

    def __init__(self, model: Any, params: Any, rules: Rules, prompt_length: int) -> None:
        self.model, self.params, self.rules = model, params, rules
        self.prompt, self.total = prompt_length, prompt_length + rules.gen_length

    def _call(self, tokens: Array, key_mask: Array | None, **options: Any) -> Any:
        call = self.model.hidden if isinstance(self.model, DiffusionModel) else self.model
        if key_mask is not None:
            options["key_mask"] = key_mask
        return call(self.params, tokens, **options)

    def _twice(self, array: Array, without: Array | None = None) -> Array:
        """With guidance, a batch and the same again, with another version of it."""
        if not self.rules.cfg_scale:
            return array
        return jnp.concatenate([array, array if without is None else without])

    def _predict(self, rows: Array, at: Array, text: Array, length: Array, keys: Any) -> tuple[Array, Array, Array]:
        """Tokens, confidences, and which of the positions ``at`` [n] are masked."""
        rules = self.rules
        if keys is not None:  # a position draws the same whatever else is computed with it
            keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(at))(keys)
        tokens, confidence = predict(
            self.model, self.params, rows, mask_id=rules.mask_id, cfg_scale=rules.cfg_scale,
            temperature=rules.temperature, keys=keys,
        )  # fmt: skip
        here = jax.lax.dynamic_slice_in_dim(text, at[0], at.shape[0], 1)
        return tokens, confidence, (here == rules.mask_id) & (at < length[:, None])

    def _block(self, rows: Array, start: Array, text: Array, length: Array, keys: Any) -> Prediction:
        """The prediction from the rows of a block alone."""
        rules = self.rules
        at = start + jnp.arange(rules.block_length)
        tokens, confidence, masked = self._predict(rows, at, text, length, keys)
        end = None
        if rules.cuts and rules.eot_rule == "reference":
            index = best_end(tokens, confidence, masked, rules.eot_id or 0)
            end = jnp.where(index < rules.block_length, start + index, self.total)
        return Prediction(tokens, confidence, end)

    def _full(self, blocks: int, text: Array, length: Array, start: Array, keys: Any) -> tuple[Prediction, Any]:
        """A pass over the prompt and the first ``blocks`` blocks."""
        rules, count = self.rules, self.prompt + blocks * self.rules.block_length
        tokens = text[:, :count]
        seen = jnp.arange(count) < length[:, None] if rules.cuts else None
        unprompted = jnp.where(jnp.arange(count) < self.prompt, rules.mask_id, tokens)
        tokens = self._twice(tokens, unprompted)
        seen = None if seen is None else self._twice(seen)
        if rules.cache is None:
            rows, kv = self._call(tokens, seen), ()
        else:
            rows, kv = self._call(tokens, seen, return_kv=True)
            short = self.total - count
            kv = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, short), (0, 0), (0, 0)]), kv)
        if not rules.whole:
            block = jax.lax.dynamic_slice_in_dim(rows, start, rules.block_length, 1)
            return self._block(block, start, text, length, keys), kv
        at = self.prompt + jnp.arange(count - self.prompt)
        all_tokens, confidence, masked = self._predict(rows[:, self.prompt :], at, text, length, keys)
        index = best_end(all_tokens, confidence, masked, rules.eot_id or 0)
        end = jnp.where(index < len(at), self.prompt + index, self.total)
        tokens, own = (
            jax.lax.dynamic_slice_in_dim(x, start - self.prompt, rules.block_length, 1)
            for x in (all_tokens, confidence)
        )
        return Prediction(tokens, own, end), kv

    def full(self, text: Array, length: Array, start: Array, unfinished: Array, keys: Any) -> tuple[Prediction, Any]:
        """A pass over the text, as far as unfinished rows reach."""
        rules = self.rules
        if not rules.cuts:
            return self._full(rules.num_blocks, text, length, start, keys)
        needed = jnp.max(jnp.where(unfinished, length, 0)) - self.prompt
        return self._switch(self._full, needed, text, length, start, keys)

    def _switch(self, branch: Any, needed: Array, *operands: Any) -> Any:
        sizes = self.rules.buckets
        index = jnp.sum(jnp.array(sizes) * self.rules.block_length < needed)
        return jax.lax.switch(index, [functools.partial(branch, blocks) for blocks in sizes], *operands)

    def _part(
        self, blocks: int, text: Array, length: Array, seen: Array, start: Array, kv: Any, keys: Any
    ) -> tuple[Prediction, Any]:
        """A pass over ``blocks`` blocks from a block on, beside the kept keys and values of the rest."""
        rules, count = self.rules, blocks * self.rules.block_length
        at = start + jnp.arange(count)
        # Positions beyond the end are computed and thrown away: buckets may reach further than the text.
        padded = jnp.pad(text, ((0, 0), (0, rules.gen_length)), constant_values=rules.mask_id)
        tokens = jax.lax.dynamic_slice_in_dim(padded, start, count, 1)
        positions = jnp.where(at < length[:, None], at, self.total)
        mask = self._twice(jnp.arange(self.total) < seen[:, None]) if rules.cuts else None
        tokens, positions = self._twice(tokens), self._twice(positions)
        rows, kv = self._call(tokens, mask, kv=kv, positions=positions, return_kv=True)
        prediction = self._block(rows[:, : rules.block_length], start, text, length, keys)
        return prediction, kv if rules.cache == "dual" else ()

    def part(
        self, text: Array, length: Array, before: Array, start: Array, unfinished: Array, kv: Any, keys: Any
    ) -> tuple[Prediction, Any]:
        """A pass with the cache that the block's first pass left.

        Args:
            text: all of it.
            length: of each row.
            before: lengths when the cache was filled.
            start: of the block.
            unfinished: rows.
            kv: the cache.
            keys: of the rows.
        """
        rules = self.rules
        if rules.cache == "dual":
            seen = length if rules.mask_removed else before  # the reference goes on seeing what was cut away
            return self._part(1, text, length, seen, start, kv, keys)
        longest = jnp.max(jnp.where(unfinished, length, 0)) if rules.cuts else self.total
        prediction, _ = self._switch(self._part, longest - start, text, length, length, start, kv, keys)
        return prediction, kv


def _masked(state: State, start: Array, rules: Rules) -> tuple[Int[Array, "B b"], Bool[Array, "B b"]]:
    """Tokens of a block, and which of them are to be revealed."""
    now = jax.lax.dynamic_slice_in_dim(state.text, start, rules.block_length, 1)
    inside = start + jnp.arange(rules.block_length) < state.length[:, None]
    return now, (now == rules.mask_id) & inside


def _reveal(
    state: State, prediction: Prediction, policy: Policy, quota: Array, start: Array, step: Array, block: Array,
    previous: Array, queries: Array, keys: Any, rules: Rules, prompt: int,
) -> State:  # fmt: skip
    """Reveal what is final, cut where the text ends, count the pass."""
    now, masked = _masked(state, start, rules)
    active = masked.any(-1)
    tokens = prediction.tokens
    inside = start + jnp.arange(rules.block_length) < state.length[:, None]
    confidence = jnp.where(inside, prediction.confidence, 0)
    reference = None
    if isinstance(policy, Oracle):
        reference = jax.lax.dynamic_slice_in_dim(policy.reference, start - prompt, rules.block_length, 1)
        correct = tokens == reference
    own = chosen_by(policy, confidence, masked, tokens=tokens, reference=reference)
    if isinstance(policy, Oracle):
        stuck = (step > 0) & jnp.all((tokens == previous) | ~inside, -1, keepdims=True)
        accepted = own | (masked & stuck)
        assert reference is not None
        tokens = jnp.where(stuck, reference, tokens)
    else:
        order = confidence
        if rules.remasking == "random":
            draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (rules.block_length,)))
            order = draw(keys)
        accepted = own | most_confident(order, masked, quota)
    text = jax.lax.dynamic_update_slice_in_dim(state.text, jnp.where(accepted, tokens, now), start, 1)
    at = start - prompt
    when = jax.lax.dynamic_slice_in_dim(state.revealed_at, at, rules.block_length, 1)
    when = jnp.where(accepted, state.forwards[:, None], when)
    length = state.length
    if rules.cuts:
        sure = (own if rules.eot_rule == "reference" else accepted) & (tokens == rules.eot_id)
        length = jnp.where(active, new_length(length, start, sure=sure, candidate=prediction.end), length)
    column = jnp.arange(state.query_lengths.shape[1]) == state.forwards[:, None]
    state = state._replace(
        text=text,
        length=length,
        forwards=state.forwards + active,
        revealed_at=jax.lax.dynamic_update_slice_in_dim(state.revealed_at, when, at, 1),
        query_lengths=jnp.where(column & active[:, None], queries[:, None], state.query_lengths),
    )
    if rules.record:
        used = state.recorded.at[:, block, step].set(active)
        state = state._replace(
            confidence=state.confidence.at[:, block, step].set(confidence),
            correct=state.correct.at[:, block, step].set(correct),
            recorded=used,
        )
    return state


def _start(prompt: Array, rules: Rules) -> State:
    batch = len(prompt)
    masks = jnp.full((batch, rules.gen_length), rules.mask_id, jnp.int32)
    text = jnp.concatenate([prompt.astype(jnp.int32), masks], 1)
    passes = rules.num_blocks * rules.max_steps
    shape = (batch, rules.num_blocks, rules.max_steps)
    records: tuple[Any, ...] = ((), (), ())
    if rules.record:
        wide = (*shape, rules.block_length)
        records = (jnp.zeros(wide, jnp.float32), jnp.zeros(wide, bool), jnp.zeros(shape, bool))
    zeros = jnp.zeros(batch, jnp.int32)
    return State(
        text, zeros + text.shape[1], zeros, jnp.full(masks.shape, -1, jnp.int32),
        jnp.full((batch, passes), -1, jnp.int32), *records,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "rules"))
def run(params: Any, prompt: Int[Array, "B P"], policy: Policy, key: Any, *, model: Any, rules: Rules) -> State:
    """Decode prompts to the end.

    Args:
        params: of the model.
        prompt: ids.
        policy: which predictions are revealed.
        key: for a temperature or random remasking; else ``None``.
        model: a `DiffusionModel`, or a function that returns logits.
        rules: of the loop.
    """
    size, width = prompt.shape[1], rules.block_length
    passes = Passes(model, params, rules, size)

    def keys_of(block: Array, step: Array) -> Any:
        if key is None:
            return None
        now = jax.random.fold_in(jax.random.fold_in(key, block), step)
        return jax.vmap(lambda row: jax.random.fold_in(now, row))(jnp.arange(len(prompt)))

    def block_of(carry: tuple[Array, State]) -> tuple[Array, State]:
        block, state = carry
        start = size + block * width
        quota = num_transfer_tokens(jnp.sum(_masked(state, start, rules)[1], -1), steps=rules.block_steps)
        before = state.length

        def reveal(state: State, step: Array, previous: Array, prediction: Prediction, queries: Array) -> State:
            column = jnp.minimum(step, rules.block_steps - 1)
            now = jax.lax.dynamic_index_in_dim(quota, column, 1, keepdims=False)
            now = jnp.where(step < rules.block_steps, now, 1)
            return _reveal(
                state, prediction, policy, now, start, step, block, previous, queries, keys_of(block, step), rules, size
            )

        def whole(state: State, step: Array, previous: Array) -> tuple[State, Array, Any]:
            unfinished = _masked(state, start, rules)[1].any(-1)
            prediction, kv = passes.full(state.text, state.length, start, unfinished, keys_of(block, step))
            return reveal(state, step, previous, prediction, state.length), prediction.tokens, kv

        def partly(state: State, step: Array, previous: Array, kv: Any) -> tuple[State, Array, Any]:
            unfinished = _masked(state, start, rules)[1].any(-1)
            end = state.length if rules.cache == "prefix" else jnp.minimum(state.length, start + width)
            keys = keys_of(block, step)
            prediction, kv = passes.part(state.text, state.length, before, start, unfinished, kv, keys)
            return reveal(state, step, previous, prediction, end - start), prediction.tokens, kv

        def going(carry: Any) -> Bool[Array, ""]:
            state, step = carry[:2]
            return _masked(state, start, rules)[1].any() & (step < rules.max_steps)

        first, none = jnp.int32(0), jnp.full((len(prompt), width), -1, jnp.int32)
        if rules.cache is None:

            def again(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
                state, tokens, _ = whole(carry[0], carry[1], carry[2])
                return state, carry[1] + 1, tokens

            return block + 1, jax.lax.while_loop(going, again, (state, first, none))[0]
        state, tokens, kv = whole(state, first, none)
        if rules.cache == "prefix":

            def suffix(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
                state, tokens, _ = partly(*carry, kv)
                return state, carry[1] + 1, tokens

            return block + 1, jax.lax.while_loop(going, suffix, (state, first + 1, tokens))[0]

        def inside(carry: tuple[State, Array, Array, Any]) -> tuple[State, Array, Array, Any]:
            state, tokens, kept = partly(*carry)
            return state, carry[1] + 1, tokens, kept

        return block + 1, jax.lax.while_loop(going, inside, (state, first + 1, tokens, kv))[0]

    def unfinished(carry: tuple[Array, State]) -> Bool[Array, ""]:
        block, state = carry
        return (block < rules.num_blocks) & jnp.any(state.length > size + block * width)

    return jax.lax.while_loop(unfinished, block_of, (jnp.int32(0), _start(prompt, rules)))[1]
