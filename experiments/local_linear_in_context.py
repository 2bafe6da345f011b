"""A small transformer that learns to regress in context: local linear, softmax or linear attention in its layers.

Every sequence is a new task. For regression it is x₁, (x₁, y₁), x₂, (x₂, y₂), ... with y = f(x) + noise and a new f,
linear or linear on either side of a plane; the model predicts yᵢ at xᵢ. For recall it is a list of key-value pairs and
questions about them. The three models differ in nothing but what stands between their projections: same parameters at
the start, same data, each at its own best learning rate.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.block_topk_recall import SYMBOLS, BlockTopKRecallConfig, Recall
from experiments.runner.api import Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import Sweep, milliseconds, spread
from experiments.runner.train import Arm, Task
from experiments.runner.trial import TrialResult
from experiments.tasks import count_parameters, functional
from jaxaccel.attention import LocalLinearAttention

Kind = Literal["linear", "piecewise", "recall"]
RIDGE = "least squares"


@dataclasses.dataclass(frozen=True)
class LocalLinearInContextConfig(Config):
    """A transformer with local linear, softmax or linear attention on tasks in context."""

    tasks: tuple[Kind, ...] = ("linear",)
    """Linear functions, functions that are linear on two sides of a plane, recall of values by key."""
    size: int = 8
    """Size of x."""
    points: int = 24
    """Pairs of a sequence."""
    noise: float = 0.1
    """Standard deviation of the noise on y, whose variance without it is 1."""
    pairs: int = 16
    """Key-value pairs of a recall sequence."""
    questions: int = 8
    """Its questions."""
    layers: int = 2
    """Layers of the model."""
    width: int = 32
    """Its width."""
    heads: int = 2
    """Its heads."""
    batch_size: int = 32
    """Sequences per step."""
    steps: int = 500
    """Training steps."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Of Adam; every model is tuned over the same grid with the first seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates("learning_rates", self.learning_rates)
        for name in ("size", "points", "layers", "width", "heads", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be one or more different ones, got {self.tasks}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be at least 0 and finite, got {self.noise}")
        if not 1 <= self.questions <= self.pairs <= SYMBOLS:
            raise ValueError(f"1 <= questions ({self.questions}) <= pairs ({self.pairs}) <= {SYMBOLS} is needed")


# Data -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Functions:
    """Fresh functions for every step: ``{"x": f32[steps, B, n, d], "y": f32[steps, B, n]}``."""

    config: LocalLinearInContextConfig
    kind: Kind
    process_local: bool = False

    def chunk(self, seed: int, start: int, steps: int) -> Any:
        """Sequences of steps ``start`` to ``start + steps``; each step has a generator of its own."""
        parts = [self.sequences(np.random.default_rng((seed, start + i)), self.config.batch_size) for i in range(steps)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def sequences(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """``count`` sequences; x is N(0, 1), weights are N(0, 1/d)."""
        c = self.config
        x = rng.normal(size=(count, c.points, c.size))
        weights = rng.normal(size=(2, count, c.size, 1)) / np.sqrt(c.size)
        first, second = (x @ weights)[..., 0]
        y = first
        if self.kind == "piecewise":
            plane = rng.normal(size=(count, c.size, 1))
            y = np.where((x @ plane)[..., 0] > 0, first, second)
        y = y + c.noise * rng.normal(size=y.shape)
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def least_squares(config: LocalLinearInContextConfig, data: dict[str, np.ndarray]) -> np.ndarray:
    """Squared error [n] of ridge regression on the pairs before, with the best ridge for linear functions."""
    x, y = data["x"].astype(np.float64), data["y"].astype(np.float64)
    ridge = max(config.noise, 1e-4) ** 2 * config.size
    errors = []
    for i in range(x.shape[1]):
        a, b = x[:, :i], y[:, :i, None]
        gram = a.swapaxes(1, 2) @ a + ridge * np.eye(config.size)
        weights = np.linalg.solve(gram, a.swapaxes(1, 2) @ b)
        errors.append(np.mean((np.einsum("bd,bd->b", x[:, i], weights[..., 0]) - y[:, i]) ** 2))
    return np.asarray(errors)


# Models ---------------------------------------------------------------------------------------------------------------


class SoftmaxAttention(LocalLinearAttention):
    """The same projections around softmax attention; the ridge is not used."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Softmax attention."""
        return jax.nn.dot_product_attention(q, k, v, scale=self.scale, mask=mask, is_causal=self.causal)


class LinearAttention(LocalLinearAttention):
    """The same projections around linear attention, the mean of v (q·k) over the keys seen."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Linear attention; sequences are short, so scores are built."""
        scores = self.scale * jnp.tril(jnp.einsum("btnh,bsnh->bnts", q, k))
        count = jnp.arange(1, q.shape[1] + 1)[:, None, None]
        return jnp.einsum("bnts,bsnh->btnh", scores, v) / count


ATTENTION: dict[str, type[LocalLinearAttention]] = {
    "softmax": SoftmaxAttention,
    "linear attention": LinearAttention,
    "LLA": LocalLinearAttention,
}


class Transformer(nnx.Module):
    """Pre-norm blocks between two projections; no positions, since what is asked for does not depend on the order."""

    def __init__(
        self, kind: str, inputs: int, outputs: int, config: LocalLinearInContextConfig, *, rngs: nnx.Rngs
    ) -> None:
        width = config.width
        self.embed = nnx.Linear(inputs, width, rngs=rngs)
        self.attention = nnx.List([ATTENTION[kind](width, config.heads, rngs=rngs) for _ in range(config.layers)])
        self.up = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(config.layers)])
        self.down = nnx.List([nnx.Linear(4 * width, width, rngs=rngs) for _ in range(config.layers)])
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2 * config.layers + 1)])
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs [B, T, O] of inputs [B, T, I]."""
        x = self.embed(x)
        for i, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * i](x))
            x = x + self.down[i](jax.nn.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[-1](x))


def _inputs(data: Any) -> jax.Array:
    """x₁, (x₁, y₁), x₂, ... as [B, 2n, d + 2]: x, y where it is known, and whether it is."""
    x, y = data["x"], data["y"][..., None]
    asked = jnp.concatenate([x, jnp.zeros_like(y), jnp.zeros_like(y)], -1)
    known = jnp.concatenate([x, y, jnp.ones_like(y)], -1)
    return jnp.stack([asked, known], 2).reshape(x.shape[0], -1, x.shape[-1] + 2)


def regression_task(config: LocalLinearInContextConfig, kind: Kind, attention: str) -> Task:
    """Regression in context; ``final`` gives the squared error after every number of pairs."""
    data = Functions(config, kind)
    init, apply = functional(lambda rngs: Transformer(attention, config.size + 2, 1, config, rngs=rngs))

    def errors(params: Any, state: Any, batch: Any, *, train: bool) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, _inputs(batch), train=train)
        return jnp.mean((out[:, ::2, 0] - batch["y"]) ** 2, 0), state

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        found, state = errors(params, state, batch, train=True)
        return found.mean(), state

    def final(params: Any, state: Any, data: Any, key: jax.Array) -> dict[str, jax.Array]:
        found, _ = errors(params, state, data, train=False)
        return {"loss": found.mean()} | {f"after {i}": error for i, error in enumerate(found)}

    return _task(
        config,
        f"{kind}-functions-{attention.replace(' ', '-')}",
        init,
        loss,
        lambda params, state, data, key: {"val_loss": errors(params, state, data, train=False)[0].mean()},
        final,
        data,
        {"dataset": f"{kind}-functions", "n_features": config.size, "seq_len": 2 * config.points},
    )


def recall_task(config: LocalLinearInContextConfig, attention: str) -> Task:
    """Recall of values by key, as in `experiments.block_topk_recall`, without noise between the pairs."""
    data = Recall(
        BlockTopKRecallConfig(
            pairs=config.pairs, questions=config.questions, noise=0, batch_size=config.batch_size, steps=config.steps
        )
    )
    vocabulary = 3 * SYMBOLS + 1
    init, apply = functional(lambda rngs: Transformer(attention, 2 * vocabulary, vocabulary, config, rngs=rngs))

    def scores(params: Any, state: Any, batch: Any, *, train: bool) -> tuple[jax.Array, jax.Array, Any]:
        tokens = batch["tokens"]
        before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]  # a value then carries its key
        inputs = jnp.concatenate([jax.nn.one_hot(part, vocabulary) for part in (tokens, before)], -1)
        logits, state = apply(params, state, inputs[:, :-1], train=train)
        scored, target = batch["scored"][:, :-1], tokens[:, 1:]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        right = jnp.argmax(logits, -1) == target
        total = jnp.sum(scored)
        return jnp.sum(entropy * scored) / total, 1 - jnp.sum(right * scored) / total, state

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        entropy, _, state = scores(params, state, batch, train=True)
        return entropy, state

    return _task(
        config,
        f"recall-{attention.replace(' ', '-')}",
        init,
        loss,
        lambda params, state, data, key: {"val_loss": scores(params, state, data, train=False)[0]},
        lambda params, state, data, key: {"loss": scores(params, state, data, train=False)[1]},
        data,
        {"dataset": "recall", "seq_len": 2 * config.pairs + 3 * config.questions},
    )


def _task(
    config: LocalLinearInContextConfig,
    name: str,
    init: Any,
    loss: Any,
    evaluate: Callable[..., dict[str, jax.Array]],
    final: Callable[..., dict[str, jax.Array]],
    data: Any,
    description: dict[str, Any],
) -> Task:
    return Task(
        name=name,
        init=init,
        loss=loss,
        evaluate=evaluate,
        final=final,
        batches=data,
        validation=data.sequences(np.random.default_rng(10_001), 256),
        test=data.sequences(np.random.default_rng(10_002), 1024),
        steps=config.steps,
        eval_every=config.steps // 20 if config.steps % 20 == 0 else config.steps,
        metric="val_loss",
        higher_is_better=False,
        batch_size=config.batch_size,
        description={"kind": "training", **description},
        model={
            "family": "transformer",
            "params": count_parameters(init),
            "layers": config.layers,
            "width": config.width,
            "heads": config.heads,
            "kv_heads": config.heads,
            "dtype": "float32",
        },
    )


# The experiment -------------------------------------------------------------------------------------------------------

Sweeps = dict[tuple[Kind, str], Sweep]


def run(config: LocalLinearInContextConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Train every model on every task: the grid of rates with the first seed, the best with all."""
    sweeps: Sweeps = {}
    for kind in config.tasks:
        for attention in ATTENTION:
            task = recall_task(config, attention) if kind == "recall" else regression_task(config, kind, attention)
            arm = Arm(attention, optax.adam, config.learning_rates, method="local_linear_attention")
            sweeps[kind, attention] = yield from session.sweep(task, (arm,), tuning_seeds=1)
    return compare(config, sweeps)


