"""Shapes of diffusion transformers: DiT-S, B, L and XL with patches of 2, 4 and 8, by numbers alone.

A configuration fixes the tree of parameters (`dit_shapes`), which the functions, the module and the loaders of weights
share. Matrices are ``[out, in]``, as files have them.
"""

import dataclasses
import difflib
import math
from typing import Any

import jax
import numpy as np

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of the published sizes."""
PATCHES = (2, 4, 8)
FREQUENCIES = 256
"""Numbers that a time step is described by before its network."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer. The defaults are those of the published models for 256×256 images, but for the size.

    Raises:
        ValueError: for numbers that do not fit together.
    """

    width: int
    """D."""
    depth: int
    """Blocks; each has two branches that can be reused, attention and MLP."""
    heads: int
    """Of attention."""
    patch: int = 2
    """Pixels of a patch's side."""
    image_size: int = 32
    """Pixels of a side; of latents: 32 for images of 256×256 behind an autoencoder that makes them 8 times smaller."""
    channels: int = 4
    """C of the images or latents."""
    num_classes: int = 1000
    """K. Label K stands for no class, which guidance needs."""
    mlp_ratio: int = 4
    """Hidden neurons of an MLP by width."""
    learn_sigma: bool = True
    """Whether there are C more output channels, for the variances of ancestral sampling. DDIM does not use them."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch", "image_size", "channels", "num_classes", "mlp_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads = {self.heads}")
        if self.width % 4:
            raise ValueError(f"width is {self.width}, expected a multiple of 4, for sines and cosines of two axes")
        if self.image_size % self.patch:
            raise ValueError(f"image_size is {self.image_size}, expected a multiple of patch = {self.patch}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DiTConfig":
        """A published size: ``"S/2"`` … ``"XL/8"``.

        Args:
            name: size and patch.
            changes: fields that differ, as ``image_size=64`` for images of 512×512.

        Raises:
            ValueError: for an unknown name, with the nearest known.

        >>> DiTConfig.preset("XL/2").num_parameters
        675129632
        """
        known = {f"{size}/{patch}": (*SIZES[size], patch) for size in SIZES for patch in PATCHES}
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1) or [", ".join(known)]
            raise ValueError(f"name is {name!r}; did you mean {near[0]}?")
        width, depth, heads, patch = known[name]
        return cls(**({"width": width, "depth": depth, "heads": heads, "patch": patch} | changes))

    @classmethod
    def tiny(cls, **changes: Any) -> "DiTConfig":
        """A small model for tests and examples: 2 blocks of width 32 for 8×8 images of one channel."""
        sizes = {
            "width": 32, "depth": 2, "heads": 4, "image_size": 8, "channels": 1, "num_classes": 10,
            "learn_sigma": False,
        }  # fmt: skip
        return cls(**(sizes | changes))

    @property
    def tokens(self) -> int:
        """N, patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def out_channels(self) -> int:
        """C, or 2·C with variances."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def num_branches(self) -> int:
        """2·depth: branch 2b is the attention of block b, 2b + 1 its MLP."""
        return 2 * self.depth

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    @property
    def num_parameters(self) -> int:
        """Parameters as the published code counts them: with the N·D fixed positions, which are no arrays here."""
        leaves = jax.tree.leaves(dit_shapes(self), is_leaf=lambda leaf: isinstance(leaf, tuple))
        return sum(math.prod(leaf) for leaf in leaves) + self.tokens * self.width


def block_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Parameters of a block.

    ``qkv`` has the rows of all queries, then keys, then values. ``modulation`` has shift, scale and gate of attention,
    then those of the MLP, D rows each.
    """
    width, hidden = config.width, config.mlp_ratio * config.width
    matrices = {"modulation": (6 * width, width), "qkv": (3 * width, width), "out": (width, width)}
    matrices |= {"up": (hidden, width), "down": (width, hidden)}
    return {
        key: shape for name, m in matrices.items() for key, shape in ((name, m), (f"{name}_bias", m[:1]))
    }  # fmt: skip


def dit_shapes(config: DiTConfig) -> dict[str, Any]:
    """The tree of parameters, with shapes in the place of arrays.

    ``patch`` takes pixels of a patch row by row, channels last; ``final`` gives them in that order. ``labels`` has a
    row for each class and one for no class.

    >>> dit_shapes(DiTConfig.tiny())["labels"]
    (11, 32)
    """
    width, area = config.width, config.patch**2
    matrices = {
        "patch": (width, area * config.channels), "time_in": (width, FREQUENCIES), "time_out": (width, width),
        "final_modulation": (2 * width, width), "final": (area * config.out_channels, width),
    }  # fmt: skip
    top = {key: shape for name, m in matrices.items() for key, shape in ((name, m), (f"{name}_bias", m[:1]))}
    return top | {
        "labels": (config.num_classes + 1, width),
        "blocks": [block_shapes(config) for _ in range(config.depth)],
    }
