"""The record store: what a row must be, and what no crash, full disk or second writer may do to the file."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel import records

TASK = {"kind": "training", "name": "digits", "metric": "accuracy", "higher_is_better": True}


def row(**changes):
    arguments = {
        "method": "exadam",
        "baseline": "adam",
        "task": TASK,
        "model": {"family": "cnn", "params": 1000},
        "workload": {"batch": 32, "steps": 100, "seeds": 3},
        "cost_kind": "steps",
        "speedup": 1.25,
        "speedup_ci": (1.0, 1.5),
        "quality": 0.75,
        "quality_baseline": 0.5,
        "compile_s": 2.0,
    }
    return records.make_row(**(arguments | changes))


@pytest.fixture
def store(tmp_path):
    return tmp_path / "records.jsonl"


# Rows


def test_a_row_has_every_field_of_the_schema_and_names_its_machine():
    made = row(run="r1", peak_bytes=7)
    assert set(made) == {*records.FIELDS, "run", "peak_bytes"}
    assert made["schema"] == records.SCHEMA
    assert set(made["task"]) >= {"kind", "name", "modality", "dataset", "n_train", "n_features", "seq_len", "n_classes"}
    assert made["hardware"] == records.hardware()
    assert made["hardware"]["platform"] == "cpu"
    assert made["hardware"]["count"] == 8  # the virtual devices of the suite
    assert made["hardware"]["memory_gb"] > 0
    assert made["hardware"]["cores"] >= 1


def test_quality_delta_is_positive_where_the_method_is_better():
    assert row()["quality_delta"] == 0.25
    lower = TASK | {"metric": "loss", "higher_is_better": False}
    assert row(task=lower)["quality_delta"] == -0.25
    assert row(quality_baseline=None)["quality_delta"] is None


def test_the_id_depends_on_what_was_measured_and_not_on_what_came_out():
    first = row(run="a")
    assert len(first["id"]) == 16
    assert int(first["id"], 16) >= 0
    assert row(run="b", speedup=9.0, quality=0.1, status="oom", compile_s=1.0, speedup_ci=None)["id"] == first["id"]
    for change in (
        {"method": "lion"},
        {"baseline": "adamw"},
        {"cost_kind": "wall"},
        {"task": TASK | {"name": "wine"}},
        {"model": {"family": "mlp"}},
        {"workload": {"batch": 64}},
        {"method_config": {"b1": 0.8}},
    ):
        assert row(**change)["id"] != first["id"], change


@pytest.mark.parametrize("speedup", [0.0, -1.0, -0.0])
def test_a_speedup_must_be_positive(speedup):
    with pytest.raises(ValueError, match=r"speedup is .* expected a number > 0"):
        row(speedup=speedup)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost_kind": "money"}, "cost_kind is 'money'"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"task": TASK | {"kind": "play"}}, r"task\['kind'\] is 'play'"),
        ({"task": TASK | {"name": ""}}, r"task\['name'\]"),
        ({"task": {"kind": "training", "name": "x", "higher_is_better": None}}, "higher_is_better"),
        ({"speedup": None}, "speedup is None with status 'ok'"),
        ({"speedup": "fast"}, "speedup"),
        ({"speedup": True}, "speedup is True"),
        ({"speedup_ci": (2.0, 1.0)}, "speedup_ci"),
        ({"speedup_ci": (1.0,)}, "speedup_ci"),
        ({"speedup_ci": 1.0}, "speedup_ci"),
        ({"compile_s": -1.0}, "compile_s"),
        ({"hardware": {}}, "'hardware' is filled in by make_row"),
    ],
)
def test_a_value_that_the_schema_does_not_know_is_refused(change, message, monkeypatch):
    # The suite's run-time checker refuses a wrong literal first, with its own error; users run without it.
    make = getattr(records.make_row, "__wrapped__", records.make_row)
    monkeypatch.setattr(records, "make_row", make)
    with pytest.raises(ValueError, match=message):
        row(**change)


def test_what_json_cannot_hold_is_refused_by_place():
    with pytest.raises(TypeError, match=r"row\['method_config'\]\['f'\]"):
        row(method_config={"f": print})
    with pytest.raises(TypeError, match="expected a string"):
        row(note={1: 2})


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), np.float32("nan")])
def test_a_lost_measurement_is_null_and_the_row_says_diverged(lost, store):
    made = row(quality=lost, speedup=lost, curve=[1.0, lost])
    assert made["status"] == "diverged"
    assert made["quality"] is None
    assert made["quality_delta"] is None
    assert made["speedup"] is None
    assert made["curve"] == [1.0, None]
    records.append_row(store, made)
    text = store.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert records.read_rows(store).rows == [made]


def test_a_failure_keeps_its_own_status():
    assert row(quality=float("nan"), status="oom")["status"] == "oom"
    assert row(speedup=None, quality=None, status="unsupported")["speedup"] is None


def test_arrays_become_numbers():
    made = row(speedup=np.float32(1.5), quality=np.float64(0.75), curve=np.arange(3), seeds=(np.int64(1),))
    assert made["speedup"] == 1.5
    assert type(made["speedup"]) is float
    assert made["curve"] == [0, 1, 2]
    assert made["seeds"] == [1]


# The file


def test_rows_come_back_as_they_were_written(store):
    first, second = row(run="a", unknown={"kept": [1, "ü\n"]}), row(run="b")
    records.append_row(store, first)
    records.record_run(second, store)
    assert records.read_rows(store) == ([first, second], 0)
    for line in store.read_text().splitlines():
        json.loads(line)


def test_a_file_that_does_not_exist_has_no_rows(store):
    assert records.read_rows(store) == ([], 0)


def test_a_row_is_written_once_a_run(store):
    assert records.append_once(store, row(run="a")) is True
    assert records.append_once(store, row(run="a", speedup=3.0)) is False
    assert records.append_once(store, row(run="b")) is True
    assert records.append_once(store, row(run="a", cost_kind="wall")) is True
    assert [r["speedup"] for r in records.read_rows(store).rows] == [1.25, 1.25, 1.25]
    with pytest.raises(ValueError, match="run is missing"):
        records.append_once(store, row())


def test_an_edited_row_is_refused(store):
    made = row()
    with pytest.raises(ValueError, match="must not be edited"):
        records.append_row(store, made | {"method": "lion"})
    with pytest.raises(ValueError, match="lacks the field 'id'"):
        records.append_row(store, {key: value for key, value in made.items() if key != "id"})
    with pytest.raises(ValueError, match="schema is 2"):
        records.append_row(store, made | {"schema": 2})
    assert not store.exists()


@settings(deadline=None, max_examples=40)  # disks may be slow
@given(st.data())
def test_a_torn_last_line_harms_no_other_row(tmp_path_factory, data):
    store = tmp_path_factory.mktemp("torn") / "records.jsonl"
    whole = [row(run="a"), row(run="b")]
    for made in whole:
        records.append_row(store, made)
    complete = store.read_bytes()
    line = complete.splitlines(keepends=True)[0]
    cut = data.draw(st.integers(1, len(line) - 2), label="bytes written before the crash")
    store.write_bytes(complete + line[:cut])
    assert records.read_rows(store) == (whole, 1)
    records.append_row(store, row(run="c"))
    assert [r["run"] for r in records.read_rows(store).rows] == ["a", "b", "c"]
    assert records.read_rows(store).torn == 1
    assert store.read_bytes().startswith(complete + line[:cut] + b"\n")


def test_zeros_left_by_a_crashed_machine_count_as_torn(store):
    store.write_bytes(b"\0" * 100)
    records.append_row(store, row(run="a"))
    rows, torn = records.read_rows(store)
    assert ([r["run"] for r in rows], torn) == (["a"], 1)


@pytest.mark.parametrize("partial", [0, 10, None])
def test_a_full_disk_takes_the_write_back(store, monkeypatch, partial):
    records.append_row(store, row(run="a"))
    before = store.read_bytes()
    write = os.write

    def full(descriptor, data):
        if partial is None:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:partial])

    monkeypatch.setattr(os, "write", full)
    cause = "No space left" if partial is None else f"only {partial} of"
    with pytest.raises(records.RecordError, match=f"cannot append a record to .*records.jsonl: {cause}"):
        records.append_row(store, row(run="b"))
    assert store.read_bytes() == before
    monkeypatch.undo()
    records.append_row(store, row(run="c"))
    assert [r["run"] for r in records.read_rows(store).rows] == ["a", "c"]


def test_a_real_size_limit_takes_the_write_back(store):
    records.append_row(store, row(run="a"))
    before = store.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))  # room for a part of the next row
    try:
        with pytest.raises(records.RecordError, match="only 50 of"):
            records.append_row(store, row(run="b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path in (blocked / "records.jsonl", tmp_path):
        with pytest.raises(records.RecordError, match=f"cannot append a record to {path}"):
            records.append_row(path, row())
    with pytest.raises(records.RecordError, match=f"cannot read records from {tmp_path}"):
        records.read_rows(tmp_path)


def test_a_directory_without_permission_is_named(store, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the suite may run as root, whom no permission stops
    with pytest.raises(records.RecordError, match=r"records\.jsonl: Permission denied"):
        records.append_row(store, row())


def test_a_file_of_a_newer_schema_is_left_alone(store):
    records.append_row(store, row(run="a"))
    newer = json.dumps({"schema": 2, "id": "x", "anything": "new"})
    store.write_bytes(store.read_bytes() + newer.encode() + b"\n")
    before = store.read_bytes()
    for action in (
        lambda: records.read_rows(store),
        lambda: records.append_row(store, row(run="b")),
        lambda: records.append_once(store, row(run="b")),
    ):
        with pytest.raises(records.RecordError, match=r"schema 2, .* knows schema\s+1"):
            action()
        assert store.read_bytes() == before


def test_a_foreign_file_is_left_alone(store):
    store.write_text("epoch,loss\n1,0.5\n")
    for action in (lambda: records.read_rows(store), lambda: records.append_row(store, row())):
        with pytest.raises(records.RecordError, match="is not a record file"):
            action()
    assert store.read_text() == "epoch,loss\n1,0.5\n"


# Several writers. One helper process forks them, so that JAX is imported once.

WRITERS = """
import json, os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")  # JAX warns of forks; no JAX computation runs here
from jaxaccel import records
mode, path, template = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def write(name, count):
    for index in range(count):
        records.append_row(path, template | {"run": f"{name}-{index}", "padding": "x" * random.randrange(3000)})
    os._exit(0)

