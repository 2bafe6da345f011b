"""GGUF files written by the package ``gguf``: every type of tensor, both architectures, and broken files."""

import struct

import gguf
import jax
import numpy as np
import pytest

from jaxaccel.models.decoder_config import DecoderConfig, RopeScaling
from jaxaccel.models.weights import WeightsError, load_pretrained
from jaxaccel.models.weights.gguf_files import GgufTensors, config_from_gguf
from jaxaccel.models.weights.gguf_header import read_gguf
from tests.models.weights.making import GGUF, GGUF_TOP, TINY, gguf_metadata, named, random_params, write_gguf

PARAMS = random_params(TINY)
HEADS = {"attn_q": TINY.num_heads, "attn_k": TINY.num_kv_heads}


def write(path, params=PARAMS, config=TINY, *, arch="llama", metadata=None, extra=None, **options):
    tensors = named(params, GGUF_TOP, GGUF, "blk.") | (extra or {})
    pairs = HEADS if arch == "llama" else None
    return write_gguf(path, tensors, gguf_metadata(config, arch) | (metadata or {}), arch=arch, pairs=pairs, **options)


def stored(value, kind):
    """What is left of a matrix in a type: rows do not depend on each other, so their order does not matter."""
    if kind == "F64" or value.ndim == 1:
        return value
    its = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(value, its), its)


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_every_type_is_read_as_it_was_written(tmp_path, kind):
    loaded = load_pretrained(write(tmp_path / "x.gguf", kind=kind))
    assert loaded.config == TINY
    assert (loaded.tokenizer, loaded.origin) == (None, tmp_path / "x.gguf")
    assert "has no tokenizer" in loaded.tokenizer_problem
    wanted = jax.tree.map(lambda value: stored(value, kind), PARAMS)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)
    assert {(leaf.dtype, leaf.flags.c_contiguous) for leaf in jax.tree.leaves(loaded.params)} == {
        (np.dtype(np.float32), True)
    }
    # Against the numbers themselves: half a step of the largest of 32 numbers, in a type of so many steps.
    steps = {"F64": 2**24, "F32": 2**24, "F16": 2**10, "BF16": 2**7, "Q8_0": 127, "Q4_0": 7, "Q4_1": 7, "Q5_0": 15}
    error = np.abs(loaded.params["layers"][0]["q"] - PARAMS["layers"][0]["q"]).max()
    assert error <= np.abs(PARAMS["layers"][0]["q"]).max() / steps[kind]


def test_types_may_be_mixed(tmp_path):
    kinds = {"token_embd.weight": "Q8_0", "blk.1.ffn_down.weight": "F16"}
    params = load_pretrained(write(tmp_path / "x.gguf", kind="Q4_1", kinds=kinds)).params
    np.testing.assert_array_equal(params["embedding"], stored(PARAMS["embedding"], "Q8_0"))
    np.testing.assert_array_equal(params["layers"][1]["down"], stored(PARAMS["layers"][1]["down"], "F16"))
    np.testing.assert_array_equal(params["layers"][0]["down"], stored(PARAMS["layers"][0]["down"], "Q4_1"))


def test_qwen2_has_biases_ties_and_rows_in_halves(tmp_path):
    config = DecoderConfig.tiny(intermediate_size=64, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6)
    params = random_params(config)
    loaded = load_pretrained(write(tmp_path / "x.gguf", params, config, arch="qwen2"), dtype=np.float16)
    assert loaded.config == config
    jax.tree.map(lambda got, value: np.testing.assert_array_equal(got, value.astype("f2")), loaded.params, params)


