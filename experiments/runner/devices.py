"""Devices and processes: the mesh, where each array lives, and the start of a multi-host run."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
ParameterSharding = Literal["replicated", "fsdp"]


def initialize_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join a multi-host run; call before anything else touches JAX.

    Args:
        coordinator: ``host:port`` of process 0. ``None`` runs in this process alone.
        num_processes: number of processes in the run.
        process_id: rank of this process.

    Raises:
        ValueError: if only some of the three are given, or the rank is out of range.
    """
    given = (coordinator is not None, num_processes is not None, process_id is not None)
    if not any(given):
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError("a multi-host run needs all of --coordinator, --num-processes and --process-id")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id must be in [0, {num_processes}), got {process_id}")
    # On CPU the default collectives know only one process; gloo works over TCP. Other platforms ignore the setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)


def is_main_process() -> bool:
    """Whether this process writes records and talks to the user."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes; a no-op in a single-process run."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set on any process; all processes must call this at the same point."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a training run live: a one-dimensional mesh over all devices of all processes.

    Batches are split over the mesh. Parameters and optimizer state are replicated, or, with ``fsdp``, each array is
    split along its largest axis that the number of devices divides; XLA inserts the collectives.
    """

    mesh: Mesh
    parameters: ParameterSharding = "replicated"

    @classmethod
    def over_all_devices(cls, parameters: ParameterSharding = "replicated", count: int | None = None) -> "Placement":
        """Use the first ``count`` devices (all by default)."""
        devices = jax.devices()
        if count is not None:
            if not 1 <= count <= len(devices):
                raise ValueError(f"--devices must be in [1, {len(devices)}], got {count}")
            devices = devices[:count]
        return cls(Mesh(np.array(devices), (AXIS,)), parameters)

    @property
    def count(self) -> int:
        """Number of devices."""
        return int(self.mesh.size)

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that keeps a whole copy on every device."""
        return self._sharding()

    def of_state(self, shapes: Any) -> Any:
        """Shardings for a pytree of arrays or shape structs, by the rule of ``parameters``."""

        def rule(leaf: Any) -> NamedSharding:
            if self.parameters == "replicated" or self.count == 1:
                return self.replicated
            candidates = [(size, -axis) for axis, size in enumerate(leaf.shape) if size % self.count == 0 and size > 0]
            if not candidates:
                return self.replicated
            axis = -max(candidates)[1]
            return self._sharding(*(AXIS if i == axis else None for i in range(len(leaf.shape))))

        return jax.tree.map(rule, shapes)

    def _check_rows(self, rows: int) -> None:
        if rows % self.count:
            raise ValueError(f"batch size {rows} is not a multiple of the {self.count} devices it is split over")

    def put_batches(self, batches: Any, *, process_local: bool = False) -> Any:
        """Put host arrays ``[n, B, ...]`` on the mesh, split along ``B``.

        With ``process_local`` each process passes only its own rows (a stream read by several hosts); otherwise every
        process passes the same global arrays and keeps what belongs to its devices.
        """
        sharding = self._sharding(None, AXIS)
        rows = jax.process_count() if process_local else 1

        if jax.process_count() == 1:
            for leaf in jax.tree.leaves(batches):
                self._check_rows(leaf.shape[1])
            return jax.device_put(batches, sharding)  # one call for all leaves

        def place(leaf: np.ndarray) -> jax.Array:
            self._check_rows(leaf.shape[1] * rows)
            if process_local:
                return jax.make_array_from_process_local_data(sharding, leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, batches)

    def replicate(self, tree: Any) -> Any:
        """Put host values on every device."""
        sharding = self.replicated

        def place(leaf: Any) -> jax.Array:
            array = np.asarray(leaf)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(place, tree)
