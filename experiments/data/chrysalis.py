"""Chrysalis-HLS: C++ functions for high-level synthesis, each with bugs that were put into it on purpose.

The data set is a folder, a clone of github.com/UIUC-ChenLab/Chrysalis-HLS (Apache-2.0; nothing of it is shipped here).
A function lies in ``<suite>/<function>/Source_Code/<function>.cpp`` and its bugs in ``<suite>/<function>/Bugs/*.txt``,
JSON patches of one or two replacements::

    {"Error Size": 1,
     "Error Specification": [{"Error Type": "OOB", "Original Code": "i < 8", "Faulty Code": "i <= 8"}]}

`read_chrysalis` applies the patches. A replacement takes the place of the first occurrence of its original code, found
as it stands or, where it is not, with all white space left out (the patches have lost the indentation of the code). The
replacements of a patch are applied in the order of the file, each to the result of the one before.

The patches were written by a language model. Of the 19818 in commit 63be1a1 (1101 functions) 1053 cannot be applied:
620 misquote the original code, mostly as "for (...) { ... }", and in 433 the second replacement wants code that the
first one has changed. By default the first such patch is an error that names the file; with ``unusable="skip"`` they
are left out and listed.

Functions have many bugs each, so split by `Bug.function`, not by record: otherwise a classifier sees the clean code of
its test set. Described in Huang et al., arXiv 2406.10903.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.data.hub import DataError

BUG_TYPES = {
    "OOB": "array access out of bounds",
    "INIT": "read of an uninitialised variable",
    "SHFT": "bit shift by an amount out of bounds",
    "INF": "loop that does not end",
    "USE": "unintended sign extension",
    "MLU": "mistake in a loop unrolled by hand",
    "ZERO": "variable that starts at zero and should not",
    "BUF": "copy from the wrong half of a buffer",
    "APT": "array partition of the wrong type",
    "FND": "array partition by a factor that does not divide",
    "DID": "array partition along the wrong dimension",
    "DFP": "dataflow pragma in the wrong place",
    "IDAP": "interface that does not fit the pattern of access",
    "RAMB": "random access through an interface made for bursts",
    "SMA": "scalar mapped to an interface for arrays",
    "AMS": "array mapped to an interface for scalars",
    "MLP": "pipelining on several levels of loops",
    "ILNU": "inner loops that are not unrolled fully",
}
"""The types of bugs, in the order of the columns of `labels`; from ``APT`` on they are misplaced pragmas."""

_FIELDS = ("Error Type", "Original Code", "Faulty Code")


class Bug(NamedTuple):
    """A function without and with a bug.

    Attributes:
        clean: the function.
        buggy: the function after the patch.
        types: types of the bugs in it, one or two of `BUG_TYPES`, in the order of the patch.
        function: ``<suite>/.../<function>``, relative to the folder that was read; the group to split by.
        path: the patch's file, relative to the folder that was read.
    """

    clean: str
    buggy: str
    types: tuple[str, ...]
    function: str
    path: str


class Unusable(NamedTuple):
    """A patch that was left out.

    Attributes:
        path: its file, relative to the folder that was read.
        reason: what is wrong with it.
    """

    path: str
    reason: str


class Chrysalis(NamedTuple):
    """What `read_chrysalis` found, in the order of the paths."""

    records: list[Bug]
    skipped: list[Unusable]


class _PatchError(Exception):
    """What is wrong with a patch, without the file's name."""


