"""Keeps the README and the documentation equal to the catalogue and to the newest results.

Results travel in ``docs/results``: ``<experiment>.json`` is the comparison as data, ``<experiment>.md`` and the
drawings beside it are the same for people, and the page of its method, or a guide, includes them. Tables stand between
two marker comments; the rest of a file is by hand.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.runner import files, report, results
from experiments.runner.api import Comparison, Table, from_json, to_json
from experiments.runner.terminal import format_cell
from jaxaccel.catalogue import METHODS, Method, by_family

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "methods" / "index.md"
GUIDES = {"trees": "trees.md"}
"""Experiments whose results stand on a guide in ``docs``, which several methods share, and not on a method's page."""

START, END = "<!-- methods:start -->", "<!-- methods:end -->"


def publish(out: pathlib.Path, root: pathlib.Path = ROOT) -> Iterator[str]:
    """Copy the newest results below ``out`` into the docs, and bring the tables up to date.

    Args:
        out: directory given to ``python -m experiments run``.
        root: checkout to write to.

    Yields:
        One line for each file that was written.

    Raises:
        OutputError: if a result cannot be read or a file cannot be written.
    """
    folder = root / "docs" / "results"
    for name, run in results.latest(out).items():
        run_info = {
            key: run.info.get(key) for key in ("preset", "platform", "device", "jax_version", "library_version")
        }
        files.write_json(folder / f"{name}.json", to_json(run.comparison) | {"run": run_info})
        files.write_bytes(folder / f"{name}.md", render_result(name, run.comparison, run_info).encode())
        for number, figure in enumerate(run.comparison.figures, 1):
            files.write_bytes(folder / f"{name}-{number}.svg", report.svg(figure).encode())
        yield f"wrote {folder / name}.json, .md and its figures"
    for path, render in _targets(root):
        if path.exists():
            _update(path, render(folder))
            yield f"updated {path}"


def readme_table(results_dir: pathlib.Path = RESULTS) -> str:
    """Render the README's table: every method, its module and status, and what was measured."""
    rows = [
        (
            f"[{method.name}]({method.url})",
            method.cheaper,
            f"`{method.module}`",
            method.status,
            "; ".join(headlines(method, results_dir)) or "—",
        )
        for method in METHODS
    ]
    return _markdown(("method", "makes cheaper", "module", "status", "measured here"), rows)


def methods_index(results_dir: pathlib.Path = RESULTS) -> str:
    """Render the documentation's list of methods, by family; a done method links to its page."""
    parts = []
    for family, methods in by_family().items():
        rows = []
        for method in methods:
            done = method.status == "done"
            name = f"[{method.name}]({method.slug}.md)" if done else method.name
            measured = "; ".join(headlines(method, results_dir)) or "—"
            rows.append((name, method.cheaper, f"[arXiv {method.arxiv}]({method.url})", method.status, measured))
        parts.append(
            f"## {family}\n\n" + _markdown(("method", "makes cheaper", "paper", "status", "measured here"), rows)
        )
    return "\n\n".join(parts)


def headlines(method: Method, results_dir: pathlib.Path = RESULTS) -> list[str]:
    """The measured result of each of the method's experiments that has been published.

    Raises:
        OutputError: if a result is not JSON or has no headline.
    """
    found = []
    for name in method.experiments:
        path = results_dir / f"{name}.json"
        if not path.exists():
            continue
        data = files.read_json(path)
        headline = data.get("headline") if isinstance(data, dict) else None
        if not isinstance(headline, str):
            raise files.OutputError(f"{path} has no headline; make it again with python -m experiments publish")
        found.append(headline)
    return found


def update_readme(path: pathlib.Path = README, results_dir: pathlib.Path = RESULTS) -> None:
    """Replace the table in the README at ``path``.

    Raises:
        ValueError: if the file lacks the markers.
    """
    _update(path, readme_table(results_dir))


def check_readme(path: pathlib.Path = README, results_dir: pathlib.Path = RESULTS) -> bool:
    """Whether the table in the README at ``path`` is what the catalogue and the results say."""
    return _between(path.read_text()) == readme_table(results_dir)


def update_index(path: pathlib.Path = INDEX, results_dir: pathlib.Path = RESULTS) -> None:
    """Replace the list in the documentation's page of methods."""
    _update(path, methods_index(results_dir))


def check_index(path: pathlib.Path = INDEX, results_dir: pathlib.Path = RESULTS) -> bool:
    """Whether the documentation's page of methods is what the catalogue and the results say."""
    return _between(path.read_text()) == methods_index(results_dir)


def check_results(results_dir: pathlib.Path = RESULTS) -> list[str]:
    """Names of published results whose text is not what their data renders to."""
    stale = []
    for path in sorted(results_dir.glob("*.json")):
        data = json.loads(path.read_text())
        text = path.with_suffix(".md")
        if not text.exists() or text.read_text() != render_result(path.stem, from_json(data), data.get("run", {})):
            stale.append(path.stem)
    return stale


def render_result(name: str, comparison: Comparison, run_info: dict[str, Any]) -> str:
    """Render a comparison as Markdown, for the page of its method."""
    where = ", ".join(str(run_info[key]) for key in ("device", "platform") if run_info.get(key)) or "an unnamed machine"
    preset = run_info.get("preset") or "quick"
    parts = [
        f"**{comparison.headline}**",
        f"Measured with `python -m experiments run {name} --preset {preset}` on {where}.",
    ]
    parts += [_render_table(table) for table in comparison.tables]
    # Paths are those seen from the page that includes this text: one in docs/methods, or a guide in docs.
    results_dir = "results" if name in GUIDES else "../results"
    parts += [
        f"![{figure.title}]({results_dir}/{name}-{number}.svg)" + (f"\n\n{figure.note}" if figure.note else "")
        for number, figure in enumerate(comparison.figures, 1)
    ]
    if comparison.notes:
        parts.append("\n".join(f"- {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def _render_table(table: Table) -> str:
    body = _markdown(table.columns, [tuple(format_cell(cell) for cell in row) for row in table.rows])
    return "\n\n".join(part for part in (f"*{table.title}*", body, table.note) if part)


def _markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _targets(root: pathlib.Path) -> tuple[tuple[pathlib.Path, Callable[[pathlib.Path], str]], ...]:
    return ((root / "README.md", readme_table), (root / "docs" / "methods" / "index.md", methods_index))


def _split(text: str) -> tuple[str, str, str]:
    before, start, rest = text.partition(START + "\n")
    inside, end, after = rest.partition("\n" + END)
    if not start or not end:
        raise ValueError(f"expected a line {START} and below it a line {END}")
    return before + start, inside, end + after


def _between(text: str) -> str:
    return _split(text)[1]


def _update(path: pathlib.Path, table: str) -> None:
    try:
        before, _, after = _split(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    files.write_bytes(path, (before + table + after).encode())
