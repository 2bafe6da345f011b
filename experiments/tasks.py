"""Training tasks that several experiments share: classification of images, and language modelling of characters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data.arrays import Epochs, Windows
from experiments.data.digits import load_digits
from experiments.data.text import load_python_topics
from experiments.runner.train import Task
from jaxaccel.models import CNN, MLP, CharLM

ModelFactory = Callable[[nnx.Rngs], nnx.Module]


def functional(build: ModelFactory) -> tuple[Callable[[jax.Array], tuple[Any, Any]], Callable[..., tuple[Any, Any]]]:
    """Turn an NNX model into ``init(key) -> (params, state)`` and ``apply(params, state, x, train) -> (y, state)``.

    The structure is split off once, without allocating the model's arrays; ``state`` holds what is not a parameter.
    """

    def parts(model: nnx.Module) -> tuple[Any, Any, Any]:
        structure, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
        return structure, params, rest

    structure, params_form, rest_form = parts(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: jax.Array) -> tuple[Any, Any]:
        _, params, rest = parts(build(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params: Any, state: Any, x: Any, *, train: bool) -> tuple[Any, Any]:
        # Fresh containers: filling the shared ones would leak one trace's values into the next.
        params_state = jax.tree.unflatten(jax.tree.structure(params_form), jax.tree.leaves(params))
        rest_state = jax.tree.unflatten(jax.tree.structure(rest_form), jax.tree.leaves(state))
        model = nnx.merge(structure, params_state, rest_state)
        if train:
            model.train()
        else:
            model.eval()
        y = model(x)
        return y, nnx.to_pure_dict(parts(model)[2])

    return init, apply


def count_parameters(init: Callable[[jax.Array], tuple[Any, Any]]) -> int:
    """Number of trained parameters."""
    params, _ = jax.eval_shape(init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def classification(
    name: str,
    build: ModelFactory,
    splits: Mapping[str, Mapping[str, np.ndarray]],
    *,
    family: str,
    batch_size: int,
    epochs: int,
    description: Mapping[str, Any],
    metric: str = "val_loss",
    evaluations_per_epoch: int = 1,
    augment: Any = None,
    steps_per_dispatch: int | None = None,
) -> Task:
    """An image classification task with softmax cross-entropy.

    ``splits`` maps train, validation and test to ``{"images": [N, H, W, C], "labels": [N]}``.
    Evaluates ``val_loss`` (nats) and ``val_accuracy`` (fraction).
    """
    init, apply = functional(build)
    batches = Epochs(dict(splits["train"]), batch_size, augment)

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = apply(params, state, batch["images"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), state

    def measure(params: Any, state: Any, data: Any, prefix: str) -> dict[str, jax.Array]:
        logits, _ = apply(params, state, data["images"], train=False)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"]).mean()
        return {f"{prefix}loss": entropy, f"{prefix}accuracy": jnp.mean(jnp.argmax(logits, -1) == data["labels"])}

    every = max(1, batches.steps_per_epoch // evaluations_per_epoch)
    return Task(
        name=name,
        init=init,
        loss=loss,
        evaluate=lambda params, state, data, key: measure(params, state, data, "val_"),
        final=lambda params, state, data, key: measure(params, state, data, ""),
        batches=batches,
        validation=dict(splits["validation"]),
        test=dict(splits["test"]),
        steps=every * evaluations_per_epoch * epochs,
        eval_every=every,
        steps_per_dispatch=steps_per_dispatch,
        metric=metric,
        higher_is_better=metric.endswith("accuracy"),
        batch_size=batch_size,
        description={"kind": "training", "modality": "image", **description},
        model={"family": family, "params": count_parameters(init), "dtype": "float32"},
    )


def digits_task(model: str, *, batch_size: int, epochs: int, metric: str = "val_loss") -> Task:
    """Digits of scikit-learn with a small ``cnn`` or ``mlp``; pixels are scaled to [-1/2, 1/2]."""
    digits = load_digits()
    splits = {
        part: {"images": getattr(digits, part).images - 0.5, "labels": getattr(digits, part).labels}
        for part in ("train", "validation", "test")
    }
    builders: dict[str, ModelFactory] = {
        "cnn": lambda rngs: CNN((8, 8, 1), [16, 32], hidden=64, classes=10, rngs=rngs),
        "mlp": lambda rngs: MLP([64, 128, 128, 10], rngs=rngs),
    }
    if model not in builders:
        raise ValueError(f"model must be one of {sorted(builders)}, got {model!r}")
    return classification(
        f"digits-{model}",
        builders[model],
        splits,
        family=model,
        batch_size=batch_size,
        epochs=epochs,
        metric=metric,
        steps_per_dispatch=1 if model == "cnn" and jax.default_backend() == "cpu" else None,
        description={
            "dataset": "sklearn-digits",
            "n_train": len(digits.train.labels),
            "n_features": 64,
            "n_classes": 10,
        },
    )


def language_model(
    name: str,
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    vocabulary: int,
    dataset: str,
    width: int,
    layers: int,
    heads: int,
    length: int,
    batch_size: int,
    steps: int,
    evaluations: int,
    batches: Any = None,
) -> Task:
    """Next-character prediction; evaluates ``val_loss`` in nats per character on fixed windows.

    ``tokens`` are the training, validation and test sequences; ``batches`` replaces the training sequence by a stream.
    """
    train, validation, test = tokens
    init, apply = functional(
        lambda rngs: CharLM(vocabulary=vocabulary, width=width, layers=layers, heads=heads, length=length, rngs=rngs)
    )

    def entropy(params: Any, state: Any, window: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
        logits, state = apply(params, state, window[:, :-1], train=train)
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean(), state

    def windows(sequence: np.ndarray, count: int = 256) -> dict[str, np.ndarray]:
        starts = np.linspace(0, len(sequence) - length - 1, count).astype(np.int64)
        return {"tokens": sequence[starts[:, None] + np.arange(length + 1)]}

    return Task(
        name=name,
        init=init,
        loss=lambda params, state, batch, key: entropy(params, state, batch["tokens"], train=True),
        evaluate=lambda params, state, data, key: {"val_loss": entropy(params, state, data["tokens"], train=False)[0]},
        final=lambda params, state, data, key: {"loss": entropy(params, state, data["tokens"], train=False)[0]},
        batches=batches or Windows(train, length, batch_size),
        validation=windows(validation),
        test=windows(test),
        steps=steps,
        eval_every=steps // evaluations,
        metric="val_loss",
        higher_is_better=False,
        batch_size=batch_size,
        description={
            "kind": "training",
            "modality": "text",
            "dataset": dataset,
            "n_train": len(train),
            "seq_len": length,
            "n_classes": vocabulary,
        },
        model={
            "family": "decoder",
            "params": count_parameters(init),
            "layers": layers,
            "width": width,
            "heads": heads,
            "kv_heads": heads,
            "dtype": "float32",
        },
    )


def python_topics_task(
    *, batch_size: int, steps: int, evaluations: int, width: int = 64, layers: int = 2, heads: int = 4, length: int = 48
) -> Task:
    """Character language model on the reference text that ships with Python."""
    text = load_python_topics()
    return language_model(
        f"python-text-b{batch_size}",
        (text.train, text.validation, text.test),
        vocabulary=len(text.alphabet),
        dataset="pydoc-topics",
        width=width,
        layers=layers,
        heads=heads,
        length=length,
        batch_size=batch_size,
        steps=steps,
        evaluations=evaluations,
    )
