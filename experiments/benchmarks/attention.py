"""Local linear attention against its naive form, and block top-k decoding against reading the whole cache."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import BenchOptions, Measurement
from experiments.block_topk_latency import (
    DENSE,
    LIBRARY,
    SPARSE,
    BlockTopKLatencyConfig,
    traffic,
)
from experiments.block_topk_latency import measure as measure_decoding
from experiments.runner import cost, stats
from jaxaccel.attention import local_linear_attention
from kernels_pallas.local_linear_attention.reference import naive

LENGTHS = (512, 2048, 8192)
NAIVE_UP_TO = 2048
"""Longest length at which the naive form is run: its systems alone would take 1 GB at 8192."""
HEADS, SIZE, RIDGE = 8, 64, 1.0
CACHES = (4096, 16_384, 32_768, 65_536)
COLD_BYTES = 2**28
"""Bytes of different caches that are read in turn, so that none stays in a fast memory."""


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Local linear attention, then block top-k decoding."""
    yield from local_linear(options, LENGTHS, NAIVE_UP_TO)
    yield from block_topk(options, CACHES)


def inputs(length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random queries, keys and values, one sequence [1, T, 8, 64]."""
    q, k, v = (jax.random.normal(key, (1, length, HEADS, SIZE)) for key in jax.random.split(jax.random.key(0), 3))
    return q, k, v


def scratch(function: Any, *arguments: Any) -> int:
    """Bytes of temporaries in the compiled program."""
    memory = function.lower(*arguments).compile().memory_analysis()
    return 0 if memory is None else int(memory.temp_size_in_bytes)


def gradient(attend: Callable[..., Any]) -> Any:
    """Output and gradients for queries, keys and values, compiled."""
    return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(attend(q, k, v) ** 2), argnums=(0, 1, 2)))


def local_linear(options: BenchOptions, lengths: tuple[int, ...], naive_up_to: int) -> Iterator[Measurement]:
    """Forward and forward + backward at each length, against the naive form in JAX (and torch where it is there)."""

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return local_linear_attention(q, k, v, ridge=RIDGE)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return naive(q, k, v, RIDGE)

    def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    bytes_before: int | None = None
    for length in lengths:
        data = inputs(length)
        programs = {
            "forward": jax.jit(ours),
            "both": gradient(ours),
            "softmax": jax.jit(softmax),
        }
        compared = length <= naive_up_to
        if compared:
            programs |= {"naive forward": jax.jit(plain), "naive both": gradient(plain)}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(program, *data) for name, program in programs.items()
        }
        if compared and (torch_call := torch_naive(data)) is not None:
            calls["torch forward"] = torch_call
        # Seconds a call, at the long lengths: a few turns tell enough there.
        timings = cost.time_in_turn(calls, repeats=max(3, options.repeats // (1 if length <= 512 else 5)))
        used = iterations(*data)
        where = f"T={length}, N={HEADS}, H={SIZE}, ridge {RIDGE:g}"
        solve = f"{used.mean():.1f} iterations (at most {used.max()})"
        if compared:
            goal = ">= 3" if length == 2048 else ""
            yield _ratio(timings, "naive forward", "forward", f"naive LLA / LLA, forward, {where}", goal, solve)
            yield _ratio(timings, "naive both", "both", f"naive LLA / LLA, forward + backward, {where}")
        if "torch forward" in timings:
            yield _ratio(timings, "torch forward", "forward", f"naive LLA in torch / LLA, forward, {where}")
        # Forward + backward is one program: a backward pass of 3.5 forward passes makes this 4.5.
        yield _ratio(timings, "both", "forward", f"LLA forward + backward / forward, {where}", "<= 4.5", solve)
        yield _ratio(timings, "forward", "softmax", f"LLA / jax.nn.dot_product_attention, forward, {where}")
        yield from _memory(programs, data, length, bytes_before, where)
        bytes_before = scratch(programs["forward"], *data)


def iterations(q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
    """Iterations that the solver took for each row."""

    @jax.jit
    def count(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        result = local_linear_attention(q, k, v, ridge=RIDGE, return_state=True)
        assert isinstance(result, tuple)
        return result[1].iterations

    return np.asarray(count(q, k, v))


def _memory(programs: dict[str, Any], data: Any, length: int, before: int | None, where: str) -> Iterator[Measurement]:
    """Scratch against the limit, and its growth from the length before."""
    forward, both = scratch(programs["forward"], *data), scratch(programs["both"], *data)
    systems = 4 * length * HEADS * SIZE**2
    detail = f"forward + backward {both / 1e6:.0f} MB; the systems [T, N, H, H] alone are {systems / 1e6:.0f} MB"
    if "naive forward" in programs:
        detail += f", naive scratch {scratch(programs['naive forward'], *data) / 1e6:.0f} MB"
    goal = "<= 100" if length == 2048 else ""
    yield Measurement(f"LLA scratch [MB], forward, {where}", forward / 1e6, None, goal, detail)
    if before:
        yield Measurement(
            f"LLA scratch over that of a quarter of the length, {where}",
            forward / before,
            None,
            "<= 4.5",
            "4 is linear",
        )


def torch_naive(data: Any) -> Callable[[], Any] | None:
    """The naive form in torch, or ``None`` where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")
    q, k, v = (torch.from_numpy(np.array(x)).transpose(1, 2) for x in data)  # [B, N, T, H]

    def call() -> Any:
        with torch.no_grad():
            length, size = q.shape[-2:]
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            p = torch.softmax((q @ k.mT * size**-0.5).masked_fill(~seen, float("-inf")), -1)
            mean = p @ k
            outer = (k[..., :, None] * k[..., None, :]).flatten(-2)
            system = (p @ outer).unflatten(-1, (size, size)) - mean[..., :, None] * mean[..., None, :]
            system = system + RIDGE * torch.eye(size)
            x = torch.linalg.solve(system, (q - mean)[..., None])[..., 0]
            return np.asarray((p * (1 + x @ k.mT - (x * mean).sum(-1, keepdim=True))) @ v)

    return call


def block_topk(options: BenchOptions, lengths: tuple[int, ...]) -> Iterator[Measurement]:
    """One token with 1,024 of S keys, against `jax.nn.dot_product_attention` and plain products over all of them."""
    config = BlockTopKLatencyConfig(
        seeds=1, lengths=lengths, num_blocks=63, num_sink=16, repeats=options.repeats, cold_bytes=COLD_BYTES
    )
    sparse: dict[int, cost.Timing] = {}
    for length in lengths:
        timings, read = measure_decoding(config, length), traffic(config, length)
        limit = f"bytes allow {read[DENSE] / read[SPARSE]:.1f}"
        where = f"{length} cached tokens, budget 1024, N=8, K=2, H=64"
        goal = ">= 8" if length == 32_768 else ""
        yield _ratio(timings, LIBRARY, SPARSE, f"jax.nn.dot_product_attention / block top-k, {where}", goal, limit)
        yield _ratio(timings, DENSE, SPARSE, f"dense as plain products / block top-k, {where}", "", limit)
        sparse[length] = timings[SPARSE]
    first, last = lengths[0], lengths[-1]
    grown = traffic(config, last)[SPARSE] / traffic(config, first)[SPARSE]
    yield Measurement(
        f"block top-k, {last} cached tokens / {first}",
        sparse[last].median / sparse[first].median,
        stats.bootstrap_ratio(sparse[last].seconds, sparse[first].seconds),
        f"<= {grown:.2f}",
        f"bytes grow {grown:.2f} times, by a mean key a block of {config.block_size}; the cache {last // first} times",
    )


def _ratio(timings: Any, top: str, bottom: str, name: str, goal: str = "", extra: str = "") -> Measurement:
    value, interval = cost.ratio(timings, top, bottom)
    detail = f"{1e3 * timings[top].median:.2f} ms / {1e3 * timings[bottom].median:.2f} ms"
    return Measurement(name, value, interval, goal, f"{detail}; {extra}" if extra else detail)
