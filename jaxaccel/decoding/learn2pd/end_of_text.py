"""Where a text ends: once an end of text is decoded, everything after it is cut away and never computed again.

Rules, in a step in which the model predicts end of text at some masked positions:

    (a) the policy accepts such a position of the block: cut after the first
    (b) else any such position, also of later blocks where their predictions are known: cut after the most confident

``"reference"`` is the published code's: (a), else (b). Rule (b) has no gate on confidence, and where it cuts the token
may still be masked and become another: a long answer can be lost to an unlikely end of text. ``"confident"`` cuts only
after an end of text that is revealed in the step, by the policy or by rank.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EotRule = Literal["reference", "confident"]


def best_end(
    tokens: Int[Array, "B n"], confidence: Float[Array, "B n"], candidates: Bool[Array, "B n"], eot_id: int
) -> Int[Array, "B"]:
    """Index of the most confident predicted end of text among candidates, or n where there is none."""
    ends = candidates & (tokens == eot_id)
    best = jnp.argmax(jnp.where(ends, confidence, -jnp.inf), -1)
    return jnp.where(ends.any(-1), best, tokens.shape[-1]).astype(jnp.int32)


def new_length(
    length: Int[Array, "B"],
    start: Int[Array, ""],
    *,
    sure: Bool[Array, "B b"],
    candidate: Int[Array, "B"] | None,
) -> Int[Array, "B"]:
    """Lengths after a step; never larger than before.

    Args:
        length: tokens that are left.
        start: of the block.
        sure: positions of the block after the first of which the text is cut.
        candidate: else, position of the whole text after which it is cut; at least ``length`` for none.
    """
    cut = length if candidate is None else jnp.minimum(length, candidate + 1)
    first = start + jnp.argmax(sure, -1) + 1
    return jnp.where(sure.any(-1), jnp.minimum(first, length), cut).astype(jnp.int32)
