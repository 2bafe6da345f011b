"""The bidirectional decoder and its training loss: against the reference's logits, itself, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaccel.models import (
    Decoder,
    DecoderConfig,
    decoder_forward,
    init_params,
    load_pretrained,
    new_cache,
    stack_layers,
)
from jaxaccel.models.masked_diffusion import (
    LLADA_END,
    LLADA_MASK,
    diffusion_model,
    mask_tokens,
    masked_diffusion_apply,
    masked_diffusion_hidden,
    masked_diffusion_loss,
)
from jaxaccel.models.weights import WeightsError, config_from_hf, params_from_names
from jaxaccel.models.weights.names import family_of
from tests.decoding.llada import tensors, tiny_config
from tests.models.weights.making import llada_settings, write_json, write_safetensors

CONFIG = DecoderConfig.tiny(causal=False)
PARAMS = init_params(jax.random.key(0), CONFIG)
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
hidden_of = jax.jit(masked_diffusion_hidden, static_argnames=("config", "return_kv"))


# LLaDA's files --------------------------------------------------------------------------------------------------------


def test_llada_8b_by_its_numbers():
    config = DecoderConfig.preset("llada-8b")
    assert config.num_parameters == 8_015_581_184
    assert config_from_hf(llada_settings(config)) == config
    assert max(LLADA_MASK, LLADA_END) < config.vocab_size


@pytest.mark.parametrize("bare", [False, True])
def test_logits_of_the_reference_from_a_folder_of_llada(vectors, tmp_path, bare):
    reference = vectors("learn2pd")
    config = tiny_config(reference["meta"])
    prefix = "" if bare else "model.transformer."
    write_safetensors(
        tmp_path / "model.safetensors", {prefix + name: value for name, value in tensors(reference).items()}
    )
    write_json(tmp_path / "config.json", llada_settings(config))
    loaded = load_pretrained(tmp_path)
    assert loaded.config == config
    logits = jax.jit(masked_diffusion_apply(config))(loaded.params, reference["forward/tokens"].astype(np.int32))
    # Two layers in float32; logits reach 20, whose last bits are 2e-6.
    np.testing.assert_allclose(logits, reference["forward/logits"], atol=1e-4)


def test_names_of_llada_are_told_apart_and_what_is_missing_is_named(vectors):
    reference = vectors("learn2pd")
    found = tensors(reference)
    assert family_of(found) == family_of({f"model.transformer.{name}": 0 for name in found}) == "llada"
    del found["blocks.1.ff_proj.weight"]
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.ff_proj\.weight"):
        params_from_names(found, tiny_config(reference["meta"]))
    for changes in (
        {"block_type": "sequential"},
        {"alibi": True},
        {"include_bias": True},
        {"layer_norm_type": "low_p"},
    ):
        with pytest.raises(WeightsError, match="is not supported"):
            config_from_hf(llada_settings(CONFIG) | changes)


# The model ------------------------------------------------------------------------------------------------------------


def test_every_token_sees_every_other_and_a_mask_hides():
    base = hidden_of(PARAMS, TOKENS, CONFIG)
    later = hidden_of(PARAMS, TOKENS.at[:, 6].set(50), CONFIG)
    assert np.all(np.abs(np.asarray(later - base)).max(-1) > 1e-4)
    hidden = hidden_of(PARAMS, TOKENS, CONFIG, key_mask=jnp.tile(jnp.arange(7) < 5, (2, 1)))
    np.testing.assert_allclose(hidden[:, :5], hidden_of(PARAMS, TOKENS[:, :5], CONFIG), atol=2e-6)  # float32 sums


def test_the_module_and_the_decoder_are_the_same_model():
    logits = masked_diffusion_apply(CONFIG)(PARAMS, TOKENS)
    np.testing.assert_allclose(Decoder(CONFIG, params=PARAMS)(TOKENS), logits, atol=1e-6)
    scanned = DecoderConfig.tiny(causal=False, scan_layers=True)
    np.testing.assert_allclose(masked_diffusion_apply(scanned)(stack_layers(PARAMS), TOKENS), logits, atol=2e-6)
    model = diffusion_model(CONFIG)
    assert model is diffusion_model(DecoderConfig.tiny(causal=False))
    np.testing.assert_allclose(model.hidden(PARAMS, TOKENS) @ model.matrix(PARAMS).T, logits, atol=1e-6)


def test_a_part_beside_kept_keys_and_values_is_the_whole():
    """Nothing changed, so that every layer's keys and values are exact; two rows replace different positions."""
    base, kv = hidden_of(PARAMS, TOKENS, CONFIG, return_kv=True)
    at = jnp.array([[2, 3, 4], [4, 5, 6]])
    part = jnp.take_along_axis(TOKENS, at, 1)
    spoiled = jax.tree.map(lambda x: x.at[jnp.arange(2)[:, None], at].set(9.0), kv)
    found, after = hidden_of(PARAMS, part, CONFIG, kv=spoiled, positions=at, return_kv=True)
    np.testing.assert_allclose(found, jnp.take_along_axis(base, at[..., None], 1), atol=2e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), after, kv)


