"""GBRL with PPO beside PPO with networks: the same environment steps, updates, loss and code; only the model differs.

CartPole has numbers as observations, the grid with key and door has categories. Both arms' rates are tuned with a seed
that is not reported. What a tree costs is measured beside a builder that scores every candidate by a pass over all
rows, as the reference does.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.environments import CartPole, KeyDoor
from experiments.gbrl_models import MLPActorCritic
from experiments.gbrl_trees import passes_over_rows
from experiments.runner import cost, stats
from experiments.runner.api import Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import spread
from jaxaccel.boosting.gbrl import gbrl_init, gbrl_step
from jaxaccel.boosting.gbrl_actor_critic import TreeActorCritic
from jaxaccel.boosting.gbrl_agents import PPO, agent_init, train_step
from jaxaccel.boosting.gbrl_gymnasium import gbrl_gymnasium

ARMS = ("GBRL", "network")
POINTS = 20
"""Of a learning curve."""
TUNING_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment with the settings of PPO and of the trees."""

    agent: PPO
    trees: TreeActorCritic
    env: Any = None
    """In JAX; a MiniGrid is made by name."""


TASKS: Mapping[str, Task] = {
    "cartpole": Task(PPO(value_coefficient=0.87), TreeActorCritic(1, 0.029, 0.015), CartPole()),
    "key_door": Task(
        PPO(entropy_coefficient=0.01, value_coefficient=0.87), TreeActorCritic(1, 0.17, 0.01, n_bins=8), KeyDoor()
    ),
}
MINIGRID = Task(
    PPO(envs=16, steps=256, batch_size=512, epochs=20), TreeActorCritic(1, 0.17, 0.01, n_bins=64, score="cosine")
)


@dataclasses.dataclass(frozen=True)
class GBRLConfig(Config):
    """PPO with boosted trees against PPO with networks."""

    tasks: tuple[str, ...] = ("cartpole", "key_door")
    """``cartpole``, ``key_door``, or names of MiniGrid's environments, which need the package minigrid."""
    steps: tuple[int, ...] = (51_200, 51_200)
    """Environment steps of a run, for each task."""
    tree_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors of the trees' learning rates that are tried."""
    network_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates of Adam that are tried."""
    sizes: tuple[tuple[int, int, int], ...] = ((512, 4, 3), (4096, 4, 3))
    """Rows, columns and outputs that a tree is timed with."""
    repeats: int = 7
    """Turns of timing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates("tree_rates", self.tree_rates)
        check_rates("network_rates", self.network_rates)
        unknown = [name for name in self.tasks if name not in TASKS and not name.startswith("MiniGrid-")]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be some of {', '.join(TASKS)} and MiniGrid-…, got {self.tasks}")
        if len(self.steps) != len(self.tasks):
            raise ValueError(f"steps must have a number for each of {len(self.tasks)} tasks, got {self.steps}")
        for name, steps in zip(self.tasks, self.steps, strict=True):
            rows = TASKS.get(name, MINIGRID).agent.rows
            if steps < rows or steps % rows:
                raise ValueError(f"steps of {name} must be a multiple of a rollout's {rows}, got {steps}")
        if self.repeats < 3:
            raise ValueError(f"repeats must be at least 3, got {self.repeats}")


# Runs -----------------------------------------------------------------------------------------------------------------


