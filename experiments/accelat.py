"""AccelAT against fixed learning-rate policies in adversarial training, from equal starting rates.

Attacks are made online, against the current parameters; the controller sees a validation split; and the final
robustness is measured on the test split by a stronger attack than the one trained with. The reference's own protocol
(adversarial examples made once, before training) is one more arm, labelled static: it shows what such a number is worth.
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
from experiments.runner.api import Cell, Comparison, Config, Experiment, Figure, Progress, Series, Table, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import Sweep, spread
from experiments.runner.train import Arm, Task
from experiments.runner.trial import TrialResult
from experiments.tasks import count_parameters, functional
from experiments.tasks_full import cifar_splits
from jaxaccel.models import MLP, ResNet18
from jaxaccel.optim import AccelATConfig, epoch_policies, scale_by_accuracy_gradient
from jaxaccel.robustness import pgd_linf

POLICIES = ("constant", "piecewise", "one-cycle", "accelat")


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