def _best(sweeps: Sweeps, kind: Kind, attention: str) -> list[TrialResult]:
    return [t for t in sweeps[kind, attention].best(attention) if t.status == "ok"]


def _test(sweeps: Sweeps, kind: Kind, attention: str, metric: str = "loss") -> list[float]:
    return [t.final[f"test_{metric}"] for t in _best(sweeps, kind, attention)]


def compare(config: LocalLinearInContextConfig, sweeps: Sweeps) -> Comparison:
    """Tables, figures, rows and the headline."""
    regressions = [kind for kind in config.tasks if kind != "recall"]
    # The test sequences are the same for all.
    floor: dict[Kind, np.ndarray] = {k: least_squares(config, sweeps[k, "LLA"].task.test) for k in regressions}
    return Comparison(
        headline=_headline(config, sweeps, floor),
        rows=tuple(_row(sweeps, kind, other) for kind in config.tasks for other in ATTENTION if other != "LLA"),
        tables=(_quality(config, sweeps, floor), _equal_time(config, sweeps), _costs(config, sweeps)),
        figures=(
            *(_by_pairs(config, sweeps, kind, floor[kind]) for kind in regressions),
            *(_learning(sweeps, kind) for kind in config.tasks),
        ),
        notes=(
            f"{RIDGE} is ridge regression on the pairs before, with the ridge that is optimal for linear functions. "
            "It learns nothing and is told that functions are linear.",
            "The budget is in steps, and a step with LLA takes longer. At equal time LLA gets the steps that the whole "
            "budget of the others pays for; rates are constant, so a shorter run is the beginning of a longer one.",
            "Models this small that train this briefly show how fast each mechanism learns to regress, not what it "
            "can reach."
            if config.steps < 5000
            else "Learning rates are tuned with the first seed only.",
        ),
    )


