"""Local linear attention without learning: regression on streams that change, on tables, and what its solver takes.

The question is what the estimator itself is worth, before any network is trained around it. Each contender answers
queries from the pairs before them, with settings picked on other streams (or on a split of the training rows) from a
grid of the same size. Two of them make the comparison harder: ridge regression that forgets, which is what one would
use where the world changes along the sequence, and kernel ridge regression, a usual choice for a table.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.local_linear_methods import (
    NOISE,
    RIDGES,
    SCALES,
    TABLE_METHODS,
    Estimator,
    estimators,
    piecewise_streams,
    solver_errors,
    split_errors,
)
from experiments.runner import stats
from experiments.runner.api import Cell, Comparison, Config, Experiment, Figure, Progress, Series, Table
from experiments.runner.cost import Timing, ratio, time_in_turn
from experiments.runner.session import Session
from experiments.runner.sweep import spread


@dataclasses.dataclass(frozen=True)
class LocalLinearRegressionConfig(Config):
    """Softmax, linear, ridge and local linear estimates on changing streams and on tables."""

    segments: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Pieces of a stream, each with its own linear map."""
    length: int = 512
    """Pairs of a stream."""
    size: int = 8
    """Size of keys and values."""
    streams: int = 6
    """Streams that are scored, per seed."""
    tuning_streams: int = 6
    """Further streams on which settings are picked, per seed."""
    tables: tuple[Literal["diabetes", "friedman1", "california"], ...] = ("diabetes", "friedman1")
    """Tables; california is fetched by scikit-learn."""
    splits: int = 10
    """Random splits of each table."""
    ridges: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Ridges of the table of the solver."""
    solver_length: int = 256
    """Keys and queries of the table of the solver."""
    solver_size: int = 64
    """Their size."""
    repeats: int = 9
    """Turns of timing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "length",
            "size",
            "streams",
            "tuning_streams",
            "splits",
            "solver_length",
            "solver_size",
            "repeats",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.segments or any(count < 1 or self.length % count for count in self.segments):
            raise ValueError(f"segments must be positive and divide length {self.length}, got {self.segments}")
        if len(set(self.segments)) < len(self.segments):
            raise ValueError(f"segments must differ, got {self.segments}")
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError(f"ridges must be positive, got {self.ridges}")


