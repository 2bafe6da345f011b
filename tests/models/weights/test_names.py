"""From the names of three families to the decoder's tree, and what is said of tensors that do not fit."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.models.decoder_config import DecoderConfig, parameter_shapes
from jaxaccel.models.weights import WeightsError, params_from_names
from jaxaccel.models.weights.names import family_of
from tests.models.weights.making import BFLOAT16, GGUF, GGUF_TOP, TINY, named, random_params

PARAMS = random_params(TINY)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def as_geb(params, kv_layout, head_dim=8):
    """GEB's names: keys and values, gate and up in one matrix each."""
    at = "transformer.encoder.layers."
    tensors = {
        "transformer.embedding.word_embeddings.weight": params["embedding"],
        "transformer.encoder.final_layernorm.weight": params["final_norm"],
        "transformer.output_layer.weight": params["head"],
    }
    for i, layer in enumerate(params["layers"]):

        def both(k, v):
            size = len(k) if kv_layout == "concat" else head_dim
            parts = [x[j : j + size] for j in range(0, len(k), size) for x in (k, v)]
            return np.concatenate(parts)

        tensors |= {
            f"{at}{i}.input_layernorm.weight": layer["attention_norm"],
            f"{at}{i}.self_attention.query.weight": layer["q"],
            f"{at}{i}.self_attention.key_value.weight": both(layer["k"], layer["v"]),
            f"{at}{i}.self_attention.dense.weight": layer["o"],
            f"{at}{i}.post_attention_layernorm.weight": layer["mlp_norm"],
            f"{at}{i}.mlp.dense_h_to_4h.weight": np.concatenate([layer["gate"], layer["up"]]),
            f"{at}{i}.mlp.dense_4h_to_h.weight": layer["down"],
        }
        if "q_bias" in layer:
            tensors[f"{at}{i}.self_attention.query.bias"] = layer["q_bias"]
            tensors[f"{at}{i}.self_attention.key_value.bias"] = both(layer["k_bias"], layer["v_bias"])
    return tensors


def test_names_of_hugging_face():
    assert_same(params_from_names(named(PARAMS), TINY), PARAMS)
    bare = {name.removeprefix("model."): value for name, value in named(PARAMS).items()}
    assert_same(params_from_names(bare, TINY), PARAMS)
    # Tables that old files have: the configuration says as much.
    assert_same(params_from_names(named(PARAMS) | {"model.layers.0.rotary_emb.inv_freq": np.ones(4)}, TINY), PARAMS)


def test_names_of_gguf():
    tensors = named(PARAMS, GGUF_TOP, GGUF, "blk.")
    assert_same(params_from_names(tensors | {"rope_freqs.weight": np.ones(4)}, TINY), PARAMS)
    with pytest.raises(ValueError, match="rope_layout is 'interleaved', expected 'half'"):
        params_from_names(tensors, DecoderConfig.tiny(intermediate_size=64, rope_layout="interleaved"))


@pytest.mark.parametrize("kv_layout", ["concat", "per_head"])
@pytest.mark.parametrize("bias", [False, True])
def test_names_of_geb(kv_layout, bias):
    config = DecoderConfig.tiny(intermediate_size=64, qkv_bias=bias)
    params = random_params(config)
    got = params_from_names(as_geb(params, kv_layout), config, kv_layout=kv_layout)
    assert_same(got, params)
    other = "concat" if kv_layout == "per_head" else "per_head"
    wrong = params_from_names(as_geb(params, kv_layout), config, kv_layout=other)["layers"][1]
    assert np.abs(wrong["k"] - params["layers"][1]["k"]).max() > 0.01


def test_biases_and_ties_of_qwen2():
    config = DecoderConfig.tiny(qkv_bias=True, tie_embeddings=True)
    params = random_params(config)
    assert_same(params_from_names(named(params), config), params)
    copied = named(params) | {"lm_head.weight": params["embedding"].copy()}
    assert_same(params_from_names(copied, config), params)
    copied["lm_head.weight"][0, 0] += 1
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from model.embed_tokens.weight.*tie_embeddings"):
        params_from_names(copied, config)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_numbers_are_converted_and_owned(dtype):
    mapping = named(random_params(TINY, dtype=BFLOAT16))
    params = params_from_names(mapping, TINY, dtype=dtype)
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == np.dtype(dtype)
        assert leaf.flags.c_contiguous
        assert leaf.flags.owndata
        assert leaf.flags.writeable
    assert not np.shares_memory(params["embedding"], mapping["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["embedding"], mapping["model.embed_tokens.weight"].astype(dtype))


def test_fused_matrices_are_not_kept_alive():
    got = params_from_names(as_geb(PARAMS, "concat"), TINY)["layers"][0]
    assert all(got[name].flags.owndata for name in ("k", "v", "gate", "up"))


def test_arrays_of_jax_are_taken():
    tensors = {name: jnp.asarray(value) for name, value in named(PARAMS).items()}
    assert_same(params_from_names(tensors, TINY), PARAMS)


def broken(**changes):
    tensors = named(PARAMS)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


def test_all_that_does_not_fit_is_listed_at_once():
    tensors = broken(**{Q: None, "extra": np.ones(1), DOWN: np.ones((3, 2)), "model.norm.weight": np.ones(32, int)})
    with pytest.raises(WeightsError) as raised:
        params_from_names(tensors, TINY)
    message = str(raised.value)
    assert f"missing: {Q};" in message
    assert "unexpected: extra;" in message
    assert f"wrong shapes: {DOWN} is [3, 2], expected [32, 64];" in message
    assert "not floating point: model.norm.weight (int64)" in message


def test_long_lists_are_cut():
    few = {"nothing": np.ones(1), "model.embed_tokens.weight": PARAMS["embedding"]}
    with pytest.raises(WeightsError, match=r"missing: model.norm.weight, .* and 1 more; unexpected: nothing"):
        params_from_names(few, DecoderConfig.tiny(intermediate_size=64, num_layers=1))


def test_another_number_of_layers_is_shown():
    with pytest.raises(WeightsError, match=r"unexpected: model.layers.1"):
        params_from_names(named(PARAMS), DecoderConfig.tiny(intermediate_size=64, num_layers=1))
    with pytest.raises(WeightsError, match=r"missing: model.layers.2"):
        params_from_names(named(PARAMS), DecoderConfig.tiny(intermediate_size=64, num_layers=3))


def test_a_missing_head_gives_advice():
    with pytest.raises(WeightsError, match=r"missing: lm_head.weight; .*tie_embeddings=True"):
        params_from_names(broken(**{"lm_head.weight": None}), TINY)


def test_an_empty_mapping_lacks_everything():
    with pytest.raises(WeightsError, match=r"missing: .* and 11 more"):
        params_from_names({}, TINY)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"dtype is .*int32.*, expected floating point"):
        params_from_names(named(PARAMS), TINY, dtype=np.int32)
    plain = inspect.unwrap(params_from_names)  # types are checked on every call only in tests
    with pytest.raises(ValueError, match="kv_layout is 'mixed', expected concat or per_head"):
        plain(named(PARAMS), TINY, kv_layout="mixed")


def test_families_are_told_apart():
    assert family_of(named(PARAMS)) == "llama"
    assert family_of(as_geb(PARAMS, "concat")) == "geb"
    assert family_of({"token_embd.weight": 0}) == "gguf"
    assert jax.tree.map(np.shape, PARAMS) == parameter_shapes(TINY)
