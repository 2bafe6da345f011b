"""Caching: keep less, or compute less often, of what a model remembers between steps."""

from jaxaccel.caching.efficient_vla import EfficientVLAConfig
from jaxaccel.caching.harmonica import (
    EpochInfo,
    Harmonica,
    HarmonicaState,
    SDTStep,
    harmonica,
    router_init,
    router_schedule,
    sdt_loss,
    step_weights,
)
from jaxaccel.caching.harmonica_sampling import sample, soft_sample
from jaxaccel.caching.interval import DDIM, cache_schedule, sample_actions
from jaxaccel.caching.reuse import (
    DenoiseFn,
    ReuseSchedule,
    Sampler,
    cache_utilization,
    load_schedule,
    random_schedule,
    reuse_branch,
    save_schedule,
    schedule_from_array,
    uniform_schedule,
)
from jaxaccel.caching.snapkv import SnapKVSelection, compress, snapkv_select, snapkv_votes, snapkv_window

__all__ = [
    "DDIM",
    "DenoiseFn",
    "EfficientVLAConfig",
    "EpochInfo",
    "Harmonica",
    "HarmonicaState",
    "ReuseSchedule",
    "SDTStep",
    "Sampler",
    "SnapKVSelection",
    "cache_schedule",
    "cache_utilization",
    "compress",
    "harmonica",
    "load_schedule",
    "random_schedule",
    "reuse_branch",
    "router_init",
    "router_schedule",
    "sample",
    "sample_actions",
    "save_schedule",
    "schedule_from_array",
    "sdt_loss",
    "snapkv_select",
    "snapkv_votes",
    "snapkv_window",
    "soft_sample",
    "step_weights",
    "uniform_schedule",
]
