"""Token and confidence without logits, against a product of the whole, a softmax and an argmax."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import cost
from kernels_pallas.lm_head_confidence import lm_head_confidence

CASES = ((32, 32768, 512), (288, 32768, 512), (32, 49152, 576))
"""Rows, vocabulary and width: one block, a whole sequence, and SmolLM2's head."""


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Ratios at the sizes of a small model and of SmolLM2."""
    yield from heads(options, CASES)


def _whole(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = hidden @ weight.T
    return jnp.argmax(logits, -1), jax.nn.softmax(logits).max(-1)


def heads(options: BenchOptions, cases: tuple[tuple[int, int, int], ...]) -> Iterator[Measurement]:
    """Seconds of the whole logits over ours, compiled, in turn."""
    for rows, size, width in cases:
        keys = jax.random.split(jax.random.key(0), 2)
        hidden, weight = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (size, width))
        whole, ours = jax.jit(_whole), jax.jit(lm_head_confidence)
        timings = cost.time_in_turn(
            {"whole": lambda: whole(hidden, weight), "ours": lambda: ours(hidden, weight)},  # noqa: B023
            repeats=options.repeats,
        )
        ratio, interval = cost.ratio(timings, "whole", "ours")
        yield Measurement(
            f"head and confidence, whole logits / ours, {rows} rows, {size} x {width}",
            ratio,
            interval,
            ">= 1.0",
            f"{1e3 * timings['ours'].median:.1f} ms; {4 * rows * size / 1e6:.0f} MB of logits not written",
        )
