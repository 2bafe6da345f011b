"""The papers' own sizes: CIFAR, ImageNet and large text through Hugging Face `datasets`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import hub
from experiments.runner.train import Task
from experiments.tasks import classification, count_parameters, functional
from jaxaccel.models import CNN, VisionTransformer


def cifar_splits(
    name: str = "uoft-cs/cifar10", *, validation: int = 10_000, label: str = "label", **options: Any
) -> dict[str, dict[str, np.ndarray]]:
    """Read CIFAR-10 or CIFAR-100 into memory; the last ``validation`` training images are held out.

    Images are f32 in [0, 1]. ``options`` are passed to `hub.load`: a local copy is opened with
    ``name="parquet", data_files={...}``.
    """

    def example(row: Any) -> dict[str, np.ndarray]:
        image = row["img"] if "img" in row else row["image"]
        return {
            "images": np.asarray(image, np.float32) / 255.0,
            "labels": np.asarray(row[label], np.int32),
        }

    train, test = hub.take(name, "train", example, **options), hub.take(name, "test", example, **options)
    rows = len(train["labels"])
    if not 0 < validation < rows:
        raise ValueError(f"validation must be in [1, {rows - 1}], got {validation}")
    return {
        "train": {k: v[:-validation] for k, v in train.items()},
        "validation": {k: v[-validation:] for k, v in train.items()},
        "test": test,
    }


def flip_and_shift(generator: np.random.Generator, batch: dict[str, np.ndarray], pad: int = 4) -> dict[str, np.ndarray]:
    """Random horizontal flips and shifts by up to ``pad`` pixels, the usual augmentation for CIFAR."""
    images = batch["images"]
    count, height, width, _ = images.shape
    flip = np.asarray(generator.random(count) < 0.5)
    images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = generator.integers(0, 2 * pad + 1, (2, count))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    moved = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {**batch, "images": moved}


def cifar10_task(*, batch_size: int, epochs: int, splits: Any = None) -> Task:
    """CIFAR-10 with a convolutional network of about 3 million parameters, images in [-1, 1]."""
    splits = splits or cifar_splits()
    splits = {part: {"images": data["images"] * 2 - 1, "labels": data["labels"]} for part, data in splits.items()}
    return classification(
        "cifar10-cnn",
        lambda rngs: CNN((32, 32, 3), [64, 128, 256], hidden=640, classes=10, rngs=rngs),
        splits,
        family="cnn",
        batch_size=batch_size,
        epochs=epochs,
        description={
            "dataset": "cifar10",
            "n_train": len(splits["train"]["labels"]),
            "n_features": 3072,
            "n_classes": 10,
        },
        augment=flip_and_shift,
    )


def imagenet_example(size: int = 224) -> Any:
    """Turn a row into ``{"images": [size, size, 3] u8, "labels": i32}``: shorter side scaled, centre cut out."""

    def example(row: Any) -> dict[str, np.ndarray]:
        image = row["image"].convert("RGB")
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
        # Bytes travel to the device and become floats there: a quarter of the traffic.
        return {"images": np.asarray(image, np.uint8), "labels": np.asarray(row["label"], np.int32)}

    return example


def imagenet_vit_task(
    *,
    batch_size: int,
    epochs: int,
    name: str = "ILSVRC/imagenet-1k",
    size: int = 224,
    classes: int = 1000,
    n_train: int = 1_281_167,
    validation_rows: int = 10_000,
    patch: int = 16,
    width: int = 384,
    layers: int = 12,
    heads: int = 6,
    buffer: int = 10_000,
    **options: Any,
) -> Task:
    """ViT-S/16 on ImageNet, streamed. Options after ``heads`` go to `hub.load`; small values make a test of it."""
    init, apply = functional(
        lambda rngs: VisionTransformer(
            (size, size, 3), patch=patch, width=width, layers=layers, heads=heads, classes=classes, rngs=rngs
        )
    )
    example = imagenet_example(size)
    held_out = hub.take(name, "validation", example, validation_rows * 2, **options)

    def images(data: Any) -> jax.Array:
        return data["images"].astype(jnp.float32) / 127.5 - 1

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        flipped = jnp.where(
            jax.random.bernoulli(key, shape=(batch["labels"].shape[0], 1, 1, 1)),
            batch["images"][:, :, ::-1],
            batch["images"],
        )
        logits, state = apply(params, state, images({"images": flipped}), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), state

    def measure(params: Any, state: Any, data: Any, prefix: str) -> dict[str, jax.Array]:
        def part(rows: Any) -> tuple[jax.Array, jax.Array]:
            logits, _ = apply(params, state, images(rows), train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["labels"])
            return losses, jnp.argmax(logits, -1) == rows["labels"]

        losses, correct = jax.lax.map(lambda row: part(jax.tree.map(lambda a: a[None], row)), data, batch_size=64)
        return {f"{prefix}loss": losses.mean(), f"{prefix}accuracy": correct.mean()}

    per_epoch = max(1, n_train // batch_size)
    sync = min(per_epoch, 50)
    per_epoch -= per_epoch % sync  # evaluations fall on moments of waiting
    half = len(held_out["labels"]) // 2
    return Task(
        name="imagenet-vit",
        init=init,
        loss=loss,
        evaluate=lambda params, state, data, key: measure(params, state, data, "val_"),
        final=lambda params, state, data, key: measure(params, state, data, ""),
        batches=hub.Stream(hub.load(name, "train", **options), example, batch_size, buffer),
        validation={k: v[:half] for k, v in held_out.items()},
        test={k: v[half:] for k, v in held_out.items()},
        steps=per_epoch * epochs,
        eval_every=per_epoch,
        steps_per_dispatch=1,
        steps_per_sync=sync,
        metric="val_loss",
        higher_is_better=False,
        batch_size=batch_size,
        description={
            "kind": "training",
            "modality": "image",
            "dataset": name,
            "n_train": n_train,
            "n_classes": classes,
        },
        model={
            "family": "vit",
            "params": count_parameters(init),
            "layers": layers,
            "width": width,
            "heads": heads,
            "dtype": "float32",
        },
    )
