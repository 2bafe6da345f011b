"""The command line as a user meets it: words, exit codes, kills, interrupts, several processes."""

import json
import pathlib
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from experiments.runner import cli
from jaxaccel import records
from tests.experiments.conftest import TINY, run_cli, start_cli


def results(out: pathlib.Path) -> dict[str, dict]:
    """Finished trials by name, without what a clock measured."""
    found = {}
    for path in sorted(out.glob("runs/*/trials/*/result.json")):
        summary = json.loads(path.read_text())
        summary["cost"] = {
            k: v for k, v in summary["cost"].items() if k in ("flops_per_step", "state_bytes", "peak_bytes")
        }
        with np.load(path.parent / "curves.npz") as curves:
            summary["curves"] = {name: curves[name].tobytes() for name in curves.files}
        found[path.parent.name] = summary
    return found


def record_rows(out: pathlib.Path) -> list[dict]:
    """Record rows without clocks: times, wall speed-ups, compile seconds, names of runs."""
    rows = records.read_rows(out / "records.jsonl").rows
    for row in rows:
        for field in ("time", "compile_s", "run"):
            row.pop(field)
        if row["cost_kind"] == "wall":
            row["speedup"] = row["speedup_ci"] = None
    return rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    code, printed, errors = run_cli("run", "lion", *TINY, "--out", str(out))
    assert code == 0, errors
    (out / "seconds").write_text(str(time.monotonic() - start))
    return out, printed


def test_run_prints_tables_and_writes_records(uninterrupted):
    out, printed = uninterrupted
    assert "each arm at its own best learning rate" in printed
    assert "optimizer memory 2.0 times smaller" in printed
    assert str(out) in printed
    kinds = [row["cost_kind"] for row in records.read_rows(out / "records.jsonl").rows]
    assert kinds == ["steps", "wall", "bytes"]
    assert len(results(out)) == 5


@pytest.mark.slow
def test_sigkill_at_any_moment_and_resume_gives_the_same_bits(uninterrupted, tmp_path):
    """Kill at moments spread over the whole run, through imports, compilation, training, saving and recording."""
    words = ["run", "lion", *TINY, "--out", str(tmp_path), "--resume"]
    words += ["--checkpoint-seconds", "0"]  # a save at every boundary: the most moments at which one can be torn
    whole, _ = uninterrupted
    seconds, kills = float((whole / "seconds").read_text()), 0
    while True:
        process = start_cli(*words)
        try:
            _, errors = process.communicate(timeout=seconds * (0.3 + 0.15 * kills))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            assert kills < 20
    assert process.returncode == 0, errors
    assert kills >= 2
    assert results(tmp_path) == results(whole)
    assert record_rows(tmp_path) == record_rows(whole)


def test_interrupt_saves_says_how_to_go_on_and_resumes(uninterrupted, tmp_path):
    words = ["run", "lion", *TINY, "--out", str(tmp_path)]
    process = start_cli(*words)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/trials/*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "python -m experiments run lion" in printed
    assert "--resume" in printed
    (info,) = tmp_path.glob("runs/*/run.json")
    assert json.loads(info.read_text())["status"] == "interrupted"
    code, _, errors = run_cli(*words, "--resume")
    assert code == 0, errors
    assert results(tmp_path) == results(uninterrupted[0])


