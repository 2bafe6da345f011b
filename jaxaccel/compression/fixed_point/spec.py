"""A network as a list of fixed-point operators: what `int_forward` computes and `export_hls` writes.

A `Spec` is static and hashable (shapes and formats, no numbers); the raw integers of its weights are a dictionary
beside it, ``{node: {"w": ..., "b": ...}}``. Build one by hand, or get both from trained layers (`QSequential.freeze`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxaccel.compression.fixed_point.formats import FixedPoint, Format, split_channels

OPS = ("dense", "conv", "scale", "add", "relu", "mean")
_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        and asm auto bool break case catch char class const continue default delete do double else enum explicit extern
        false float for friend goto if inline int long main namespace new not operator or private protected public
        register return short signed sizeof static std struct switch template this throw true try typedef typename union
        unsigned using virtual void volatile while xor
        c fixed_from_raw fixed_to_raw i input j k n output r s sum u v
        """,
    )
)
"""Words of C++, and names that exported code uses itself."""
_ENDINGS = ("_t", "_w", "_a", "_b", "_acc", "_sum", "_raw")


@dataclass(frozen=True)
class Node:
    """One operator: all products and sums exact, then one cast to ``out``.

    Attributes:
        name: unique; also its name in C++.
        op: ``dense``, ``conv``, ``scale`` (a·x + b for each channel), ``add``, ``relu`` or ``mean``.
        sources: names of its inputs; ``"input"`` is the network's.
        shape: of its output, without the batch.
        out: format of its output.
        w: format of weights, or of the scale a; for ``dense`` and ``conv`` also one for each output.
        b: format of the bias, or of the shift b.
        acc: format of the accumulator.
        accumulate: see `qdot`.
        kernel: height and width of ``conv``, window of ``mean``.
        strides: of ``conv``.
        padding: zeros before and after each of the two axes.
    """

    name: str
    op: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    out: FixedPoint
    w: Format | None = None
    b: FixedPoint | None = None
    acc: FixedPoint | None = None
    accumulate: str = "exact"
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))


