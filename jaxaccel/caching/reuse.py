"""Which branch outputs of a denoiser are reused from an earlier sampling step: schedules as data.

What it makes cheaper: diffusion sampling. A network is called T times with inputs that change little, and the outputs
of its attention and MLP branches change little as well. A schedule says for each step and branch whether the output is
computed, or taken over from the last step that computed it. Whoever makes the schedule (a learned table in
`jaxaccel.caching.harmonica`, every n-th step here), it is applied in the same way.

Steps are counted as noise is: step T − 1 sees pure noise and is *executed first*, step 0 is the last. A schedule
belongs to one number of steps and one sampler, as both decide what step i means; it carries both, and is refused
elsewhere.

A network takes part by calling `reuse_branch` around each of its branches, see `DenoiseFn`.

Every n-th step: Selvaraju et al., FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, arXiv 2407.01425.
"""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

FORMAT = "jaxaccel.reuse_schedule"
VERSION = 1

Cache = Any
"""The last computed output of each branch, that of branch k at ``cache[k]``: a tuple, or an array [NB, ...]."""


@runtime_checkable
class DenoiseFn(Protocol):
    """A network whose branches can be reused, as a pure function."""

    def __call__(
        self,
        params: Any,
        x: Array,
        i: Any,
        cond: Any,
        *,
        cache: Any = None,
        weights: Any = None,
        compute: Any = None,
    ) -> tuple[Array, Any]:
        """Predict at one step.

        Args:
            params: of the network.
            x: noisy sample [B, ...].
            i: number of the step, T − 1 first; an int32 scalar that may be traced. The function knows its timesteps.
            cond: labels, prompts, or ``None``.
            cache: of branch outputs, as an earlier call returned it; ``None`` where nothing is reused.
            weights: [NB]; output k becomes ``cache[k]·(1 − w_k) + fresh·w_k``. For training a schedule. Booleans
                select, to check the other ways: ``fresh`` where true.
            compute: NB flags, Python booleans or a traced array; output k is computed where ``compute[k]`` is true,
                else ``cache[k]``. At most one of ``weights`` and ``compute`` is given; with none, all is computed.

        Returns:
            What the sampler's step takes, after guidance if there is any; and the outputs of the branches *that were
            used*, in the order of the cache: computed, mixed, or taken over.
        """


