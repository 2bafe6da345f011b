"""Where guesses come from: speculative heads, a smaller model, or the text itself.

Each is a `jaxaccel.decoding.generate.DraftSource`, that is, one loop serves them all, and none of them changes what is
written: greedy text stays what it is, and sampled text keeps its law.

- `DraftHeads`: a tree of guesses from the model's last hidden state (Medusa). Cheapest; the heads must be trained.
- `DraftModel`: a chain written by a smaller model with the same vocabulary, a pass of it per guess. Nothing is trained.
- `PromptLookup`: what followed when the last few tokens occurred before. Free; right where a text repeats itself, as
  summaries, edits and code do.

Sources: Cai et al., Medusa, arXiv 2401.10774; Leviathan et al., arXiv 2211.17192; Saxena, Prompt Lookup Decoding, 2023
(github apoorvumang/prompt-lookup-decoding).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxaccel.decoding.generate import CachedModel, GenerationState, Proposal, Rules
from jaxaccel.decoding.medusa import MedusaParams, medusa_hidden, medusa_logits
from jaxaccel.decoding.sampling import law_logits
from jaxaccel.decoding.tree import chain
from jaxaccel.decoding.verify import propose


class DraftHeads(NamedTuple):
    """Speculative heads as the loop takes them: a pytree.

    Guessing among the few thousand tokens that are guessed at all, instead of the whole vocabulary, costs a draft that
    much less memory traffic; a token outside is never guessed, and the text stays the same.
    """

    medusa: MedusaParams
    rows: Any = None  # [V', D], rows of the model's output matrix, for heads without a vocabulary matrix of their own
    token_ids: Any = None  # int32 [V'], the tokens that are guessed; None for the whole vocabulary

    def check(self, rules: Rules, state: GenerationState) -> None:
        """Raise a `ValueError` if the tree is deeper than there are heads, or they belong to another model."""
        count, _, width, _ = self.medusa.weight.shape
        depth = rules.tree.max_depth
        if count < depth:
            raise ValueError(f"the tree guesses {depth} tokens ahead, but there are only {count} heads")
        if width != state.hidden.shape[-1]:
            raise ValueError(
                f"heads are for a model of width {width}, but this one has {state.hidden.shape[-1]}: they belong to "
                "another model"
            )

    def propose(self, model: CachedModel, params: Any, state: GenerationState, rules: Rules, key: Any) -> Proposal:
        """The likeliest tokens of each head, never drawn."""
        medusa = self.medusa
        if medusa.vocab is None and self.rows is None:  # they share the model's own
            guesses = model.logits(params, medusa_hidden(medusa, state.hidden).astype(state.hidden.dtype))
        else:
            guesses = medusa_logits(medusa, state.hidden, lm_head=self.rows)
        tokens, _ = propose(guesses, None, rules.tree, root=state.last, token_ids=self.token_ids)
        return Proposal(tokens, None, state.draft)

    def accept(self, draft: Any, last: Array, emitted: Array, accepted: Array, rules: Rules) -> Any:
        """Heads remember nothing."""
        return draft


def _check_chain(rules: Rules, what: str) -> None:
    depth = rules.tree.max_depth
    if depth < 1:
        raise ValueError(f"the tree has no guesses, but {what} is given: expected chain(n) with n at least 1")
    if rules.tree.paths != chain(depth).paths:
        raise ValueError(f"the tree branches, but {what} guesses one token after the other: expected chain({depth})")


class Behind(NamedTuple):
    """What a draft model remembers: a pytree."""

    cache: Any  # all tokens but the last two
    previous: Any  # int32 [B], the token before the last


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("model",))
@dataclasses.dataclass(frozen=True)
class DraftModel:
    """A smaller model that writes a chain of guesses: a pytree.

    Its cache is kept one token behind that of the large model. So each chain starts with a pass of two tokens, whether
    the last guess of the chain before stood or not, and the n guesses take n passes.
    """

    params: Any
    model: CachedModel
    """Its functions, with ``rewind``. Static."""

    def begin(self, cache: Any, previous: Int[Array, "B"]) -> Behind:
        """What it remembers after a prompt, all of which is in ``cache`` and whose last token is ``previous``.

        Raises:
            ValueError: if its model cannot rewind a cache.
        """
        if self.model.rewind is None:
            raise ValueError("the draft model's functions have no rewind: guesses that fall could not be forgotten")
        return Behind(self.model.rewind(cache, jnp.ones_like(previous)), previous)

    def check(self, rules: Rules, state: GenerationState) -> None:
        """Raise a `ValueError` if the tree is no chain, or the state was not begun."""
        _check_chain(rules, "a draft model")
        if not isinstance(state.draft, Behind):
            raise ValueError("the state has no cache of the draft model: put DraftModel.begin(...) into state.draft")

    def propose(self, model: CachedModel, params: Any, state: GenerationState, rules: Rules, key: Any) -> Proposal:
        """Drawn by the rules of sampling where there is a key, else the likeliest."""
        depth, own = rules.tree.max_depth, self.model
        cache, previous = state.draft
        seen = state.seen if rules.sampling.repetition_penalty != 1 else None
        rows = jnp.arange(len(previous))

        def read(tokens: Array, cache: Any) -> tuple[Array, Any]:
            count = tokens.shape[1]
            positions = cache.position[:, None] + jnp.arange(count)
            mask = jnp.tril(jnp.ones((count, count), bool))
            hidden, new = own.forward(self.params, tokens, cache, positions, mask, ~state.done)
            return own.logits(self.params, hidden[:, -1]), new

        def choose(logits: Array, seen: Any, key: Any) -> tuple[Array, Any]:
            law = law_logits(logits, rules.sampling, seen=seen)
            if key is None:
                return jnp.argmax(law, -1).astype(jnp.int32), ()
            return jax.random.categorical(key, law).astype(jnp.int32), law

        def store(cache: Any, new: Any, token: Array, count: int) -> Any:
            # The count is known only once the token is: the cache has been read by then, and is written in place.
            return own.append(cache, new, None, jnp.where(token >= 0, count, 0))

        def after(seen: Any, token: Array) -> Any:
            return None if seen is None else seen.at[rows, token].set(True)

        keys = [None] * depth if key is None else jax.random.split(key, depth)
        logits, new = read(jnp.stack([previous, state.last], 1), cache)
        token, law = choose(logits, seen, keys[0])
        cache = store(cache, new, token, 2)

        def write(carry: Any, key: Any) -> tuple[Any, Any]:
            cache, token, seen = carry
            logits, new = read(token[:, None], cache)
            chosen, law = choose(logits, seen, key)
            return (store(cache, new, chosen, 1), chosen, after(seen, chosen)), (chosen, law)

        start = (cache, token, after(seen, token))
        (cache, _, _), later = jax.lax.scan(write, start, None if key is None else keys[1:], length=depth - 1)
        tokens, laws = jax.tree.map(
            lambda one, more: jnp.moveaxis(jnp.concatenate([one[None], more]), 0, 1), (token, law), later
        )
        tokens = jnp.concatenate([state.last[:, None], tokens], 1)
        return Proposal(tokens, None if key is None else laws, Behind(cache, previous))

    def accept(self, draft: Behind, last: Array, emitted: Array, accepted: Array, rules: Rules) -> Behind:
        """Forget the guesses that fell, and the last that stood, which the next chain reads again."""
        assert self.model.rewind is not None
        cache = self.model.rewind(draft.cache, rules.tree.max_depth - accepted)
        before = jnp.concatenate([last[:, None], emitted], 1)
        return Behind(cache, jnp.take_along_axis(before, accepted[:, None], 1)[:, 0])


class TextSoFar(NamedTuple):
    """What prompt lookup remembers: a pytree."""

    tokens: Any  # int32 [B, S], prompt and what was emitted; padding after `length`
    length: Any  # int32 [B]


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("ngram",))
@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Guess what followed the latest earlier place that ends like the text, by up to ``ngram`` tokens.

    Of several places the one that agrees in most tokens is taken, and of these the latest. Where a place is so close to
    the end that the text runs out, it is repeated from there. Where the last token never occurred, it is guessed again.
    """

    ngram: int = 3
    """Tokens that are compared, at most."""

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}, expected at least 1")

    def begin(
        self, tokens: Int[Array, "B T"], length: Int[Array, "B"], last: Int[Array, "B"], *, room: int
    ) -> TextSoFar:
        """What it remembers after prompts and the first token, ``last``, with room for so many more."""
        padded = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, room)))
        rows = jnp.arange(len(tokens))
        return TextSoFar(padded.at[rows, length].set(last), length.astype(jnp.int32) + 1)

    def check(self, rules: Rules, state: GenerationState) -> None:
        """Raise a `ValueError` if the tree is no chain, or the state was not begun."""
        _check_chain(rules, "prompt lookup")
        if not isinstance(state.draft, TextSoFar):
            raise ValueError("the state has no text to look into: put PromptLookup.begin(...) into state.draft")

    def propose(self, model: CachedModel, params: Any, state: GenerationState, rules: Rules, key: Any) -> Proposal:
        """What followed, never drawn."""
        text, length = state.draft
        places = jnp.arange(text.shape[1])
        agree = jnp.zeros(text.shape, jnp.int32)
        still = places < length[:, None] - 1
        for back in range(self.ngram):
            at = length - 1 - back
            token = jnp.take_along_axis(text, jnp.maximum(at, 0)[:, None], 1)
            still &= (places >= back) & (at >= 0)[:, None] & (jnp.roll(text, back, 1) == token)
            agree += still
        place = jnp.argmax(agree * text.shape[1] + places * (agree > 0), -1)
        place = jnp.where(agree.max(-1) > 0, place, length - 2)[:, None]
        period = jnp.maximum(length[:, None] - 1 - place, 1)
        index = place + 1 + jnp.arange(rules.tree.max_depth) % period
        guesses = jnp.take_along_axis(text, index, 1)
        return Proposal(jnp.concatenate([state.last[:, None], guesses], 1), None, state.draft)

    def accept(self, draft: TextSoFar, last: Array, emitted: Array, accepted: Array, rules: Rules) -> TextSoFar:
        """Write down what was emitted; what a finished sequence adds beyond the room is dropped."""
        columns, size = jnp.arange(emitted.shape[1]), draft.tokens.shape[1]
        at = jnp.where(columns <= accepted[:, None], draft.length[:, None] + columns, size)
        tokens = draft.tokens.at[jnp.arange(len(emitted))[:, None], at].set(emitted, mode="drop")
        return TextSoFar(tokens, jnp.minimum(draft.length + accepted + 1, size))
