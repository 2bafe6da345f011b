"""How long one attention layer takes to decode a token, against the length of the cache: dense and block top-k.

Dense attention reads every key and value, so its time grows with the length. Block top-k reads one mean key a block
and a fixed number of tokens, so it grows by 1 / (2 block_size) of that. Both are measured in turn, a + b·S is fitted
to each, and the ratio of the slopes is put beside what the traffic predicts (`jaxaccel.forecasting.eflops`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runner.api import Cell, Comparison, Config, Experiment, Figure, Progress, Series, Table
from experiments.runner.cost import Timing, ratio, time_in_turn
from experiments.runner.session import Session
from jaxaccel.forecasting import BlockTopK, HardwareSpec, ModelSpec, eflops
from kernels_pallas.block_topk_attention import BlockTopKCache, block_topk_decode, extend, init_cache

LIBRARY, DENSE, SPARSE = "jax.nn", "dense", "block top-k"
"""`jax.nn.dot_product_attention`; the same as plain matrix products; block top-k."""


@dataclasses.dataclass(frozen=True)
class BlockTopKLatencyConfig(Config):
    """Decode latency of one attention layer, dense and block top-k, over the length of the cache."""

    lengths: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
    """Tokens in the cache."""
    batch_size: int = 1
    """Sequences."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 2
    """Heads of keys and values."""
    head_dim: int = 64
    """Size of a head."""
    block_size: int = 16
    """Tokens of a block."""
    num_blocks: int = 64
    """Blocks that are read."""
    num_sink: int = 16
    """First tokens that are always read: one block, since blocks are pages."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers in the cache; bfloat16 is for accelerators."""
    repeats: int = 41
    """Turns of measurement."""
    cold_bytes: int = 2**28
    """Bytes of different caches that are read in turn, as the layers of a model are: none stays in a fast memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self.num_sink + self.block_size * self.num_blocks
        if len(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] <= budget:
            raise ValueError(f"lengths must be two or more, increasing, above a budget of {budget}; got {self.lengths}")
        for name in ("batch_size", "repeats", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if any(length % self.block_size for length in self.lengths):
            raise ValueError(f"block_size ({self.block_size}) must divide lengths {self.lengths}")


def make_caches(config: BlockTopKLatencyConfig, length: int) -> list[tuple[jax.Array, jax.Array, BlockTopKCache]]:
    """Full caches of ``length`` random tokens, at least two: keys, values, and both with the sums of blocks."""
    shape = (config.batch_size, length, config.kv_heads, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    count = max(2, -(-config.cold_bytes // (2 * int(np.prod(shape)) * dtype.itemsize)))

    @jax.jit
    def make(key: jax.Array) -> tuple[jax.Array, jax.Array, BlockTopKCache]:
        keys, values = (jax.random.normal(k, shape, dtype) for k in jax.random.split(key))
        empty = init_cache(
            config.batch_size, length, config.kv_heads, config.head_dim, block_size=config.block_size, dtype=dtype
        )
        return keys, values, extend(empty, keys, values)

    return [make(key) for key in jax.random.split(jax.random.key(length), count)]


def dense_by_products(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Dense attention of one token as two matrix products over the cache as it lies: ``[S, K·H] @ [K·H, N]``.

    Each query stands in its KV head's rows of a matrix that is zero elsewhere. That is K times the arithmetic and no
    copy of the cache. On CPU it is several times faster than `jax.nn.dot_product_attention` with grouped heads, so
    that without it block top-k would be compared with a baseline that is slow for reasons of its own.
    """
    batch, length, kv_heads, size = key.shape
    heads = query.shape[2]
    own = jnp.arange(heads) // (heads // kv_heads)  # the KV head of each query head
    place = jax.nn.one_hot(own, kv_heads, dtype=query.dtype).T[:, None, :]  # [K, 1, N]
    spread = (place * jnp.swapaxes(query[:, 0], 1, 2)[:, None]).reshape(batch, kv_heads * size, heads)
    logits = jnp.einsum("bsc,bcn->bsn", key.reshape(batch, length, -1), spread).astype(jnp.float32) * size**-0.5
    weights = jax.nn.softmax(logits, 1).astype(value.dtype)
    mixed = jnp.einsum("bsn,bsc->bnc", weights, value.reshape(batch, length, -1))
    mixed = mixed.reshape(batch, heads, kv_heads, size)
    return jnp.take_along_axis(mixed, own[None, :, None, None], 2)[:, None, :, 0]


