"""GBNN on real tables: what is left when hidden units are switched off, beside networks trained at once at every size.

Every contender is tuned on validation rows, each seed with a split of its own. Sizes are shares of the same number of
hidden units. Networks trained at once are shown twice: trained anew at every size, which is what a fixed budget calls
for, and cut without training, which is what GBNN competes with where the budget changes from call to call.
"""

import dataclasses
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import gbnn_models as models
from experiments.data.tables import HUB, SHIPPED, Tabular, split_table
from experiments.runner import cost, stats
from experiments.runner.api import Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import spread
from jaxaccel.boosting import GBNNParams, gbnn_to_mlp, mlp_apply

ARMS = ("GBNN", "Adam, trained at each size", "L-BFGS, trained at each size", "Adam, cut")
ROWS = 4096
"""Rows that inference is timed with, in batches of one request."""


@dataclasses.dataclass(frozen=True)
class GBNNConfig(Config):
    """A hidden layer grown by boosting against layers trained at once."""

    tables: tuple[str, ...] = ("diabetes", "breast_cancer", "digits")
    """Names in `experiments.data.tables`."""
    rows: int | None = None
    """At most so many rows of each table."""
    units: int = 200
    """Hidden units of the whole network."""
    units_per_step: tuple[int, ...] = (1, 5)
    """J; all are tried."""
    kept: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """Shares of units that are kept."""
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Learning rates of GBNN."""
    adam_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates of Adam."""
    penalties: tuple[float, ...] = (1e-4, 1e-2, 1.0, 3.0, 10.0, 30.0)
    """Penalties of L-BFGS."""
    subsample: float = 0.5
    """Share of rows that a step of GBNN is fitted to."""
    inner_steps: int = 100
    """Most steps of the inner fit."""
    epochs: int = 128
    """Of Adam."""
    batch_size: int = 64
    """Of Adam."""
    lbfgs_steps: int = 256
    """Of L-BFGS."""
    repeats: int = 7
    """Turns of timing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rates", "adam_rates", "penalties"):
            check_rates(name, getattr(self, name))
        unknown = [name for name in self.tables if name not in {**SHIPPED, **HUB}]
        if unknown or not self.tables:
            raise ValueError(f"tables must be some of {', '.join([*SHIPPED, *HUB])}, got {self.tables}")
        if not self.kept or sorted(set(self.kept)) != list(self.kept) or not 0 < self.kept[0] <= self.kept[-1] == 1:
            raise ValueError(f"kept must be increasing shares that end with 1, got {self.kept}")
        for units in self.units_per_step:
            if units < 1 or any(size % units for size in self.sizes):
                raise ValueError(f"units_per_step must divide the sizes {self.sizes}, got {self.units_per_step}")
        for name in ("epochs", "lbfgs_steps"):
            if getattr(self, name) < models.STOPS or getattr(self, name) % models.STOPS:
                raise ValueError(f"{name} must be a multiple of {models.STOPS}, got {getattr(self, name)}")
        for name in ("inner_steps", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.subsample <= 1:
            raise ValueError(f"subsample must be in (0, 1], got {self.subsample}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units that are kept."""
        return tuple(round(share * self.units) for share in self.kept)


# One table -----------------------------------------------------------------------------------------------------------


def _stacked(splits: Sequence[Tabular], part: str) -> tuple[jax.Array, jax.Array]:
    parts = [getattr(split, part) for split in splits]
    return jnp.stack([p.x for p in parts]), jnp.stack([p.y for p in parts])


def _picked(tree: Any, places: Sequence[tuple[int, ...]]) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a[(s, *place)] for s, place in enumerate(places)]), tree)


