"""From the names that files give to tensors to the decoder's tree of parameters.

Four families of names are known: Hugging Face's Llama names (also without the prefix ``model.``), GEB's (Megatron's
and ChatGLM's), LLaDA's (OLMo's; also without ``model.transformer.``), and GGUF's. Matrices stay ``[out, in]``, as files
have them. Where a file stacks several matrices along their rows (GEB: keys then values, gate then up), they are taken
apart.
"""

import concurrent.futures
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxaccel.models.decoder_config import DecoderConfig, layer_shapes, parameter_shapes
from jaxaccel.models.weights.errors import WeightsError, listed

KvLayout = Literal["concat", "per_head"]
Family = Literal["llama", "geb", "gguf", "llada"]

_THREADS = 2
_TOP: dict[Family, dict[str, str]] = {
    "llama": {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"},
    "geb": {
        "embedding": "transformer.embedding.word_embeddings.weight",
        "final_norm": "transformer.encoder.final_layernorm.weight",
        "head": "transformer.output_layer.weight",
    },
    "gguf": {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"},
    "llada": {
        "embedding": "model.transformer.wte.weight",
        "final_norm": "model.transformer.ln_f.weight",
        "head": "model.transformer.ff_out.weight",
    },
}
_BLOCK: dict[Family, str] = {
    "llama": "model.layers.",
    "geb": "transformer.encoder.layers.",
    "gguf": "blk.",
    "llada": "model.transformer.blocks.",
}
_PREFIX: dict[Family, str] = {"llama": "model.", "llada": "model.transformer."}  # some files leave it out
# A tensor of a block, and the parameters whose rows it stacks.
_LAYER: dict[Family, dict[str, tuple[str, ...]]] = {
    "llama": {
        "input_layernorm.weight": ("attention_norm",),
        "self_attn.q_proj.weight": ("q",),
        "self_attn.k_proj.weight": ("k",),
        "self_attn.v_proj.weight": ("v",),
        "self_attn.o_proj.weight": ("o",),
        "self_attn.q_proj.bias": ("q_bias",),
        "self_attn.k_proj.bias": ("k_bias",),
        "self_attn.v_proj.bias": ("v_bias",),
        "post_attention_layernorm.weight": ("mlp_norm",),
        "mlp.gate_proj.weight": ("gate",),
        "mlp.up_proj.weight": ("up",),
        "mlp.down_proj.weight": ("down",),
    },
    "geb": {
        "input_layernorm.weight": ("attention_norm",),
        "self_attention.query.weight": ("q",),
        "self_attention.query.bias": ("q_bias",),
        "self_attention.key_value.weight": ("k", "v"),
        "self_attention.key_value.bias": ("k_bias", "v_bias"),
        "self_attention.dense.weight": ("o",),
        "post_attention_layernorm.weight": ("mlp_norm",),
        "mlp.dense_h_to_4h.weight": ("gate", "up"),
        "mlp.dense_4h_to_h.weight": ("down",),
    },
    "gguf": {
        "attn_norm.weight": ("attention_norm",),
        "attn_q.weight": ("q",),
        "attn_k.weight": ("k",),
        "attn_v.weight": ("v",),
        "attn_output.weight": ("o",),
        "attn_q.bias": ("q_bias",),
        "attn_k.bias": ("k_bias",),
        "attn_v.bias": ("v_bias",),
        "ffn_norm.weight": ("mlp_norm",),
        "ffn_gate.weight": ("gate",),
        "ffn_up.weight": ("up",),
        "ffn_down.weight": ("down",),
    },
    "llada": {
        "attn_norm.weight": ("attention_norm",),
        "q_proj.weight": ("q",),
        "k_proj.weight": ("k",),
        "v_proj.weight": ("v",),
        "attn_out.weight": ("o",),
        "q_proj.bias": ("q_bias",),
        "k_proj.bias": ("k_bias",),
        "v_proj.bias": ("v_bias",),
        "ff_norm.weight": ("mlp_norm",),
        "ff_proj.weight": ("gate",),
        "up_proj.weight": ("up",),
        "ff_out.weight": ("down",),
    },
}
_IGNORED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope_freqs.weight")  # the configuration says it


def family_of(names: Mapping[str, Any]) -> Family:
    """Whose names these are.

    >>> family_of({"blk.0.attn_q.weight": ...})
    'gguf'
    """
    if any(name.startswith(("model.transformer.", "wte.", "blocks.")) for name in names):
        return "llada"
    if any(name.startswith("transformer.") for name in names):
        return "geb"
    return "gguf" if any(name.startswith(("blk.", "token_embd.")) for name in names) else "llama"


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of matrices stacked along their rows."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _plan(config: DecoderConfig, family: Family) -> dict[str, tuple[tuple[int, ...], int, tuple[str, ...]]]:
    """For every tensor the file should have: its shape, its layer (-1: none) and the parameters it stacks."""
    shapes, layer = parameter_shapes(config), layer_shapes(config)
    plan: dict[str, tuple[tuple[int, ...], int, tuple[str, ...]]] = {
        file: (shapes[name], -1, (name,)) for name, file in _TOP[family].items() if name in shapes
    }
    for i in range(config.num_layers):
        for file, names in _LAYER[family].items():
            if all(name in layer for name in names):
                plan[f"{_BLOCK[family]}{i}.{file}"] = (_stacked([layer[name] for name in names]), i, names)
    return plan


def _split(
    stacked: np.ndarray, rows: list[int], names: tuple[str, ...], head_dim: int, layout: str
) -> list[np.ndarray]:
    """Take apart what a file stacks; ``per_head`` keys and values alternate head by head."""
    if len(names) == 1:
        return [stacked]
    if names[0][0] == "k" and layout == "per_head":
        heads = stacked.reshape(-1, 2, head_dim, *stacked.shape[1:])
        return [heads[:, part].reshape(-1, *stacked.shape[1:]) for part in range(2)]
    return np.split(stacked, np.cumsum(rows)[:-1])


def _check_tied(mapping: Mapping[str, Any], head: str, embedding: str) -> None:
    """A tied decoder may be saved with its output matrix, if it is the embedding's copy."""
    if not np.array_equal(np.asarray(mapping[head]), np.asarray(mapping[embedding])):
        raise WeightsError(
            f"{head} differs from {embedding}, but the configuration ties them; load with tie_embeddings=False"
        )


def params_from_names(
    mapping: Mapping[str, Any],
    config: DecoderConfig,
    *,
    kv_layout: KvLayout = "concat",
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Turn tensors by their names in files into the decoder's tree of parameters.

    Args:
        mapping: NumPy arrays, or what ``np.asarray`` takes, by name; a lazy mapping is read tensor by tensor. GGUF's
            rows of queries and keys must be in halves already, as `gguf_files.GgufTensors` gives them.
        config: the decoder's numbers.
        kv_layout: order of GEB's fused key_value rows: all keys then all values (``"concat"``), or each head's keys
            then its values (``"per_head"``).
        dtype: floating dtype of the parameters.

    Returns:
        NumPy arrays in the tree of `decoder_config.parameter_shapes`. They own their memory.

    Raises:
        WeightsError: listing all missing, unexpected and misshapen tensors by name, or one that is not floating point.
        ValueError: for an unknown ``kv_layout``.
        TypeError: if ``dtype`` is not floating point.

    >>> config = DecoderConfig.tiny(num_layers=1, tie_embeddings=True)
    >>> shapes = {name: shape for name, (shape, *_) in _plan(config, "llama").items()}
    >>> params = params_from_names({name: np.zeros(shape) for name, shape in shapes.items()}, config)
    >>> params["layers"][0]["gate"].shape
    (48, 32)
    """
    if kv_layout not in ("concat", "per_head"):
        raise ValueError(f"kv_layout is {kv_layout!r}, expected concat or per_head")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype is {dtype}, expected floating point")
    family = family_of(mapping)
    if family == "gguf" and config.rope_layout != "half":
        raise ValueError(f"rope_layout is {config.rope_layout!r}, expected 'half', which GGUF's rows are put into")
    plan, top = _plan(config, family), _TOP[family]
    prefix = _PREFIX.get(family, "")
    bare = not any(name.startswith(prefix) for name in mapping)
    source = {name: name.removeprefix(prefix) if bare else name for name in plan}  # the file's own names

    def ignored(name: str) -> bool:
        return name.endswith(_IGNORED) or (config.tie_embeddings and name == top["head"])

    missing = [name for name in source.values() if name not in mapping]
    expected = set(source.values())
    unexpected = [name for name in mapping if name not in expected and not ignored(name)]
    problems = [f"missing: {listed(missing)}"] if missing else []
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    if missing == [top["head"]]:
        problems.append("a file without an output matrix wants tie_embeddings=True")
    fresh = getattr(mapping, "fresh", False)  # made for this call, as dequantised tensors are
    dtypes: dict[str, str] = {}
    bad_shapes: list[str] = []
    params: dict[str, Any] = {"layers": [{} for _ in range(config.num_layers)]}
    layer = layer_shapes(config)

    def load(name: str) -> None:
        shape, index, names = plan[name]
        value = np.asarray(mapping[source[name]])
        if value.shape != shape:
            bad_shapes.append(f"{source[name]} is {list(value.shape)}, expected {list(shape)}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            dtypes[source[name]] = str(value.dtype)
        elif not problems:
            rows = [layer[part][0] for part in names] if len(names) > 1 else []
            target = params if index < 0 else params["layers"][index]
            for part, piece in zip(names, _split(value, rows, names, config.head_dim, kv_layout), strict=True):
                # A view would keep a whole fused matrix, or a mapped file, alive.
                target[part] = np.ascontiguousarray(piece.astype(dtype, copy=not fresh))

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(load, [name for name in plan if source[name] in mapping]))
    if bad_shapes:
        problems.append(f"wrong shapes: {listed(sorted(bad_shapes))}")
    if dtypes:
        problems.append(f"not floating point: {listed([f'{name} ({kind})' for name, kind in sorted(dtypes.items())])}")
    if problems:
        raise WeightsError("tensors do not fit the configuration; " + "; ".join(problems))
    if config.tie_embeddings and top["head"] in mapping:
        _check_tied(mapping, top["head"], source[top["embedding"]])
    return params
