"""A draft model and prompt lookup in the generation loop.

What would be wrong without anyone noticing: a draft whose cache holds guesses that fell, or misses one that stood,
still gives the right text, only more slowly. So how many guesses stand is compared with a plain simulation. And
sampled text must have the target's law.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxaccel.decoding import DraftModel, MedusaConfig, PromptLookup, chain, init_medusa_heads, make_tree, run, start
from jaxaccel.decoding.generate import CachedModel, Rules, Typical, advance
from jaxaccel.decoding.sampling import Sampling
from jaxaccel.models.decoder import decoder_forward, decoder_logits, init_params, stack_layers
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.drafts import DraftDecoder, Drafts, Lookup, cached_model
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.kv_cache import BlockTopK, rewind
from jaxaccel.models.prompts import prefill

TINY = DecoderConfig.tiny(max_positions=128)
PROMPTS = [np.random.default_rng(i).integers(0, 61, n).tolist() for i, n in enumerate((5, 17, 1))]
NEW, GUESSES = 14, 3


def disturbed(params, size):
    """Weights near the target's: a draft that is often, not always right."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(
        tree, [w + size * jnp.std(w) * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda w: 4 * w if w.ndim == 2 else w, init_params(jax.random.key(3), TINY))


@pytest.fixture(scope="module")
def draft_params(params):
    return disturbed(params, 0.3)


@pytest.fixture(scope="module")
def ready(params):
    return prepare(params)


@pytest.fixture(scope="module")
def plain(ready):
    return np.asarray(generate(ready, PROMPTS, TINY, max_new_tokens=NEW).tokens)


@pytest.fixture(scope="module")
def next_of_draft(draft_params):
    @jax.jit
    def chosen(text):
        return jnp.argmax(decoder_logits(draft_params, decoder_forward(draft_params, text, TINY).hidden), -1)

    def after(tokens):
        text = np.zeros((1, 40), np.int32)
        text[0, : len(tokens)] = tokens
        return int(chosen(jnp.asarray(text))[0, len(tokens) - 1])

    return after


def stood(prompt, text, guess):
    """Steps in which 0, 1, ... guesses stand, when ``guess`` continues each text by a token: no cache, no batch."""
    counts, emitted = np.zeros(GUESSES + 1, int), 1
    while emitted < NEW:
        before, right = [*prompt, *text[:emitted]], 0
        for _ in range(GUESSES):
            if emitted + right >= NEW:  # beyond the text: as it may be
                return counts, emitted
            token = guess(before)
            if token != text[emitted + right]:
                break
            before, right = [*before, token], right + 1
        counts[right] += 1
        emitted += right + 1
    return counts, emitted


def lookup(prompt_and_text, ngram=3):
    """The rule of prompt lookup, from its description: all guesses come from one place."""
    text = list(prompt_and_text)
    best = (0, len(text) - 2)
    for place in range(len(text) - 1):
        same = 0
        while same < min(ngram, place + 1) and text[place - same] == text[len(text) - 1 - same]:
            same += 1
        best = max(best, (same, place)) if same else best
    after = text[best[1] + 1 :]
    return list(itertools.islice(itertools.cycle(after), GUESSES))


def test_a_draft_model_changes_no_text_and_as_many_guesses_stand_as_by_full_passes(
    ready, plain, draft_params, next_of_draft
):
    drafts = DraftDecoder(prepare(draft_params), TINY, GUESSES)
    out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, drafts=drafts)
    np.testing.assert_array_equal(out.tokens, plain)
    wanted = np.zeros(GUESSES + 1, int)
    ended = 0
    for prompt, text in zip(PROMPTS, plain.tolist(), strict=True):
        counts, emitted = stood(prompt, text, next_of_draft)
        wanted, ended = wanted + counts, ended + (emitted >= NEW)
    got = np.asarray(out.histogram)
    # A step in which the end of the text cuts the guesses short is in one of the four places, known only to the loop.
    assert (got >= wanted).all()
    assert got.sum() - wanted.sum() == len(PROMPTS) - ended
    assert (wanted[[0, 1]] > 0).all()
    assert wanted[3] > 0


