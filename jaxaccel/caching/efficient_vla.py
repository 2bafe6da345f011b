"""EfficientVLA: a vision-language-action model made cheaper in all its parts, without training.

- the language model: whole layers left out (`jaxaccel.compression.layers`), MLPs with fewer channels;
- its sequence: visual tokens left out after an early layer (`jaxaccel.compression.tokens`);
- the diffusion head: most denoising steps reuse the last full one (`jaxaccel.caching.interval`).

The parts need nothing of each other. `jaxaccel.models.vla` has a model with all of them in one compiled step. The
paper's abstract names the first three; its language model with 22 of 32 layers has the published number of parameters
only with a quarter of the MLPs' channels removed as well (PruneNet), for which `slice_mlp` is a stand-in of ours.

Yang et al., EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models, arXiv
2506.10100.
"""

import dataclasses

import numpy as np

from jaxaccel.caching.interval import DDIM, cache_schedule, sample_actions
from jaxaccel.compression.layers import layer_importance, prune_layers, select_layers, slice_mlp
from jaxaccel.compression.tokens import prune_tokens, select_visual_tokens, token_relevance

__all__ = [
    "DDIM",
    "EfficientVLAConfig",
    "cache_schedule",
    "layer_importance",
    "prune_layers",
    "prune_tokens",
    "sample_actions",
    "select_layers",
    "select_visual_tokens",
    "slice_mlp",
    "token_relevance",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientVLAConfig:
    """How much of each part is left out; the defaults leave out nothing.

    The paper's fastest: 10 of 32 layers, 56 of 256 tokens, interval 5, three quarters of the MLPs' channels.

    Raises:
        ValueError: for numbers out of range.

    >>> EfficientVLAConfig(num_drop_layers=10, num_keep_tokens=56, cache_interval=5).num_key
    4
    """

    num_drop_layers: int = 0
    """n, layers of the language model that are dropped."""
    num_keep_tokens: int | None = None
    """K, visual tokens that are kept; all by default."""
    num_key: int = 4
    """K_key, tokens that are kept for their relevance before all others."""
    task_ratio: float = 0.5
    """α, share of the rest that goes by relevance, too."""
    cache_interval: int = 1
    """N: of so many denoising steps one is computed in full."""
    mlp_keep_ratio: float = 1.0
    """Share of the MLPs' channels that is kept."""

    def __post_init__(self) -> None:
        for name, low in (("num_drop_layers", 0), ("num_key", 1), ("cache_interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
                raise ValueError(f"{name} is {value}, expected a whole number of at least {low}")
        if self.num_keep_tokens is not None and self.num_keep_tokens < self.num_key:
            raise ValueError(f"num_keep_tokens is {self.num_keep_tokens}, expected at least num_key = {self.num_key}")
        if not 0 <= self.task_ratio <= 1:
            raise ValueError(f"task_ratio is {self.task_ratio}, expected a number in [0, 1]")
        if not 0 < self.mlp_keep_ratio <= 1:
            raise ValueError(f"mlp_keep_ratio is {self.mlp_keep_ratio}, expected a number in (0, 1]")
