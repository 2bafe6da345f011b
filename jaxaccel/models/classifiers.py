"""Image classifiers: a multi-layer perceptron, a small convolutional network, and ResNet-18 for 32x32 images."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class MLP(nnx.Module):
    """Fully connected network with ReLU; inputs of any shape ``[B, ...]`` are flattened.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> model = MLP([64, 32, 10], rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be input, hidden ..., output, all positive; got {list(widths)}")
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B C"]:
        """Return logits."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """Blocks of 3x3 convolution, ReLU and 2x2 max pooling, then a hidden layer and logits.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = CNN((8, 8, 1), [16, 32], hidden=64, classes=10, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(
        self, image: tuple[int, int, int], channels: Sequence[int], *, hidden: int, classes: int, rngs: nnx.Rngs
    ) -> None:
        height, width, last = image
        factor = 2 ** len(channels)
        if height % factor or width % factor:
            raise ValueError(f"image {height}x{width} cannot be halved {len(channels)} times")
        convolutions = []
        for count in channels:
            convolutions.append(nnx.Conv(last, count, (3, 3), rngs=rngs))
            last = count
        self.convolutions = nnx.List(convolutions)
        self.hidden = nnx.Linear(height // factor * (width // factor) * last, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Return logits."""
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(x)


class _ResidualBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(inputs, outputs, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.first_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.second_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.changes_shape = stride != 1 or inputs != outputs
        if self.changes_shape:
            self.shortcut = nnx.Conv(inputs, outputs, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            self.shortcut_norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = jax.nn.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.changes_shape:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + y)


class ResNet18(nnx.Module):
    """ResNet-18 in its form for small images: a 3x3 stem without pooling, four stages of two blocks.

    Batch statistics are `nnx.BatchStat` variables; ``model.train()`` and ``model.eval()`` switch their use.
    11,173,962 parameters with ten classes and width 64.

    He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385.
    """

    def __init__(self, *, classes: int, width: int = 64, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        blocks, last = [], width
        for stage in range(4):
            outputs = width * 2**stage
            for index in range(2):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_ResidualBlock(last, outputs, stride, rngs=rngs))
                last = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(last, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B K"]:
        """Return logits."""
        x = jax.nn.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