def test_resume_with_other_settings_says_what_differs(tmp_path, capsys):
    from experiments import registry
    from experiments.runner.session import open_run

    experiment = registry.get("lion")
    config = experiment.presets["quick"]
    open_run(experiment, config, "quick", tmp_path, resume=False)  # stays unfinished
    assert cli.main(["run", "lion", "--out", str(tmp_path), "--resume", "--clip", "2.0"]) == 1
    assert "clip: 1.0 there, 2.0 now" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_single_process_curves(uninterrupted, tmp_path):
    port = free_port()
    words = ["run", "lion", *TINY, "--out", str(tmp_path), "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    processes = [start_cli(*words, "--process-id", str(rank)) for rank in range(2)]
    output = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, output, strict=True):
        assert process.returncode == 0, errors[-3000:]
    single, double = results(uninterrupted[0]), results(tmp_path)
    assert set(single) == set(double)
    for name, trial in single.items():
        for metric in ("train_loss", "val_loss"):
            curve = [np.frombuffer(t["curves"][metric], np.float32) for t in (trial, double[name])]
            # Gradients are means over two halves of the batch, summed in another order: float32 rounding, which 96
            # steps of training amplify.
            np.testing.assert_allclose(curve[1], curve[0], rtol=2e-3)
            np.testing.assert_allclose(curve[1][:5], curve[0][:5], rtol=2e-5)
    assert len(records.read_rows(tmp_path / "records.jsonl").rows) == 3  # process 1 writes none


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "lyon"], "did you mean 'lion'?"),
        (["run", "zzz"], "unknown experiment 'zzz'; there are: "),
        (["run"], "which experiment?"),
        (["run", "lion", "--all"], "not both"),
        (["run", "lion", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["run", "lion", "--learning-rat", "1"], "Unrecognized"),
        (["run", "lion", "--preset", "huge"], "invalid choice"),
        (["run", "lion", "--warmup", "1.5"], "warmup is a fraction in [0, 1), got 1.5"),
        (["run", "lion", "--adamw-learning-rates", "-1"], "must be positive and finite, got -1"),
        (["run", "lion", "--coordinator", "127.0.0.1:1"], "needs all of"),
        (["reprot"], "did you mean 'report'?"),
        (["bench", "optimisers"], "did you mean 'optimizers'?"),
        (["bench", "--repeats", "1"], "--repeats must be at least 3"),
    ],
)
def test_wrong_words_exit_with_2_and_say_what_is_wrong(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(words) == cli.USAGE
    captured = capsys.readouterr()
    assert message.lower() in (captured.err + captured.out).lower()
    assert not (tmp_path / "out").exists()


def test_unwritable_directory_is_an_error_with_a_name(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "lion", "--out", str(tmp_path / "file")]) == cli.FAILED
    assert f"cannot write {tmp_path / 'file'}" in capsys.readouterr().err


def test_help_shows_every_field_of_the_config(capsys):
    from experiments import registry

    for name in registry.names():
        assert cli.main(["run", name, "--help"]) == 0
        shown = capsys.readouterr().out
        for field in type(registry.get(name).presets["quick"]).__dataclass_fields__:
            assert f"--{field.replace('_', '-')}" in shown, (name, field)


def test_report_without_runs_says_what_to_do(tmp_path, capsys):
    assert cli.main(["report", "--out", str(tmp_path)]) == cli.FAILED
    assert "run one first" in capsys.readouterr().err


def test_report_is_one_file_without_addresses(uninterrupted, capsys):
    out, _ = uninterrupted
    assert cli.main(["report", "--out", str(out)]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    page = (out / "report.html").read_text()
    for word in ("http:", "https:", "//cdn", "<link", "<script", "url("):
        assert word not in page
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "optimizer memory 2.0 times smaller" in page


def test_records_of_a_newer_version_stop_a_run_before_its_work(tmp_path, capsys):
    line = '{"schema": 99}\n'
    (tmp_path / "records.jsonl").write_text(line)
    assert cli.main(["run", "lion", *TINY, "--out", str(tmp_path)]) == cli.FAILED
    assert "99" in capsys.readouterr().err
    assert (tmp_path / "records.jsonl").read_text() == line
    assert not results(tmp_path)


def test_list_shows_all_methods_and_the_last_result(uninterrupted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["list", "--out", str(uninterrupted[0])]) == 0
    shown = capsys.readouterr().out
    from jaxaccel.catalogue import METHODS

    assert all(method.slug in shown for method in METHODS)
    assert "optimizer memory 2.0" in shown


def test_no_words_print_the_help(capsys):
    assert cli.main([]) == cli.USAGE
    assert cli.main(["--help"]) == 0
    assert "run NAME... | --all" in capsys.readouterr().out


def test_run_of_a_newer_version_is_not_touched(tmp_path, capsys):
    from experiments import registry
    from experiments.runner.session import open_run

    experiment = registry.get("lion")
    directory = open_run(experiment, experiment.presets["quick"], "quick", tmp_path, resume=False)
    info = json.loads((directory / "run.json").read_text()) | {"schema": 99}
    (directory / "run.json").write_text(json.dumps(info))
    assert cli.main(["run", "lion", "--out", str(tmp_path), "--resume"]) == cli.FAILED
    assert "schema 99, written by a newer jaxaccel" in capsys.readouterr().err
    assert json.loads((directory / "run.json").read_text()) == info


@pytest.mark.slow
def test_full_disk_is_an_error_with_a_name_and_loses_nothing(tmp_path):
    """A file-size limit stands for the full disk: the first trials fit, a checkpoint does not."""
    words = ("run", "lion", *TINY, "--out", str(tmp_path))
    code, _, errors = run_cli(
        *words,
        "--checkpoint-seconds",
        "0",
        prefix=("bash", "-c", "trap '' XFSZ; ulimit -f 200; exec \"$@\"", "bash"),
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    assert code == cli.FAILED, errors
    assert "cannot save a checkpoint in" in errors
    assert "--resume" in errors
    code, _, errors = run_cli(*words, "--resume")
    assert code == 0, errors
    assert len(results(tmp_path)) == 5