class Sampler(NamedTuple):
    """A deterministic sampler of a fixed number of steps."""

    step: Callable[[Any, Any, Any], Any]  # (x, what the network returned, i) -> x of the next step
    num_steps: int  # T
    name: str = "ddim"  # schedules are valid for samplers of this name only


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class ReuseSchedule:
    """What is computed at which step. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
        rows: T rows of NB booleans, true where the branch is computed; ``rows[i]`` is step i, the last row is executed
            first, and must be all true.
        sampler: name of the sampler that it is for.

    >>> schedule = ReuseSchedule(((True, False), (True, True)))
    >>> schedule.num_steps, schedule.num_branches, schedule.utilization
    (2, 2, 0.25)
    """

    rows: Any
    sampler: Any = "ddim"

    def __post_init__(self) -> None:
        if not isinstance(self.rows, tuple) or not self.rows or not all(isinstance(r, tuple) for r in self.rows):
            raise ValueError(f"rows must be a tuple of at least one tuple of booleans, got {self.rows!r}")
        if len({len(row) for row in self.rows}) > 1 or not self.rows[0]:
            raise ValueError(f"rows must be equally long and not empty, got lengths {[len(r) for r in self.rows]}")
        if not all(isinstance(flag, bool) for row in self.rows for flag in row):
            raise ValueError("rows must hold Python booleans; use schedule_from_array for an array")
        if not all(self.rows[-1]):
            raise ValueError(
                f"rows[{self.num_steps - 1}] is executed first and must be all true, as nothing is cached yet; "
                f"got false for branches {[k for k, flag in enumerate(self.rows[-1]) if not flag]}"
            )
        if not isinstance(self.sampler, str) or not self.sampler:
            raise ValueError(f"sampler must be a name, got {self.sampler!r}")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.rows)

    @property
    def num_branches(self) -> int:
        """NB."""
        return len(self.rows[0])

    @property
    def utilization(self) -> float:
        """Share of branch outputs that are reused, see `cache_utilization`."""
        return cache_utilization(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[T, NB] bool."""
        return np.asarray(self.rows, bool if dtype is None else dtype)

    def check(self, sampler: Sampler) -> None:
        """Raise ``ValueError`` unless the schedule is for this sampler and its number of steps."""
        if self.num_steps != sampler.num_steps:
            raise ValueError(
                f"schedule is for {self.num_steps} steps, the sampler takes {sampler.num_steps}: what step i means "
                "depends on their number, make a schedule for this one"
            )
        if self.sampler != sampler.name:
            raise ValueError(f"schedule is for the sampler {self.sampler!r}, got {sampler.name!r}")


def schedule_from_array(flags: Any, *, sampler: str = "ddim") -> ReuseSchedule:
    """Make a schedule of a boolean table.

    Args:
        flags: [T, NB] bool, true where a branch is computed; the last row is executed first.
        sampler: name of the sampler that it is for.

    Raises:
        ValueError: if it is no boolean table, is empty, or its last row is not all true.

    >>> schedule_from_array(np.ones((3, 2), bool)) == uniform_schedule(3, 2, interval=1)
    True
    """
    table = np.asarray(flags)
    if table.dtype != bool or table.ndim != 2:
        raise ValueError(f"flags must be a table [steps, branches] of booleans, got {table.dtype}{list(table.shape)}")
    return ReuseSchedule(tuple(tuple(map(bool, row)) for row in table), sampler)


def cache_utilization(schedule: Any) -> float:
    """CUR: share of branch outputs that are reused over a whole trajectory, the first step counted.

    If all branches cost the same and nothing else costs anything, sampling takes ``1 − CUR`` of its time.

    Args:
        schedule: a `ReuseSchedule`, or a table [T, NB] of booleans.

    >>> cache_utilization(uniform_schedule(4, 6, interval=2))
    0.5
    """
    return float(1.0 - np.asarray(schedule, bool).mean())


def uniform_schedule(num_steps: Any, num_branches: Any, *, interval: Any, sampler: str = "ddim") -> ReuseSchedule:
    """Compute everything at every ``interval``-th executed step, and nothing between (FORA, arXiv 2407.01425).

    Counted from the first executed step, T − 1, which is always computed.

    Args:
        num_steps: T.
        num_branches: NB.
        interval: 1 computes all steps; T or more computes the first only.
        sampler: name of the sampler that it is for.

    Raises:
        ValueError: if a number is not an integer of at least 1.

    >>> [row[0] for row in uniform_schedule(5, 1, interval=2).rows]  # step 4 is executed first
    [True, False, True, False, True]
    """
    for name, value in (("num_steps", num_steps), ("num_branches", num_branches), ("interval", interval)):
        _check_count(name, value)
    rows = tuple(((num_steps - 1 - i) % interval == 0,) * num_branches for i in range(num_steps))
    return ReuseSchedule(rows, sampler)


def random_schedule(
    key: Key[Array, ""], num_steps: Any, num_branches: Any, *, utilization: Any, sampler: str = "ddim"
) -> ReuseSchedule:
    """Reuse outputs that are drawn at random: what a learned schedule must beat at equal cost.

    Args:
        key: of the draw.
        num_steps: T.
        num_branches: NB.
        utilization: CUR; ``round(CUR·T·NB)`` outputs are reused, none of the first executed step. Between 0 and
            (T − 1)/T.
        sampler: name of the sampler that it is for.

    Raises:
        ValueError: if a number is out of range.

    >>> import jax
    >>> random_schedule(jax.random.key(0), 5, 4, utilization=0.4).utilization
    0.4
    """
    _check_count("num_steps", num_steps)
    _check_count("num_branches", num_branches)
    most = (num_steps - 1) / num_steps
    if not 0 <= utilization <= most + 1e-9:
        raise ValueError(f"utilization must be in [0, {most:.4g}] for {num_steps} steps, got {utilization}")
    free = (num_steps - 1) * num_branches
    order = np.asarray(jax.random.permutation(key, free))
    flags = np.ones((num_steps, num_branches), bool)
    flags.reshape(-1)[order[: round(utilization * num_steps * num_branches)]] = False
    return schedule_from_array(flags, sampler=sampler)


def save_schedule(path: str | os.PathLike[str], schedule: ReuseSchedule) -> None:
    """Write a schedule as JSON, one string of 0 and 1 for each step. It appears complete or not at all.

    Args:
        path: the file. Its folder is made.
        schedule: what to write.

    Raises:
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_schedule(f"{folder}/every-second.json", uniform_schedule(4, 2, interval=2))
    ...     load_schedule(f"{folder}/every-second.json").utilization
    0.5
    """
    path = pathlib.Path(path)
    rows = ["".join("01"[flag] for flag in row) for row in schedule.rows]
    content = {"format": FORMAT, "version": VERSION, "sampler": schedule.sampler, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = pathlib.Path(folder) / path.name
        with open(part, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)


def load_schedule(path: str | os.PathLike[str]) -> ReuseSchedule:
    """Read what `save_schedule` wrote.

    Raises:
        ValueError: naming the file, if it is cut off, something else, of another version, or no valid schedule.
        OSError: if it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of a reuse schedule")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: its format has version {content.get('version')!r}, expected {VERSION}")
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, str) and set(row) <= {"0", "1"} for row in rows):
        raise ValueError(f"{path}: rows must be a list of strings of 0 and 1, got {rows!r}")
    try:
        return ReuseSchedule(tuple(tuple(flag == "1" for flag in row) for row in rows), content.get("sampler"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reuse_branch(
    branch: Callable[[Any], Any], x: Any, k: int, *, cache: Any = None, weights: Any = None, compute: Any = None
) -> Any:
    """Output of branch k of a network: computed, mixed, or taken from the cache.

    Args:
        branch: what to compute, a function of ``x``; constants such as modulations may be captured.
        x: its input.
        k: number of the branch.
        cache: see `DenoiseFn`.
        weights: see `DenoiseFn`; mixing is in at least the precision of both, and the result has the branch's dtype.
        compute: see `DenoiseFn`. A Python boolean decides at trace time, and what is reused is never compiled. A
            traced flag becomes a `jax.lax.cond`: under ``jax.vmap`` with flags that differ along the mapped axis that
            would compute both sides and select.

    Raises:
        ValueError: if ``weights`` and ``compute`` are both given, something is to be reused and ``cache`` is ``None``,
            or the cached output has another shape or dtype than the computed one.

    >>> import jax.numpy as jnp
    >>> cache = (jnp.zeros(2), jnp.ones(2))
    >>> reuse_branch(lambda x: 3 * x, jnp.ones(2), 1, cache=cache, compute=(True, False)).tolist()
    [1.0, 1.0]
    >>> reuse_branch(lambda x: 3 * x, jnp.ones(2), 1, cache=cache, weights=jnp.array([1.0, 0.5])).tolist()
    [2.0, 2.0]
    """
    if weights is not None and compute is not None:
        raise ValueError("weights and compute must not both be given: outputs are mixed, or computed or not")
    branch = _alone(branch)
    if weights is None and compute is None:
        return branch(x)
    flag = None if compute is None else compute[k]
    if isinstance(flag, (bool, np.bool_)) and flag:
        return branch(x)
    if cache is None:
        raise ValueError(f"cache must hold an output of branch {k}, which is to be reused, got None")
    cached = cache[k]
    check_entry(cached, jax.eval_shape(branch, x), f"cache[{k}]")
    if isinstance(flag, (bool, np.bool_)):
        return cached
    if flag is not None:
        return jax.lax.cond(flag, lambda x, _: branch(x), lambda _, cached: cached, x, cached)
    fresh, weight = branch(x), weights[k]
    if getattr(weight, "dtype", None) == np.bool_:
        mixed = jax.tree.map(lambda f, c: jnp.where(weight, f, c), fresh, cached)
    else:
        mixed = jax.tree.map(lambda f, c: (c * (1 - weight) + f * weight).astype(f.dtype), fresh, cached)
    return jax.lax.optimization_barrier(mixed)


def _alone(branch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The branch as a piece that the compiler does not merge with what is before and after.

    It then rounds alike wherever it stands: alone, in a conditional, or beside branches that are reused. Without it
    compilers contract products and sums across its ends, differently from program to program.
    """
    return lambda x: jax.lax.optimization_barrier(branch(jax.lax.optimization_barrier(x)))


def check_entry(cached: Any, fresh: Any, name: str) -> None:
    """Raise ``ValueError`` unless cached outputs have the shapes and dtypes of computed ones."""
    have, want = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (cached, fresh))
    if have != want:
        raise ValueError(
            f"{name} has {_describe(have)}, expected {_describe(want)}: a cache serves the network and the batch that "
            "filled it"
        )


def _describe(leaves: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves)


def write_cache(flags: Array, outputs: Cache, cache: Cache) -> Cache:
    """Replace the entries whose flag is true: the cache after a step of training.

    Args:
        flags: [NB] bool.
        outputs: that the step used.
        cache: before it.
    """
    if isinstance(cache, (tuple, list)):
        pairs = zip(outputs, cache, strict=True)
        return tuple(
            jax.tree.map(lambda new, old, k=k: jnp.where(flags[k], new, old), *pair) for k, pair in enumerate(pairs)
        )

    def rows(new: Array, old: Array) -> Array:
        return jnp.where(flags.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(rows, outputs, cache)


def empty_cache(apply_fn: DenoiseFn, params: Any, x: Array, cond: Any) -> Cache:
    """Zeros of the shapes that the branches' outputs have."""
    shapes = jax.eval_shape(lambda p, x, c: apply_fn(p, x, jnp.int32(0), c)[1], params, x, cond)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def check_threshold(threshold: Any) -> None:
    """Raise ``ValueError`` unless a threshold on router scores is in (0, 0.99).

    The first executed row has the score sigmoid(5) = 0.9933 and must stay above it.
    """
    if not (isinstance(threshold, (int, float, np.floating)) and 0 < threshold < 0.99 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a number in (0, 0.99), got {threshold!r}")
