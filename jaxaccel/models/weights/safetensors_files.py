"""Tensors of safetensors files, one or several, mapped into memory and read when asked for.

The format is a length in 8 bytes, a JSON table and plain numbers; read here rather than through the package
``safetensors`` because its NumPy side does not know bfloat16 in all versions.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxaccel.models.weights.errors import WeightsError, listed, read_json, refuse_pointer

INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # the format's own limit


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The table of tensors, and where the numbers begin."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                refuse_pointer(path)
                raise WeightsError(
                    f"{path}: truncated, or not a safetensors file: its header should take {length} bytes, "
                    f"the file has {size}"
                )
            text = stream.read(length)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        table = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{path}: corrupt: its header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path}: corrupt: its header is not a table of tensors")
    table.pop("__metadata__", None)
    return table, 8 + length


class SafetensorsFile(Mapping[str, np.ndarray]):
    """Tensors of one file by name.

    Args:
        path: the file.

    Raises:
        WeightsError: naming the file and what is wrong with it: cut off, corrupt, or of an unknown dtype.
    """

    def __init__(self, path: pathlib.Path) -> None:
        table, begin = _header(path)
        self._places: dict[str, tuple[np.dtype, tuple[int, ...], int, int]] = {}
        size = path.stat().st_size
        for name, entry in table.items():
            try:
                kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                numbers = all(type(n) is int and n >= 0 for n in (*shape, start, end))
                known = kind in _DTYPES
            except (TypeError, KeyError, ValueError) as error:
                raise WeightsError(f"{path}: corrupt: the entry of tensor {name!r} is {entry!r}") from error
            if not known:
                raise WeightsError(f"{path}: tensor {name!r} has the unsupported dtype {kind}")
            dtype = np.dtype(_DTYPES[kind])
            if not numbers or end - start != math.prod(shape) * dtype.itemsize:
                raise WeightsError(
                    f"{path}: corrupt: tensor {name!r}, {kind} {list(shape)}, has bytes {start} to {end}"
                )
            if begin + end > size:
                raise WeightsError(
                    f"{path}: truncated: tensor {name!r} ends at byte {begin + end}, the file has {size} bytes; "
                    "fetch it again"
                )
            self._places[name] = dtype, shape, begin + start, begin + end
        self._raw = np.memmap(path, np.uint8, "r")

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, start, end = self._places[name]
        return np.asarray(self._raw[start:end]).view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensors to files, as an index says."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise WeightsError(f"{index}: corrupt: it has no weight_map of names to files")
    outside = sorted({name for name in where.values() if pathlib.PurePath(name).name != name})
    if outside:
        raise WeightsError(f"{index}: files must lie beside the index: {listed(outside)}")
    return where


def shard_names(index: pathlib.Path) -> list[str]:
    """Files that an index distributes tensors to.

    Args:
        index: ``model.safetensors.index.json``.

    Returns:
        Their names, sorted.

    Raises:
        WeightsError: for an index that cannot be read, has no map, or leads out of its folder.

    >>> shard_names(pathlib.Path("llama") / INDEX)[0]  # doctest: +SKIP
    'model-00001-of-00004.safetensors'
    """
    return sorted(set(_weight_map(index).values()))


class Shards(Mapping[str, np.ndarray]):
    """Tensors of several files by name, as an index file distributes them.

    Args:
        index: ``model.safetensors.index.json``.

    Raises:
        WeightsError: naming an index without a map, files that are missing, or tensors that are not where it says.
    """

    def __init__(self, index: pathlib.Path) -> None:
        where, files = _weight_map(index), shard_names(index)
        missing = [name for name in files if not (index.parent / name).is_file()]
        if missing:
            raise WeightsError(f"{index}: {len(missing)} of {len(files)} files are missing: {listed(missing)}")
        opened = {name: SafetensorsFile(index.parent / name) for name in files}
        astray = [f"{name} in {file}" for name, file in where.items() if name not in opened[file]]
        if astray:
            raise WeightsError(f"{index}: tensors are not in the files it names: {listed(astray)}")
        self._where = {name: opened[file] for name, file in where.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_safetensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """Open one file, or all files of an index or of a folder.

    Args:
        path: a ``.safetensors`` file, an index, or a folder with ``model.safetensors``, an index or one other file.

    Returns:
        Arrays by name, read when asked for. They are views of the mapped file: copy what is to outlive it.

    Raises:
        WeightsError: naming what is missing, ambiguous, cut off or corrupt.

    >>> open_safetensors(pathlib.Path("smollm2"))["model.norm.weight"].shape  # doctest: +SKIP
    (576,)
    """
    if path.is_dir():
        single, index = path / "model.safetensors", path / INDEX
        if single.is_file() or index.is_file():
            return open_safetensors(single if single.is_file() else index)
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = listed([file.name for file in found]) if found else "none"
            raise WeightsError(f"{path}: expected model.safetensors or {INDEX}, found {names}")
        return SafetensorsFile(found[0])
    return Shards(path) if path.name.endswith(".json") else SafetensorsFile(path)
