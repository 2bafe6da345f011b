"""Weights and configuration from GGUF files of the architectures ``llama`` (Mistral and SmolLM too) and ``qwen2``.

Files of ``llama`` keep the rows of the query and key products in the order that interleaved rotary positions want:
channel pairs (2i, 2i + 1) of each head. The decoder turns (i, i + H/2), so rows are put back here, head by head.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxaccel.models.decoder_config import DecoderConfig, RopeScaling
from jaxaccel.models.weights.errors import WeightsError, optional_module
from jaxaccel.models.weights.gguf_header import GgufFile, GgufTensor

ARCHITECTURES = ("llama", "qwen2")
_CHUNK = 1 << 14  # bytes of a row given to gguf, which loops over 16 rows at a time in Python


def split_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Put rows of heads from pairs (2i, 2i + 1) into halves (i, i + H/2).

    Args:
        rows: [N·H] or [N·H, D].
        num_heads: heads N.

    Returns:
        The same rows in the other order.

    >>> split_pairs(np.arange(8), num_heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _numbers(raw: np.ndarray, tensor: GgufTensor, name: str, file: GgufFile) -> np.ndarray:
    """A tensor's numbers in float32, or in the dtype it is stored in."""
    stored = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    if tensor.kind in stored:
        return raw.view(stored[tensor.kind]).reshape(tensor.shape).copy()
    gguf = optional_module("gguf", "Reading GGUF files")
    kind = gguf.GGMLQuantizationType[tensor.kind]
    size = gguf.constants.GGML_QUANT_SIZES[kind][1]
    blocks = raw.size // size
    # Blocks stand alone, so rows may be cut anywhere between them.
    per_row = math.gcd(blocks, 1 << max(0, (_CHUNK // size).bit_length()))
    try:
        return gguf.quants.dequantize(raw.reshape(-1, per_row * size), kind).reshape(tensor.shape)
    except NotImplementedError as error:
        raise WeightsError(
            f"{file.path}: tensor {name!r} has the type {tensor.kind}, which is not supported"
        ) from error


class GgufTensors(Mapping[str, np.ndarray]):
    """Tensors of a GGUF file by name, read when asked for; rows of queries and keys in halves.

    Args:
        file: from `read_gguf`.
        config: its configuration, for the number of heads.
    """

    fresh = True  # arrays are made for each call: nobody else holds them

    def __init__(self, file: GgufFile, config: DecoderConfig) -> None:
        self._file, self._raw = file, np.memmap(file.path, np.uint8, "r")
        paired = file.metadata.get("general.architecture") == "llama"
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if paired else {}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._file.tensors[name]
        raw = np.asarray(self._raw[tensor.offset : tensor.offset + tensor.num_bytes])
        numbers = _numbers(raw, tensor, name, self._file)
        heads = self._heads.get(name.split(".")[-2] if "." in name else "")
        divisible = heads and numbers.shape[0] % (2 * heads) == 0  # else its shape is refused later, by name
        return split_pairs(numbers, heads) if heads and divisible else numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)


def _stretch(file: GgufFile, theta: float, size: int) -> RopeScaling | None:
    """Llama 3.1's scaling, of which GGUF keeps only the divisors of the frequencies."""
    if "rope_freqs.weight" not in file.tensors:
        return None
    tensor = file.tensors["rope_freqs.weight"]
    raw = np.fromfile(file.path, np.uint8, tensor.num_bytes, offset=tensor.offset)
    divisors = _numbers(raw, tensor, "rope_freqs.weight", file).astype(np.float64)
    scaling = RopeScaling(factor=float(divisors.max(initial=1.0)))
    cycles = scaling.original_positions / (2 * np.pi * theta ** (np.arange(0, size, 2) / size))
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = np.clip((cycles - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / scaling.factor + share)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise WeightsError(
            f"{file.path}: rope_freqs.weight is not Llama 3.1's scaling, which is the only supported one"
        )
    return scaling


def config_from_gguf(file: GgufFile) -> DecoderConfig:
    """Read the decoder's numbers from a GGUF file's metadata.

    Args:
        file: from `read_gguf`.

    Returns:
        The configuration.

    Raises:
        WeightsError: for another architecture, a missing number, or a setting that the decoder does not have.

    >>> config_from_gguf(read_gguf("smollm2.gguf")) == DecoderConfig.preset("smollm2-135m")  # doctest: +SKIP
    True
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise WeightsError(
            f"{file.path}: architecture {kind!r} is not supported, expected {' or '.join(ARCHITECTURES)}"
        )

    def get(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{name}", default)
        if isinstance(value, list):  # a number per layer
            if len(set(value)) != 1:
                raise WeightsError(f"{file.path}: {kind}.{name} differs between layers, which is not supported")
            value = value[0]
        if value is None:
            raise WeightsError(f"{file.path}: the metadata lack {kind}.{name}")
        # GGUF keeps float32: 1e-5 arrives as 9.99999974e-6. The shortest decimal is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(name: str, default: int | None = None) -> int:
        value = get(name, default)
        if type(value) is not int or value < 1:
            raise WeightsError(f"{file.path}: {kind}.{name} is {value!r}, expected a positive whole number")
        return value

    if get("rope.scaling.type", "none") != "none":
        raise WeightsError(f"{file.path}: {kind}.rope.scaling.type {get('rope.scaling.type')!r} is not supported")
    for name in ("expert_count", "attention.sliding_window"):
        if get(name, 0):
            raise WeightsError(f"{file.path}: {kind}.{name} is {get(name)}, which is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        shape = "missing" if embedding is None else f"of shape {list(embedding.shape)}, expected two axes"
        raise WeightsError(f"{file.path}: the tensor token_embd.weight is {shape}")
    width, heads = count("embedding_length"), count("attention.head_count")
    size = count("attention.key_length", width // heads)
    if count("attention.value_length", size) != size:
        raise WeightsError(
            f"{file.path}: {kind}.attention.value_length differs from key_length, which is not supported"
        )
    theta = float(get("rope.freq_base", 10_000.0))
    turned = count("rope.dimension_count", size)
    numbers = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": count("feed_forward_length"),
        "num_layers": count("block_count"),
        "num_heads": heads,
        "num_kv_heads": count("attention.head_count_kv", heads),
        "head_dim": size,
        "max_positions": count("context_length"),
        "norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rotary_fraction": turned / size,
        "rope_scaling": _stretch(file, theta, turned),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    try:
        return DecoderConfig(**numbers)
    except ValueError as error:
        raise WeightsError(f"{file.path}: its numbers do not fit together: {error}") from error
