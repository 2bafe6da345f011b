"""Weights of a trained model in 8 or 16 bits, and the product that multiplies by them.

Decoding one token reads every weight once, so its time is bytes over bandwidth: 4 bytes a weight in float32, 2 in
bfloat16, 1 here. A matrix W ``[out, in]`` becomes integers with one scale for each output:

    scaleₒ = maxᵢ |Wₒᵢ| / 127,    Qₒᵢ = round(Wₒᵢ / scaleₒ),    y = scale · (Q x)

Only weights lose digits. Where a platform multiplies 8-bit integers faster than it converts them (CPU), x is written as
two 8-bit pieces, x ≈ s·hi + t·lo with t = s/254: together they hold 16 bits of the largest entry of each row, and their
two products cost one pass over Q. Elsewhere Q is converted to x's type inside the product.

When to use it: decoding, where memory traffic is the time. When not: prefill and training, which are limited by
multiplication; models that were trained in few bits (see the fixed-point methods).

The scheme is the common absmax one, e.g. Dettmers et al., LLM.int8(), arXiv 2208.07339 (section 2.1).
"""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Int8

FEW_ROWS = 32
"""Up to so many rows XLA on CPU multiplies ``W @ x.T`` faster than ``x @ W.T``, and int8 pays."""


class Int8Weight(NamedTuple):
    """A quantised matrix: ``scale[:, None] * q``."""

    q: Any  # int8 [..., out, in], in -127..127
    scale: Any  # float32 [..., out]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for."""
        return tuple(self.q.shape)


class Product(abc.ABC):
    """A matrix that brings its own product: what `linear` calls for forms of weights that live elsewhere.

    A subclass is a pytree, so that it can be a leaf of parameters, under ``jit`` and in a scan.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for, [out, in]."""

    @abc.abstractmethod
    def multiply(self, rows: Float[Array, "M in"]) -> Float[Array, "M out"]:
        """Rows times the transposed matrix."""


Weight = Float[Array, "out in"] | Int8Weight | Product


def quantize(weight: Float[Array, "*L out in"]) -> Int8Weight:
    """The integers and scales of a matrix, or of a stack of them. A row of zeros has scale 0.

    Raises:
        ValueError: if it is not a matrix, or (outside ``jit``) holds NaN or infinity.

    >>> w = quantize(jnp.array([[1.0, -0.5], [0.0, 0.0]]))
    >>> w.q.tolist(), w.scale.shape
    ([[127, -64], [0, 0]], (2,))
    """
    weight = jnp.asarray(weight)
    if weight.ndim < 2:
        raise ValueError(f"weight has shape {weight.shape}, expected a matrix [..., out, in]")
    values = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), -1)
    if not isinstance(largest, jax.core.Tracer) and not bool(jnp.isfinite(largest).all()):
        raise ValueError("weight holds NaN or infinity, expected finite numbers")
    scale = largest / 127
    steps = values / jnp.where(scale > 0, scale, 1)[..., None]
    return Int8Weight(jnp.round(steps).astype(jnp.int8), scale)


def dequantize(weight: Float[Array, "out in"] | Int8Weight, dtype: DTypeLike = jnp.float32) -> Float[Array, "out in"]:
    """The matrix that a weight stands for.

    >>> dequantize(quantize(jnp.array([[127.0, 3.0]]))).tolist()
    [[127.0, 3.0]]
    """
    if isinstance(weight, Int8Weight):
        return (weight.q.astype(jnp.float32) * weight.scale[..., None]).astype(dtype)
    return weight.astype(dtype)


def quantize_weights(params: Any, dtype: str = "int8") -> Any:
    """A pytree of parameters with its matrices in ``"int8"``, or all of it in ``"bfloat16"`` or ``"float32"``.

    Vectors (norms, biases) keep their type under ``"int8"``. Stacks ``[L, out, in]`` are quantised matrix by matrix;
    a leaf of two axes is taken for a matrix, so do not pass stacked vectors.

    Raises:
        ValueError: for another ``dtype``.

    >>> small = quantize_weights({"w": jnp.ones((4, 2)), "norm": jnp.ones(2)})
    >>> small["w"].q.dtype, small["norm"].dtype
    (dtype('int8'), dtype('float32'))
    """
    if dtype in ("bfloat16", "float32"):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), params)
    if dtype != "int8":
        raise ValueError(f"dtype is {dtype!r}, expected 'int8', 'bfloat16' or 'float32'")
    return jax.tree.map(lambda leaf: quantize(leaf) if jnp.ndim(leaf) >= 2 else jnp.asarray(leaf), params)


