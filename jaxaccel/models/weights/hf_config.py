"""From a model's config.json to the decoder's numbers, for Llama, Mistral, Qwen2, SmolLM, GEB and LLaDA."""

from collections.abc import Mapping
from typing import Any

from jaxaccel.models.decoder_config import DecoderConfig, RopeScaling
from jaxaccel.models.weights.errors import WeightsError

MODEL_TYPES = ("llama", "mistral", "qwen2", "smollm", "geb", "llada", None)
_REQUIRED = object()
_FRACTIONS = ("norm_eps", "rope_theta", "rotary_fraction")  # all other numbers count something
# The decoder's name, then the names it has in files, Hugging Face's first, GEB's and ChatGLM's after, LLaDA's last.
_KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("padded_vocab_size", "embedding_size", "vocab_size"),
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "mlp_hidden_size"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_query_groups", "multi_query_group_num", "n_kv_heads"),
    "head_dim": ("head_dim", "kv_channels"),
    "max_positions": ("max_position_embeddings", "seq_length", "max_sequence_length"),
    "norm_eps": ("rms_norm_eps", "layernorm_epsilon"),
    "rope_theta": ("rope_theta",),
    "rotary_fraction": ("partial_rotary_factor",),
}
# Settings that the decoder does not have, and the values with which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "add_bias_linear": (False,),
    "rmsnorm": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "post_layer_norm": (True,),
    "rope_ratio": (1, 1.0),
    "quantization_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "attention_layer_norm": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "clip_qkv": (),
}


def _unwrapped(value: Any) -> Any:
    """GEB's configuration has numbers that a stray comma made one-element tuples of."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _check_neutral(settings: Mapping[str, Any]) -> None:
    if settings.get("model_type") not in MODEL_TYPES:
        names = ", ".join(name for name in MODEL_TYPES if name)
        raise WeightsError(f"model_type {settings['model_type']!r} is not supported, expected one of {names}")
    for name, neutral in _NEUTRAL.items():
        value = _unwrapped(settings.get(name))
        if value is not None and value not in neutral:
            raise WeightsError(f"{name} is {value!r}, which is not supported")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_window(settings: Mapping[str, Any], positions: int) -> None:
    """Refuse attention to the last tokens only, unless the window holds the longest context."""
    kind = settings.get("model_type")
    window = settings.get("sliding_window", 4096 if kind == "mistral" else None)
    used = settings.get("use_sliding_window", kind != "qwen2")
    kinds = settings.get("layer_types")
    if kinds is not None:
        other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if other:
            raise WeightsError(f"layer_types has {', '.join(other)}, which is not supported")
        used = "sliding_attention" in kinds
    if used and window is not None and not (_is_number(window) and window >= positions):
        raise WeightsError(
            f"sliding_window is {window}, below max_position_embeddings ({positions}), which is not supported; "
            f"for texts of at most {window} tokens pass the configuration with sliding_window null"
        )


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise WeightsError(f"rope_scaling of type {kind!r} is not supported, expected llama3 or none")
    names = {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_positions": "original_max_position_embeddings",
    }
    lacking = [name for name in names.values() if not _is_number(rope.get(name))]
    if lacking:
        raise WeightsError(f"rope_scaling of type llama3 lacks the numbers {', '.join(lacking)}")
    return RopeScaling(**{field: rope[name] for field, name in names.items()})


def _kv_heads_default(settings: Mapping[str, Any], heads: int) -> Any:
    """KV heads of a file that does not give their number, where that means as many as queries."""
    shares = _unwrapped(settings.get("multi_query_attention"))
    if shares is False:
        return heads
    # Only Llama's own format says so; Mistral's and Qwen2's readers fill in 8 and 32, GEB's is not known.
    llama = settings.get("model_type") in ("llama", "smollm", None) and "num_hidden_layers" in settings
    return heads if llama and shares is None else _REQUIRED


def config_from_hf(settings: Mapping[str, Any]) -> DecoderConfig:
    """Read the decoder's numbers from the content of a config.json.

    Dropout is for training and is not read. ``rope_layout`` and ``norm`` are never in such files; they are the
    defaults, and `dataclasses.replace` changes them.

    Args:
        settings: the file's keys. Both Hugging Face's names and GEB's are understood, ``rope_theta`` and
            ``rope_scaling`` by themselves or inside ``rope_parameters``.

    Returns:
        The configuration.

    Raises:
        WeightsError: naming a key that is missing, numbers that do not fit together, or a setting that the decoder does
            not have (another activation, biases outside of q, k and v, a sliding window in use, other scaling of
            positions than Llama 3's).

    >>> config_from_hf({"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    ...     "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    ...     "max_position_embeddings": 2048}) == DecoderConfig.preset("tinyllama-1.1b")
    True
    """
    _check_neutral(settings)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise WeightsError(f"rope_parameters or rope_scaling is {rope!r}, expected an object")
    merged = {**settings, **{k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}}

    def get(name: str, default: Any = _REQUIRED) -> Any:
        for key in _KEYS[name]:
            value = _unwrapped(merged.get(key))
            if value is not None:
                if not _is_number(value) or (name not in _FRACTIONS and not isinstance(value, int)):
                    wanted = "a number" if name in _FRACTIONS else "a whole number"
                    raise WeightsError(f"{key} is {value!r}, expected {wanted}")
                if not value > 0:
                    raise WeightsError(f"{key} is {value}, expected more than 0")
                return value
        if default is _REQUIRED:
            raise WeightsError(f"the configuration lacks {' or '.join(_KEYS[name])}")
        return default

    width, heads, positions = get("hidden_size"), get("num_heads"), get("max_positions")
    _check_window(settings, positions)
    geb = "num_hidden_layers" not in settings
    numbers = {
        "vocab_size": get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": get("intermediate_size"),
        "num_layers": get("num_layers"),
        "num_heads": heads,
        "num_kv_heads": get("num_kv_heads", _kv_heads_default(settings, heads)),
        "head_dim": get("head_dim", width // heads),
        "max_positions": positions,
        "norm_eps": float(get("norm_eps", 1e-5 if geb else 1e-6)),  # as their own readers fill in
        "rope_theta": float(get("rope_theta", 10_000.0)),
        "rotary_fraction": float(get("rotary_fraction", 1.0)),
        "rope_scaling": _scaling(rope),
        "qkv_bias": settings.get("model_type") == "qwen2"
        or bool(settings.get("add_qkv_bias", False) or settings.get("include_qkv_bias", False)),
        "tie_embeddings": bool(settings.get("weight_tying", settings.get("tie_word_embeddings", False))),
        "causal": settings.get("model_type") != "llada",
    }
    try:
        return DecoderConfig(**numbers)
    except ValueError as error:
        raise WeightsError(f"the configuration does not fit together: {error}") from error
