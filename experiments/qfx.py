"""Fixed point in few bits: quantised after training, fine-tuned with points that stay, learned, and with few ones.

All arms have the same steps of gradient descent. Quantisation after training gets a float network that was trained for
all of them; the others start from a float network of half of them. Every tensor is quantised: inputs, weights, scales
and shifts of normalisation, activations, shortcuts, averages, sums and logits. Nothing is selected: the last step's
network is shown, on test rows.
"""

import dataclasses
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import qfx_models as models
from experiments.data.digits import load_digits
from experiments.runner.api import Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import spread
from experiments.tasks_full import cifar_splits

PTQ_MAX, PTQ_MSE, FIXED, LEARNED = "PTQ, largest number", "PTQ, squared error", "trained, fixed", "trained, learned"


@dataclasses.dataclass(frozen=True)
class QFXConfig(Config):
    """Fixed-point networks at several word lengths."""

    data: str = "digits"
    """``digits`` (ships with scikit-learn), or ``cifar10`` (from the hub)."""
    models: tuple[str, ...] = ("mlp", "cnn")
    """``mlp``, ``cnn`` or ``resnet18``."""
    words: tuple[int, ...] = (5, 4, 3, 2)
    """W of weights and activations; sums have 2 bits more, logits 4."""
    hot: tuple[int, ...] = (1, 2, 3)
    """K: how many ones a weight may have. Those from W − 1 on are no restriction and left out."""
    hot_words: tuple[int, ...] = (5, 4)
    """Words that K is tried with, on the first of the models."""
    steps: tuple[int, ...] = (500, 150)
    """Steps of float training, and again of fine-tuning, for each model."""
    batch_size: int = 64
    """Rows in a step."""
    rate: float = 3e-3
    """Adam's learning rate for weights in float training; a third of it in fine-tuning."""
    point_rate: float = 1e-2
    """Adam's learning rate for binary points, decayed to 0 as that for weights."""
    checked_rows: int = 64
    """Test rows whose outputs are compared with integers' and with the float emulation's, first seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in ("digits", "cifar10"):
            raise ValueError(f"data must be 'digits' or 'cifar10', got {self.data!r}")
        unknown = [name for name in self.models if name not in models.MODELS]
        if unknown or not self.models:
            raise ValueError(f"models must be some of {', '.join(models.MODELS)}, got {self.models}")
        if not self.words or min(self.words) < 2 or max(self.words) > 12:
            raise ValueError(f"words must be 2 to 12 bits, got {self.words}")
        if not set(self.hot_words) <= set(self.words) or min(self.hot, default=1) < 1:
            raise ValueError(f"hot must be positive and hot_words some of {self.words}, got {self.hot_words}")
        if len(self.steps) != len(self.models) or min(self.steps) < 1:
            raise ValueError(f"steps must be one positive number for each model, got {self.steps}")
        for name in ("batch_size", "checked_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_rates("rate", (self.rate,))
        check_rates("point_rate", (self.point_rate,))


def load(config: QFXConfig, **options: Any) -> dict[str, Any]:
    """Images and labels of both parts."""
    if config.data == "digits":
        digits = load_digits()
        parts = {"train": digits.train, "test": digits.test}
        return {part: (jnp.asarray(d.images), jnp.asarray(d.labels)) for part, d in parts.items()}
    splits = cifar_splits(**options)
    return {part: (jnp.asarray(splits[part]["images"]), jnp.asarray(splits[part]["labels"])) for part in
            ("train", "test")}  # fmt: skip


def one_model(config: QFXConfig, session: Session, number: int, data: Any) -> Generator[Progress, None, dict[str, Any]]:
    """All words and arms of one network."""
    name, steps = config.models[number], config.steps[number]
    (x, y), (tx, ty) = data["train"], data["test"]
    image, classes = tuple(x.shape[1:]), 10
    seeds = jnp.array(session.seeds)
    keys = jax.vmap(jax.random.key)(seeds)
    again = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    # The float network's words are not looked at: one program for all of them.
    word = config.words[0]
    plain = models.graph(name, word, None, "float", image, classes)
    fit = models.trainer(plain, steps, config.batch_size, config.rate)
    more = models.trainer(plain, steps, config.batch_size, config.rate / 3)
    total = len(config.words) + 1
    yield Progress(name, 0, total, f"{name}: float")
    first = lambda tree: jax.tree.map(lambda a: a[:, 0], tree)  # noqa: E731
    half = first(fit(models.initial(name, word, keys, image, classes), jnp.zeros(1), x, y, keys))
    whole = first(more(half, jnp.zeros(1), x, y, again))
    found: dict[str, Any] = {"float": models.accuracy(models.evaluator(plain)(whole, tx), ty), "words": {}}
    batch = x[: min(len(x), 256)]
    for at, word in enumerate(config.words):
        saved = session.load(f"{name}-{word}")
        if saved is None:
            yield Progress(name, at + 1, total, f"{name}: {word} bits")
            saved = one_word(config, name, word, (half, whole), (x, y, tx, ty, batch), again, steps)
            session.save(f"{name}-{word}", saved)
        found["words"][str(word)] = saved
    yield Progress(name, total, total)
    return found


def one_word(
    config: QFXConfig, name: str, word: int, starts: Any, data: Any, keys: Any, steps: int
) -> dict[str, dict[str, Any]]:
    """Accuracies of all seeds, mismatches and costs of the first, for each arm."""
    half, whole = starts
    x, y, tx, ty, batch = data
    image, classes = tuple(x.shape[1:]), 10
    definition = models.graph(name, word, None, "fixed", image, classes)
    arms: dict[str, dict[str, Any]] = {}

    def record(arm: str, definition: Any, numbers: Any, hot: int | None = None) -> None:
        logits = models.evaluator(definition)(numbers, tx)
        part = jax.tree.map(lambda a: a[0], numbers)
        rows = tx[: config.checked_rows]
        arms[arm] = {
            "accuracy": models.accuracy(logits, ty),
            **models.in_hardware(definition, part, rows, logits[0, : len(rows)], hot),
        }

    for arm, method in ((PTQ_MAX, "max"), (PTQ_MSE, "mse")):
        record(arm, definition, models.calibrator(definition, method)(whole, batch))
    start = models.calibrator(definition, "mse")(half, batch)
    rates = jnp.array([0.0, config.point_rate])
    fit = models.trainer(definition, steps, config.batch_size, config.rate / 3)
    tuned = fit(start, rates, x, y, keys)
    for i, arm in enumerate((FIXED, LEARNED)):
        record(arm, definition, jax.tree.map(lambda a, i=i: a[:, i], tuned))
    if word in config.hot_words and name == config.models[0]:
        for hot in config.hot:
            if hot < word - 1:
                few = models.graph(name, word, hot, "fixed", image, classes)
                tuned = models.trainer(few, steps, config.batch_size, config.rate / 3)(start, rates[1:], x, y, keys)
                record(f"learned, K = {hot}", few, jax.tree.map(lambda a: a[:, 0], tuned), hot)
    return arms


def run(config: QFXConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Network after network; words that are finished are kept when the run is interrupted."""
    data = load(config)
    found = {}
    for number, name in enumerate(config.models):
        found[name] = yield from one_model(config, session, number, data)
    return compare(config, found)


