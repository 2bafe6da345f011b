"""A network on integers only: shifts, products, sums, no float anywhere. What hardware computes, bit for bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxaccel.compression.fixed_point.batch_norm import qbatchnorm
from jaxaccel.compression.fixed_point.dot import check_dot, qdot
from jaxaccel.compression.fixed_point.formats import (
    FixedPoint,
    Format,
    check_int32,
    largest_magnitude,
    raw_range,
    split_channels,
)
from jaxaccel.compression.fixed_point.operators import qadd, qmean, requantise
from jaxaccel.compression.fixed_point.spec import Node, Spec


def patches(
    x: Array, kernel: Sequence[int], strides: Sequence[int], padding: tuple[tuple[int, int], tuple[int, int]]
) -> Array:
    """Windows of images [..., H, W, C], flattened: [..., h, w, kh·kw·C], in the order of a kernel [kh, kw, C, N].

    By slices alone. A convolution with exact sums is then a matrix product; libraries' own convolutions may transform
    their inputs (Winograd), which is not exact.

    >>> patches(jnp.arange(4).reshape(2, 2, 1), (2, 1), (1, 1), ((0, 0), (0, 0))).tolist()
    [[[0, 2], [1, 3]]]
    """
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 3), *padding, (0, 0)))
    height, width = x.shape[-3:-1]
    rows = (height - kernel[0]) // strides[0] + 1
    columns = (width - kernel[1]) // strides[1] + 1
    parts = [
        x[..., i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1 : strides[1], :]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return jnp.concatenate(parts, -1)


def windows(x: Array, window: Sequence[int]) -> Array:
    """Images [..., H, W, C] cut into windows: [..., h, kh, w, kw, C]."""
    *lead, height, width, channels = x.shape
    return x.reshape(*lead, height // window[0], window[0], width // window[1], window[1], channels)


def check_params(spec: Spec, params: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` unless raw integers are there for all nodes, of the right shapes, and inside their formats.

    Ranges are looked at outside ``jit`` only.
    """
    shapes = spec.weight_shapes()
    if set(params) != set(shapes):
        raise ValueError(f"params has {sorted(params)}, expected {sorted(shapes)}")
    for node in spec.nodes:
        wanted = shapes.get(node.name, {})
        given = params.get(node.name, {})
        if set(given) != set(wanted):
            raise ValueError(f"params[{node.name!r}] has {sorted(given)}, expected {sorted(wanted)}")
        for key, shape in wanted.items():
            fmt: Format | None = node.b if key == "b" else node.w
            assert fmt is not None
            check_raw(f"params[{node.name!r}][{key!r}]", given[key], fmt, shape)


def check_raw(name: str, m: Any, fmt: Format, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``m`` holds integers of a shape, and (outside ``jit``) of a format."""
    if jnp.shape(m) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(m)}, expected {shape}")
    if not jnp.issubdtype(jnp.asarray(m).dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {jnp.asarray(m).dtype}, expected raw integers: to_int makes them")
    kind, _ = split_channels(fmt)
    lo, hi = raw_range(kind.word, kind.signed)
    if not isinstance(m, jax.core.Tracer) and np.size(m) and not lo <= np.min(m) <= np.max(m) <= hi:
        raise ValueError(f"{name} goes from {np.min(m)} to {np.max(m)}, expected {lo} to {hi}: {kind.word} bits")


def _products(node: Node, x: Array, x_fmt: FixedPoint, params: Mapping[str, Any]) -> Array:
    """Sum of products, bias, one cast."""
    assert node.w is not None
    w = jnp.asarray(params["w"], jnp.int32)
    w = w.reshape(-1, w.shape[-1])
    if node.b is None:
        return qdot(
            x, w, x_fmt=x_fmt, w_fmt=node.w, acc_fmt=node.acc, out_fmt=node.out, accumulate=node.accumulate
        )  # fmt: skip
    total = qdot(x, w, x_fmt=x_fmt, w_fmt=node.w, acc_fmt=node.acc, accumulate=node.accumulate)
    kind, w_frac = split_channels(node.w)
    if node.acc is None:
        frac = x_fmt.frac + np.asarray(w_frac)
        bound = check_dot(w.shape[0], x_fmt, kind)
    else:
        frac, bound = np.asarray(node.acc.frac), largest_magnitude(node.acc)
    left, right = np.maximum(0, node.b.frac - frac), np.maximum(0, frac - node.b.frac)
    most = max(int(bound) << int(shift) for shift in np.ravel(left))
    most += max(largest_magnitude(node.b) << int(shift) for shift in np.ravel(right))
    check_int32("the sum with the bias", most, f"{kind.word} and {node.b.word} bits at frac {frac} and {node.b.frac}")
    total = (total << left) + (jnp.asarray(params["b"], jnp.int32) << right)
    wide = np.maximum(frac, node.b.frac)
    return requantise(total, frac=wide.tolist(), out_fmt=node.out)


def int_forward(spec: Spec, params: Mapping[str, Mapping[str, Any]], x: Any, *, keep: Sequence[str] = ()) -> Any:
    """The network on raw integers.

    Args:
        spec: the network; static under ``jit``.
        params: raw integers, ``{node: {"w": ..., "b": ...}}``; ``"a"`` and ``"b"`` for ``scale``.
        x: raw integers [..., *shape] in the format of the input.
        keep: names of nodes whose outputs are wanted as well.

    Returns:
        Raw int32 of the last node; with ``keep``, that and a dictionary of the others.

    Raises:
        ValueError: if shapes or formats do not fit, or int32 might overflow.

    >>> f = FixedPoint(4, 2)
    >>> spec = Spec((2,), f).dense("fc", 1, w=f, out=f)
    >>> int_forward(spec, {"fc": {"w": jnp.array([[4], [2]])}}, jnp.array([[1, 4]])).tolist()
    [[3]]
    """
    x = jnp.asarray(x)
    if x.ndim < len(spec.shape) or x.shape[x.ndim - len(spec.shape) :] != spec.shape:
        raise ValueError(f"x has shape {x.shape}, expected [..., {', '.join(map(str, spec.shape))}]")
    check_raw("x", x, spec.fmt, x.shape)
    check_params(spec, params)
    for name in keep:
        spec.of(name)
    lead = x.shape[: x.ndim - len(spec.shape)]
    values: dict[str, Int[Array, "*S"]] = {"input": x.astype(jnp.int32)}
    for node in spec.nodes:
        m, (_, fmt) = values[node.sources[0]], spec.of(node.sources[0])
        given = params.get(node.name, {})
        if node.op == "dense":
            y = _products(node, m.reshape(*lead, -1), fmt, given)
        elif node.op == "conv":
            y = _products(node, patches(m, node.kernel, node.strides, node.padding), fmt, given)
        elif node.op == "scale":
            assert isinstance(node.w, FixedPoint)
            assert node.b is not None
            y = qbatchnorm(
                m, jnp.asarray(given["a"]), jnp.asarray(given["b"]), x_fmt=fmt, a_fmt=node.w, b_fmt=node.b,
                out_fmt=node.out,
            )  # fmt: skip
        elif node.op == "add":
            y = qadd(m, values[node.sources[1]], a_fmt=fmt, b_fmt=spec.of(node.sources[1])[1], out_fmt=node.out)
        elif node.op == "relu":
            y = jnp.maximum(m, 0)
        else:
            y = qmean(windows(m, node.kernel), axis=(-4, -2), fmt=fmt, out_fmt=node.out)
        values[node.name] = y
    if keep:
        return values[spec.last], {name: values[name] for name in keep}
    return values[spec.last]
