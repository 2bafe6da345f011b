"""Rotary position embedding: pairs of channels turn by an angle that grows with the position.

    (x₁, x₂) ← (x₁ cos φ − x₂ sin φ, x₁ sin φ + x₂ cos φ),   φ = position · theta^(−2i/R)  for pair i of R/2

Scores of turned queries and keys depend on the difference of their positions only. Positions and angles are float32:
in bfloat16 positions from 256 on collide.

Su et al., RoFormer, arXiv 2104.09864; the stretched frequencies are those of Llama 3.1 (arXiv 2407.21783).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxaccel.models.decoder_config import DecoderConfig, RopeLayout


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Angle per position of each pair of channels [R/2], float64.

    >>> frequencies(DecoderConfig.tiny()).tolist()
    [1.0, 0.1, 0.01, 0.001]
    """
    base = config.rope_theta ** (-np.arange(0, config.rotary_size, 2) / config.rotary_size)
    scaling = config.rope_scaling
    if scaling is None:
        return base
    # Turns that a pair makes within the context it was trained with: few turns are stretched, many are kept.
    turns = scaling.original_positions * base / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = np.clip((turns - scaling.low_frequency_factor) / span, 0, 1)
    return base * (kept + (1 - kept) / scaling.factor)


def rotary_angles(
    positions: Int[Array, "B T"], config: DecoderConfig
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosines and sines [B, T, R/2] of the angles at each position, float32.

    >>> cos, sin = rotary_angles(jnp.array([[0, 1]]), DecoderConfig.tiny())
    >>> cos.shape, round(float(sin[0, 1, 3]), 6)
    ((1, 2, 4), 0.001)
    """
    phase = positions.astype(jnp.float32)[..., None] * frequencies(config).astype(np.float32)
    return jnp.cos(phase), jnp.sin(phase)


def rotate(
    x: Float[Array, "B T N H"],
    angles: tuple[Float[Array, "B T _"], Float[Array, "B T _"]],
    layout: RopeLayout = "half",
) -> Float[Array, "B T N H"]:
    """Turn the first R channels of each head; the others stay.

    Args:
        x: queries or keys.
        angles: from `rotary_angles`.
        layout: ``"half"`` pairs channel i with i + R/2, ``"interleaved"`` 2i with 2i + 1.

    Returns:
        The same shape and dtype; worked in float32.
    """
    cos, sin = (angle[:, :, None] for angle in angles)
    size = 2 * cos.shape[-1]
    turning, rest = x[..., :size].astype(jnp.promote_types(x.dtype, jnp.float32)), x[..., size:]
    if layout == "half":
        first, second = turning[..., : size // 2], turning[..., size // 2 :]
    else:
        first, second = turning[..., ::2], turning[..., 1::2]
    turned = first * cos - second * sin, first * sin + second * cos
    both = jnp.concatenate(turned, -1) if layout == "half" else jnp.stack(turned, -1).reshape(turning.shape)
    return jnp.concatenate([both.astype(x.dtype), rest], -1) if rest.shape[-1] else both.astype(x.dtype)
