"""What a compressed prompt loses: recalling one value after SnapKV, and after simpler ways to keep few keys.

The decoder of `experiments.block_topk_recall` is trained with dense attention. A prompt of pairs among noise ends with
one question. It is read in full; then each layer's keys and values are cut down, and the prompt's last token is decoded
again, at its true position, against what was kept.
"""

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.block_topk_recall import BlockTopKRecallConfig, measured, recall_task
from experiments.recall_model import HEADS, KV_HEADS, attend, causal, embed, project, unembed
from experiments.runner.api import Cell, Comparison, Experiment, Figure, Progress, Series, Table
from experiments.runner.session import Session
from experiments.runner.sweep import Sweep, spread
from experiments.runner.train import Arm, Task
from jaxaccel.caching.snapkv import SnapKVSelection, compress, snapkv_select, snapkv_window

SNAPKV = {
    f"snapkv {pooling} {kernel} {aggregate}": (pooling, kernel, aggregate)
    for pooling, kernel in (("avg", 1), ("avg", 5), ("max", 5))  # a kernel of 1 does not pool
    for aggregate in ("mean", "none")
}
OTHERS = ("recent", "sink and recent", "random")
METHODS = (*SNAPKV, *OTHERS)


@dataclasses.dataclass(frozen=True)
class SnapKVRecallConfig(BlockTopKRecallConfig):
    """Recall of one value from a compressed prompt."""

    capacities: tuple[int, ...] = (24, 12)
    """Tokens of the prompt that are kept, the window's among them."""
    window: int = 2
    """Last tokens of the prompt, which vote and are always kept: the question."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        for capacity in self.capacities:
            if not max(self.window, self.num_sink) < capacity <= self.prompt:
                raise ValueError(f"capacities must be above window and num_sink, up to {self.prompt}, got {capacity}")

    @property
    def prompt(self) -> int:
        """Tokens of the prompt: pairs, noise, and one question."""
        return 2 * self.pairs + self.noise + 2


def choose(
    method: str, q: jax.Array, k: jax.Array, capacity: int, config: SnapKVRecallConfig, key: jax.Array
) -> SnapKVSelection:
    """What ``method`` keeps of rotated keys ``[B, T, K, H]``."""
    batch, length = k.shape[:2]
    if method in SNAPKV:
        pooling, kernel, aggregate = SNAPKV[method]
        return snapkv_select(
            snapkv_window(q, config.window),
            k,
            capacity=capacity,
            window=config.window,
            kernel_size=kernel,
            pooling=pooling,
            aggregate=aggregate,
        )
    shape = (batch, KV_HEADS, capacity)
    if method == "random":  # the window is kept here too
        votes = jax.random.uniform(key, (batch, KV_HEADS, length)).at[..., -config.window :].set(2.0)
        indices = jnp.sort(jax.lax.top_k(votes, capacity)[1], -1)
    else:
        sink = config.num_sink if method == "sink and recent" else 0
        places = jnp.concatenate([jnp.arange(sink), jnp.arange(length - capacity + sink, length)])
        indices = jnp.broadcast_to(places, shape)
    return SnapKVSelection(indices.astype(jnp.int32), jnp.full((batch,), capacity, jnp.int32))


def answer(
    params: Any, tokens: jax.Array, method: str, capacity: int, config: SnapKVRecallConfig, key: jax.Array
) -> jax.Array:
    """Logits ``[B, V]`` after the prompt ``tokens``, whose last token reads the compressed cache of every layer."""
    last = tokens.shape[1] - 1
    full = embed(params, tokens)
    x = full[:, -1:]
    for layer, part in zip(params["layers"], jax.random.split(key, len(params["layers"])), strict=True):
        q, k, v = project(layer, full)
        kept = choose(method, q, k, capacity, config, part)
        query, _, _ = project(layer, x, last)
        x = attend(layer, x, query, compress(k, kept), compress(v, kept), lambda s: jnp.ones(s.shape, bool))
        full = attend(layer, full, q, k, v, causal)
    return unembed(params, x)[:, 0]


def snapkv_task(config: SnapKVRecallConfig) -> Task:
    """Training of `recall_task`; ``final`` gives the accuracy of every way to compress."""

    def final(params: Any, state: Any, data: Any, key: jax.Array) -> dict[str, jax.Array]:
        def accuracy(method: str, capacity: int) -> jax.Array:
            def right(tokens: jax.Array) -> jax.Array:
                again = jax.random.fold_in(jax.random.fold_in(key, capacity), jnp.sum(tokens))
                logits = answer(params, tokens[None, : config.prompt], method, capacity, config, again)
                return jnp.argmax(logits[0], -1) == tokens[config.prompt]

            return jnp.mean(jax.lax.map(right, data["tokens"], batch_size=config.batch_size))

        found = {f"{method} {c}": accuracy(method, c) for method in METHODS for c in config.capacities}
        return {"full": accuracy("recent", config.prompt), **found}

    return dataclasses.replace(recall_task(config), final=final)


def run(config: SnapKVRecallConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Train with dense attention, answer from compressed prompts."""
    sweep = yield from session.sweep(snapkv_task(config), (Arm("adam", optax.adam, (config.learning_rate,)),))
    return compare(config, sweep)


