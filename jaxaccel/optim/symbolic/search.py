"""Regularized evolution over programs: resumable, with a cache of fitness by hash.

Each step draws a few programs of the population, copies the fittest, mutates the copy, looks its hash up or evaluates
it, appends it, and removes the *oldest* program, however good. Source: Chen et al., arXiv 2302.06675.

Step i uses a generator seeded with (key, i), so that a search has no hidden state: killed and resumed from
`state_to_json`, it equals the uninterrupted one exactly.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel.optim.symbolic import abstract
from jaxaccel.optim.symbolic.mutate import (
    ALL_EDITS,
    MutationError,
    MutationWeights,
    check_weights,
    key_words,
    mutate_with,
)
from jaxaccel.optim.symbolic.program import Program, parse, to_text
from jaxaccel.optim.symbolic.transform import execute

FitnessFn = Callable[[Program], float]


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What a search keeps from its first step to its last.

    >>> SearchConfig(population=2, tournament=3)
    Traceback (most recent call last):
    ValueError: tournament must be from 1 to population=2, got tournament=3
    """

    population: int = 1000
    """Number of living programs."""
    tournament: int = 2
    """Programs drawn, without replacement, of which the fittest becomes the parent."""
    max_length: int = 60
    """Longest program."""
    weights: MutationWeights = ALL_EDITS
    """Odds of the edits."""
    restart_after: int | None = None
    """Programs without improvement after which the population becomes copies of the best one; None: never."""
    cross_iteration: bool = False
    """Hash without the states that no update depends on; more cache hits than the paper counts."""

    def __post_init__(self) -> None:
        for name in ("population", "tournament", "max_length", "restart_after"):
            value = getattr(self, name)
            if name == "restart_after" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {name}={value!r}")
        if self.tournament > self.population:
            raise ValueError(
                f"tournament must be from 1 to population={self.population}, got tournament={self.tournament}"
            )
        object.__setattr__(self, "weights", MutationWeights(*map(float, self.weights)))
        check_weights(self.weights)


_DEFAULTS = SearchConfig()


@dataclasses.dataclass(frozen=True)
class SearchStats:
    """Counters of a search; what the paper reports are the two fractions.

    >>> SearchStats(generated=10, cache_hits=9).cache_hit_fraction
    0.9
    """

    generated: int = 0
    """Programs made by mutation."""
    evaluated: int = 0
    """Calls of the fitness function, that of the initial programs included."""
    cache_hits: int = 0
    """Generated programs whose hash was known."""
    rejected: int = 0
    """Programs whose updates are all zero: not evaluated, fitness −inf."""
    failed_mutations: int = 0
    """Steps in which no valid edit was found; the parent itself was appended."""
    restarts: int = 0
    """Times the population was filled with the best program anew."""
    statements: int = 0
    """Statements of all generated programs."""
    dead_statements: int = 0
    """Those among them that no output depends on."""

    @property
    def cache_hit_fraction(self) -> float:
        """Cache hits over generated programs."""
        return self.cache_hits / self.generated if self.generated else 0.0

    @property
    def dead_fraction(self) -> float:
        """Dead statements over statements."""
        return self.dead_statements / self.statements if self.statements else 0.0


@dataclasses.dataclass(frozen=True)
class Improvement:
    """A new best program."""

    generated: int
    """Programs generated when it was found."""
    evaluated: int
    """Programs evaluated when it was found."""
    fitness: float
    """Its fitness in the search."""
    meta_fitness: float | None
    """Its fitness on the meta-validation task, which the search never selects by; None without such a task."""
    program: Program
    """The program."""


@dataclasses.dataclass(frozen=True)
class SearchState:
    """A search between two steps. Take it as read-only; `search_step` returns a new one."""

    config: SearchConfig
    """Fixed for the whole search."""
    words: tuple[int, ...]
    """Words of the random key."""
    members: tuple[tuple[Program, float], ...]
    """Living programs with their fitness, oldest first."""
    cache: dict[str, float]
    """Fitness by `program_hash`."""
    history: tuple[Improvement, ...]
    """Every new best, so the last is the best of all; its fitness never falls."""
    last_change: int
    """Programs generated at the last improvement or restart."""
    stats: SearchStats

    @property
    def best(self) -> Program:
        """The fittest program so far, initial ones included."""
        return self.history[-1].program

    @property
    def best_fitness(self) -> float:
        """Its fitness."""
        return self.history[-1].fitness


