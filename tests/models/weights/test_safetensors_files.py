"""Safetensors files of one and several parts, every dtype, and every way in which they may be broken."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxaccel.models.weights.errors import WeightsError
from jaxaccel.models.weights.safetensors_files import INDEX, SafetensorsFile, Shards, open_safetensors, shard_names
from tests.models.weights.making import BFLOAT16, write_json, write_safetensors


def tensors(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {"a": rng.standard_normal((3, 5)).astype(dtype), "b.c": rng.standard_normal(7).astype(dtype)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16, np.int32, np.uint8, np.bool_])
def test_every_dtype_is_read_as_it_was_written(tmp_path, dtype):
    # A first tensor of 3 bytes leaves all others where no number of several bytes should lie.
    written = {"odd": np.arange(3, dtype=np.uint8)} | tensors(dtype) | {"none": np.zeros((0, 4), dtype)}
    read = SafetensorsFile(write_safetensors(tmp_path / "x.safetensors", written, format="pt"))
    assert len(read) == len(written)
    assert list(read) == list(written)
    for name, value in written.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_the_package_safetensors_agrees(tmp_path):
    safetensors.numpy.save_file(tensors(), tmp_path / "x.safetensors", metadata={"format": "np"})
    read = open_safetensors(tmp_path / "x.safetensors")
    for name, value in tensors().items():
        np.testing.assert_array_equal(read[name], value)
    write_safetensors(tmp_path / "y.safetensors", tensors())
    for name, value in safetensors.numpy.load_file(tmp_path / "y.safetensors").items():
        np.testing.assert_array_equal(value, tensors()[name])


def sharded(folder, **changes):
    for i, (name, value) in enumerate(tensors().items()):
        write_safetensors(folder / f"model-{i}.safetensors", {name: value})
    where = {"a": "model-0.safetensors", "b.c": "model-1.safetensors"} | changes
    return write_json(folder / INDEX, {"metadata": {}, "weight_map": where})


def test_shards_are_one_mapping(tmp_path):
    index = sharded(tmp_path)
    assert shard_names(index) == ["model-0.safetensors", "model-1.safetensors"]
    for opened in (open_safetensors(tmp_path), open_safetensors(index)):
        assert isinstance(opened, Shards)
        assert (list(opened), len(opened)) == (["a", "b.c"], 2)
        for name, value in tensors().items():
            np.testing.assert_array_equal(opened[name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b.c": "model-9.safetensors"}, "1 of 2 files are missing: model-9.safetensors"),
        ({"b.c": "model-0.safetensors"}, r"not in the files it names: b.c in model-0.safetensors"),
        ({"b.c": "../model-0.safetensors"}, "beside the index: ../model-0.safetensors"),
        ({"b.c": 3}, "no weight_map"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        Shards(sharded(tmp_path, **changes))


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    with pytest.raises(WeightsError, match=r"index.json: corrupt: it has no weight_map"):
        open_safetensors(write_json(tmp_path / INDEX, content))


def test_a_folder_names_its_file(tmp_path):
    with pytest.raises(WeightsError, match=r"expected model.safetensors or .*, found none"):
        open_safetensors(tmp_path)
    write_safetensors(tmp_path / "other.safetensors", tensors())
    np.testing.assert_array_equal(open_safetensors(tmp_path)["a"], tensors()["a"])
    write_safetensors(tmp_path / "second.safetensors", tensors())
    with pytest.raises(WeightsError, match=r"found other.safetensors, second.safetensors"):
        open_safetensors(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"z": np.ones(1)})
    assert list(open_safetensors(tmp_path)) == ["z"]


def test_a_file_that_was_cut_off_says_where(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", tensors())
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    cuts = {
        0: "truncated, or not a safetensors file",
        5: "truncated, or not a safetensors file",
        begin - 1: "truncated, or not a safetensors file: its header should take",
        begin + 59: rf"truncated: tensor 'a' ends at byte {begin + 60}, the file has {begin + 59} bytes",
        len(whole) - 1: rf"x.safetensors: truncated: tensor 'b.c' ends at byte {len(whole)}",
    }
    for size, message in cuts.items():
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=message):
            SafetensorsFile(path)


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(100))  # how a pickle begins
    with pytest.raises(WeightsError, match="not a safetensors file"):
        SafetensorsFile(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(WeightsError, match=r"only a pointer of Git LFS to the file; .* git lfs pull"):
        SafetensorsFile(path)
    with pytest.raises(WeightsError, match=r"missing.safetensors: cannot be read"):
        SafetensorsFile(tmp_path / "missing.safetensors")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "corrupt: its header is not JSON"),
        (b"\xff\xff", "corrupt: its header is not JSON"),
        (b"[1]", "corrupt: its header is not a table"),
        ({"w": 1}, "the entry of tensor 'w' is 1"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "the entry of tensor 'w'"),
        ({"w": GOOD | {"data_offsets": [0, 4, 8]}}, "the entry of tensor 'w'"),
        ({"w": GOOD | {"dtype": ["F32"]}}, "the entry of tensor 'w'"),
        ({"w": GOOD | {"dtype": "F4"}}, "tensor 'w' has the unsupported dtype F4"),
        ({"w": GOOD | {"shape": [3]}}, r"tensor 'w', F32 \[3\], has bytes 0 to 8"),
        ({"w": GOOD | {"shape": [-1, -2]}}, r"tensor 'w', F32 \[-1, -2\]"),
        ({"w": GOOD | {"shape": ["2"]}}, "corrupt: tensor 'w'"),
        ({"w": GOOD | {"data_offsets": [-8, 0]}}, "has bytes -8 to 0"),
        ({"w": GOOD | {"data_offsets": [0.0, 8.0]}}, "has bytes 0.0 to 8.0"),
    ],
)
def test_a_corrupt_header_is_named(tmp_path, header, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(WeightsError, match=message):
        SafetensorsFile(path)
