"""The command line: list, run, report, bench, generate, publish. Flags are made from dataclasses by tyro."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import tyro

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

HELP = """usage: python -m experiments COMMAND ...

commands:
  list                     the 33 methods, which have experiments, and the last result of each
  run NAME... | --all      run experiments: baseline and method on the same data, seeds and budget
  report                   one self-contained HTML page from what was run
  bench [NAME...]          speed ratios, measured in turn in one process
  generate --prompt TEXT   text from a language model, with the ways to decode it faster
  publish                  copy the newest results into docs/ and the README

`python -m experiments COMMAND --help` explains a command; `python -m experiments run NAME --help` also lists every
field of that experiment's configuration.
"""

Preset = Literal["quick", "full"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How to run."""

    preset: Preset = "quick"
    """quick: two CPU cores, a minute or two. full: the paper's size, for accelerators."""
    seeds: int | None = None
    """Number of seeds (at least 1); the preset's own by default."""
    out: pathlib.Path = pathlib.Path("out")
    """Directory for runs, records and reports."""
    resume: bool = False
    """Go on with the newest run of the same configuration instead of starting a new one."""
    checkpoint_seconds: float = 10.0
    """Save a running trial at least this often."""
    keep_params: bool = False
    """Keep every trial's final parameters as an orbax checkpoint."""
    devices: int | None = None
    """Use only the first N devices; batches are split over them. All by default."""
    parameters: Literal["replicated", "fsdp"] = "replicated"
    """fsdp splits parameters and optimizer state over the devices as well."""
    coordinator: str | None = None
    """Multi-host: host:port of process 0."""
    num_processes: int | None = None
    """Multi-host: number of processes."""
    process_id: int | None = None
    """Multi-host: rank of this process."""

    def __post_init__(self) -> None:
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"--checkpoint-seconds must not be negative, got {self.checkpoint_seconds}")


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Which results to draw."""

    out: pathlib.Path = pathlib.Path("out")
    """Directory given to run."""
    file: pathlib.Path | None = None
    """The page to write (default: OUT/report.html)."""


class UsageError(ValueError):
    """The command's words are wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: an experiment failed, or files could not be read or written. 2: wrong usage. 130: stopped by the user.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return OK if words else USAGE
    command, rest = words[0], words[1:]
    commands = {
        "list": _list,
        "run": _run,
        "report": _report,
        "bench": _bench,
        "generate": _generate,
        "publish": _publish,
    }
    if command not in commands:
        import difflib

        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(commands)}"
        print(f"unknown command {command!r}; {hint}", file=sys.stderr)
        return USAGE
    from experiments.runner.files import OutputError
    from jaxaccel.records import RecordError

    try:
        return commands[command](rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (OutputError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except SystemExit as stop:  # tyro has explained itself already
        return stop.code if isinstance(stop.code, int) else USAGE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _split_names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leading words that are not flags, and the rest."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:count]), list(words[count:])


def _flag(words: Sequence[str], name: str, default: str) -> str:
    """Value of ``--name`` before the full parse, which needs it for its defaults."""
    for i, word in enumerate(words):
        if word == f"--{name}" and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return default


def _run(words: Sequence[str]) -> int:
    from experiments import registry
    from experiments.runner import devices, execute
    from experiments.runner.api import Config, Experiment

    given, flags = _split_names(words)
    everything = "--all" in flags
    flags = [word for word in flags if word != "--all"]
    asks_help = "--help" in flags or "-h" in flags
    if everything and given:
        raise UsageError("give names or --all, not both")
    if not given and not everything and not asks_help:
        raise UsageError(f"which experiment? Give a name or --all. There are: {', '.join(registry.names())}")
    try:
        experiments = [registry.get(name) for name in (registry.names() if everything else given)]
    except registry.UnknownExperimentError as error:
        raise UsageError(str(error)) from error

    preset = _flag(flags, "preset", "quick")
    program = "python -m experiments run " + (" ".join(given) if given else "NAME...")
    jobs: list[tuple[Experiment, Config]]
    try:
        if len(experiments) == 1 and preset in experiments[0].presets:
            (experiment,) = experiments
            command = dataclasses.make_dataclass(
                "Command", [("options", RunOptions), ("config", experiment.config)], frozen=True
            )
            parsed: Any = tyro.cli(
                command,
                prog=program,
                description=f"{experiment.claim}\n\nThe defaults shown are those of the preset {preset!r}.",
                args=flags,
                default=command(RunOptions(), experiment.presets[preset]),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed),
            )
            options, jobs = parsed.options, [(experiment, parsed.config)]
        else:
            options = tyro.cli(RunOptions, prog=program, args=flags, description=HELP if asks_help else None)
            jobs = [(e, e.presets[options.preset]) for e in experiments]
        if options.seeds is not None:
            jobs = [(e, dataclasses.replace(c, seeds=options.seeds)) for e, c in jobs]
        devices.initialize_processes(options.coordinator, options.num_processes, options.process_id)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return execute.run_all(jobs, options)


def _list(words: Sequence[str]) -> int:
    from experiments.runner import terminal

    options = tyro.cli(ReportOptions, prog="python -m experiments list", args=list(words))
    terminal.print_catalogue(options.out)
    return OK


def _report(words: Sequence[str]) -> int:
    from experiments.runner import report

    options = tyro.cli(ReportOptions, prog="python -m experiments report", args=list(words))
    path = report.write(options.out, options.file)
    print(f"report: {path.resolve()}")
    return OK


def _bench(words: Sequence[str]) -> int:
    from experiments import benchmarks

    names, flags = _split_names(words)
    options = tyro.cli(benchmarks.BenchOptions, prog="python -m experiments bench [NAME...]", args=flags)
    try:
        chosen = benchmarks.choose(names)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return benchmarks.run(chosen, options)


def _generate(words: Sequence[str]) -> int:
    from experiments import generation_cli

    options = tyro.cli(generation_cli.GenerateOptions, prog="python -m experiments generate", args=list(words))
    return generation_cli.generate_command(options)


def _publish(words: Sequence[str]) -> int:
    from experiments import publish

    options = tyro.cli(ReportOptions, prog="python -m experiments publish", args=list(words))
    for line in publish.publish(options.out):
        print(line)
    return OK
