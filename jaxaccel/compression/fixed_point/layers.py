"""Layers whose tensors are all fixed point: for training in the arithmetic of the hardware, and for freezing into it.

    QInput      cast(x)
    QDense      cast(x @ cast(W) + cast(bias))               sums exact, bias optional
    QConv       the same for windows of images
    QBatchNorm  cast(cast(a)·x + cast(b)),  a = γ/√(var + ε),  b = β − mean·a
    QRelu, QMean, QResidual (shortcut sums), QSequential

Every cast is a `trainable_cast` with a point of its own, a `BinaryPoint` parameter in the dictionary ``frac`` of its
layer, so that `frac_labels` finds it. Give sums before normalisation two bits more than weights have (``out_word``).
Batch normalisation folds and casts the statistics of the batch while it trains, with gradients straight through, and
the running ones else.

The numbers are those of `int_forward`, bit for bit, while sums stay within the 24 bits that float32 holds exactly;
`QSequential.freeze` in `networks` refuses to go on where they might not.

Source: Dai et al., arXiv 2401.17544. The gradients are reconstructed, see `trainable_cast`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxaccel.compression.fixed_point.batch_norm import fold_batch_norm
from jaxaccel.compression.fixed_point.calibration import calibrate
from jaxaccel.compression.fixed_point.casting import to_int
from jaxaccel.compression.fixed_point.dot import FLOAT32_EXACT, exact_matmul
from jaxaccel.compression.fixed_point.formats import FixedPoint, check_modes, check_word, largest_magnitude
from jaxaccel.compression.fixed_point.integer import patches
from jaxaccel.compression.fixed_point.multiplier_free import check_hot, k_hot
from jaxaccel.compression.fixed_point.spec import Spec, conv_padding
from jaxaccel.compression.fixed_point.trainable import freeze, trainable_cast

MODES = ("fixed", "float", "max", "mse")
"""``fixed``: cast. ``float``: do not. ``max``, ``mse``: take the points from what comes by, then cast."""

Params = dict[str, dict[str, Array]]


class BinaryPoint(nnx.Param):
    """A learned f. Train it at a rate of its own: ``nnx.split(model, BinaryPoint, nnx.Param, ...)``."""


class QLayer(nnx.Module):
    """What the layers share: words, modes, and casts by name."""

    def __init__(
        self, words: dict[str, int], *, rounding: str, overflow: str, grad_scale: str, hot: int | None = None,
        channels: int | None = None,
    ) -> None:  # fmt: skip
        for name, word in words.items():
            try:
                check_word(word)
            except ValueError as error:
                raise ValueError(f"the word of {name!r}: {error}") from None
        check_modes(rounding, overflow)
        if hot is not None:
            check_hot(hot, words["w"], "nearest")
        self.mode = "fixed"
        self.words = tuple(words.items())
        self.rounding, self.overflow, self.grad_scale, self.hot = rounding, overflow, grad_scale, hot
        self.channels = channels
        self.frac = nnx.Dict({name: BinaryPoint(self._start(name, word)) for name, word in words.items()})

    def _start(self, name: str, word: int) -> Array:
        """F = W − 2: numbers up to 2."""
        return jnp.full((self.channels,) if name == "w" and self.channels else (), word - 2, jnp.float32)

    def cast(self, name: str, x: Array) -> Array:
        """Cast a tensor of this layer by its own point, or what `MODES` says instead."""
        if self.mode == "float":
            return x
        word = dict(self.words)[name]
        many = name == "w" and self.channels is not None
        if self.mode in ("max", "mse"):
            f = calibrate(
                x, word=word, method=self.mode, channel_axis=-1 if many else None, rounding=self.rounding,
                overflow=self.overflow,
            )  # fmt: skip
            self.frac[name][...] = f
        return trainable_cast(
            x, self.frac[name][...], word=word, rounding=self.rounding, overflow=self.overflow,
            grad_scale=self.grad_scale, allow_wrap=True, hot=self.hot if name in ("w", "a") else None,
        )  # fmt: skip

    def format(self, name: str) -> Any:
        """The static format of a tensor of this layer; a tuple of them for channels."""
        return freeze(self.frac[name][...], word=dict(self.words)[name], rounding=self.rounding, overflow=self.overflow)

    def raw(self, name: str, x: Array) -> Array:
        """Raw integers of a tensor of this layer."""
        m = to_int(x, self.format(name))
        if self.hot is not None and name in ("w", "a"):
            m = k_hot(m, k=self.hot, word=dict(self.words)[name])
        return m

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """This layer as nodes of a network; its integers go into ``params``."""
        raise NotImplementedError


class _Linear(QLayer):
    """Products of inputs and weights."""

    def __init__(
        self, shape: Sequence[int], *, word: int, in_word: int | None, out_word: int | None, bias: bool,
        per_channel: bool, hot: int | None, rounding: str, overflow: str, grad_scale: str, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"sizes are {tuple(shape)}, expected positive integers")
        words = {"w": word, "out": _two_more(word) if out_word is None else out_word}
        super().__init__(
            words | ({"b": word} if bias else {}), rounding=rounding, overflow=overflow, grad_scale=grad_scale,
            hot=hot, channels=shape[-1] if per_channel else None,
        )  # fmt: skip
        self.in_word = word if in_word is None else in_word
        check_word(self.in_word)
        self.w = nnx.Param(nnx.initializers.he_normal()(rngs.params(), tuple(shape)))
        self.bias = nnx.Param(jnp.zeros(shape[-1])) if bias else None

    def _kinds(self) -> tuple[FixedPoint, FixedPoint]:
        return FixedPoint(self.in_word, 0), FixedPoint(dict(self.words)["w"], 0)

    def _apply(self, x: Array) -> Array:
        w = self.cast("w", self.w[...])
        w = w.reshape(-1, w.shape[-1])
        if self.mode == "float":
            y = x @ w
        else:
            kinds = self._kinds()
            y = exact_matmul(x, w, x_fmt=kinds[0], w_fmt=kinds[1])
        if self.bias is not None:
            y = y + self.cast("b", self.bias[...])
        return self.cast("out", y)

    def _integers(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> dict[str, Any]:
        _, fmt = spec.of(source)
        if fmt.word != self.in_word or not fmt.signed:
            raise ValueError(f"{name}: inputs have {fmt.word} bits, expected in_word, {self.in_word}")
        params[name] = {"w": self.raw("w", self.w[...])}
        formats = {"w": self.format("w"), "out": self.format("out")}
        if self.bias is not None:
            params[name]["b"], formats["b"] = self.raw("b", self.bias[...]), self.format("b")
            if exact:
                terms = math.prod(self.w.shape[:-1])
                bound = terms * math.prod(map(largest_magnitude, self._kinds()))
                for f in formats["w"] if isinstance(formats["w"], tuple) else (formats["w"],):
                    check_sum(name, fmt.frac + f.frac, bound, formats["b"])
        return formats


class QDense(_Linear):
    """``cast(x @ cast(W) + cast(bias))`` with an exact sum; images are flattened.

    Args:
        inputs: size of x.
        outputs: size of the result.
        word: W of weights and bias.
        in_word: W of x, whose numbers must be cast already; ``word`` if ``None``.
        out_word: W of the result; ``word + 2`` if ``None``.
        bias: whether there is one; not before a `QBatchNorm`.
        per_channel: one point for the weights of each output instead of one for all.
        hot: restrict weights to so many ones, see `k_hot`.
        rounding: of all casts.
        overflow: of all casts.
        grad_scale: see `trainable_cast`.
        rngs: for the weights, He's normal ones.

    Example:
        >>> layer = QDense(8, 3, word=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8))).shape
        (2, 3)
    """

    def __init__(
        self, inputs: int, outputs: int, *, word: int, in_word: int | None = None, out_word: int | None = None,
        bias: bool = False, per_channel: bool = False, hot: int | None = None, rounding: str = "rnd",
        overflow: str = "sat", grad_scale: str = "lsq", rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        super().__init__(
            (inputs, outputs), word=word, in_word=in_word, out_word=out_word, bias=bias, per_channel=per_channel,
            hot=hot, rounding=rounding, overflow=overflow, grad_scale=grad_scale, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "B ..."], *, train: bool = False) -> Float[Array, "B N"]:
        """Outputs; ``train`` makes no difference."""
        return self._apply(x.reshape(x.shape[0], -1))

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        return spec.dense(name, self.w.shape[-1], source=source, **self._integers(spec, params, name, source, exact))


class QConv(_Linear):
    """Convolution with exact sums, ``[B, H, W, C] -> [B, h, w, N]``.

    It multiplies windows as a matrix, since convolutions of libraries may be inexact; this takes the memory of all
    windows.

    Args:
        inputs: channels C.
        outputs: channels N.
        kernel: height and width.
        strides: of both axes.
        padding: ``"SAME"``, ``"VALID"`` or zeros before and after each axis.
        word: see `QDense`, as are all others.
        in_word: see `QDense`.
        out_word: see `QDense`.
        bias: see `QDense`.
        per_channel: see `QDense`.
        hot: see `QDense`.
        rounding: see `QDense`.
        overflow: see `QDense`.
        grad_scale: see `QDense`.
        rngs: see `QDense`.

    Example:
        >>> layer = QConv(1, 4, (3, 3), word=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 1))).shape
        (2, 8, 8, 4)
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int] | Any, *, strides: tuple[int, int] | Any = (1, 1),
        padding: Any = "SAME", word: int, in_word: int | None = None, out_word: int | None = None, bias: bool = False,
        per_channel: bool = False, hot: int | None = None, rounding: str = "rnd", overflow: str = "sat",
        grad_scale: str = "lsq", rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        conv_padding((1, 1), kernel, strides, padding)  # checks them
        super().__init__(
            (*kernel, inputs, outputs), word=word, in_word=in_word, out_word=out_word, bias=bias,
            per_channel=per_channel, hot=hot, rounding=rounding, overflow=overflow, grad_scale=grad_scale, rngs=rngs,
        )  # fmt: skip
        self.kernel, self.strides, self.padding = tuple(kernel), tuple(strides), padding

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B h w N"]:
        """Outputs; ``train`` makes no difference."""
        padding = conv_padding(x.shape[1:3], self.kernel, self.strides, self.padding)
        return self._apply(patches(x, self.kernel, self.strides, padding))

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        return spec.conv(
            name, self.w.shape[-1], source=source, kernel=self.kernel, strides=self.strides, padding=self.padding,
            **self._integers(spec, params, name, source, exact),
        )  # fmt: skip


