"""AccelAT against fixed learning-rate policies in adversarial training, from equal starting rates.

Attacks are made online, against the current parameters; the controller sees a validation split; and the final
robustness is measured on the test split by a stronger attack than the one trained with. The reference's own protocol
(adversarial examples made once, before training) is one more arm, labelled static: it shows what such a number is
worth.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.arrays import Epochs
from experiments.data.digits import load_digits
from experiments.runner.api import Cell, Comparison, Config, Experiment, Progress, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import Sweep, spread
from experiments.runner.train import Arm, Task
from experiments.runner.trial import TrialResult
from experiments.tasks import count_parameters, functional
from experiments.tasks_full import cifar_splits
from jaxaccel.models import MLP, ResNet18
from jaxaccel.optim import AccelATConfig, epoch_policies, scale_by_accuracy_gradient
from jaxaccel.robustness import pgd_linf


@dataclasses.dataclass(frozen=True)
class AccelATExperimentConfig(Config):
    """Learning-rate policies in adversarial training with PGD."""

    dataset: Literal["digits", "cifar10", "cifar100"] = "digits"
    """digits ships with scikit-learn; the CIFARs are fetched through Hugging Face datasets."""
    batch_size: int = 32
    """Images per step."""
    epochs: int = 40
    """Passes over the training split."""
    start_rates: tuple[float, ...] = (0.1, 1.0)
    """Every policy starts from each of these (one-cycle: its peak)."""
    momentum: float = 0.0
    """Momentum of SGD."""
    epsilon: float = 0.1
    """Radius of the attack in the maximum norm; pixels are in [0, 1]."""
    train_attack_steps: int = 5
    """PGD steps of the attack trained with."""
    test_attack_steps: int = 20
    """PGD steps of the final check."""
    targets: tuple[float, ...] = (0.5, 0.6, 0.7)
    """Robust validation accuracies whose first epoch is counted."""
    window: int = 5
    """AccelAT: epochs in the moving mean."""
    quiet: int = 5
    """AccelAT: epochs between two reductions."""
    threshold: float = 0.005
    """AccelAT: reduce when the moving mean rises by less than this."""
    factor: float = 0.8
    """AccelAT: what the rate is multiplied with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates("start_rates", self.start_rates)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")
        for name in ("train_attack_steps", "test_attack_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def load_splits(config: AccelATExperimentConfig) -> dict[str, dict[str, np.ndarray]]:
    """Images in [0, 1] and labels of the three splits."""
    if config.dataset == "digits":
        digits = load_digits(1200, 300)
        return {
            part: {"images": split.images, "labels": split.labels}
            for part, split in (("train", digits.train), ("validation", digits.validation), ("test", digits.test))
        }
    if config.dataset == "cifar10":
        return cifar_splits()
    return cifar_splits("uoft-cs/cifar100", label="fine_label")


def make_task(config: AccelATExperimentConfig, splits: Any, *, static_key: jax.Array | None = None) -> Task:
    """Adversarial training as a task.

    With ``static_key`` the adversarial examples are made once, against the initial parameters of that key, and are
    what is trained on and what ``val_robust`` and ``test_robust`` are measured on, as in the reference code.
    ``test_pgd`` and ``test_clean`` always attack the trained parameters.
    """
    classes = int(splits["train"]["labels"].max()) + 1
    features = int(np.prod(splits["train"]["images"].shape[1:]))

    def build(rngs: nnx.Rngs) -> nnx.Module:
        if config.dataset == "digits":
            return MLP([features, 128, 128, classes], rngs=rngs)
        return ResNet18(classes=classes, rngs=rngs)

    init, apply = functional(build)

    def logits(params: Any, state: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda x: apply(params, state, x, train=False)[0]

    def attack(params: Any, state: Any, data: Any, key: jax.Array, steps: int) -> jax.Array:
        frozen = jax.lax.stop_gradient(params)  # the attack is a constant of the outer problem
        return pgd_linf(
            logits(frozen, state),
            data["images"],
            data["labels"],
            epsilon=config.epsilon,
            steps=steps,
            rel_step=1 / 3 if steps < 10 else 1 / 8,
            key=key,
        )

    def accuracy(params: Any, state: Any, images: Any, labels: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(logits(params, state)(images), -1) == labels)

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        images = batch["images"]
        if static_key is None:
            images = attack(params, state, batch, key, config.train_attack_steps)
        output, state = apply(params, state, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"]).mean(), state

    def evaluate(params: Any, state: Any, data: Any, key: jax.Array) -> dict[str, jax.Array]:
        images = data["images"]
        if static_key is None:
            images = attack(params, state, data, key, config.train_attack_steps)
        return {"val_robust": accuracy(params, state, images, data["labels"])}

    def final(params: Any, state: Any, data: Any, key: jax.Array) -> dict[str, jax.Array]:
        original = data["original"] if static_key is not None else data["images"]
        clean = {"images": original, "labels": data["labels"]}
        attacked = attack(params, state, clean, key, config.test_attack_steps)
        found = {
            "pgd": accuracy(params, state, attacked, data["labels"]),
            "clean": accuracy(params, state, original, data["labels"]),
        }
        if static_key is not None:
            found["stale"] = accuracy(params, state, data["images"], data["labels"])
        return found

    if static_key is not None:
        params, state = jax.jit(init)(static_key)
        once = jax.jit(lambda data: attack(params, state, data, static_key, config.train_attack_steps))
        splits = {
            part: {**data, "images": np.asarray(once(data))} | ({"original": data["images"]} if part == "test" else {})
            for part, data in splits.items()
        }
    batches = Epochs(dict(splits["train"]), config.batch_size)
    cpu_convolutions = config.dataset != "digits" and jax.default_backend() == "cpu"
    return Task(
        name=f"{config.dataset}-{'static' if static_key is not None else 'online'}-pgd",
        init=init,
        loss=loss,
        evaluate=evaluate,
        final=final,
        batches=batches,
        validation=dict(splits["validation"]),
        test=dict(splits["test"]),
        steps=batches.steps_per_epoch * config.epochs,
        eval_every=batches.steps_per_epoch,
        steps_per_dispatch=1 if cpu_convolutions else None,
        metric="val_robust",
        higher_is_better=True,
        batch_size=config.batch_size,
        feedback="val_robust",
        description={
            "kind": "training",
            "modality": "image",
            "dataset": config.dataset,
            "n_features": features,
            "n_train": len(splits["train"]["labels"]),
            "n_classes": classes,
        },
        model={
            "family": "mlp" if config.dataset == "digits" else "resnet",
            "params": count_parameters(init),
            "dtype": "float32",
        },
    )


def make_arms(config: AccelATExperimentConfig, steps_per_epoch: int) -> tuple[Arm, ...]:
    """The policies; the learning rate of an arm is the rate it starts from (one-cycle: its peak)."""

    def policy(make: Callable[[Any], Any]) -> Callable[[Any], optax.GradientTransformation]:
        return lambda rate: optax.sgd(
            epoch_policies.epoch_schedule(make(rate), steps_per_epoch), momentum=config.momentum or None
        )

    controller = AccelATConfig(
        learning_rate=1.0, factor=config.factor, window=config.window, quiet=config.quiet, threshold=config.threshold
    )

    def accelat(rate: Any) -> optax.GradientTransformation:
        momentum = optax.trace(config.momentum) if config.momentum else optax.identity()
        # The controller works on a factor that starts at 1, so that the start rate can be traced.
        return optax.chain(momentum, optax.scale(rate), scale_by_accuracy_gradient(controller))

    epochs, rates = config.epochs, config.start_rates
    return (
        Arm("constant", policy(epoch_policies.constant), rates),
        Arm("piecewise", policy(lambda rate: epoch_policies.piecewise(rate, epochs)), rates),
        Arm("one-cycle", policy(lambda rate: epoch_policies.one_cycle(rate / 10, epochs)), rates),
        Arm("accelat", accelat, rates, config={"window": config.window, "threshold": config.threshold}),
    )


def run(config: AccelATExperimentConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Run the online comparison, then the static arm."""
    splits = load_splits(config)
    task = make_task(config, splits)
    arms = make_arms(config, task.eval_every)
    sweep = yield from session.sweep(task, arms)
    rate = sweep.best_learning_rate("constant")
    static = make_task(config, splits, static_key=jax.random.key(0))
    stale = []
    for seed in session.seeds:
        arm = dataclasses.replace(arms[0], name="constant-static", learning_rates=(rate,))
        stale.append((yield from session.trial(static, arm, rate, seed)))
    return compare(config, sweep, stale)


def compare(config: AccelATExperimentConfig, sweep: Sweep, stale: list[TrialResult]) -> Comparison:
    """Tables, figures, record rows and the headline, from finished trials."""
    every = sweep.task.eval_every

    def steps(trials: list[TrialResult], target: float) -> list[float]:
        return [sweep.steps_to(t, "val_robust", at_least=target) for t in trials]

    def epochs(trials: list[TrialResult]) -> Cell:
        medians = [float(np.median(steps(trials, target))) / every for target in config.targets]
        return " / ".join(f"{m:g}" if np.isfinite(m) else "never" for m in medians)

    def final(trials: list[TrialResult], name: str) -> str:
        return spread([t.final[name] for t in trials if name in t.final])

    table = Table(
        f"epochs to {' / '.join(f'{t:.0%}' for t in config.targets)} robust validation accuracy, and the final check",
        ("policy", "start rate", "epochs", f"test, PGD-{config.test_attack_steps}", "test, clean", "ok"),
        tuple(
            (
                arm.name,
                f"{rate:g}",
                epochs(trials),
                final(trials, "test_pgd"),
                final(trials, "test_clean"),
                f"{sum(t.status == 'ok' for t in trials)}/{len(trials)}",
            )
            for rate in config.start_rates
            for arm in sweep.arms
            for trials in [sweep.select(arm.name, rate)]
        ),
        "median epochs over seeds; accuracies are mean ± standard deviation; for one-cycle the start rate is its peak",
    )
    protocol = Table(
        "the reference's protocol, labelled static: adversarial examples made once, before training",
        ("accuracy measured on", "value"),
        (
            ("the stale adversarial examples", final(stale, "test_stale")),
            (f"fresh PGD-{config.test_attack_steps} against the trained model", final(stale, "test_pgd")),
            ("clean test images", final(stale, "test_clean")),
        ),
        "constant rate; the first number is what such a protocol would report as adversarial accuracy",
    )
    rows = []
    for rate in config.start_rates:
        for baseline in ("constant", "piecewise", "one-cycle"):
            pair = (sweep.select(baseline, rate), sweep.select("accelat", rate))
            costs = (steps(pair[0], config.targets[0]), steps(pair[1], config.targets[0]))
            rows.append(sweep.row(baseline, "accelat", "steps", costs, trials=pair, setting=f"start_{rate:g}"))
    return Comparison(
        headline=_headline(config, sweep, stale),
        rows=(*rows, *sweep.failure_rows("constant")),
        tables=(table, protocol, sweep.cost_table()),
        figures=tuple(sweep.curves("val_robust", at=rate) for rate in config.start_rates),
        notes=(
            "AccelAT can only lower the rate: it can rescue a start rate that is too large, not speed up a good one.",
            "The controller sees the validation split; the test split was attacked once, after training.",
            "The reference starts AccelAT at a ten times larger rate than the policies it is compared with; here all "
            "start equal.",
        ),
    )


def _headline(config: AccelATExperimentConfig, sweep: Sweep, stale: list[TrialResult]) -> str:
    def robust(arm: str, rate: float) -> float:
        found = [t.final.get("test_pgd", 0.0) for t in sweep.select(arm, rate)]
        return float(np.mean(found))

    parts = []
    for rate in config.start_rates:
        others = ", ".join(f"{arm} {robust(arm, rate):.2f}" for arm in ("constant", "piecewise", "one-cycle"))
        parts.append(f"{robust('accelat', rate):.2f} from a start rate of {rate:g} ({others})")
    shown, true = (float(np.mean([t.final.get(n, 0.0) for t in stale])) for n in ("test_stale", "test_pgd"))
    return (
        f"robust test accuracy {'; '.join(parts)}. "
        f"The reference's static protocol shows {shown:.2f} where a fresh attack leaves {true:.2f}"
    )


EXPERIMENT = Experiment(
    name="accelat",
    method="accelat",
    claim="up to 2 times faster adversarial training at comparable accuracy",
    config=AccelATExperimentConfig,
    presets={
        "quick": AccelATExperimentConfig(),
        "full": AccelATExperimentConfig(
            dataset="cifar10",
            batch_size=128,
            epochs=110,
            start_rates=(0.1, 1.0),
            momentum=0.9,
            epsilon=8 / 255,
            train_attack_steps=7,
            targets=(0.3, 0.4, 0.45),
        ),
    },
    run=run,
)