def run(config: LocalLinearRegressionConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Streams, then tables, then the solver; every finished part is kept when the run is interrupted."""
    contenders = estimators()
    programs = {contender.name: jax.jit(contender.predict) for contender in contenders}
    found: dict[int, list[dict[str, Any]]] = {}
    for number, segments in enumerate(config.segments):
        found[segments] = []
        for seed in session.seeds:
            yield Progress("streams", number * config.seeds + seed, len(config.segments) * config.seeds)
            name = f"stream-{segments}-{seed}"
            part = session.load(name)
            if part is None:
                part = stream_errors(config, contenders, programs, segments, seed)
                session.save(name, part)
            found[segments].append(part)
    tables: dict[str, list[dict[str, float]]] = {}
    for name in config.tables:
        tables[name] = []
        for split in range(config.splits):
            yield Progress(name, split, config.splits)
            part = session.load(f"{name}-{split}")
            if part is None:
                part = split_errors(name, split)
                session.save(f"{name}-{split}", part)
            tables[name].append(part)
    solver: dict[float, dict[str, float]] = {}
    for number, ridge in enumerate(config.ridges):
        yield Progress("solver", number, len(config.ridges), f"ridge {ridge:g}")
        solver[ridge] = solver_errors(ridge, length=config.solver_length, size=config.solver_size)
    timings: dict[int, dict[str, Timing]] = {}
    for number, segments in enumerate(config.segments):
        yield Progress("timing", number, len(config.segments), f"{segments} segments")
        timings[segments] = measure(config, contenders, programs, found[segments][0], segments)
    yield Progress("timing", len(config.segments), len(config.segments))
    return compare(config, contenders, found, tables, solver, timings)


Programs = Mapping[str, Callable[..., jax.Array]]  # (keys, values, setting) -> predictions, compiled, by contender


def streams(config: LocalLinearRegressionConfig, number: int, count: int, segments: int) -> list[jax.Array]:
    """Keys and values."""
    data = piecewise_streams(number, count, segments=segments, length=config.length, size=config.size)
    return [jnp.asarray(array) for array in data]


def stream_errors(
    config: LocalLinearRegressionConfig,
    contenders: Sequence[Estimator],
    programs: Programs,
    segments: int,
    seed: int,
) -> dict[str, Any]:
    """For each contender the setting that is best on the tuning streams, and its squared errors on the others."""
    tuning = streams(config, 2 * seed + 1, config.tuning_streams, segments)
    keys, values = streams(config, 2 * seed, config.streams, segments)
    part = {}
    for contender in contenders:
        # Position 0 has nothing to answer from; a setting that fails anywhere is never picked.
        errors = np.asarray(contender.errors(*tuning))[:, 1:].mean(1)
        best = int(np.nanargmin(errors))
        predictions = programs[contender.name](keys, values, jnp.asarray(contender.grid[best]))
        by_position = np.mean(np.square(predictions - values), axis=(0, 2))
        part[contender.name] = {"setting": best, "errors": by_position.tolist()}
    return part


def measure(
    config: LocalLinearRegressionConfig,
    contenders: Sequence[Estimator],
    programs: Programs,
    picked: dict[str, Any],
    segments: int,
) -> dict[str, Timing]:
    """Seconds that each contender's compiled program takes for as many streams as are scored, at its setting."""
    keys, values = streams(config, 0, config.streams, segments)
    calls = {}
    for contender in contenders:
        setting = jnp.asarray(contender.grid[picked[contender.name]["setting"]])
        calls[contender.name] = functools.partial(programs[contender.name], keys, values, setting)
    return time_in_turn(calls, repeats=config.repeats)


def _fine(values: Sequence[float]) -> str:
    """Mean ± standard deviation, with the digits that errors near the noise floor need."""
    mean, deviation = stats.mean_and_spread(values)
    return f"{mean:.4f} ± {deviation:.4f}"


def _over(parts: Sequence[dict[str, Any]], baseline: str) -> list[float]:
    """Error of LLA over that of a baseline on the same streams, for each seed."""
    return (np.asarray(_means(parts, "LLA")) / np.asarray(_means(parts, baseline))).tolist()


def _means(parts: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Mean squared error of each seed."""
    return [float(np.mean(part[name]["errors"][1:])) for part in parts]


def compare(
    config: LocalLinearRegressionConfig,
    contenders: Sequence[Estimator],
    found: dict[int, list[dict[str, Any]]],
    tables: dict[str, list[dict[str, float]]],
    solver: dict[float, dict[str, float]],
    timings: dict[int, dict[str, Timing]],
) -> Comparison:
    """Tables, figures, rows and the headline."""
    names = [contender.name for contender in contenders]
    many = max(config.segments)
    errors = Table(
        "Streams: mean squared error",
        ("segments", *names),
        tuple((count, *(_fine(_means(parts, name)) for name in names)) for count, parts in found.items()),
        f"mean ± standard deviation over {config.seeds} seeds of {config.streams} streams; noise floor {NOISE**2:.4f}; "
        f"each contender's setting is picked from {len(contenders[0].grid)} on {config.tuning_streams} other streams",
    )
    others = [name for name in names if name != "LLA"]
    ratios = Table(
        "Streams: error of LLA over that of the others",
        ("segments", *others),
        tuple((count, *(spread(_over(parts, name)) for name in others)) for count, parts in found.items()),
        "below 1 where LLA is better; on the same streams, seed by seed",
    )
    settings = Table(
        f"What was picked with {many} segments, first seed, and its time",
        ("estimator", "setting", "ms", "times softmax"),
        tuple(
            (
                c.name,
                c.words(found[many][0][c.name]["setting"]),
                1e3 * timings[many][c.name].median,
                timings[many][c.name].median / timings[many]["softmax"].median,
            )
            for c in contenders
        ),
        f"{config.streams} streams of {config.length}, medians of {config.repeats} turns",
    )
    solver_columns = tuple(next(iter(solver.values())))
    iterations = Table(
        f"Solver: iterations to 10⁻⁶, and largest error, {config.solver_length} random keys of size "
        f"{config.solver_size}",
        ("ridge", *solver_columns),
        tuple((ridge, *(float(f"{row[c]:.2g}") for c in solver_columns)) for ridge, row in solver.items()),
        "errors relative to the largest output, against float64; rounding is the error that comes from rounding the "
        "inputs to bfloat16 alone",
    )
    return Comparison(
        headline=_headline(config, found, tables),
        rows=tuple(_rows(config, found, tables, timings)),
        tables=(errors, ratios, *([_table_of_tables(config, tables)] if tables else []), settings, iterations),
        figures=(_over_segments(config, names, found), _after_change(config, names, found[many], many)),
        notes=(
            "The stream changes along time, and its keys change place with it. Softmax and LLA only see the place. "
            "Ridge regression that forgets only sees time, and costs d² per token in place of a pass over the context.",
            "Features of tables lie on a sphere for softmax and LLA (a constant is added, and rows are scaled to one "
            "length), so that exp(scale·q·k) falls with distance; on plain features it does not. Ridge gets those.",
            f"Every method for tables has {len(SCALES) * len(RIDGES)} settings to pick from.",
        ),
    )


def _table_of_tables(config: LocalLinearRegressionConfig, tables: dict[str, list[dict[str, float]]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, splits in tables.items():
        cells = [spread([split[method] for split in splits]) for method in TABLE_METHODS]
        ahead = [
            sum(split["LLA"] <= split[other] for split in splits) for other in ("softmax", "ridge", "kernel ridge")
        ]
        rows.append((name, *cells, " / ".join(map(str, ahead))))
    return Table(
        "Tables: mean squared error of the standardised target",
        ("table", *TABLE_METHODS, "LLA no worse than softmax / ridge / kernel ridge"),
        tuple(rows),
        f"mean ± standard deviation over {config.splits} random splits, which overlap; settings picked on a split of "
        "the training rows",
    )


def _over_segments(
    config: LocalLinearRegressionConfig, names: Sequence[str], found: dict[int, list[dict[str, Any]]]
) -> Figure:
    counts = sorted(config.segments)
    series = []
    for name in names:
        values = [_means(found[count], name) for count in counts]
        band = (tuple(map(min, values)), tuple(map(max, values)))
        series.append(Series(name, tuple(map(float, counts)), tuple(float(np.mean(v)) for v in values), *band))
    floor = Series("noise", tuple(map(float, counts)), (NOISE**2,) * len(counts))
    return Figure(
        "Regression on a stream that changes",
        "segments of the stream",
        "mean squared error",
        (*series, floor),
        x_log=True,
        y_log=True,
        note="band: smallest to largest over seeds",
    )


def _after_change(
    config: LocalLinearRegressionConfig, names: Sequence[str], parts: Sequence[dict[str, Any]], segments: int
) -> Figure:
    """Error against the position in a segment; the first segment, which no change precedes, is left out."""
    width = config.length // segments
    skip = width if segments > 1 else 1
    series = []
    for name in names:
        errors = np.mean([part[name]["errors"][skip:] for part in parts], 0)
        by_age = errors.reshape(-1, width).mean(0) if segments > 1 else errors
        series.append(Series(name, tuple(np.arange(1.0, len(by_age) + 1).tolist()), tuple(by_age.tolist())))
    return Figure(
        f"After a change, {segments} segments of {width}",
        "position in the segment",
        "mean squared error",
        tuple(series),
        x_log=True,
        y_log=True,
        note="mean over seeds and over all segments but the first",
    )


def _rows(
    config: LocalLinearRegressionConfig,
    found: dict[int, list[dict[str, Any]]],
    tables: dict[str, list[dict[str, float]]],
    timings: dict[int, dict[str, Timing]],
) -> Generator[dict[str, Any], None, None]:
    """What local linear attention costs more, and by how much it is better."""
    for baseline in ("softmax", "ridge", "forgetting ridge"):
        for count, parts in found.items():
            value, interval = ratio(timings[count], baseline, "LLA")
            yield {
                "method": "local_linear_attention",
                "method_config": {"part": "stream", "segments": count},
                "baseline": baseline,
                "task": {
                    "kind": "prediction",
                    "name": "test-time-regression",
                    "dataset": "piecewise-linear",
                    "seq_len": config.length,
                    "n_features": config.size,
                    "metric": "mse",
                    "higher_is_better": False,
                },
                "model": {"family": "attention", "layers": 1, "width": config.size, "heads": 1, "dtype": "float32"},
                "workload": {"batch": config.streams, "prompt_length": config.length, "seeds": config.seeds},
                "cost_kind": "wall",
                "speedup": value,
                "speedup_ci": interval,
                "quality": float(np.mean(_means(parts, "LLA"))),
                "quality_baseline": float(np.mean(_means(parts, baseline))),
            }


def _headline(
    config: LocalLinearRegressionConfig,
    found: dict[int, list[dict[str, Any]]],
    tables: dict[str, list[dict[str, float]]],
) -> str:
    shown = sorted({config.segments[0], config.segments[len(config.segments) // 2], config.segments[-1]})

    def over(name: str) -> str:
        return " / ".join(f"{np.mean(_over(found[count], name)):.2f}" for count in shown)

    words = (
        f"squared error of LLA on streams of {' / '.join(map(str, shown))} linear pieces: {over('softmax')} times that "
        f"of tuned softmax, {over('forgetting ridge')} times that of ridge regression that forgets"
    )
    for name, splits in tables.items():
        mean = {method: float(np.mean([split[method] for split in splits])) for method in TABLE_METHODS}
        words += f"; {name}: LLA {mean['LLA']:.3f}, softmax {mean['softmax']:.3f}, ridge {mean['ridge']:.3f}, "
        words += f"kernel ridge {mean['kernel ridge']:.3f}"
    return words


EXPERIMENT = Experiment(
    name="local_linear_regression",
    method="local_linear_attention",
    claim="better than softmax and linear attention on non-stationary test-time regression, as good as the better of "
    "both elsewhere",
    config=LocalLinearRegressionConfig,
    presets={
        "quick": LocalLinearRegressionConfig(seeds=5),
        "full": LocalLinearRegressionConfig(
            seeds=10,
            segments=(1, 2, 4, 8, 16, 32, 64),
            length=4096,
            size=32,
            streams=32,
            tuning_streams=16,
            tables=("diabetes", "friedman1", "california"),
            splits=20,
            solver_length=2048,
        ),
    },
    run=run,
)
