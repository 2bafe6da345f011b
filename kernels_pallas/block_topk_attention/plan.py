"""Where the blocks of a cache lie: all static numbers of block top-k attention in one place, checked once."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

Layout = Literal["BSKH", "BKSH", "BKSHV"]
"""Order of the axes of a cache; BKSHV holds a key and its value side by side, [B, K, S, H + V], in one array."""

LAYOUTS = ("BSKH", "BKSH", "BKSHV")


def check_integer(name: str, value: object, low: int) -> None:
    """Raise unless a static argument is an integer of at least ``low``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} is {value!r}, expected a Python integer of at least {low}")
    if value.__index__() < low:
        raise ValueError(f"{name} is {value!r}, expected at least {low}")


def check_layout(layout: str) -> None:
    """Raise unless the name of a layout is known."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")


def aligned(num_sink: int, block_size: int) -> int:
    """First multiple of ``block_size`` at or after ``num_sink``: where blocks to choose from start by default."""
    return -(-num_sink // block_size) * block_size


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call, and the positions that follow from them and from a length.

    Block i holds the positions [phase + i·block_size, phase + (i+1)·block_size). Every position before ``offset`` is
    always read (the sink); so is every one from the end of the last block that ends at or before length − num_local
    (the tail). The blocks between are candidates: each position is read at most once.
    """

    size: int  # S, positions of the cache
    block_size: int
    num_blocks: int  # blocks that a step chooses at most
    num_local: int  # latest positions that are always read
    offset: int  # first position that can be chosen instead of always being read

    @classmethod
    def make(
        cls, size: int, block_size: int, num_blocks: int, num_sink: int, num_local: int, block_offset: int | None
    ) -> "Plan":
        """Check and collect the static arguments.

        Raises:
            ValueError: for a number out of range, a block that does not divide the cache, a budget larger than it.
        """
        check_integer("block_size", block_size, 1)
        check_integer("num_blocks", num_blocks, 1)
        check_integer("num_sink", num_sink, 0)
        check_integer("num_local", num_local, 0)
        if block_offset is None:
            block_offset = aligned(num_sink, block_size)
        check_integer("block_offset", block_offset, 0)
        if block_offset < num_sink:
            raise ValueError(f"block_offset is {block_offset}, expected at least num_sink = {num_sink}")
        if size % block_size:
            raise ValueError(
                f"block_size is {block_size}, which does not divide the cache's {size} positions: "
                f"expected a cache of a multiple of {block_size}, such as {aligned(size, block_size)}"
            )
        budget = block_offset + num_blocks * block_size + num_local
        if budget > size:
            raise ValueError(
                f"the budget is {budget} positions ({block_offset} before the first block + {num_blocks} blocks of "
                f"{block_size} + {num_local} local), expected at most the {size} positions of the cache"
            )
        return cls(size, block_size, num_blocks, num_local, block_offset)

    @property
    def phase(self) -> int:
        """Position of block 0: 0 where blocks are aligned with pages."""
        return self.offset % self.block_size

    @property
    def first(self) -> int:
        """First block that can be chosen."""
        return self.offset // self.block_size

    @property
    def total(self) -> int:
        """Blocks that fit in the cache."""
        return (self.size - self.phase) // self.block_size

    @property
    def tail_blocks(self) -> int:
        """Blocks that the tail of at most num_local + block_size − 1 positions touches."""
        return -(-(self.num_local + self.block_size - 1) // self.block_size)

    @property
    def rows(self) -> int:
        """Rows of K that the kernels read at most: sink, tail and chosen blocks, in whole blocks."""
        return self.offset + (self.num_blocks + self.tail_blocks) * self.block_size

    def tail_block(self, length: Array) -> Array:
        """First block of the tail: candidates are the blocks from ``first`` up to this one.

        >>> Plan.make(64, 8, 2, 4, 0, None).tail_block(jnp.array([3, 8, 23, 24, 64])).tolist()
        [1, 1, 2, 3, 8]
        """
        # Floors towards minus infinity do not matter: what is negative becomes `first`.
        usable = jnp.maximum(length - self.num_local - self.phase, 0)
        return jnp.maximum(usable // self.block_size, self.first)

    def tail_start(self, length: Array) -> Array:
        """First position of the tail."""
        return self.phase + self.tail_block(length) * self.block_size
