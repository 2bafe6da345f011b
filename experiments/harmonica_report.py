"""What the HarmoniCa experiment found, as tables, figures, rows and one sentence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runner import stats
from experiments.runner.api import Comparison, Figure, Series, Table, Tile
from experiments.runner.sweep import spread
from jaxaccel.models import DiTConfig

Found = Sequence[Mapping[str, Any]]


def compare(
    config: Any, network: DiTConfig, found: Found, timed: Mapping[str, Any], logits: np.ndarray, learned: Sequence[str]
) -> Comparison:
    """Everything that is shown.

    Args:
        config: of the experiment.
        network: numbers of the network.
        found: of each seed.
        timed: seconds.
        logits: the table that is shown and timed.
        learned: names of the arms with trained tables.
    """
    arms = [*learned, "uniform", "random", "fewer steps"]
    return Comparison(
        headline=_headline(config, found, timed, learned),
        rows=tuple(_rows(config, network, found, timed)),
        tables=(_points(config, found, arms), _equal_cost(found, arms, learned), _seconds(timed)),
        figures=(*_curves(found, arms), _router(logits), *_pictures(found)),
        notes=_notes(config, found, timed, learned),
    )


def _fine(values: Sequence[float]) -> str:
    """Mean ± standard deviation of small numbers."""
    if not values:
        return "—"
    mean, deviation = stats.mean_and_spread(values)
    return f"{mean:.4f} ± {deviation:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _label(config: Any, arm: str, number: int, point: Mapping[str, Any]) -> str:
    if arm == "uniform":
        return f"a step in {config.intervals[number]} computed (FORA)"
    if arm == "random":
        return "drawn at random"
    if arm == "fewer steps":
        return f"{point['steps']} DDIM steps"
    return f"{arm}, β = {point['beta']:g}"


def _over_seeds(found: Found, arm: str, number: int, what: str) -> list[float]:
    return [f[arm][number][what] for f in found if f[arm][number][what] is not None]


def _points(config: Any, found: Found, arms: Sequence[str]) -> Table:
    full = [f["full"]["right"] for f in found if f["full"]["right"] is not None]
    lines: list[tuple[Any, ...]] = [("everything computed", "1.000", "0", spread(full), "—")]
    for arm in arms:
        for number, point in enumerate(found[0][arm]):
            soft = _fine(_over_seeds(found, arm, number, "soft_mse")) if "soft_mse" in point else "—"
            computed, mse, right = (_over_seeds(found, arm, number, what) for what in ("computed", "mse", "right"))
            lines.append((_label(config, arm, number, point), spread(computed), _fine(mse), spread(right), soft))
    return Table(
        "Cost and distance from the full sample",
        ("schedule", "computed share", "MSE to full", "right label", "MSE of the soft table"),
        tuple(lines),
        "mean ± standard deviation over seeds of table and noise. computed: branches computed, as a share of "
        f"{config.num_steps} full steps (1 − CUR); right: the nearest training image has the wanted label; soft: mixed "
        "outputs, as in training",
    )


def interpolated(points: Sequence[Mapping[str, Any]], computed: float) -> float | None:
    """MSE of an arm at a cost, between its points on a logarithmic scale; ``None`` outside them."""
    ordered = sorted(points, key=lambda point: point["computed"])
    x = [point["computed"] for point in ordered]
    if not x[0] - 1e-9 <= computed <= x[-1] + 1e-9:
        return None
    return float(np.exp(np.interp(computed, x, [np.log(max(point["mse"], 1e-12)) for point in ordered])))


def _at(found: Found, arm: str, computed: float) -> list[float]:
    values = [interpolated(f[arm], computed) for f in found]
    return [v for v in values if v is not None]


def _equal_cost(found: Found, arms: Sequence[str], learned: Sequence[str]) -> Table:
    lines = []
    for computed in (0.6, 0.5, 0.4, 0.3):
        best = {arm: _at(found, arm, computed) for arm in arms}
        known = {arm: float(np.mean(v)) for arm, v in best.items() if len(v) == len(found)}
        winner = min(known, key=lambda arm: known[arm]) if known else "—"
        lines.append((f"{computed:g}", *(_fine(best[arm]) if arm in known else "—" for arm in arms), winner))
    return Table(
        "MSE to the full sample at equal cost",
        ("computed share", *arms, "least"),
        tuple(lines),
        "between an arm's points on a logarithmic scale; — where it has none on one side. Lower is better",
    )


def _seconds(timed: Mapping[str, Any]) -> Table:
    base = timed["seconds"]["everything computed"]
    lines = []
    for name, values in timed["seconds"].items():
        ideal = 1 / (1 - timed["utilization"][name])
        faster = float(np.median(base) / np.median(values))
        lines.append(
            (name, f"{timed['utilization'][name]:.3f}", f"{1e3 * np.median(values):.1f}", f"{faster:.2f}",
             f"{ideal:.2f}", f"{faster / ideal:.2f}", f"{timed['compiling'][name]:.1f}")
        )  # fmt: skip
    return Table(
        "Seconds",
        ("schedule", "reused share (CUR)", "ms", "faster, times", "1 / (1 − CUR)", "of that", "first call, s"),
        tuple(lines),
        "medians of one batch, in turn, static schedules; a schedule's first call compiles its distinct rows that no "
        "earlier one had",
    )


def _curves(found: Found, arms: Sequence[str]) -> Iterator[Figure]:
    lines = []
    for arm in arms:
        points = [
            (
                float(np.mean(_over_seeds(found, arm, n, "computed"))),
                _over_seeds(found, arm, n, "mse"),
            )
            for n in range(len(found[0][arm]))
        ]
        points.sort(key=lambda point: -point[0])
        lines.append(
            Series(
                arm,
                tuple(1 - cost for cost, _ in points),
                tuple(max(float(np.mean(m)), 1e-9) for _, m in points),
                tuple(max(float(np.min(m)), 1e-9) for _, m in points),
                tuple(max(float(np.max(m)), 1e-9) for _, m in points),
            )
        )
    yield Figure(
        "Distance from the full sample against saved work",
        "saved share of branches (CUR)",
        "MSE to the full sample",
        tuple(lines),
        y_log=True,
        note="band: smallest to largest over seeds",
    )


def _router(logits: np.ndarray) -> Figure:
    scores = 1 / (1 + np.exp(-np.asarray(logits)))
    tiles = tuple(tuple(Tile(f"{r:.1f}" if row.size <= 16 else "", float(r)) for r in row) for row in scores[::-1])
    return Figure(
        "A learned table: sequential λ, middle price",
        "",
        "",
        tiles=tiles,
        tile_label="score r",
        note="rows are steps in the order of execution, columns attention and MLP of block after block; what is above "
        "the threshold is computed",
    )


def _pictures(found: Found) -> Iterator[Figure]:
    pictures = found[0]["pictures"]
    size = len(next(iter(pictures.values()))[0])
    if size > 16:  # latents are no pictures
        return
    rows: list[tuple[Tile, ...]] = []
    for images in pictures.values():
        for y in range(size):
            row = []
            for image in images:
                row += [Tile("", min(1.0, max(-1.0, value))) for value in image[y]] + [Tile("", None)]
            rows.append(tuple(row[:-1]))
        rows.append(tuple(Tile("", None) for _ in rows[0]))
    yield Figure(
        "Samples from the same noise",
        "",
        "",
        tiles=tuple(rows[:-1]),
        tile_label="pixel",
        note=f"from top to bottom: {', '.join(pictures)}; labels 0 to 7",
    )


def _notes(config: Any, found: Found, timed: Mapping[str, Any], learned: Sequence[str]) -> tuple[str, ...]:
    gaps = [
        abs(point["mse"] - point["soft_mse"]) / point["mse"]
        for f in found
        for arm in learned
        for point in f[arm]
        if point["mse"] > 0
    ] or [0.0]
    rows = [point["rows"] for f in found for arm in learned for point in f[arm]]
    return (
        "One network for all seeds; a seed draws the table's start and training noise, and the noise that samples "
        "start from.",
        f"Thresholding a trained table moves its distance from the full sample by {100 * np.median(gaps):.0f} % "
        f"(median), at most {100 * np.max(gaps):.0f} %.",
        f"Learned schedules have {min(rows)} to {max(rows)} distinct rows of {config.num_steps}, each a compiled step.",
        "The learned tables see the error of one step and a measured λ, not the final distance that is compared here.",
    )


def _headline(config: Any, found: Found, timed: Mapping[str, Any], learned: Sequence[str]) -> str:
    first = learned[0]
    middle = len(found[0][first]) // 2
    computed = float(np.mean(_over_seeds(found, first, middle, "computed")))
    mse = float(np.mean(_over_seeds(found, first, middle, "mse")))
    others = []
    for arm, name in (("uniform", "every n-th step"), ("random", "random"), ("fewer steps", "fewer DDIM steps")):
        values = _at(found, arm, computed)
        if len(values) == len(found):
            others.append(f"{name} {np.mean(values):.3g}")
    base, values = timed["seconds"]["everything computed"], timed["seconds"]["learned"]
    faster = float(np.median(base) / np.median(values))
    ideal = 1 / (1 - timed["utilization"]["learned"])
    what = "8x8 digits" if config.model == "digits" else config.model
    half = {arm: float(np.mean(_at(found, arm, 0.5))) for arm in (first, "uniform") if len(_at(found, arm, 0.5))}
    at_half = ""
    if len(half) == 2:
        verdict = "better" if half[first] < half["uniform"] else "worse"
        at_half = (
            f"; with half of them reused it is {verdict} than every 2nd step ({half[first]:.3g} against "
            f"{half['uniform']:.3g})"
        )
    beside = f" (at equal cost {', '.join(others)})" if others else ""
    return (
        f"HarmoniCa on {what}: {1 - computed:.0%} of branch outputs reused, {faster:.2f} times faster of {ideal:.2f} "
        f"possible, MSE to the full sample {mse:.3g}{beside}{at_half}"
    )


def _rows(config: Any, network: DiTConfig, found: Found, timed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    small = config.model == "digits"
    arm = "sequential λ"
    middle = len(config.betas) // 2
    slow, fast = timed["seconds"]["everything computed"], timed["seconds"]["learned"]
    yield {
        "method": "harmonica",
        "method_config": {"beta": config.betas[middle], "threshold": config.threshold, "proxy": "sequential"},
        "baseline": "everything computed",
        "task": {
            "kind": "inference",
            "name": "digits-ddim" if small else "imagenet-latents-ddim",
            "modality": "image",
            "dataset": "digits" if small else "none (labels only)",
            "metric": "MSE to the full sample",
            "higher_is_better": False,
        },
        "model": {
            "family": "dit",
            "params": network.num_parameters,
            "dtype": config.dtype,
        },
        "workload": {"batch": 2 * config.timed_batch, "steps": config.num_steps, "seeds": len(found)},
        "cost_kind": "wall",
        "speedup": float(np.median(slow) / np.median(fast)),
        "speedup_ci": stats.bootstrap_ratio(slow, fast),
        "quality": float(np.mean(_over_seeds(found, arm, middle, "mse"))),
        "quality_baseline": 0.0,
    }
