"""GEB-1.3B's choices in small: grouped queries, pre- or post-norm, and measures against loss spikes.

One decoder, trained on bytes of source code, and three questions. Do 8 query heads that share 2 key-value heads lose
anything against 8 key-value heads? Which learning rates do pre-norm and post-norm bear? And at ten times the usual
rate, with clipping, do a shrunk embedding gradient and skipped steps make training calmer? Spikes are counted after the
fact, from the losses, by the same rule for all: a loss above twice its running mean.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import hub
from experiments.data.arrays import Windows
from experiments.data.source_code import load_stdlib_source
from experiments.runner.api import Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import Sweep, milliseconds, spread
from experiments.runner.train import Arm, Batches, Task
from experiments.runner.trial import TrialResult
from experiments.tasks import count_parameters
from jaxaccel.models.decoder import decoder_forward, decoder_logits, init_params
from jaxaccel.models.decoder_config import DecoderConfig, Norm
from jaxaccel.models.weights.tokenizer import Tokenizer
from jaxaccel.optim import (
    SpikeRule,
    init_spike_state,
    is_spike,
    scale_by_embedding_shrink,
    skip_on_spike,
    update_spike_state,
)


@dataclasses.dataclass(frozen=True)
class GebConfig(Config):
    """A small decoder with grouped or separate key-value heads, either norm, and measures against spikes."""

    dataset: Literal["source", "c4"] = "source"
    """source: bytes of Python's standard library. c4: streamed through Hugging Face datasets."""
    tokenizer: str = ""
    """A tokenizer.json for c4; bytes of UTF-8 if empty."""
    vocab_size: int = 256
    """Rows of the embedding."""
    layers: int = 2
    """Blocks."""
    width: int = 64
    """Width; heads of width / heads."""
    inner: int = 176
    """Width of the SwiGLU network."""
    heads: int = 8
    """Query heads, and key-value heads without grouping."""
    kv_heads: int = 2
    """Key-value heads with grouping."""
    context: int = 64
    """Tokens of a sequence."""
    batch_size: int = 8
    """Sequences per step: small, as spikes are a matter of small batches."""
    steps: int = 150
    """Training steps."""
    warmup_steps: int = 15
    """Of these, steps of a rising learning rate; a cosine to a tenth follows."""
    learning_rate: float = 3e-3
    """Usual peak rate of AdamW."""
    norm_learning_rates: tuple[float, ...] = (1e-3, 3e-3, 3e-2)
    """Peak rates at which norms are compared; must hold the usual one."""
    stress: float = 10.0
    """Factor on the usual rate under which measures against spikes are compared."""
    alpha: float = 0.1
    """Factor on the embedding's gradient."""
    bfloat16: bool = False
    """Activations in bfloat16; layers are then scanned."""
    validation_rows: int = 64
    """Sequences for validation, and as many for the test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates("norm_learning_rates", self.norm_learning_rates)
        if self.learning_rate not in self.norm_learning_rates:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is not in norm_learning_rates {self.norm_learning_rates}"
            )
        if not 1 < self.stress < float("inf"):
            raise ValueError(f"stress must be finite and more than 1, got {self.stress}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {self.alpha}")
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be at least 1 and less than steps ({self.steps})"
            )
        if self.width % (2 * self.heads):
            raise ValueError(f"width ({self.width}) must be a multiple of 2 · heads ({2 * self.heads})")
        if self.dataset == "source" and (self.vocab_size < 256 or self.tokenizer):
            raise ValueError("dataset 'source' is read as bytes: vocab_size must be at least 256, tokenizer empty")
        for name in ("batch_size", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.decoder(self.kv_heads, "pre")  # its own checks

    def decoder(self, kv_heads: int, norm: Norm) -> DecoderConfig:
        """The model's numbers."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=kv_heads,
            head_dim=self.width // self.heads,
            max_positions=self.context,
            norm=norm,
            dtype="bfloat16" if self.bfloat16 else None,
            scan_layers=self.bfloat16,
        )


# Data -----------------------------------------------------------------------------------------------------------------


