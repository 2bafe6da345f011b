"""Boosted trees and forests of one histogram builder, against scikit-learn's and xgboost's, on real tables.

All are given the same rows and settings (`experiments.trees_models` says what "the same" takes), one core each, in
turn. Nothing is tuned: the question is whether the same settings give the same quality here, and in which time.
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import trees_models as models
from experiments.data.tables import HUB, SHIPPED, split_table
from experiments.runner import stats
from experiments.runner.api import Cell, Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import spread
from experiments.trees_models import MODELS, OURS, SKLEARN, XGBOOST, Model, Settings


@dataclasses.dataclass(frozen=True)
class TreesConfig(Config):
    """The same trees by three libraries."""

    tables: tuple[str, ...] = ("diabetes", "breast_cancer", "digits", "pixels")
    """Names in `experiments.data.tables`."""
    rows: int | None = None
    """At most so many rows of each table."""
    models: tuple[Model, ...] = MODELS
    """What is fitted."""
    bins: int = 64
    """Of a column; scikit-learn's forests try all values in place of them."""
    min_leaf: int = 1
    """Least rows of a leaf. With classes, xgboost has no such setting and is left at 1."""
    boosted_trees: int = 100
    """Rounds of boosting."""
    boosted_depth: int = 6
    """Depth of its trees."""
    learning_rate: float = 0.1
    """Of boosting."""
    reg_lambda: float = 1.0
    """Of boosting."""
    stops: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 60, 80, 100)
    """Rounds after which the held-out loss is drawn."""
    forest_trees: int = 100
    """Trees of forests."""
    forest_depth: int = 12
    """Depth of their trees."""
    feature_fraction: float = 1 / 3
    """Share of columns that a node of a forest sees."""
    xgboost_python: str = ""
    """A Python interpreter that has xgboost, where this one has not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.tables if name not in {**SHIPPED, **HUB}]
        if unknown or not self.tables:
            raise ValueError(f"tables must be some of {', '.join([*SHIPPED, *HUB])}, got {self.tables}")
        if not self.models or any(model not in MODELS for model in self.models):
            raise ValueError(f"models must be some of {', '.join(MODELS)}, got {self.models}")
        check_rates("learning_rate", (self.learning_rate,))
        for name in ("min_leaf", "boosted_trees", "forest_trees"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, most in (("boosted_depth", 12), ("forest_depth", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {getattr(self, name)}")
        if not 2 <= self.bins <= 255:
            raise ValueError(f"bins must be 2 to 255, as scikit-learn has it, got {self.bins}")
        if not 0 <= self.reg_lambda < float("inf"):
            raise ValueError(f"reg_lambda must be 0 or more, got {self.reg_lambda}")
        if not 0 < self.feature_fraction <= 1:
            raise ValueError(f"feature_fraction must be in (0, 1], got {self.feature_fraction}")
        if not self.stops or list(self.stops) != sorted({*self.stops, self.boosted_trees}) or self.stops[0] < 1:
            raise ValueError(f"stops must increase from 1 on and end with boosted_trees, got {self.stops}")

    def settings(self, model: Model) -> Settings:
        """What all libraries are given for a model."""
        boosting = model == "boosting"
        return Settings(
            n_trees=self.boosted_trees if boosting else self.forest_trees,
            depth=self.boosted_depth if boosting else self.forest_depth,
            bins=self.bins,
            min_leaf=self.min_leaf,
            learning_rate=self.learning_rate,
            reg_lambda=self.reg_lambda,
            feature_fraction=self.feature_fraction,
        )


# One table -----------------------------------------------------------------------------------------------------------


def measured(run: models.Run, rows: models.Rows) -> dict[str, Any]:
    """What is kept of a fit: seconds, scores of test rows, of the first trees, and out of the bag."""
    found: dict[str, Any] = {
        "fit_s": run.fit_s,
        "predict_s": run.predict_s,
        "scores": models.scores(rows.kind, run.prediction, rows.test_y),
        "staged": [list(models.scores(rows.kind, p, rows.test_y).values())[1] for p in run.staged],
    }
    if run.out_of_bag is not None:
        known = np.isfinite(run.out_of_bag.reshape(len(rows.y), -1)).all(1)
        if known.any():
            found["out_of_bag"] = models.scores(rows.kind, run.out_of_bag[known], rows.y[known])
    return found


def one_table(
    config: TreesConfig, name: str, seeds: Sequence[int], xgboost: str | None
) -> Generator[str, None, dict[str, Any]]:
    """Every model by every library, library after library for each seed."""
    splits = [models.rows_of(split_table(name, seed, rows=config.rows)) for seed in seeds]
    first = splits[0]
    shape = {"kind": first.kind, "rows": len(first.x), "columns": first.x.shape[1], "test_rows": len(first.test_x),
             "classes": first.classes}  # fmt: skip
    runs: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for model in config.models:
        settings = config.settings(model)
        yield f"{model}: compiling"
        mine, spent = models.ours(model, settings, first, config.stops)
        costs[model] = {"compile_s": spent.compile_s, "peak_bytes": spent.peak_bytes}
        contenders = {OURS: mine, SKLEARN: models.sklearns(model, settings, config.stops)}
        if xgboost and model == "boosting":
            contenders[XGBOOST] = models.xgboosts(xgboost, settings, config.stops)
        runs[model] = {library: [] for library in contenders}
        for seed, rows in zip(seeds, splits, strict=True):
            for library, contender in contenders.items():
                yield f"{model}: {library}, seed {seed}"
                with models.one_core():
                    fitted = contender(rows, seed)
                runs[model][library].append(measured(fitted, rows))
    return {"shape": shape, "runs": runs, "costs": costs}


def run(config: TreesConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Table after table; what is finished is kept when the run is interrupted."""
    found: dict[str, Any] = {}
    peer = models.xgboost_python(config.xgboost_python)
    total = len(config.tables)
    for number, name in enumerate(config.tables):
        done = session.load(name)
        if done is None:
            work = one_table(config, name, session.seeds, peer and peer[0])
            done = yield from _progress(work, name, number, total)
            session.save(name, done)
        found[name] = done
    yield Progress("tables", total, total)
    return compare(config, found, xgboost=peer and peer[1], pinned=models.can_pin())