def measure(config: BlockTopKLatencyConfig, length: int) -> dict[str, Timing]:
    """Seconds of one step of each kind with a full cache of ``length`` tokens, measured in turn."""
    caches = make_caches(config, length)
    query_shape = (config.batch_size, 1, config.heads, config.head_dim)
    query = jax.random.normal(jax.random.key(1), query_shape, jnp.dtype(config.dtype))

    @jax.jit
    def library(query: jax.Array, key: jax.Array, value: jax.Array, cache: BlockTopKCache) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value)

    @jax.jit
    def dense(query: jax.Array, key: jax.Array, value: jax.Array, cache: BlockTopKCache) -> jax.Array:
        return dense_by_products(query, key, value)

    @jax.jit
    def sparse(query: jax.Array, key: jax.Array, value: jax.Array, cache: BlockTopKCache) -> jax.Array:
        return block_topk_decode(query, cache, num_blocks=config.num_blocks, num_sink=config.num_sink)

    def stepper(function: Any) -> Callable[[], jax.Array]:
        turn = itertools.cycle(caches)  # the next layer's cache, which is in no fast memory
        return lambda: function(query, *next(turn))

    contenders = {LIBRARY: stepper(library), DENSE: stepper(dense), SPARSE: stepper(sparse)}
    # One call a turn: the others' traffic between two calls drives this one's blocks out of the fast memory, which they
    # would otherwise stay in, being few.
    return time_in_turn(contenders, repeats=config.repeats, min_seconds=0.0)


def traffic(config: BlockTopKLatencyConfig, length: int) -> dict[str, float]:
    """Bytes that one step reads in each kind, by the cost model."""
    size = jnp.dtype(config.dtype).itemsize
    layer = ModelSpec(1, 1, config.heads, config.kv_heads, config.head_dim, kv_bytes=size)
    one = HardwareSpec(1e12, 1e12)  # an operation a byte: the memory cost is then the bytes, in 10¹²
    attention = BlockTopK(config.block_size, config.num_blocks, num_sink=config.num_sink)
    # One token after length - 1/2 others: the model counts a step at its midpoint.
    costs = {
        DENSE: eflops(layer, one, prompt_len=length - 0.5, gen_len=1),
        SPARSE: eflops(layer, one, prompt_len=length - 0.5, gen_len=1, attention=attention),
    }
    read = {name: config.batch_size * float(cost.memory) * 1e12 for name, cost in costs.items()}
    return read | {LIBRARY: read[DENSE]}


class Law:
    """Seconds = a + b·S, fitted with relative weights."""

    def __init__(self, lengths: Sequence[int], seconds: Sequence[float]) -> None:
        slope, start = np.polyfit(lengths, seconds, 1, w=1 / np.asarray(seconds))
        self.start, self.slope = float(start), float(slope)
        fitted = self.start + self.slope * np.asarray(lengths, np.float64)
        self.error = float(np.max(np.abs(fitted / np.asarray(seconds) - 1)))


