"""A whole policy step at batch 1 in one compiled program, with its parts cut; weights are random, as time is."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import cost
from jaxaccel.caching import EfficientVLAConfig
from jaxaccel.models import DecoderConfig, HeadConfig, VLAConfig, cut_vla, init_vla, vla_policy

WORDS = 16
TOKENS = 256
"""Visual tokens, as in CogACT."""
LAYERS = 16
CUTS = {
    "5 of 16 layers out": EfficientVLAConfig(num_drop_layers=5),
    "56 of 256 tokens": EfficientVLAConfig(num_keep_tokens=56),
    "interval 5": EfficientVLAConfig(cache_interval=5),
    "all": EfficientVLAConfig(num_drop_layers=5, num_keep_tokens=56, cache_interval=5),
}
"""The paper's shares: 10 of 32 layers, 56 tokens, 2 of 10 denoising steps."""


def policy_config() -> VLAConfig:
    """The paper's tokens and steps; a smaller language model with about the paper's share of its time in the head."""
    decoder = DecoderConfig.tiny(
        hidden_size=256, intermediate_size=688, num_layers=LAYERS, num_heads=4, num_kv_heads=4, head_dim=64,
        max_positions=TOKENS + WORDS,
    )  # fmt: skip
    head = HeadConfig(width=192, depth=6, heads=3, token_size=256)
    return VLAConfig(decoder=decoder, head=head, num_visual=TOKENS, visual_size=64)


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Full against each cut, and against all together."""
    config, key = policy_config(), jax.random.key(0)
    params = init_vla(key, config)
    arguments = (
        jax.random.normal(key, (1, TOKENS, config.visual_size)),
        jnp.arange(WORDS, dtype=jnp.int32)[None],
        jax.random.normal(key, (1, config.head.window, config.head.channels)),
    )
    importance = np.arange(LAYERS)[::-1]  # which layers go does not change the time
    calls = {}
    for name, cuts in {"full": EfficientVLAConfig(), **CUTS}.items():
        smaller_params, smaller = cut_vla(params, config, cuts, importance=importance)
        policy = jax.jit(functools.partial(vla_policy, config=smaller, cuts=cuts))
        calls[name] = functools.partial(policy, smaller_params, *arguments)
    timed = cost.time_in_turn(calls, repeats=options.repeats)
    for name in CUTS:
        ratio, interval = cost.ratio(timed, "full", name)
        detail = f"{1e3 * timed['full'].median:.2f} ms / {1e3 * timed[name].median:.2f} ms"
        yield Measurement(f"policy step, full / {name}", ratio, interval, ">= 1.9" if name == "all" else "", detail)