def _progress(
    work: Generator[str, None, dict[str, Any]], name: str, done: int, total: int
) -> Generator[Progress, None, dict[str, Any]]:
    while True:
        try:
            yield Progress("tables", done, total, f"{name}: {next(work)}")
        except StopIteration as end:
            found: dict[str, Any] = end.value
            return found


# What was found ------------------------------------------------------------------------------------------------------


def _median(runs: Sequence[Mapping[str, Any]], what: str) -> float:
    return float(np.median([run[what] for run in runs]))


def _values(runs: Sequence[Mapping[str, Any]], score: str) -> list[float]:
    return [run["scores"][score] for run in runs]


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def compare(config: TreesConfig, found: Mapping[str, Any], *, xgboost: str | None, pinned: bool) -> Comparison:
    """Tables, figures, rows and the headline."""
    tables = [_score_table(config, name, part, xgboost) for name, part in found.items()]
    if "random forest" in config.models:
        tables.append(_out_of_bag_table(found))
    tables.append(_cost_table(config, found))
    figures = [_curve(config, name, part) for name, part in found.items() if "boosting" in config.models]
    rows = [row for name, part in found.items() for row in _rows(config, name, part)]
    return Comparison(
        headline=_headline(config, found),
        rows=tuple(rows),
        tables=tuple(tables),
        figures=(*figures, _times(config, found)),
        notes=(
            f"Settings of all: {config.bins} bins, at least {config.min_leaf} rows in a leaf; boosting of "
            f"{config.boosted_trees} trees of depth {config.boosted_depth}, rate {config.learning_rate:g}, λ = "
            f"{config.reg_lambda:g}; forests of {config.forest_trees} trees of depth {config.forest_depth}, "
            f"{config.feature_fraction:.0%} of the columns for each node. Nothing is tuned or stopped early.",
            "scikit-learn's forests split at any value, ours at the borders of bins; its extra-trees draw a threshold "
            "anywhere between two values, ours among the borders.",
            "Four fifths of the rows are trained on, a split of its own for each seed; targets of regression have "
            "unit variance.",
            "One thread and one core for each library." if pinned
            else "One thread for each library but ours, which takes the cores that XLA takes.",
            "xgboost is not installed here and was left out." if xgboost is None
            else f"xgboost {xgboost} ran in a process of its own, between the others, and timed itself.",
        ),
    )  # fmt: skip


