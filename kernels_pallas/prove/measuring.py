"""Run the same programs on a chip that is here: how long they take, and how far they are from their equations."""

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.prove.cases import Program, normals
from kernels_pallas.prove.proving import Job
from kernels_pallas.prove.targets import TARGETS, GpuTarget, Target

LENGTH = 0.03
"""Seconds that one timed call should take at least, if a program runs at half of its roofline."""
MOST_TURNS = 1000
THREADS = 8
"""Programs that are compiled at once."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came out of a job that ran.

    Attributes:
        job: what was asked.
        seconds: of one turn, each a mean over the turns of one call; empty if it failed.
        error: largest difference from the equation over the largest number of it, the worst of all arrays of floats;
            ``None`` where the case has no equation.
        unequal: share of whole numbers that differ from the equation's, of the worst array; ``None`` if there are none.
        roofline: seconds that the chip's peaks allow, by the author's counts.
        message: why it failed: the compiler's or the runtime's own words.
    """

    job: Job
    seconds: tuple[float, ...] = ()
    error: float | None = None
    unequal: float | None = None
    roofline: float = 0.0
    message: str = ""

    @property
    def median(self) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds)


def find_target(kind: str) -> Target | None:
    """The target that JAX calls ``kind`` (``device_kind``); ``None`` for a device that has no peaks here.

    >>> find_target("NVIDIA H200").name
    'h200'
    """
    names = {(t.device if isinstance(t, GpuTarget) else t.device_kind): t for t in TARGETS.values()}
    return names.get(kind)


def repeated(function: Callable[..., Any], turns: int) -> Callable[..., Any]:
    """A function that runs ``function`` so many times on the same arguments, and gives the last result.

    Each turn waits for the one before, and the compiler cannot see that all of them are the same.

    >>> int(repeated(lambda x: x + 1, 3)(1))
    2
    """

    def run(*arguments: Any) -> Any:
        def turn(_: Any, last: Any) -> Any:
            given, _ = jax.lax.optimization_barrier((arguments, last))
            return function(*given)

        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *arguments))
        return jax.lax.fori_loop(0, turns, turn, start)

    return run


def differences(found: Any, expected: Any) -> tuple[float | None, float | None]:
    """How far results are from those expected: of floats (see `Measured.error`), and the share of integers.

    What ``found`` has beyond the arrays expected is passed over. A number that is not finite in one of both only is an
    infinite error.

    >>> differences((jnp.array([1.0, 2.5]), jnp.array([1, 2])), (jnp.array([1.0, 2.0]), jnp.array([1, 3])))
    (0.25, 0.5)
    """
    errors, shares = [], []
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=False):
        if mine.shape != other.shape:
            raise ValueError(f"a result has shape {mine.shape}, expected {other.shape} as the equation gives")
        if not jnp.issubdtype(other.dtype, jnp.floating):
            shares.append(float(np.mean(np.asarray(mine) != np.asarray(other))))
            continue
        a, b = np.asarray(mine.astype(jnp.float32)), np.asarray(other.astype(jnp.float32))
        finite = np.isfinite(b)
        same = np.array_equal(finite, np.isfinite(a)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)
        scale = np.abs(b[finite]).max(initial=0) or 1.0
        errors.append(float(np.abs(a[finite] - b[finite]).max(initial=0) / scale) if same else float("inf"))
    return max(errors, default=None), max(shares, default=None)


def _turns(program: Program, roofline: float) -> int:
    return max(3, min(MOST_TURNS, int(LENGTH / max(2 * roofline, 3e-6))))


@dataclasses.dataclass(frozen=True)
class _Ready:
    program: Program
    roofline: float
    turns: int
    run: Any
    expect: Any


def _compile(job: Job, target: Target | None) -> _Ready:
    program = job.build(job.shape)
    roofline = max(program.flops / target.flops, program.bytes / target.bandwidth) if target else 0.0
    turns = _turns(program, roofline)
    run = jax.jit(repeated(program.function, turns)).lower(*program.arguments).compile()
    expect = None
    if program.equation is not None:
        with jax.default_matmul_precision("highest"):
            expect = jax.jit(program.equation).lower(*program.arguments).compile()
    return _Ready(program, roofline, turns, run, expect)


def _run(job: Job, ready: _Ready, repeats: int, seed: int) -> Measured:
    key = jax.random.key(seed)
    draw = ready.program.draw or (lambda key: normals(key, ready.program.arguments))
    arguments = jax.tree.map(jnp.asarray, draw(key))
    found = jax.block_until_ready(ready.run(*arguments))
    error = unequal = None
    if ready.expect is not None:
        error, unequal = differences(found, ready.expect(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(ready.run(*arguments))
        seconds.append((time.perf_counter() - begin) / ready.turns)
    return Measured(job, tuple(seconds), error, unequal, ready.roofline)


def measure(
    jobs: Sequence[Job],
    *,
    repeats: int = 5,
    seed: int = 0,
    on_done: Callable[[Measured], None] = lambda measured: None,
) -> list[Measured]:
    """Run every job on the first device of this process.

    Programs are compiled several at once and then run one after the other. Arguments are the same in all turns: what
    fits into a chip's cache stays there, as it does between the layers of a network only where it is small.

    Args:
        jobs: what to run, see `jobs_of`; their targets are not looked at.
        repeats: timed calls of each program.
        seed: of the arguments.
        on_done: called with each result as it is there.

    Returns:
        The results in the order of the jobs. One that cannot be compiled or run is a result that says so.
    """
    target = find_target(jax.devices()[0].device_kind)
    results = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        waiting = [pool.submit(_compile, job, target) for job in jobs]
        concurrent.futures.wait(waiting)  # nothing else runs while programs are timed
    for job in jobs:
        try:
            result = _run(job, waiting.pop(0).result(), repeats, seed)  # programs are let go one by one
        except Exception as error:  # one that fails must not take the others with it
            result = Measured(job, message=f"{type(error).__name__}: {error}")
        results.append(result)
        on_done(result)
    return results
