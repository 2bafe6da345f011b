"""Drives experiments from start to record: one directory each, progress on screen, failures kept apart."""

import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from experiments.runner import devices, files, terminal
from experiments.runner.api import Comparison, Config, Experiment, to_json
from experiments.runner.interrupt import Interrupt, Interrupted
from experiments.runner.session import RunSettings, Session, mark, open_run
from jaxaccel import records

if TYPE_CHECKING:
    from experiments.runner.cli import RunOptions

RECORDS = "records.jsonl"


def run_all(jobs: Sequence[tuple[Experiment, Config]], options: "RunOptions") -> int:
    """Run experiments one after the other; a failed one does not stop the rest. Returns the exit code."""
    settings = RunSettings(
        options.out, options.checkpoint_seconds, options.keep_params, options.devices, options.parameters
    )
    screen = terminal.Screen(quiet=not devices.is_main_process())
    failed: list[str] = []
    with Interrupt() as interrupt:
        for experiment, config in jobs:
            try:
                directory = open_run(experiment, config, options.preset, options.out, resume=options.resume)
                comparison = run_one(experiment, config, settings, directory, interrupt, screen)
                screen.show(experiment, comparison, directory)
            except Interrupted as stop:
                mark(directory, "interrupted")
                screen.print(
                    f"\n[yellow]stopped[/yellow] at {stop}. Everything finished is kept; go on with\n  {_again()}"
                )
                return 130
            except (files.OutputError, records.RecordError) as error:
                screen.error(f"{experiment.name}: {error}")
                failed.append(experiment.name)
            except KeyboardInterrupt:
                raise
            except Exception as error:
                mark(directory, "failed", error=f"{type(error).__name__}: {error}")
                files.write_bytes(directory / "error.txt", traceback.format_exc().encode())
                screen.error(
                    f"{experiment.name} failed: {type(error).__name__}: {error}\n  details: {directory / 'error.txt'}"
                )
                failed.append(experiment.name)
    if failed:
        screen.error(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _again() -> str:
    words = [w for w in sys.argv[1:] if w != "--resume"]
    return " ".join(["python -m experiments", *words, "--resume"])


def run_one(
    experiment: Experiment,
    config: Config,
    settings: RunSettings,
    directory: pathlib.Path,
    interrupt: Interrupt,
    screen: "terminal.Screen",
) -> Comparison:
    """Run or resume one experiment in ``directory`` and write its result and record rows."""
    records.read_rows(
        settings.out / RECORDS
    )  # a file that cannot be appended to is reported before the work, not after
    session = Session(experiment, config, settings, directory, interrupt)
    mark(directory, "running")
    with screen.progress(experiment) as update:
        work = experiment.run(config, session)
        while True:
            try:
                update(next(work))
            except StopIteration as end:
                comparison: Comparison = end.value
                break
    if devices.is_main_process():
        files.write_json(directory / "result.json", to_json(comparison))
        for row in comparison.rows:
            full = records.make_row(**row, experiment=experiment.name, run=session.run_id)
            records.append_once(settings.out / RECORDS, full)
    mark(directory, "finished", platform=jax.default_backend(), device=jax.devices()[0].device_kind)
    return comparison
