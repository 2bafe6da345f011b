"""Logits of Hugging Face transformers for tiny random decoders, one for each configuration that `DecoderConfig` covers.

Weights are not stored: both sides draw them from the same seed. ``tests/data/transformers_logits.npz`` was made with
transformers 5.24 and torch 2.13 by ``python -m tests.peers.transformers_logits``.
"""

import pathlib

import numpy as np

from jaxaccel.models.decoder_config import DecoderConfig, RopeScaling, parameter_shapes

FILE = pathlib.Path(__file__).parent.parent / "data" / "transformers_logits.npz"
STRETCHED = RopeScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=16)

CASES = {
    "llama": DecoderConfig.tiny(),
    "llama_mha": DecoderConfig.tiny(num_kv_heads=4),
    "llama_tied": DecoderConfig.tiny(tie_embeddings=True, rope_theta=100_000.0),
    "llama3_stretched": DecoderConfig.tiny(rope_theta=500_000.0, rope_scaling=STRETCHED),
    "llama_wide_heads": DecoderConfig.tiny(head_dim=16),
    "qwen2": DecoderConfig.tiny(qkv_bias=True, tie_embeddings=True, norm_eps=1e-6, rope_theta=1_000_000.0),
    "mistral": DecoderConfig.tiny(num_kv_heads=1),
    "glm": DecoderConfig.tiny(rope_layout="interleaved", rotary_fraction=0.5),
}


def tokens() -> np.ndarray:
    """Ids [2, 40]."""
    return np.random.default_rng(1).integers(0, 61, (2, 40)).astype(np.int32)


def weights(config: DecoderConfig) -> dict[str, object]:
    """Random parameters as numpy arrays, norms and biases random as well."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape).astype(np.float32)
        return 1 + 0.2 * values if name.endswith("norm") else (0.2 * values if len(shape) == 1 else 0.3 * values)

    tree: dict[str, object] = {}
    for name, shape in parameter_shapes(config).items():
        if name == "layers":
            tree[name] = [{key: draw(key, size) for key, size in layer.items()} for layer in shape]
        else:
            tree[name] = draw(name, shape)
    return tree


def _hugging_face_names(params: dict) -> dict[str, np.ndarray]:
    names = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    names["lm_head.weight"] = params.get("head", params["embedding"])
    attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    for i, layer in enumerate(params["layers"]):
        at = f"model.layers.{i}."
        names[at + "input_layernorm.weight"] = layer["attention_norm"]
        names[at + "post_attention_layernorm.weight"] = layer["mlp_norm"]
        for ours, theirs in attention.items():
            names[f"{at}self_attn.{theirs}.weight"] = layer[ours]
            if f"{ours}_bias" in layer:
                names[f"{at}self_attn.{theirs}.bias"] = layer[f"{ours}_bias"]
        for ours in ("gate", "up", "down"):
            names[f"{at}mlp.{ours}_proj.weight"] = layer[ours]
    return names


def reference(name: str, config: DecoderConfig) -> np.ndarray:
    """Logits [2, 40, V] of the model of transformers that stands behind a case, float32."""
    import torch
    import transformers

    kind = {"qwen2": "Qwen2", "mistral": "Mistral", "glm": "Glm"}.get(name, "Llama")
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }  # fmt: skip
    if kind == "Glm":
        rope["partial_rotary_factor"] = config.rotary_fraction
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_positions, tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope, attention_bias=False, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    given = {key: torch.from_numpy(np.array(value)) for key, value in _hugging_face_names(weights(config)).items()}
    if kind == "Glm":  # one matrix for gate and up
        for i in range(config.num_layers):
            at = f"model.layers.{i}.mlp."
            given[at + "gate_up_proj.weight"] = torch.cat([given.pop(at + n + "_proj.weight") for n in ("gate", "up")])
    missing, unexpected = model.load_state_dict(given, strict=False)
    if missing or unexpected:
        raise ValueError(f"{name}: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        return model(torch.from_numpy(tokens()).long()).logits.float().numpy()


def main() -> None:
    """Write the file."""
    np.savez_compressed(FILE, **{name: reference(name, config) for name, config in CASES.items()})


if __name__ == "__main__":
    main()

__all__ = ["CASES", "FILE", "tokens", "weights"]