def _score_table(config: TreesConfig, name: str, part: Mapping[str, Any], xgboost: str | None) -> Table:
    shape = part["shape"]
    names = list(models.scores(shape["kind"], *_any(shape)))
    lines: list[tuple[Cell, ...]] = []
    for model in config.models:
        for library, runs in part["runs"][model].items():
            lines.append(
                (model, library, *(spread(_values(runs, score)) for score in names),
                 _seconds(_median(runs, "fit_s")), _seconds(_median(runs, "predict_s")))
            )  # fmt: skip
        if model == "boosting" and xgboost is None:
            lines.append((model, f"{XGBOOST}: not installed", *(None for _ in range(len(names) + 2))))
    kind = f"{shape['classes']} classes" if shape["kind"] != "regression" else "regression"
    return Table(
        f"{name}: {shape['rows']} rows of {shape['columns']} columns, {kind}",
        ("model", "library", *names, "training", f"{shape['test_rows']} predictions"),
        tuple(lines),
        f"test rows; mean ± standard deviation over {_seeds(part)} seeds; seconds are medians, without compilation",
    )


def _any(shape: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and targets of the table's kind, for the names of scores."""
    if shape["kind"] == "regression":
        return np.zeros(2), np.arange(2.0)
    return np.ones((1, shape["classes"])), np.zeros(1, int)


def _seeds(part: Mapping[str, Any]) -> int:
    return len(next(iter(next(iter(part["runs"].values())).values())))


def _out_of_bag_table(found: Mapping[str, Any]) -> Table:
    lines = []
    for name, part in found.items():
        for library, runs in part["runs"]["random forest"].items():
            score = models.MAIN_SCORE[part["shape"]["kind"]]
            outside = [run["out_of_bag"][score] for run in runs if "out_of_bag" in run]
            held = _values([run for run in runs if "out_of_bag" in run], score)
            gaps = [a - b for a, b in zip(outside, held, strict=True)]
            lines.append((name, library, score, spread(outside), spread(held), spread(gaps)))
    return Table(
        "Random forests: out of the bag against held out",
        ("table", "library", "score", "out of the bag", "test rows", "difference"),
        tuple(lines),
        "mean ± standard deviation over seeds; rows that every tree drew have no estimate and are left out",
    )


def _cost_table(config: TreesConfig, found: Mapping[str, Any]) -> Table:
    lines = []
    for name, part in found.items():
        for model in config.models:
            spent = part["costs"][model]
            peak = None if spent["peak_bytes"] is None else f"{spent['peak_bytes'] / 1e6:.1f} MB"
            mine, theirs = (_median(part["runs"][model][library], "fit_s") for library in (OURS, SKLEARN))
            lines.append((name, model, f"{spent['compile_s']:.1f} s", peak, f"{mine / theirs:.2f}"))
    return Table(
        "What ours costs besides",
        ("table", "model", "compilation", "memory of training", "training seconds, ours / scikit-learn's"),
        tuple(lines),
        "compiled once for each shape of table; memory is the compiler's count, rows and model among it",
    )


def _curve(config: TreesConfig, name: str, part: Mapping[str, Any]) -> Figure:
    series = []
    for library, runs in part["runs"]["boosting"].items():
        values = np.array([run["staged"] for run in runs])
        lines = (tuple(v.tolist()) for v in (values.mean(0), values.min(0), values.max(0)))
        series.append(Series(library, tuple(map(float, config.stops)), *lines))
    what = "RMSE" if part["shape"]["kind"] == "regression" else "log-loss"
    return Figure(f"{name}: boosting", "trees" if part["shape"]["kind"] != "classes" else "rounds", f"test {what}",
                  tuple(series), note="band: smallest to largest over seeds")  # fmt: skip


def _times(config: TreesConfig, found: Mapping[str, Any]) -> Figure:
    """Times as slow as each other library, over the rows of the tables."""
    order = sorted(found.values(), key=lambda part: part["shape"]["rows"])
    rows = tuple(float(part["shape"]["rows"]) for part in order)
    series = []
    for model in config.models:
        for library in [library for library in order[0]["runs"][model] if library != OURS]:
            pairs = [
                [mine["fit_s"] / theirs["fit_s"] for mine, theirs in zip(part["runs"][model][OURS],
                                                                         part["runs"][model][library], strict=True)]
                for part in order
            ]  # fmt: skip
            lines = (tuple(float(f(ratios)) for ratios in pairs) for f in (np.median, np.min, np.max))
            series.append(Series(f"{model}, {library}", rows, *lines))
    series.append(Series("equal", rows, (1.0,) * len(rows)))
    return Figure("Seconds of training, ours / other library's", "rows of the table", "ratio, one core", tuple(series),
                  x_log=True, y_log=True, note="a point for each table; median over seeds, band: smallest to largest; "
                  "compilation apart; of K classes, boosting grows K trees a round")  # fmt: skip


def _rows(config: TreesConfig, name: str, part: Mapping[str, Any]) -> list[dict[str, Any]]:
    shape = part["shape"]
    rows = []
    for model in config.models:
        libraries = part["runs"][model]
        settings = config.settings(model)
        mine = libraries[OURS]
        score = models.MAIN_SCORE[shape["kind"]]
        for library in [library for library in libraries if library != OURS]:
            theirs = libraries[library]
            seconds = [[run["fit_s"] for run in runs] for runs in (theirs, mine)]
            rows.append(
                {
                    "method": "gbrl",
                    "method_config": {"part": "boosting.trees", "model": model, **dataclasses.asdict(settings)},
                    "baseline": library,
                    "task": {
                        "kind": "training",
                        "name": name,
                        "modality": "table",
                        "n_train": shape["rows"],
                        "n_features": shape["columns"],
                        "metric": score,
                        "higher_is_better": True,
                    },
                    "model": {"family": model},
                    "workload": {"batch": shape["rows"], "steps": settings.n_trees, "seeds": len(mine)},
                    "cost_kind": "wall",
                    "speedup": float(np.median(seconds[0]) / np.median(seconds[1])),
                    "speedup_ci": stats.bootstrap_ratio(*seconds),
                    "compile_s": part["costs"][model]["compile_s"],
                    "quality": float(np.mean(_values(mine, score))),
                    "quality_baseline": float(np.mean(_values(theirs, score))),
                }
            )
    return rows


def _headline(config: TreesConfig, found: Mapping[str, Any]) -> str:
    """How far scores are from scikit-learn's, and the range of the times."""
    words = []
    for model in config.models:
        ratios, differences = [], []
        for part in found.values():
            libraries = part["runs"][model]
            score = models.MAIN_SCORE[part["shape"]["kind"]]
            mine, theirs = (float(np.mean(_values(libraries[library], score))) for library in (OURS, SKLEARN))
            differences.append(mine - theirs)
            ratios.append(_median(libraries[OURS], "fit_s") / _median(libraries[SKLEARN], "fit_s"))
        away, times = _range(differences, "+.3f"), _range(ratios, ".2g")
        words.append(f"{model} {away} of scikit-learn's R² or accuracy, in {times} times its seconds")
    return "trees at equal settings: " + "; ".join(words)


def _range(values: Sequence[float], form: str) -> str:
    ends = [format(value, form) for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


EXPERIMENT = Experiment(
    name="trees",
    method="gbrl",
    claim="none; checked is whether equal settings give the quality of established libraries, and in which time",
    config=TreesConfig,
    presets={
        "quick": TreesConfig(seeds=3),
        "full": TreesConfig(
            seeds=5,
            tables=("california", "superconductivity", "magic", "covertype", "digits", "pixels"),
            rows=100_000,
            bins=255,
            forest_depth=20,
        ),
    },
    run=run,
)
