"""Continuous diffusion, shared by the methods that make sampling cheaper: schedules, DDIM, guidance, training.

- `schedules`: noise levels, and which of them a sampler visits.
- `ddim`: from noise to samples with a network that predicts the noise.
- `guidance`: classifier-free guidance on a doubled batch.
- `training`: the loss such networks are trained with.

A network is a function here; `jaxaccel.models.dit` has one. Diffusion over discrete tokens is
`jaxaccel.models.masked_diffusion`.
"""

from jaxaccel.diffusion.ddim import add_noise, ddim_sample, ddim_step, predict_x0
from jaxaccel.diffusion.guidance import double_batch, guide, guide_denoiser, with_guidance
from jaxaccel.diffusion.schedules import (
    NoiseSchedule,
    cosine_betas,
    linear_betas,
    noise_schedule,
    respace,
    stride_timesteps,
    uniform_timesteps,
)
from jaxaccel.diffusion.training import drop_labels, epsilon_loss

__all__ = [
    "NoiseSchedule",
    "add_noise",
    "cosine_betas",
    "ddim_sample",
    "ddim_step",
    "double_batch",
    "drop_labels",
    "epsilon_loss",
    "guide",
    "guide_denoiser",
    "linear_betas",
    "noise_schedule",
    "predict_x0",
    "respace",
    "stride_timesteps",
    "uniform_timesteps",
    "with_guidance",
]
