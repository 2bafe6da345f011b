"""One trial: an arm with a learning rate and a seed, trained to the end of the budget, killable at any moment."""

import dataclasses
import hashlib
import io
import pathlib
import time
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runner import cost, devices, files
from experiments.runner.api import Progress
from experiments.runner.checkpoints import Checkpoints
from experiments.runner.interrupt import Interrupt
from experiments.runner.train import Arm, Task, TrainState, init_state, train_chunk


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """What is kept of a trial.

    Attributes:
        arm: name of the arm.
        learning_rate: its learning rate.
        seed: its seed.
        status: ``ok``, or ``diverged`` when a loss or the final metric was not finite.
        curves: ``train_loss`` [steps], ``eval_step`` [E] and one array [E] per metric; NaN after a divergence.
        final: last value of each metric, and ``test_*`` metrics.
        params_digest: SHA-256 of the final parameters' bits (``None`` where no single host holds them all).
        cost: ``step_s`` (median seconds per step), ``train_s`` (all training steps), ``compile_s``, ``flops_per_step``,
            ``peak_bytes``, ``state_bytes`` (optimizer state).
    """

    arm: str
    learning_rate: float
    seed: int
    status: str
    curves: dict[str, np.ndarray]
    final: dict[str, float]
    params_digest: str | None
    cost: dict[str, float | None]


