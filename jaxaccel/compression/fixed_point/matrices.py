"""Fixed-point weights of models that multiply by `jaxaccel.compression.linear`: the decoder, or one of your own.

    f = calibrate(params, word=8)                                  # None for leaves that stay as they are
    small = int8_weights(params, f, word=8)                        # a quarter of the bytes; float activations
    layers = fixed_point_matrices(layers, f, x_fmt=FixedPoint(8, 4), word=8)                  # trains
    layers = fixed_point_matrices(layers, f, x_fmt=FixedPoint(8, 4), word=8, integer=True)    # the same bits

A scale that is a power of two is a scale: raw integers m of a binary point F are an `Int8Weight` with scale 2^(−F),
and it stands for the very numbers that `quantize_params` gives. `fixed_point_matrices` casts the inputs of each product
too, and sums are exact: in float32 for training, in int32 for inference, with the same results bit for bit.

When to use it: `int8_weights` where decoding waits for reading weights or memory is short, and one set of weights
serves both text here and hardware there. When not: for decoding alone, `quantize_weights`, whose scales fit each row
better.

The arithmetic is that of Dai et al., arXiv 2401.17544, on matrices [out, in] as decoders store them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxaccel.compression.fixed_point.casting import as_floats, cast, from_int, to_int
from jaxaccel.compression.fixed_point.dot import check_float32, qdot
from jaxaccel.compression.fixed_point.formats import FixedPoint
from jaxaccel.compression.fixed_point.rounding import power_of_two, round_and_fit, take_apart
from jaxaccel.compression.fixed_point.trainable import binary_point, trainable_cast
from jaxaccel.compression.weight_only import Int8Weight, Product


def _check_narrow(name: str, word: Any) -> None:
    if isinstance(word, bool) or not isinstance(word, int) or not 2 <= word <= 8:
        raise ValueError(f"{name} is {word!r}, expected 2 to 8 bits: raw integers are kept in int8")


def _raw(w: Any, f: Any, kind: FixedPoint) -> Int8Weight:
    """Raw integers of a matrix or a stack of them, and their steps by output."""
    w, F = as_floats(w, "params"), binary_point(f, word=kind.word)
    if F.ndim > w.ndim or (F.ndim and F.shape[-1] != 1) or jnp.broadcast_shapes(F.shape, w.shape) != w.shape:
        raise ValueError(f"f has shape {F.shape} for a matrix {w.shape}, expected a scalar or [..., out or 1, 1]")
    m, _ = round_and_fit(take_apart(w), F, kind)
    step = jnp.broadcast_to(power_of_two(-F), (*w.shape[:-1], 1))[..., 0]
    return Int8Weight(m.astype(jnp.int8), step)


def int8_weights(
    params: Any, f: Any, *, word: int | Any, rounding: str | Any = "rnd", overflow: str | Any = "sat"
) -> Any:
    """Parameters in fixed point, with matrices as `Int8Weight`: what `linear`, and so a decoder's ``generate``, takes.

    Args:
        params: pytree of floats. Matrices are [out, in], or stacks [L, out, in].
        f: pytree of the same structure, from `calibrate` or trained; ``None`` for leaves that stay, such as experts,
            whose kernels read floats. For matrices a scalar, [out, 1], or [L, 1, 1] and [L, out, 1] for stacks.
        word: W, 2 to 8; each weight takes one byte.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`.

    Returns:
        The tree. Leaves of fewer than two axes are cast and stay floats; do not pass stacked vectors. `dequantize`
        gives exactly what `quantize_params` does.

    Raises:
        ValueError: for widths, modes or shapes of ``f`` that do not fit, or structures that differ.

    >>> w = int8_weights({"w": jnp.array([[0.3, -1.0]])}, {"w": 2.0}, word=4)["w"]
    >>> w.q.tolist(), w.scale.tolist()
    ([[1, -4]], [0.25])
    """
    _check_narrow("word", word)
    kind = FixedPoint(word, 0, True, rounding, overflow)

    def one(f: Any, w: Any) -> Any:
        if f is None:
            return w
        if jnp.ndim(w) < 2:
            return trainable_cast(w, f, word=word, rounding=rounding, overflow=overflow, allow_wrap=True)
        return _raw(w, f, kind)

    return jax.tree.map(one, f, params, is_leaf=lambda f: f is None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["x_fmt", "word"])
@dataclasses.dataclass(frozen=True)
class FixedPointMatrix(Product):
    """A matrix in fixed point whose product casts its inputs; made by `fixed_point_matrices`.

    Attributes:
        values: float32 [..., out, in] that are in the format, for training; int8 of the same shape for integers.
        scale: float32 [..., out], powers of two; ``None`` beside floats.
        x_fmt: format of the inputs.
        word: W of the matrix.
    """

    values: Any
    scale: Any
    x_fmt: FixedPoint
    word: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.values.shape)

    def multiply(self, rows: Float[Array, "M in"]) -> Float[Array, "M out"]:
        """Exact sums of products of cast inputs; float32."""
        rows = rows.astype(jnp.float32)
        if self.scale is None:
            y: Array = jax.lax.dot_general(
                cast(rows, self.x_fmt), self.values, (((1,), (1,)), ((), ())), jax.lax.Precision.HIGHEST
            )
            return y
        total = qdot(to_int(rows, self.x_fmt), self.values.T, x_fmt=self.x_fmt, w_fmt=FixedPoint(self.word, 0))
        # At most 2^24 steps of a power of two: float32 holds them.
        return from_int(total, FixedPoint(25, self.x_fmt.frac)) * self.scale


def fixed_point_matrices(
    params: Any, f: Any, *, x_fmt: Any, word: int | Any, integer: bool = False,
    rounding: str | Any = "rnd", overflow: str | Any = "sat",
) -> Any:  # fmt: skip
    """Parameters whose products are in fixed point on both sides, for training or on integers.

    Args:
        params: pytree of matrices [out, in] or stacks, and what goes with them; those of a decoder's layers.
        f: pytree of binary points as in `int8_weights`; ``None`` for leaves that stay.
        x_fmt: format of the inputs, one for all or a pytree of them of the structure of ``f``; at most 8 bits.
        word: W of the weights, 2 to 8.
        integer: products of int8, summed in int32, instead of floats that are exact. No gradients.
        rounding: of the weights, see `FixedPoint`.
        overflow: of the weights.

    Returns:
        The tree with a `FixedPointMatrix` for each matrix that has a point. Results are equal bit for bit for both
        values of ``integer``. Gradients reach ``params`` and ``f`` as `trainable_cast` passes them, inputs as `cast`.

    Raises:
        ValueError: as `int8_weights`, and where a sum of so many products might not be exact in float32.

    >>> layer, f = {"w": jnp.array([[0.3, -1.0]])}, {"w": 2.0}
    >>> w = fixed_point_matrices(layer, f, x_fmt=FixedPoint(4, 1), word=4, integer=True)["w"]
    >>> w.multiply(jnp.array([[1.2, 0.6]])).tolist()
    [[-0.25]]
    """
    _check_narrow("word", word)
    kind = FixedPoint(word, 0, True, rounding, overflow)
    formats = jax.tree.map(lambda _: x_fmt, f) if isinstance(x_fmt, FixedPoint) else x_fmt

    def one(f: Any, w: Any, x_fmt: Any) -> Any:
        if f is None:
            return w
        if not isinstance(x_fmt, FixedPoint):
            raise ValueError(f"x_fmt has {x_fmt!r} beside a matrix, expected a FixedPoint")
        _check_narrow("x_fmt.word", x_fmt.word)
        if not x_fmt.signed:
            raise ValueError("x_fmt is without sign, expected a signed format: inputs are kept in int8")
        if jnp.ndim(w) < 2:
            raise ValueError(f"params has a leaf of shape {jnp.shape(w)} with a point, expected matrices: f None there")
        check_float32(jnp.shape(w)[-1], x_fmt, kind)
        if integer:
            raw = _raw(w, f, kind)
            return FixedPointMatrix(raw.q, raw.scale, x_fmt, word)
        cast_w = trainable_cast(w, f, word=word, rounding=rounding, overflow=overflow, allow_wrap=True)
        return FixedPointMatrix(cast_w.astype(jnp.float32), None, x_fmt, word)

    return jax.tree.map(one, f, params, formats, is_leaf=lambda f: f is None)
