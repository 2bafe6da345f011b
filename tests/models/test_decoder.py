"""The decoder against reference logits, its cached form against the full one, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxaccel.compression import quantize_weights
from jaxaccel.models import decoder
from jaxaccel.models.decoder import (
    Decoder,
    decoder_logits,
    fuse,
    init_params,
    new_cache,
    stack_layers,
    unstack_layers,
)
from jaxaccel.models.decoder_config import DecoderConfig, parameter_shapes
from jaxaccel.models.kv_cache import BlockTopK, append
from jaxaccel.models.rotary import rotary_angles, rotate

TINY = DecoderConfig.tiny()
# Compiled as a whole: op by op every new shape would compile a hundred small programs.
decoder_forward = jax.jit(decoder.decoder_forward, static_argnames="config")


def logits(params, tokens, config):
    return decoder_logits(params, decoder_forward(params, tokens, config).hidden)


def geb_params(vectors):
    """The reference's weights, which bear GEB's names: fused key_value and gate-up matrices."""
    layers = []
    for i in range(2):
        at = f"w/transformer.encoder.layers.{i}."
        key_value = vectors[at + "self_attention.key_value.weight"]
        gate_up = vectors[at + "mlp.dense_h_to_4h.weight"]
        layers.append(
            {
                "attention_norm": vectors[at + "input_layernorm.weight"],
                "q": vectors[at + "self_attention.query.weight"],
                "k": key_value[:16],
                "v": key_value[16:],
                "o": vectors[at + "self_attention.dense.weight"],
                "mlp_norm": vectors[at + "post_attention_layernorm.weight"],
                "gate": gate_up[:24],
                "up": gate_up[24:],
                "down": vectors[at + "mlp.dense_4h_to_h.weight"],
            }
        )
    top = {
        "embedding": vectors["w/transformer.embedding.word_embeddings.weight"],
        "layers": layers,
        "final_norm": vectors["w/transformer.encoder.final_layernorm.weight"],
        "head": vectors["w/transformer.output_layer.weight"],
    }
    return jax.tree.map(jnp.asarray, top)


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [
        # The first two come from models whose norms are float32: 2^-24, grown by two layers.
        ("pre_half", {}, 1e-4),
        ("pre_interleaved_half_dim", {"rope_layout": "interleaved", "rotary_fraction": 0.5}, 1e-4),
        # These are float64 but for the angles, which are float32 by design: positions below 11 lose 2^-24 · 10.
        ("post_half", {"norm": "post"}, 1e-5),
        ("pre_half_dim", {"rotary_fraction": 0.5}, 1e-5),
        ("pre_interleaved_full", {"rope_layout": "interleaved"}, 1e-5),
    ],
)
def test_logits_of_the_reference(vectors, x64, name, changes, tolerance):
    data = vectors("geb")
    config = DecoderConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_positions=32, **changes,
    )  # fmt: skip
    params = geb_params(data)
    assert jax.tree.map(jnp.shape, params) == parameter_shapes(config)
    actual = logits(params, jnp.asarray(data["tokens"]), config)
    wanted = data[f"logits_{name}"]
    assert np.abs(actual - wanted).max() < tolerance * np.abs(wanted).max()


def test_published_sizes():
    assert DecoderConfig().num_parameters == 1_348_044_800
    counts = {
        "smollm2-135m": 134_515_008, "tinyllama-1.1b": 1_100_048_384, "llama2-7b": 6_738_415_616,
        "llama3-8b": 8_030_261_248, "llama3.2-1b": 1_235_814_400, "qwen2-0.5b": 494_032_768,
    }  # fmt: skip
    assert {name: DecoderConfig.preset(name).num_parameters for name in counts} == counts


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), TINY)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 24)))
# float32: two ways of summing the same products.
CLOSE = {"rtol": 0, "atol": 2e-5}


def test_forms_of_the_parameters_agree(params):
    wanted = logits(params, TOKENS, TINY)
    scanned = dataclasses.replace(TINY, scan_layers=True)
    stacked = stack_layers(params)
    for form, config in (
        (fuse(params), TINY),
        (stacked, scanned),
        (fuse(stacked), scanned),
        (unstack_layers(stacked), TINY),
    ):
        np.testing.assert_allclose(logits(form, TOKENS, config), wanted, **CLOSE)
    assert jax.tree.map(jnp.shape, init_params(jax.random.key(0), scanned)) == jax.tree.map(jnp.shape, stacked)


def test_grouped_heads_equal_repeated_ones(params):
    many = dataclasses.replace(TINY, num_kv_heads=4)

    def repeat(w):
        return jnp.repeat(w.reshape(2, 8, -1), 2, 0).reshape(32, -1)

    layers = [layer | {"k": repeat(layer["k"]), "v": repeat(layer["v"])} for layer in params["layers"]]
    wanted = logits(params, TOKENS, TINY)
    np.testing.assert_allclose(logits(params | {"layers": layers}, TOKENS, many), wanted, **CLOSE)


@pytest.mark.parametrize("changes", [{}, {"attention": "local_linear"}, {"scan_layers": True}, {"norm": "post"}])
def test_cached_steps_equal_the_full_pass(params, changes):
    config = dataclasses.replace(TINY, **changes)
    weights = stack_layers(params) if config.scan_layers else params
    wanted = decoder_forward(weights, TOKENS, config).hidden

    @jax.jit
    def run(tokens):
        # Prompts of 5 and 9 tokens, a chunk of 3, single tokens.
        lengths = jnp.array([5, 9])
        prompt = decoder_forward(weights, tokens[:, :9], config)
        cache = append(new_cache(config, 2, 32), prompt.new, count=lengths)
        outputs = [jnp.take_along_axis(prompt.hidden, (lengths - 1)[:, None, None], 1)]

        def take(at, count):
            return jnp.take_along_axis(tokens, at[:, None] + jnp.arange(count), 1)

        for count in (3, 1, 1):
            step = decoder_forward(weights, take(cache.length, count), config, cache=cache)
            outputs.append(step.hidden)
            cache = append(cache, step.new)
        return jnp.concatenate(outputs, 1), cache.length

    hidden, length = run(TOKENS)
    assert length.tolist() == [10, 14]
    for row, first in enumerate((4, 8)):
        np.testing.assert_allclose(hidden[row], wanted[row, first : first + 6], **CLOSE)


def test_block_topk_that_reads_everything_equals_dense(params):
    sparse = BlockTopK(num_blocks=4, block_size=4, num_sink=4, num_local=4)

    @jax.jit
    def run(tokens):
        results = []
        for cache in (new_cache(TINY, 2, 32), new_cache(TINY, 2, 32, sparse=sparse)):
            cache = append(cache, decoder_forward(params, tokens[:, :9], TINY).new, count=jnp.array([7, 9]))
            for count in (1, 3, 1, 1):
                step = decoder_forward(params, tokens[:, 9 : 9 + count], TINY, cache=cache)
                cache = append(cache, step.new)
            results.append((step.hidden, cache.length))
        return results

    dense, blocks = run(TOKENS)
    np.testing.assert_allclose(dense[0], blocks[0], **CLOSE)
    assert dense[1].tolist() == blocks[1].tolist() == [13, 15]


def test_a_tree_of_drafts_sees_its_ancestors_only(params):
    """Two branches after a common token: each gives what the text with that branch alone gives."""
    mask = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    prompt = decoder_forward(params, TOKENS[:, :6], TINY)
    cache = append(new_cache(TINY, 2, 16), prompt.new)
    positions = cache.position[:, None] + jnp.array([0, 1, 1])
    step = decoder_forward(params, TOKENS[:, 6:9], TINY, cache=cache, positions=positions, mask=mask)
    for node in (1, 2):
        text = jnp.concatenate([TOKENS[:, :7], TOKENS[:, 6 + node, None]], 1)
        np.testing.assert_allclose(step.hidden[:, node], decoder_forward(params, text, TINY).hidden[:, -1], **CLOSE)
    # The path (0, 2) is kept: going on from it equals the text of it.
    cache = append(cache, step.new, nodes=jnp.array([[0, 2], [0, 2]]))
    last = decoder_forward(params, TOKENS[:, 9:10], TINY, cache=cache).hidden[:, 0]
    text = jnp.concatenate([TOKENS[:, :7], TOKENS[:, 8:10]], 1)
    np.testing.assert_allclose(last, decoder_forward(params, text, TINY).hidden[:, -1], **CLOSE)


def test_long_prompts_attend_by_tiles(monkeypatch):
    config = DecoderConfig.tiny(num_layers=1)
    weights = init_params(jax.random.key(1), config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 21)))

    def summed(weights):
        hidden = decoder.decoder_forward(weights, tokens, config).hidden
        return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))), hidden

    (_, wanted), slopes = jax.jit(jax.value_and_grad(summed, has_aux=True))(weights)
    monkeypatch.setattr("jaxaccel.models.decoder_attention.TILE", 8)  # three tiles, the last of 5 tokens
    (_, found), tiled = jax.jit(jax.value_and_grad(lambda w: summed(w), has_aux=True))(weights)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert not np.array_equal(found, wanted)  # another order of sums: they were computed by tiles
    # Gradients add 42 tokens' terms of either sign in float32: of the order of a thousand roundings of 2^-24.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), tiled, slopes)


def test_rotation():
    config = DecoderConfig.tiny()
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
    for layout in ("half", "interleaved"):
        at, later = (rotate(x, rotary_angles(jnp.arange(4)[None] + start, config), layout) for start in (0, 1000))
        np.testing.assert_allclose(jnp.linalg.norm(at, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
        # Scores depend on differences of positions; angles of about 1000 carry 1000 · 2^-24.
        scores = [jnp.einsum("btnh,bsnh->bts", y, y) for y in (at, later)]
        np.testing.assert_allclose(*scores, atol=2e-3)
    # bfloat16 has no 257: positions are float32 whatever the activations are.
    near = rotate(x.astype(jnp.bfloat16)[:, :2].at[:, 1].set(x[:, 0].astype(jnp.bfloat16)),
                  rotary_angles(jnp.array([[256, 257]]), config))  # fmt: skip
    assert np.abs(np.asarray(near[0, 0] - near[0, 1], np.float32)).max() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.03), ("bfloat16", 0.03)])
def test_smaller_weights_give_near_logits(params, dtype, tolerance):
    # int8: half a step, 1/254 of the largest entry of a row; bfloat16: 2^-9 a weight and activation.
    wanted = logits(params, TOKENS, TINY)
    for form in (quantize_weights(fuse(params), dtype), fuse(quantize_weights(params, dtype))):
        actual = logits(form, TOKENS, TINY)
        assert 0 < np.abs(np.asarray(actual, np.float32) - wanted).max() < tolerance * np.abs(wanted).max()


def test_module_trains(params):
    model = Decoder(TINY, params=params)
    np.testing.assert_allclose(model(TOKENS), logits(params, TOKENS, TINY), **CLOSE)
    gradient = nnx.grad(lambda m: m(TOKENS).mean())(model)
    assert float(jnp.abs(gradient["layers"][1]["down"][...]).max()) > 0
    assert Decoder(dataclasses.replace(TINY, tie_embeddings=True), rngs=nnx.Rngs(0))(TOKENS).shape == (2, 24, 61)
    with pytest.raises(ValueError, match="either rngs"):
        Decoder(TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads .4. must be a multiple of num_kv_heads .3."),
        ({"head_dim": 7}, "expected an even number"),
        ({"rotary_fraction": 1.5}, "rotary_fraction 1.5"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, expected a positive number"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.tiny(**changes)


def test_bad_calls(params):
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m'"):
        DecoderConfig.preset("smolm2-135m")
    with pytest.raises(ValueError, match="200 positions, expected 1 to max_positions = 128"):
        decoder_forward(params, jnp.zeros((1, 200), int), TINY)
    with pytest.raises(ValueError, match="expected 1 to max_positions"):
        decoder_forward(params, jnp.zeros((1, 0), int), TINY)
    with pytest.raises(ValueError, match="without a cache"):
        decoder_forward(params, TOKENS, TINY, mask=jnp.ones((24, 24), bool))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\), expected \(24, 24\)"):
        decoder_forward(params, TOKENS, TINY, cache=new_cache(TINY, 2, 64), mask=jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match="max_positions = 128"):
        new_cache(TINY, 1, 129)
    with pytest.raises(ValueError, match="scans over its layers"):
        new_cache(dataclasses.replace(TINY, scan_layers=True), 1, 64, sparse=BlockTopK())
