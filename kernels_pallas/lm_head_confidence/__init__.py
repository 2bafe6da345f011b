"""Most probable token and its probability straight from hidden states: logits are never written.

    l_v = h·w_v,   token = argmax_{v ≠ forbid} l_v,   confidence = exp(l_token − max_v l_v)/Σ_v exp(l_v − max_v l_v)

Parallel decoding of diffusion language models asks for just these two numbers at every masked position. A head of
126,464 tokens makes half a gigabyte of float32 logits of a thousand positions, written, read by a softmax and read
again; here the matrix is read once, and a running maximum, sum and argmax are all that is kept.

When to use it: greedy choices with a confidence. When not: sampling with a temperature, guidance of two passes,
anything else that needs the logits themselves.

The mask token must never be revealed, so ``forbid`` is left out of the argmax. It stays in the softmax: confidence is
the model's own probability. There are no gradients: asking for one raises.

Over several devices: shard hidden states by rows. The Pallas kernels need `jax.shard_map`.

Online softmax: Milakov and Gimelshein, 2018, arXiv 1805.02867; confidence decoding: Nie et al., LLaDA, 2025, arXiv
2502.09992.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.lm_head_confidence import gpu, tpu, xla

__all__ = ["HeadConfidence", "lm_head_confidence"]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""
RUN = {"xla": xla.confidence, "pallas_tpu": tpu.confidence, "pallas_gpu": gpu.confidence}


class HeadConfidence(NamedTuple):
    """What `lm_head_confidence` says of each row."""

    token: Int[Array, "*_"]  # int32
    confidence: Float[Array, "*_"]  # float32, 0 to 1; NaN where a logit is NaN


def _check(hidden: Array, weight: Array, forbid: Any) -> None:
    for name, array in (("hidden", hidden), ("weight", weight)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating type")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {weight.shape}, expected [V, D], none of them zero")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {hidden.shape}, expected [..., {weight.shape[1]}] as weight is {weight.shape}"
        )
    if isinstance(forbid, bool) or not isinstance(forbid, int | None):
        raise TypeError(f"forbid is {forbid!r}, expected an integer or None")
    if forbid is not None and not 0 <= forbid < weight.shape[0]:
        raise ValueError(f"forbid is {forbid}, expected a token of the {weight.shape[0]} of weight")
    if forbid is not None and weight.shape[0] == 1:
        raise ValueError("forbid leaves no token: weight has one row")


@functools.cache
def _op(name: str, forbid: int | None, interpret: Any) -> Any:
    @jax.custom_jvp
    def op(rows: Array, weight: Array) -> tuple[Array, Array]:
        return RUN[name](rows, weight, -1 if forbid is None else forbid, interpret=interpret)

    @op.defjvp
    def _no_gradient(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
        raise TypeError("lm_head_confidence has no gradient; differentiate a loss of the logits instead")

    return op


def lm_head_confidence(
    hidden: Shaped[Array, "*_"],
    weight: Shaped[Array, "*_"],
    *,
    forbid: Any = None,
    implementation: str | None = None,
) -> HeadConfidence:
    """Argmax of ``hidden·weightᵀ`` and its softmax probability, without the logits: see the module.

    Args:
        hidden: states after the last norm [..., D]; leading axes are flattened, also under ``vmap``.
        weight: output matrix [V, D].
        forbid: a token that is never the argmax, that of masks for example; static.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``; the best for the platform by default.

    Returns:
        `HeadConfidence` of shape [...]. Of equal logits the lowest token wins. Where a logit of a row is NaN, or
            all are −∞, its confidence is NaN, and its token means nothing.

    Raises:
        ValueError: for shapes that do not fit, ``forbid`` outside the vocabulary, an implementation that is unknown or
            cannot take the call.
        TypeError: for arrays that are not of a real floating type, and where a gradient is asked for.

    >>> found = lm_head_confidence(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.eye(2))
    >>> found.token.tolist(), [round(float(c), 3) for c in found.confidence]
    ([0, 1], [0.731, 0.881])
    """
    _check(hidden, weight, forbid)
    refusals = {name: module.refusal(hidden, weight) for name, module in (("pallas_tpu", tpu), ("pallas_gpu", gpu))}
    name = resolve_implementation(implementation, AVAILABLE, refusals=refusals)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] == 0:
        return HeadConfidence(jnp.zeros(hidden.shape[:-1], jnp.int32), jnp.zeros(hidden.shape[:-1], jnp.float32))
    token, confidence = _op(name, forbid, False)(flat, weight)
    return HeadConfidence(token.reshape(hidden.shape[:-1]), confidence.reshape(hidden.shape[:-1]))