def _quality(config: LocalLinearInContextConfig, sweeps: Sweeps, floor: dict[Kind, np.ndarray]) -> Table:
    rows = []
    for kind in config.tasks:
        reference = f"{floor[kind].mean():.3f}" if kind in floor else None
        rates = " / ".join(f"{sweeps[kind, name].best_learning_rate(name):g}" for name in ATTENTION)
        rows.append((kind, *(spread(_test(sweeps, kind, name)) for name in ATTENTION), reference, rates))
    return Table(
        "Error on the test sequences",
        ("task", *ATTENTION, RIDGE, "best rates"),
        tuple(rows),
        f"regression: squared error over all positions, noise {config.noise**2:g} included; recall: share of wrong "
        f"values; mean ± standard deviation over {config.seeds} seeds",
    )


def _seconds(sweeps: Sweeps, kind: Kind, attention: str) -> float:
    """Median seconds of a training step."""
    return float(np.median([t.cost["step_s"] or np.nan for t in sweeps[kind, attention].trials]))


def _in_the_time_of(config: LocalLinearInContextConfig, sweeps: Sweeps, kind: Kind, other: str) -> list[float]:
    """Validation losses of LLA, seed by seed, after the time that another model takes for all steps."""
    steps = config.steps * _seconds(sweeps, kind, other) / _seconds(sweeps, kind, "LLA")
    found = []
    for trial in _best(sweeps, kind, "LLA") if np.isfinite(steps) else ():
        at = trial.curves["eval_step"] <= max(steps, trial.curves["eval_step"][0])
        found.append(float(trial.curves["val_loss"][at][-1]))
    return found


