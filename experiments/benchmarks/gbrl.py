"""GBRL against the gbrl package: updates, predictions and whole runs of PPO, with the same settings, one core each.

The package is no dependency: ``JAXACCEL_PEERS_PYTHON`` names an interpreter that has it, and Gymnasium. It runs in a
process of its own, is asked in turn, and times itself there. Without it, ours inside one compiled program is compared
with ours called from Python.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import gbrl_peer
from experiments.benchmarks import BenchOptions, Measurement, one_core
from experiments.gbrl import TASKS
from experiments.runner import cost
from jaxaccel.boosting.gbrl import GBRLState, gbrl_init, gbrl_predict, gbrl_step
from jaxaccel.boosting.gbrl_agents import agent_init, train_step

OURS, ALONE, PEER = "ours", "ours, called from Python", "gbrl"
UPDATES = ((512, 4, 3), (4096, 20, 5))
"""Rows, columns and outputs."""
PREDICTIONS = (1, 16, 512)
"""Rows."""
TREES = 1000
"""Of the ensemble that predicts."""
DEPTH, BINS, RATE = 4, 250, 0.1
TOGETHER = 20
"""Turns inside one compiled program."""
ROLLOUTS = 10
"""Of a run of PPO."""
MOST_REPEATS = 7
"""Updates of the package take up to seconds."""

Call = Callable[[], float]


class Peer:
    """The package, in a process that lives as long as the benchmark."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        # Its complaints come by the same pipe: one that nobody reads would fill up and stop it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )  # fmt: skip
        try:
            self.version = self.ask(job="version")["version"]
        except BaseException:
            self.close()
            raise

    def ask(self, **job: Any) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            RuntimeError: if the process ends before it answers.
        """
        stdin, stdout, said = self.process.stdin, self.process.stdout, ""
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; its last words follow
        for line in stdout:  # the package prints lines of its own
            if line.startswith("answer "):
                found: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return found
            said = (said + line)[-1000:]
        raise RuntimeError(f"the interpreter of JAXACCEL_PEERS_PYTHON failed: {said.strip()}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def find_peer() -> Peer | None:
    """The package in the interpreter that the environment names; ``None`` if it names none.

    Raises:
        RuntimeError: if that interpreter has no package.
    """
    python = os.environ.get("JAXACCEL_PEERS_PYTHON", "")
    # -P: the script's folder has files that are named as packages are.
    return Peer([python, "-P", gbrl_peer.__file__]) if python else None


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Updates, predictions, runs."""
    yield from one_core.on_one_core(__name__, here, options)


def here(options: BenchOptions) -> Iterator[Measurement]:
    """The same in this process."""
    peer = find_peer()
    repeats = min(options.repeats, MOST_REPEATS)
    try:
        for sizes in UPDATES:
            yield _update(peer, sizes, repeats)
        grown = ensemble(UPDATES[0], TREES)
        for rows in PREDICTIONS:
            yield _predict(peer, grown, rows, repeats)
        yield _play(peer, repeats)
    finally:
        if peer is not None:
            peer.close()


def _job(sizes: tuple[int, int, int]) -> dict[str, Any]:
    named = dict(zip(("rows", "columns", "outputs"), sizes, strict=True))
    return named | {"depth": DEPTH, "bins": BINS, "rate": RATE}


def _empty(sizes: tuple[int, int, int], capacity: int) -> GBRLState:
    return gbrl_init(
        sizes[1], sizes[2], capacity=capacity, max_depth=DEPTH, n_bins=BINS, learning_rate=RATE, score="cosine"
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="trees")
def _grow(state: GBRLState, obs: Any, gradients: Any, trees: int) -> GBRLState:
    return jax.lax.scan(lambda s, _: (gbrl_step(s, obs, gradients), None), state, length=trees)[0]


def ensemble(sizes: tuple[int, int, int], trees: int) -> GBRLState:
    """As many trees as the package's model has, grown on the same rows."""
    obs, gradients = gbrl_peer.data(_job(sizes))
    return _grow(_empty(sizes, trees), obs, gradients, trees)


def _timed(call: Callable[[], Any], turns: int = 1) -> Call:
    """A call that gives its seconds, over ``turns``."""

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(call())
        return (time.perf_counter() - began) / turns

    return run


def _in_turn(calls: Mapping[str, Call], repeats: int) -> tuple[dict[str, cost.Timing], dict[str, float]]:
    found, warming = cost.results_in_turn(calls, repeats)
    return {name: cost.Timing(tuple(seconds)) for name, seconds in found.items()}, warming