# What was found ------------------------------------------------------------------------------------------------------


def compare(config: QFXConfig, found: Mapping[str, Any]) -> Comparison:
    """Tables, a figure for each network, rows and the headline."""
    tables, figures, rows = [], [], []
    for name, part in found.items():
        words = sorted(map(int, part["words"]), reverse=True)
        arms = list(dict.fromkeys(arm for w in words for arm in part["words"][str(w)]))
        lines = [
            (arm, *(spread(part["words"][str(w)][arm]["accuracy"]) if arm in part["words"][str(w)] else None
                    for w in words))
            for arm in arms
        ]  # fmt: skip
        tables.append(
            Table(
                f"{name} on {config.data}: test accuracy",
                ("arm", *(f"{w} bits" for w in words)),
                tuple(lines),
                f"mean ± standard deviation over seeds; in floats {spread(part['float'])}",
            )
        )
        costs = [
            (w, arm, one["adders"], one["dsps"], one["wrong"], one["outputs"])
            for w in words
            for arm, one in part["words"][str(w)].items()
        ]
        tables.append(
            Table(
                f"{name}: what a circuit of constant weights needs, and outputs that differ from the integers'",
                ("bits", "arm", "adders", "multipliers (DSP)", "outputs that differ", "of"),
                tuple(costs),
                "first seed; an estimate by counting: tools share and pack operators",
            )
        )
        series = []
        for arm in arms:
            there = [w for w in words if arm in part["words"][str(w)]]
            values = np.array([part["words"][str(w)][arm]["accuracy"] for w in there])
            series.append(
                Series(
                    arm, tuple(map(float, there)),
                    *(tuple(v.tolist()) for v in (values.mean(1), values.min(1), values.max(1))),
                )
            )  # fmt: skip
        figures.append(
            Figure(f"{name} on {config.data}", "bits", "test accuracy", tuple(series), note="band: all seeds")
        )
        rows += [_row(config, name, part, w) for w in words]
    wrong = sum(one["wrong"] for part in found.values() for arms in part["words"].values() for one in arms.values())
    return Comparison(
        headline=_headline(found, wrong),
        rows=tuple(rows),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=(
            "Every tensor is quantised, with a point each; sums before normalisation have 2 bits more, logits 4.",
            f"Learned points stay within {models.CLAMP:g} of where calibration put them.",
            "How the paper trains points and chooses integers with K ones is not published; both are reconstructed.",
        ),
    )


