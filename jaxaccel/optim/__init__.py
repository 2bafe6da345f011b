"""Optimizers and learning-rate control, as optax transforms."""

from jaxaccel.optim import epoch_policies, symbolic
from jaxaccel.optim.accelat import (
    AccelATConfig,
    AccelATState,
    accelat_init,
    accelat_update,
    scale_by_accuracy_gradient,
)
from jaxaccel.optim.embedding_shrink import embedding_mask, scale_by_embedding_shrink, shrink_embedding_gradient
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
from jaxaccel.optim.spikes import (
    CalmDraw,
    SkipOnSpikeState,
    SpikeRule,
    SpikeState,
    draw_until_calm,
    init_spike_state,
    is_spike,
    skip_on_spike,
    update_spike_state,
    with_batch_replacement,
)

__all__ = [
    "AccelATConfig",
    "AccelATState",
    "CalmDraw",
    "PackLayout",
    "PackSmallLeavesState",
    "PackedTree",
    "ScaleByExadamState",
    "ScaleByLionLowpState",
    "SkipOnSpikeState",
    "SpikeRule",
    "SpikeState",
    "accelat_init",
    "accelat_update",
    "draw_until_calm",
    "embedding_mask",
    "epoch_policies",
    "exadam",
    "exadam_v1_schedule",
    "init_spike_state",
    "is_spike",
    "lion_from_adamw",
    "lion_lowp",
    "pack_small_leaves",
    "pack_tree",
    "scale_by_accuracy_gradient",
    "scale_by_embedding_shrink",
    "scale_by_exadam",
    "scale_by_lion_lowp",
    "shrink_embedding_gradient",
    "skip_on_spike",
    "symbolic",
    "unpack_tree",
    "update_spike_state",
    "with_batch_replacement",
]
