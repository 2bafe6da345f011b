"""Small trained parts as safetensors files: arrays by name, and strings about them. Such a file never runs code.

A file appears under its name complete, or not at all. What the arrays must be is for the callers to say
(`heads_file`, `learn2pd.filter_file`).
"""

import importlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
"""Floating dtypes by the format's names."""


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("these files need the package safetensors: pip install 'jaxaccel[models]'") from error


def check_floating(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a `TypeError` unless all arrays have one of the dtypes of `FLOATS`."""
    for name, array in arrays.items():
        if array.dtype not in [np.dtype(dtype) for dtype in FLOATS.values()]:
            raise TypeError(f"{name} must be of float16, bfloat16, float32 or float64, got {array.dtype}")


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], said: Mapping[str, str], *, kind: str, version: int
) -> None:
    """Write a file beside the one that is meant, then rename it. The folder is made.

    Args:
        path: the file.
        arrays: contiguous.
        said: strings about them.
        kind: name of the format, which `read_arrays` asks for.
        version: of the format.

    Raises:
        OSError: if the file cannot be written.
        ImportError: without the package ``safetensors``.
    """
    path = pathlib.Path(path)
    metadata = {"format": kind, "version": str(version), **said}
    data = _package("safetensors.numpy").save(dict(arrays), metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = pathlib.Path(folder) / path.name
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)


def read_arrays(
    path: str | os.PathLike[str], *, kind: str, version: int, what: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the table of a file: entries for `array_of` by name, and strings about them.

    Args:
        path: the file.
        kind: name of the format.
        version: of the format.
        what: the files hold, for the message.

    Raises:
        ValueError: naming the file, if it is cut off, something else, or of another version.
        OSError: if it cannot be read.
        ImportError: without the package ``safetensors``.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    package = _package("safetensors")
    try:
        entries = package.deserialize(data)
    except package.SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
    said = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if said.get("format") != kind:
        raise ValueError(f"{path}: not a file of {what}: its format is {said.get('format')!r}, not {kind!r}")
    if said.get("version") != str(version):
        raise ValueError(f"{path}: its format has version {said.get('version')!r}, expected {version}")
    return dict(entries), said


def array_of(name: str, entry: Mapping[str, Any], dtypes: Mapping[str, Any] = FLOATS) -> np.ndarray:
    """One array of a file.

    Raises:
        ValueError: if it has none of ``dtypes``.
    """
    # Not through safetensors.numpy, which does not know bfloat16 in all versions.
    if entry["dtype"] not in dtypes:
        raise ValueError(f"{name} is of {entry['dtype']}, expected {' or '.join(dtypes)}")
    return np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