def packed(source: Any, length: int, encode: Callable[[str], Sequence[int]]) -> Any:
    """Rows ``{"tokens": [length + 1]}`` of a streamed data set with a column "text": texts joined by 0, then cut."""

    def pack(rows: Any) -> dict[str, list[np.ndarray]]:
        ids = np.fromiter(itertools.chain.from_iterable([*encode(text), 0] for text in rows["text"]), np.int32)
        count = len(ids) // (length + 1)
        return {"tokens": list(ids[: count * (length + 1)].reshape(count, length + 1))}

    return source.select_columns(["text"]).map(pack, batched=True, batch_size=1000, remove_columns=["text"])


def c4_data(
    config: GebConfig, path: str = "allenai/c4", buffer: int = 10_000, **options: Any
) -> tuple[Batches, np.ndarray]:
    """Streamed training batches, and 2 · ``validation_rows`` held-out sequences. Options go to `hub.load`."""
    encode: Callable[[str], Sequence[int]] = str.encode
    if config.tokenizer:
        tokenizer = Tokenizer.from_file(config.tokenizer)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"vocab_size is {config.vocab_size}, the tokenizer has {tokenizer.vocab_size} tokens")
        encode = tokenizer.encode
    options = options or {"name": "en"}
    rows: Iterable[Any] = packed(hub.load(path, "validation", **options), config.context, encode)
    held_out = [np.asarray(row["tokens"], np.int32) for row in itertools.islice(rows, 2 * config.validation_rows)]
    if len(held_out) < 2 * config.validation_rows:
        raise hub.DataError(f"{path} has {len(held_out)} sequences for validation, {2 * config.validation_rows} needed")
    train = packed(hub.load(path, "train", **options), config.context, encode)
    stream = hub.Stream(train, lambda row: {"tokens": np.asarray(row["tokens"], np.int32)}, config.batch_size, buffer)
    return stream, np.stack(held_out)


def source_data(config: GebConfig) -> tuple[Batches, np.ndarray]:
    """Random windows of the standard library, and windows spread over its last twentieth."""
    source = load_stdlib_source()
    starts = np.linspace(0, len(source.validation) - config.context - 1, 2 * config.validation_rows).astype(np.int64)
    held_out = source.validation[starts[:, None] + np.arange(config.context + 1)]
    return Windows(source.train, config.context, config.batch_size), held_out


# Task and arms --------------------------------------------------------------------------------------------------------


