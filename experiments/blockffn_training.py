"""Training and measuring one network of the BlockFFN experiment: a scan of steps, each arm with its own losses."""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.blockffn_model import ExpertLM, Kind, balance_loss, remoe_factor, remoe_penalty
from experiments.data import hub
from experiments.data.arrays import Windows
from experiments.data.text import load_python_topics
from experiments.runner.api import Progress
from jaxaccel.moe import (
    activation_locality_loss,
    adaptive_factor,
    chunk_sparsification_loss,
    chunk_sparsity,
    dead_experts,
    from_dense,
    reuse_ratio,
    token_sparsity,
)

BALANCE = 1e-2
"""Factor on top-k's balance loss, as in Switch Transformers."""
REMOE_START = 1e-8
"""Where ReMoE's factor starts; its controller multiplies it."""
CHUNK = 25
"""Steps of one compiled call."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Sizes that all arms share."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int
    experts: int
    expert_dim: int
    top_k: int

    def graph(self, kind: Kind, seed: int) -> tuple[Any, Any]:
        """Structure and random parameters."""
        model = ExpertLM(kind, **dataclasses.asdict(self), rngs=nnx.Rngs(seed))
        return nnx.split(model)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a network is trained."""

    steps: int
    batch_size: int
    chunk_size: int
    locality: float
    sparsification: float
    stable_steps: int
    adjust_every: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Where text comes from: windows for training, and held-out windows [N, T + 1]."""

    train: Any  # chunk(seed, start, steps)
    validation: np.ndarray
    vocabulary: int


def load_data(dataset: str, length: int, batch_size: int, rows: int, **options: Any) -> Data:
    """Python's reference topics by characters, or texts of a hub's data set by bytes (column ``text``, as C4 has).

    Args:
        dataset: ``"topics"``, or a name or path for `hub.load`.
        length: T, tokens of a window.
        batch_size: windows of a training step.
        rows: held-out windows.
        options: go to `hub.load`.
    """
    if dataset == "topics":
        text = load_python_topics()
        places = np.linspace(0, len(text.validation) - length - 1, rows).astype(int)
        held = text.validation[places[:, None] + np.arange(length + 1)]
        return Data(Windows(text.train, length, batch_size), held, len(text.alphabet))

    def example(row: Any) -> dict[str, np.ndarray]:
        if "text" not in row:
            raise hub.DataError(f"{dataset} has columns {', '.join(sorted(row))}, expected text")
        letters = np.frombuffer(row["text"].encode()[: length + 1], np.uint8).astype(np.int32)
        return {"tokens": np.pad(letters, (0, length + 1 - len(letters)))}

    held = hub.take(dataset, "validation", example, rows, **options)["tokens"]
    return Data(hub.Stream(hub.load(dataset, "train", **options), example, batch_size), held, 256)


@functools.cache
def _program(
    graph: Any, kind: Kind, losses: bool, network: Network, schedule: Schedule
) -> tuple[Any, Any, Callable[..., Any]]:
    """Optimizer, controller of the factor, and the compiled chunk of steps."""
    factor = adaptive_factor(
        schedule.sparsification, stable_steps=schedule.stable_steps, adjust_every=schedule.adjust_every
    )

    def loss(params: Any, tokens: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
        out = nnx.merge(graph, params)(tokens[:, :-1])
        own = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean()
        layers, total, chunk = out.routing, own, jnp.zeros_like(own)
        if layers and kind == "blockffn" and losses:
            local = jnp.mean(jnp.stack([activation_locality_loss(r.logits) for r in layers]))
            size = schedule.chunk_size
            chunk = jnp.mean(jnp.stack([chunk_sparsification_loss(r.hidden, chunk_size=size) for r in layers]))
            total = own + schedule.locality * local + weight * chunk
        elif kind == "topk":
            total = own + BALANCE * sum(balance_loss(r) for r in layers) / len(layers)
        elif kind == "remoe":
            total = own + weight * sum(remoe_penalty(r, network.top_k) for r in layers) / len(layers)
        return total, (own, chunk, layers)

    def rate_at(rate: Any) -> optax.GradientTransformation:
        warmup = max(1, schedule.steps // 20)
        peak = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(schedule.steps, warmup + 1))
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(0.9, 0.95),
            optax.add_decayed_weights(0.1),
            optax.scale_by_schedule(peak),
            optax.scale(-rate),
        )

    @functools.partial(jax.jit, donate_argnums=(0,))
    def steps(carry: Any, batches: jax.Array, rate: Any) -> tuple[Any, jax.Array]:
        def step(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
            params, state, control = carry
            # The factor of a step does not depend on the loss of that step.
            weight = control if kind == "remoe" else factor.update(control, 0.0)[0]
            (_, (own, chunk, layers)), slope = jax.value_and_grad(loss, has_aux=True)(params, tokens, weight)
            updates, state = rate_at(rate).update(slope, state, params)
            control = (
                remoe_factor(control, layers, network.top_k) if kind == "remoe" else factor.update(control, chunk)[1]
            )
            return (optax.apply_updates(params, updates), state, control), own

        return jax.lax.scan(step, carry, batches)

    return rate_at, factor, steps


def train(
    graph: Any,
    params: Any,
    kind: Kind,
    data: Data,
    network: Network,
    schedule: Schedule,
    *,
    losses: bool,
    rate: float,
    seed: int,
    task: str,
) -> Generator[Progress, None, Any]:
    """Trained parameters; ``losses`` adds BlockFFN's two."""
    rate_at, factor, program = _program(graph, kind, losses, network, schedule)
    control = jnp.float32(REMOE_START) if kind == "remoe" else factor.init()
    # Copies: buffers are donated, and a start may be shared by arms, or by two fields of a state.
    carry = jax.tree.map(jnp.array, (params, rate_at(rate).init(params), control))
    for start in range(0, schedule.steps, CHUNK):
        count = min(CHUNK, schedule.steps - start)
        batches = jnp.asarray(data.train.chunk(seed, start, count)["tokens"], jnp.int32)
        carry, own = program(carry, batches, jnp.float32(rate))
        yield Progress(task, start + count, schedule.steps, f"loss {float(own[-1]):.3f}")
    return carry[0]


