"""The contract between an experiment and the runner: plain data in, plain data out.

An experiment is a module in ``experiments/`` with a frozen config dataclass and a generator function

    def run(config: Config, session: Session) -> Generator[Progress, None, Comparison]

that yields `Progress` while it works and returns one `Comparison`. Everything here can be written to JSON and read
back, so that the report is drawn from files and never needs the process that measured them.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import tyro

Cell = str | float | int | bool | None


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields that every experiment has; a config is a frozen subclass of this."""

    # Fixed: the flag --seeds belongs to the run command, which sets this field for every experiment it runs.
    seeds: tyro.conf.Fixed[int] = 3
    """How many seeds each arm is run with; the spread over them is reported."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")


def check_rates(name: str, rates: tuple[float, ...]) -> None:
    """Raise ``ValueError`` unless ``rates`` is a non-empty tuple of positive learning rates."""
    if not rates:
        raise ValueError(f"{name}: no learning rates to try")
    for rate in rates:
        if not 0 < rate < float("inf"):  # also refuses NaN
            raise ValueError(f"{name}: learning rates must be positive and finite, got {rate}")


@dataclasses.dataclass(frozen=True)
class Progress:
    """One step of visible progress: ``done`` of ``total`` units of the thing called ``task``."""

    task: str
    done: int
    total: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results; floats are formatted by the renderer."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: a row has {len(row)} cells, expected {len(self.columns)}")


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a figure, with an optional band (``low`` to ``high``) around it."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tile:
    """A cell of a grid: a short text on a colour that stands for a number; ``None`` leaves it grey."""

    text: str
    value: float | None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot as data: lines, or a grid of tiles."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...] = ()
    x_log: bool = False
    y_log: bool = False
    note: str = ""
    tiles: tuple[tuple[Tile, ...], ...] = ()
    """Rows from top to bottom, in place of lines."""
    tile_label: str = ""
    """What the colours of tiles stand for."""

    def __post_init__(self) -> None:
        if self.tiles and self.series:
            raise ValueError(f"figure {self.title!r} has both lines and tiles, expected one of them")
        if len({len(row) for row in self.tiles}) > 1:
            raise ValueError(f"figure {self.title!r}: rows of tiles must be equally long")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What an experiment returns.

    Attributes:
        headline: one honest sentence with the measured result; it stands in the README's table.
        rows: record rows (see `jaxaccel.records`), one per method, baseline and kind of cost. Failures are rows too.
        tables: what the terminal and the report show.
        figures: what the report draws.
        notes: sentences that a reader must know to read the numbers rightly.
    """

    headline: str
    rows: tuple[dict[str, Any], ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Turn a comparison into JSON data."""
    return dataclasses.asdict(comparison)


def from_json(data: Mapping[str, Any]) -> Comparison:
    """Read back what `to_json` wrote."""
    tables = tuple(
        Table(t["title"], tuple(t["columns"]), tuple(tuple(row) for row in t["rows"]), t["note"])
        for t in data["tables"]
    )
    figures = tuple(
        Figure(
            **{k: v for k, v in f.items() if k not in ("series", "tiles")},
            tiles=tuple(tuple(Tile(**tile) for tile in row) for row in f.get("tiles", ())),
            series=tuple(
                Series(s["label"], tuple(s["x"]), tuple(s["y"]), tuple(s["low"]), tuple(s["high"])) for s in f["series"]
            ),
        )
        for f in data["figures"]
    )
    return Comparison(data["headline"], tuple(data["rows"]), tables, figures, tuple(data["notes"]))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An entry of the registry: what to run, with which presets.

    Attributes:
        name: what the user types.
        method: slug of the method in `jaxaccel.catalogue`.
        claim: the published claim in one sentence.
        config: the config dataclass.
        presets: ``quick`` (two cores, a minute or two) and ``full`` (the paper's size, on accelerators).
        run: the generator function.
    """

    name: str
    method: str
    claim: str
    config: type[Config]
    presets: Mapping[str, Config]
    run: Callable[[Any, Any], Generator[Progress, None, Comparison]]
