"""Evolution, its cache and its resumption; the funnel; fitness by training."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.optim import symbolic
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, CONSTANTS_ONLY, LION_PROGRAM, MutationWeights, Program
from jaxaccel.optim.symbolic.search import always_zero

TARGET = jnp.array([1.0, -2.0, 0.5])


def quadratic(w, batch):
    return jnp.sum((w["x"] - TARGET) ** 2) + jnp.sum((w["y"] - batch) ** 2)


@pytest.fixture(scope="module")
def fitness():
    """Minus the final loss of a tiny training run; compiled once for the module."""
    start = {"x": jnp.zeros(3), "y": jnp.ones(())}
    return symbolic.make_fitness(
        quadratic,
        lambda w, valid: -quadratic(w, valid),
        start,
        jnp.array([0.3, 0.1]),
        jnp.array(0.2),
        40,
        learning_rate=20.0,
    )


def search(fitness, **options):
    return symbolic.evolve(
        jax.random.key(0), fitness, **{"init": ADAMW_PROGRAM, "population": 10, "max_evaluations": 40} | options
    )


def test_search_improves_and_counts(fitness):
    calls = []

    def counted(program):
        calls.append(symbolic.program_hash(program))
        return fitness(program)

    state = search(counted)
    stats = state.stats
    assert len(calls) == len(set(calls)) == stats.evaluated == 40  # nothing is evaluated twice
    assert stats.generated == stats.cache_hits + stats.rejected + stats.evaluated - 1
    assert stats.cache_hits > 0
    assert 0 < stats.cache_hit_fraction < 1
    assert 0 < stats.dead_fraction < 1
    assert len(state.members) == 10
    assert len(state.cache) == stats.evaluated + stats.rejected
    values = [entry.fitness for entry in state.history]
    assert values == sorted(values)  # the best never gets worse
    assert len(values) > 1
    assert state.best_fitness == max(state.cache.values()) == fitness(state.best)


def test_the_same_key_gives_the_same_search(fitness):
    assert search(fitness, max_evaluations=15) == search(fitness, max_evaluations=15)
    other = symbolic.evolve(jax.random.key(1), fitness, init=ADAMW_PROGRAM, population=10, max_evaluations=15)
    assert other.members != search(fitness, max_evaluations=15).members


@pytest.mark.parametrize("options", [{}, {"restart_after": 7}, {"weights": CONSTANTS_ONLY}, {"cross_iteration": True}])
def test_resumed_equals_uninterrupted(fitness, options):
    meta = {"meta_fn": lambda program: -float(len(program))}
    whole = search(fitness, max_evaluations=30, **options, **meta)
    part = search(fitness, max_evaluations=12, **options, **meta)
    stored = json.dumps(symbolic.state_to_json(part), allow_nan=False)
    back = symbolic.state_from_json(json.loads(stored))
    assert back == part
    assert search(fitness, max_evaluations=30, state=back, **options, **meta) == whole
    assert whole.stats.evaluated == 30


def test_steps_can_be_divided(fitness):
    config = symbolic.SearchConfig(population=6, max_length=12)
    start = symbolic.search_init(jax.random.key(2), fitness, init=[ADAMW_PROGRAM, LION_PROGRAM], config=config)
    assert start.stats.evaluated == 2
    assert [p for p, _ in start.members] == [ADAMW_PROGRAM, LION_PROGRAM] * 3
    frozen = symbolic.state_to_json(start)
    once = symbolic.search_step(start, fitness, steps=9)
    twice = symbolic.search_step(symbolic.search_step(start, fitness, steps=4), fitness, steps=5)
    assert once == twice
    assert symbolic.state_to_json(start) == frozen  # states are not changed in place


def test_the_oldest_goes_and_the_length_is_kept():
    state = search(lambda program: 0.0, population=4, max_evaluations=1000, max_generated=60, max_length=11)
    assert ADAMW_PROGRAM not in [program for program, _ in state.members]  # though none is fitter
    assert state.stats.generated == 60
    assert all(len(program) <= 11 for program, _ in state.members)


def test_without_insertion_programs_never_grow():
    longest = []

    def length(program):
        longest.append(len(program))
        return -float(len(symbolic.simplify(program)))

    state = search(length, weights=MutationWeights(0.0, 1.0, 1.0), max_generated=100)
    assert max(longest) <= len(ADAMW_PROGRAM)
    assert len(symbolic.simplify(state.best)) < len(ADAMW_PROGRAM)


def test_constants_only_finds_no_duplicates(fitness):
    state = search(fitness, weights=CONSTANTS_ONLY)
    assert state.stats.cache_hits == 0
    assert {len(program) for program, _ in state.members} == {len(ADAMW_PROGRAM)}


def test_nan_and_infinities_lose():
    values = iter([0.0] + [math.nan, math.inf, -math.inf, 1.0] * 100)
    state = search(lambda program: next(values), max_evaluations=20)
    assert state.best_fitness == 1.0
    assert set(state.cache.values()) <= {0.0, 1.0, -math.inf}


def test_updates_of_zero_are_not_evaluated():
    still = symbolic.parse("def train(w, g, m, v, lr):\n u = g - g\n return u, m, v")
    late = symbolic.parse("def train(w, g, m, v, lr):\n u = v * lr\n v = m + g\n m = g * 1.0\n return u, m, v")
    assert always_zero(still)
    assert not always_zero(late)  # zero in its first step only
    evaluated = []
    state = symbolic.evolve(
        jax.random.key(0), lambda p: evaluated.append(p) or 1.0, init=still, population=2, max_evaluations=3
    )
    assert still not in evaluated
    assert state.stats.rejected >= 1


def test_restarts_and_meta_validation(fitness):
    state = search(lambda program: 0.0, restart_after=5, max_generated=21, meta_fn=lambda program: 7.0)
    assert state.stats.restarts == 4
    assert [entry.meta_fitness for entry in state.history] == [7.0]
    assert search(fitness, max_evaluations=3).history[0].meta_fitness is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tournament": 11}, "tournament must be from 1 to population=10, got tournament=11"),
        ({"tournament": 0}, "tournament"),
        ({"population": 0}, "population"),
        ({"max_length": 0}, "max_length"),
        ({"restart_after": 0}, "restart_after"),
        ({"max_evaluations": 0}, "max_evaluations"),
        ({"max_length": 8}, "9 statements, expected at most max_length=8"),
        ({"init": []}, "at least one program"),
        ({"init": Program(())}, "unknown variable 'u'"),
        ({"weights": (0.0, 0.0, 0.0, 0.0)}, "weights"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        search(lambda program: 0.0, **options)


def test_a_state_of_another_search_is_refused():
    state = search(lambda program: 0.0, max_generated=1)
    with pytest.raises(ValueError, match="state is of another search"):
        search(lambda program: 0.0, population=11, state=state)
    data = symbolic.state_to_json(state)
    with pytest.raises(ValueError, match="unknown function 'evil'"):
        symbolic.state_from_json(data | {"programs": ["def train(w, g, m, v, lr):\n u = evil(g)\n return u, m, v"]})
    with pytest.raises(ValueError, match="steps"):
        symbolic.search_step(state, lambda program: 0.0, steps=-1)


def test_funnel_keeps_what_beats_the_baseline():
    programs = [dataclasses.replace(ADAMW_PROGRAM, outputs=o) for o in (("u", "m", "v"), ("u", "v", "m"))]
    programs.append(LION_PROGRAM)
    scores = [{0: 1.0, 1: 3.0, 2: 2.0}, {1: 0.5, 2: math.nan}]
    asked = []

    def task(level):
        def score(program):
            if program == BASE:
                return 1.0
            i = programs.index(program)
            asked.append((level, i))
            return scores[level][i]

        return score

    stages = symbolic.funnel(programs, {"a": task(0), "b": task(1), "c": task(0)}, BASE)
    assert [stage.survivors for stage in stages] == [(1, 2), (), ()]
    assert stages[1].fitness == {1: 0.5, 2: -math.inf}
    assert stages[0].baseline == 1.0
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="must not be empty"):
        symbolic.funnel([], {"a": task(0)}, BASE)


BASE = symbolic.parse("def train(w, g, m, v, lr):\n u = g * lr\n return u, m, v")


def test_fitness_equals_training_with_the_transform():
    """Three steps by hand, with a schedule and batches that start again from the first."""
    start = {"x": jnp.zeros(3), "y": jnp.ones(())}
    batches, rates = jnp.array([0.3, 0.1]), jnp.array([0.3, 0.2, 0.1])
    for program in (LION_PROGRAM, BASE):
        score = symbolic.make_fitness(
            quadratic,
            lambda w, valid: -quadratic(w, valid),
            start,
            batches,
            jnp.array(0.2),
            3,
            learning_rate=lambda t: rates[t],
            max_statements=8,
        )(program)
        tx, w = symbolic.as_transform(program, lambda t: rates[t]), start
        state = tx.init(w)
        for t in range(3):
            updates, state = tx.update(jax.grad(quadratic)(w, batches[t % 2]), state, w)
            w = jax.tree.map(jnp.add, w, updates)
        assert score == pytest.approx(-float(quadratic(w, 0.2)), rel=1e-5)  # float32


def test_fitness_of_a_diverging_program_is_nan(fitness):
    bad = symbolic.parse("def train(w, g, m, v, lr):\n u = w * 1e10\n u = u * u\n return u, m, v")
    assert math.isnan(fitness(bad))
    assert fitness(ADAMW_PROGRAM) == fitness(ADAMW_PROGRAM)


def test_fitness_compiles_once():
    traced = []

    def loss(w, batch):
        traced.append(1)
        return jnp.sum((w - batch) ** 2)

    score = symbolic.make_fitness(loss, lambda w, b: -jnp.sum((w - b) ** 2), jnp.zeros(2), jnp.ones((1, 2)), 1.0, 2)
    score(LION_PROGRAM)
    seen = len(traced)
    for program in (ADAMW_PROGRAM, BASE):
        score(program)
    assert len(traced) == seen


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"batches": {"a": np.ones((2, 1)), "b": np.ones((3, 1))}}, ValueError, "first axis"),
        ({"batches": np.ones(())}, ValueError, "first axis"),
        ({"batches": np.ones((0, 2))}, ValueError, "first axis"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"init_params": jnp.arange(3)}, TypeError, "floating"),
    ],
)
def test_bad_fitness_arguments(options, error, message):
    arguments = {"init_params": jnp.ones(2), "batches": np.ones((2, 2)), "valid": 0.0, "steps": 1}
    with pytest.raises(error, match=message):
        symbolic.make_fitness(lambda w, b: w.sum(), lambda w, b: w.sum(), **arguments | options)
