"""Casts whose binary point is learned with the weights, one for each tensor or channel.

    F = round(f),   q = overflow(round(x·2^F))·2^(−F)
    ∂q/∂x = 1 inside the range, 0 outside                     (wrap: 1 everywhere)
    ∂q/∂f = ln 2·(x − q) inside, −ln 2·q outside              (wrap: ln 2·(x − q))

The second rule is the derivative of clip(v)·2^(−f), v = x·2^f, with rounding passed straight through. The gradient of f
is the sum over all N entries that share it, times g = 1/√(N·hi) with hi the largest raw integer: without g, f of large
tensors moves too fast to learn few bits.

When to use it: 3 or 4 bits, where a learned point is clearly better than a calibrated one that stays. From 5 bits on,
fine-tuning with the point that `calibrate` gives is as good, and simpler; at 2 bits training may diverge. Give f its
own optimizer (`frac_labels`): Adam with about 1e-2 decayed to 0, no weight decay. When f crosses a half-integer all
values jump by a factor of two, so let its rate end at 0, or `freeze` it for the last epochs.

The cast is the paper's (Dai et al., arXiv 2401.17544). Its gradients for f, and g, are reconstructed, since no code is
published: the rule is that of learned step sizes, Esser et al., arXiv 1902.08153, and of thresholds, Jain et al., arXiv
1903.08066, for steps that are powers of two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxaccel.compression.fixed_point.casting import as_floats, check_held
from jaxaccel.compression.fixed_point.formats import FixedPoint, check_word
from jaxaccel.compression.fixed_point.multiplier_free import check_hot, k_hot
from jaxaccel.compression.fixed_point.rounding import (
    power_of_two,
    round_and_fit,
    round_as_floats,
    rounds_as_floats,
    take_apart,
)

LN2 = math.log(2.0)


def binary_point(f: Any, *, word: int | Any) -> Int[Array, "*S"]:
    """F that a float f stands for: rounded, ties to even, and kept in [W − 32, W + 31] as the casts keep it.

    Raises:
        ValueError: outside ``jit``, if ``f`` is not finite.

    >>> binary_point(jnp.array([2.4, 3.5, 99.0]), word=4).tolist()
    [2, 4, 35]
    """
    check_word(word, False)
    f = _points(f)
    return jnp.clip(jnp.round(jnp.nan_to_num(f)), word - 32, word + 31).astype(jnp.int32)


def _points(f: Any) -> Array:
    f = jnp.asarray(f)
    if not jnp.issubdtype(f.dtype, jnp.floating):
        f = f.astype(jnp.float32)
    finite = jnp.isfinite(f).all()  # under jit a tracer even of a constant
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"f is {f}, expected finite numbers")
    return f


def trainable_cast(
    x: Any,
    f: Any,
    *,
    word: int | Any,
    signed: bool | Any = True,
    rounding: str | Any = "rnd",
    overflow: str | Any = "sat",
    grad_scale: str | Any = "lsq",
    allow_wrap: bool = False,
    hot: int | Any | None = None,
    hot_mode: str | Any = "nearest",
) -> Array:
    """Cast to a word of W bits whose binary point f is a parameter.

    Args:
        x: floats of any width, any shape.
        f: float: one for all, or a shape that broadcasts to that of ``x``: [C] for channels of the last axis, [C, 1, 1]
            for another. Under ``jit`` a value that is not finite makes the result NaN.
        word: W, 2 to 25 bits (24 without sign): what float32 holds.
        signed: whether one bit is a sign.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`.
        grad_scale: ``"lsq"`` multiplies the gradient of ``f`` by 1/√(N·hi), ``"none"`` does not. N is the number of
            entries that share an ``f`` in this call: under ``vmap``, of one example.
        allow_wrap: permit ``overflow="wrap"``. Its gradients are those of a cast that never overflows, which is right
            only while nothing wraps.
        hot: also restrict integers to so many ones, see `k_hot`.
        hot_mode: how `k_hot` chooses.

    Returns:
        float32, or float64 for float64: 16 bits do not hold most formats.

    Raises:
        ValueError: for a width or mode that is not known, ``"wrap"`` without ``allow_wrap``, shapes that do not fit,
            or, outside ``jit``, an ``f`` that is not finite.

    >>> x = jnp.array([0.3, -0.25, 9.0])
    >>> trainable_cast(x, 1.2, word=4).tolist()
    [0.5, 0.0, 3.5]
    >>> slope = jax.grad(lambda f: trainable_cast(x, f, word=4, grad_scale="none").sum())(1.2)
    >>> round(float(slope), 3)
    -2.738
    """
    kind = _check_options(word, signed, rounding, overflow, grad_scale, allow_wrap, hot, hot_mode)
    x, f = as_floats(x), _points(f)
    check_held(word, signed, x.dtype)
    if f.ndim > x.ndim or any(n not in (1, m) for n, m in zip(f.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(f"f has shape {f.shape}, expected one that broadcasts to that of x, {x.shape}")
    scale = 1.0
    if grad_scale == "lsq":
        scale = (x.size // max(f.size, 1) * kind.hi) ** -0.5 if x.size else 0.0
    return _trainable(x, f, kind, scale, hot, hot_mode)


def _check_options(
    word: Any, signed: Any, rounding: Any, overflow: Any, grad_scale: Any, allow_wrap: Any, hot: Any, hot_mode: Any
) -> FixedPoint:
    kind = FixedPoint(word, 0, signed, rounding, overflow)
    if grad_scale not in ("lsq", "none"):
        raise ValueError(f"grad_scale is {grad_scale!r}, expected 'lsq' or 'none'")
    if overflow == "wrap" and not allow_wrap:
        raise ValueError(
            "overflow is 'wrap', expected a saturating mode in training, whose gradients are right; or allow_wrap=True"
        )
    if hot is not None:
        check_hot(hot, word, hot_mode, signed)
    return kind


def _values(x: Array, f: Array, kind: FixedPoint, hot: int | None, hot_mode: str) -> tuple[Array, Array]:
    """Values in the format, and where the rounded number was inside the range."""
    F = binary_point(f, word=kind.word)
    if hot is None and rounds_as_floats(kind):
        m, inside = round_as_floats(x, F, kind)
        return jnp.where(jnp.isfinite(f), m * power_of_two(-F, x.dtype), jnp.nan), inside
    parts = take_apart(x)
    m, inside = round_and_fit(parts, F, kind)
    if hot is not None:
        m = k_hot(m, k=hot, word=kind.word, mode=hot_mode, signed=kind.signed)
    q = m.astype(x.dtype) * power_of_two(-F, x.dtype)
    return jnp.where(parts.nan | ~jnp.isfinite(f), jnp.nan, q), inside


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _trainable(x: Array, f: Array, kind: FixedPoint, scale: float, hot: int | None, hot_mode: str) -> Array:
    return _values(x, f, kind, hot, hot_mode)[0]


@_trainable.defjvp
def _trainable_jvp(kind: Any, scale: Any, hot: Any, hot_mode: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, f = primals
    q, inside = _values(x, f, kind, hot, hot_mode)
    if kind.overflow == "wrap":
        inside = jnp.isfinite(x)
    # The transpose of the broadcast of f sums over all entries that share it.
    by_point = (LN2 * scale) * (jnp.where(inside, x, 0) - q) * tangents[1].astype(q.dtype)
    return q, jnp.where(inside, tangents[0], 0) + by_point


def freeze(
    f: Any, *, word: int | Any, signed: bool | Any = True, rounding: str | Any = "rnd", overflow: str | Any = "sat"
) -> Any:
    """Static formats from learned points: for inference on integers, and for hardware.

    Args:
        f: pytree of floats: scalars, or vectors for channels. Concrete, not under ``jit``. ``None`` stays.
        word: W, the same for the tree.
        signed: see `FixedPoint`.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`.

    Returns:
        The tree with a `FixedPoint` for each scalar, and a tuple of them for each vector.

    Raises:
        ValueError: for an ``f`` that is not finite, or has several axes of more than one entry.

    >>> freeze({"w": 2.6, "none": None}, word=4)["w"].frac
    3
    """

    def one(f: Any) -> FixedPoint | tuple[FixedPoint, ...]:
        points = np.asarray(binary_point(f, word=word))
        if sum(n > 1 for n in points.shape) > 1:
            raise ValueError(f"f has shape {points.shape}, expected a scalar or one axis of channels")
        formats = tuple(FixedPoint(word, int(F), signed, rounding, overflow) for F in points.ravel())
        return formats if points.ndim else formats[0]

    return jax.tree.map(one, f)


def quantize_params(params: Any, f: Any, **options: Any) -> Any:
    """Cast the leaves of any pytree of parameters, each with its own point, for any ``apply_fn(params, x)``.

    Args:
        params: pytree of floats.
        f: pytree of the same structure; leaves that are ``None`` in it stay as they are.
        **options: those of `trainable_cast`; ``word`` is needed.

    Raises:
        ValueError: if structures differ, and as `trainable_cast` does.

    >>> q = quantize_params({"w": jnp.array([0.3]), "b": jnp.array([0.3])}, {"w": 1.0, "b": None}, word=4)
    >>> q["w"].tolist(), q["b"].dtype
    ([0.5], dtype('float32'))
    """
    if "word" not in options:
        raise ValueError("word is missing, expected the number of bits")
    return jax.tree.map(
        lambda f, p: p if f is None else trainable_cast(p, f, **options), f, params, is_leaf=lambda f: f is None
    )


def frac_labels(tree: Any, name: str = "frac") -> Any:
    """Labels for ``optax.multi_transform``: ``"frac"`` for leaves below a key ``name``, else ``"weights"``.

    >>> frac_labels({"frac": {"w": 1.0}, "params": {"w": 2.0}})
    {'frac': {'w': 'frac'}, 'params': {'w': 'weights'}}
    """

    def label(path: Any, _: Any) -> str:
        keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
        return "frac" if name in keys else "weights"

    return jax.tree_util.tree_map_with_path(label, tree)