def _mean(sweep: Sweep, metric: str) -> float:
    return float(np.mean(measured(sweep, metric) or [float("nan")]))


def compare(config: SnapKVRecallConfig, sweep: Sweep) -> Comparison:
    """Table, figure, rows and the headline."""
    capacities = sorted(config.capacities)

    def means(method: str) -> str:
        return " / ".join(f"{_mean(sweep, f'{method} {c}'):.2f}" for c in config.capacities)

    cells: list[tuple[Cell, ...]] = [("full", spread(measured(sweep, "full")), *[""] * (len(capacities) - 1))]
    cells += [(m, *(spread(measured(sweep, f"{m} {c}")) for c in config.capacities)) for m in METHODS]
    series, rows = [], []
    for method in METHODS:
        found = [measured(sweep, f"{method} {c}") for c in capacities]
        if found[0]:
            middle = tuple(float(np.mean(v)) for v in found)
            ends = (tuple(map(min, found)), tuple(map(max, found)))
            series.append(Series(method, tuple(map(float, capacities)), middle, *ends))
    for method in SNAPKV:
        heads = HEADS if method.endswith("none") else KV_HEADS
        for capacity in config.capacities:
            right = measured(sweep, f"{method} {capacity}")
            if right:
                pooling, kernel, aggregate = SNAPKV[method]
                part = {"part": "snapkv", "capacity": capacity, "window": config.window, "kernel_size": kernel}
                rows.append(
                    {
                        "method": "llm_acceleration",
                        "method_config": part | {"pooling": pooling, "aggregate": aggregate},
                        "baseline": "full cache",
                        "task": {"name": "recall", "metric": "accuracy", "higher_is_better": True}
                        | dict(sweep.task.description),
                        "model": dict(sweep.task.model),
                        "workload": {"batch": config.batch_size, "steps": config.steps, "seeds": len(right)},
                        "cost_kind": "bytes",
                        "speedup": config.prompt * KV_HEADS / (capacity * heads),
                        "quality": float(np.mean(right)),
                        "quality_baseline": _mean(sweep, "full"),
                    }
                )
    shown = ("snapkv avg 5 mean", *OTHERS)
    words = ", ".join(f"{method} {means(method)}" for method in shown)
    kept = " / ".join(map(str, config.capacities))
    figure = Figure(
        "Recall from a compressed prompt",
        "tokens kept",
        "share of right values",
        tuple(series),
        note=f"of {config.prompt} tokens; band: smallest to largest over seeds",
    )
    return Comparison(
        headline=f"recall with {kept} of {config.prompt} tokens kept: {words} (full {_mean(sweep, 'full'):.2f})",
        rows=(*rows, *sweep.failure_rows("adam")),
        tables=(
            Table(
                "Recall: share of right values",
                ("cache", *(f"{c} of {config.prompt} tokens" for c in config.capacities)),
                tuple(cells),
                "mean ± standard deviation over seeds",
            ),
        ),
        figures=(figure, sweep.curves("val_accuracy")),
        notes=(
            "The question is the window that votes: this is the case SnapKV is made for. A second question asked of "
            "the same compressed prompt is not measured.",
            f'Aggregate "none" stores {HEADS} heads in place of {KV_HEADS}: its rows count those bytes.',
            "The last token is decoded again at its true position; its own key and value are those of the prefill.",
        ),
    )


EXPERIMENT = Experiment(
    name="snapkv_recall",
    method="llm_acceleration",
    claim="SnapKV keeps accuracy with a small part of the prompt's cache (16 long-context sets, comparable)",
    config=SnapKVRecallConfig,
    presets={
        "quick": SnapKVRecallConfig(seeds=3, language_steps=0),
        "full": SnapKVRecallConfig(
            seeds=5,
            pairs=32,
            questions=16,
            noise=912,
            block_size=16,
            budgets=(256, 128, 64),
            steps=5000,
            batch_size=64,
            learning_rate=1e-3,
            width=256,
            layers=4,
            language_steps=0,
            language_budgets=(256, 128),
            capacities=(128, 64, 32),
        ),
    },
    run=run,
)