def language_task(config: GebConfig, data: tuple[Batches, np.ndarray], *, kv_heads: int, norm: Norm) -> Task:
    """Next-token prediction by one decoder; losses in nats per token."""
    model = config.decoder(kv_heads, norm)
    batches, held_out = data

    def init(key: jax.Array) -> tuple[Any, Any]:
        return init_params(key, model), ()

    def entropy(params: Any, tokens: jax.Array) -> jax.Array:
        tokens = tokens.astype(jnp.int32)
        logits = decoder_logits(params, decoder_forward(params, tokens[:, :-1], model).hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    def measure(params: Any, data: Any) -> jax.Array:
        return jax.lax.map(lambda row: entropy(params, row[None]), data["tokens"], batch_size=config.batch_size).mean()

    return Task(
        name=f"{config.dataset}-{kv_heads}-kv-heads-{norm}-norm",
        init=init,
        loss=lambda params, state, batch, key: (entropy(params, batch["tokens"]), state),
        evaluate=lambda params, state, data, key: {"val_loss": measure(params, data)},
        final=lambda params, state, data, key: {"loss": measure(params, data)},
        batches=batches,
        validation={"tokens": held_out[: config.validation_rows]},
        test={"tokens": held_out[config.validation_rows :]},
        steps=config.steps,
        eval_every=config.steps // 10 if config.steps % 10 == 0 else config.steps,
        metric="val_loss",
        higher_is_better=False,
        batch_size=config.batch_size,
        description={
            "kind": "training",
            "modality": "text",
            "dataset": "python-source" if config.dataset == "source" else "c4",
            "seq_len": config.context,
        },
        model={
            "family": "decoder",
            "params": count_parameters(init),
            "layers": config.layers,
            "width": config.width,
            "heads": config.heads,
            "kv_heads": kv_heads,
            "dtype": "bfloat16" if config.bfloat16 else "float32",
        },
    )


def optimizer(
    rate: Any, config: GebConfig, *, shrink: bool = False, skip: bool = False
) -> optax.GradientTransformation:
    """GEB's AdamW with warm-up, cosine and clipping to norm 1, and the measures asked for."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.warmup_steps, config.steps, 0.1)
    tx = optax.chain(
        scale_by_embedding_shrink(config.alpha) if shrink else optax.identity(),
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda step: rate * shape(step), b1=0.9, b2=0.95, weight_decay=0.1),
    )
    return skip_on_spike(tx) if skip else tx


BASELINE = "adamw"
MEASURES = {
    BASELINE: {},
    "EGS": {"shrink": True},
    "skip": {"skip": True},
    "EGS + skip": {"shrink": True, "skip": True},
}


def make_arm(config: GebConfig, name: str, rates: tuple[float, ...]) -> Arm:
    """AdamW with the measures of that name."""
    measures = MEASURES[name]
    settings = {"part": "stability", "alpha": config.alpha if "shrink" in measures else 1.0, "skip": "skip" in measures}
    return Arm(
        name,
        functools.partial(optimizer, config=config, **measures),
        rates,
        config={} if name == BASELINE else settings,
        method=BASELINE if name == BASELINE else "geb",
    )


# The experiment -------------------------------------------------------------------------------------------------------

COUNTED = SpikeRule(num_std=None)
"""Above twice the running mean: what the table counts."""
SKIPPED = SpikeRule()
"""What `skip_on_spike` skips: that, or above the mean by six standard deviations."""


@functools.partial(jax.jit, static_argnames="rule")
def _find_spikes(losses: jax.Array, rule: SpikeRule) -> jax.Array:
    def step(state: Any, loss: jax.Array) -> tuple[Any, jax.Array]:
        return update_spike_state(state, loss, rule), is_spike(state, loss, rule)

    return jax.lax.scan(step, init_spike_state(), losses)[1]


def count_spikes(losses: np.ndarray, rule: SpikeRule) -> int:
    """Spikes in the losses of a run; what follows a divergence is not counted."""
    return int(np.sum(np.asarray(_find_spikes(jnp.asarray(losses), rule)) & np.isfinite(losses)))


def run(config: GebConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Train all: heads at the usual rate, norms over the grid, measures at the raised rate."""
    data = c4_data(config) if config.dataset == "c4" else source_data(config)
    grouped = language_task(config, data, kv_heads=config.kv_heads, norm="pre")
    separate = language_task(config, data, kv_heads=config.heads, norm="pre")
    post = language_task(config, data, kv_heads=config.kv_heads, norm="post")
    grid = (make_arm(config, BASELINE, config.norm_learning_rates),)
    usual = (make_arm(config, BASELINE, (config.learning_rate,)),)
    raised = tuple(make_arm(config, name, (config.stress * config.learning_rate,)) for name in MEASURES)
    sweeps = Sweeps(
        pre=(yield from session.sweep(grouped, grid)),
        post=(yield from session.sweep(post, grid)),
        separate=(yield from session.sweep(separate, usual)),
        raised=(yield from session.sweep(grouped, raised)),
    )
    return compare(config, sweeps)


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """All that was trained."""

    pre: Sweep
    post: Sweep
    separate: Sweep
    raised: Sweep


def _test(trials: Sequence[TrialResult]) -> list[float]:
    return [t.final["test_loss"] for t in trials if t.status == "ok"]


def _ok(trials: Sequence[TrialResult]) -> str:
    return f"{sum(t.status == 'ok' for t in trials)}/{len(trials)}"


def _spikes(trials: Sequence[TrialResult], rule: SpikeRule) -> int:
    return sum(count_spikes(t.curves["train_loss"], rule) for t in trials)


def compare(config: GebConfig, sweeps: Sweeps) -> Comparison:
    """Tables, figures, rows and the headline."""
    trials = {name: sweeps.raised.select(name) for name in MEASURES}
    return Comparison(
        headline=_headline(config, sweeps),
        rows=(
            _heads_row(config, sweeps),
            *(_stability_row(sweeps.raised, name) for name in MEASURES if name != BASELINE),
            *(row for s in (sweeps.pre, sweeps.post, sweeps.raised) for row in s.failure_rows(BASELINE)),
        ),
        tables=(_heads_table(config, sweeps), _norms_table(config, sweeps), _stability_table(config, sweeps)),
        figures=(
            _norms_figure(config, sweeps),
            Figure(
                f"Training at {config.stress:g} times the usual rate, first seed",
                "training step",
                "loss of the step, nats per token",
                tuple(_losses(name, found[0]) for name, found in trials.items()),
            ),
        ),
        notes=(
            "Spikes are counted in the training losses of all runs by one rule, whether the arm skips them or not.",
            "Adam does not see the scale of the embedding's gradient: EGS acts through clipping by the global norm, "
            "and through eps, alone.",
            "Skipping where nothing spikes is the same computation, compiled anew: losses agree for some steps, then "
            "rounding drives them apart, as training at this rate amplifies it. Differences of that size are noise.",
            f"Guessing costs ln {config.vocab_size} = {np.log(config.vocab_size):.1f} nats: where the mean is above "
            "half of that, a single batch can hardly reach twice the mean.",
            f"Models this small, trained for {config.steps} steps on batches of {config.batch_size}, show whether the "
            "pieces work together. Spikes of pre-training come with size and with length.",
        ),
    )


def _kv_bytes(config: GebConfig, kv_heads: int) -> int:
    return 2 * config.layers * kv_heads * (config.width // config.heads) * (2 if config.bfloat16 else 4)


def _heads_table(config: GebConfig, sweeps: Sweeps) -> Table:
    sides = {config.kv_heads: sweeps.pre, config.heads: sweeps.separate}
    rows = []
    for kv_heads, sweep in sides.items():
        trials = sweep.select(BASELINE, config.learning_rate)
        seconds = milliseconds([t.cost["step_s"] for t in trials])
        rows.append((kv_heads, sweep.task.model["params"], _kv_bytes(config, kv_heads), spread(_test(trials)), seconds))
    return Table(
        "Grouped queries: key-value heads at the usual rate",
        ("KV heads", "parameters", "cache bytes/token", "test loss", "ms/step"),
        tuple(rows),
        f"{config.heads} query heads; nats per token, mean ± standard deviation over {config.seeds} seeds",
    )


def _norms_table(config: GebConfig, sweeps: Sweeps) -> Table:
    rows = []
    for rate in sorted(config.norm_learning_rates):
        pre, post = (sweep.select(BASELINE, rate) for sweep in (sweeps.pre, sweeps.post))
        rows.append((f"{rate:g}", spread(_test(pre)), _ok(pre), spread(_test(post)), _ok(post)))
    return Table(
        "Pre-norm and post-norm: test loss",
        ("learning rate", "pre-norm", "ok", "post-norm", "ok"),
        tuple(rows),
        f"both with {config.warmup_steps} steps of warm-up; ok are the runs whose losses stayed finite",
    )


def _stability_table(config: GebConfig, sweeps: Sweeps) -> Table:
    def row(name: str, trials: Sequence[TrialResult]) -> tuple[str, int, int, str, str]:
        return name, _spikes(trials, COUNTED), _spikes(trials, SKIPPED), spread(_test(trials)), _ok(trials)

    usual = row(f"{BASELINE}, usual rate", sweeps.pre.select(BASELINE, config.learning_rate))
    return Table(
        f"Measures against spikes at {config.stress:g} times the usual rate",
        ("arm", "losses > 2x mean", "losses of the whole rule", "test loss", "ok"),
        (usual, *(row(name, sweeps.raised.select(name)) for name in MEASURES)),
        f"spikes of {config.seeds} x {config.steps} steps; the whole rule, which arms with skip skip by, also counts "
        "losses above the mean by 6 standard deviations; all with clipping to norm 1",
    )


def _norms_figure(config: GebConfig, sweeps: Sweeps) -> Figure:
    series = []
    for name, sweep in (("pre-norm", sweeps.pre), ("post-norm", sweeps.post)):
        found = [(rate, _test(sweep.select(BASELINE, rate))) for rate in sorted(config.norm_learning_rates)]
        found = [(rate, values) for rate, values in found if values]
        columns = (tuple(f(values) for _, values in found) for f in (lambda v: float(np.mean(v)), min, max))
        series.append(Series(name, tuple(rate for rate, _ in found), *columns))
    return Figure("Norms and learning rates", "learning rate", "test loss", tuple(series), x_log=True)


def _losses(name: str, trial: TrialResult) -> Series:
    losses = trial.curves["train_loss"]
    steps = np.flatnonzero(np.isfinite(losses))
    return Series(name, tuple((steps + 1.0).tolist()), tuple(losses[steps].astype(float).tolist()))


def _heads_row(config: GebConfig, sweeps: Sweeps) -> dict[str, Any]:
    """Bytes of the cache with separate heads over those with shared ones, with the losses of both."""
    task = sweeps.pre.task
    new, old = (s.select(BASELINE, config.learning_rate) for s in (sweeps.pre, sweeps.separate))
    quality = [float(np.mean(found)) if found else None for found in (_test(new), _test(old))]
    return {
        "method": "geb",
        "method_config": {"part": "grouped queries", "kv_heads": config.kv_heads},
        "baseline": "multi-head attention",
        "task": {**task.description, "name": task.name, "metric": "test_loss", "higher_is_better": False},
        "model": dict(task.model),
        "workload": {"batch": task.batch_size, "steps": task.steps, "seeds": len(new)},
        "cost_kind": "bytes",
        "speedup": config.heads / config.kv_heads if quality[0] is not None else None,
        "quality": quality[0],
        "quality_baseline": quality[1],
        "status": "ok" if quality[0] is not None else "diverged",
    }


def _stability_row(sweep: Sweep, name: str) -> dict[str, Any]:
    """Steps to what AdamW alone reaches in the end, its worst seed."""
    old = [sweep.quality(t) for t in sweep.select(BASELINE)]
    target = max((value for value in old if np.isfinite(value)), default=0.0)
    costs = ([sweep.steps_to(t, "val_loss", at_most=target) for t in sweep.select(arm)] for arm in (BASELINE, name))
    return sweep.row(BASELINE, name, "steps", (next(costs), next(costs)))


def _headline(config: GebConfig, sweeps: Sweeps) -> str:
    shared, own = (spread(_test(s.select(BASELINE, config.learning_rate))) for s in (sweeps.pre, sweeps.separate))
    rates = [f"{s.best_learning_rate(BASELINE):g}" for s in (sweeps.pre, sweeps.post)]
    losses = [spread(_test(s.best(BASELINE))) for s in (sweeps.pre, sweeps.post)]
    spikes = {name: _spikes(sweeps.raised.select(name), COUNTED) for name in MEASURES}
    ends = ", ".join(f"{name} {spread(_test(sweeps.raised.select(name)))}" for name in MEASURES)
    found = (
        "spikes " + " / ".join(f"{name} {count}" for name, count in spikes.items())
        if any(spikes.values())
        else "nothing spikes, with or without the measures"
    )
    return (
        f"test loss with {config.kv_heads} of {config.heads} KV heads {shared}, with all {own}, and a cache "
        f"{config.heads / config.kv_heads:g} times smaller; pre-norm {losses[0]} at its best rate {rates[0]}, "
        f"post-norm {losses[1]} at {rates[1]}; at {config.stress:g} times the usual rate {found} (test loss: {ends})"
    )


EXPERIMENT = Experiment(
    name="geb",
    method="geb",
    claim="grouped queries, and embedding gradient shrink and skipped batches for small-batch pre-training without "
    "spikes (no ablation published)",
    config=GebConfig,
    presets={
        "quick": GebConfig(seeds=2),
        "full": GebConfig(
            seeds=1,
            dataset="c4",
            vocab_size=64_896,
            layers=24,
            width=2048,
            inner=5632,
            heads=16,
            kv_heads=4,
            context=4096,
            batch_size=320,
            steps=20_000,
            warmup_steps=2000,
            learning_rate=4e-4,
            norm_learning_rates=(1e-4, 4e-4, 1.6e-3),
            bfloat16=True,
            validation_rows=320,
        ),
    },
    run=run,
)
"""Both presets; the full one has GEB-1.3B's numbers, on bytes unless it is given a tokenizer."""