def _equal_time(config: LocalLinearInContextConfig, sweeps: Sweeps) -> Table:
    """Validation loss of LLA after the time that the others take for all steps, beside theirs."""
    rows = []
    for kind in config.tasks:
        for other in ATTENTION:
            share = _seconds(sweeps, kind, other) / _seconds(sweeps, kind, "LLA")
            if other != "LLA" and np.isfinite(share):
                theirs = [t.final["val_loss"] for t in _best(sweeps, kind, other)]
                lla = _in_the_time_of(config, sweeps, kind, other)
                rows.append((kind, other, spread(theirs), f"{min(1.0, share):.0%}", spread(lla)))
    return Table(
        "At equal time: validation loss",
        ("task", "other", "other, all steps", "steps that LLA gets", "LLA then"),
        tuple(rows),
        "recall: cross-entropy in nats; the last evaluation before the time is up counts, or the first of all",
    )


def _costs(config: LocalLinearInContextConfig, sweeps: Sweeps) -> Table:
    rows = []
    for kind in config.tasks:
        for name in ATTENTION:
            trials = sweeps[kind, name].select(name)
            seconds = float(np.median([t.cost["train_s"] or 0.0 for t in trials]))
            rows.append((kind, name, milliseconds([t.cost["step_s"] for t in trials]), seconds))
    return Table(
        "Costs",
        ("task", "attention", "ms/step", "s per run"),
        tuple(rows),
        "medians over all runs, compilation apart",
    )


