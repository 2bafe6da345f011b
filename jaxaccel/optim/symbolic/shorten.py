"""Programs made shorter by leaving out what does not earn its place."""

import math
from collections.abc import Callable

from jaxaccel.optim.symbolic import abstract
from jaxaccel.optim.symbolic.program import Program, ProgramError
from jaxaccel.optim.symbolic.search import comparable


def shorten(
    program: Program, fitness_fn: Callable[[Program], float], *, tolerance: float = 0.0, max_evaluations: int = 1000
) -> tuple[Program, float]:
    r"""Delete statements as long as fitness stays within ``tolerance`` of where it began.

    Dead statements go first, for nothing; then each live statement is left out in turn, last to first, and stays out if
    the program is still valid and good enough. Readers of a deleted variable see its earlier value. It ends when no
    single deletion is accepted any more. This is the second step of the paper's simplification (arXiv 2302.06675),
    as a greedy pass in place of a deletion-only evolution (``evolve`` with the weights of deletions alone).

    When: before reading what a search has found. When not: with a noisy fitness; a tolerance below the noise keeps
    rubbish, one above it deletes what matters.

    Args:
        program: a valid program.
        fitness_fn: program → number, higher is better; NaN and infinities count as −inf.
        tolerance: how much fitness may be given up in all, >= 0.
        max_evaluations: calls of ``fitness_fn``, at most.

    Returns:
        The shortened program and its fitness.

    Raises:
        ValueError: if the program is not valid or ``tolerance`` is negative or not finite.

    >>> from jaxaccel.optim.symbolic import parse, to_text
    >>> text = "def train(w, g, m, v, lr):\n u = g * 1.0\n u = u * lr\n return u, m, v"
    >>> short, _ = shorten(parse(text), lambda program: 1.0)  # nothing matters
    >>> print(to_text(short))
    def train(w, g, m, v, lr):
      u = g * 1.0
      return u, m, v
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a finite number >= 0, got tolerance={tolerance}")
    abstract.validate(program)
    best = abstract.simplify(program, cross_iteration=True)
    fitness = comparable(fitness_fn(best))
    bar, evaluations = fitness - tolerance, 1
    changed = True
    while changed:
        changed = False
        for position in reversed(range(len(best))):
            if evaluations >= max_evaluations:
                return best, fitness
            if position >= len(best):  # an accepted deletion took dead statements along
                continue
            candidate = _without(best, position)
            if candidate is None:
                continue
            evaluations += 1
            found = comparable(fitness_fn(candidate))
            if found >= bar and math.isfinite(found):
                best, fitness, changed = candidate, found, True
    return best, fitness


def _without(program: Program, position: int) -> Program | None:
    """The program without one statement and what dies with it; ``None`` if it is then not valid."""
    statements = program.statements[:position] + program.statements[position + 1 :]
    shorter = Program(statements, program.outputs)
    try:
        abstract.validate(shorter)
    except ProgramError:
        return None
    return abstract.simplify(shorter, cross_iteration=True)
