"""Training as one pure function: what a task and an arm are, and the compiled step that the runner drives."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from experiments.runner.api import check_rates


class Batches(Protocol):
    """The data of a task, as a pure function of where training stands: that is what makes resuming exact."""

    @property
    def process_local(self) -> bool:
        """Whether `chunk` returns only the rows of this process (a stream read by several hosts)."""
        ...

    def chunk(self, seed: int, start: int, steps: int) -> Any:
        """Return host arrays ``[steps, B, ...]`` for steps ``start`` to ``start + steps`` of the run with ``seed``."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What all arms of a comparison share: data, model, initialisation, budget and metric.

    Attributes:
        name: for people and for records.
        init: ``key -> (params, model_state)``; ``model_state`` is whatever is not trained by gradients, often ``()``.
        loss: ``(params, model_state, batch, key) -> (loss, model_state)``, differentiated with respect to ``params``.
        evaluate: ``(params, model_state, data, key) -> {metric: scalar}``; jitted, called on ``validation``.
        batches: the training data.
        validation: arrays handed to ``evaluate`` while training.
        test: arrays handed to ``final`` once, after training; never used for any choice.
        steps: training steps of the budget.
        eval_every: steps between two evaluations; must divide ``steps``.
        metric: the metric that tuning looks at.
        higher_is_better: its direction.
        final: like ``evaluate`` but on ``test``; its metrics are reported with the prefix ``test_``.
        steps_per_dispatch: steps compiled into one `lax.scan`. Measured on CPU: scanning over 16 steps makes a small
            transformer 1.7 times faster and a small convolutional network 7 times slower (XLA's CPU convolutions use
            no threads inside a loop), so it is the task's to say. Must divide ``steps_per_sync``, its default.
        steps_per_sync: steps between two looks at the losses, which are also the moments at which a run can be saved
            or stopped. Must divide ``eval_every``, its default.
        feedback: metric that is passed to the optimizer as the extra argument ``accuracy`` after each evaluation.
        description: the ``task`` field of a record (see `jaxaccel.records`).
        model: the ``model`` field of a record.
        batch_size: rows per step, for the record.
    """

    name: str
    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
    evaluate: Callable[[Any, Any, Any, jax.Array], Mapping[str, jax.Array]]
    batches: Batches
    validation: Any
    test: Any
    steps: int
    eval_every: int
    metric: str
    higher_is_better: bool
    batch_size: int
    final: Callable[[Any, Any, Any, jax.Array], Mapping[str, jax.Array]] | None = None
    steps_per_dispatch: int | None = None
    steps_per_sync: int | None = None
    feedback: str | None = None
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eval_every < 1 or self.steps % self.eval_every:
            raise ValueError(f"steps ({self.steps}) must be a positive multiple of eval_every ({self.eval_every})")
        if self.eval_every % self.sync:
            raise ValueError(f"steps_per_sync ({self.sync}) must divide eval_every ({self.eval_every})")
        if self.sync % self.dispatch:
            raise ValueError(f"steps_per_dispatch ({self.dispatch}) must divide steps_per_sync ({self.sync})")

    @property
    def sync(self) -> int:
        """Steps between two moments at which the host waits for the devices."""
        return self.steps_per_sync or self.eval_every

    @property
    def dispatch(self) -> int:
        """Steps compiled into one dispatch."""
        return self.steps_per_dispatch or self.sync


@dataclasses.dataclass(frozen=True)
class Arm:
    """One contender: how its optimizer is made from a learning rate.

    ``optimizer`` is called with a traced scalar, so that one compiled program serves the whole tuning grid. ``loss``
    replaces the task's loss where the arm is a different objective. ``method`` and ``config`` are what a record calls
    the arm: its name in the catalogue (the arm's own name by default) and its options.
    """

    name: str
    optimizer: Callable[[Any], optax.GradientTransformation]
    learning_rates: tuple[float, ...]
    loss: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str | None = None

    def __post_init__(self) -> None:
        check_rates(f"arm {self.name!r}", self.learning_rates)


class TrainState(NamedTuple):
    """The whole state of a run; saving it and restoring it continues the run bit for bit."""

    params: Any
    model_state: Any
    opt_state: Any
    step: jax.Array  # i32[], steps done
    score: jax.Array  # f32[], the feedback metric of the last evaluation (0 before the first)


def init_state(task: Task, arm: Arm, key: jax.Array, learning_rate: ArrayLike) -> TrainState:
    """Initial state; ``key`` depends on the seed alone, so all arms start from the same parameters."""
    params, model_state = task.init(key)
    opt_state = arm.optimizer(learning_rate).init(params)
    return TrainState(params, model_state, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def train_chunk(
    task: Task,
    arm: Arm,
    state: TrainState,
    batches: Any,
    learning_rate: ArrayLike,
    key: jax.Array,
    evaluated: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """Run the steps of one dispatch.

    Args:
        task: the task (static).
        arm: the arm (static).
        state: state before.
        batches: pytree of ``[n, B, ...]``.
        learning_rate: f32[].
        key: the run's key; step ``i`` uses ``fold_in(key, i)``.
        evaluated: bool[], whether an evaluation happened just before. The first step of this chunk then tells the
            optimizer so through the extra argument ``epoch_end``.

    Returns:
        State after, and the losses ``[n]``.
    """
    tx = optax.with_extra_args_support(arm.optimizer(learning_rate))
    loss_fn = arm.loss or task.loss

    def step(carry: tuple[TrainState, jax.Array], batch: Any) -> tuple[tuple[TrainState, jax.Array], jax.Array]:
        state, evaluated = carry
        step_key = jax.random.fold_in(key, state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, model_state), grads = grad_fn(state.params, state.model_state, batch, step_key)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=loss, accuracy=state.score, epoch_end=evaluated
        )
        params = optax.apply_updates(state.params, updates)
        new = TrainState(params, model_state, opt_state, state.step + 1, state.score)
        return (new, jnp.zeros((), bool)), loss

    if task.dispatch == 1:  # no loop at all: a loop of one trip still costs a convolution its threads on CPU
        (state, _), loss = step((state, evaluated), jax.tree.map(lambda leaf: leaf[0], batches))
        return state, loss[None]
    (state, _), losses = jax.lax.scan(step, (state, evaluated), batches)
    return state, losses
