"""What the Learn2PD experiment found: tables, figures, rows and the headline."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.learn2pd_arms import FILTER, FILTER_DUAL, FILTER_END, ORACLE, VANILLA
from experiments.runner import stats
from experiments.runner.api import Cell, Comparison, Figure, Series, Table, Tile
from experiments.runner.sweep import spread

Results = Sequence[Mapping[str, Any]]


def compare(config: Any, results: Results) -> Comparison:
    """All of it, from the measurements of each seed and stage."""
    stages = list(dict.fromkeys(r["stage"] for r in results))
    last = [r for r in results if r["stage"] == stages[-1]]
    return Comparison(
        headline=_headline(config, last),
        rows=tuple(_rows(config, last)),
        tables=tuple(_table(stage, [r for r in results if r["stage"] == stage]) for stage in stages),
        figures=(*(_curve(stage, [r for r in results if r["stage"] == stage]) for stage in stages), *_tiles(results)),
        notes=_notes(config, results, last),
    )


def _times(results: Results, arm: str, what: str) -> list[float]:
    """How many times less an arm takes than one token per pass, for each seed: passes, tokens computed or seconds."""
    if what == "seconds":
        return [float(np.median(r["seconds"][VANILLA]) / np.median(r["seconds"][arm])) for r in results]
    return [r["quality"][VANILLA][what] / r["quality"][arm][what] for r in results]


def _of(results: Results, arm: str, what: str) -> list[float]:
    return [r["quality"][arm][what] for r in results]


def _table(stage: str, results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for arm in results[0]["quality"]:
        milliseconds = [1e3 * float(np.median(r["seconds"][arm])) for r in results]
        rows.append(
            (
                arm,
                spread(_of(results, arm, "right")),
                spread(_of(results, arm, "same")),
                spread(_of(results, arm, "forwards")),
                spread(_times(results, arm, "forwards")),
                f"{np.mean(_of(results, arm, 'processed')):.0f}",
                spread(milliseconds),
                spread(_times(results, arm, "seconds")),
            )
        )
    return Table(
        f"Decoding held-out prompts, {stage}",
        ("decoding", "right", "same as one token", "passes", "fewer, times", "tokens computed", "ms", "faster, times"),
        tuple(rows),
        "mean ± standard deviation over seeds. right: exact match with the known answer; same: the whole text equals "
        "that of one token per pass; ms: median of one prompt at a time, arms in turn, compiled before; the oracle is "
        "told the answer",
    )


def _curve(stage: str, results: Results) -> Figure:
    lines = []
    for name in results[0]["curve"]:
        points = np.mean([r["curve"][name] for r in results], 0)
        points = points[np.argsort(points[:, 0])]
        lines.append(Series(name, tuple(points[:, 0].tolist()), tuple(points[:, 1].tolist())))
    return Figure(
        f"Right answers against passes, {stage}",
        "passes of an answer",
        "right",
        tuple(lines),
        note="each point is a threshold on confidence, or on the filter's probability; mean over seeds",
    )


def _tiles(results: Results) -> Iterator[Figure]:
    """One prompt decoded in several ways, each token with the pass that revealed it."""
    first = [r for r in results if r["seed"] == results[0]["seed"]]
    wanted = [(first[-1], VANILLA), (first[0], FILTER), (first[-1], FILTER), (first[-1], FILTER_END)]
    for result, arm in wanted:
        cells = result["examples"]["arms"][arm]
        width = max(16, len(cells) // 32)
        tiles = [Tile(text, float(order)) if order >= 0 else Tile("", None) for text, order in cells]
        yield Figure(
            f"\u201c{result['examples']['prompt'].strip('_')[-40:]}\u201d, {arm}, {result['stage']}",
            "",
            "",
            tiles=tuple(tuple(tiles[i : i + width]) for i in range(0, len(tiles), width)),
            tile_label="pass that revealed it",
            note="read from left to right, row by row; \u00b6 is end of text, grey was cut away and not computed again",
        )


def _notes(config: Any, results: Results, last: Results) -> tuple[str, ...]:
    middle = f"threshold {config.thresholds[len(config.thresholds) // 2]:g}"
    gap = np.mean(_times(last, FILTER, "forwards")) / np.mean(_times(last, middle, "forwards"))
    points = 100 * (np.mean(_of(last, FILTER, "right")) - np.mean(_of(last, middle, "right")))
    compiled = np.mean([sum(r["compiling"].values()) for r in results if r["seed"] == results[0]["seed"]])
    return (
        f"At the end of training the filter takes {1 / gap:.2f} times the passes of a {middle} that needs no training, "
        f"and is right {points:+.1f} points more often.",
        f"A filter learns from {np.mean([r['records'] for r in last]):.0f} records of {config.filter_prompts} prompts; "
        f"loss on records held out {np.mean([r['test_loss'] for r in last]):.3f}.",
        f"The first call of all arms of a stage, compilation among it where it is new: {compiled:.0f} s. It is no part "
        "of the seconds above.",
        "Passes and tokens computed are the algorithm's own; a pass runs on a prefix that is a whole number of blocks. "
        "Most of an answer's space here is end of text, as in the paper's longest settings: much of the gain of "
        "end-of-text prediction is that padding.",
    )


def _headline(config: Any, last: Results) -> str:
    def words(arm: str) -> str:
        points = 100 * (np.mean(_of(last, arm, "right")) - np.mean(_of(last, VANILLA, "right")))
        fewer, faster = (np.mean(_times(last, arm, what)) for what in ("forwards", "seconds"))
        return f"{fewer:.1f} times fewer passes, {faster:.1f} times faster, {points:+.1f} points"

    middle = f"threshold {config.thresholds[len(config.thresholds) // 2]:g}"
    what = "words written backwards" if config.model == "words" else f"{config.model} on {config.dataset}"
    right = 100 * np.mean(_of(last, VANILLA, "right"))
    oracle = np.mean(_times(last, ORACLE, "forwards"))
    return (
        f"Learn2PD on {what}, against one token per pass ({right:.1f} % right): filter {words(FILTER)}; with end of "
        f"text {words(FILTER_END)}; with dual cache, too, {words(FILTER_DUAL)}; a {middle} without training "
        f"{words(middle)}; the oracle {oracle:.1f} times fewer passes"
    )


def _rows(config: Any, last: Results) -> Iterator[dict[str, Any]]:
    small = config.model == "words"
    common = {
        "method": "learn2pd",
        "baseline": "one token per pass",
        "task": {
            "kind": "inference",
            "name": "words-backwards" if small else "gsm8k",
            "modality": "text",
            "dataset": "pydoc-topics" if small else config.dataset,
            "metric": "exact match",
            "higher_is_better": True,
        },
        "model": {"family": "llada", "params": last[0]["parameters"], "dtype": config.dtype},
    }
    for arm in last[0]["quality"]:
        if arm in (VANILLA, ORACLE):
            continue
        row = common | {
            "method_config": {"arm": arm, "tau": config.tau, "block_length": config.block_length},
            "workload": {"gen_length": config.gen_length, "batch": 1, "seeds": len(last)},
            "quality": float(np.mean(_of(last, arm, "right"))),
            "quality_baseline": float(np.mean(_of(last, VANILLA, "right"))),
        }
        yield row | {"cost_kind": "steps", "speedup": float(np.mean(_times(last, arm, "forwards")))}
        pairs = [(a, b) for r in last for a, b in zip(r["seconds"][VANILLA], r["seconds"][arm], strict=True)]
        slow, fast = zip(*pairs, strict=True)
        yield row | {
            "cost_kind": "wall",
            "speedup": float(np.median(slow) / np.median(fast)),
            "speedup_ci": stats.bootstrap_ratio(slow, fast),
        }