def frequencies(theta, size, factor=32.0):
    """Divisors as the converter of llama.cpp writes them."""
    divisors = []
    for i in range(0, size, 2):
        wave = 2 * np.pi * theta ** (i / size)
        if wave < 8192 / 4:
            divisors.append(1.0)
        elif wave > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_stretched_positions_of_llama_3(tmp_path):
    config = DecoderConfig.tiny(intermediate_size=64, rope_theta=500_000.0, head_dim=64)
    params = random_params(config)
    divisors, size = frequencies(500_000.0, 64), {"llama.attention.key_length": 64}
    assert 1 < sorted(set(divisors))[1] < 32  # some lie between the two limits
    read = config_from_gguf(
        read_gguf(write(tmp_path / "x.gguf", params, config, metadata=size, extra={"rope_freqs.weight": divisors}))
    )
    assert read.rope_scaling == RopeScaling(factor=32.0)
    for bad in (divisors * np.linspace(1, 2, 32, dtype=np.float32), divisors[:-1]):
        path = write(tmp_path / "y.gguf", params, config, metadata=size, extra={"rope_freqs.weight": bad})
        with pytest.raises(WeightsError, match=r"rope_freqs.weight is not Llama 3.1's scaling"):
            load_pretrained(path)


def test_configuration_may_be_replaced(tmp_path):
    path = write(tmp_path / "x.gguf", metadata={"llama.rope.scaling.type": "linear"})
    with pytest.raises(WeightsError, match=r"rope.scaling.type 'linear' is not supported"):
        load_pretrained(path)
    assert load_pretrained(path, config=TINY).config == TINY


def test_a_list_with_one_number_for_all_layers_is_that_number(tmp_path):
    path = write(tmp_path / "x.gguf", metadata={"llama.attention.head_count_kv": [2, 2]})
    assert load_pretrained(path).config == TINY


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, None),
        ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv differs between layers"),
        ({"llama.expert_count": 8}, "expert_count is 8, which is not supported"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is 64"),
        ({"llama.attention.head_count": 0}, "head_count is 0, expected a positive whole number"),
        ({"llama.block_count": "two"}, "block_count is 'two', expected a positive whole number"),
        ({"llama.attention.value_length": 4}, "value_length differs from key_length"),
        ({"llama.attention.head_count_kv": 3}, "x.gguf: its numbers do not fit together: num_heads"),
    ],
)
def test_what_the_decoder_lacks_is_named(tmp_path, metadata, message):
    if message is None:
        path = write_gguf(tmp_path / "x.gguf", {}, {}, arch="mamba")
        message = "architecture 'mamba' is not supported, expected llama or qwen2"
    else:
        path = write(tmp_path / "x.gguf", metadata=metadata)
    with pytest.raises(WeightsError, match=message):
        load_pretrained(path)


def test_what_is_missing_is_named(tmp_path):
    tensors = named(PARAMS, GGUF_TOP, GGUF, "blk.")
    metadata = gguf_metadata(TINY, block_count=None)
    with pytest.raises(WeightsError, match=r"metadata lack llama.block_count"):
        load_pretrained(write_gguf(tmp_path / "a.gguf", tensors, metadata))
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(WeightsError, match=r"b.gguf: .*missing: blk.1.ffn_up.weight$"):
        load_pretrained(write_gguf(tmp_path / "b.gguf", tensors, gguf_metadata(TINY)))
    tensors |= {"blk.1.ffn_up.weight": np.ones((64, 64)), "blk.0.attn_q.weight": np.ones((3, 32))}
    with pytest.raises(WeightsError, match=r"blk.0.attn_q.weight is \[3, 32\], .*blk.1.ffn_up.weight is \[64, 64\]"):
        load_pretrained(write_gguf(tmp_path / "c.gguf", tensors, gguf_metadata(TINY)))
    del tensors["token_embd.weight"]
    with pytest.raises(WeightsError, match=r"token_embd.weight is missing"):
        load_pretrained(write_gguf(tmp_path / "d.gguf", tensors, gguf_metadata(TINY)))
    with pytest.raises(WeightsError, match=r"token_embd.weight is of shape \[4\]"):
        load_pretrained(write_gguf(tmp_path / "e.gguf", {"token_embd.weight": np.ones(4)}, gguf_metadata(TINY)))