def _mean(part: Any, word: int, arm: str) -> float:
    return float(np.mean(part["words"][str(word)][arm]["accuracy"]))


def _row(config: QFXConfig, name: str, part: Any, word: int) -> dict[str, Any]:
    learned, ptq = part["words"][str(word)][LEARNED], part["words"][str(word)][PTQ_MSE]
    return {
        "method": "qfx",
        "method_config": {"word": word, "points": "learned"},
        "baseline": "quantised after training",
        "task": {"kind": "inference", "name": config.data, "metric": "accuracy", "higher_is_better": True},
        "model": {"family": name},
        "workload": {"batch": config.batch_size, "steps": 1, "seeds": len(learned["accuracy"])},
        "cost_kind": "bytes",
        "speedup": 32 / word,
        "quality": float(np.mean(learned["accuracy"])),
        "quality_baseline": float(np.mean(ptq["accuracy"])),
    }


def _headline(found: Mapping[str, Any], wrong: int) -> str:
    parts = []
    for name, part in found.items():
        words = sorted(map(int, part["words"]))
        shown = [w for w in (4, 3, 2) if w in words] or words[:1]
        numbers = ", ".join(
            f"{w} bits {_mean(part, w, LEARNED):.3f} ({_mean(part, w, FIXED):.3f} with fixed points, "
            f"{_mean(part, w, PTQ_MSE):.3f} untrained)"
            for w in shown
        )
        parts.append(f"{name} {np.mean(part['float']):.3f} in floats; learned points: {numbers}")
    return "; ".join(parts) + f"; {wrong} outputs differ from the integers'"


EXPERIMENT = Experiment(
    name="qfx",
    method="qfx",
    claim="learned binary points keep accuracy at fewer bits than quantisation after training, bits equal",
    config=QFXConfig,
    presets={
        "quick": QFXConfig(seeds=3),
        "full": QFXConfig(
            seeds=3, data="cifar10", models=("resnet18",), words=(8, 6, 5, 4), hot=(1, 2), hot_words=(6, 4),
            steps=(39_000,), batch_size=128, checked_rows=256,
        ),
    },
    run=run,
)  # fmt: skip