def comparable(fitness: Any) -> float:
    """A fitness as a float, with −inf for NaN, which compares with nothing, and for +inf, which nothing beats.

    >>> comparable(1), comparable(float("nan"))
    (1.0, -inf)
    """
    value = float(fitness)
    return value if math.isfinite(value) else -math.inf


def always_zero(program: Program) -> bool:
    r"""Whether a program's updates are exactly zero: three iterations with random weights and gradients are tried.

    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM, parse
    >>> still = parse("def train(w, g, m, v, lr):\n u = g - g\n return u, m, v")
    >>> always_zero(LION_PROGRAM), always_zero(still)
    (False, True)
    """
    program = abstract.simplify(program, cross_iteration=True)
    rng = np.random.default_rng(0)

    def draw() -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(rng.standard_normal(spec.shape), jnp.float32) for spec in abstract.EXAMPLE_TREE)

    w = draw()
    m = v = tuple(jnp.zeros_like(leaf) for leaf in w)
    for _ in range(3):  # the first update of a program with delayed momentum is zero
        update, m, v = execute(program, w, draw(), m, v, 1.0)
        if any(bool(jnp.any(u != 0)) for u in update):  # NaN counts: the fitness function judges it
            return False
    return True


class _Search:
    """A state under change, private to one call of `search_step`."""

    def __init__(self, state: SearchState, fitness_fn: FitnessFn, meta_fn: FitnessFn | None) -> None:
        self.config, self.words = state.config, state.words
        self.members = collections.deque(state.members)
        self.cache = dict(state.cache)
        self.history = list(state.history)
        self.last_change = state.last_change
        self.counts = dataclasses.asdict(state.stats)
        self.fitness_fn, self.meta_fn = fitness_fn, meta_fn

    def freeze(self) -> SearchState:
        return SearchState(
            self.config,
            self.words,
            tuple(self.members),
            self.cache,
            tuple(self.history),
            self.last_change,
            SearchStats(**self.counts),
        )

    def assess(self, program: Program, *, generated: bool) -> float:
        """Fitness from the cache, or from the function."""
        key = abstract.program_hash(program, cross_iteration=self.config.cross_iteration)
        if key in self.cache:
            self.counts["cache_hits"] += generated
            return self.cache[key]
        if always_zero(program):
            self.counts["rejected"] += 1
            fitness = -math.inf
        else:
            self.counts["evaluated"] += 1
            fitness = comparable(self.fitness_fn(program))
        self.cache[key] = fitness
        if not self.history or fitness > self.history[-1].fitness:
            meta = None if self.meta_fn is None else float(self.meta_fn(program))
            self.history.append(Improvement(self.counts["generated"], self.counts["evaluated"], fitness, meta, program))
            self.last_change = self.counts["generated"]
        return fitness

    def step(self) -> None:
        config, counts = self.config, self.counts
        rng = np.random.default_rng([*self.words, counts["generated"]])
        drawn = rng.choice(len(self.members), size=config.tournament, replace=False)
        parent = max((self.members[i] for i in drawn), key=lambda member: member[1])[0]
        counts["generated"] += 1
        try:
            child = mutate_with(rng, parent, config.weights, config.max_length)
        except MutationError:
            counts["failed_mutations"] += 1
            child = parent
        counts["statements"] += len(child)
        counts["dead_statements"] += len(child) - len(abstract.live_statements(child))
        self.members.append((child, self.assess(child, generated=True)))
        self.members.popleft()
        if config.restart_after is not None and counts["generated"] - self.last_change >= config.restart_after:
            best = self.history[-1]
            self.members = collections.deque([(best.program, best.fitness)] * config.population)
            self.last_change = counts["generated"]
            counts["restarts"] += 1


