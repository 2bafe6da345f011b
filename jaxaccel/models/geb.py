"""GEB-1.3B: which of sixteen readings of its published weights is the right one.

The weights are public, the code that made them is only partly so: how heads turn, how keys and values are stacked and
where norms stand follow from two families of code that disagree. A wrong reading predicts text no better than chance
(a loss near log V = 11.1), the right one well (about 2.5 to 3.5), so a few hundred tokens of any text tell:
`detect_layout` tries them all. That is how the layout was left to be determined: the weights were not at hand here.

"GEB-1.3B: Open Lightweight Large Language Model", Wu et al., 2024, arXiv 2406.09900.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxaccel.models.decoder import decoder_forward, decoder_logits
from jaxaccel.models.decoder_config import DecoderConfig, Norm, RopeLayout
from jaxaccel.models.weights.names import KvLayout, params_from_names
from jaxaccel.posttraining import sft_loss

ROPES: tuple[RopeLayout, ...] = ("half", "interleaved")
FRACTIONS = (1.0, 0.5)
KV_LAYOUTS: tuple[KvLayout, ...] = ("concat", "per_head")
NORMS: tuple[Norm, ...] = ("pre", "post")


class Layout(NamedTuple):
    """A reading of the weights."""

    rope_layout: RopeLayout
    rotary_fraction: float
    kv_layout: KvLayout
    norm: Norm

    def configure(self, config: DecoderConfig) -> DecoderConfig:
        """The configuration with this layout; ``kv_layout`` goes to the loader."""
        return dataclasses.replace(
            config, rope_layout=self.rope_layout, rotary_fraction=self.rotary_fraction, norm=self.norm
        )


@functools.partial(jax.jit, static_argnames="config")
def next_token_loss(params: Any, tokens: Int[Array, "B T"], config: DecoderConfig) -> Float[Array, ""]:
    """Mean cross-entropy of each token after the ones before it, in nats."""
    logits = decoder_logits(params, decoder_forward(params, tokens, config).hidden)
    return sft_loss(logits, tokens, jnp.ones(tokens.shape, bool))


def detect_layout(
    weights: Mapping[str, Any], tokens: Int[Array, "B T"] | np.ndarray, config: DecoderConfig | None = None
) -> tuple[Layout, dict[Layout, float]]:
    """The reading of GEB's weights that predicts a text best.

    Args:
        weights: arrays by GEB's names (``transformer.encoder.layers.0.self_attention.query.weight``, ...).
        tokens: a few hundred ids of ordinary text.
        config: numbers of the model; those of GEB-1.3B by default.

    Returns:
        The layout with the lowest loss, and the loss of each.

    Raises:
        WeightsError: for missing or misshapen arrays.
        ValueError: for fewer than two tokens, ids that the model does not have, or if no layout gives a finite loss.
    """
    config = config or DecoderConfig()
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens has shape {tokens.shape}, expected [B, T] with at least two tokens")
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise ValueError(
            f"tokens hold ids from {tokens.min()} to {tokens.max()}, expected 0 to {config.vocab_size - 1}"
        )
    losses: dict[Layout, float] = {}
    for kv_layout in KV_LAYOUTS:  # outermost: only this one needs the arrays arranged anew
        params = jax.tree.map(jnp.asarray, params_from_names(weights, config, kv_layout=kv_layout))
        for rope, fraction, norm in itertools.product(ROPES, FRACTIONS, NORMS):
            layout = Layout(rope, fraction, kv_layout, norm)
            losses[layout] = float(next_token_loss(params, tokens, layout.configure(config)))
    finite = {layout: loss for layout, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("no layout gives a finite loss: the weights hold NaN or infinity")
    return min(finite, key=finite.__getitem__), losses
