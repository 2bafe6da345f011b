"""Finished runs, read back from their directories."""

import dataclasses
import pathlib
from typing import Any

from experiments.runner import files
from experiments.runner.api import Comparison, from_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its ``run.json`` and what it found."""

    directory: pathlib.Path
    info: dict[str, Any]
    comparison: Comparison


def latest(out: pathlib.Path) -> dict[str, Run]:
    """The newest finished run of each experiment below ``out``, by name.

    Raises:
        OutputError: if a result is there but cannot be read, naming the file.
    """
    found: dict[str, Run] = {}
    for path in sorted(out.glob("runs/*/run.json"), key=lambda p: p.stat().st_mtime):
        info = files.read_json(path)
        result = path.parent / "result.json"
        if info.get("status") != "finished" or not result.exists():
            continue
        try:
            found[info["experiment"]] = Run(path.parent, info, from_json(files.read_json(result)))
        except (KeyError, TypeError) as error:
            raise files.OutputError(f"{result} is not a result of this version ({error!r}); move it away") from error
    return found
