"""Benchmarks on one core from the start: in a process of their own, as XLA makes as many threads as it finds cores."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

from experiments.benchmarks import BenchOptions, Measurement
from experiments.trees_models import can_pin

ROOT = pathlib.Path(__file__).parents[2]

Measure = Callable[[BenchOptions], Iterator[Measurement]]


def on_one_core(module: str, here: Measure, options: BenchOptions) -> Iterator[Measurement]:
    """What ``here`` measures, in a process on one core that runs ``module``, which calls `main`.

    Args:
        module: name of the module that has ``here``.
        here: measures in this process, which is what happens where processes cannot be kept to a core.
        options: of the benchmark.

    Raises:
        RuntimeError: if the process fails.
    """
    if not can_pin():
        yield from here(options)
        return
    command = [sys.executable, "-m", module, str(options.repeats)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = json.loads(line)
                interval = found.pop("interval")
                yield Measurement(interval=interval and tuple(interval), **found)
        except BaseException:  # whoever asked has gone
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")


def main(here: Measure, repeats: str) -> None:
    """Measure on one core and write a line of JSON for each measurement."""
    if can_pin():
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for measurement in here(BenchOptions(repeats=int(repeats))):
        print(json.dumps(dataclasses.asdict(measurement)), flush=True)