def search_init(
    key: jax.Array,
    fitness_fn: FitnessFn,
    *,
    init: Program | Sequence[Program],
    config: SearchConfig = _DEFAULTS,
    meta_fn: FitnessFn | None = None,
) -> SearchState:
    """Evaluate the initial programs and fill the population with them in turn.

    Source: arXiv 2302.06675, which starts from copies of AdamW. When: with `search_step`, in a runner that writes
    checkpoints; otherwise `evolve`.

    Args:
        key: a random key, typed or uint32.
        fitness_fn: program → number, higher is better; NaN and infinities count as −inf. It must be deterministic.
        init: one valid program or several.
        config: fixed for the whole search.
        meta_fn: program → number on another task, called for every new best and recorded, never selected by. Where it
            falls while the fitness rises, the search is overfitting its task.

    Returns:
        A state with no program generated.

    Raises:
        ValueError: if there is no program, one is not valid or longer than ``max_length``.

    >>> import jax
    >>> from jaxaccel.optim.symbolic import LION_PROGRAM
    >>> state = search_init(jax.random.key(0), lambda program: -len(program), init=LION_PROGRAM)
    >>> len(state.members), state.best_fitness, state.stats.evaluated
    (1000, -6.0, 1)
    """
    programs = [init] if isinstance(init, Program) else list(init)
    if not programs:
        raise ValueError("init must hold at least one program, got none")
    for program in programs:
        abstract.validate(program)
        if len(program) > config.max_length:
            raise ValueError(
                f"init holds a program of {len(program)} statements, expected at most max_length={config.max_length}"
            )
    empty = SearchState(config, tuple(key_words(key)), (), {}, (), 0, SearchStats())
    search = _Search(empty, fitness_fn, meta_fn)
    scored = [(program, search.assess(program, generated=False)) for program in programs]
    if not search.history:  # every program was −inf or rejected
        search.history.append(Improvement(0, search.counts["evaluated"], -math.inf, None, programs[0]))
    search.members.extend(scored[i % len(scored)] for i in range(config.population))
    return search.freeze()