class QBatchNorm(QLayer):
    """Batch normalisation over all axes but the last, folded into one product and one sum, all cast.

    Args:
        features: size of the last axis.
        word: W of a and b.
        out_word: W of the result; ``word`` if ``None``.
        momentum: share of the running statistics that a batch leaves.
        eps: ε.
        hot: restrict a to so many ones, see `k_hot`.
        rounding: of all casts.
        overflow: of all casts.
        grad_scale: see `trainable_cast`.

    Example:
        >>> norm = QBatchNorm(3, word=6)
        >>> norm(jnp.ones((4, 3)), train=True).shape
        (4, 3)
    """

    def __init__(
        self, features: int, *, word: int, out_word: int | None = None, momentum: float | Any = 0.9,
        eps: float | Any = 1e-5, hot: int | None = None, rounding: str = "rnd", overflow: str = "sat",
        grad_scale: str = "lsq",
    ) -> None:  # fmt: skip
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected a number in [0, 1)")
        if not eps > 0:
            raise ValueError(f"eps is {eps}, expected a positive number")
        if hot is not None:
            check_hot(hot, word, "nearest")
        super().__init__(
            {"a": word, "b": word, "out": word if out_word is None else out_word}, rounding=rounding,
            overflow=overflow, grad_scale=grad_scale,
        )  # fmt: skip
        self.hot, self.momentum, self.eps = hot, momentum, eps
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))

    def folded(self, mean: Array, var: Array) -> tuple[Array, Array]:
        """The scale a and shift b in floats."""
        return fold_batch_norm(mean, var, scale=self.scale[...], bias=self.bias[...], eps=self.eps)

    def __call__(self, x: Float[Array, "B *S C"], *, train: bool = False) -> Float[Array, "B *S C"]:
        """Outputs; with ``train`` by the statistics of ``x``, which the running ones follow."""
        mean, var = self.mean[...], self.var[...]
        if train:
            axes = tuple(range(x.ndim - 1))
            now = jnp.mean(x, axes), jnp.var(x, axes)
            self.mean[...] = self.momentum * mean + (1 - self.momentum) * jax.lax.stop_gradient(now[0])
            self.var[...] = self.momentum * var + (1 - self.momentum) * jax.lax.stop_gradient(now[1])
            mean, var = now
        a, b = self.folded(mean, var)
        return self.cast("out", x * self.cast("a", a) + self.cast("b", b))

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        a, b = self.folded(self.mean[...], self.var[...])
        params[name] = {"a": self.raw("a", a), "b": self.raw("b", b)}
        formats = {key: self.format(key) for key in ("a", "b", "out")}
        if exact:
            _, fmt = spec.of(source)
            bound = largest_magnitude(fmt) * largest_magnitude(formats["a"])
            check_sum(name, fmt.frac + formats["a"].frac, bound, formats["b"])
        return spec.scale(name, source=source, **formats)


