"""A funnel of growing tasks: only programs that beat the baseline on one go on to the next.

Source: Chen et al., arXiv 2302.06675, which grows the tasks tenfold twice. What wins on a small proxy often loses on a
larger task; the funnel finds out at a price that grows only for the few that are left.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxaccel.optim.symbolic.program import Program
from jaxaccel.optim.symbolic.search import comparable


@dataclasses.dataclass(frozen=True)
class FunnelStage:
    """One task's outcome."""

    task: str
    """Its name."""
    baseline: float
    """The baseline's fitness."""
    fitness: dict[int, float]
    """Fitness by position in the list of programs, of those that got here; −inf stands for NaN too."""
    survivors: tuple[int, ...]
    """Positions of those that beat the baseline, the fittest first."""


def funnel(
    programs: Sequence[Program], tasks: Mapping[str, Callable[[Program], float]], baseline: Program
) -> tuple[FunnelStage, ...]:
    """Pass programs through tasks of growing size; each keeps those that beat the baseline.

    Source: arXiv 2302.06675, section on generalisation. When: after a search, on tasks that it never saw.

    Args:
        programs: candidates.
        tasks: fitness functions by name, the cheapest first; higher is better. Tune the baseline for each, or what
            survives may only have a better learning rate.
        baseline: the program to beat, strictly.

    Returns:
        One stage per task, also after the last program has failed.

    Raises:
        ValueError: if there are no programs or no tasks.

    >>> from jaxaccel.optim.symbolic import ADAMW_PROGRAM, LION_PROGRAM
    >>> stages = funnel([LION_PROGRAM, ADAMW_PROGRAM], {"short": lambda program: -len(program)}, ADAMW_PROGRAM)
    >>> stages[0].survivors
    (0,)
    """
    if not programs or not tasks:
        raise ValueError(f"programs and tasks must not be empty, got {len(programs)} and {len(tasks)}")
    alive: tuple[int, ...] = tuple(range(len(programs)))
    stages = []
    for name, fitness_fn in tasks.items():
        bar = comparable(fitness_fn(baseline))
        fitness = {i: comparable(fitness_fn(programs[i])) for i in alive}
        alive = tuple(sorted((i for i in alive if fitness[i] > bar), key=lambda i: (-fitness[i], i)))
        stages.append(FunnelStage(name, bar, fitness, alive))
    return tuple(stages)
