"""Shortening: keeps what matters, respects its budgets, refuses nonsense."""

import math

import pytest

from jaxaccel.optim.symbolic import (
    ADAMW_PROGRAM,
    LION_PROGRAM,
    Program,
    ProgramError,
    parse,
    program_hash,
    shorten,
    to_text,
)

PADDED = parse(
    """def train(w, g, m, v, lr):
  junk = cosh(w)
  u = interpolate(g, m, 0.9)
  u = sign(u)
  m = interpolate(g, m, 0.99)
  u = u * 1.0
  wd = w * 0.1
  u = u + wd
  u = u * lr
  return u, m, v"""
)


def test_dead_statements_cost_no_evaluation():
    calls = []
    short, _ = shorten(PADDED, lambda program: calls.append(program) or 0.0, max_evaluations=1)
    assert len(calls) == 1
    assert "cosh" not in to_text(short)


def test_what_earns_its_place_stays():
    """Fitness that knows Lion: everything but the multiplication with one is needed."""
    wanted = {"sign", "interpolate", "+"}

    def fitness(program: Program) -> float:
        return len(wanted & {s.op for s in program.statements}) + ("lr" in to_text(program).split(":")[1])

    short, value = shorten(PADDED, fitness)
    assert value == fitness(PADDED)
    assert "1.0" not in to_text(short)
    assert wanted <= {s.op for s in short.statements}


def test_tolerance_is_for_the_whole_and_not_for_each_step():
    program = ADAMW_PROGRAM
    lengths = []

    def fitness(candidate: Program) -> float:
        lengths.append(len(candidate))
        return float(len(candidate))

    _, value = shorten(program, fitness, tolerance=2.0)
    assert value >= lengths[0] - 2.0
    unchanged, _ = shorten(LION_PROGRAM, lambda candidate: float(len(candidate)))
    assert program_hash(unchanged) == program_hash(LION_PROGRAM)


def test_broken_candidates_are_never_taken():
    short, value = shorten(LION_PROGRAM, lambda p: 1.0 if program_hash(p) == program_hash(LION_PROGRAM) else math.nan)
    assert (program_hash(short), value) == (program_hash(LION_PROGRAM), 1.0)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a finite number >= 0"):
        shorten(LION_PROGRAM, lambda program: 0.0, tolerance=tolerance)


def test_invalid_programs_are_refused():
    with pytest.raises(ProgramError):
        shorten(Program(LION_PROGRAM.statements[1:]), lambda program: 0.0)
