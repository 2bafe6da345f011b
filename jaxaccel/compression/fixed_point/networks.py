"""Networks of fixed-point layers, one after the other, with shortcuts; trained, calibrated, frozen.

model = QSequential([QInput(word=4), QDense(64, 10, word=4, rngs=rngs)])
calibrate_layers(model, batch)                   # points from data; ``set_mode(model, "float")`` trains without
logits = model(x, train=True)
spec, params = model.freeze((64,))               # int_forward(spec, params, ...), export_hls(spec, params, ...)

The float network and the integers give the same bits, see `jaxaccel.compression.fixed_point.layers`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxaccel.compression.fixed_point.formats import largest_magnitude
from jaxaccel.compression.fixed_point.integer import windows
from jaxaccel.compression.fixed_point.layers import MODES, Params, QInput, QLayer, check_sum
from jaxaccel.compression.fixed_point.spec import Spec


class QMean(QLayer):
    """Averages of windows that do not overlap, or of whole images, cast: ``[B, H, W, C] -> [B, h, w, C]``.

    Args:
        window: height and width; all if ``None``. In hardware their product should be a power of two.
        word: W of the result.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`.
        grad_scale: see `trainable_cast`.
    """

    def __init__(
        self, window: tuple[int, int] | None = None, *, word: int, rounding: str = "rnd", overflow: str = "sat",
        grad_scale: str = "lsq",
    ) -> None:  # fmt: skip
        super().__init__({"out": word}, rounding=rounding, overflow=overflow, grad_scale=grad_scale)
        self.window = window

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B h w C"]:
        """The averages."""
        parts = windows(x, x.shape[1:3] if self.window is None else self.window)
        # By a product: a sum of fixed-point numbers is exact, and so is 1/n for powers of two.
        return self.cast("out", parts.sum((-4, -2)) * (1 / (parts.shape[-4] * parts.shape[-2])))

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        shape, _ = spec.of(source)
        count = math.prod(shape[:2] if self.window is None else self.window)
        if exact and count & (count - 1):
            raise ValueError(f"{name}: the mean of {count} numbers is not exact in floats, expected a power of two")
        return spec.mean(name, window=self.window, out=self.format("out"), source=source)


class QSequential(nnx.Module):
    """Layers one after the other.

    Args:
        layers: `QLayer` modules; a `QInput` first in a whole network.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = QSequential([QInput(word=4), QDense(4, 2, word=4, rngs=rngs), QBatchNorm(2, word=4)])
        >>> spec, params = model.freeze((4,))
        >>> [node.op for node in spec.nodes], params["layer1"]["w"].dtype
        (['dense', 'scale'], dtype('int32'))
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "B ..."], *, train: bool = False) -> Float[Array, "B ..."]:
        """The last layer's outputs."""
        for layer in self.layers:
            x = layer(x, train=train)
        return x

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        for number, layer in enumerate(self.layers):
            spec = layer.append(spec, params, f"{name}{number}", source, exact)
            source = spec.last
        return spec

    def freeze(self, shape: Sequence[int], *, exact: bool = True) -> tuple[Spec, Params]:
        """The network with static formats, and the raw integers of its weights. Not under ``jit``.

        Args:
            shape: of one input, without the batch.
            exact: refuse networks whose sums the layers might round in float32, where integers do not.

        Returns:
            What `int_forward` and `export_hls` take. Nodes are named ``layer1``, ``layer2``, ..., as the layers are
            numbered.

        Raises:
            ValueError: if the first layer is no `QInput`, shapes or words do not fit, or sums are too wide.
        """
        first = self.layers[0] if len(self.layers) else None
        if not isinstance(first, QInput):
            raise ValueError(f"the first layer is {type(first).__name__}, expected QInput: hardware needs its format")
        spec = Spec(tuple(shape), first.format("out"))
        params: dict[str, Any] = {}
        for number, layer in enumerate(self.layers[1:], 1):
            spec = layer.append(spec, params, f"layer{number}", spec.last, exact)
        return spec, params


class QResidual(QLayer):
    """``cast(body(x) + shortcut(x))``, points aligned and the sum exact.

    Args:
        body: a `QSequential`.
        shortcut: another one, where shapes change; x itself if ``None``.
        word: W of the result.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`.
        grad_scale: see `trainable_cast`.
    """

    def __init__(
        self, body: QSequential, shortcut: QSequential | None = None, *, word: int, rounding: str = "rnd",
        overflow: str = "sat", grad_scale: str = "lsq",
    ) -> None:  # fmt: skip
        super().__init__({"out": word}, rounding=rounding, overflow=overflow, grad_scale=grad_scale)
        self.body, self.shortcut = body, shortcut

    def __call__(self, x: Float[Array, "B ..."], *, train: bool = False) -> Float[Array, "B ..."]:
        """The sum."""
        y = self.body(x, train=train)
        return self.cast("out", y + (x if self.shortcut is None else self.shortcut(x, train=train)))

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        spec = self.body.append(spec, params, f"{name}_body", source, exact)
        end, other = spec.last, source
        if self.shortcut is not None:
            spec = self.shortcut.append(spec, params, f"{name}_short", source, exact)
            other = spec.last
        if exact:
            fmt = spec.of(end)[1]
            check_sum(name, fmt.frac, largest_magnitude(fmt), spec.of(other)[1])
        return spec.add(name, other, source=end, out=self.format("out"))


def set_mode(model: nnx.Module, mode: str) -> None:
    """Make all layers cast (``"fixed"``) or not (``"float"``); the modes that calibrate are `calibrate_layers`'s.

    Raises:
        ValueError: for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    for _, node in nnx.iter_graph(model):
        if isinstance(node, QLayer):
            node.mode = mode


@nnx.jit
def _run(model: Any, x: Any) -> None:
    model(x)


def calibrate_layers(model: nnx.Module, x: Any, *, method: str = "mse") -> None:
    """Take all binary points from one batch, layer after layer, each on what the cast layers before it give.

    Args:
        model: changed in place: its points, and its mode, which is ``"fixed"`` afterwards.
        x: a batch of inputs.
        method: see `calibrate`.

    Raises:
        ValueError: for another method.
    """
    if method not in ("max", "mse"):
        raise ValueError(f"method is {method!r}, expected 'max' or 'mse'")
    set_mode(model, method)
    try:
        _run(model, jnp.asarray(x))
    finally:
        set_mode(model, "fixed")


def weight_integers(params: Params) -> list[np.ndarray]:
    """The integers that inputs are multiplied by, each [K, N]: for counting `adders` and multipliers.

    A scale a is one row: K = 1, N channels.
    """
    return [
        np.asarray(node["w"]).reshape(-1, node["w"].shape[-1]) if "w" in node else np.asarray(node["a"])[None]
        for node in params.values()
    ]
