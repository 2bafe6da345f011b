"""Expert FFN: the feed-forward layer of a mixture of many small experts, reading only those that some token uses.

For the tokens x of a chunk, experts with slabs upₑ and downₑ [de, D] (no gates), and a score of each token for each
expert, most of them zero:

    active_e = some token of the chunk has scores[t, e] ≠ 0
    y_t = Σ_{e active} scores[t, e] · (act(x_t·upₑᵀ)·downₑ)

Every active expert is computed for every token of the chunk, and the scores, exact zeros among them, do the rest: the
result is that of all experts, up to the order of a sum. Decoding is bound by reading weights, so that what it costs
falls from Ne slabs to |union|, the active ones.

When to use it: decoding, with up to about 64 tokens at a time (drafts of speculative decoding among them), from a model
whose tokens agree on few experts. When not: training and prefill, where nearly all experts are active
(`dense_expert_ffn`), or many tokens that each use few experts (sort them: `jax.lax.ragged_dot`).

Over several devices: shard tokens, or ``de`` of both slabs. Sharding over experts would gather the slabs, as which ones
are read is known only at run time. The Pallas kernels need `jax.shard_map`.

"BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation Sparsity", Song et al.,
2025, arXiv 2507.08771 (its inference kernels drop experts with a negative score; here they count).
"""

import functools
import numbers
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.arrays import vary_alike
from kernels_pallas.dispatch import raise_refusal, resolve_implementation
from kernels_pallas.expert_ffn import gpu, tpu, xla
from kernels_pallas.expert_ffn.problem import Activation, Active, check_activation
from kernels_pallas.expert_ffn.reference import dense_expert_ffn
from kernels_pallas.expert_ffn.vjp import Kernel, differentiable

__all__ = ["dense_expert_ffn", "expert_ffn"]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""


