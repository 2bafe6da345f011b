"""What goes wrong with files of weights, and how optional packages are asked for."""

import importlib
import json
import pathlib
from typing import Any


class WeightsError(ValueError):
    """A file of weights, its configuration or its tokenizer cannot be used; the message says which and why."""


class NoTokenizerError(WeightsError):
    """There is no tokenizer, or none of a kind that can be read: the weights are of use without it."""


def optional_module(name: str, purpose: str) -> Any:
    """Import a package that only loading needs.

    Args:
        name: the module.
        purpose: what it is needed for, as the subject of a sentence.

    Returns:
        The module.

    Raises:
        ImportError: naming the extra that brings it.

    >>> optional_module("json", "Reading JSON").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{purpose} needs the package {package}: pip install 'jaxaccel[models]'") from error


def listed(names: list[str], limit: int = 10) -> str:
    """Names in one line, the first ``limit`` of them and a count of the rest.

    >>> listed(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def refuse_pointer(path: pathlib.Path) -> None:
    """Refuse what a clone without Git LFS leaves in place of large files.

    Args:
        path: a file that exists.

    Raises:
        WeightsError: if it is a pointer, with what to do.

    >>> refuse_pointer(pathlib.Path("/dev/null"))
    """
    with open(path, "rb") as stream:
        if stream.read(24).startswith(b"version https://git-lfs"):
            raise WeightsError(
                f"{path}: only a pointer of Git LFS to the file; fetch the file itself with: git lfs pull"
            )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        WeightsError: naming the file, if it is missing, is not JSON or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value