def model_of(arm: str, task: Task, steps: int, categories: tuple[int, ...]) -> Any:
    """The arm's model with room for a run."""
    if arm == ARMS[0]:
        return dataclasses.replace(task.trees, capacity=steps // task.agent.rows * task.agent.updates_per_step)
    return MLPActorCritic(categories=categories)


def with_rate(params: Any, rate: float) -> Any:
    """The same parameters with another learning rate; programs need not be compiled again."""
    if isinstance(params, tuple) and hasattr(params[0], "trees"):
        return tuple(dataclasses.replace(state, rate=state.rate * rate) for state in params)
    return params._replace(rate=jnp.asarray(rate, jnp.float32))


def in_jax(arm: str, task: Task, steps: int) -> Callable[[float, int], dict[str, Any]]:
    """A function of rate and seed: one run."""
    model = model_of(arm, task, steps, task.env.categories)
    warmed: list[bool] = []

    def run(rate: float, seed: int) -> dict[str, Any]:
        state = agent_init(task.env, model, task.agent, jax.random.key(seed))
        state = dataclasses.replace(state, params=with_rate(state.params, rate))
        if not warmed:
            jax.block_until_ready(train_step(state, task.env, model, task.agent))
            warmed.append(True)
        found, began = [], time.perf_counter()
        for _ in range(steps // task.agent.rows):
            state, metrics = train_step(state, task.env, model, task.agent)
            found.append(metrics)
        found = jax.device_get(jax.block_until_ready(found))
        return _result(found, time.perf_counter() - began)

    return run


def in_minigrid(arm: str, name: str, steps: int) -> Callable[[float, int], dict[str, Any]]:
    """The same in a vector of MiniGrid's environments, on the host."""
    from experiments.data import minigrid

    agent = MINIGRID.agent
    model = _Rated(model_of(arm, MINIGRID, steps, minigrid.CATEGORIES))

    def run(rate: float, seed: int) -> dict[str, Any]:
        envs = minigrid.make(name, agent.envs)
        rated, began = dataclasses.replace(model, rate=rate), time.perf_counter()
        runs = gbrl_gymnasium(
            envs, rated, agent, iterations=steps // agent.rows, seed=seed, encode=minigrid.encoder(),
            categorical=tuple(range(len(minigrid.CATEGORIES))),
        )  # fmt: skip
        found = [jax.device_get(metrics) for _, metrics in runs]
        return _result(found, time.perf_counter() - began)

    return run


@dataclasses.dataclass(frozen=True)
class _Rated:
    """A model that begins with another rate."""

    inner: Any
    rate: float = 1.0

    def init(self, *arguments: Any) -> Any:
        return with_rate(self.inner.init(*arguments), self.rate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _result(found: list[Any], seconds: float) -> dict[str, Any]:
    """Mean return of each part of a run, that of its last fifth, and seconds without compilation."""
    episodes = np.array([float(m.episodes) for m in found])
    returns = np.array([float(m.returns) for m in found])
    parts = np.array_split(np.arange(len(found)), min(POINTS, len(found)))
    sums = [(returns[p].sum(), episodes[p].sum()) for p in parts]
    curve = [float(r / e) if e else None for r, e in sums]
    tail = slice(-max(1, len(found) // 5), None)
    final = float(returns[tail].sum() / max(episodes[tail].sum(), 1))
    return {"curve": curve, "ends": [int(p[-1]) + 1 for p in parts], "final": final, "seconds": seconds}


def compete(config: GBRLConfig, session: Session, name: str, steps: int) -> Generator[Progress, None, dict[str, Any]]:
    """All runs of a task: rates with the tuning seed, then every seed at the best."""
    task, found = TASKS.get(name, MINIGRID), {}
    for arm in ARMS:
        rates = config.tree_rates if arm == ARMS[0] else config.network_rates
        total = len(rates) + len(session.seeds)
        run = in_jax(arm, task, steps) if name in TASKS else in_minigrid(arm, name, steps)
        tuned = []
        for i, rate in enumerate(rates):
            yield Progress(f"{name}, {arm}", i, total, f"tuning, rate {rate:g}")
            tuned.append(run(rate, TUNING_SEED)["final"])
        best = rates[int(np.argmax(np.nan_to_num(tuned, nan=-np.inf)))]
        runs = []
        for i, seed in enumerate(session.seeds):
            yield Progress(f"{name}, {arm}", len(rates) + i, total, f"rate {best:g}, seed {seed}")
            runs.append(run(best, seed))
        yield Progress(f"{name}, {arm}", total, total)
        found[arm] = {"rate": best, "tuned": dict(zip(map(str, rates), tuned, strict=True)), "runs": runs}
    return found


def time_trees(config: GBRLConfig) -> list[dict[str, Any]]:
    """Seconds of a tree by histograms, and by a pass over all rows for each candidate."""
    found = []
    for rows, columns, outputs in config.sizes:
        keys = jax.random.split(jax.random.key(0))
        obs, gradients = jax.random.normal(keys[0], (rows, columns)), jax.random.normal(keys[1], (rows, outputs))
        state = gbrl_init(columns, outputs, capacity=1)
        step = jax.jit(gbrl_step)
        calls: dict[str, Callable[[], Any]] = {
            "histograms": functools.partial(step, state, obs, gradients),
            "passes": functools.partial(passes_over_rows, obs, gradients, n_bins=250, max_depth=4),
        }
        grown = step(state, obs, gradients).trees.feature[0]
        if not np.array_equal(grown, passes_over_rows(obs, gradients, n_bins=250, max_depth=4)[0]):
            raise AssertionError("both builders must find the same splits")
        timings = cost.time_in_turn(calls, repeats=config.repeats)
        found.append({"size": [rows, columns, outputs]} | {n: list(t.seconds) for n, t in timings.items()})
    return found


def run(config: GBRLConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Task after task; what is finished is kept when the run is interrupted."""
    found = {}
    for name, steps in zip(config.tasks, config.steps, strict=True):
        done = session.load(name)
        if done is None:
            done = yield from compete(config, session, name, steps)
            session.save(name, done)
        found[name] = done
    trees = session.load("trees")
    if trees is None:
        yield Progress("timing trees", 0, 1)
        trees = time_trees(config)
        session.save("trees", trees)
        yield Progress("timing trees", 1, 1)
    return compare(config, found, trees)


# What was found -------------------------------------------------------------------------------------------------------


def _finals(part: Mapping[str, Any], arm: str) -> list[float]:
    return [run["final"] for run in part[arm]["runs"]]


def _seconds(part: Mapping[str, Any], arm: str) -> list[float]:
    return [run["seconds"] for run in part[arm]["runs"]]


def compare(config: GBRLConfig, found: Mapping[str, Any], trees: list[dict[str, Any]]) -> Comparison:
    """Tables, figures, rows and the headline."""
    lines, figures, rows = [], [], []
    for (name, part), steps in zip(found.items(), config.steps, strict=True):
        agent = TASKS.get(name, MINIGRID).agent
        series = []
        for arm in ARMS:
            finals, seconds = _finals(part, arm), _seconds(part, arm)
            lines.append((name, arm, part[arm]["rate"], spread(finals), f"{np.median(seconds):.1f}"))
            curve = np.array([[np.nan if v is None else v for v in run["curve"]] for run in part[arm]["runs"]])
            known = ~np.isnan(curve).any(0)
            ends = np.array(part[arm]["runs"][0]["ends"], float)[known] * agent.rows
            values = (curve[:, known].mean(0), curve[:, known].min(0), curve[:, known].max(0))
            series.append(Series(arm, tuple(ends.tolist()), *(tuple(v.tolist()) for v in values)))
        figures.append(
            Figure(
                f"{name}: return of an episode",
                "environment steps",
                "mean return",
                tuple(series),
                note="mean over seeds, each arm at its own rate; band: smallest to largest",
            )
        )
        rows.append(_row(name, part, steps, agent))
    table = Table(
        "Return in the last fifth of a run", ("task", "model", "rate", "return", "s per run"), tuple(lines),
        "mean ± standard deviation over seeds; rates (of the trees: factors of 0.029 and 0.015 for CartPole, of 0.17 "
        "and 0.01 for grids) are tuned with another seed; seconds are medians without compilation",
    )  # fmt: skip
    costs = [
        (
            "x".join(map(str, part["size"])),
            *(f"{1e3 * np.median(part[n]):.2f}" for n in ("histograms", "passes")),
            f"{np.median(part['passes']) / np.median(part['histograms']):.1f}",
        )
        for part in trees
    ]
    cost_table = Table(
        "One tree of depth 4 with 250 bins, milliseconds",
        ("rows x columns x outputs", "histograms", "a pass over rows for each candidate", "ratio"),
        tuple(costs),
        "both compiled, same splits; passes are matrix products here, which is the fastest form they have",
    )
    return Comparison(
        headline=_headline(found),
        rows=tuple(rows),
        tables=(table, cost_table),
        figures=tuple(figures),
        notes=(
            "Networks: two hidden layers of 64 tanh units for each of policy and value, codes one-hot.",
            "PPO's other settings are those that suited trees on CartPole; networks were tuned by their rate alone.",
        ),
    )


def _row(name: str, part: Mapping[str, Any], steps: int, agent: PPO) -> dict[str, Any]:
    trees, network = (_seconds(part, arm) for arm in ARMS)
    return {
        "method": "gbrl",
        "method_config": {"rate": part[ARMS[0]]["rate"], "baseline_rate": part[ARMS[1]]["rate"]},
        "baseline": "network with Adam",
        "task": {"kind": "training", "name": name, "metric": "return", "higher_is_better": True},
        "model": {"family": "actor-critic", "params": None},
        "workload": {"batch": agent.batch_size, "steps": steps, "seeds": len(trees)},
        "cost_kind": "wall",
        "speedup": float(np.median(network) / np.median(trees)),
        "speedup_ci": stats.bootstrap_ratio(network, trees),
        "quality": float(np.mean(_finals(part, ARMS[0]))),
        "quality_baseline": float(np.mean(_finals(part, ARMS[1]))),
    }


def _headline(found: Mapping[str, Any]) -> str:
    words = []
    for name, part in found.items():
        trees, network = (float(np.mean(_finals(part, arm))) for arm in ARMS)
        words.append(f"{name}: return {trees:.3g} with trees, {network:.3g} with networks")
    return "; ".join(words) + " (equal environment steps)"


EXPERIMENT = Experiment(
    name="gbrl",
    method="gbrl",
    claim="trees as actor and critic: better than networks on categories, equal on classic control",
    config=GBRLConfig,
    presets={
        "quick": GBRLConfig(seeds=3),
        "full": GBRLConfig(
            seeds=5,
            tasks=("MiniGrid-DoorKey-5x5-v0", "MiniGrid-FourRooms-v0", "MiniGrid-PutNear-6x6-N2-v0"),
            steps=(1_024_000, 1_024_000, 1_024_000),
            sizes=((512, 4, 3), (4096, 4, 3), (4096, 20, 5)),
        ),
    },
    run=run,
)
