"""The union kernel against all experts as one pair of products, beside the bound that the active experts allow."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import cost
from kernels_pallas.expert_ffn import dense_expert_ffn, expert_ffn

SIZES = ((768, 48, 64), (1792, 56, 128))
"""D, Ne, de: the paper's smallest model, and a middle one."""
ACTIVE = ((1, 9), (8, 14), (32, 18))
"""Tokens, and experts that at least one of them uses at the sparsity that training reaches."""


def problem(width: int, experts: int, size: int, tokens: int, active: int) -> tuple[jax.Array, ...]:
    """Random x, up, down and scores with ``active`` experts in use."""
    keys = jax.random.split(jax.random.key(0), 5)
    on = jnp.zeros(experts).at[jax.random.permutation(keys[4], experts)[:active]].set(1)
    return (
        jax.random.normal(keys[0], (tokens, width)),
        jax.random.normal(keys[1], (experts, size, width)) / width**0.5,
        jax.random.normal(keys[2], (experts, size, width)) / size**0.5,
        (0.1 + jax.random.uniform(keys[3], (tokens, experts))) * on,
    )


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Each size at 1, 8 and 32 tokens: dense over sparse beside Ne/|union|, then sparse over dense at the full union.

    The same compiled function runs for both unions: how many experts are active is known at run time only.
    """
    dense, sparse = jax.jit(dense_expert_ffn), jax.jit(expert_ffn)
    loop = jax.jit(functools.partial(expert_ffn, implementation="xla"), static_argnames="max_active")
    for width, experts, size in SIZES:
        for tokens, active in ACTIVE:
            few = problem(width, experts, size, tokens, active)
            full = problem(width, experts, size, tokens, experts)
            calls: dict[str, Callable[[], Any]] = {
                "dense": functools.partial(dense, *few),
                "sparse": functools.partial(sparse, *few),
                "full": functools.partial(sparse, *full),
                "full loop": functools.partial(loop, *full, max_active=experts),
            }
            for data in (few, full):
                np.testing.assert_allclose(sparse(*data), dense(*data), atol=1e-3)
            timings = cost.time_in_turn(calls, repeats=options.repeats)
            bound = experts / active
            where = f"D={width}, Ne={experts}, de={size}, n={tokens}"
            goal = max(3.0, bound / 1.5) if tokens == 1 else bound / 1.5
            yield _ratio(
                timings, "dense", "sparse", f"expert FFN, dense / union of {active}, {where}", f">= {goal:.2f}",
                f"bound Ne/|union| = {bound:.2f}",
            )  # fmt: skip
            yield _ratio(timings, "full", "dense", f"expert FFN, full union / dense, {where}", "<= 1.10")
            yield _ratio(
                timings, "full loop", "dense", f"expert FFN, full union by the loop (max_active=Ne) / dense, {where}"
            )


def _ratio(timings: Any, top: str, bottom: str, name: str, goal: str = "", extra: str = "") -> Measurement:
    value, interval = cost.ratio(timings, top, bottom)
    detail = f"{1e3 * timings[top].median:.3f} ms / {1e3 * timings[bottom].median:.3f} ms"
    return Measurement(name, value, interval, goal, f"{detail}; {extra}" if extra else detail)
