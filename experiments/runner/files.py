"""Small files written so that a reader never sees half of one."""

import json
import os
import pathlib
import tempfile
from typing import Any


class OutputError(RuntimeError):
    """The output directory cannot be written or holds something that does not belong there."""


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it to disk and rename it into place.

    Raises:
        OutputError: if the directory cannot be written or the disk is full. What stood at ``path`` is unharmed.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's files are private to their owner
            os.fsync(file.fileno())
        pathlib.Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON atomically; refuses NaN, which JSON has no word for."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
    """Read JSON.

    Raises:
        OutputError: if the file is not JSON (cut short or edited), naming it.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} is not valid JSON ({error}); remove it to have it made again") from error
