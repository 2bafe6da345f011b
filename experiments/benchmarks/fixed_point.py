"""Fixed point on this machine: the product with its cast in one program, and a training step on cast numbers."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import cost
from jaxaccel.compression import linear
from jaxaccel.compression.fixed_point import (
    FixedPoint,
    calibrate,
    cast,
    exact_matmul,
    int8_weights,
    quantize_params,
)
from kernels_pallas.fixed_point_matmul import fixed_point_matmul

SIZES = ((1, 2048, 2048), (8, 2048, 2048), (256, 1024, 1024), (512, 2048, 2048))
"""Rows, terms, columns."""
STEPS = ((128, 256, 256), (1024, 256, 256), (1024, 1024, 1024))
"""Batch, inputs and hidden units of a network of three layers whose training step is timed."""
WORD = 8
CLASSES = 10


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Products of every size, then weights for decoding, then training steps."""
    for size in SIZES:
        yield from _products(*size, options)
    for size in STEPS:
        yield _training(*size, options)


def _products(m: int, k: int, n: int, options: BenchOptions) -> Iterator[Measurement]:
    """Fused against the bare product of int8, whose results are four times as large, and against float32."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-128, 128, shape), jnp.int8) for shape in ((m, k), (k, n)))
    bias = jnp.asarray(rng.integers(-1000, 1000, n), jnp.int32)
    wide_x, wide_w = x.astype(jnp.float32), w.astype(jnp.float32)
    matrix = wide_w.T
    small = int8_weights(matrix, jnp.float32(0), word=WORD)
    fused = jax.jit(functools.partial(fixed_point_matmul, shift=9))
    bare = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32))
    float_product, float_linear = jax.jit(lambda x, w: x @ w), jax.jit(linear)
    calls: dict[str, Callable[[], Any]] = {
        "fused": functools.partial(fused, x, w, bias),
        "bare": functools.partial(bare, x, w),
        "float32": functools.partial(float_product, wide_x, wide_w),
    }
    if m <= 8:
        calls["weights in float32"] = functools.partial(float_linear, wide_x, matrix)
        calls["weights in int8"] = functools.partial(float_linear, wide_x, small)
    timed = cost.time_in_turn(calls, repeats=options.repeats)
    megabytes = {
        "fused": m * k + k * n + m * n,
        "bare": m * k + k * n + 4 * m * n,
        "float32": 4 * (m * k + k * n + m * n),
    }
    where = f"{m} x {k} x {n}"
    for other in ("bare", "float32"):
        name = {"bare": "int8 without the cast", "float32": "float32"}[other]
        moved = f"{megabytes['fused'] / 1e6:.1f} MB / {megabytes[other] / 1e6:.1f} MB"
        yield _ratio(timed, "fused", other, f"fixed-point product / {name}, {where}", "", moved)
    if m <= 8:
        name = f"linear, float32 / power-of-two int8 weights, {where}"
        moved = f"{4 * k * n / 1e6:.1f} MB / {k * n / 1e6:.1f} MB of weights"
        yield _ratio(timed, "weights in float32", "weights in int8", name, "", moved)


def _training(batch: int, inputs: int, hidden: int, options: BenchOptions) -> Measurement:
    """A step of Adam on weights, points and cast activations, against the same step in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((inputs, hidden), (hidden, hidden), (hidden, CLASSES))
    params = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys, shapes, strict=False)]
    x = jax.random.normal(keys[3], (batch, inputs))
    labels = jnp.arange(batch) % CLASSES
    rule = optax.adam(1e-3)
    points, fmt = calibrate(params, word=WORD), FixedPoint(WORD, 4)

    def in_float(params: Any) -> jax.Array:
        h = x
        for number, w in enumerate(params):
            h = h @ w if number == 0 else jax.nn.relu(h) @ w
        return optax.softmax_cross_entropy_with_integer_labels(h, labels).mean()

    def in_fixed_point(both: Any) -> jax.Array:
        params, f = both
        h = cast(x, fmt)
        for number, w in enumerate(quantize_params(params, f, word=WORD)):
            h = h if number == 0 else cast(jax.nn.relu(h), fmt)
            h = exact_matmul(h, w, x_fmt=fmt, w_fmt=fmt)
        return optax.softmax_cross_entropy_with_integer_labels(h, labels).mean()

    def step(loss: Callable[[Any], jax.Array], params: Any, state: Any) -> Any:
        value, slope = jax.value_and_grad(loss)(params)
        updates, state = rule.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    both = (params, points)
    calls = {
        "fixed": functools.partial(jax.jit(functools.partial(step, in_fixed_point)), both, rule.init(both)),
        "float": functools.partial(jax.jit(functools.partial(step, in_float)), params, rule.init(params)),
    }
    timed = cost.time_in_turn(calls, repeats=options.repeats)
    name = f"training step, fixed point / float32, batch {batch}, {inputs}-{hidden}-{hidden}-{CLASSES}"
    return _ratio(timed, "fixed", "float", name, "<= 1.5")


def _ratio(timed: Any, top: str, bottom: str, name: str, goal: str = "", extra: str = "") -> Measurement:
    value, interval = cost.ratio(timed, top, bottom)
    detail = f"{1e3 * timed[top].median:.3f} ms / {1e3 * timed[bottom].median:.3f} ms"
    return Measurement(name, value, interval, goal, f"{detail}; {extra}" if extra else detail)
