"""A whole decoder of sparse experts: tokens a second with the union read, against the same model read in full.

The weights are random: what is timed does not depend on them, but on how many experts a step uses. A direction that all
tokens share shifts the router's logits below zero until one token uses as many experts as training reaches.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import cost
from jaxaccel.models import BlockFFNConfig, DecoderConfig, Lookup, expert_union, generate, init_params
from jaxaccel.models.decoder import decoder_forward

CONFIG = DecoderConfig(
    vocab_size=4096, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64, max_positions=256,
    tie_embeddings=True, block_ffn=BlockFFNConfig(num_experts=48, expert_dim=64),
)  # fmt: skip
ACTIVE = 9
"""Experts of one token, of 48: what training reaches."""
PROMPT, NEW = 32, 32
BATCHES = (1, 8)


def sparse_model(config: DecoderConfig, active: float, tokens: jax.Array) -> Any:
    """Random parameters whose router uses about ``active`` experts a token."""
    experts = config.block_ffn
    assert experts is not None
    params = init_params(jax.random.key(0), config)
    common = jnp.ones(config.hidden_size) / config.hidden_size**0.5
    params["embedding"] = params["embedding"] + 0.02 * config.hidden_size**0.5 * common
    plain = [layer["router"] for layer in params["layers"]]

    def shifted(shift: float) -> Any:
        layers = [
            layer | {"router": router - shift * common[:, None]}
            for layer, router in zip(params["layers"], plain, strict=True)
        ]
        return params | {"layers": layers}

    forward = jax.jit(lambda p: (decoder_forward(p, tokens, config).routing.hidden != 0).mean())
    low, high = 0.0, 0.5
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if float(forward(shifted(middle))) > active / experts.num_experts else (low, middle)
    return shifted((low + high) / 2)


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Seconds of a generation with all experts over those with the union, batch 1 and 8, and with guesses."""
    experts = CONFIG.block_ffn
    assert experts is not None
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, CONFIG.vocab_size, (max(BATCHES), PROMPT)).astype(np.int32)
    params = sparse_model(CONFIG, ACTIVE, jnp.asarray(prompts))
    kinds = {
        name: dataclasses.replace(CONFIG, block_ffn=dataclasses.replace(experts, sparse=sparse))
        for name, sparse in (("all", False), ("union", True))
    }
    for batch in BATCHES:
        for guesses in (0, 3):
            extra = {"drafts": Lookup(num_tokens=guesses)} if guesses else {}

            def call(config: DecoderConfig, batch: int = batch, extra: Any = extra) -> Callable[[], Any]:
                return lambda: generate(params, prompts[:batch], config, max_new_tokens=NEW, **extra).tokens

            calls = {name: call(config) for name, config in kinds.items()}
            texts = [np.asarray(run()) for run in calls.values()]
            timings = cost.time_in_turn(calls, repeats=max(3, options.repeats // 2), min_seconds=0.0)
            ratio, interval = cost.ratio(timings, "all", "union")
            step = jnp.asarray(prompts[:batch, : 1 + guesses])
            read = np.mean(np.asarray(expert_union(decoder_forward(params, step, CONFIG).routing)))
            rate = batch * NEW / timings["union"].median
            yield Measurement(
                f"decoder of experts, all / union, batch {batch}" + (f", {guesses} guesses a step" if guesses else ""),
                ratio,
                interval,
                "",
                f"{rate:.1f} tokens/s with the union; a step of as many tokens reads about {read:.0f} of "
                f"{experts.num_experts} experts; same text: {np.mean(texts[0] == texts[1]):.2f}",
            )
