"""The interpreter equals direct execution, and is compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from jaxaccel.optim import symbolic
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, LION_PROGRAM, Program, Statement

ROWS = 24
SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
SIZES = (6, 4, 1)


def draw(seed):
    rng = np.random.default_rng(seed)
    return [{k: jnp.asarray(rng.standard_normal(s)) for k, s in SHAPES.items()} for _ in range(4)]


@pytest.fixture(scope="module")
def interpret():
    """The compiled interpreter in float64, shared by the tests of this module."""
    with jax.enable_x64(True):
        step = jax.jit(symbolic.interpret, static_argnames="sizes")
        example = symbolic.encode(LION_PROGRAM, ROWS)
        zeros = jnp.zeros(sum(SIZES))
        step(example, zeros, zeros, zeros, zeros, 0.3, sizes=SIZES)
    return step


def compare(interpret, program, seed=0):
    with jax.enable_x64(True):
        values = draw(seed)
        expected = [ravel_pytree(x)[0] for x in symbolic.execute(program, *values, 0.3)]
        flat = [ravel_pytree(x)[0] for x in values]
        got = interpret(symbolic.encode(program, ROWS), *flat, 0.3, sizes=SIZES)
        for x, y, alive in zip(got, expected, symbolic.live_outputs(program), strict=True):
            if alive:
                # float64; sums are added in another order, and a mutated program may cancel nearly all digits
                np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9)


def tree_of(name):
    """A program that passes a parameter tree, numbers per leaf and scalars to the function ``name``."""
    arity, scalars = symbolic.FUNCTIONS[name].arity, symbolic.FUNCTIONS[name].scalar_arguments
    statements = [Statement("leafwise", "norm", ("g",)), Statement("scalar", "global_norm", ("w",))]
    kinds = ("g", "leafwise", "scalar", 0.7)
    results = []
    for i, first in enumerate(kinds):
        args = [first, kinds[(i + 1) % 4], kinds[(i + 2) % 4]][:arity]
        args = ["scalar" if j in scalars else a for j, a in enumerate(args)]
        statements.append(Statement(f"r{i}", name, tuple(args)))
        results.append(f"r{i}")
    statements.append(Statement("u", "*", ("w", 1.0)))
    statements += [Statement("u", "+", ("u", r)) for r in results]
    return Program(tuple(statements), ("u", "m", "v"))


@pytest.mark.parametrize("name", [n for n in symbolic.FUNCTIONS if n != "invert"])
def test_every_function_with_every_kind_of_value(interpret, name):
    program = tree_of(name)
    symbolic.validate(program)
    with jax.enable_x64(True):
        values = draw(3)
        expected = [ravel_pytree(x)[0] for x in symbolic.execute(program, *values, 0.3)]
        got = interpret(symbolic.encode(program, ROWS), *(ravel_pytree(x)[0] for x in values), 0.3, sizes=SIZES)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-9, atol=1e-9)  # float64; NaN at equal places


@pytest.mark.parametrize("program", [ADAMW_PROGRAM, LION_PROGRAM])
def test_known_programs(interpret, program):
    compare(interpret, program)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), edits=st.integers(1, 14))
def test_random_programs(interpret, seed, edits):
    program = ADAMW_PROGRAM
    for i in range(edits):
        program = symbolic.mutate(jax.random.fold_in(jax.random.key(seed), i), program)
    compare(interpret, program, seed)


def test_one_compilation_serves_all_programs(interpret):
    before = interpret._cache_size()
    for i in range(5):
        compare(interpret, symbolic.mutate(jax.random.key(i), LION_PROGRAM))
    assert interpret._cache_size() == before


def test_reference_outputs(vectors):
    data = vectors("lion")
    values = [jnp.asarray(data[f"program/{k}"]) for k in ("w", "g", "m", "v", "lr")]
    for name in ("adamw_no_bc", "lion", "signum"):
        encoded = symbolic.encode(symbolic.parse(str(data[f"program/{name}/text"])), ROWS)
        for i, out in enumerate(symbolic.interpret(encoded, *values, sizes=(6,))):
            np.testing.assert_allclose(out, data[f"program/{name}/out{i}"], rtol=0, atol=1e-6)  # float32


def test_what_cannot_be_encoded():
    with pytest.raises(ValueError, match="9 live statements, expected at most max_statements=8"):
        symbolic.encode(ADAMW_PROGRAM, 8)
    with pytest.raises(ValueError, match="unknown function 'x'"):
        symbolic.encode(Program((Statement("u", "x", ("g",)),)))
    with pytest.raises(ValueError, match="sizes must add up to the 3 parameters"):
        symbolic.interpret(symbolic.encode(LION_PROGRAM), *[jnp.ones(3)] * 4, 1.0, sizes=(2, 2))
