"""Metadata and the table of tensors of a GGUF file (versions 2 and 3, little endian).

The package ``gguf`` has a reader too; this one builds no array per word of the vocabulary, which makes it about 30
times faster, and says where a file that was cut off ends. Numbers in tensors are read in `gguf_files`.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from jaxaccel.models.weights.errors import WeightsError, optional_module, refuse_pointer

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies."""

    shape: tuple[int, ...]  # slowest axis first, as NumPy has it: [out, in]
    kind: str  # "F32", "Q4_1", ...
    offset: int  # of its first byte in the file
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file's metadata and tensors by name."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads forwards and never past the end."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def skip(self, size: int) -> int:
        """Move over ``size`` bytes and return where they start."""
        start = self.at
        if start + size > len(self.data):
            raise WeightsError(
                f"{self.path}: truncated: its header goes on to byte {start + size} at least, "
                f"the file has {len(self.data)} bytes; fetch it again"
            )
        self.at = start + size
        return start

    def scalar(self, code: str) -> Any:
        """Read one number."""
        layout = "<" + code
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def string(self) -> str:
        """Read a length and as many bytes of UTF-8."""
        size = self.scalar("Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path}: corrupt: the string at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Read a value of the metadata."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise WeightsError(f"{self.path}: corrupt: unknown type {kind} of metadata before byte {self.at}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise WeightsError(f"{self.path}: unsupported: a list of type {item} in the metadata before byte {self.at}")
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data[start : self.at], dtype).tolist()


def _tensor(cursor: _Cursor, constants: Any) -> tuple[str, GgufTensor]:
    name = cursor.string()
    axes = cursor.scalar("I")
    if axes > 4:
        raise WeightsError(f"{cursor.path}: corrupt: tensor {name!r} has {axes} axes, expected at most 4")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = constants.GGMLQuantizationType(number)
        block, size = constants.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise WeightsError(f"{cursor.path}: tensor {name!r} has the unsupported type number {number}") from error
    if shape and shape[-1] % block:
        raise WeightsError(
            f"{cursor.path}: corrupt: rows of tensor {name!r} have {shape[-1]} numbers, expected a multiple of the "
            f"block of {kind.name}, {block}"
        )
    return name, GgufTensor(shape, kind.name, offset, math.prod(shape) // block * size)


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read what a GGUF file holds, without its weights.

    Args:
        path: the file.

    Returns:
        Metadata and the place of every tensor.

    Raises:
        WeightsError: naming the file and what is wrong: not GGUF, another byte order or version, cut off, corrupt, or
            a type of tensor that is not known.
        ImportError: without the package ``gguf``.

    >>> read_gguf("smollm2.gguf").metadata["general.architecture"]  # doctest: +SKIP
    'llama'
    """
    path = pathlib.Path(path)
    constants = optional_module("gguf.constants", "Reading GGUF files")
    try:
        with open(path, "rb") as stream:
            start = stream.read(4)
            if start != b"GGUF":
                refuse_pointer(path)
                raise WeightsError(f"{path}: not a GGUF file: it starts with {start!r}, expected b'GGUF'")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    with data:
        cursor = _Cursor(path, data)
        cursor.skip(4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise WeightsError(f"{path}: GGUF version {version} is not supported, expected 2 or 3 in little endian")
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {}
        for _ in range(num_values):
            name = cursor.string()
            metadata[name] = cursor.value(cursor.scalar("I"))
        tensors = dict(_tensor(cursor, constants) for _ in range(num_tensors))
        if len(tensors) != num_tensors:
            raise WeightsError(f"{path}: corrupt: {num_tensors} tensors have only {len(tensors)} names")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise WeightsError(f"{path}: corrupt: general.alignment is {alignment!r}, expected a positive integer")
        begin = -(-cursor.at // alignment) * alignment
        for name, tensor in tensors.items():
            end = begin + tensor.offset + tensor.num_bytes
            if end > len(data):
                raise WeightsError(
                    f"{path}: truncated: tensor {name!r} ends at byte {end}, the file has {len(data)} bytes; "
                    "fetch it again"
                )
    placed = {name: dataclasses.replace(t, offset=begin + t.offset) for name, t in tensors.items()}
    return GgufFile(path, metadata, placed)
