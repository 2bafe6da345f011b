"""What a person sees in the terminal: progress bars, result tables, the catalogue."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table as RichTable

from experiments.runner import results
from experiments.runner.api import Cell, Comparison, Experiment, Progress, Table
from jaxaccel.catalogue import METHODS


def format_cell(cell: Cell) -> str:
    """A cell as text; the same in the terminal, the report and the documentation."""
    if cell is None:
        return "—"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


class Screen:
    """Progress and results of a command; silent on all but the main process."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        # A log file has no width of its own; tables must not be folded to the 80 columns that rich assumes.
        self.console = Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else 120)
        self.errors = Console(stderr=True, quiet=quiet, highlight=False)

    def print(self, text: str) -> None:
        """Print a line with rich markup."""
        self.console.print(text, soft_wrap=True)

    def error(self, text: str) -> None:
        """Print an error."""
        self.errors.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, experiment: Experiment) -> Iterator[Callable[[Progress], None]]:
        """Live bars where there is a terminal, a line every few seconds where there is none."""
        self.print(f"\n[bold]{experiment.name}[/bold]: {escape(experiment.claim)}")
        if not self.console.is_terminal:
            last = [time.monotonic() - 10]

            def line(progress: Progress) -> None:
                if not self.quiet and time.monotonic() - last[0] > 5:
                    last[0] = time.monotonic()
                    print(f"  {progress.task}: {progress.done}/{progress.total} {progress.note}", flush=True)
                    sys.stdout.flush()

            yield line
            return
        bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
        )
        tasks: dict[str, int] = {}
        with bars:

            def update(progress: Progress) -> None:
                if progress.task not in tasks:
                    for name, number in list(tasks.items()):  # finished bars make room
                        if bars.tasks[bars.task_ids.index(number)].finished:  # type: ignore[arg-type]
                            bars.remove_task(number)  # type: ignore[arg-type]
                            del tasks[name]
                    tasks[progress.task] = bars.add_task(progress.task, total=progress.total, note="")
                bars.update(
                    tasks[progress.task],  # type: ignore[arg-type]
                    completed=progress.done,
                    total=progress.total,
                    note=progress.note,
                )

            yield update

    def table(self, table: Table) -> None:
        """Print a result table."""
        shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i == 0 else "right")
        for row in table.rows:
            shown.add_row(*(escape(format_cell(cell)) for cell in row))
        self.console.print(shown)

    def show(self, experiment: Experiment, comparison: Comparison, directory: pathlib.Path) -> None:
        """Print the result of an experiment."""
        for table in comparison.tables:
            self.table(table)
        self.print(f"[bold]{experiment.name}[/bold]: {escape(comparison.headline)}")
        for note in comparison.notes:
            self.print(f"  • {escape(note)}")
        self.print(f"  results: {directory}")


def print_catalogue(out: pathlib.Path) -> None:
    """The 33 methods, then the last result in ``out`` of each experiment."""
    screen = Screen()
    table = RichTable(title="jaxaccel's methods", title_justify="left")
    for column in ("method", "family", "makes cheaper", "status", "run with"):
        table.add_column(column, overflow="fold")
    for method in METHODS:
        table.add_row(method.slug, method.family, method.cheaper, method.status, ", ".join(method.experiments))
    screen.console.print(table)
    latest = results.latest(out)
    screen.print(f"\n[bold]last results[/bold] in {out}")
    for method in METHODS:
        for name in method.experiments:
            found = latest.get(name)
            words = f"not run yet: python -m experiments run {name}" if found is None else found.comparison.headline
            screen.print(f"  [bold]{name}[/bold]: {escape(words)}")