def test_the_model_itself_as_its_draft_is_always_right(ready, params, plain):
    scanned = dataclasses.replace(TINY, scan_layers=True)
    out = generate(
        ready, PROMPTS, TINY, max_new_tokens=NEW, drafts=DraftDecoder(stack_layers(params), scanned, GUESSES)
    )
    np.testing.assert_array_equal(out.tokens, plain)
    assert int(out.steps) == -(-(NEW - 1) // (GUESSES + 1))
    assert out.histogram.tolist()[:3] == [0, 0, 0]


def test_one_guess_and_stop_tokens_and_streams(ready, plain, draft_params):
    drafts = DraftDecoder(prepare(draft_params), TINY, 1)
    stop, heard = int(plain[1, 4]), []
    out = generate(
        ready, PROMPTS, TINY, max_new_tokens=NEW, drafts=drafts, stop_ids=[stop], pad_id=60, every=2,
        callback=lambda tokens, count: heard.append(count.tolist()),
    )  # fmt: skip
    for row, (tokens, count) in enumerate(zip(np.asarray(out.tokens), out.count.tolist(), strict=True)):
        ends = np.flatnonzero(plain[row] == stop)
        assert count == (ends[0] + 1 if len(ends) else NEW)
        np.testing.assert_array_equal(tokens[:count], plain[row, :count])
        assert (tokens[count:] == 60).all()
    assert heard[0] == [1, 1, 1]
    assert heard[-1] == out.count.tolist()


def test_prompt_lookup_changes_no_text_and_guesses_by_its_rule(ready, plain):
    # A prompt that goes on by itself gives the rule something to find.
    prompts = [[*PROMPTS[0], *plain[0, :9].tolist(), *PROMPTS[0]], PROMPTS[1], PROMPTS[2]]
    wanted = np.asarray(generate(ready, prompts, TINY, max_new_tokens=NEW).tokens)
    out = generate(ready, prompts, TINY, max_new_tokens=NEW, drafts=Lookup(GUESSES))
    np.testing.assert_array_equal(out.tokens, wanted)
    state = start(
        jnp.zeros((1, 61)), jnp.zeros((1, 32)), None, rules=Rules(tree=chain(GUESSES)), max_new_tokens=4
    )  # fmt: skip
    rule = PromptLookup(3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        text = rng.integers(0, 3, rng.integers(2, 12))
        padded = jnp.asarray(np.pad(text, (0, 12 - len(text)), constant_values=1)[None], jnp.int32)
        begun = rule.begin(padded, jnp.array([len(text) - 1]), jnp.asarray(text[-1:]), room=4)
        now = state._replace(draft=begun, last=jnp.asarray(text[-1:], jnp.int32))
        proposal = rule.propose(cached_model(TINY), None, now, Rules(tree=chain(GUESSES)), None)
        assert proposal.tokens[0].tolist() == [text[-1], *lookup(text)]
        # What is emitted is found again.
        more = rule.accept(begun, now.last, jnp.array([[7, 8, 9, 9]]), jnp.array([1]), Rules())
        assert more.tokens[0, : int(more.length[0])].tolist() == [*text, 7, 8]


SMALL = DecoderConfig.tiny(vocab_size=4, num_layers=1, max_positions=32)


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_sampled_text_has_the_law_of_the_target(kind):
    """Four tokens of thousands of rows at once: two or more steps, guesses that stand and fall."""
    rows, new = 8_000, 4
    params = jax.tree.map(lambda w: 9 * w if w.ndim == 2 else w, init_params(jax.random.key(0), SMALL))
    sampling = Sampling(temperature=1.3, top_k=3)
    drafts = DraftDecoder(prepare(disturbed(params, 0.5)), SMALL, 2) if kind == "model" else Lookup(2)
    prompt = [1, 2, 0, 1]
    out = generate(
        prepare(params), np.tile(prompt, (rows, 1)), SMALL, max_new_tokens=new, sampling=sampling, drafts=drafts,
        key=jax.random.key(5),
    )  # fmt: skip
    assert (np.asarray(out.histogram) > rows // 20).all()
    texts = np.array(list(itertools.product(range(4), repeat=new)))
    full = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)
    logits = decoder_logits(params, decoder_forward(params, jnp.asarray(full), SMALL).hidden)
    logits = np.asarray(logits, np.float64)[:, len(prompt) - 1 : -1] / 1.3
    logits[logits < np.sort(logits, -1)[..., 1:2]] = -np.inf  # the three likeliest of four
    laws = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    law = np.take_along_axis(laws, texts[..., None], -1)[..., 0].prod(-1)
    assert abs(law.sum() - 1) < 1e-9
    counts = np.bincount(np.asarray(out.tokens) @ 4 ** np.arange(new)[::-1], minlength=len(texts))
    expected = rows * law
    assert counts[law == 0].sum() == 0
    rare = (expected < 8) & (law > 0)  # together, as the chi-square test needs a few of each
    cells = np.append(counts[expected >= 8], counts[rare].sum())
    means = np.append(expected[expected >= 8], expected[rare].sum())
    assert stats.chi2.sf(((cells - means) ** 2 / means).sum(), len(cells) - 1) > 1e-4


def test_the_same_key_gives_the_same_text_and_rules_compose(ready, plain, draft_params):
    drafts = DraftDecoder(prepare(draft_params), TINY, 2)
    free = Sampling(temperature=1.0, repetition_penalty=1.3, top_p=0.9, vocab_size=50)
    rest = {"max_new_tokens": NEW, "sampling": free, "drafts": drafts}
    draw = [np.asarray(generate(ready, PROMPTS, TINY, key=jax.random.key(k), **rest).tokens) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    assert max(map(np.max, draw)) < 50
    # Near zero temperature the typical rule takes the argmax alone.
    out = generate(
        ready, PROMPTS, TINY, max_new_tokens=NEW, sampling=Sampling(temperature=1e-4), drafts=drafts,
        typical=Typical(), key=jax.random.key(0),
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, plain)


def test_steps_copy_neither_cache(ready, draft_params):
    tokens, length = jnp.ones((1, 8), jnp.int32), jnp.full(1, 8, jnp.int32)
    parts = prefill(ready, tokens, length, TINY, room=69)
    source, draft = DraftDecoder(draft_params, TINY, 2).source(ready, tokens, length, tokens[:, 0], 70)
    rules = Rules(tree=chain(2))
    state = start(*parts, rules=rules, max_new_tokens=60)._replace(draft=draft)
    compiled = advance.lower(ready, source, state, jnp.int32(60), model=cached_model(TINY), rules=rules).compile()
    text = compiled.as_text()
    for slots in (77, 78):
        shape = f"f32[1,{TINY.num_kv_heads},{slots},{TINY.head_dim}]"
        assert shape in text
        assert [line for line in text.splitlines() if shape in line and " copy(" in line] == []


def test_bad_input(ready, params):
    other = dataclasses.replace(TINY, vocab_size=60)
    short = dataclasses.replace(TINY, max_positions=20)
    for drafts, message in (
        (DraftDecoder(params, other), "the draft model has 60 tokens, and the target 61: expected one vocabulary"),
        (DraftDecoder(params, dataclasses.replace(TINY, attention="block_topk")), "reads its cache by blocks"),
        (
            DraftDecoder(params, short),
            "a prompt of 17 tokens and 14 new ones do not fit into the 20 positions",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(ready, PROMPTS, TINY, max_new_tokens=NEW, drafts=drafts)
    for make, message in (
        (lambda: DraftDecoder(params, TINY, 0), "num_tokens is 0, expected at least 1"),
        (lambda: Lookup(0), "num_tokens is 0"),
        (lambda: Lookup(2, ngram=0), "ngram is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate(ready, [[1]], TINY, max_new_tokens=NEW, sampling=Sampling(temperature=1.0), drafts=Lookup())
    source = DraftModel(params, cached_model(TINY))
    state = start(jnp.zeros((1, 61)), jnp.zeros((1, 32)), None, rules=Rules(), max_new_tokens=4)
    model = cached_model(TINY)
    for tree, source_, message in (
        (chain(0), source, "the tree has no guesses, but a draft model is given"),
        (make_tree([(0,), (1,)]), source, r"the tree branches, but a draft model .* expected chain\(1\)"),
        (chain(2), source, "the state has no cache of the draft model"),
        (chain(2), PromptLookup(), "the state has no text to look into"),
        (chain(2), None, "the tree guesses 2 tokens ahead, but no source of guesses is given"),
    ):
        with pytest.raises(ValueError, match=message):
            run(params, state, model=model, rules=Rules(tree=tree), source=source_)
    blind = CachedModel(*model[:3])
    with pytest.raises(ValueError, match="have no rewind"):
        DraftModel(params, blind).begin(None, jnp.array([1]))
    cache = prefill(
        ready, jnp.ones((1, 64), jnp.int32), jnp.array([64]), TINY, room=8,
        sparse=BlockTopK(num_blocks=1, block_size=4, num_sink=4, num_local=4),
    )[2]  # fmt: skip
    with pytest.raises(ValueError, match="read by blocks cannot be rewound"):
        rewind(cache, jnp.array([1]))


def test_heads_are_still_a_source(ready, plain):
    heads = init_medusa_heads(jax.random.key(0), 32, 61, config=MedusaConfig(num_heads=2))
    out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, drafts=Drafts(heads, chain(2)))
    np.testing.assert_array_equal(out.tokens, plain)
