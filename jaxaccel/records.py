"""The library's own record: one JSON object a line, one line a comparison, safe to append from several processes.

A row says what a method cost and how good it was against a baseline on one task, model and machine. Experiments append
rows here; method selection ([MetaInf](https://arxiv.org/abs/2410.21340)) learns from them, which is why failures are
rows too, and why a speed-up always says in which currency it is paid (``cost_kind``).

What the store promises:

- A row is appended with one ``write`` on a locked, append-only descriptor and is on disk when the call returns.
- A writer that dies leaves at most one torn last line. The next writer puts its row on a new line, and readers skip and
  count torn lines; rows written earlier are never touched.
- A write that does not fit (full disk, quota) is taken back, and the error names the file and the cause.
- A file with rows of a newer schema is neither read nor written.

Locks are POSIX ``flock`` locks, so all writers must be on one machine or on a file system that shares such locks.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import math
import os
import pathlib
import statistics
import subprocess
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

import jaxaccel

SCHEMA = 1
"""Version of the row schema that this library writes, and the newest that it reads."""

CostKind = Literal["wall", "steps", "flops", "tokens", "evaluations", "bytes"]
Status = Literal["ok", "diverged", "oom", "unsupported"]
TaskKind = Literal["training", "inference", "data", "prediction", "science"]

IDENTITY = (
    "schema",
    "library_version",
    "jax_version",
    "commit",
    "method",
    "method_config",
    "baseline",
    "task",
    "model",
    "hardware",
    "workload",
    "cost_kind",
)
"""Fields that say what was measured; their hash is the row's id."""

MEASUREMENTS = ("speedup", "speedup_ci", "compile_s", "quality", "quality_baseline", "quality_delta", "status")
"""Fields that say what came out."""

FIELDS = ("id", "time", *IDENTITY, *MEASUREMENTS)
"""Every field that a row has; further keys are kept as they are and are not part of the id."""

# Columns of the nested fields. What a caller does not give is null, so that all rows have the same columns.
_NESTED: dict[str, tuple[str, ...]] = {
    "task": (
        "kind",
        "name",
        "modality",
        "dataset",
        "n_train",
        "n_features",
        "seq_len",
        "n_classes",
        "metric",
        "higher_is_better",
    ),
    "model": ("family", "params", "layers", "width", "heads", "kv_heads", "experts", "dtype"),
    "hardware": ("platform", "device_kind", "count", "memory_gb", "cores"),
    "workload": ("batch", "steps", "prompt_length", "gen_length", "seeds"),
}


class RecordError(RuntimeError):
    """A record file cannot be read or written; the message names the file and the cause."""


class Rows(NamedTuple):
    """What a record file holds."""

    rows: list[dict[str, Any]]  # complete rows, in the order of the file
    torn: int  # lines that are not complete rows, left by writers that died