def grown(config: GBNNConfig, splits: Sequence[Tabular], keys: jax.Array) -> dict[str, Any]:
    """GBNN's test scores, chosen by validation over J and rates; its default; and what a step of 1 does."""
    kind, classes = splits[0].kind, splits[0].classes
    x, y = _stacked(splits, "train")
    rates = (*config.rates, 1.0)  # the last is the reference's default, shown and never chosen
    validation, test, networks, seconds = [], [], [], 0.0
    for units in config.units_per_step:
        steps = config.units // units
        fit = models.grower(kind, classes, steps, units, config.inner_steps, config.subsample)
        fit, _ = cost.compile_with_cost(fit, x, y, keys, jnp.array(rates))
        began = time.perf_counter()
        params = jax.block_until_ready(fit(x, y, keys, jnp.array(rates)))
        seconds += time.perf_counter() - began
        kept = tuple(size // units for size in config.sizes)
        parts = {
            p: np.asarray(models.kept_scores(params, *_stacked(splits, p), kind=kind, kept=kept))
            for p in ("validation", "test")
        }
        validation.append(parts["validation"])
        test.append(parts["test"])
        networks.append(params)
    whole = np.stack(validation, 1)[:, :, :-1, -1]  # [S, J, R]: all units; the rate 1 apart
    places = models.best(kind, whole)
    scores = np.stack(test, 1)
    chosen = [scores[(s, *place)] for s, place in enumerate(places)]
    return {
        "test": [c.tolist() for c in chosen],
        "one": scores[:, 0, -1, :].tolist(),  # J of the first entry, rate 1
        "settings": [[config.units_per_step[j], config.rates[r]] for j, r in places],
        "seconds": seconds / (len(splits) * len(rates) * len(config.units_per_step)),
        "network": jax.tree.map(lambda a: a[0, places[0][1]], networks[places[0][0]]),
    }


def at_once(config: GBNNConfig, splits: Sequence[Tabular], keys: jax.Array, solver: str) -> dict[str, Any]:
    """Networks of each size, chosen by validation over settings and stops; those of the full size are also cut."""
    kind, classes = splits[0].kind, splits[0].classes
    x, y = _stacked(splits, "train")
    settings = jnp.array(config.adam_rates if solver == "adam" else config.penalties)
    test, seconds, whole = [], 0.0, None
    for size in config.sizes:
        if solver == "adam":
            fit = models.adam_trainer(kind, classes, size, config.epochs, config.batch_size)
        else:
            fit = models.lbfgs_trainer(kind, classes, size, config.lbfgs_steps)
        fit, _ = cost.compile_with_cost(fit, x, y, keys, settings)
        began = time.perf_counter()
        mlps = jax.block_until_ready(fit(x, y, keys, settings))
        seconds = (time.perf_counter() - began) / (len(splits) * len(settings))  # of the last, the whole network
        validation = np.asarray(models.mlp_scores(mlps, *_stacked(splits, "validation"), kind=kind))
        places = models.best(kind, validation)
        scores = np.asarray(models.mlp_scores(mlps, *_stacked(splits, "test"), kind=kind))
        test.append([float(scores[(s, *place)]) for s, place in enumerate(places)])
        whole = _picked(mlps, places)
    tx, ty = _stacked(splits, "test")

    pieces = [models.cut(whole, size) for size in config.sizes]
    cut_scores = [np.asarray(models.mlp_scores(piece, tx, ty, kind=kind)).tolist() for piece in pieces]
    return {
        "test": np.transpose(test).tolist(),
        "cut": np.transpose(cut_scores).tolist(),
        "seconds": seconds,
    }


def inference(config: GBNNConfig, network: GBNNParams, units: int, rows: np.ndarray) -> dict[str, list[float]]:
    """Seconds for `ROWS` rows with each number of units kept, in turn."""
    x = jnp.asarray(np.resize(rows, (ROWS, rows.shape[1])))
    apply = jax.jit(mlp_apply)
    calls = {}
    for size in config.sizes:
        mlp = gbnn_to_mlp(network, n_active=size // units)
        calls[str(size)] = lambda mlp=mlp: apply(mlp, x)
    return {name: list(t.seconds) for name, t in cost.time_in_turn(calls, repeats=config.repeats).items()}


def run(config: GBNNConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Table after table; what is finished is kept when the run is interrupted."""
    found: dict[str, Any] = {}
    keys = jax.vmap(jax.random.key)(jnp.array(session.seeds))
    total = 4 * len(config.tables)
    for number, name in enumerate(config.tables):
        done = session.load(name)
        if done is None:
            yield Progress("tables", 4 * number, total, f"{name}: growing")
            splits = [split_table(name, seed, rows=config.rows) for seed in session.seeds]
            parts = {"GBNN": grown(config, splits, keys)}
            for i, solver in enumerate(("adam", "lbfgs")):
                yield Progress("tables", 4 * number + 1 + i, total, f"{name}: {solver}")
                parts[solver] = at_once(config, splits, keys, solver)
            yield Progress("tables", 4 * number + 3, total, f"{name}: timing")
            network = parts["GBNN"].pop("network")
            units = parts["GBNN"]["settings"][0][0]
            shape = {"kind": splits[0].kind, "inputs": splits[0].train.x.shape[1], "rows": len(splits[0].train.x)}
            done = {**parts, "inference": inference(config, network, units, splits[0].test.x), "shape": shape}
            session.save(name, done)
        found[name] = done
    yield Progress("tables", total, total)
    return compare(config, found)


# What was found ------------------------------------------------------------------------------------------------------


def arms(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Test scores [seeds, sizes] of each arm on one table."""
    values = (found["GBNN"]["test"], found["adam"]["test"], found["lbfgs"]["test"], found["adam"]["cut"])
    return dict(zip(ARMS, map(np.asarray, values), strict=True))


def compare(config: GBNNConfig, found: Mapping[str, Any]) -> Comparison:
    """Tables, figures, rows and the headline."""
    tables, figures, rows = [], [], []
    for name, part in found.items():
        kind = part["shape"]["kind"]
        metric = "RMSE (targets of unit variance)" if kind == "regression" else "accuracy"
        by_arm = arms(part)
        lines = [(arm, *(spread(v.tolist()) for v in values.T)) for arm, values in by_arm.items()]
        lines.append(
            (
                f"GBNN with steps of 1 and J = {config.units_per_step[0]}",
                *(spread(v.tolist()) for v in np.asarray(part["GBNN"]["one"]).T),
            )
        )
        columns = ("contender", *(f"{share:.0%} of units" for share in config.kept))
        tables.append(
            Table(
                f"{name}: test {metric}",
                columns,
                tuple(lines),
                "mean ± standard deviation over seeds; chosen on validation rows",
            )
        )
        series = tuple(
            Series(
                arm,
                tuple(map(float, config.sizes)),
                *(tuple(v.tolist()) for v in (values.mean(0), values.min(0), values.max(0))),
            )
            for arm, values in by_arm.items()
        )
        figures.append(
            Figure(
                f"{name}: {metric}",
                "hidden units used",
                metric,
                series,
                x_log=True,
                y_log=kind == "regression",
                note="band: smallest to largest over seeds",
            )
        )
        rows.extend(_rows(config, name, part, by_arm[ARMS[0]]))
    chosen = "; ".join(
        f"{name} " + ", ".join(f"{units} and {rate:g}" for units, rate in part["GBNN"]["settings"])
        for name, part in found.items()
    )
    tables.append(_cost_table(found))
    tables.append(_inference_table(config, found))
    return Comparison(
        headline=_headline(config, found),
        rows=tuple(rows),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=(
            "GBNN is tuned at its full size alone; what is left after switching off is not tuned for.",
            f"Chosen J and rate, seed by seed: {chosen}.",
            "Steps of 1 are the reference's default; on noisy regression they diverge.",
        ),
    )


def _rows(config: GBNNConfig, name: str, part: Mapping[str, Any], scores: np.ndarray) -> list[dict[str, Any]]:
    kind, whole = part["shape"]["kind"], str(config.units)
    rows = []
    for i, size in enumerate(config.sizes[:-1]):
        seconds = part["inference"]
        rows.append(
            {
                "method": "gbnn",
                "method_config": {"kept": config.kept[i]},
                "baseline": "all units",
                "task": {
                    "kind": "inference",
                    "name": name,
                    "metric": "rmse" if kind == "regression" else "accuracy",
                    "higher_is_better": kind != "regression",
                },
                "model": {"family": "one hidden layer", "params": config.units * (part["shape"]["inputs"] + 2)},
                "workload": {"batch": ROWS, "steps": 1, "seeds": len(scores)},
                "cost_kind": "wall",
                "speedup": float(np.median(seconds[whole]) / np.median(seconds[str(size)])),
                "speedup_ci": stats.bootstrap_ratio(seconds[whole], seconds[str(size)]),
                "quality": float(scores[:, i].mean()),
                "quality_baseline": float(scores[:, -1].mean()),
            }
        )
    return rows


def _cost_table(found: Mapping[str, Any]) -> Table:
    lines = [
        (name, part["shape"]["rows"], *(1000 * part[arm]["seconds"] for arm in ("GBNN", "adam", "lbfgs")))
        for name, part in found.items()
    ]
    return Table(
        "Training one network of full size, milliseconds",
        ("table", "rows", "GBNN", "Adam", "L-BFGS"),
        tuple(lines),
        "compile time apart; all seeds and settings run under one vmap, whose seconds are divided by their number",
    )


def _inference_table(config: GBNNConfig, found: Mapping[str, Any]) -> Table:
    lines = []
    for name, part in found.items():
        median = {size: float(np.median(seconds)) for size, seconds in part["inference"].items()}
        whole = median[str(config.units)]
        lines.append((name, *(f"{1e6 * median[str(s)]:.0f} µs ({whole / median[str(s)]:.1f}x)" for s in config.sizes)))
    columns = ("table", *(f"{share:.0%} of units" for share in config.kept))
    return Table(
        f"Inference, {ROWS} rows", columns, tuple(lines), "medians in turn; in brackets: times as fast as all units"
    )


def _headline(config: GBNNConfig, found: Mapping[str, Any]) -> str:
    at = 1 if len(config.kept) > 2 else 0
    words = []
    for name, part in found.items():
        by_arm = arms(part)
        mean = {arm: values.mean(0) for arm, values in by_arm.items()}
        what = "RMSE" if part["shape"]["kind"] == "regression" else "accuracy"
        words.append(
            f"{name} {what} {mean['GBNN'][-1]:.3f} with all units, {mean['GBNN'][at]:.3f} with {config.kept[at]:.0%} "
            f"(Adam at these sizes {mean[ARMS[1]][-1]:.3f} and {mean[ARMS[1]][at]:.3f}, cut {mean[ARMS[3]][at]:.3f})"
        )
    return "; ".join(words)


EXPERIMENT = Experiment(
    name="gbnn",
    method="gbnn",
    claim="units trained last can be switched off without significant loss; as good as networks trained at once",
    config=GBNNConfig,
    presets={
        "quick": GBNNConfig(seeds=3),
        "full": GBNNConfig(seeds=10, tables=("california", "magic", "covertype"), rows=50_000, inner_steps=200),
    },
    run=run,
)
