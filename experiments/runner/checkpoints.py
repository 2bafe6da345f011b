"""Checkpoints of a running trial: orbax, with an identity, so that a foreign or broken one is refused by name."""

import logging
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.runner.files import OutputError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save at the level of a warning


class CheckpointError(OutputError):
    """A checkpoint that cannot be used: broken, or made by another configuration."""


class Checkpoints:
    """The last checkpoints of one trial.

    Args:
        directory: where they live; made on the first save.
        identity: JSON data that says which trial this is. A checkpoint with another identity is refused.
    """

    def __init__(self, directory: pathlib.Path, identity: dict[str, Any]) -> None:
        self._directory = directory.resolve()
        self._identity = identity
        self._open: ocp.CheckpointManager | None = None

    def _manager(self) -> ocp.CheckpointManager:
        if self._open is None:
            # Synchronous: a trial's state is donated to the next step, and a save of it must be complete by then.
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            try:
                self._open = ocp.CheckpointManager(self._directory, options=options)
            except OSError as error:
                raise CheckpointError(f"cannot open checkpoints in {self._directory}: {error}") from error
        return self._open

    def save(self, step: int, state: Any) -> None:
        """Save ``state`` after ``step`` steps; complete, or not there at all."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self._identity))
        try:
            self._manager().save(step, args=items)
        except Exception as error:  # orbax wraps disk errors in several kinds of its own
            raise CheckpointError(
                f"cannot save a checkpoint in {self._directory}: {_reason(error)}. Earlier checkpoints and finished "
                "trials are kept; make room and go on with --resume"
            ) from error

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Return ``(step, state)`` of the newest checkpoint, or ``None`` if there is none.

        Args:
            template: pytree of `jax.ShapeDtypeStruct` with shardings, or host arrays.

        Raises:
            CheckpointError: if it is broken or belongs to another configuration. It is left where it is.
        """
        if not self._directory.exists():
            return None
        step = self._manager().latest_step()
        if step is None:
            return None
        path = self._directory / str(step)
        try:
            items = self._manager().restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))
            identity = items.identity
        except Exception as error:
            raise CheckpointError(_broken(path, error)) from error
        if identity != self._identity:
            changed = sorted(
                key for key in {*identity, *self._identity} if identity.get(key) != self._identity.get(key)
            )
            differences = "; ".join(f"{k}: {identity.get(k)!r} there, {self._identity.get(k)!r} here" for k in changed)
            raise CheckpointError(
                f"checkpoint {path} belongs to another configuration ({differences}). Use another --out"
            )
        try:
            restored = self._manager().restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))
        except Exception as error:
            raise CheckpointError(_broken(path, error)) from error
        return step, restored.state

    def close(self) -> None:
        """Release the manager's threads."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def delete(self) -> None:
        """Remove all checkpoints; the trial is finished and its result is on disk."""
        self.close()
        if jax.process_index() == 0:
            shutil.rmtree(self._directory, ignore_errors=True)


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _broken(path: pathlib.Path, error: BaseException) -> str:
    return (
        f"checkpoint {path} cannot be read ({_reason(error)}). It may have been cut short or edited. It was left in "
        f"place; move it away to go on from the checkpoint before it, or from the start of this trial"
    )
