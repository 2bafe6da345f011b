"""Tables trained for several prices and seeds at once: one compiled program for each way to weigh steps."""

from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harmonica_model import Problem
from experiments.runner.api import Progress
from jaxaccel.caching import HarmonicaState, harmonica


def train_routers(
    problem: Problem,
    params: Any,
    *,
    proxy: str | None,
    betas: Sequence[float],
    seeds: Sequence[int],
    num_steps: int,
    epochs: int,
    batch: int,
    rate: float,
    threshold: float,
    refresh_every: int,
    task: str,
) -> Generator[Progress, None, np.ndarray]:
    """Train a table for each seed and price, side by side.

    Returns:
        Logits [seeds, betas, T, NB].
    """
    network, sampler = problem.network(num_steps)
    optimizer = optax.adamw(rate, weight_decay=0.0)

    def training(beta: Any) -> Any:
        return harmonica(
            network, sampler, num_branches=problem.config.num_branches, beta=beta, threshold=threshold, proxy=proxy,
            refresh_every=refresh_every, optimizer=optimizer,
        )  # fmt: skip

    # The epoch's number is shared: when λ is measured is then one decision, and not a selection of both outcomes.
    shared: Any = (0, 0, 0, None)
    axes: Any = HarmonicaState(*shared)

    def one(state: Any, beta: Any, params: Any, noise: Any, cond: Any) -> Any:
        return training(beta).epoch(state, params, noise, cond)[0]

    over_betas = jax.vmap(one, (axes, 0, None, None, None), axes)
    over_seeds = jax.jit(jax.vmap(over_betas, (axes, None, None, 0, 0), axes))
    keys = [jax.random.key(1000 + seed) for seed in seeds]
    starts = [training(0.0).init(key) for key in keys]  # the same start for all prices
    state = jax.tree.map(lambda *rows: jnp.stack([jnp.stack([row] * len(betas)) for row in rows]), *starts)
    state = state._replace(epoch=jnp.zeros((), jnp.int32))
    prices = jnp.asarray(betas, jnp.float32)
    for epoch in range(epochs):
        yield Progress(task, epoch, epochs)
        drawn = [problem.draw(jax.random.fold_in(key, epoch), batch) for key in keys]
        noise, cond = (jnp.stack(arrays) for arrays in zip(*drawn, strict=True))
        state = over_seeds(state, prices, params, noise, cond)
    yield Progress(task, epochs, epochs)
    return np.asarray(state.logits)
