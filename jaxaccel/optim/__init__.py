"""Optimizers and learning-rate control, as optax transforms."""

from jaxaccel.optim import epoch_policies, symbolic
from jaxaccel.optim.accelat import (
    AccelATConfig,
    AccelATState,
    accelat_init,
    accelat_update,
    scale_by_accuracy_gradient,
)
from jaxaccel.optim.exadam import ScaleByExadamState, exadam, exadam_v1_schedule, scale_by_exadam
from jaxaccel.optim.lion import (
    PackedTree,
    PackLayout,
    PackSmallLeavesState,
    ScaleByLionLowpState,
    lion_from_adamw,
    lion_lowp,
    pack_small_leaves,
    pack_tree,
    scale_by_lion_lowp,
    unpack_tree,
)

__all__ = [
    "AccelATConfig",
    "AccelATState",
    "PackLayout",
    "PackSmallLeavesState",
    "PackedTree",
    "ScaleByExadamState",
    "ScaleByLionLowpState",
    "accelat_init",
    "accelat_update",
    "epoch_policies",
    "exadam",
    "exadam_v1_schedule",
    "lion_from_adamw",
    "lion_lowp",
    "pack_small_leaves",
    "pack_tree",
    "scale_by_accuracy_gradient",
    "scale_by_exadam",
    "scale_by_lion_lowp",
    "symbolic",
    "unpack_tree",
]