def _pieces(x: Float[Array, "M in"]) -> tuple[Int8[Array, "_ in"], Float[Array, "M 1"]]:
    """Two 8-bit pieces of each row, the coarse ones first, and the step of the coarse ones."""
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    units = x / jnp.where(step > 0, step, 1)
    coarse = jnp.round(units)
    fine = jnp.round((units - coarse) * 254)
    return jnp.concatenate([coarse, fine]).astype(jnp.int8), step


def _contract(x: Array, q: Array, dtype: DTypeLike) -> Array:
    """``x [M, in]`` times ``q [out, in]``: the last axes are summed."""
    return jax.lax.dot_general(x, q, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _int8_by_pieces(x: Float[Array, "M in"], q: Int8[Array, "out in"]) -> Float[Array, "M out"]:
    pieces, step = _pieces(x)
    sums = _contract(pieces, q, jnp.int32).astype(jnp.float32)
    coarse, fine = jnp.split(sums, 2)
    return step * (coarse + fine / 254)


def _int8_by_conversion(x: Float[Array, "M in"], q: Int8[Array, "out in"]) -> Float[Array, "M out"]:
    return _contract(x, q.astype(x.dtype), jnp.float32)


def _product(x: Float[Array, "M in"], weight: Float[Array, "out in"]) -> Float[Array, "M out"]:
    """In float32 sums."""
    if x.dtype != weight.dtype:
        x = x.astype(weight.dtype)
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    if x.shape[0] > FEW_ROWS:
        return _contract(x, weight, dtype)

    def matrix_first(x: Array, weight: Array) -> Array:
        # The barriers keep XLA from folding the transpositions into the product, which would undo the order.
        columns = jax.lax.optimization_barrier(x.T)
        y = jax.lax.dot_general(weight, columns, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T

    return jax.lax.platform_dependent(x, weight, cpu=matrix_first, default=lambda x, w: _contract(x, w, dtype))


def linear(x: Float[Array, "*B in"], weight: Weight, bias: Float[Array, "out"] | None = None) -> Float[Array, "*B out"]:
    """``x W^T + bias`` for a matrix ``[out, in]`` in any of its forms, in the dtype of ``x``.

    Products are summed in float32 (float64 for float64). A matrix in 16 bits is multiplied in 16 bits.

    Args:
        x: rows.
        weight: matrix, `Int8Weight` or `Product`.
        bias: added to each row.

    Raises:
        ValueError: if sizes do not fit.

    >>> w = jax.random.normal(jax.random.key(0), (8, 16))
    >>> x = jnp.ones((3, 16))
    >>> bool(jnp.abs(linear(x, quantize(w)) - linear(x, w)).max() < 0.1)
    True
    """
    out, inner = weight.shape[-2:]
    if x.shape[-1] != inner or len(weight.shape) != 2:
        raise ValueError(f"x has shape {x.shape} and weight {weight.shape}: expected [..., in] and [out, in]")
    rows = x.reshape(-1, inner)
    y: Array
    if isinstance(weight, Product):
        y = weight.multiply(rows)
    elif isinstance(weight, Int8Weight):
        if rows.shape[0] <= FEW_ROWS:
            y = jax.lax.platform_dependent(rows, weight.q, cpu=_int8_by_pieces, default=_int8_by_conversion)
        else:
            y = _int8_by_conversion(rows, weight.q)
        y = y * weight.scale
    else:
        y = _product(rows, weight)
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype).reshape(*x.shape[:-1], out)


def take_rows(weight: Float[Array, "out in"] | Int8Weight, index: Int[Array, "*B"]) -> Float[Array, "*B in"]:
    """Rows of a matrix: the embedding of tokens.

    >>> take_rows(jnp.eye(3), jnp.array([2])).tolist()
    [[0.0, 0.0, 1.0]]
    """
    if isinstance(weight, Int8Weight):
        return weight.q[index].astype(jnp.float32) * weight.scale[index][..., None]
    return weight[index]