def hardware() -> dict[str, Any]:
    """Describe the machine as JAX and the operating system report it.

    ``memory_gb`` is that of one device, or of the host where the device is the CPU; ``cores`` are the host's cores that
    this process may use.

    >>> sorted(hardware())
    ['cores', 'count', 'device_kind', 'memory_gb', 'platform']
    """
    devices = jax.devices()
    first = devices[0]
    stats = first.memory_stats() if first.platform != "cpu" else None
    memory = (stats or {}).get("bytes_limit")
    if first.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": first.platform,
        "device_kind": first.device_kind,
        "count": len(devices),
        "memory_gb": None if memory is None else round(memory / 2**30, 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


@functools.cache
def current_commit() -> str | None:
    """Commit of the checkout that this library runs from, with ``-dirty`` if it was edited; ``None`` if installed."""
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout: only a tracked file proves that it is ours.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def make_row(
    *,
    method: str,
    baseline: str,
    task: Mapping[str, Any],
    model: Mapping[str, Any],
    workload: Mapping[str, Any],
    cost_kind: CostKind,
    speedup: Any,
    speedup_ci: Any = None,
    compile_s: Any = None,
    quality: Any = None,
    quality_baseline: Any = None,
    status: Status = "ok",
    method_config: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Build and check one row; provenance and hardware are read, never given.

    Args:
        method: registry name of the method.
        baseline: registry name of what it is compared with: same task, same hardware, same process.
        task: ``kind``, ``name``, ``metric``, ``higher_is_better`` and what else describes the task.
        model: ``family``, ``params`` and what else describes the model.
        workload: ``batch``, ``steps``, ``seeds`` and what else describes the amount of work.
        cost_kind: the currency of ``speedup``; rows of different kinds are never compared.
        speedup: cost of the baseline over cost of the method, > 0; ``None`` only where the status is not ``ok``.
        speedup_ci: 95 % interval ``(low, high)`` of the speed-up, bootstrapped over at least three repeats.
        compile_s: seconds of compilation, which ``speedup`` leaves out.
        quality: the task's metric for the method.
        quality_baseline: the same metric for the baseline.
        status: ``ok`` becomes ``diverged`` where ``speedup`` or ``quality`` is NaN or infinite.
        method_config: the method's options that differ from its defaults.
        **extra: further keys, kept in the file and left out of the id. ``run`` names the run, see `append_once`.

    Returns:
        The row. NaN and infinities are ``None`` in it, since JSON has no word for them. ``quality_delta`` is the gain
        in quality, positive where the method is better.

    Raises:
        ValueError: if a field has a value that the schema does not allow, naming it.
        TypeError: if a value cannot be written as JSON, naming its place.

    >>> row = make_row(
    ...     method="exadam", baseline="adam", cost_kind="steps", speedup=1.25, quality=0.5, quality_baseline=0.75,
    ...     task={"kind": "training", "name": "digits", "metric": "loss", "higher_is_better": False},
    ...     model={"family": "cnn", "params": 1000}, workload={"batch": 32, "steps": 100, "seeds": 3},
    ... )
    >>> row["quality_delta"], row["status"], row["hardware"]["platform"]
    (0.25, 'ok', 'cpu')
    """
    row: dict[str, Any] = dict.fromkeys(FIELDS)
    row |= {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "library_version": jaxaccel.__version__,
        "jax_version": jax.__version__,
        "commit": current_commit(),
        "method": method,
        "method_config": dict(method_config or {}),
        "baseline": baseline,
        "task": task,
        "model": model,
        "hardware": hardware(),
        "workload": workload,
        "cost_kind": cost_kind,
        "speedup": speedup,
        "speedup_ci": speedup_ci,
        "compile_s": compile_s,
        "quality": quality,
        "quality_baseline": quality_baseline,
        "status": status,
    }
    clash = sorted(set(extra) & set(FIELDS))
    if clash:
        raise ValueError(f"{clash[0]!r} is filled in by make_row and cannot be given")
    row |= extra
    row = _plain(row, "row")
    given = {"speedup": speedup, "quality": quality}
    if status == "ok" and any(value is not None and row[field] is None for field, value in given.items()):
        row["status"] = "diverged"
    for field, columns in _NESTED.items():
        row[field] = dict.fromkeys(columns) | row[field]
    if row["quality"] is not None and row["quality_baseline"] is not None:
        sign = 1 if row["task"]["higher_is_better"] else -1
        row["quality_delta"] = sign * (row["quality"] - row["quality_baseline"])
    row["id"] = row_id(row)
    _validate(row)
    return row


def row_id(row: Mapping[str, Any]) -> str:
    """Hash what was measured: 16 hexadecimal digits of SHA-256 over the canonical JSON of the `IDENTITY` fields.

    Two runs of the same comparison on the same machine, commit and versions have the same id, whenever they ran and
    whatever came out.
    """
    identity = _plain({field: row.get(field) for field in IDENTITY}, "row")
    return hashlib.sha256(_encode(identity).encode()).hexdigest()[:16]


def append_row(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append ``row`` to the file at ``path``, which is made if it does not exist.

    Raises:
        ValueError: if the row does not follow the schema.
        RecordError: if the file cannot be written or holds rows of a newer schema; it is then left as it was.
    """
    _append(pathlib.Path(path), row, once=False)


def record_run(row: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Append ``row`` to the file at ``path``: `append_row` with the row first."""
    append_row(path, row)


def append_once(path: str | os.PathLike[str], row: Mapping[str, Any]) -> bool:
    """Append ``row`` unless the file already has one with the same ``id`` and ``run``.

    A run that is resumed after a crash may call this again for what it already recorded. Looking and writing happen
    under one lock, so that two processes cannot both find the row missing.

    Returns:
        Whether the row was written.

    Raises:
        ValueError: if the row does not follow the schema or has no key ``run``.
        RecordError: as for `append_row`.
    """
    if row.get("run") is None:
        raise ValueError("run is missing: a row that is appended once must name its run")
    return _append(pathlib.Path(path), row, once=True)


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """Read all complete rows; a file that does not exist has none.

    Raises:
        RecordError: if the file cannot be read, is not a record file or holds rows of a newer schema.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            data = file.read()
    except FileNotFoundError:
        return Rows([], 0)
    except OSError as error:
        raise RecordError(f"cannot read records from {path}: {error.strerror or error}") from error
    return _parse(path, data)


def merge_duplicates(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge rows that measured the same thing into one, with the median of each measurement.

    Rows are the same where both ``id`` and ``cost_kind`` are. A merged row has the status that most of its rows have
    (of equally frequent ones the one that is not ``ok``), the medians over the rows of that status, the newest row's
    other keys, and the number of merged rows as ``repeats``.
    """
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["id"], row["cost_kind"]), []).append(row)
    return [_median_row(group) for group in groups.values()]


def _median_row(group: list[Mapping[str, Any]]) -> dict[str, Any]:
    newest = dict(max(group, key=lambda row: row["time"]))
    if len(group) == 1:
        return newest
    counts = Counter(row["status"] for row in group)
    status = max(counts, key=lambda name: (counts[name], name != "ok"))
    alike = [row for row in group if row["status"] == status]

    def median(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    for field in ("speedup", "compile_s", "quality", "quality_baseline", "quality_delta"):
        newest[field] = median(row[field] for row in alike)
    intervals = [row["speedup_ci"] for row in alike if row["speedup_ci"] is not None]
    newest["speedup_ci"] = [median(bounds) for bounds in zip(*intervals, strict=True)] or None
    return newest | {"status": status, "repeats": len(group)}


def _plain(value: Any, place: str) -> Any:
    """Turn ``value`` into what JSON can hold; NaN and infinities become ``None``."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}, expected a string")
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist(), place)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{place} is {value!r} of type {type(value).__name__}, which JSON cannot hold")


def _encode(value: Any) -> str:
    # ASCII only, so that no character of a string can end a line.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _validate(row: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if ``row`` does not follow the schema."""
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise ValueError(f"row lacks the field {missing[0]!r}")
    if row["schema"] != SCHEMA:
        raise ValueError(f"schema is {row['schema']!r}, expected {SCHEMA}, the version that this library writes")
    for field in _NESTED:
        if not isinstance(row[field], Mapping):
            raise ValueError(f"{field} is {row[field]!r}, expected a mapping")
    choices = (
        ("cost_kind", row["cost_kind"], get_args(CostKind)),
        ("status", row["status"], get_args(Status)),
        ("task['kind']", row["task"].get("kind"), get_args(TaskKind)),
        ("hardware['platform']", row["hardware"].get("platform"), ("cpu", "gpu", "tpu")),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    names = ("method", row["method"]), ("baseline", row["baseline"]), ("task['name']", row["task"].get("name"))
    for name, value in names:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}, expected a name")
    for field in ("speedup", "compile_s", "quality", "quality_baseline", "quality_delta"):
        if row[field] is not None and (isinstance(row[field], bool) or not isinstance(row[field], int | float)):
            raise ValueError(f"{field} is {row[field]!r}, expected a number or null")
    if row["speedup"] is not None and row["speedup"] <= 0:
        raise ValueError(f"speedup is {row['speedup']!r}, expected a number > 0")
    if row["status"] == "ok" and row["speedup"] is None:
        raise ValueError("speedup is None with status 'ok', expected a number > 0")
    if row["compile_s"] is not None and row["compile_s"] < 0:
        raise ValueError(f"compile_s is {row['compile_s']!r}, expected a number of seconds >= 0")
    if row["quality"] is not None and not isinstance(row["task"].get("higher_is_better"), bool):
        raise ValueError("task['higher_is_better'] must be a bool where quality is given")
    _validate_interval(row["speedup_ci"])
    if row["id"] != row_id(row):
        raise ValueError(f"id is {row['id']!r}, expected {row_id(row)!r}: a row must not be edited after make_row")


def _validate_interval(interval: Any) -> None:
    if interval is None:
        return
    bounds = list(interval) if isinstance(interval, list | tuple) else []
    if len(bounds) != 2 or (None not in bounds and not 0 < bounds[0] <= bounds[1]):
        raise ValueError(f"speedup_ci is {interval!r}, expected (low, high) with 0 < low <= high")


def _parse(path: pathlib.Path, data: bytes) -> Rows:
    rows: list[dict[str, Any]] = []
    torn = 0
    # A torn row starts with "{", and a crash of the machine may leave zeros. Anything else was not written by us.
    if data.strip(b"\0 \r\n")[:1] not in (b"", b"{"):
        raise RecordError(f"{path} is not a record file: it starts with {data[:20]!r}, expected one JSON object a line")
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse)
        except ValueError:  # includes text that is not UTF-8
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("schema"), int):
            torn += 1
            continue
        if row["schema"] > SCHEMA:
            raise RecordError(
                f"{path} holds rows of schema {row['schema']}, and this jaxaccel ({jaxaccel.__version__}) knows schema "
                f"{SCHEMA}: use a newer jaxaccel, or another file"
            )
        rows.append(row)
    return Rows(rows, torn)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Generator[int, None, None]:
    """Open ``path`` for appending under an exclusive lock, which ends with the descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
        if is_new:  # the name of the file must survive a crash too
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        os.close(descriptor)


def _append(path: pathlib.Path, row: Mapping[str, Any], *, once: bool) -> bool:
    row = _plain(row, "row")
    _validate(row)
    line = _encode(row).encode() + b"\n"
    try:
        with _locked(path) as descriptor:
            data = _read_all(descriptor)
            present = _parse(path, data).rows
            if once and any((old.get("id"), old.get("run")) == (row["id"], row["run"]) for old in present):
                return False
            if data and not data.endswith(b"\n"):
                line = b"\n" + line  # a torn line keeps its own line
            _write_whole(descriptor, len(data), line)
    except OSError as error:
        raise RecordError(f"cannot append a record to {path}: {error.strerror or error}") from error
    return True


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    chunks = []
    offset = 0
    while offset < size:
        chunk = os.pread(descriptor, size - offset, offset)
        if not chunk:
            break
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def _write_whole(descriptor: int, size: int, line: bytes) -> None:
    """Write ``line`` at the end of a file of ``size`` bytes with one call, or leave the file as it was."""
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes could be written, the disk is full")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
