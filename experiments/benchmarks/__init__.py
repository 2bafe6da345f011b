"""Speed, measured: ratios of things timed in turn in one process, medians over turns, compile time left out."""

import dataclasses
import difflib
import importlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

MODULES = (
    "optimizers",
    "runner",
    "discovery",
    "attention",
    "generation",
    "lm_head_confidence",
    "expert_ffn",
    "block_ffn_decoding",
    "diffusion",
    "diffusion_cache",
    "policy",
    "fixed_point",
    "trees",
    "gbrl",
)


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """How to measure."""

    repeats: int = 15
    """Turns; medians are over these."""
    out: pathlib.Path | None = None
    """Also write the numbers to this JSON file."""

    def __post_init__(self) -> None:
        if self.repeats < 3:
            raise ValueError(f"--repeats must be at least 3 for a median with an interval, got {self.repeats}")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One ratio, or one number of megabytes that has a limit.

    Attributes:
        name: what was compared.
        ratio: median cost of the first over that of the second, or the number itself.
        interval: its 95 % bootstrap interval over turns; ``None`` for what is counted instead of timed (bytes).
        goal: what the ratio should be, e.g. ``"<= 1.10"`` or ``">= 10"``; empty where it is only information.
        detail: absolute numbers, and the limit they stand beside.
    """

    name: str
    ratio: float
    interval: tuple[float, float] | None
    goal: str = ""
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; ``None`` without a goal."""
        if not self.goal:
            return None
        sign, value = self.goal.split()
        return self.ratio <= float(value) if sign == "<=" else self.ratio >= float(value)


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """Benchmarks to run: the named ones, or all.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    for name in names:
        if name not in MODULES:
            near = difflib.get_close_matches(name, MODULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(MODULES)}"
            raise ValueError(f"unknown benchmark {name!r}; {hint}")
    return tuple(names) or MODULES


def run(names: Sequence[str], options: BenchOptions) -> int:
    """Run benchmarks and print their ratios; always returns 0, since a slow machine is not an error."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(title="ratios of medians, timed in turn in one process", title_justify="left")
    for column in ("comparison", "ratio", "95 % interval", "goal", "met", "detail"):
        table.add_column(column, justify="right" if column in ("ratio", "95 % interval", "goal") else "left")
    found: list[dict[str, Any]] = []
    for name in names:
        measurements: Iterator[Measurement] = importlib.import_module(f"experiments.benchmarks.{name}").measure(options)
        with console.status(f"measuring: {name}"):
            for m in measurements:
                interval = "" if m.interval is None else f"{m.interval[0]:.3f} to {m.interval[1]:.3f}"
                met = {None: "", True: "yes", False: "no"}[m.met]
                table.add_row(m.name, f"{m.ratio:.3f}", interval, m.goal, met, m.detail)
                # A benchmark takes minutes: what is known is shown, and survives an interruption.
                print(f"{m.name}: {m.ratio:.3f} {m.goal}".rstrip(), file=sys.stderr, flush=True)
                found.append(dataclasses.asdict(m) | {"benchmark": name, "met": m.met})
    console.print(table)
    if options.out is not None:
        from experiments.runner import files

        files.write_json(options.out, found)
    return 0