@dataclass(frozen=True)
class Spec:
    """A network: each method appends a node and gives a new `Spec`. The last node is the output.

    Attributes:
        shape: of one input, ``[n]`` or ``[H, W, C]``.
        fmt: its format.
        nodes: in the order in which they are computed.

    >>> f = FixedPoint(4, 2)
    >>> spec = Spec((8, 8, 1), f).conv("conv", 4, kernel=(3, 3), w=f, out=FixedPoint(6, 2)).relu("relu")
    >>> spec = spec.mean("pool", out=f).dense("logits", 10, w=f, b=f, out=FixedPoint(8, 4))
    >>> [(node.name, node.shape) for node in spec.nodes]
    [('conv', (8, 8, 4)), ('relu', (8, 8, 4)), ('pool', (1, 1, 4)), ('logits', (10,))]
    """

    shape: tuple[int, ...]
    fmt: FixedPoint
    nodes: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape is {self.shape}, expected [n] or [H, W, C], all positive")

    def of(self, name: str) -> tuple[tuple[int, ...], FixedPoint]:
        """Shape and format of a node's output, or of the input.

        Raises:
            ValueError: for a name that is not there.
        """
        if name == "input":
            return self.shape, self.fmt
        for node in self.nodes:
            if node.name == name:
                return node.shape, node.out
        raise ValueError(f"source is {name!r}, expected one of {', '.join(['input', *(n.name for n in self.nodes)])}")

    @property
    def last(self) -> str:
        """Name of the output."""
        return self.nodes[-1].name if self.nodes else "input"

    def _with(self, node: Node) -> "Spec":
        taken = {n.name for n in self.nodes}
        good = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", node.name) and not node.name.endswith(_ENDINGS)
        if not good or node.name in _WORDS | taken:
            raise ValueError(
                f"name is {node.name!r}, expected one that is not taken, a name in C++, without {', '.join(_ENDINGS)} "
                "at its end"
            )
        return dataclasses.replace(self, nodes=(*self.nodes, node))

    def dense(
        self, name: str, units: int, *, w: Format, out: FixedPoint, b: FixedPoint | None = None,
        acc: FixedPoint | None = None, accumulate: str = "exact", source: str | None = None,
    ) -> "Spec":  # fmt: skip
        """``cast(x @ w + b)``; images are flattened. Weights [K, units]."""
        source = self.last if source is None else source
        self.of(source)
        _check_products(units, w, acc, accumulate)
        return self._with(Node(name, "dense", (source,), (units,), out, _static(w), b, acc, accumulate))

    def conv(
        self, name: str, channels: int, *, kernel: tuple[int, int] | Any, w: Format, out: FixedPoint,
        b: FixedPoint | None = None, acc: FixedPoint | None = None, accumulate: str = "exact",
        strides: tuple[int, int] | Any = (1, 1), padding: Any = "SAME", source: str | None = None,
    ) -> "Spec":  # fmt: skip
        """Two-dimensional convolution. Weights [height, width, C, channels], summed in this order of indices.

        ``padding`` is ``"SAME"``, ``"VALID"``, or zeros before and after each axis.
        """
        source = self.last if source is None else source
        shape, _ = self.of(source)
        if len(shape) != 3:
            raise ValueError(f"{name}: its source has shape {shape}, expected [H, W, C]")
        _check_products(channels, w, acc, accumulate)
        padding = conv_padding(shape[:2], kernel, strides, padding)
        size = tuple((n + sum(p) - k) // s + 1 for n, p, k, s in zip(shape, padding, kernel, strides, strict=False))
        if min(size) < 1:
            raise ValueError(f"{name}: kernel is {kernel}, expected one that fits into {shape}")
        return self._with(
            Node(
                name, "conv", (source,), (*size, channels), out, _static(w), b, acc, accumulate, tuple(kernel),
                tuple(strides), padding,
            )
        )  # fmt: skip

    def scale(self, name: str, *, a: FixedPoint, b: FixedPoint, out: FixedPoint, source: str | None = None) -> "Spec":
        """``cast(a·x + b)`` for each channel of the last axis: folded batch normalisation."""
        source = self.last if source is None else source
        return self._with(Node(name, "scale", (source,), self.of(source)[0], out, a, b))

    def add(self, name: str, other: str, *, out: FixedPoint, source: str | None = None) -> "Spec":
        """``cast(x + y)`` with points aligned: a shortcut from the node ``other``."""
        source = self.last if source is None else source
        shapes = self.of(source)[0], self.of(other)[0]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: shapes are {shapes[0]} and {shapes[1]}, expected the same")
        return self._with(Node(name, "add", (source, other), shapes[0], out))

    def relu(self, name: str, *, source: str | None = None) -> "Spec":
        """``max(x, 0)`` in the format of x."""
        source = self.last if source is None else source
        shape, fmt = self.of(source)
        return self._with(Node(name, "relu", (source,), shape, fmt))

    def mean(
        self, name: str, *, out: FixedPoint, window: tuple[int, int] | None = None, source: str | None = None
    ) -> "Spec":
        """Averages of windows that do not overlap; of the whole image if ``window`` is ``None``."""
        source = self.last if source is None else source
        shape, _ = self.of(source)
        window = shape[:2] if window is None else window  # type: ignore[assignment]
        if len(shape) != 3 or window is None or len(window) != 2 or shape[0] % window[0] or shape[1] % window[1]:
            raise ValueError(f"{name}: window is {window}, expected one that divides [H, W, C] = {shape}")
        size = (shape[0] // window[0], shape[1] // window[1], shape[2])
        return self._with(Node(name, "mean", (source,), size, out, kernel=(window[0], window[1])))

    def weight_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """What `int_forward` and `export_hls` expect as parameters."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for node in self.nodes:
            source, _ = self.of(node.sources[0])
            if node.op == "dense":
                shapes[node.name] = {"w": (math.prod(source), *node.shape)}
            elif node.op == "conv":
                shapes[node.name] = {"w": (*node.kernel, source[-1], node.shape[-1])}
            elif node.op == "scale":
                shapes[node.name] = {"a": (source[-1],), "b": (source[-1],)}
            if node.op in ("dense", "conv") and node.b is not None:
                shapes[node.name]["b"] = (node.shape[-1],)
        return shapes


def _static(fmt: Format) -> Format:
    return fmt if isinstance(fmt, FixedPoint) else tuple(fmt)


def _check_products(units: Any, w: Any, acc: Any, accumulate: Any) -> None:
    if isinstance(units, bool) or not isinstance(units, int) or units < 1:
        raise ValueError(f"the number of outputs is {units!r}, expected a positive integer")
    _, frac = split_channels(w, "w")
    if isinstance(frac, tuple) and len(frac) != units:
        raise ValueError(f"w has {len(frac)} formats, expected one, or one for each of {units} outputs")
    if accumulate not in ("exact", "stepwise"):
        raise ValueError(f"accumulate is {accumulate!r}, expected 'exact' or 'stepwise'")
    if accumulate == "stepwise" and (acc is None or isinstance(frac, tuple)):
        raise ValueError("accumulate is 'stepwise', expected acc, and one format for all weights")


def conv_padding(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros before and after the two axes, as XLA places them for ``"SAME"``.

    Raises:
        ValueError: for kernels and strides that are not two positive integers, and other paddings.

    >>> conv_padding((8, 8), (3, 3), (2, 2), "SAME")
    ((0, 1), (0, 1))
    """
    for name, pair in (("kernel", kernel), ("strides", strides)):
        if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise ValueError(f"{name} is {pair!r}, expected two positive integers")
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "SAME":
        extra = [max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in zip(size, kernel, strides, strict=True)]
        return (extra[0] // 2, extra[0] - extra[0] // 2), (extra[1] // 2, extra[1] - extra[1] // 2)
    try:
        (a, b), (c, d) = padding
    except (TypeError, ValueError):
        raise ValueError(f"padding is {padding!r}, expected 'SAME', 'VALID' or two pairs of integers") from None
    if not all(isinstance(n, int) and n >= 0 for n in (a, b, c, d)):
        raise ValueError(f"padding is {padding!r}, expected integers that are not negative")
    return (a, b), (c, d)