class QInput(QLayer):
    """Casts what comes from outside.

    Args:
        word: W.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`.
        grad_scale: see `trainable_cast`.
    """

    def __init__(self, *, word: int, rounding: str = "rnd", overflow: str = "sat", grad_scale: str = "lsq") -> None:
        super().__init__({"out": word}, rounding=rounding, overflow=overflow, grad_scale=grad_scale)

    def __call__(self, x: Float[Array, "..."], *, train: bool = False) -> Float[Array, "..."]:
        """The numbers nearest to ``x``."""
        return self.cast("out", x)


class QRelu(QLayer):
    """``max(x, 0)``, which needs no cast."""

    def __init__(self) -> None:
        super().__init__({}, rounding="rnd", overflow="sat", grad_scale="lsq")

    def __call__(self, x: Float[Array, "..."], *, train: bool = False) -> Float[Array, "..."]:
        """The positive part."""
        return jax.nn.relu(x)

    def append(self, spec: Spec, params: Params, name: str, source: str, exact: bool) -> Spec:
        """See `QLayer`."""
        return spec.relu(name, source=source)


def _two_more(word: Any) -> Any:
    check_word(word)
    return word + 2


def check_sum(name: str, frac: int, most: int, other: FixedPoint) -> None:
    """Raise ``ValueError`` if float32 might round a sum."""
    bound = (most << max(0, other.frac - frac)) + (largest_magnitude(other) << max(0, frac - other.frac))
    if bound > FLOAT32_EXACT:
        raise ValueError(
            f"{name}: a sum at frac {frac} and {other.frac} can reach {bound} steps, expected at most 2^24, which "
            "float32 holds: bring the binary points nearer, or freeze with exact=False for what integers give"
        )
