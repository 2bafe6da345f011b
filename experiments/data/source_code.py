"""Source code that ships with Python itself: the standard library's top-level modules, as bytes."""

import functools
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """A corpus of bytes: u8 ``[N]`` for training and for validation."""

    train: np.ndarray
    validation: np.ndarray


@functools.cache
def load_stdlib_source() -> Source:
    """Read the ``*.py`` files at the top of the standard library (4.7 MB with Python 3.11).

    Files are joined in alphabetical order; the last twentieth of the bytes is for validation. The text is the same on
    every machine with the same Python version.

    Raises:
        FileNotFoundError: if this Python keeps no sources, as some stripped installations do.
    """
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda path: path.name)
    if not files:
        raise FileNotFoundError(f"no *.py files in {folder}: this Python was installed without its sources")
    joined = np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)
    cut = int(0.95 * len(joined))
    return Source(joined[:cut], joined[cut:])
