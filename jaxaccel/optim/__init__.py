"""Optimizers and learning-rate control, as optax transforms."""

from jaxaccel.optim import epoch_policies
from jaxaccel.optim.accelat import (
    AccelATConfig,
    AccelATState,
    accelat_init,
    accelat_update,
    scale_by_accuracy_gradient,
)
from jaxaccel.optim.exadam import ScaleByExadamState, exadam, exadam_v1_schedule, scale_by_exadam

__all__ = [
    "AccelATConfig",
    "AccelATState",
    "ScaleByExadamState",
    "accelat_init",
    "accelat_update",
    "epoch_policies",
    "exadam",
    "exadam_v1_schedule",
    "scale_by_accuracy_gradient",
    "scale_by_exadam",
]