def _by_pairs(config: LocalLinearInContextConfig, sweeps: Sweeps, kind: Kind, floor: np.ndarray) -> Figure:
    x = tuple(float(i) for i in range(config.points))
    series = []
    for name in ATTENTION:
        if not _best(sweeps, kind, name):
            continue
        values = np.asarray([_test(sweeps, kind, name, f"after {i}") for i in range(config.points)])
        bands = (tuple(f(values, 1).tolist()) for f in (np.mean, np.min, np.max))
        series.append(Series(name, x, *bands))
    series.append(Series(RIDGE, x, tuple(floor.tolist())))
    return Figure(
        f"Regression in context, {kind} functions",
        "pairs seen",
        "squared error",
        tuple(series),
        y_log=True,
        note="band: smallest to largest over seeds",
    )


def _learning(sweeps: Sweeps, kind: Kind) -> Figure:
    curves = [sweeps[kind, name].curves(title="").series for name in ATTENTION]
    return Figure(
        f"Learning {'to recall' if kind == 'recall' else f'{kind} functions'}",
        "training step",
        "validation loss",
        tuple(series for found in curves for series in found),
        y_log=True,
        note="each at its own best learning rate; band: smallest to largest over seeds",
    )


def _row(sweeps: Sweeps, kind: Kind, baseline: str) -> dict[str, Any]:
    """Seconds of a training step of the baseline over those of LLA, with what both reach in the same steps."""
    task = sweeps[kind, "LLA"].task
    old, new = (sweeps[kind, name].best(name) for name in (baseline, "LLA"))
    ok = [t for t in new if t.status == "ok"]
    seconds = [np.median([t.cost["step_s"] or np.nan for t in trials]) for trials in (old, new)]
    metric = "test_loss"
    quality = [[t.final[metric] for t in trials if t.status == "ok"] for trials in (new, old)]
    return {
        "method": "local_linear_attention",
        "method_config": {"part": "layer", "learning_rate": new[0].learning_rate},
        "baseline": baseline,
        "task": {
            **task.description,
            "name": f"in-context-{kind}",
            "metric": "errors" if kind == "recall" else "mse",
            "higher_is_better": False,
        },
        "model": dict(task.model),
        "workload": {"batch": task.batch_size, "steps": task.steps, "seeds": len(new)},
        "cost_kind": "wall",
        "speedup": float(seconds[0] / seconds[1]) if ok and np.isfinite(seconds).all() else None,
        "quality": float(np.mean(quality[0])) if quality[0] else None,
        "quality_baseline": float(np.mean(quality[1])) if quality[1] else None,
        "status": "ok" if ok else "diverged",
    }


def _headline(config: LocalLinearInContextConfig, sweeps: Sweeps, floor: dict[Kind, np.ndarray]) -> str:
    parts = []
    for kind in config.tasks:
        words = ", ".join(f"{name} {spread(_test(sweeps, kind, name))}" for name in reversed(ATTENTION))
        what = "wrong recalls" if kind == "recall" else f"squared error in context, {kind} functions"
        parts.append(f"{what}: {words}" + (f" ({RIDGE} {floor[kind].mean():.3f})" if kind in floor else ""))
    kind = config.tasks[0]
    slower = _seconds(sweeps, kind, "LLA") / _seconds(sweeps, kind, "softmax")
    then = spread(_in_the_time_of(config, sweeps, kind, "softmax"))
    theirs = spread([t.final["val_loss"] for t in _best(sweeps, kind, "softmax")])
    return (
        f"after {config.steps} steps, {'; '.join(parts)}; a step takes {slower:.1f} times softmax's, and in softmax's "
        f"time LLA's validation loss is {then}, softmax's {theirs}"
    )


EXPERIMENT = Experiment(
    name="local_linear_in_context",
    method="local_linear_attention",
    claim="better than softmax and linear attention on in-context regression, competitive on associative recall",
    config=LocalLinearInContextConfig,
    presets={
        "quick": LocalLinearInContextConfig(seeds=3),
        "full": LocalLinearInContextConfig(
            seeds=5,
            tasks=("linear", "piecewise", "recall"),
            size=16,
            points=64,
            pairs=32,
            questions=16,
            width=128,
            heads=4,
            batch_size=64,
            steps=20_000,
            learning_rates=(3e-4, 1e-3, 3e-3),
        ),
    },
    run=run,
)
