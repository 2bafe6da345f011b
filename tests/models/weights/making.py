"""Tiny files of weights, written independently of the code that reads them."""

import json

import ml_dtypes
import numpy as np

from jaxaccel.models.decoder_config import DecoderConfig, parameter_shapes
from jaxaccel.models.masked_diffusion import LLADA_END, LLADA_MASK

TINY = DecoderConfig.tiny(intermediate_size=64)  # rows of 32 and 64: whole blocks of GGUF's 4 and 8 bits

HF = {
    "attention_norm": "input_layernorm.weight", "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight", "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias",
}  # fmt: skip
HF_TOP = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
LLADA_LAYER = {
    "attention_norm": "attn_norm.weight", "q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight",
    "o": "attn_out.weight", "mlp_norm": "ff_norm.weight", "gate": "ff_proj.weight", "up": "up_proj.weight",
    "down": "ff_out.weight",
}  # fmt: skip
LLADA_TOP = {
    "embedding": "model.transformer.wte.weight", "final_norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
}  # fmt: skip
GGUF = {
    "attention_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight",
    "o": "attn_output.weight", "mlp_norm": "ffn_norm.weight", "gate": "ffn_gate.weight", "up": "ffn_up.weight",
    "down": "ffn_down.weight", "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias",
}  # fmt: skip
GGUF_TOP = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
KINDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def random_params(config, seed=0, dtype=np.float32):
    """A tree of small random arrays."""
    rng = np.random.default_rng(seed)

    def array(shape):
        return (0.1 * rng.standard_normal(shape)).astype(dtype)

    shapes = parameter_shapes(config)
    layers = [{name: array(shape) for name, shape in layer.items()} for layer in shapes.pop("layers")]
    return {name: array(shape) for name, shape in shapes.items()} | {"layers": layers}


def named(params, top=HF_TOP, layer=HF, block="model.layers."):
    """The tree under a family's names."""
    tensors = {file: params[name] for name, file in top.items() if name in params}
    for i, values in enumerate(params["layers"]):
        tensors |= {f"{block}{i}.{layer[name]}": value for name, value in values.items()}
    return tensors


def write_safetensors(path, tensors, **metadata):
    """The format by its specification: length, table, numbers."""
    table, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, value in tensors.items():
        end = at + value.nbytes
        table[name] = {"dtype": KINDS[value.dtype.name], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(table).encode()
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def hf_settings(config, **changes):
    """What a config.json of Hugging Face's Llama would say."""
    settings = {
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings, "attention_dropout": 0.0,
    }  # fmt: skip
    return settings | changes


def llada_settings(config):
    """What LLaDA's config.json says."""
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": config.hidden_size,
        "n_heads": config.num_heads, "n_kv_heads": config.num_kv_heads, "n_layers": config.num_layers,
        "mlp_hidden_size": config.intermediate_size, "max_sequence_length": config.max_positions,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size, "weight_tying": config.tie_embeddings, "include_bias": False,
        "include_qkv_bias": False, "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms",
        "rope": True, "alibi": False, "attention_layer_norm": False, "scale_logits": False, "clip_qkv": None,
        "multi_query_attention": None, "mask_token_id": LLADA_MASK, "eos_token_id": LLADA_END, "attention_dropout": 0.0,
    }  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def write_folder(folder, config, params, dtype=np.float32, **changes):
    """A folder as `save_pretrained` leaves it, without a tokenizer."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", hf_settings(config, **changes))
    tensors = {name: value.astype(dtype) for name, value in named(params).items()}
    write_safetensors(folder / "model.safetensors", tensors, format="pt")
    return folder


def in_pairs(rows, heads):
    """Rows as GGUF's llama has them: channels i and i + H/2 of a head side by side."""
    size = rows.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def gguf_metadata(config, arch="llama", **changes):
    values = {
        "embedding_length": config.hidden_size, "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "context_length": config.max_positions,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope_theta,
    } | changes  # fmt: skip
    return {f"{arch}.{name}": value for name, value in values.items() if value is not None}


def write_gguf(path, tensors, metadata, *, arch="llama", kind="F32", kinds=None, pairs=None):
    """A file by the package ``gguf``: matrices of ``kind``, vectors in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, value in tensors.items():
        own = (kinds or {}).get(name, kind if value.ndim > 1 else "F32")
        for part, heads in (pairs or {}).items():
            value = in_pairs(value, heads) if f".{part}." in name else value
        if own == "F64":
            writer.add_tensor(name, value.astype(np.float64))
        else:
            its = gguf.GGMLQuantizationType[own]
            writer.add_tensor(name, gguf.quants.quantize(value, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_words():
    """The 256 letters of byte-level BPE, by byte, as GPT-2's encoder defines them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in shown else next(rest)) for byte in range(256)]


BFLOAT16 = ml_dtypes.bfloat16