def start(name, count):
    return os.fork() or write(name, count)

if mode == "together":
    for child in [start(name, 200) for name in "ab"]:
        if os.waitpid(child, 0)[1]:
            sys.exit("a writer failed")
else:
    random.seed(0)
    for turn in range(60):
        child = start(turn, 10**9)
        time.sleep(random.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def writers(mode, store):
    arguments = [sys.executable, "-c", WRITERS, mode, str(store), json.dumps(row())]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_two_processes_that_append_at_once_lose_nothing(store):
    writers("together", store)
    rows, torn = records.read_rows(store)
    assert torn == 0
    for name in "ab":
        mine = [r["run"] for r in rows if r["run"].startswith(name)]
        assert mine == [f"{name}-{index}" for index in range(200)]
    assert len(rows) == 400


def test_writers_killed_at_random_moments_corrupt_nothing(store):
    writers("killed", store)
    rows, torn = records.read_rows(store)
    assert len(rows) > 20  # the writers did write before they died, fewer on a busy machine
    assert torn <= 60
    by_writer: dict[str, list[int]] = {}
    for r in rows:
        writer, index = r["run"].split("-")
        by_writer.setdefault(writer, []).append(int(index))
        assert r == row() | {"time": r["time"], "run": r["run"], "padding": "x" * len(r["padding"])}
    # What a writer was told to be written is there, without gaps.
    assert all(indices == list(range(len(indices))) for indices in by_writer.values())


# Merging


def test_duplicates_become_their_median():
    rows = [
        row(run=str(s), speedup=s, speedup_ci=(s / 2, s * 2), quality=q)
        for s, q in [(1.0, 0.5), (4.0, 0.75), (2.0, 0.25)]
    ]
    (merged,) = records.merge_duplicates(rows)
    assert merged["speedup"] == 2.0
    assert merged["speedup_ci"] == [1.0, 4.0]
    assert merged["quality"] == 0.5
    assert merged["quality_delta"] == 0.0
    assert merged["repeats"] == 3
    assert merged["id"] == rows[0]["id"]


def test_kinds_of_cost_are_never_merged():
    wall, steps = row(cost_kind="wall", speedup=3.0), row(cost_kind="steps", speedup=1.0)
    assert len(records.merge_duplicates([wall, steps, wall])) == 2
    # Not even where a foreign tool gave both the same id.
    merged = records.merge_duplicates([wall, steps | {"id": wall["id"]}])
    assert [r["speedup"] for r in merged] == [3.0, 1.0]


def test_failures_are_not_averaged_away():
    good, bad = row(run="a"), row(run="b", quality=float("nan"), speedup=None, speedup_ci=None)
    (merged,) = records.merge_duplicates([good, bad])
    assert (merged["status"], merged["speedup"], merged["repeats"]) == ("diverged", None, 2)
    (merged,) = records.merge_duplicates([good, bad, good])
    assert (merged["status"], merged["speedup"]) == ("ok", 1.25)
    assert records.merge_duplicates([good]) == [good]
