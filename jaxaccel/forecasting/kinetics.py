"""What generating text costs when reading the cache of keys and values is charged: the Kinetics cost model.

Counting floating-point operations says that a small model which thinks long, or answers often, is cheap. In decoding,
however, every new token reads the keys and values of all earlier ones, and on an accelerator that traffic takes
longer than the arithmetic. Kinetics adds both in one currency, the *eFLOP*: a byte counts as I operations, where I is
the hardware's peak FLOP/s over its bytes/s. A question with a prompt of c tokens, answered n times with g tokens
each, costs

    compute = n · [2·P·g + r·D·(2c + g)·g]      operations
    memory  = I · b · D · (c·g + n·g²/2)        bytes moved, as operations; the prompt is read once for all n
    eFLOPs  = compute + memory

with P active parameters, D = 2 · kv_heads · head_dim · layers elements of cache per token, r query heads per KV head
and b bytes per element. Sparse attention replaces the sum over all earlier tokens by Σₜ min(budget, c + t), and block
top-k adds what finding the blocks costs. Sums over steps use the midpoint of each step, t + ½, so that they are the
closed forms above and the functions are smooth in every length.

What follows from it: with dense attention more trials cost linearly and longer answers quadratically, and a small
model's cache is hardly smaller than a large one's, so that the larger model pays first. With sparse attention both
are linear.

All costs are in units of 10¹² (tera-FLOPs, tera-eFLOPs), as the paper reports them, so that they are safe in float32.

Source: Sadhukhan, Chen, Zheng, Zhou, Strubell, Chen, Kinetics: Rethinking Test-Time Scaling Laws, arXiv 2506.05333.

When to use: to choose model size, answer length, number of trials and attention for a budget before spending it. When
not: as a latency model of one request. Costs are added, not overlapped; prefill, activations and communication are
left out, and so are the parameters' bytes unless ``include_params`` is set, which is right only for large batches.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

TERA = 1e12
"""Costs are reported in this unit."""


def check_number(name: str, value: Any, *, low: float | int, high: float | int = float("inf")) -> None:
    """Raise ``ValueError`` unless all of ``value`` is finite and in ``[low, high]``; traced values are not checked."""
    if isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(value, np.float64)
    bad = ~(np.isfinite(numbers) & (numbers >= low) & (numbers <= high))
    if bad.any():
        limits = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be finite and {limits}, got {numbers[bad].ravel()[0]:g}")


def as_float(value: ArrayLike) -> Float[Array, "..."]:
    """``value`` in JAX's default float type: int32 would overflow, G²·D is about 10¹⁴."""
    if not isinstance(value, jax.Array):
        value = np.asarray(value, np.float64)  # a Python integer above 2³¹ would overflow otherwise
    return jnp.asarray(value, jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The numbers of a decoder that set its cost.

    Attributes:
        num_params: parameters that a token passes through (of a mixture of experts: the active ones).
        num_layers: layers with attention.
        num_heads: query heads.
        num_kv_heads: heads of keys and values; must divide ``num_heads``.
        head_dim: size of a head.
        kv_bytes: bytes of a cached number.
        param_bytes: bytes of a parameter, used with ``include_params`` only.

    >>> spec = ModelSpec(num_params=8.19e9, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128)
    >>> spec.kv_bytes_per_token
    147456
    """

    num_params: float | int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_bytes: float | int = 2
    param_bytes: float | int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be positive and finite, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")

    @property
    def group_size(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token leaves in the cache, keys and values of all layers."""
        return 2 * self.num_kv_heads * self.head_dim * self.num_layers

    @property
    def kv_bytes_per_token(self) -> float | int:
        """Bytes that one token leaves in the cache."""
        return self.kv_elements_per_token * self.kv_bytes


def _qwen3(num_params: float | int, num_layers: int, num_heads: int) -> ModelSpec:
    return ModelSpec(num_params, num_layers, num_heads, num_kv_heads=8, head_dim=128)


QWEN3: dict[str, ModelSpec] = {
    "Qwen3-0.6B": _qwen3(0.752e9, 28, 16),
    "Qwen3-1.7B": _qwen3(2.03e9, 28, 16),
    "Qwen3-4B": _qwen3(4.02e9, 36, 32),
    "Qwen3-8B": _qwen3(8.19e9, 36, 32),
    "Qwen3-14B": _qwen3(14.77e9, 40, 40),
    "Qwen3-32B": _qwen3(32.76e9, 64, 64),
}
"""The dense models of the paper's study. All have eight KV heads of 128, which is why their caches differ so little."""


@dataclasses.dataclass(frozen=True)
class HardwareSpec:
    """An accelerator as the cost model sees it.

    Attributes:
        peak_flops: peak operations per second of the matrix units.
        bandwidth: bytes per second of device memory.
    """

    peak_flops: float | int
    bandwidth: float | int

    def __post_init__(self) -> None:
        check_number("peak_flops", self.peak_flops, low=1)
        check_number("bandwidth", self.bandwidth, low=1)

    @property
    def intensity(self) -> float:
        """Operations that take as long as moving one byte: the I of the paper.

        >>> B200.intensity
        562.5
        """
        return self.peak_flops / self.bandwidth

    def seconds(self, total: ArrayLike) -> Float[Array, "..."]:
        """Seconds of one device at its peak for ``total`` tera-eFLOPs.

        >>> print(f"{B200.seconds(1e5):.1f}")
        22.2
        """
        return as_float(total) / (self.peak_flops / TERA)


B200 = HardwareSpec(4500e12, 8e12)
"""The paper's: 4500 TFLOP/s is the dense FP8 peak; dense bfloat16 would halve the intensity to about 281."""
H100 = HardwareSpec(989e12, 3.35e12)
"""Ours, from the data sheet: SXM, dense bfloat16, intensity 295."""
H200 = HardwareSpec(989e12, 4.8e12)
"""Ours, from the data sheet: SXM, dense bfloat16, intensity 206."""
TPU_V5E = HardwareSpec(197e12, 819e9)
"""Ours, from the data sheet: bfloat16, intensity 241."""
TPU_V5P = HardwareSpec(459e12, 2765e9)
"""Ours, from the data sheet: bfloat16, intensity 166."""
TPU_V6E = HardwareSpec(918e12, 1640e9)
"""Ours, from the data sheet: bfloat16, intensity 560."""


@dataclasses.dataclass(frozen=True)
class TopK:
    """Attention to the ``budget`` most relevant earlier tokens, found at no cost: a bound for real methods."""

    budget: ArrayLike

    def __post_init__(self) -> None:
        check_number("budget", self.budget, low=1)


@dataclasses.dataclass(frozen=True)
class BlockTopK:
    """Attention to whole blocks, chosen by the mean of their keys: see `jaxaccel.attention.block_topk_attention`.

    The tail that is not yet a full block adds up to ``block_size - 1`` tokens, which the model leaves out, as the
    paper does.

    Attributes:
        block_size: tokens of a block.
        num_blocks: blocks that are read.
        num_local: latest tokens that are always read.
        num_sink: first tokens that are always read.

    >>> BlockTopK(block_size=16, num_blocks=64).budget
    1028
    """

    block_size: int
    num_blocks: int
    num_local: int = 0
    num_sink: int = 4

    def __post_init__(self) -> None:
        for name, low in (("block_size", 1), ("num_blocks", 1), ("num_local", 0), ("num_sink", 0)):
            check_number(name, getattr(self, name), low=low)

    @property
    def budget(self) -> int:
        """Tokens that a step reads at most."""
        return self.num_sink + self.num_local + self.block_size * self.num_blocks


Attention = Literal["dense"] | TopK | BlockTopK


class Cost(NamedTuple):
    """What a question costs, in 10¹² operations; the shape is that of the broadcast lengths and trials."""

    compute: Float[Array, "..."]  # arithmetic
    memory: Float[Array, "..."]  # bytes moved, times the hardware's operations per byte
    total: Float[Array, "..."]  # their sum, or the larger of both


def kv_cache_bytes(model: ModelSpec, tokens: ArrayLike) -> Float[Array, "..."]:
    """Bytes of the cache of ``tokens`` tokens.

    >>> print(kv_cache_bytes(QWEN3["Qwen3-0.6B"], 32768) / 2**30)
    3.5
    """
    check_number("tokens", tokens, low=0)
    return as_float(tokens) * model.kv_bytes_per_token


def tokens_read(budget: ArrayLike, prompt_len: ArrayLike, gen_len: ArrayLike) -> Float[Array, "..."]:
    """Cached tokens that one trial reads with at most ``budget`` per step: Σₜ min(budget, prompt_len + t + ½), exactly.

    With w = min(max(budget − c, 0), g) steps in which everything fits: c·w + w²/2 + budget·(g − w).

    The repository of the paper adds the square of (budget − c)/√2 where it is to be subtracted (top-k), and in both
    sparse forms leaves out the case that the answer ends before the budget is full.

    >>> print(int(tokens_read(1024, 256, 8192)), int(tokens_read(1024, 256, 500)))
    8093696 253000
    """
    check_number("budget", budget, low=1)
    check_number("prompt_len", prompt_len, low=0)
    check_number("gen_len", gen_len, low=0)
    budget, prompt, gen = as_float(budget), as_float(prompt_len), as_float(gen_len)
    fits = jnp.clip(budget - prompt, 0, gen)
    return prompt * fits + fits**2 / 2 + budget * (gen - fits)


def _reference_tokens(budget: Array, prompt: Array, gen: Array, sign: float) -> Float[Array, "..."]:
    """What the paper's repository charges; ``sign`` is +1 in its top-k form and −1 in its block form."""
    return budget * gen + sign * jnp.where(prompt >= budget, 0.0, (budget - prompt) ** 2 / 2)


def eflops(
    model: ModelSpec,
    hardware: HardwareSpec,
    *,
    prompt_len: ArrayLike,
    gen_len: ArrayLike,
    num_trials: ArrayLike = 1,
    attention: Attention = "dense",
    prefix_sharing: bool = True,
    include_params: bool = False,
    combine: Literal["sum", "max"] = "sum",
    reference_compat: bool = False,
) -> Cost:
    """What it costs to answer one question ``num_trials`` times.

    Block top-k scores S/block_size mean keys in each step in which not everything fits into the budget, once per KV
    head: the scores of a group's query heads are averaged, which is one product with the averaged query. Their bytes
    are half of D per block (keys only), and the prompt's are read once for all trials. The chosen tokens are never
    shared between trials, since each trial chooses for itself.

    Differentiable in lengths, trials and budget.

    Args:
        model: the decoder.
        hardware: the accelerator.
        prompt_len: tokens of the prompt; any shape that broadcasts with the next two.
        gen_len: tokens of one answer.
        num_trials: answers to the same prompt.
        attention: ``"dense"``, `TopK` or `BlockTopK`.
        prefix_sharing: read the prompt's keys and values once for all trials.
        include_params: charge the bytes of the parameters too, once per step for all trials; the paper does not,
            since a large batch of questions shares them.
        combine: ``"sum"`` as the paper, or ``"max"``: the larger of both, as if they overlapped perfectly.
        reference_compat: reproduce the paper's repository, with its errors: the sign and the missing case of
            `tokens_read`, a search in every step and for every query head, and block counts rounded down.

    Returns:
        Costs in 10¹² operations, in JAX's default float type.

    Raises:
        ValueError: for negative or non-finite lengths, fewer than one trial, or an unknown option.

    >>> model = QWEN3["Qwen3-8B"]
    >>> dense = eflops(model, B200, prompt_len=150, gen_len=15_000)
    >>> sparse = eflops(model, B200, prompt_len=150, gen_len=15_000, attention=TopK(1024))
    >>> print(f"{dense.total / sparse.total:.1f} times cheaper")
    6.6 times cheaper
    """
    for name, value, low in (("prompt_len", prompt_len, 0), ("gen_len", gen_len, 0), ("num_trials", num_trials, 1)):
        check_number(name, value, low=low)
    if combine not in ("sum", "max"):
        raise ValueError(f"combine must be 'sum' or 'max', got {combine!r}")
    if not (attention == "dense" or isinstance(attention, TopK | BlockTopK)):
        raise ValueError(f"attention must be 'dense', TopK(...) or BlockTopK(...), got {attention!r}")
    prompt, gen, trials = jnp.broadcast_arrays(as_float(prompt_len), as_float(gen_len), as_float(num_trials))
    shared = 1.0 if prefix_sharing else trials
    # Factors are scaled before they meet a length, so that no product leaves float32's comfortable range.
    elements = model.kv_elements_per_token / TERA
    bytes_cost = hardware.intensity * model.kv_bytes

    compute = trials * (2 * model.num_params / TERA) * gen
    if isinstance(attention, str):
        compute += trials * 2 * model.group_size * elements * (prompt * gen + gen**2 / 2)
        memory = bytes_cost * elements * (shared * prompt * gen + trials * gen**2 / 2)
    else:
        budget = as_float(attention.budget)
        if reference_compat:
            read = _reference_tokens(budget, prompt, gen, 1.0 if isinstance(attention, TopK) else -1.0)
        else:
            read = tokens_read(budget, prompt, gen)
        compute += trials * 2 * model.group_size * elements * read
        memory = trials * bytes_cost * elements * read
    if isinstance(attention, BlockTopK):
        keys = elements / 2
        if reference_compat:
            blocks = jnp.floor((2 * prompt + gen) / attention.block_size)
            compute += trials * model.group_size * keys * blocks * gen
            blocks = jnp.floor((2 * prompt + trials * gen) / attention.block_size)
            memory += bytes_cost / 2 * keys * blocks * gen
        else:
            fits = jnp.clip(as_float(attention.budget) - prompt, 0, gen)  # steps without a search
            old = prompt * (gen - fits) / attention.block_size
            new = (gen**2 - fits**2) / 2 / attention.block_size
            compute += trials * 2 * keys * (old + new)
            memory += bytes_cost * keys * (shared * old + trials * new)
    if include_params:
        memory += hardware.intensity * (model.param_bytes * model.num_params / TERA) * gen
    total = compute + memory if combine == "sum" else jnp.maximum(compute, memory)
    return Cost(compute, memory, total)


def attention_ratio(
    model: ModelSpec, hardware: HardwareSpec, *, prompt_len: ArrayLike, gen_len: ArrayLike, **options: Any
) -> Float[Array, "..."]:
    """How many times the cost of the model's weights its attention costs: the Φ of the paper.

    With one trial, dense attention and c ≪ g: Φ ≈ (r + I) · D · g / (2·P). Above 1, saving parameters saves little.

    Args:
        model: the decoder.
        hardware: the accelerator.
        prompt_len: tokens of the prompt.
        gen_len: tokens of the answer, at least 1.
        **options: further arguments of `eflops`.

    >>> print([round(float(attention_ratio(m, B200, prompt_len=128, gen_len=16384))) for m in QWEN3.values()])
    [358, 133, 86, 42, 26, 19]
    """
    check_number("gen_len", gen_len, low=1)
    cost = eflops(model, hardware, prompt_len=prompt_len, gen_len=gen_len, **options)
    linear = as_float(options.get("num_trials", 1)) * (2 * model.num_params / TERA) * as_float(gen_len)
    return (cost.total - linear) / linear
