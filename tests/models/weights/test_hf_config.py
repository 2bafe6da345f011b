"""What a config.json says, in two dialects, and what the decoder does not have."""

import pytest

from jaxaccel.models.decoder_config import PRESETS, DecoderConfig, RopeScaling
from jaxaccel.models.weights import WeightsError, config_from_hf
from jaxaccel.models.weights.known import KNOWN
from tests.models.weights.making import TINY, hf_settings

GEB = {
    "model_type": "geb", "padded_vocab_size": 64896, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_layers": 24,
    "num_attention_heads": 16, "num_query_groups": 4, "kv_channels": 128, "seq_length": 4096,
    "layernorm_epsilon": 1e-5, "hidden_dropout": [0.0], "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True, "add_bias_linear": False,
}  # fmt: skip
LLAMA3 = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_read_back(name):
    config = DecoderConfig.preset(name)
    changes = {"model_type": "qwen2"} if config.qkv_bias else {}
    changes |= {} if config.causal else {"model_type": "llada"}
    if config.rope_scaling:
        changes["rope_scaling"] = LLAMA3
    assert config_from_hf(hf_settings(config, **changes)) == config
    assert name in KNOWN


def test_names_of_geb():
    assert config_from_hf(GEB) == DecoderConfig()
    assert config_from_hf(GEB | {"hidden_size": [2048], "vocab_size": 60000}) == DecoderConfig()
    assert config_from_hf(without(GEB, "layernorm_epsilon", "model_type", "kv_channels")) == DecoderConfig()


def test_kv_heads_of_geb_are_never_guessed():
    silent = without(GEB, "num_query_groups")
    with pytest.raises(WeightsError, match="lacks num_key_value_heads or num_query_groups or multi_query_group_num"):
        config_from_hf(silent)
    with pytest.raises(WeightsError, match="lacks num_key_value_heads"):
        config_from_hf(silent | {"multi_query_attention": True})
    assert config_from_hf(silent | {"multi_query_attention": True, "multi_query_group_num": 2}).num_kv_heads == 2
    assert config_from_hf(silent | {"multi_query_attention": False}).num_kv_heads == 16


def test_kv_heads_that_other_readers_fill_in():
    silent = without(hf_settings(TINY), "num_key_value_heads")
    assert config_from_hf(silent).num_kv_heads == TINY.num_heads
    for kind in ("mistral", "qwen2"):
        with pytest.raises(WeightsError, match="lacks num_key_value_heads"):
            config_from_hf(silent | {"model_type": kind})


def test_rope_in_its_three_places():
    assert config_from_hf(hf_settings(TINY, rope_theta=5e5)).rope_theta == 5e5
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5, "partial_rotary_factor": 0.5}}
    config = config_from_hf(hf_settings(TINY) | new)
    assert (config.rope_theta, config.rotary_fraction, config.rope_scaling) == (7e5, 0.5, None)
    stretched = config_from_hf(hf_settings(TINY, rope_scaling=LLAMA3))
    assert stretched.rope_scaling == RopeScaling(factor=32.0)
    assert config_from_hf(hf_settings(TINY, rope_parameters=LLAMA3 | {"rope_theta": 5e5})).rope_theta == 5e5


def test_defaults_of_the_format():
    config = config_from_hf(without(hf_settings(TINY), "rms_norm_eps", "rope_theta", "head_dim", "model_type"))
    assert (config.norm_eps, config.rope_theta, config.head_dim) == (1e-6, 10_000.0, TINY.head_dim)


def test_windows_that_hold_the_context_do_nothing():
    for changes in (
        {"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False},
        {"model_type": "qwen2", "sliding_window": 4},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral"},  # 4096 is filled in, which holds the 128 of the tiny one
        {"sliding_window": TINY.max_positions},
        {"sliding_window": 4, "layer_types": ["full_attention"] * 2},
    ):
        assert config_from_hf(hf_settings(TINY, **changes)).num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported, expected one of llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks the numbers low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "lacks the numbers factor"),
        ({"rope_scaling": ["llama3"]}, "expected an object"),
        ({"sliding_window": 64}, r"sliding_window is 64, below max_position_embeddings \(128\)"),
        ({"sliding_window": "all"}, "sliding_window is all"),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"]}, "sliding_window is 64"),
        ({"layer_types": ["chunked_attention"]}, "layer_types has chunked_attention"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a whole number"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5, expected a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected more than 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number"),
        ({"num_key_value_heads": 3}, r"does not fit together: num_heads \(4\)"),
        ({"head_dim": 7}, "does not fit together: rotary_fraction"),
    ],
)
def test_what_the_decoder_lacks_is_named(changes, message):
    with pytest.raises(WeightsError, match=message):
        config_from_hf(hf_settings(TINY, **changes))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("vocab_size", "lacks padded_vocab_size or embedding_size or vocab_size"),
        ("num_hidden_layers", "lacks num_hidden_layers or num_layers"),
        ("max_position_embeddings", "lacks max_position_embeddings or seq_length"),
    ],
)
def test_missing_keys_are_named(key, message):
    with pytest.raises(WeightsError, match=message):
        config_from_hf(without(hf_settings(TINY), key))
