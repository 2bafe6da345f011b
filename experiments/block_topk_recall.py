"""What sparse attention loses: recalling values by key, and, for contrast, plain language modelling.

A small decoder is trained with dense attention to answer eight questions about 24 key-value pairs that stand among
noise. It is then evaluated without further training, every layer and every position reading only some of the keys:
the most relevant ones (oracle top-k), whole blocks chosen by their mean key (block top-k), or the first and the
latest (sink and window). Recall needs single tokens far away, so it shows what selection loses; language modelling at
this size hardly looks back and shows nothing, which is reported beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.arrays import Windows
from experiments.data.text import load_python_topics
from experiments.recall_model import HEADS, KV_HEADS, Keep, attend, causal, embed, project, unembed
from experiments.runner.api import Cell, Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import Sweep, spread
from experiments.runner.train import Arm, Task
from kernels_pallas.block_topk_attention import block_topk_mask, local_mask, topk_mask

KINDS = ("top-k", "block top-k", "sink and window")


@dataclasses.dataclass(frozen=True)
class BlockTopKRecallConfig(Config):
    """Recall with dense, top-k, block top-k and windowed attention at evaluation."""

    pairs: int = 24
    """Key-value pairs of a sequence."""
    questions: int = 8
    """Keys that are asked for."""
    noise: int = 56
    """Tokens of noise between the pairs."""
    budgets: tuple[int, ...] = (32, 16, 8)
    """Keys that a query may read."""
    block_size: int = 4
    """Tokens of a block."""
    num_sink: int = 4
    """First tokens that are always read; part of the budget."""
    steps: int = 300
    """Training steps."""
    batch_size: int = 32
    """Sequences per step."""
    learning_rate: float = 3e-3
    """Of Adam."""
    width: int = 64
    """Width of the model."""
    layers: int = 2
    """Layers of the model."""
    language_steps: int = 200
    """Training steps of the language model; 0 leaves it out."""
    language_length: int = 256
    """Characters of its context."""
    language_budgets: tuple[int, ...] = (64, 32)
    """Keys that a query of the language model may read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates("learning_rate", (self.learning_rate,))
        for name in ("pairs", "questions", "block_size", "steps", "batch_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.questions > self.pairs or self.pairs > SYMBOLS:
            raise ValueError(f"questions ({self.questions}) <= pairs ({self.pairs}) <= {SYMBOLS} is needed")
        if self.noise < 0 or self.noise % 2:
            raise ValueError(f"noise must be even and not negative, got {self.noise}")
        if self.width % (2 * HEADS):
            raise ValueError(f"width must be a multiple of {2 * HEADS}, got {self.width}")
        for budget in (*self.budgets, *self.language_budgets):
            if budget < self.num_sink + self.block_size:
                raise ValueError(f"a budget of {budget} does not hold {self.num_sink} sink tokens and a block")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs + self.noise + 3 * self.questions


SYMBOLS = 32
"""Different keys, values and noise tokens each; one more token announces a question."""


# The task ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recall:
    """Fresh sequences for every step: ``{"tokens": i32[steps, B, T], "scored": bool[steps, B, T]}``.

    Pairs (key, value) stand at random even places among noise; then come questions (Q, key, value). ``scored`` marks
    the keys of the questions, after which the value is to be predicted.
    """

    config: BlockTopKRecallConfig
    process_local: bool = False

    def chunk(self, seed: int, start: int, steps: int) -> Any:
        """Sequences of steps ``start`` to ``start + steps``; each step has a generator of its own."""
        parts = [self.sequences(np.random.default_rng((seed, start + i)), self.config.batch_size) for i in range(steps)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def sequences(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """``count`` sequences."""
        c = self.config
        first = 2 * c.pairs + c.noise
        tokens = rng.integers(2 * SYMBOLS, 3 * SYMBOLS, (count, c.length))
        keys = np.argsort(rng.random((count, SYMBOLS)), 1)[:, : c.pairs]
        values = rng.integers(SYMBOLS, 2 * SYMBOLS, (count, c.pairs))
        places = 2 * np.argsort(rng.random((count, first // 2)), 1)[:, : c.pairs]
        np.put_along_axis(tokens, places, keys, 1)
        np.put_along_axis(tokens, places + 1, values, 1)
        asked = np.argsort(rng.random((count, c.pairs)), 1)[:, : c.questions]
        tokens[:, first::3] = 3 * SYMBOLS
        tokens[:, first + 1 :: 3] = np.take_along_axis(keys, asked, 1)
        tokens[:, first + 2 :: 3] = np.take_along_axis(values, asked, 1)
        scored = np.zeros((count, c.length), bool)
        scored[:, first + 1 :: 3] = True
        return {"tokens": tokens.astype(np.int32), "scored": scored}


# The model ---------------------------------------------------------------------------------------------------------


def init_model(key: jax.Array, *, vocabulary: int, width: int, layers: int) -> dict[str, Any]:
    """Parameters of a pre-norm decoder with rotary positions and two query heads per KV head."""
    size = width // HEADS
    shapes = {
        "q": (width, width),
        "kv": (width, 2 * KV_HEADS * size),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    keys = iter(jax.random.split(key, 3 + layers * len(shapes)))

    def matrix(shape: tuple[int, int], scale: float = 1.0) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    return {
        "embed": jax.random.normal(next(keys), (vocabulary, width)),
        "embed_previous": jax.random.normal(next(keys), (vocabulary, width)),
        "head": matrix((width, vocabulary)),
        "layers": [
            {name: matrix(shape) for name, shape in shapes.items()}
            | {"attention_norm": jnp.ones(width), "mlp_norm": jnp.ones(width)}
            for _ in range(layers)
        ],
        "norm": jnp.ones(width),
    }


def apply_model(params: Any, tokens: jax.Array, keep: Keep | None = None) -> jax.Array:
    """Logits of the next token, ``[B, T, V]``.

    Args:
        params: of `init_model`.
        tokens: i32 ``[B, T]``.
        keep: chooses the keys: from logits ``[B, N, T, S]`` to the causal mask of what is read. All earlier keys by
            default.
    """
    x = embed(params, tokens)
    for layer in params["layers"]:
        x = attend(layer, x, *project(layer, x), keep or causal)
    return unembed(params, x)


def selection(kind: str, budget: int, config: BlockTopKRecallConfig) -> Keep:
    """The mask of one kind of attention with ``budget`` keys, the sink's among them."""
    rest = budget - config.num_sink
    if kind == "top-k":
        return functools.partial(topk_mask, num_kv_heads=KV_HEADS, topk=rest, num_sink=config.num_sink)
    if kind == "block top-k":
        return functools.partial(
            block_topk_mask,
            num_kv_heads=KV_HEADS,
            block_size=config.block_size,
            num_blocks=rest // config.block_size,
            num_sink=config.num_sink,
            block_offset=config.num_sink,  # the authors' layout: aligned blocks would read a whole block of sink
        )
    return functools.partial(local_mask, num_sink=config.num_sink, num_local=rest)


# The experiment ----------------------------------------------------------------------------------------------------


def _measurements(
    config: BlockTopKRecallConfig,
    budgets: Sequence[int],
    measure: Callable[[Any, Any, Keep | None], jax.Array],
) -> Callable[[Any, Any, Any, jax.Array], dict[str, jax.Array]]:
    """All kinds of attention with all budgets, as metrics ``kind budget``; some sequences at a time, for memory."""

    def final(params: Any, state: Any, data: Any, key: jax.Array) -> dict[str, jax.Array]:
        def on(keep: Keep | None) -> jax.Array:
            one = lambda row: measure(params, jax.tree.map(lambda leaf: leaf[None], row), keep)  # noqa: E731
            return jax.lax.map(one, data, batch_size=32).mean()

        chosen = {f"{kind} {b}": on(selection(kind, b, config)) for kind in KINDS for b in budgets}
        return {"dense": on(None), **chosen}

    return final


def recall_task(config: BlockTopKRecallConfig) -> Task:
    """Training on recall; ``final`` gives the accuracy of every kind of attention."""
    vocabulary = 3 * SYMBOLS + 1
    data = Recall(config)

    def init(key: jax.Array) -> tuple[Any, Any]:
        return init_model(key, vocabulary=vocabulary, width=config.width, layers=config.layers), ()

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits = apply_model(params, batch["tokens"])[:, :-1]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        scored = batch["scored"][:, :-1]
        return jnp.sum(entropy * scored) / jnp.sum(scored), state

    def accuracy(params: Any, data: Any, keep: Keep | None) -> jax.Array:
        right = jnp.argmax(apply_model(params, data["tokens"], keep), -1)[:, :-1] == data["tokens"][:, 1:]
        scored = data["scored"][:, :-1]
        return jnp.sum(right * scored) / jnp.sum(scored)

    return Task(
        name="recall",
        init=init,
        loss=loss,
        evaluate=lambda params, state, data, key: {"val_accuracy": accuracy(params, data, None)},
        final=_measurements(config, config.budgets, accuracy),
        batches=data,
        validation=data.sequences(np.random.default_rng(10_001), 64),
        test=data.sequences(np.random.default_rng(10_002), 128),
        steps=config.steps,
        eval_every=_interval(config.steps),
        metric="val_accuracy",
        higher_is_better=True,
        batch_size=config.batch_size,
        description={"kind": "inference", "modality": "text", "dataset": "recall", "seq_len": config.length},
        model=_model(config, init),
    )


def language_task(config: BlockTopKRecallConfig) -> Task:
    """Training on the text that ships with Python; ``final`` gives nats per character of every kind of attention."""
    text = load_python_topics()
    length = config.language_length

    def init(key: jax.Array) -> tuple[Any, Any]:
        return init_model(key, vocabulary=len(text.alphabet), width=config.width, layers=config.layers), ()

    def entropy(params: Any, data: Any, keep: Keep | None) -> jax.Array:
        tokens = data["tokens"]
        logits = apply_model(params, tokens[:, :-1], keep)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def windows(sequence: np.ndarray, count: int) -> dict[str, np.ndarray]:
        starts = np.linspace(0, len(sequence) - length - 1, count).astype(np.int64)
        return {"tokens": sequence[starts[:, None] + np.arange(length + 1)]}

    return Task(
        name="python-text",
        init=init,
        loss=lambda params, state, batch, key: (entropy(params, batch, None), state),
        evaluate=lambda params, state, data, key: {"val_loss": entropy(params, data, None)},
        final=_measurements(config, config.language_budgets, entropy),
        batches=Windows(text.train, length, max(1, config.batch_size // 4)),
        validation=windows(text.validation, 16),
        test=windows(text.test, 32),
        steps=config.language_steps,
        eval_every=_interval(config.language_steps),
        metric="val_loss",
        higher_is_better=False,
        batch_size=max(1, config.batch_size // 4),
        description={"kind": "inference", "modality": "text", "dataset": "pydoc-topics", "seq_len": length},
        model=_model(config, init),
    )


def _interval(steps: int) -> int:
    """A tenth of the steps, where that is whole."""
    return steps // 10 if steps % 10 == 0 else steps


def _model(config: BlockTopKRecallConfig, init: Callable[[jax.Array], tuple[Any, Any]]) -> dict[str, Any]:
    params, _ = jax.eval_shape(init, jax.random.key(0))
    return {
        "family": "decoder",
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "layers": config.layers,
        "width": config.width,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "dtype": "float32",
    }


def run(config: BlockTopKRecallConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Train with dense attention, evaluate with all kinds; then the same on text."""
    arm = Arm("adam", optax.adam, (config.learning_rate,))
    recall = yield from session.sweep(recall_task(config), (arm,))
    language = None
    if config.language_steps:
        language = yield from session.sweep(language_task(config), (arm,))
    return compare(config, recall, language)


def measured(sweep: Sweep, metric: str) -> list[float]:
    """A measurement on test data, of all seeds whose training ended well."""
    return [trial.final[f"test_{metric}"] for trial in sweep.trials if trial.status == "ok"]


def compare(config: BlockTopKRecallConfig, recall: Sweep, language: Sweep | None) -> Comparison:
    """Tables, figures, rows and the headline."""
    dense = measured(recall, "dense")
    tables = [_table(config, recall, config.budgets, "Recall: share of right values", config.length)]
    if language is not None:
        tables.append(
            _table(
                config,
                language,
                config.language_budgets,
                "Language model: nats per character, lower is better",
                config.language_length,
                difference=True,
            )
        )
    figure = Figure(
        "Recall with fewer keys",
        "keys read by a query",
        "share of right values",
        (
            *(_series(recall, kind, config.budgets) for kind in KINDS),
            Series("dense", tuple(map(float, sorted(config.budgets))), (float(np.mean(dense)),) * len(config.budgets)),
        ),
        note=f"of {config.length} keys; trained with dense attention; band: smallest to largest over seeds",
    )
    return Comparison(
        headline=_headline(config, recall, language),
        rows=(*_rows(config, recall), *recall.failure_rows("adam")),
        tables=tuple(tables),
        figures=(figure, recall.curves("val_accuracy")),
        notes=(
            "Every layer and every position is sparse at evaluation, without further training. The authors keep the "
            "first layer dense, which would make it easier.",
            "Budgets count the sink; block top-k also reads the tokens that do not fill a block yet, up to "
            f"{config.block_size - 1} more. Top-k looks at every key before it chooses: it is a bound, not a method.",
            "The model and the task are toys: the order of the three kinds is what carries over, not the numbers.",
        ),
    )


def _table(
    config: BlockTopKRecallConfig,
    sweep: Sweep,
    budgets: Sequence[int],
    title: str,
    length: int,
    *,
    difference: bool = False,
) -> Table:
    dense = np.asarray(measured(sweep, "dense"))
    rows: list[tuple[Cell, ...]] = [("dense", spread(dense.tolist()), *[""] * (len(budgets) - 1))]
    for kind in KINDS:
        values = [np.asarray(measured(sweep, f"{kind} {b}")) for b in budgets]
        rows.append((kind, *(spread((v - dense if difference else v).tolist()) for v in values)))
    note = "mean ± standard deviation over seeds"
    if difference:
        note += "; the sparse rows are differences to dense, seed by seed"
    return Table(title, ("attention", *(f"{b} of {length} keys" for b in budgets)), tuple(rows), note)


def _series(sweep: Sweep, kind: str, budgets: Sequence[int]) -> Series:
    budgets = sorted(budgets)
    values = [measured(sweep, f"{kind} {b}") for b in budgets]
    return Series(
        kind,
        tuple(map(float, budgets)),
        tuple(float(np.mean(v)) for v in values),
        tuple(map(min, values)),
        tuple(map(max, values)),
    )


def _rows(config: BlockTopKRecallConfig, sweep: Sweep) -> list[dict[str, Any]]:
    """Keys and values read in a step over those of dense attention, and what accuracy is left."""
    dense, length, rows = measured(sweep, "dense"), config.length, []
    for budget in config.budgets:
        read = 2 * budget + length / config.block_size  # keys and values of the budget, and one mean key a block
        found = measured(sweep, f"block top-k {budget}")
        if found:
            rows.append(
                {
                    "method": "kinetics",
                    "method_config": {"part": "block top-k", "budget": budget, "block_size": config.block_size},
                    "baseline": "dense attention",
                    "task": {"name": "recall", "metric": "accuracy", "higher_is_better": True}
                    | dict(sweep.task.description),
                    "model": dict(sweep.task.model),
                    "workload": {"batch": config.batch_size, "steps": config.steps, "seeds": len(found)},
                    "cost_kind": "bytes",
                    "speedup": 2 * length / read,
                    "quality": float(np.mean(found)),
                    "quality_baseline": float(np.mean(dense)),
                }
            )
    return rows


def _headline(config: BlockTopKRecallConfig, recall: Sweep, language: Sweep | None) -> str:
    def mean(metric: str) -> str:
        return f"{np.mean(measured(recall, metric) or [float('nan')]):.2f}"

    parts = [f"{kind} {' / '.join(mean(f'{kind} {b}') for b in config.budgets)}" for kind in KINDS]
    words = (
        f"recall with {' / '.join(map(str, config.budgets))} of {config.length} keys: {', '.join(parts)} "
        f"(dense {mean('dense')})"
    )
    if language is not None:
        budget = min(config.language_budgets)
        dense = np.asarray(measured(language, "dense"))
        lost = (f"{np.mean(np.asarray(measured(language, f'{kind} {budget}')) - dense):+.3f}" for kind in KINDS)
        words += f"; nats that a language model loses with {budget} of {config.language_length}: {', '.join(lost)}"
    return words


EXPERIMENT = Experiment(
    name="block_topk_recall",
    method="kinetics",
    claim="block top-k tracks oracle top-k attention, while a sliding window is very poor (Qwen3, AIME24)",
    config=BlockTopKRecallConfig,
    presets={
        "quick": BlockTopKRecallConfig(seeds=3),
        "full": BlockTopKRecallConfig(
            seeds=5,
            pairs=32,
            questions=16,
            noise=912,
            budgets=(256, 128, 64),
            block_size=16,
            steps=5000,
            batch_size=64,
            learning_rate=1e-3,
            width=256,
            layers=4,
            language_steps=5000,
            language_length=1024,
            language_budgets=(256, 128),
        ),
    },
    run=run,
)