def _measurement(
    what: str, timed: Mapping[str, cost.Timing], peer: Peer | None, goal: str, detail: str = ""
) -> Measurement:
    """The package over ours; ours from Python over ours inside one program where there is no package."""
    top = ALONE if peer is None else PEER
    value, interval = cost.ratio(timed, top, OURS)
    parts = [f"{name} {1e3 * timing.median:.3g} ms" for name, timing in timed.items()]
    missing = "gbrl is not installed: JAXACCEL_PEERS_PYTHON" if peer is None else f"gbrl {peer.version}"
    detail = "; ".join([*parts, *filter(None, [detail]), missing])
    return Measurement(f"{what}: {top} / {OURS}", value, interval, goal if peer else "", detail)


def _update(peer: Peer | None, sizes: tuple[int, int, int], repeats: int) -> Measurement:
    obs, gradients = (jnp.asarray(a) for a in gbrl_peer.data(_job(sizes)))
    # Rows and gradients of their own for each step: nothing of a step is worked out before the loop.
    shifts = jnp.arange(TOGETHER, dtype=jnp.float32)
    many = jax.vmap(lambda s: (obs + 1e-3 * s, gradients * (1 + 1e-3 * s)))(shifts)

    @jax.jit
    def several(state: GBRLState, many: Any) -> GBRLState:
        return jax.lax.scan(lambda s, xs: (gbrl_step(s, *xs), None), state, many)[0]

    state = _empty(sizes, TOGETHER)
    calls = {
        OURS: _timed(lambda: several(state, many), TOGETHER),
        ALONE: _timed(lambda: gbrl_step(state, obs, gradients)),
    }
    if peer is not None:
        calls[PEER] = lambda: float(peer.ask(job="update", calls=3, **_job(sizes))["seconds"])
    timed, _ = _in_turn(calls, repeats)
    return _measurement(f"update, {sizes[0]} x {sizes[1]}, {sizes[2]} outputs", timed, peer, ">= 30")


def _predict(peer: Peer | None, grown: GBRLState, rows: int, repeats: int) -> Measurement:
    job = _job(UPDATES[0])
    obs = jnp.asarray(gbrl_peer.data(job)[0][:rows])
    many = obs + 1e-3 * jnp.arange(TOGETHER)[:, None, None]
    several = jax.jit(lambda state, many: jax.lax.map(lambda obs: gbrl_predict(state, obs), many))
    calls = {
        OURS: _timed(lambda: several(grown, many), TOGETHER),
        ALONE: _timed(lambda: gbrl_predict(grown, obs)),
    }
    if peer is not None:
        trees = grown.capacity
        calls[PEER] = lambda: float(peer.ask(job="predict", trees=trees, some=rows, calls=20, **job)["seconds"])
    timed, _ = _in_turn(calls, repeats)
    return _measurement(f"prediction, {grown.capacity} trees, {rows} rows", timed, peer, ">= 2")


def _play(peer: Peer | None, repeats: int) -> Measurement:
    """Environment steps and all updates of a run."""
    task = TASKS["cartpole"]
    agent, env = task.agent, task.env
    model = dataclasses.replace(task.trees, capacity=ROLLOUTS * agent.updates_per_step)
    returns: list[float] = []

    def run() -> Any:
        state = agent_init(env, model, agent, jax.random.key(0))
        for _ in range(ROLLOUTS):
            state, metrics = train_step(state, env, model, agent)
        returns[:] = [float(metrics.returns / jnp.maximum(metrics.episodes, 1))]
        return state

    calls = {OURS: _timed(run)}
    if peer is None:
        calls[ALONE] = _timed(run)
    else:
        job = {"depth": model.max_depth, "bins": model.n_bins, "envs": agent.envs, "steps": agent.steps,
               "epochs": agent.epochs, "batch": agent.batch, "rollouts": ROLLOUTS, "gamma": agent.gamma,
               "lam": agent.lam, "clip": agent.clip, "value_coefficient": agent.value_coefficient,
               "policy_rate": model.policy_rate, "value_rate": model.value_rate}  # fmt: skip
        calls[PEER] = lambda: float(peer.ask(job="play", **job)["seconds"])
    timed, warming = _in_turn(calls, min(repeats, 3))
    steps = ROLLOUTS * agent.rows
    speeds = ", ".join(f"{name} {steps / timing.median:,.0f} steps/s" for name, timing in timed.items())
    last = f"last mean return {np.mean(returns):.0f}"
    if peer is not None:
        last += f" and {peer.ask(job='solved')['return']:.0f}"
    detail = f"{speeds}; {last}; first run {warming[OURS]:.1f} s"
    return _measurement(f"PPO on CartPole, {steps:,} steps, {model.capacity} trees", timed, peer, "", detail)


if __name__ == "__main__":
    one_core.main(here, sys.argv[1])
