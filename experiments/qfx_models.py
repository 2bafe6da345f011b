"""Networks, training and counting of the QFX experiment: all seeds, and both kinds of binary points, in one program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxaccel.compression.fixed_point import (
    BinaryPoint,
    QBatchNorm,
    QConv,
    QDense,
    QInput,
    QMean,
    QRelu,
    QResidual,
    QSequential,
    adders,
    calibrate_layers,
    from_int,
    int_forward,
    set_mode,
    to_int,
    weight_integers,
)

CLAMP = 2.0
"""How far a learned f may move from its calibrated start: at 2 bits training diverges without."""


def mlp(word: int, hot: int | None, rngs: nnx.Rngs, image: tuple[int, int, int], classes: int) -> QSequential:
    """64-64-64-10 for digits; products, scales and shifts are all quantised."""
    layers: list[Any] = [QInput(word=word)]
    inputs = image[0] * image[1] * image[2]
    for outputs in (64, 64, classes):
        last = outputs == classes
        layers.append(QDense(inputs, outputs, word=word, hot=hot, rngs=rngs))
        layers.append(QBatchNorm(outputs, word=word, out_word=word + 4 if last else word, hot=hot))
        if not last:
            layers.append(QRelu())
        inputs = outputs
    return QSequential(layers)


def cnn(word: int, hot: int | None, rngs: nnx.Rngs, image: tuple[int, int, int], classes: int) -> QSequential:
    """A convolution, a residual one, averages, logits."""
    height, width, channels = image
    body = QSequential([QConv(8, 8, (3, 3), word=word, hot=hot, rngs=rngs), QBatchNorm(8, word=word, hot=hot)])
    return QSequential(
        [
            QInput(word=word),
            QConv(channels, 8, (3, 3), word=word, hot=hot, rngs=rngs),
            QBatchNorm(8, word=word, hot=hot),
            QRelu(),
            QResidual(body, word=word),
            QRelu(),
            QMean((height // 4, width // 4), word=word),
            QDense(128, classes, word=word, hot=hot, rngs=rngs),
            QBatchNorm(classes, word=word, out_word=word + 4, hot=hot),
        ]
    )


def resnet18(word: int, hot: int | None, rngs: nnx.Rngs, image: tuple[int, int, int], classes: int) -> QSequential:
    """ResNet-18 for small images: a 3x3 stem, four stages of two blocks. The stem and logits have 8 bits at least."""
    wide = max(word, 8)

    def unit(a: int, b: int, size: int, stride: int, relu: bool) -> list[Any]:
        conv = QConv(a, b, (size, size), strides=(stride, stride), word=word, hot=hot, rngs=rngs)
        return [conv, QBatchNorm(b, word=word, hot=hot), *([QRelu()] if relu else [])]

    layers = [QInput(word=wide), QConv(image[2], 64, (3, 3), word=wide, rngs=rngs), QBatchNorm(64, word=word), QRelu()]
    last = 64
    for stage in range(4):
        for index in range(2):
            outputs, stride = 64 * 2**stage, 2 if stage and not index else 1
            body = QSequential([*unit(last, outputs, 3, stride, True), *unit(outputs, outputs, 3, 1, False)])
            short = None if stride == 1 else QSequential(unit(last, outputs, 1, stride, False))
            layers += [QResidual(body, short, word=word), QRelu()]
            last = outputs
    layers += [QMean(word=wide), QDense(last, classes, word=wide, out_word=wide + 4, bias=True, rngs=rngs)]
    return QSequential(layers)


MODELS: dict[str, Callable[..., QSequential]] = {"mlp": mlp, "cnn": cnn, "resnet18": resnet18}


@functools.cache
def graph(name: str, word: int, hot: int | None, mode: str, image: tuple[int, int, int], classes: int) -> Any:
    """A network without its numbers."""
    model = nnx.eval_shape(lambda: MODELS[name](word, hot, nnx.Rngs(0), image, classes))
    set_mode(model, mode)
    return nnx.split(model, BinaryPoint, nnx.Param, ...)[0]


def initial(name: str, word: int, keys: Any, image: tuple[int, int, int], classes: int) -> Any:
    """Numbers of all seeds: points, parameters and statistics, stacked."""

    def one(key: Any) -> Any:
        model = MODELS[name](word, None, nnx.Rngs(key), image, classes)
        return nnx.split(model, BinaryPoint, nnx.Param, ...)[1:]

    return jax.jit(jax.vmap(one))(keys)


@functools.cache
def trainer(definition: Any, steps: int, batch: int, rate: float) -> Any:
    """A compiled ``(numbers [S], point rates [A], x, y, keys [S]) -> numbers [S, A]``; a rate of 0 keeps points."""
    cosine = optax.cosine_decay_schedule(1.0, steps)
    tx = optax.adam(lambda t: rate * cosine(t))
    point_tx = optax.scale_by_adam()

    def fit(numbers: Any, point_rate: Any, x: Any, y: Any, key: Any) -> Any:
        start, params, rest = numbers

        def step(carry: Any, t: Any) -> Any:
            points, params, rest, state, point_state = carry
            rows = jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, len(x))

            def loss(points: Any, params: Any) -> Any:
                model = nnx.merge(definition, points, params, rest, copy=True)
                logits = model(x[rows], train=True)
                parts: Any = nnx.split(model, BinaryPoint, nnx.Param, ...)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), parts[3]

            slopes, rest = jax.grad(loss, (0, 1), has_aux=True)(points, params)
            updates, state = tx.update(slopes[1], state, params)
            steps_of_points, point_state = point_tx.update(slopes[0], point_state)
            moved = jax.tree.map(
                lambda f, d, s: jnp.clip(f - point_rate * cosine(t) * d, s - CLAMP, s + CLAMP),
                points, steps_of_points, start,
            )  # fmt: skip
            return (moved, optax.apply_updates(params, updates), rest, state, point_state), None

        carry = (start, params, rest, tx.init(params), point_tx.init(start))
        return jax.lax.scan(step, carry, jnp.arange(steps))[0][:3]

    by_rate = jax.vmap(fit, (None, 0, None, None, None))
    return jax.jit(jax.vmap(by_rate, (0, None, None, None, 0)))


@functools.cache
def evaluator(definition: Any) -> Any:
    """A compiled ``(numbers [N], x) -> logits [N, rows, classes]`` with running statistics."""
    return jax.jit(jax.vmap(lambda numbers, x: nnx.merge(definition, *numbers, copy=True)(x), (0, None)))


@functools.cache
def calibrator(definition: Any, method: str) -> Any:
    """A compiled ``(numbers [S], x) -> numbers [S]`` that takes all points from one batch."""

    def one(numbers: Any, x: Any) -> Any:
        model = nnx.merge(definition, *numbers, copy=True)
        calibrate_layers(model, x, method=method)
        return nnx.split(model, BinaryPoint, nnx.Param, ...)[1:]

    return jax.jit(jax.vmap(one, (0, None)))


def accuracy(logits: Any, y: Any) -> list[float]:
    """Of each network."""
    return [float(a) for a in (jnp.argmax(logits, -1) == y).mean(-1)]


def in_hardware(definition: Any, numbers: Any, x: Any, logits: Any, hot: int | None) -> dict[str, int]:
    """Outputs that integers give otherwise (0 is right), and what a circuit of constant weights would consist of.

    Without few ones, a weight that is neither 0 nor a power of two is counted as a multiplier (a DSP block), and each
    sum as an adder; with few ones multipliers are shifts and adders.
    """
    model = nnx.merge(definition, *numbers, copy=True)
    spec, params = model.freeze(x.shape[1:], exact=False)
    raw = int_forward(spec, params, to_int(x, spec.fmt))
    wrong = int(jnp.sum(from_int(raw, spec.nodes[-1].out) != logits))
    matrices = weight_integers(params)
    costs = [adders(m) for m in matrices]
    sums = sum(int(np.maximum((m != 0).sum(0) - 1, 0).sum()) for m in matrices)
    return {
        "outputs": int(raw.size),
        "wrong": wrong,
        "adders": sum(int(c.adders) for c in costs) if hot is not None else sums,
        "dsps": 0 if hot is not None else sum(int(c.multipliers) for c in costs),
    }
