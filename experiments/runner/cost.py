"""What a computation costs: operations and bytes from the compiled program, seconds from timing things in turn."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from experiments.runner import stats
from jaxaccel.forecasting import seconds_in_turn

Name = TypeVar("Name")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Static cost of one compiled program.

    Attributes:
        flops: floating-point operations as the compiler counts them. The body of a loop is counted once, whatever its
            trip count: for a `lax.scan` over steps this is the cost of one step.
        peak_bytes: arguments, outputs that do not reuse an argument's memory, and temporaries.
        compile_s: seconds spent in tracing, lowering and compiling.
    """

    flops: float | None
    peak_bytes: int | None
    compile_s: float


def compile_with_cost(function: Any, *arguments: Any) -> tuple[Any, ProgramCost]:
    """Compile a jitted ``function`` for ``arguments`` ahead of time; return the executable and its `ProgramCost`."""
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return compiled, ProgramCost(_flops(compiled), peak_bytes(compiled), seconds)


def _flops(compiled: Any) -> float | None:
    analysis = compiled.cost_analysis()  # None where a backend offers none
    if isinstance(analysis, (list, tuple)):
        analysis = analysis[0] if analysis else None
    flops = (analysis or {}).get("flops")
    return float(flops) if flops is not None and flops >= 0 else None


def peak_bytes(compiled: Any) -> int | None:
    """Most bytes that a compiled program holds, arguments and outputs among them; ``None`` if the backend is silent."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def tree_bytes(tree: Any) -> int:
    """Total bytes of the arrays (or shape structs) in a pytree, all shards together."""
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender: all repeats, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def time_in_turn(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int = 15, min_seconds: float = 0.02
) -> dict[str, Timing]:
    """Time several functions in turn: A B C A B C ..., after one warm-up call of each.

    Noise of a shared machine then falls on all of them alike. A call that is too short for the clock is repeated inside
    one measurement until it lasts about ``min_seconds``. Results are awaited with `jax.block_until_ready`.
    """
    seconds = seconds_in_turn(contenders, repeats=repeats, min_seconds=min_seconds)
    return {name: Timing(values) for name, values in seconds.items()}


def results_in_turn(
    calls: Mapping[Name, Callable[[], Result]], repeats: int
) -> tuple[dict[Name, list[Result]], dict[Name, float]]:
    """Results of calls that time themselves, made in turn; and the seconds of each first call, which compiles."""
    warming: dict[Name, float] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        warming[name] = time.perf_counter() - began
    results: dict[Name, list[Result]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            results[name].append(call())
    return results, warming


def ratio(timings: Mapping[str, Timing], top: str, bottom: str) -> tuple[float, tuple[float, float] | None]:
    """Median of ``top`` over median of ``bottom``, with its bootstrap interval over turns."""
    value = timings[top].median / timings[bottom].median
    return value, stats.bootstrap_ratio(timings[top].seconds, timings[bottom].seconds)