def _check(x: Array, up: Array, down: Array, scores: Array, active: Array | None) -> None:
    for name, array in (("x", x), ("up", up), ("down", down), ("scores", scores)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating type")
    if up.ndim != 3 or 0 in up.shape:
        raise ValueError(f"up has shape {up.shape}, expected [Ne, de, D], none of them zero")
    if down.shape != up.shape:
        raise ValueError(f"down has shape {down.shape}, expected {up.shape} as up has: [Ne, de, D]")
    if x.ndim < 1 or x.shape[-1] != up.shape[2]:
        raise ValueError(f"x has shape {x.shape}, expected [..., {up.shape[2]}] as up is {up.shape}")
    if scores.shape != (*x.shape[:-1], up.shape[0]):
        raise ValueError(
            f"scores has shape {scores.shape}, expected {(*x.shape[:-1], up.shape[0])}: one score of each of the "
            f"{up.shape[0]} experts for each token of x"
        )
    if active is not None and active.dtype != jnp.bool_:
        raise TypeError(f"active has dtype {active.dtype}, expected bool")
    if active is not None and active.shape != up.shape[:1]:
        raise ValueError(f"active has shape {active.shape}, expected {up.shape[:1]}: one for each expert")


def _limit(max_active: Any, experts: int) -> int:
    if isinstance(max_active, bool) or not isinstance(max_active, numbers.Integral):
        raise TypeError(f"max_active is {max_active!r}, expected an integer or None")
    limit = int(max_active)
    if not 1 <= limit <= experts:
        raise ValueError(f"max_active is {limit}, expected 1 up to the {experts} experts of up")
    return limit


@functools.cache
def _kernel(name: str, activation: Activation, limit: int, interpret: Any) -> Kernel:
    # Kept, so that the function built on top of it is kept, and with it what jit compiled.
    if name == "xla":
        return functools.partial(xla.forward, activation=activation)
    module = tpu if name == "pallas_tpu" else gpu

    def kernel(x: Array, up: Array, down: Array, scores: Array, union: Active, first: Any) -> Array:
        if module.refusal(x, up, down, scores.shape[1]) is not None:  # more tokens, under vmap, than were checked
            return xla.forward(x, up, down, scores, union, first, activation)
        return module.forward(
            x, up, down, scores, union, first, activation=activation, max_active=limit, interpret=interpret
        )

    return kernel


def _run(
    x: Array,
    up: Array,
    down: Array,
    scores: Array,
    active: Array | None,
    activation: Activation,
    max_active: int | None,
    implementation: str | None,
    interpret: Any = False,
) -> Array:
    tokens, flat = x.reshape(-1, x.shape[-1]), scores.reshape(-1, up.shape[0])
    refusals = {
        "pallas_tpu": tpu.refusal(tokens, up, down, up.shape[0]),
        "pallas_gpu": gpu.refusal(tokens, up, down, up.shape[0]),
    }
    name = str(implementation)
    if interpret:
        raise_refusal(name, refusals.get(name))
    else:
        name = resolve_implementation(implementation, AVAILABLE, refusals=refusals)
    default = xla.most_active(up.shape[0]) if name == "xla" else up.shape[0]
    limit = default if max_active is None else _limit(max_active, up.shape[0])
    if not tokens.shape[0]:
        return x
    if active is None:
        active = (flat != 0).any(0)
    op = differentiable(_kernel(name, activation, limit, interpret), activation, limit)
    return op(*vary_alike(tokens, up, down, flat, active)).reshape(x.shape)


def expert_ffn(
    x: Float[Array, "... D"],
    up: Float[Array, "..."],
    down: Float[Array, "..."],
    scores: Float[Array, "..."],
    *,
    active: Bool[Array, "..."] | None = None,
    activation: Activation = "silu",
    max_active: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "... D"]:
    """The sum y = Σₑ scores[:, e] · (act(x·upₑᵀ)·downₑ), computed for active experts only: see the module.

    Gradients: the backward pass skips inactive experts too. That is exact for x, and for the weights of experts whose
    scores are all zero. The gradient of the scores of an inactive expert is *defined* as zero: behind a router with a
    ReLU it is lost there anyway. Where a score is zero and its gradient is not (a learned scale that happens to be 0),
    pass ``active``. Second derivatives are supported in both modes (``grad`` or ``jvp`` of ``grad``), at the dense
    form's cost; ``jvp`` of the function itself is not (`dense_expert_ffn` has it).

    Under ``vmap`` examples that share the weights are computed as the tokens of one call, over the union of their
    experts (by XLA where a kernel cannot take as many); examples with weights of their own, one after the other. The
    gradient of a ``vmap`` holds the weights' gradients of every example before it sums them: give x leading axes
    instead, which do not.

    Args:
        x: tokens [..., D]; leading axes are flattened, and all tokens share one union.
        up: first matrices of the experts [Ne, de, D].
        down: second matrices [Ne, de, D]: each expert is one contiguous slab.
        scores: weight of each expert for each token [..., Ne], of any sign. NaN counts as active, and shows in y.
        active: bool [Ne], the experts to compute; those with any score ≠ 0 by default. Scores of other experts are
            not read.
        activation: ``"silu"``, ``"gelu"`` (tanh form) or ``"relu"``.
        max_active: at most that many experts are computed one by one, 1 up to Ne. Where more are active the dense form
            runs, through `jax.lax.cond`: never a part of the sum. By default Ne for the Pallas kernels, where a smaller
            number saves grid steps, and 0.6·Ne for ``"xla"``, above which the dense form is as fast; give Ne to never
            read an inactive expert.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``; the best for the platform by default.

    Returns:
        [..., D] in the dtype of ``x``; sums are float32, or float64 for float64.

    Raises:
        ValueError: for shapes that do not fit, a ``max_active`` outside 1..Ne, an unknown activation, an implementation
            that is unknown or cannot take the call.
        TypeError: for arrays that are not of a real floating type, ``active`` that is not of bool, ``max_active`` that
            is no integer.

    >>> x, weights = jnp.ones((2, 4)), jnp.ones((3, 5, 4))
    >>> scores = jnp.array([[0.0, 0.5, 0.0], [0.0, -1.0, 0.0]])  # expert 1 alone is read
    >>> expert_ffn(x, weights.at[0].set(jnp.nan), weights, scores, activation="relu", max_active=3)[:, 0].tolist()
    [10.0, -20.0]
    """
    _check(x, up, down, scores, active)
    check_activation(activation)
    return _run(x, up, down, scores, active, activation, max_active, implementation)
