"""One run of one experiment: its directory, what it has finished, and the services that the experiment may call."""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import uuid
from collections.abc import Generator, Sequence
from typing import Any

import jax

import jaxaccel
from experiments.runner import devices, files
from experiments.runner.api import Config, Experiment, Progress
from experiments.runner.interrupt import Interrupt
from experiments.runner.sweep import Sweep
from experiments.runner.train import Arm, Task
from experiments.runner.trial import Programs, TrialResult, compile_programs, load_result, run_trial, trial_name

RUN_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How to run, as opposed to what: nothing here may change a result."""

    out: pathlib.Path = pathlib.Path("out")
    checkpoint_seconds: float = 10.0
    keep_params: bool = False
    device_count: int | None = None
    parameters: devices.ParameterSharding = "replicated"


def config_hash(experiment: str, config: Config) -> str:
    """Eight hex digits that name a configuration."""
    data = json.dumps([experiment, dataclasses.asdict(config)], sort_keys=True, default=str)
    return hashlib.sha256(data.encode()).hexdigest()[:8]


class Session:
    """What an experiment's ``run`` function is given.

    Attributes:
        config: the experiment's config.
        seeds: ``range(config.seeds)``.
        directory: this run's own directory.
        run_id: unique name of this run; it is kept over a resume.
        placement: where arrays live.
    """

    def __init__(
        self,
        experiment: Experiment,
        config: Config,
        settings: RunSettings,
        directory: pathlib.Path,
        interrupt: Interrupt,
    ) -> None:
        self.experiment, self.config, self.settings, self.directory = experiment, config, settings, directory
        self.interrupt = interrupt
        self.run_id = files.read_json(directory / "run.json")["run"]
        self.seeds = tuple(range(config.seeds))
        self.placement = devices.Placement.over_all_devices(settings.parameters, settings.device_count)
        self._programs: dict[tuple[str, str], Programs] = {}

    # Training ---------------------------------------------------------------------------------------------------

    def trial(self, task: Task, arm: Arm, learning_rate: float, seed: int) -> Generator[Progress, None, TrialResult]:
        """Train one arm with one learning rate and one seed; finished trials are read back instead."""
        name = trial_name(task.name, arm.name, learning_rate, seed)
        finished = load_result(self.directory / "trials" / name)
        if finished is not None:
            return finished
        key = (task.name, arm.name)
        if key not in self._programs:
            yield Progress(f"compiling {arm.name}", 0, 1)
            self._programs[key] = compile_programs(task, arm, self.placement)
            yield Progress(f"compiling {arm.name}", 1, 1)
        identity = {
            "experiment": self.experiment.name,
            "config": json.loads(json.dumps(dataclasses.asdict(self.config), default=str)),
            "trial": name,
            "library_version": jaxaccel.__version__,
        }
        return (
            yield from run_trial(
                task,
                arm,
                learning_rate,
                seed,
                programs=self._programs[key],
                placement=self.placement,
                directory=self.directory / "trials" / name,
                identity=identity,
                interrupt=self.interrupt,
                checkpoint_seconds=self.settings.checkpoint_seconds,
                keep_params=self.settings.keep_params,
            )
        )

    def sweep(
        self, task: Task, arms: Sequence[Arm], *, tuning_seeds: int | None = None
    ) -> Generator[Progress, None, Sweep]:
        """Run every arm on the same task: all learning rates for tuning, then every seed at each arm's own best.

        Arms take turns, so that drift of the machine's speed falls on all of them alike.

        Args:
            task: what they share.
            arms: the contenders, baseline first.
            tuning_seeds: seeds with which the whole grid of learning rates is run; all seeds by default, which also
                gives the spread at every learning rate.
        """
        first = self.seeds[: tuning_seeds or len(self.seeds)]
        rates = max(len(arm.learning_rates) for arm in arms)
        plan = [
            (arm, arm.learning_rates[i], seed)
            for seed in first
            for i in range(rates)
            for arm in arms
            if i < len(arm.learning_rates)
        ]
        rest = self.seeds[len(first) :]
        total = len(plan) + len(rest) * len(arms)
        results: list[TrialResult] = []

        def run(trials: Sequence[tuple[Arm, float, int]]) -> Generator[Progress, None, None]:
            for arm, rate, seed in trials:
                yield Progress(task.name, len(results), total, f"{arm.name} lr={rate:g} seed={seed}")
                results.append((yield from self.trial(task, arm, rate, seed)))

        yield from run(plan)
        tuned = Sweep(task, tuple(arms), tuple(results))
        yield from run([(arm, tuned.best_learning_rate(arm.name), seed) for seed in rest for arm in arms])
        yield Progress(task.name, total, total)
        return Sweep(task, tuple(arms), tuple(results))

    # Anything else ----------------------------------------------------------------------------------------------

    def load(self, name: str) -> Any:
        """JSON data saved under ``name`` by this run, before or after a resume; ``None`` if there is none."""
        path = self.directory / "state" / f"{name}.json"
        return files.read_json(path) if path.exists() else None

    def save(self, name: str, value: Any) -> None:
        """Save JSON data atomically, then stop here if the user asked for it."""
        if devices.is_main_process():
            files.write_json(self.directory / "state" / f"{name}.json", value)
        self.interrupt.requested = devices.any_process(self.interrupt.requested)
        self.interrupt.check(f"saved {name}")

    def __repr__(self) -> str:
        return f"Session({self.experiment.name}, {self.directory})"


def open_run(experiment: Experiment, config: Config, preset: str, out: pathlib.Path, *, resume: bool) -> pathlib.Path:
    """Find or make the directory of a run.

    With ``resume`` the newest run of the same configuration is taken up, finished or not; without it a new one starts.

    Raises:
        OutputError: if ``out`` cannot be written, or holds an unfinished run of the experiment with other settings
            and none with these, or a run of a newer version.
    """
    digest = config_hash(experiment.name, config)
    runs = out / "runs"
    existing = sorted(runs.glob(f"{experiment.name}-*-*/run.json"), key=lambda p: p.stat().st_mtime)
    if resume:
        others = []
        for path in reversed(existing):
            info = files.read_json(path)
            if info.get("experiment") != experiment.name:
                continue
            if info.get("schema", 0) > RUN_SCHEMA:
                raise files.OutputError(
                    f"{path} has schema {info['schema']}, written by a newer jaxaccel; this one knows {RUN_SCHEMA}"
                )
            if info["config_hash"] == digest:
                return path.parent
            if info["status"] != "finished":
                others.append((path.parent, info))
        if others:
            directory, info = others[0]
            mine = json.loads(json.dumps(dataclasses.asdict(config), default=str))
            changed = sorted(k for k in {*mine, *info["config"]} if mine.get(k) != info["config"].get(k))
            differences = "; ".join(f"{k}: {info['config'].get(k)!r} there, {mine.get(k)!r} now" for k in changed)
            raise files.OutputError(
                f"nothing to resume: the unfinished run {directory} has other settings ({differences}). "
                "Give the same settings, or leave out --resume to start a new run"
            )
    number = 1 + max((int(p.parent.name.rsplit("-", 1)[1]) for p in existing if digest in p.parent.name), default=0)
    directory = runs / f"{experiment.name}-{digest}-{number}"
    if devices.is_main_process():
        files.write_json(
            directory / "run.json",
            {
                "schema": RUN_SCHEMA,
                "experiment": experiment.name,
                "method": experiment.method,
                "preset": preset,
                "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
                "config_hash": digest,
                "run": uuid.uuid4().hex[:16],
                "status": "running",
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "jax_version": jax.__version__,
                "library_version": jaxaccel.__version__,
            },
        )
    devices.barrier("run-directory")
    return directory


def mark(directory: pathlib.Path, status: str, **more: Any) -> None:
    """Note the status of a run: running, finished, interrupted or failed."""
    if devices.is_main_process():
        info = files.read_json(directory / "run.json")
        files.write_json(directory / "run.json", info | {"status": status} | more)
