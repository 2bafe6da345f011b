"""Generation: equal to a plain loop over full passes, whatever is combined; the same on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.decoding import MedusaConfig, chain, init_medusa_heads, make_tree
from jaxaccel.decoding.drafts import DraftHeads
from jaxaccel.decoding.generate import PLAIN, Rules, Typical, advance, start
from jaxaccel.decoding.sampling import Sampling
from jaxaccel.models.decoder import decoder_forward, decoder_logits, init_params, stack_layers
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.drafts import Drafts, cached_model
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.kv_cache import BlockTopK
from jaxaccel.models.prompts import SnapKV, pad_prompts, prefill

TINY = DecoderConfig.tiny(max_positions=256)
PROMPTS = [np.random.default_rng(i).integers(0, 61, n).tolist() for i, n in enumerate((5, 17, 1, 33))]
NEW = 12


@pytest.fixture(scope="module")
def params():
    # Larger weights than a fresh model's, so that logits differ clearly and ties cannot flip.
    return jax.tree.map(lambda w: 4 * w if w.ndim == 2 else w, init_params(jax.random.key(3), TINY))


@pytest.fixture(scope="module")
def ready(params):
    return prepare(params)


@pytest.fixture(scope="module")
def plain(params):
    """Greedy text by full passes over the text so far."""

    @jax.jit
    def logits(tokens):
        return decoder_logits(params, decoder_forward(params, tokens, TINY).hidden)

    rows = []
    for prompt in PROMPTS:
        text = np.zeros(48, np.int32)
        text[: len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + NEW):
            text[at] = np.argmax(logits(text[None])[0, at - 1])
        rows.append(text[len(prompt) : len(prompt) + NEW])
    return np.array(rows)


@pytest.fixture(scope="module")
def drafts():
    heads = init_medusa_heads(jax.random.key(0), 32, 61, config=MedusaConfig(num_heads=2))
    return Drafts(heads, make_tree([(0,), (1,), (2,), (0, 0), (1, 0), (0, 1)], top_k=4))


def test_greedy_text_is_that_of_full_passes(ready, plain):
    out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain)
    assert out.count.tolist() == [NEW] * 4
    assert int(out.steps) == NEW - 1
    assert out.histogram.tolist() == [4 * (NEW - 1)]


def test_each_prompt_alone_gives_the_same_text(ready, plain):
    for prompt, row in zip(PROMPTS[:2], plain, strict=False):
        np.testing.assert_array_equal(generate(ready, [prompt], TINY, max_new_tokens=NEW).tokens[0], row)


def test_drafts_do_not_change_greedy_text(ready, plain, drafts):
    few = jnp.arange(0, 61, 2)
    shared = drafts.heads._replace(vocab=None)
    for case in (drafts, Drafts(drafts.heads, chain(2)), Drafts(shared, chain(2)), Drafts(shared, drafts.tree, few)):
        out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, drafts=case)
        np.testing.assert_array_equal(out.tokens, plain)
        assert int(out.histogram.sum()) <= 4 * int(out.steps)


def test_perfect_drafts_take_one_pass_for_depth_plus_one_tokens():
    """A model whose next token depends on the last one only, and heads that know it."""
    vocab = 61
    config = DecoderConfig.tiny(vocab_size=vocab, hidden_size=64, num_heads=8, max_positions=128)
    params = init_params(jax.random.key(0), config)
    # Embeddings are unit vectors and the blocks add nothing: the head reads the last token and says 7·t + 3.
    params["layers"] = [layer | {"o": 0 * layer["o"], "down": 0 * layer["down"]} for layer in params["layers"]]
    one_hot = jnp.eye(vocab, 64)
    after = (7 * np.arange(vocab) + 3) % vocab

    def head(power):
        target = np.arange(vocab)
        for _ in range(power):
            target = after[target]
        return jnp.zeros((vocab, 64)).at[target, np.arange(vocab)].set(1.0)

    params |= {"embedding": one_hot, "head": head(1)}
    heads = init_medusa_heads(jax.random.key(0), 64, vocab, config=MedusaConfig(num_heads=3), lm_head=params["head"])
    # The residual block passes hidden states on as they are (V = 0), so a head's vocabulary matrix alone decides.
    heads = heads._replace(vocab=jnp.stack([head(power) for power in (2, 3, 4)]))
    out = generate(prepare(params), [[1, 2], [5]], config, max_new_tokens=13, drafts=Drafts(heads, chain(3)))
    wanted = np.zeros((2, 13), int)
    for row, token in enumerate((2, 5)):
        for column in range(13):
            token = after[token]
            wanted[row, column] = token
    np.testing.assert_array_equal(out.tokens, wanted)
    assert int(out.steps) == 3  # 1 + 3 · 4
    assert out.histogram.tolist() == [0, 0, 0, 6]


def test_stop_tokens_end_a_row_even_inside_an_accepted_run(ready, plain, drafts):
    stop = int(plain[1, 4])
    for extra in ({}, {"drafts": drafts}):
        out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, stop_ids=[stop], pad_id=60, **extra)
        for row, (tokens, count) in enumerate(zip(np.asarray(out.tokens), out.count.tolist(), strict=True)):
            ends = np.flatnonzero(plain[row] == stop)
            assert count == (ends[0] + 1 if len(ends) else NEW)
            np.testing.assert_array_equal(tokens[:count], plain[row, :count])
            assert (tokens[count:] == 60).all()


def test_streaming_tells_growing_text(ready, plain):
    heard = []
    out = generate(
        ready, PROMPTS, TINY, max_new_tokens=NEW, every=4, callback=lambda tokens, count: heard.append((tokens, count))
    )
    np.testing.assert_array_equal(out.tokens, plain)
    assert [count[0] for _, count in heard] == [1, 5, 9, 12]
    for tokens, count in heard:
        np.testing.assert_array_equal(tokens[:, : count[0]], plain[:, : count[0]])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guesses", [False, True])
def test_steps_do_not_copy_the_cache(ready, drafts, batch, guesses):
    """A step reads the cache and writes to it; if writes could come first, XLA would copy all of it, each step."""
    tree = drafts.tree if guesses else PLAIN
    heads = DraftHeads(drafts.heads) if guesses else None
    tokens, length = jnp.ones((batch, 8), jnp.int32), jnp.full(batch, 8, jnp.int32)
    logits, hidden, cache = prefill(ready, tokens, length, TINY, room=69)
    rules = Rules(tree=tree)
    state = start(logits, hidden, cache, rules=rules, max_new_tokens=60)
    compiled = advance.lower(ready, heads, state, jnp.int32(60), model=cached_model(TINY), rules=rules).compile()
    shape = f"f32[{batch},{TINY.num_kv_heads},77,{TINY.head_dim}]"
    text = compiled.as_text()
    assert shape in text
    assert [line for line in text.splitlines() if shape in line and " copy(" in line] == []


def test_scanned_layers_and_eight_devices_give_the_same_text(params, ready, plain):
    scanned = dataclasses.replace(TINY, scan_layers=True)
    out = generate(stack_layers(params), PROMPTS, scanned, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def place(leaf):
        # Rows of matrices over "model": tensor parallel products, XLA adds the communication.
        spec = PartitionSpec("model") if leaf.ndim == 2 and leaf.shape[0] % 2 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    tokens, length = pad_prompts(PROMPTS)
    tokens, length = (jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (tokens, length))
    out = generate(jax.tree.map(place, ready), tokens, TINY, length=length, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain)


def test_snapkv_with_room_for_all_changes_nothing(ready, plain):
    for aggregate in ("mean", "none"):
        snap = SnapKV(capacity=34, window=8, aggregate=aggregate)  # the longest prompt has 33 tokens
        out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, snapkv=snap)
        np.testing.assert_array_equal(out.tokens, plain)


def test_drafts_change_nothing_after_a_compressed_prompt(ready, drafts):
    snap = SnapKV(capacity=16, window=8, kernel_size=3)
    alone = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, snapkv=snap)
    both = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, snapkv=snap, drafts=drafts)
    np.testing.assert_array_equal(alone.tokens, both.tokens)


def test_all_together_with_room_for_all_is_plain_text(ready, plain, drafts):
    """A compressed prompt that keeps all, blocks that cover the cache, heads that share the matrix: nothing changes."""
    snap = SnapKV(capacity=34, window=8)
    sparse = BlockTopK(num_blocks=11, block_size=4, num_sink=4, num_local=8)  # 60 of 64 slots, of which 45 are used
    shared = Drafts(drafts.heads._replace(vocab=None), drafts.tree)
    together = {"snapkv": snap, "sparse": sparse, "drafts": shared}
    assert sparse.budget < 34 + NEW + 3 + 16  # else the cache would be a dense one
    out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW + 16, **together)
    np.testing.assert_array_equal(out.tokens[:, :NEW], plain)
    small = prepare(ready, "int8")
    alone = generate(small, PROMPTS, TINY, max_new_tokens=NEW + 16)
    out = generate(small, PROMPTS, TINY, max_new_tokens=NEW + 16, **together)
    np.testing.assert_array_equal(out.tokens[:, :NEW], alone.tokens[:, :NEW])


def test_all_together_with_little_room(ready, plain, drafts):
    sparse = BlockTopK(num_blocks=2, block_size=4, num_sink=4, num_local=4)
    snap = SnapKV(capacity=16, window=8, kernel_size=3)
    shared = Drafts(drafts.heads._replace(vocab=None), drafts.tree)
    together = {"snapkv": snap, "sparse": sparse, "drafts": shared}
    out = generate(prepare(ready, "bfloat16"), PROMPTS, TINY, max_new_tokens=NEW, **together)
    assert out.count.tolist() == [NEW] * 4
    assert int(out.histogram.sum()) <= 4 * int(out.steps)
    # Much is forgotten, so that the text of the longest prompt is another; the prompt of one token is never compressed.
    out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, **together)
    assert (np.asarray(out.tokens[3]) != plain[3]).any()
    np.testing.assert_array_equal(out.tokens[2], plain[2])


def test_sampling_is_repeatable_and_its_filters_hold(ready):
    free = Sampling(temperature=2.0)
    draw = [generate(ready, PROMPTS, TINY, max_new_tokens=NEW, sampling=free, key=jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0].tokens, draw[1].tokens)
    assert (np.asarray(draw[0].tokens) != draw[2].tokens).any()
    for narrow in (Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-6), Sampling()):
        out = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, sampling=narrow, key=jax.random.key(0))
        np.testing.assert_array_equal(out.tokens, generate(ready, PROMPTS, TINY, max_new_tokens=NEW).tokens)
    few = generate(ready, PROMPTS, TINY, max_new_tokens=NEW, sampling=Sampling(vocab_size=7))
    assert (np.asarray(few.tokens) < 7).all()


def test_repetition_penalty_is_that_of_the_formula(params, ready, drafts):
    sampling = Sampling(repetition_penalty=3.0)
    texts = [
        np.asarray(generate(ready, PROMPTS, TINY, max_new_tokens=NEW, sampling=sampling, **extra).tokens)
        for extra in ({}, {"drafts": drafts})
    ]
    np.testing.assert_array_equal(*texts)
    forward = jax.jit(lambda tokens: decoder_logits(params, decoder_forward(params, tokens, TINY).hidden))
    for prompt, row in zip(PROMPTS[:1], texts[0], strict=False):
        text = list(prompt)
        for token in row:
            padded = np.zeros((1, 48), np.int32)
            padded[0, : len(text)] = text
            values = np.array(forward(padded)[0, len(text) - 1])
            for used in set(text):
                values[used] = values[used] / 3 if values[used] > 0 else values[used] * 3
            assert token == np.argmax(values)
            text.append(token)


def test_typical_acceptance_runs_and_near_zero_temperature_is_greedy(ready, plain, drafts):
    # Below any gap between logits, softmax is one-hot: typical acceptance takes the argmax alone.
    cold = Sampling(temperature=1e-4)
    out = generate(
        ready, PROMPTS, TINY, max_new_tokens=NEW, sampling=cold, drafts=drafts, typical=Typical(), key=jax.random.key(0)
    )
    np.testing.assert_array_equal(out.tokens, plain)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[]], {}, "prompt 0 is empty"),
        ([[61]], {}, "prompts hold ids from 0 to 61, expected 0 to 60"),
        ([[1] * 250], {}, "250 tokens and 12 new ones do not fit into the 256 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"every": 0, "callback": print}, "every is 0"),
        ([[1]], {"sampling": Sampling(temperature=1.0)}, "sampling needs a key"),
        ([[1]], {"length": np.array([1])}, "length is given with lists"),
        (np.ones((1, 4), int), {"length": np.array([5])}, r"length is \[5\], expected a number from 1 to 4"),
        (np.ones((1, 4)), {}, "expected integers"),
    ],
)
def test_bad_prompts(ready, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(ready, prompts, TINY, **({"max_new_tokens": NEW} | changes))


def test_bad_rules(ready, drafts):
    for kind, values, message in (
        (Sampling, {"temperature": -1.0}, "temperature is -1.0"),
        (Sampling, {"top_k": 0}, "top_k is 0"),
        (Sampling, {"top_p": 1.5}, "top_p is 1.5"),
        (Sampling, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        (SnapKV, {"capacity": 32}, "capacity is 32, expected more than window = 32"),
        (SnapKV, {"kernel_size": 4}, "kernel_size is 4, expected an odd number"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**values)
    foreign = Drafts(init_medusa_heads(jax.random.key(0), 48, 61), drafts.tree)
    with pytest.raises(ValueError, match="another model, of width 48 with 61 tokens; this one has width 32 and 61"):
        generate(ready, [[1]], TINY, drafts=foreign)
    for other in (
        Drafts(init_medusa_heads(jax.random.key(0), 32, 70), drafts.tree),
        Drafts(drafts.heads._replace(vocab=None), drafts.tree, jnp.array([3, 69])),
    ):
        with pytest.raises(ValueError, match="of width 32 with 70 tokens"):
            generate(ready, [[1]], TINY, drafts=other)
    with pytest.raises(ValueError, match="guesses 3 tokens ahead, but there are only 2 heads"):
        generate(ready, [[1]], TINY, drafts=Drafts(drafts.heads, chain(3)))
    with pytest.raises(ValueError, match="needs a temperature above 0"):
        generate(ready, [[1]], TINY, drafts=drafts, typical=Typical())
    with pytest.raises(ValueError, match="top_k is 99, but logits have 61"):
        generate(ready, [[1]], TINY, sampling=Sampling(temperature=1.0, top_k=99), key=jax.random.key(0))
