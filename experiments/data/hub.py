"""Full-size data through Hugging Face `datasets`: streamed, shuffled, split over hosts, exact after a resume."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


class DataError(RuntimeError):
    """A data set could not be opened; says which and what to do."""


def load(path: str, split: str, *, streaming: bool = True, **options: Any) -> Any:
    """Open a data set by hub name, by local folder, or by format (``"json"`` with ``data_files=...``).

    Raises:
        DataError: if it cannot be opened, e.g. without a network, naming the data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "full-size data needs the package `datasets`: install the extra jaxaccel[experiments]"
        ) from error
    try:
        return datasets.load_dataset(path, split=split, streaming=streaming, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot open data set {path!r} (split {split!r}): {reason}. It is read through Hugging Face datasets: "
            "check the network, or give the path of a local copy"
        ) from error


@dataclasses.dataclass
class Stream:
    """Batches of a streamed data set.

    Example ``i`` of an epoch's shuffled order is the same in every run with the same seed, so that a run can go on at
    any step: skipping is done by the data set itself, without decoding what is skipped where the format allows it.
    With several processes each reads its own rows only.

    Attributes:
        source: an iterable data set from `load`.
        example: ``row -> {name: array}`` for one example, all of the same shapes.
        batch_size: rows per step over all processes.
        buffer: size of the shuffle buffer; 0 keeps the order.
    """

    source: Any
    example: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    batch_size: int
    buffer: int = 10_000

    def __post_init__(self) -> None:
        if self.batch_size % jax.process_count():
            raise ValueError(f"batch size {self.batch_size} is not a multiple of {jax.process_count()} processes")
        self.process_local = True
        self._position: tuple[int, int] | None = None
        self._rows: Iterator[dict[str, np.ndarray]] = iter(())

    def _read(self, seed: int, skip: int) -> Iterator[dict[str, np.ndarray]]:
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.source, rank=jax.process_index(), world_size=jax.process_count())
        if self.buffer:
            rows = rows.shuffle(seed=seed, buffer_size=self.buffer)
        epoch = 0
        while True:
            rows.set_epoch(epoch)
            count = 0
            for row in rows:
                count += 1
                if skip:
                    skip -= 1
                    continue
                yield self.example(row)
            if count == 0:
                raise DataError("the data set has no rows for this process; use fewer processes or more shards")
            epoch += 1

    def chunk(self, seed: int, start: int, steps: int) -> Any:
        """This process's rows of steps ``start`` to ``start + steps``: ``{name: [steps, B / processes, ...]}``."""
        local = self.batch_size // jax.process_count()
        if self._position != (seed, start):
            self._rows = self._read(seed, start * local)
        self._position = (seed, start + steps)
        examples = [next(self._rows) for _ in range(steps * local)]
        return {
            name: np.stack([e[name] for e in examples]).reshape(steps, local, *np.shape(examples[0][name]))
            for name in examples[0]
        }


def take(
    path: str,
    split: str,
    example: Callable[[Mapping[str, Any]], dict[str, np.ndarray]],
    count: int | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Read the first ``count`` rows (all by default) into memory: ``{name: [N, ...]}``."""
    rows = []
    for i, row in enumerate(load(path, split, **options)):
        if count is not None and i >= count:
            break
        rows.append(example(row))
    if not rows:
        raise DataError(f"data set {path!r} (split {split!r}) has no rows")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