def trial_name(task: str, arm: str, learning_rate: float, seed: int) -> str:
    """Directory name of a trial, which records use to point at its curves."""
    return f"{task}-{arm}-lr{learning_rate:g}-seed{seed}".replace(" ", "_").replace("/", "_")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions that all trials of one arm share."""

    init: Any
    chunk: Any
    evaluate: Any
    final: Any
    shapes: TrainState
    metrics: tuple[str, ...]
    cost: cost.ProgramCost
    state_bytes: int


def compile_programs(task: Task, arm: Arm, placement: devices.Placement) -> Programs:
    """Compile the functions of an arm once, for every learning rate and seed."""
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda k, r: init_state(task, arm, k, r), key, rate)
    shardings = placement.of_state(shapes)
    template = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    init = jax.jit(lambda k, r: init_state(task, arm, k, r), out_shardings=shardings)
    (batches,) = _place(task, placement, 0, 0, task.dispatch)
    scalars = placement.replicate((np.float32(0), np.bool_(False)))
    chunk = jax.jit(
        lambda s, b, r, k, e: train_chunk(task, arm, s, b, r, k, e),
        donate_argnums=0,
        out_shardings=(shardings, placement.replicated),
    )
    run_key = _replicated_key(placement, 0)
    compiled, program_cost = cost.compile_with_cost(chunk, template, batches, scalars[0], run_key, scalars[1])
    return Programs(
        init=init,
        chunk=compiled,
        evaluate=jax.jit(task.evaluate, out_shardings=placement.replicated),
        final=jax.jit(task.final or task.evaluate, out_shardings=placement.replicated),
        shapes=template,
        metrics=_metrics(task, shapes),
        cost=program_cost,
        state_bytes=cost.tree_bytes(shapes.opt_state),
    )


def _place(task: Task, placement: devices.Placement, seed: int, start: int, steps: int) -> list[Any]:
    """Batches of ``steps`` steps on the devices, one pytree per dispatch."""
    host = task.batches.chunk(seed, start, steps)
    count = steps // task.dispatch
    parts = [jax.tree.map(lambda a, i=i: a[i * task.dispatch : (i + 1) * task.dispatch], host) for i in range(count)]
    return placement.put_batches(parts, process_local=task.batches.process_local)


def _replicated_key(placement: devices.Placement, seed: int) -> jax.Array:
    data = placement.replicate(np.asarray(jax.random.key_data(jax.random.key(seed))))
    return jax.random.wrap_key_data(data)


def run_trial(
    task: Task,
    arm: Arm,
    learning_rate: float,
    seed: int,
    *,
    programs: Programs,
    placement: devices.Placement,
    directory: pathlib.Path,
    identity: dict[str, Any],
    interrupt: Interrupt,
    checkpoint_seconds: float = 10.0,
    keep_params: bool = False,
) -> Generator[Progress, None, TrialResult]:
    """Train, or go on from the newest checkpoint in ``directory``, or read the finished result there.

    Everything that is computed depends on ``(task, arm, learning_rate, seed)`` alone, never on when the process was
    stopped: a run that was killed and resumed ends with the same bits as one that was not.

    Raises:
        Interrupted: after saving, when the user asked to stop.
        CheckpointError: if the checkpoint found is broken or not this trial's.
    """
    label = f"{arm.name} lr={learning_rate:g} seed={seed}"
    checkpoints = Checkpoints(directory / "checkpoints", identity)
    try:
        rate, key = placement.replicate(np.float32(learning_rate)), _replicated_key(placement, seed)
        history = _empty_history(task, programs)
        restored = checkpoints.restore({"state": programs.shapes, "history": history})
        if restored is None:
            step, state = 0, programs.init(key, rate)
        else:
            step, state, history = restored[0], restored[1]["state"], restored[1]["history"]
            history = jax.tree.map(np.array, history)
        steps = _Steps(task, programs, placement, rate, key, history)
        saved_at, saved_step = time.monotonic(), step
        while step < task.steps and not history["diverged"]:
            state = steps.advance(state, step, seed)
            step += task.sync
            due = time.monotonic() - saved_at > checkpoint_seconds
            if jax.process_count() > 1:
                # All hosts must save and stop together: by steps, not by their own clocks and signals.
                due = step % (task.eval_every * 10) == 0
            if jax.process_count() == 1 or step % task.eval_every == 0:
                interrupt.requested = devices.any_process(interrupt.requested)
                if (interrupt.requested or due) and step < task.steps:
                    checkpoints.save(step, {"state": state, "history": history})
                    saved_at, saved_step = time.monotonic(), step
                interrupt.check(f"{label}: {step} of {task.steps} steps, saved after step {saved_step}")
            yield Progress(label, step, task.steps, steps.note)
        result = _finish(task, arm, learning_rate, seed, state, programs, steps, key)
        if keep_params:
            kept = Checkpoints(directory / "final", identity)
            kept.save(step, {"params": state.params, "model_state": state.model_state})
            kept.close()
        if devices.is_main_process():
            save_result(directory, result)
        devices.barrier(f"{directory.name}-finished")
        checkpoints.delete()
        return result
    finally:
        checkpoints.close()


def _metrics(task: Task, shapes: TrainState) -> tuple[str, ...]:
    """Names of the metrics that the task evaluates, which must include those that it names."""
    found = jax.eval_shape(task.evaluate, shapes.params, shapes.model_state, task.validation, jax.random.key(0))
    if task.metric not in found:
        raise ValueError(f"task {task.name!r}: evaluate returns {sorted(found)}, which lacks metric {task.metric!r}")
    if task.feedback is not None and task.feedback not in found:
        raise ValueError(f"task {task.name!r}: evaluate returns {sorted(found)}, without feedback {task.feedback!r}")
    return tuple(found)


def _empty_history(task: Task, programs: Programs) -> dict[str, Any]:
    evaluations = task.steps // task.eval_every
    return {
        "train_loss": np.full(task.steps, np.nan, np.float32),
        "metrics": {name: np.full(evaluations, np.nan, np.float32) for name in programs.metrics},
        "sync_s": np.full(task.steps // task.sync, np.nan, np.float64),
        "diverged": np.zeros((), bool),
    }


class _Steps:
    """Drives the compiled functions and fills the history; holds no training state of its own."""

    def __init__(
        self,
        task: Task,
        programs: Programs,
        placement: devices.Placement,
        rate: jax.Array,
        key: jax.Array,
        history: dict[str, Any],
    ) -> None:
        self.task, self.programs, self.placement = task, programs, placement
        self.rate, self.key, self.history = rate, key, history
        self.flags = {value: placement.replicate(np.bool_(value)) for value in (False, True)}
        self.note = ""
        self._ready: tuple[int, list[Any]] | None = None  # the next batches, made while the devices compute

    def _batches(self, start: int, seed: int) -> list[Any]:
        if self._ready is not None and self._ready[0] == start:
            batches = self._ready[1]
            self._ready = None
            return batches
        return _place(self.task, self.placement, seed, start, self.task.sync)

    def advance(self, state: TrainState, start: int, seed: int) -> TrainState:
        """All dispatches up to the next moment of waiting, and an evaluation where one is due."""
        task, history = self.task, self.history
        batches = self._batches(start, seed)
        evaluated = start > 0 and start % task.eval_every == 0
        end = start + task.sync
        parts = []
        began = time.perf_counter()
        for part in batches:
            state, losses = self.programs.chunk(state, part, self.rate, self.key, self.flags[evaluated])
            parts.append(losses)
            evaluated = False
        if end < task.steps:
            self._ready = (end, self._batches(end, seed))
        host_losses = np.concatenate([np.asarray(losses) for losses in parts])  # waits
        history["sync_s"][start // task.sync] = time.perf_counter() - began
        history["train_loss"][start:end] = host_losses
        if not np.isfinite(host_losses).all():
            history["diverged"] = np.ones((), bool)
            self.note = "diverged"
        elif end % task.eval_every == 0:
            metrics = self.programs.evaluate(state.params, state.model_state, task.validation, self.key)
            values = {name: np.asarray(value) for name, value in metrics.items()}
            for name, value in values.items():
                history["metrics"][name][end // task.eval_every - 1] = value
            if not np.isfinite(values[task.metric]):
                history["diverged"] = np.ones((), bool)
            if task.feedback is not None:
                state = state._replace(score=self.placement.replicate(values[task.feedback].astype(np.float32)))
            self.note = f"{task.metric} {float(values[task.metric]):.4f}"
        return state


def _finish(
    task: Task,
    arm: Arm,
    learning_rate: float,
    seed: int,
    state: TrainState,
    programs: Programs,
    steps: _Steps,
    key: jax.Array,
) -> TrialResult:
    history = steps.history
    diverged = bool(history["diverged"])
    final: dict[str, float] = {}
    if not diverged:
        final = {name: float(values[-1]) for name, values in history["metrics"].items()}
        if task.final is not None:
            tested = programs.final(state.params, state.model_state, task.test, key)
            final |= {f"test_{name}": float(value) for name, value in tested.items()}
        diverged = not all(np.isfinite(value) for value in final.values())
        final = {name: value for name, value in final.items() if np.isfinite(value)}
    evaluations = task.steps // task.eval_every
    seconds = history["sync_s"][~np.isnan(history["sync_s"])]
    return TrialResult(
        arm=arm.name,
        learning_rate=learning_rate,
        seed=seed,
        status="diverged" if diverged else "ok",
        curves={
            "train_loss": history["train_loss"],
            "eval_step": np.arange(1, evaluations + 1) * task.eval_every,
            **history["metrics"],
        },
        final=final,
        params_digest=digest(state.params),
        cost={
            "step_s": float(np.median(seconds)) / task.sync,
            "train_s": float(seconds.sum()),
            "compile_s": programs.cost.compile_s,
            "flops_per_step": programs.cost.flops,
            "peak_bytes": programs.cost.peak_bytes,
            "state_bytes": programs.state_bytes,
        },
    )


def digest(tree: Any) -> str | None:
    """SHA-256 over paths, dtypes, shapes and bits of all leaves; ``None`` if another host holds a part of them."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return None
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def save_result(directory: pathlib.Path, result: TrialResult) -> None:
    """Write curves, then the summary: the summary's presence says that the trial is finished."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **result.curves)
    files.write_bytes(directory / "curves.npz", buffer.getvalue())
    summary = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "curves"}
    files.write_json(directory / "result.json", summary)


def load_result(directory: pathlib.Path) -> TrialResult | None:
    """Read a finished trial, or return ``None``.

    Raises:
        OutputError: if it is there but cannot be read.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    summary = files.read_json(path)
    try:
        # From memory: a broken archive would leave NumPy holding the open file.
        with np.load(io.BytesIO((directory / "curves.npz").read_bytes()), allow_pickle=False) as archive:
            return TrialResult(curves=dict(archive), **summary)
    except Exception as error:
        raise files.OutputError(f"the finished trial in {directory} cannot be read ({error}); move it away") from error
