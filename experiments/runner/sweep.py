"""Reading a comparison of training arms: the best learning rates, steps to a target, spreads, record rows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.runner import stats
from experiments.runner.api import Cell, Figure, Series, Table
from experiments.runner.train import Arm, Task
from experiments.runner.trial import TrialResult, trial_name


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All trials of one task, with the questions that experiments ask of them."""

    task: Task
    arms: tuple[Arm, ...]
    trials: tuple[TrialResult, ...]

    def select(self, arm: str, learning_rate: float | None = None) -> list[TrialResult]:
        """Trials of an arm (at one learning rate), ordered by seed."""
        found = [t for t in self.trials if t.arm == arm and (learning_rate is None or t.learning_rate == learning_rate)]
        return sorted(found, key=lambda t: (t.learning_rate, t.seed))

    def arm(self, name: str) -> Arm:
        """The arm called ``name``."""
        return next(arm for arm in self.arms if arm.name == name)

    def quality(self, trial: TrialResult) -> float:
        """Final value of the task's metric; the worst possible one after a divergence."""
        worst = -np.inf if self.task.higher_is_better else np.inf
        return trial.final.get(self.task.metric, worst) if trial.status == "ok" else worst

    def best_learning_rate(self, arm: str) -> float:
        """The learning rate with the best mean final metric over the seeds that all rates were run with.

        A rate that diverged with any seed is never chosen while another is left. Ties go to the smaller rate.
        """
        rates = self.arm(arm).learning_rates
        by_rate = {rate: self.select(arm, rate) for rate in rates}
        seeds = set.intersection(*({t.seed for t in trials} for trials in by_rate.values()))
        sign = -1.0 if self.task.higher_is_better else 1.0
        return min(rates, key=lambda r: (sign * np.mean([self.quality(t) for t in by_rate[r] if t.seed in seeds]), r))

    def best(self, arm: str) -> list[TrialResult]:
        """Trials of an arm at its own best learning rate."""
        return self.select(arm, self.best_learning_rate(arm))

    def steps_to(
        self, trial: TrialResult, metric: str, *, at_least: float | None = None, at_most: float | None = None
    ) -> float:
        """Steps until an evaluation of ``metric`` first reaches a target; infinity if none does in the budget."""
        if (at_least is None) == (at_most is None):
            raise ValueError("give one of at_least and at_most")
        values = trial.curves[metric]  # the NaNs behind a divergence reach nothing
        reached = values >= at_least if at_least is not None else values <= at_most
        return float(trial.curves["eval_step"][np.argmax(reached)]) if reached.any() else float("inf")

    # Tables and figures -----------------------------------------------------------------------------------------

    def best_table(self, *, extra: Sequence[tuple[str, Callable[[list[TrialResult]], Cell]]] = ()) -> Table:
        """Each arm at its own best learning rate: quality with its spread over seeds, and its costs."""
        found = dict.fromkeys(name for trial in self.trials for name in trial.final)
        names = [self.task.metric, *(name for name in found if name.startswith("test_"))]
        rows = []
        for arm in self.arms:
            trials = self.best(arm.name)
            ok = [t for t in trials if t.status == "ok"]
            cells: list[Cell] = [arm.name, self.best_learning_rate(arm.name)]
            cells += [spread([t.final[name] for t in ok if name in t.final]) for name in names]
            cells += [function(trials) for _, function in extra]
            cells += [
                f"{len(ok)}/{len(trials)}",
            ]
            rows.append(tuple(cells))
        columns = ("arm", "best lr", *names, *(n for n, _ in extra), "ok")
        return Table(
            f"{self.task.name}: each arm at its own best learning rate",
            columns,
            tuple(rows),
            f"mean ± standard deviation over {len(self.best(self.arms[0].name))} seeds; "
            f"rates are chosen by {self.task.metric} on the validation split; "
            "ok are the runs that did not diverge",
        )

    def cost_table(self) -> Table:
        """What a step of each arm costs: the compiler's counts, and seconds with compilation apart."""
        rows = []
        for arm in self.arms:
            trials = self.select(arm.name)
            cost = trials[0].cost
            rows.append(
                (
                    arm.name,
                    milliseconds([t.cost["step_s"] for t in trials]),
                    f"{np.median([t.cost['train_s'] or 0.0 for t in trials]):.2f}",
                    f"{cost['compile_s']:.2f}",
                    "—" if cost["flops_per_step"] is None else f"{cost['flops_per_step'] / 1e6:.1f}",
                    megabytes(cost["peak_bytes"]),
                    megabytes(cost["state_bytes"]),
                )
            )
        return Table(
            f"{self.task.name}: costs",
            ("arm", "ms/step", "s per run", "compile s", "MFLOP/step", "peak memory", "optimizer state"),
            tuple(rows),
            "medians over all runs, compilation apart; operations and memory are the compiler's counts "
            "(an inner loop's body counts once)",
        )

    def rates_table(self, title: str, cell: Callable[[list[TrialResult]], Cell], note: str = "") -> Table:
        """One row per learning rate, one column per arm."""
        rates = sorted({rate for arm in self.arms for rate in arm.learning_rates})
        rows = []
        for rate in rates:
            cells: list[Cell] = [f"{rate:g}"]
            for arm in self.arms:
                trials = self.select(arm.name, rate)
                cells.append(cell(trials) if trials else None)
            rows.append(tuple(cells))
        return Table(title, ("learning rate", *(arm.name for arm in self.arms)), tuple(rows), note)

    def curves(self, metric: str | None = None, *, at: float | None = None, title: str | None = None) -> Figure:
        """Learning curves: the mean over seeds, with the band from the worst to the best seed.

        Args:
            metric: an evaluated metric (the task's own by default).
            at: one learning rate for all arms; each arm's own best by default.
            title: of the figure.
        """
        metric = metric or self.task.metric
        series = []
        for arm in self.arms:
            rate = self.best_learning_rate(arm.name) if at is None else at
            trials = [t for t in self.select(arm.name, rate) if t.status == "ok"]
            if not trials:
                continue
            values = np.stack([t.curves[metric] for t in trials]).astype(np.float64)
            label = f"{arm.name} (lr {rate:g})" if at is None else arm.name
            series.append(
                Series(
                    label,
                    *(
                        tuple(v.tolist())
                        for v in (
                            trials[0].curves["eval_step"].astype(float),
                            values.mean(0),
                            values.min(0),
                            values.max(0),
                        )
                    ),
                )
            )
        where = "each arm at its own best learning rate" if at is None else f"learning rate {at:g} for all"
        return Figure(title or f"{self.task.name}: {metric}, {where}", "training step", metric, tuple(series))

    # Records ----------------------------------------------------------------------------------------------------

    def row(
        self,
        baseline: str,
        method: str,
        cost_kind: str,
        costs: tuple[Sequence[float], Sequence[float]],
        *,
        trials: tuple[Sequence[TrialResult], Sequence[TrialResult]] | None = None,
        setting: str = "best_lr",
    ) -> dict[str, Any]:
        """Arguments of a record row (`jaxaccel.records.make_row`) that compares two arms by one kind of cost.

        Args:
            baseline: name of the baseline arm.
            method: name of the method's arm.
            cost_kind: ``wall``, ``steps``, ``flops`` or ``bytes``.
            costs: cost per seed of the baseline and of the method; infinity for a seed that never got there.
            trials: the trials compared (each arm's best by default).
            setting: what was held equal, kept in ``method_config``.
        """
        old, new = trials or (self.best(baseline), self.best(method))
        # A seed that never reached the target costs at least the whole budget: the ratio is then a bound, and says so.
        censored = [
            side for side, cost in zip(("baseline", "method"), costs, strict=True) if not np.isfinite(cost).all()
        ]
        known = [[c if np.isfinite(c) else float(self.task.steps) for c in side] for side in costs]
        diverged = not any(t.status == "ok" for t in new)
        measured = bool(known[0] and known[1]) and not diverged and len(censored) < 2
        quality, quality_baseline = (_finite_mean([self.quality(t) for t in side]) for side in (new, old))
        return {
            "method": self.arm(method).method or method,
            "method_config": {
                **self.arm(method).config,
                "learning_rate": new[0].learning_rate,
                "setting": setting,
                "baseline_learning_rate": old[0].learning_rate,
            },
            "baseline": baseline,
            "task": {
                **self.task.description,
                "name": self.task.name,
                "metric": self.task.metric,
                "higher_is_better": self.task.higher_is_better,
            },
            "model": dict(self.task.model),
            "workload": {"batch": self.task.batch_size, "steps": self.task.steps, "seeds": len(new)},
            "cost_kind": cost_kind,
            "speedup": float(np.median(known[0]) / np.median(known[1])) if measured else None,
            "speedup_ci": stats.bootstrap_ratio(*known) if measured and len(known[0]) == len(known[1]) else None,
            "compile_s": new[0].cost["compile_s"],
            "quality": quality,
            "quality_baseline": quality_baseline,
            "status": "diverged" if diverged else "ok" if measured else "unsupported",
            "censored": censored,
            "curves": {
                side: [trial_name(self.task.name, t.arm, t.learning_rate, t.seed) for t in runs]
                for side, runs in (("method", new), ("baseline", old))
            },
        }

    def failure_rows(self, baseline: str) -> list[dict[str, Any]]:
        """A row for every arm and learning rate at which some seed diverged: they teach a selector what not to do."""
        rows = []
        for arm in self.arms:
            for rate in arm.learning_rates:
                failed = [t for t in self.select(arm.name, rate) if t.status != "ok"]
                if failed:
                    sides = (self.best(baseline), failed)
                    rows.append(self.row(baseline, arm.name, "steps", ([], []), trials=sides, setting="failed"))
        return rows


def _finite_mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else None


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation for a table."""
    if not values:
        return "—"
    mean, deviation = stats.mean_and_spread(values)
    return f"{mean:.3f} ± {deviation:.3f}" if len(values) > 1 else f"{mean:.3f}"


def milliseconds(seconds: Sequence[float | None]) -> str:
    """Median of step times for a table."""
    known = [s for s in seconds if s is not None]
    return f"{1e3 * float(np.median(known)):.2f}" if known else "—"


def megabytes(count: float | None) -> str:
    """Bytes for a table."""
    return "—" if count is None else f"{count / 1e6:.2f} MB"