def test_every_cut_is_noticed(tmp_path):
    path = write(tmp_path / "x.gguf")
    whole, names = path.read_bytes(), list(read_gguf(path).tensors)
    begin = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    for size in [*range(4, begin, 97), begin, len(whole) // 2]:
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"x.gguf: truncated: .*fetch it again"):
            read_gguf(path)
    path.write_bytes(whole[: len(whole) - 200])
    with pytest.raises(WeightsError, match=rf"tensor '{names[-1]}' ends at byte \d+, the file has {len(whole) - 200}"):
        load_pretrained(path)


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for content, message in {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "only a pointer of Git LFS",
        b"": "not a GGUF file: it starts with b''",
        b"PK\x03\x04": r"not a GGUF file: it starts with b'PK\\x03\\x04'",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0): "GGUF version 1 is not supported",
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0): "expected 2 or 3 in little endian",
    }.items():
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            read_gguf(path)
    with pytest.raises(WeightsError, match=r"none.gguf: cannot be read"):
        read_gguf(tmp_path / "none.gguf")


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(kind, rest, name=b"k"):
    return text(name) + struct.pack("<I", kind) + rest


def tensor(shape=(32,), kind=0, name=b"t"):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ([entry(99, b"")], [], "corrupt: unknown type 99 of metadata"),
        ([entry(9, struct.pack("<IQ", 9, 1))], [], "unsupported: a list of type 9"),
        ([entry(8, text(b"\xff\xff"))], [], "corrupt: the string at byte .* is not UTF-8"),
        ([entry(8, struct.pack("<Q", 2**60))], [], "truncated"),
        ([entry(4, struct.pack("<I", 0), b"general.alignment")], [], "general.alignment is 0, expected a positive"),
        ([], [tensor((1,) * 5)], "tensor 't' has 5 axes, expected at most 4"),
        ([], [tensor(kind=4)], "tensor 't' has the unsupported type number 4"),
        ([], [tensor((33,), 2)], "rows of tensor 't' have 33 numbers, expected a multiple of the block of Q4_0, 32"),
        ([], [tensor(), tensor()], "2 tensors have only 1 names"),
    ],
)
def test_a_corrupt_header_is_named(tmp_path, metadata, tensors, message):
    path = tmp_path / "x.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    path.write_bytes(head + b"".join(metadata) + b"".join(tensors) + bytes(4096))
    with pytest.raises(WeightsError, match=message):
        read_gguf(path)


def test_metadata_of_every_type(tmp_path):
    scalars = {0: ("B", 7), 1: ("b", -7), 2: ("H", 7), 3: ("h", -7), 4: ("I", 7), 5: ("i", -7), 6: ("f", 0.5),
               7: ("?", True), 10: ("Q", 7), 11: ("q", -7), 12: ("d", 0.1)}  # fmt: skip
    entries, wanted = [], {}
    for kind, (code, value) in scalars.items():
        entries.append(entry(kind, struct.pack("<" + code, value), b"one%d" % kind))
        entries.append(entry(9, struct.pack(f"<IQ2{code}", kind, 2, value, value), b"two%d" % kind))
        wanted |= {f"one{kind}": value, f"two{kind}": [value, value]}
    entries.append(entry(9, struct.pack("<IQ", 8, 1) + text("é".encode()), b"words"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, len(entries)) + b"".join(entries))
    assert read_gguf(path).metadata == wanted | {"words": ["é"]}


def test_types_without_a_reader_are_named(tmp_path):
    path = tmp_path / "x.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    path.write_bytes(head + tensor((32,), int(gguf.GGMLQuantizationType.I32)) + bytes(4096))
    with pytest.raises(WeightsError, match="tensor 't' has the type I32, which is not supported"):
        GgufTensors(read_gguf(path), TINY)["t"]
