"""Step times of the optimizers, beside the time that moving the same arrays takes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import cost
from jaxaccel.optim import exadam, lion_lowp, pack_small_leaves, pack_tree, unpack_tree
from jaxaccel.optim.symbolic import LION_PROGRAM, as_transform

PARAMETERS = 10_000_000
LEAVES = (10, 1000)
TINY_LEAVES = (1000, 1_000_000)
"""Leaves and parameters of the tree that is packed."""


def tree(leaves: int, total: int) -> dict[str, jax.Array]:
    """A parameter tree of ``leaves`` equal leaves."""
    return {f"leaf{i:04d}": jnp.full((total // leaves,), 0.01 * (i + 1)) for i in range(leaves)}


class Stepper:
    """Applies an optimizer over and over to its own state, donating it, as a training loop does."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any) -> None:
        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(params)
        self.grads = grads

    def __call__(self) -> Any:
        """One step."""
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params


def moving(moments: int) -> optax.GradientTransformation:
    """An optimizer that only adds the gradient to the parameters and to each moment.

    It reads and writes the same arrays as a real one and computes nothing worth mentioning: the time to move the bytes.
    """
    return optax.GradientTransformation(
        lambda params: tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(moments)),
        lambda grads, state, params=None: (grads, jax.tree.map(jnp.add, state, (grads,) * moments)),
    )


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """EXAdam over AdamW, the Lion program over `optax.lion`, packed leaves over plain ones."""
    for leaves in LEAVES:
        params = tree(leaves, PARAMETERS)
        grads = jax.tree.map(lambda p: 0.1 * p, params)
        timings = cost.time_in_turn(
            {
                "exadam": Stepper(exadam(1e-3), params, grads),
                "adamw": Stepper(optax.adamw(1e-3), params, grads),
                "bytes": Stepper(moving(2), tree(1, PARAMETERS), tree(1, PARAMETERS)),
            },
            repeats=options.repeats,
        )
        where = f"10 M parameters in {leaves} leaves"
        yield _ratio(timings, "exadam", "adamw", f"exadam / optax.adamw, {where}", "<= 1.10")
        yield _ratio(timings, "exadam", "bytes", f"exadam, {where} / moving the same arrays as one leaf")
        yield _ratio(timings, "adamw", "bytes", f"optax.adamw, {where} / moving the same arrays as one leaf")

    params = tree(LEAVES[0], PARAMETERS)
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    timings = cost.time_in_turn(
        {
            "program": Stepper(as_transform(LION_PROGRAM, 1e-4), params, grads),
            "lion": Stepper(optax.lion(1e-4, weight_decay=0.1), params, grads),
            "adamw": Stepper(optax.adamw(1e-3), params, grads),
            "rounded": Stepper(lion_lowp(1e-4, stochastic_rounding=True, key=jax.random.key(0)), params, grads),
            "bytes": Stepper(moving(1), tree(1, PARAMETERS), tree(1, PARAMETERS)),
        },
        repeats=options.repeats,
    )
    yield _ratio(timings, "program", "lion", "Lion program as a transform / optax.lion, 10 M parameters", "<= 1.10")
    yield _ratio(timings, "lion", "adamw", "optax.lion / optax.adamw, 10 M parameters")
    yield _ratio(timings, "rounded", "lion", "lion_lowp, bf16 rounded stochastically / optax.lion, 10 M parameters")
    yield _ratio(timings, "lion", "bytes", "optax.lion, 10 M parameters / moving the same arrays as one leaf")

    params = tree(*TINY_LEAVES)
    packed, layout = pack_tree(params)

    def loss(values: Any) -> jax.Array:
        return sum(jnp.sum(v**2) for v in jax.tree.leaves(values))  # type: ignore[return-value]

    def train(loss_fn: Callable[[Any], jax.Array], start: Any) -> Callable[[], Any]:
        tx = optax.lion(1e-4)
        step = jax.jit(
            lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(jax.grad(loss_fn)(p), s, p)),
            donate_argnums=(0, 1),
        )
        held = [jax.tree.map(jnp.copy, start), tx.init(start)]

        def call() -> Any:
            held[0], held[1] = step(held[0], held[1])
            return held[0]

        return call

    plain = Stepper(optax.lion(1e-4), params, jax.tree.map(lambda p: 0.1 * p, params))
    timings = cost.time_in_turn(
        {
            "packed": Stepper(optax.lion(1e-4), packed, jax.tree.map(lambda p: 0.1 * p, packed)),
            "plain": plain,
            "wrapped": Stepper(pack_small_leaves(optax.lion(1e-4)), params, jax.tree.map(lambda p: 0.1 * p, params)),
            "packed_training": train(lambda p: loss(unpack_tree(p, layout)), packed),
            "plain_training": train(loss, params),
        },
        repeats=options.repeats,
    )
    yield _ratio(timings, "packed", "plain", "lion update, 1,000 leaves of 1k packed / plain", "<= 1.0")
    yield _ratio(timings, "wrapped", "plain", "the same with pack_small_leaves / plain")
    yield _ratio(timings, "packed_training", "plain_training", "the same with the gradient of a loss over all leaves")


def _ratio(timings: Any, top: str, bottom: str, name: str, goal: str = "") -> Measurement:
    value, interval = cost.ratio(timings, top, bottom)
    detail = f"{1e3 * timings[top].median:.2f} ms / {1e3 * timings[bottom].median:.2f} ms"
    return Measurement(name, value, interval, goal, detail)