def test_positions_beyond_the_end_are_not_kept():
    _, kv = hidden_of(PARAMS, TOKENS, CONFIG, return_kv=True)
    at = jnp.array([[5, 7], [7, 7]])
    _, after = hidden_of(PARAMS, jnp.full((2, 2), 60), CONFIG, kv=kv, positions=at, return_kv=True)
    for old, new in zip(jax.tree.leaves(kv), jax.tree.leaves(after), strict=True):
        changed = np.abs(np.asarray(old - new)).max((-1, -2)) > 0
        assert changed.tolist() == [[i == 5 for i in range(7)], [False] * 7]


def test_what_a_model_without_causal_mask_refuses():
    causal = DecoderConfig.tiny()
    for function in (diffusion_model, masked_diffusion_apply, lambda c: masked_diffusion_hidden(PARAMS, TOKENS, c)):
        with pytest.raises(ValueError, match=r"config\.causal is True"):
            function(causal)
    with pytest.raises(ValueError, match="cache is given, but the model is not causal"):
        decoder_forward(PARAMS, TOKENS, CONFIG, cache=new_cache(CONFIG, 2, 16))
    with pytest.raises(ValueError, match="attention is 'block_topk', expected 'dense'"):
        DecoderConfig.tiny(causal=False, attention="block_topk")
    with pytest.raises(ValueError, match="kv is given without positions"):
        masked_diffusion_hidden(PARAMS, TOKENS, CONFIG, kv=())
    with pytest.raises(ValueError, match="tokens has 129 positions"):
        masked_diffusion_hidden(PARAMS, jnp.zeros((1, 129), int), CONFIG)


# Training -------------------------------------------------------------------------------------------------------------


def test_masks_are_as_many_as_the_ratio_says_and_never_in_the_prompt():
    tokens = jnp.ones((4000, 16), int)
    answer = jnp.tile(jnp.arange(16) >= 4, (4000, 1))
    noisy, masked, ratio = mask_tokens(jax.random.key(0), tokens, mask_id=9, answer=answer)
    assert not np.any(masked[:, :4])
    np.testing.assert_array_equal(noisy, np.where(masked, 9, 1))
    assert float(ratio.min()) >= 1e-3
    # Uniform ratios: mean 1/2; the share of masks of a row follows its ratio. Four standard deviations.
    assert abs(float(ratio.mean()) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    share = np.asarray(masked[:, 4:]).mean(1) - np.asarray(ratio)
    assert abs(share.mean()) < 4 * (1 / 6 / 12 / 4000) ** 0.5
    with pytest.raises(ValueError, match="min_ratio is 0"):
        mask_tokens(jax.random.key(0), tokens, mask_id=9, min_ratio=0.0)
    with pytest.raises(ValueError, match="mask_id is -1"):
        mask_tokens(jax.random.key(0), tokens, mask_id=-1)


def test_the_loss_is_its_equation():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(6, 10)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 9, (5, 6)), jnp.int32)
    answer = jnp.asarray(rng.uniform(size=(5, 6)) < 0.7)
    key = jax.random.key(4)

    def model(table, noisy):
        assert noisy.shape == tokens.shape
        return jnp.broadcast_to(table, (*noisy.shape, 10))

    found = masked_diffusion_loss(model, table, tokens, key, mask_id=9, answer=answer)
    _, masked, ratio = (np.asarray(x, np.float64) for x in mask_tokens(key, tokens, mask_id=9, answer=answer))
    wide = np.asarray(table, np.float64)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    total = 0.0
    for b in range(5):
        for t in range(6):
            total -= masked[b, t] * logp[t, int(tokens[b, t])] / ratio[b] / max(int(answer[b].sum()), 1) / 5
    np.testing.assert_allclose(found, total, rtol=2e-6)  # float32 sums of 30 terms
    slope = jax.grad(lambda t: masked_diffusion_loss(model, t, tokens, key, mask_id=9, answer=answer))(table)
    untouched = ~np.asarray(masked, bool).any(0)
    np.testing.assert_array_equal(slope[untouched], 0)
    half = masked_diffusion_loss(model, table.astype(jnp.bfloat16), tokens, key, mask_id=9, answer=answer)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, found, rtol=2e-2)  # logits of order 1 rounded to 8 bits
    with pytest.raises(ValueError, match="mask_id is 10, expected an id below the vocabulary's 10"):
        masked_diffusion_loss(model, table, tokens, key, mask_id=10)


def test_a_model_learns_to_fill_in_from_both_sides():
    """Texts a a a ...: a token is known from any other, also from later ones."""
    config = DecoderConfig.tiny(vocab_size=8, num_layers=1, causal=False)
    params, optimizer = init_params(jax.random.key(1), config), optax.adam(1e-2)
    tokens = jnp.tile(jnp.arange(6, dtype=jnp.int32)[:, None], (6, 6))

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            loss, slope = jax.value_and_grad(
                lambda p: masked_diffusion_loss(masked_diffusion_apply(config), p, tokens, key, mask_id=7)
            )(params)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), 150))

    (params, _), losses = train(params)
    assert float(losses[:5].mean()) > 0.8
    logits = masked_diffusion_apply(config)(params, jnp.array([[7, 7, 7, 7, 7, 3]], jnp.int32))
    assert np.argmax(logits[0, :5], -1).tolist() == [3] * 5  # what is not masked is not learned
