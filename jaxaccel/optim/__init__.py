"""Optimizers and learning-rate control, as optax transforms."""

from jaxaccel.optim.exadam import ScaleByExadamState, exadam, exadam_v1_schedule, scale_by_exadam

__all__ = ["ScaleByExadamState", "exadam", "exadam_v1_schedule", "scale_by_exadam"]