def search_step(
    state: SearchState,
    fitness_fn: FitnessFn,
    *,
    steps: int = 1,
    max_evaluations: int | None = None,
    meta_fn: FitnessFn | None = None,
) -> SearchState:
    """Generate ``steps`` programs.

    Args:
        state: from `search_init`, `search_step` or `state_from_json`; it is not changed.
        fitness_fn: the function that the search was begun with.
        steps: programs to generate, >= 0. The state is copied once per call: prefer tens to single ones.
        max_evaluations: stop early once as many programs have been evaluated.
        meta_fn: as in `search_init`.

    Returns:
        The state after the steps. How they are divided among calls makes no difference.

    Raises:
        ValueError: if ``steps`` is negative.

    >>> import jax
    >>> from jaxaccel.optim.symbolic import LION_PROGRAM
    >>> fitness = lambda program: -len(program)
    >>> config = SearchConfig(population=4)
    >>> state = search_init(jax.random.key(0), fitness, init=LION_PROGRAM, config=config)
    >>> search_step(search_step(state, fitness), fitness) == search_step(state, fitness, steps=2)
    True
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got steps={steps}")
    search = _Search(state, fitness_fn, meta_fn)
    for _ in range(steps):
        if max_evaluations is not None and search.counts["evaluated"] >= max_evaluations:
            break
        search.step()
    return search.freeze()


def evolve(
    key: jax.Array,
    fitness_fn: FitnessFn,
    *,
    init: Program | Sequence[Program],
    population: int = 1000,
    tournament: int = 2,
    max_evaluations: int,
    max_length: int = 60,
    weights: MutationWeights | tuple[float | int, ...] = ALL_EDITS,
    restart_after: int | None = None,
    cross_iteration: bool = False,
    max_generated: int | None = None,
    meta_fn: FitnessFn | None = None,
    state: SearchState | None = None,
) -> SearchState:
    """Search for a program of high fitness.

    Source: arXiv 2302.06675: population 1000, tournament 2, warm start from AdamW, 200 to 300 thousand programs per
    run, several runs, then one from the best. When: a cheap proxy task exists whose ranking of optimizers carries over
    to the real one. When not: to tune a known optimizer; ``weights=CONSTANTS_ONLY`` does that, and at small budgets
    the full search did not beat it here.

    Args:
        key: a random key, typed or uint32. The same key and function give the same search.
        fitness_fn: program → number, higher is better; NaN and infinities count as −inf. It must be deterministic: what
            is noisy is overfitted, and is cached as it first came.
        init: one valid program or several.
        population: living programs, >= 1.
        tournament: programs drawn for each choice of a parent, from 1 to ``population``.
        max_evaluations: calls of the fitness function, >= 1, those of a resumed search included.
        max_length: statements of the longest program.
        weights: odds of insert, delete, modify, and of changing a number only.
        restart_after: programs without improvement after which the population starts anew from the best; None: never.
        cross_iteration: hash without the states that no update depends on.
        max_generated: programs generated in all, at most; None: 100 times ``max_evaluations``, so that a space that is
            exhausted ends the search.
        meta_fn: as in `search_init`.
        state: where to go on. ``key`` and ``init`` are then ignored; the rest must be what the search began with,
            except for the budgets.

    Returns:
        The state in which a budget was reached.

    Raises:
        ValueError: for arguments out of range, a program that is not valid, or a ``state`` of another configuration.

    >>> import jax
    >>> from jaxaccel.optim.symbolic import ADAMW_PROGRAM
    >>> state = evolve(jax.random.key(0), lambda program: -len(program), init=ADAMW_PROGRAM, population=5,
    ...                max_evaluations=10, max_generated=20, weights=(0, 1, 0, 0))  # deletions only
    >>> state.best_fitness > -len(ADAMW_PROGRAM)
    True
    """
    config = SearchConfig(population, tournament, max_length, MutationWeights(*weights), restart_after, cross_iteration)
    if max_evaluations < 1:
        raise ValueError(f"max_evaluations must be >= 1, got max_evaluations={max_evaluations}")
    if state is None:
        state = search_init(key, fitness_fn, init=init, config=config, meta_fn=meta_fn)
    elif state.config != config:
        raise ValueError(f"state is of another search: it has {state.config}, expected {config}")
    limit = 100 * max_evaluations if max_generated is None else max_generated
    return search_step(
        state,
        fitness_fn,
        steps=max(0, limit - state.stats.generated),
        max_evaluations=max_evaluations,
        meta_fn=meta_fn,
    )


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _number(x: float | None) -> float:
    return -math.inf if x is None else float(x)


def state_to_json(state: SearchState) -> dict[str, Any]:
    """Return the state as dictionaries, lists, strings and numbers that any JSON writer takes.

    When: to store a search. Programs are stored as text, each once; a fitness of −inf is null.

    >>> import jax, json
    >>> from jaxaccel.optim.symbolic import LION_PROGRAM
    >>> state = search_init(jax.random.key(0), lambda program: 0.0, init=LION_PROGRAM)
    >>> state_from_json(json.loads(json.dumps(state_to_json(state)))) == state
    True
    """
    texts: dict[str, int] = {}

    def index(program: Program) -> int:
        return texts.setdefault(to_text(program), len(texts))

    members = [[index(program), _finite(fitness)] for program, fitness in state.members]
    history = [
        [e.generated, e.evaluated, _finite(e.fitness), e.meta_fitness is not None, _finite(e.meta_fitness),
         index(e.program)]
        for e in state.history
    ]  # fmt: skip
    return {
        "format": 1,
        "config": {**dataclasses.asdict(state.config), "weights": list(state.config.weights)},
        "words": list(state.words),
        "programs": list(texts),
        "members": members,
        "cache": {key: _finite(fitness) for key, fitness in state.cache.items()},
        "history": history,
        "last_change": state.last_change,
        "stats": dataclasses.asdict(state.stats),
    }


def state_from_json(data: dict[str, Any]) -> SearchState:
    """Restore what `state_to_json` returned.

    Args:
        data: the dictionary, also after a round trip through JSON text.

    Returns:
        An equal state. Programs are read by `parse`: nothing in the data is executed.

    Raises:
        ValueError: if the data are of another format, or a program in them is not valid.

    >>> state_from_json({"format": 9})
    Traceback (most recent call last):
    ValueError: a search state must have format 1, got format=9
    """
    if data.get("format") != 1:
        raise ValueError(f"a search state must have format 1, got format={data.get('format')!r}")
    programs = [parse(text) for text in data["programs"]]
    for program in programs:
        abstract.validate(program)
    return SearchState(
        config=SearchConfig(**{**data["config"], "weights": MutationWeights(*data["config"]["weights"])}),
        words=tuple(data["words"]),
        members=tuple((programs[i], _number(fitness)) for i, fitness in data["members"]),
        cache={key: _number(fitness) for key, fitness in data["cache"].items()},
        history=tuple(
            Improvement(generated, evaluated, _number(fitness), _number(meta) if has_meta else None, programs[i])
            for generated, evaluated, fitness, has_meta, meta, i in data["history"]
        ),
        last_change=data["last_change"],
        stats=SearchStats(**data["stats"]),
    )
