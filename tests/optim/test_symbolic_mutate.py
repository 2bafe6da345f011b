"""Random edits: valid, reproducible, and of the kinds that were asked for."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel.optim import symbolic
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, LION_PROGRAM, MutationWeights


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), weights=st.sampled_from([(1, 1, 1, 0), (1, 0, 0, 0), (0, 0, 1, 1)]))
def test_edits_are_valid_reproducible_and_small(seed, weights):
    key = jax.random.key(seed)
    child = symbolic.mutate(key, ADAMW_PROGRAM, weights=weights)
    assert child == symbolic.mutate(key, ADAMW_PROGRAM, weights=weights)
    symbolic.validate(child)
    assert abs(len(child) - len(ADAMW_PROGRAM)) <= 1
    if len(child) == len(ADAMW_PROGRAM):
        changed = [(a, b) for a, b in zip(child.statements, ADAMW_PROGRAM.statements, strict=True) if a != b]
        assert len(changed) <= 1
        assert all(
            a.target == b.target and a.op == b.op and sum(x != y for x, y in zip(a.args, b.args, strict=True)) == 1
            for a, b in changed
        )


def literals(program):
    return [a for s in program.statements for a in s.args if not isinstance(a, str)]


def skeleton(program):
    return [(s.target, s.op, [a if isinstance(a, str) else None for a in s.args]) for s in program.statements]


def test_constants_only_changes_numbers_only():
    program, seen = ADAMW_PROGRAM, set()
    for i in range(20):
        program = symbolic.mutate(jax.random.key(i), program, weights=symbolic.CONSTANTS_ONLY)
        assert skeleton(program) == skeleton(ADAMW_PROGRAM)
        seen.add(tuple(literals(program)))
    assert len(seen) == 20


def test_length_limits():
    program = LION_PROGRAM
    for i in range(15):
        program = symbolic.mutate(jax.random.key(i), program, max_length=8)
        assert len(program) <= 8
    for i in range(10):
        short = symbolic.mutate(jax.random.key(i), LION_PROGRAM, weights=MutationWeights(insert=0.0))
        assert len(short) <= len(LION_PROGRAM)


def test_numbers_stay_in_range():
    huge = symbolic.parse("def train(w, g, m, v, lr):\n u = g * 1e10\n return u, m, v")
    for i in range(10):
        child = symbolic.mutate(jax.random.key(i), huge, weights=symbolic.CONSTANTS_ONLY)
        assert abs(literals(child)[0]) <= 1e10


def test_hopeless_mutations_give_up():
    bare = symbolic.Program((), ("g", "m", "v"))
    with pytest.raises(symbolic.MutationError, match="no valid edit"):
        symbolic.mutate(jax.random.key(0), bare, weights=MutationWeights(0.0, 1.0, 1.0, 1.0), max_attempts=5)
    with pytest.raises(symbolic.MutationError, match="maximal length 6"):
        symbolic.mutate(jax.random.key(0), LION_PROGRAM, weights=MutationWeights(1.0, 0.0, 0.0), max_length=6)


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0, 0.0), (-1.0, 1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0, 1.0)])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be four finite numbers"):
        symbolic.mutate(jax.random.key(0), LION_PROGRAM, weights=weights)


def test_bad_limits_and_programs():
    with pytest.raises(ValueError, match="max_length=0"):
        symbolic.mutate(jax.random.key(0), LION_PROGRAM, max_length=0)
    with pytest.raises(ValueError, match="unknown variable 'u'"):
        symbolic.mutate(jax.random.key(0), symbolic.Program(()))
