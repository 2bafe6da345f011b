"""Batches from arrays in memory, as a pure function of the seed and the step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Shuffled epochs over examples; the tail that does not fill a batch is dropped, as in each epoch's own order.

    Attributes:
        arrays: mapping of name to ``[N, ...]``.
        batch_size: rows per batch.
        augment: optional ``(generator, batch) -> batch`` on the host; its randomness depends on seed and step alone.
    """

    arrays: dict[str, np.ndarray]
    batch_size: int
    augment: Callable[[np.random.Generator, dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    process_local: bool = False

    def __post_init__(self) -> None:
        sizes = {name: len(a) for name, a in self.arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all arrays must have the same number of rows, got {sizes}")
        if not 1 <= self.batch_size <= min(sizes.values()):
            raise ValueError(f"batch size must be in [1, {min(sizes.values())}], got {self.batch_size}")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass."""
        return len(next(iter(self.arrays.values()))) // self.batch_size

    def chunk(self, seed: int, start: int, steps: int) -> Any:
        """Batches of steps ``start`` to ``start + steps``: ``{name: [steps, B, ...]}``."""
        rows = len(next(iter(self.arrays.values())))
        orders: dict[int, np.ndarray] = {}
        picks = np.empty((steps, self.batch_size), np.int64)
        for i in range(steps):
            epoch, position = divmod(start + i, self.steps_per_epoch)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((seed, epoch)).permutation(rows)
            picks[i] = orders[epoch][position * self.batch_size : (position + 1) * self.batch_size]
        batches = {name: array[picks] for name, array in self.arrays.items()}
        if self.augment is None:
            return batches
        changed = [
            self.augment(np.random.default_rng((seed, 1, start + i)), {k: v[i] for k, v in batches.items()})
            for i in range(steps)
        ]
        return {name: np.stack([batch[name] for batch in changed]) for name in batches}


@dataclasses.dataclass(frozen=True)
class Windows:
    """Random windows of a token sequence, for language models: ``{"tokens": [steps, B, length + 1]}``."""

    tokens: np.ndarray
    length: int
    batch_size: int
    process_local: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or len(self.tokens) <= self.length + 1:
            raise ValueError(f"windows of {self.length} + 1 tokens do not fit into {len(self.tokens)} tokens")

    def chunk(self, seed: int, start: int, steps: int) -> Any:
        """Windows of steps ``start`` to ``start + steps``; each step has a generator of its own."""
        last = len(self.tokens) - self.length
        starts = np.stack(
            [np.random.default_rng((seed, start + i)).integers(0, last, self.batch_size) for i in range(steps)]
        )
        return {"tokens": self.tokens[starts[..., None] + np.arange(self.length + 1)]}