def run(config: BlockTopKLatencyConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Measure every length; finished ones are kept when the run is interrupted."""
    timings: dict[int, dict[str, Timing]] = {}
    for i, length in enumerate(config.lengths):
        yield Progress("timing", i, len(config.lengths), f"{length} tokens")
        saved = session.load(f"timing-{length}")
        if saved is None:
            saved = {name: list(timing.seconds) for name, timing in measure(config, length).items()}
            session.save(f"timing-{length}", saved)
        timings[length] = {name: Timing(tuple(seconds)) for name, seconds in saved.items()}
    yield Progress("timing", len(config.lengths), len(config.lengths))
    return compare(config, timings)


def slope_interval(timings: dict[int, dict[str, Timing]], *, resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of slopes: turns are drawn again, within each length."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(resamples):
        seconds: dict[str, list[float]] = {DENSE: [], SPARSE: []}
        for timing in timings.values():
            picks = rng.integers(0, len(timing[DENSE].seconds), len(timing[DENSE].seconds))
            for name, values in seconds.items():
                values.append(float(np.median(np.asarray(timing[name].seconds)[picks])))
        slopes = {name: Law(tuple(timings), values).slope for name, values in seconds.items()}
        ratios.append(slopes[DENSE] / slopes[SPARSE] if slopes[SPARSE] > 0 else float("inf"))
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")  # interpolating between infinities gives NaN
    return float(low), float(high)


def compare(config: BlockTopKLatencyConfig, timings: dict[int, dict[str, Timing]]) -> Comparison:
    """Tables, figure, rows and the headline."""
    lengths, names = tuple(timings), (LIBRARY, DENSE, SPARSE)
    laws = {name: Law(lengths, [timings[s][name].median for s in lengths]) for name in names}
    bytes_read = {s: traffic(config, s) for s in lengths}
    predicted = _predicted_slope(config)
    low, high = slope_interval(timings)
    if np.isfinite(high) and low > 0:
        slopes = f"{laws[DENSE].slope / laws[SPARSE].slope:.0f} (95 % {low:.0f} to {high:.0f})"
    else:  # block top-k may be too flat for its slope to be measured
        slopes = f"more than {low:.0f}" if low > 1 else "an unknown factor"
    rows: list[tuple[Cell, ...]] = []
    speeds: list[tuple[Cell, ...]] = []
    for s in lengths:
        medians = {name: timings[s][name].median for name in names}
        value, interval = ratio(timings[s], DENSE, SPARSE)
        words = f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
        by_traffic = bytes_read[s][DENSE] / bytes_read[s][SPARSE]
        milliseconds = (1e3 * medians[name] for name in names)
        rows.append((s, *milliseconds, medians[LIBRARY] / medians[SPARSE], words, by_traffic))
        speeds.append((s, *(bytes_read[s][name] / medians[name] / 1e9 for name in names)))
    latency = Table(
        "One token, one attention layer",
        ("cached tokens", *(f"{name} [ms]" for name in names), "over jax.nn", "over dense (95 %)", "bytes allow"),
        tuple(rows),
        f"medians of {config.repeats} turns, and how many times faster block top-k is; every step reads a cache that "
        "the last ones did not touch; the last column is the limit where time is traffic",
    )
    speed = Table("Bytes that must be read, over time: GB/s", ("cached tokens", *names), tuple(speeds))
    law = Table(
        "Fitted law: a + b·S",
        ("attention", "a [µs]", "b [ns per token]", "largest error of the fit"),
        tuple((name, 1e6 * law.start, 1e9 * law.slope, f"{law.error:.0%}") for name, law in laws.items()),
        f"ratio of the slopes of dense and block top-k: {slopes}, predicted by traffic: {predicted:.0f}",
    )
    figure = Figure(
        "Decoding one token",
        "tokens in the cache",
        "milliseconds",
        tuple(
            Series(
                name,
                tuple(map(float, lengths)),
                tuple(1e3 * timings[s][name].median for s in lengths),
                tuple(1e3 * float(np.quantile(timings[s][name].seconds, 0.25)) for s in lengths),
                tuple(1e3 * float(np.quantile(timings[s][name].seconds, 0.75)) for s in lengths),
            )
            for name in names
        ),
        x_log=True,
        y_log=True,
        note="medians; band: quartiles",
    )
    last = timings[lengths[-1]]
    over = {name: last[name].median / last[SPARSE].median for name in names}
    allowed = bytes_read[lengths[-1]][DENSE] / bytes_read[lengths[-1]][SPARSE]
    return Comparison(
        headline=(
            f"a token after {lengths[-1]:,} others takes {1e3 * last[SPARSE].median:.2f} ms with block top-k of "
            f"{config.block_size * config.num_blocks:,} tokens: {over[LIBRARY]:.1f} times faster than "
            f"jax.nn.dot_product_attention, {over[DENSE]:.1f} times faster than dense attention as plain products "
            f"(bytes allow {allowed:.1f}); slopes over the length differ by {slopes}, by traffic {predicted:.0f}"
        ),
        rows=tuple(_row(config, s, timings[s], name) for s in lengths for name in (LIBRARY, DENSE)),
        tables=(latency, law, speed),
        figures=(figure,),
        notes=(
            "Random keys and values: nothing is said about quality here, see block_topk_recall.",
            "On CPU, jax.nn.dot_product_attention is slow for one token with grouped heads. The same attention as two "
            "plain matrix products (dense) is the baseline that counts.",
            "Mean keys are cached, as in decoding; keeping them up to date costs one more key per step.",
        ),
    )


def _predicted_slope(config: BlockTopKLatencyConfig) -> float:
    """Bytes per further token of the cache, dense over sparse: 2 · block_size."""
    far = (config.lengths[-1], 2 * config.lengths[-1])
    near, further = (traffic(config, s) for s in far)
    return (further[DENSE] - near[DENSE]) / (further[SPARSE] - near[SPARSE])


def _row(config: BlockTopKLatencyConfig, length: int, timings: dict[str, Timing], baseline: str) -> dict[str, Any]:
    value, interval = ratio(timings, baseline, SPARSE)
    return {
        "method": "kinetics",
        "method_config": {"part": "block top-k", "block_size": config.block_size, "num_blocks": config.num_blocks},
        "baseline": {LIBRARY: "jax.nn.dot_product_attention", DENSE: "dense attention as matrix products"}[baseline],
        "task": {
            "kind": "inference",
            "name": "decode-attention",
            "seq_len": length,
            "metric": "seconds",
            "higher_is_better": False,
        },
        "model": {
            "family": "attention",
            "layers": 1,
            "width": config.heads * config.head_dim,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "dtype": config.dtype,
        },
        "workload": {"batch": config.batch_size, "prompt_length": length, "gen_length": 1, "seeds": 1},
        "cost_kind": "wall",
        "speedup": value,
        "speedup_ci": interval,
    }


EXPERIMENT = Experiment(
    name="block_topk_latency",
    method="kinetics",
    claim="the cost of block top-k decoding grows with the context only by its search, 1 / block size of the cache",
    config=BlockTopKLatencyConfig,
    presets={
        "quick": BlockTopKLatencyConfig(seeds=1),
        "full": BlockTopKLatencyConfig(
            seeds=1,
            lengths=(4096, 8192, 16_384, 32_768, 65_536, 131_072),
            batch_size=16,
            heads=32,
            kv_heads=8,
            head_dim=128,
            dtype="bfloat16",
            repeats=31,
            cold_bytes=2**30,
        ),
    },
    run=run,
)