@functools.partial(jax.jit, static_argnames=("graph",))
def _validation_pass(params: Any, tokens: jax.Array, *, graph: Any) -> Any:
    out = nnx.merge(graph, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean(), out


def measure(graph: Any, params: Any, data: Data, counts: tuple[int, ...]) -> dict[str, Any]:
    """Validation loss, and what the routing of held-out text looks like, averaged over layers.

    ``union`` is the share of experts that ``n`` neighbouring tokens use, for each n of ``counts``.
    """
    value, out = _validation_pass(params, jnp.asarray(data.validation), graph=graph)
    found: dict[str, Any] = {"loss": float(value)}
    if out.routing:
        scores = [r.scores for r in out.routing]
        found |= {
            "tls": float(np.mean([token_sparsity(s) for s in scores])),
            "cls8": float(np.mean([chunk_sparsity(s, chunk_size=min(8, s.shape[1])) for s in scores])),
            "reuse": float(np.mean([reuse_ratio(s) for s in scores])),
            "dead": float(np.mean([dead_experts(s) for s in scores])),
            "union": {
                str(n): float(np.mean([1 - chunk_sparsity(s, chunk_size=min(n, s.shape[1])) for s in scores]))
                for n in counts
            },
        }
    return found


def converted(graph: Any, params: Any, data: Data, network: Network, seed: int) -> tuple[Any, Any, float]:
    """A BlockFFN model cut from a trained dense one, and the relative error of its layers' outputs on held-out text."""
    # The router takes the place of the neurons that the dense network has more.
    source = nnx.merge(graph, params)
    tokens = jnp.asarray(data.validation[:, :-1])
    inputs = [x.reshape(-1, x.shape[-1]) for x in source(tokens).inputs]
    trained = jnp.asarray(data.train.chunk(seed + 10_000, 0, 1)["tokens"][0, :, :-1], jnp.int32)
    given = [x.reshape(-1, x.shape[-1]) for x in source(trained).inputs]
    new_graph, _ = network.graph("blockffn", seed)
    target = nnx.merge(new_graph, network.graph("blockffn", seed)[1])
    errors = []
    neurons = network.experts * network.expert_dim
    for number, (x, seen) in enumerate(zip(inputs, given, strict=True)):
        dense = source.networks[number]
        up, down = dense.up[...].T, dense.down[...]
        strength = jnp.linalg.norm(up, axis=1) * jnp.linalg.norm(down, axis=1)
        kept = jnp.sort(jnp.argsort(-strength)[:neurons])
        layer = from_dense(
            up[kept], down[kept], seen, num_experts=network.experts, active=network.top_k, key=jax.random.key(seed)
        )
        for name, value in layer._asdict().items():
            getattr(target.networks[number], name)[...] = value
        wanted, got = dense(x)[0], target.networks[number](x)[0]
        errors.append(float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)))
    target.embed, target.positions, target.attention = source.embed, source.positions, source.attention
    target.norms, target.norm, target.head = source.norms, source.norm, source.head
    graph, params = nnx.split(target)
    return graph, params, float(np.mean(errors))