def read_chrysalis(folder: str | pathlib.Path, *, unusable: Literal["raise", "skip"] = "raise") -> Chrysalis:
    """Read functions and bugs from a clone of the data set, or from a part of it.

    Args:
        folder: the clone, its ``HLS_Bug_Dataset``, a suite, or a function.
        unusable: whether a patch that cannot be applied is an error or is left out and listed.

    Returns:
        The records, and what was left out (nothing with ``"raise"``).

    Raises:
        ValueError: if ``unusable`` is something else.
        DataError: if there are no bugs in the folder, a function does not have exactly one source file, or, with
            ``"raise"``, a patch is no JSON of the format, has an unknown type, or its original code is not in the
            function. The message names the file.

    >>> import pathlib, tempfile
    >>> patch = {"Error Type": "OOB", "Original Code": "i < 8", "Faulty Code": "i <= 8"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("Source_Code", "Bugs"):
    ...         (pathlib.Path(folder) / "sum" / name).mkdir(parents=True)
    ...     code = pathlib.Path(folder, "sum/Source_Code/sum.cpp")
    ...     _ = code.write_text("for (int i = 0; i < 8; i++) s += a[i];")
    ...     bugs = pathlib.Path(folder, "sum/Bugs/bug_OOB.txt")
    ...     _ = bugs.write_text(json.dumps({"Error Size": 1, "Error Specification": [patch]}))
    ...     record = read_chrysalis(folder).records[0]
    >>> record.buggy, record.types
    ('for (int i = 0; i <= 8; i++) s += a[i];', ('OOB',))
    """
    if unusable not in ("raise", "skip"):
        raise ValueError(f"unusable is {unusable!r}, expected 'raise' or 'skip'")
    root = pathlib.Path(folder)
    found = Chrysalis([], [])
    for bugs in sorted(path for path in root.rglob("Bugs") if path.is_dir()):
        clean = _source(bugs.parent)
        function = bugs.parent.relative_to(root).as_posix()
        for path in sorted(bugs.glob("*.txt")):
            name = path.relative_to(root).as_posix()
            try:
                buggy, types = _apply(clean, _read_patch(path))
            except _PatchError as error:
                if unusable == "raise":
                    raise DataError(f"{path}: {error}; unusable='skip' leaves such patches out") from error
                found.skipped.append(Unusable(name, str(error)))
            else:
                found.records.append(Bug(clean, buggy, types, function, name))
    if not found.records and not found.skipped:
        raise DataError(
            f"no bugs in {str(root)!r}: expected a clone of github.com/UIUC-ChenLab/Chrysalis-HLS, "
            "with folders <suite>/<function>/Bugs that hold .txt files"
        )
    return found


def labels(records: Sequence[Bug]) -> np.ndarray:
    """Which types of bugs each record has.

    Args:
        records: N records.

    Returns:
        Zeros and ones, int8 [N, 18], a column for each of `BUG_TYPES`.

    >>> labels([Bug("", "", ("INIT", "OOB"), "", "")])[0, :4].tolist()
    [1, 1, 0, 0]
    """
    columns = {name: i for i, name in enumerate(BUG_TYPES)}
    result = np.zeros((len(records), len(columns)), np.int8)
    for row, record in enumerate(records):
        result[row, [columns[name] for name in record.types]] = 1
    return result


def _source(folder: pathlib.Path) -> str:
    files = sorted((folder / "Source_Code").glob("*.cpp"))
    if len(files) != 1:
        raise DataError(f"{folder / 'Source_Code'} has {len(files)} files .cpp, expected exactly 1")
    try:
        return files[0].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{files[0]}: not UTF-8: {error}") from error


def _read_patch(path: pathlib.Path) -> list[dict[str, str]]:
    """The replacements of a patch, checked."""
    try:
        patch: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise _PatchError(f"no JSON: {error}") from error
    parts = patch.get("Error Specification") if isinstance(patch, dict) else None
    if not isinstance(parts, list) or not parts:
        raise _PatchError("'Error Specification' is missing or empty, expected a list of replacements")
    if patch.get("Error Size") != len(parts):
        raise _PatchError(f"'Error Size' is {patch.get('Error Size')!r}, but there are {len(parts)} replacements")
    for part in parts:
        for field in _FIELDS:
            if not isinstance(part, dict) or not isinstance(part.get(field), str):
                raise _PatchError(f"a replacement has no text for {field!r}")
        if part["Error Type"] not in BUG_TYPES:
            raise _PatchError(f"'Error Type' is {part['Error Type']!r}, expected one of {', '.join(BUG_TYPES)}")
        if not part["Original Code"].strip():
            raise _PatchError("'Original Code' is empty: there is no place for the bug")
    return parts


def _apply(clean: str, parts: Sequence[dict[str, str]]) -> tuple[str, tuple[str, ...]]:
    text = clean
    for part in parts:
        span = _find(text, part["Original Code"])
        if span is None:
            where = "is not in the function" if _find(clean, part["Original Code"]) is None else "was replaced before"
            raise _PatchError(f"'Original Code' {where}: {part['Original Code'][:80]!r}")
        text = text[: span[0]] + part["Faulty Code"] + text[span[1] :]
    if text == clean:
        raise _PatchError("the patch changes nothing")
    return text, tuple(part["Error Type"] for part in parts)


def _find(text: str, wanted: str) -> tuple[int, int] | None:
    """Start and end of the first occurrence: as it stands, else without white space."""
    start = text.find(wanted)
    if start >= 0:
        return start, start + len(wanted)
    positions = [i for i, character in enumerate(text) if not character.isspace()]
    letters = "".join(wanted.split())
    start = "".join(text.split()).find(letters)
    return None if start < 0 else (positions[start], positions[start + len(letters) - 1] + 1)
