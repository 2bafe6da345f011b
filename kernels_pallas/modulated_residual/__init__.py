"""Pending residual branches, LayerNorm and modulation in one pass over the activations.

    x′ = x + Σ_k g_k·C_k            the branches that wait to be added, K ≥ 0 of them
    h  = LN(x′)·(1 + scale) + shift   LN without learned weights; the input of the next branch

Diffusion transformers with adaLN do this before each attention and each MLP. Where branch outputs are reused
(HarmoniCa, arXiv 2410.01723), a run of reused branches costs nothing but this sum: it is bound by bandwidth, so that x
and the branches should be read once, and x′ and h written once. Without a kernel the sum, the statistics and the
modulation are up to four passes.

When to use it: adaLN blocks on TPUs and GPUs, K from 0 to 8 or so. When not: on CPU it is what XLA makes of the
equation, no faster than writing that.

`modulated_residual_rows` is for serving samples at different steps in one batch: all get their residuals, and h is
made only for the samples that must compute the next branch, packed together, so that the branch runs on these alone.

The DiT block: Peebles and Xie, 2022, arXiv 2212.09748.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from kernels_pallas.arrays import vary_alike
from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.modulated_residual import gpu, tpu, xla
from kernels_pallas.modulated_residual.problem import Modulated, ModulatedRows, order_of, poison

__all__ = ["Modulated", "ModulatedRows", "modulated_residual", "modulated_residual_rows"]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""
KERNELS = {"pallas_tpu": tpu, "pallas_gpu": gpu}


def _check(x: Array, branches: Sequence[Array], gates: Sequence[Array], shift: Array, scale: Array, eps: Any) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}, expected [B, N, D], none of them zero")
    if len(branches) != len(gates):
        raise ValueError(f"there are {len(branches)} branches and {len(gates)} gates, expected one gate for each")
    samples, _, width = x.shape
    named = [(f"branches[{k}]", c, x.shape) for k, c in enumerate(branches)]
    named += [(f"gates[{k}]", g, (samples, width)) for k, g in enumerate(gates)]
    named += [("shift", shift, (samples, width)), ("scale", scale, (samples, width))]
    for name, array, shape in named:
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} as x is {x.shape}")
    for name, array in [("x", x), *((name, array) for name, array, _ in named)]:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating type")
    if not isinstance(eps, int | float) or not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}, expected a positive number")


def _choose(implementation: str | None, *arrays: Any) -> str:
    refusals = {name: module.refusal(*arrays) for name, module in KERNELS.items()}
    return resolve_implementation(implementation, AVAILABLE, refusals=refusals)


@functools.cache
def differentiable(kernel: Any, eps: float, interpret: Any) -> Any:
    """``op(x, branches, gates, shift, scale)`` with a kernel's own backward pass; once differentiable, in reverse."""

    @jax.custom_vjp
    def op(x: Array, branches: Any, gates: Any, shift: Array, scale: Array) -> tuple[Array, Array]:
        return kernel.forward(x, branches, gates, shift, scale, eps, interpret=interpret)

    def forward(x: Array, branches: Any, gates: Any, shift: Array, scale: Array) -> Any:
        new, h = op(x, branches, gates, shift, scale)
        return (new, h), (new, branches, gates, shift, scale)

    def backward(saved: Any, into: tuple[Array, Array]) -> Any:
        new, branches, gates, shift, scale = saved
        into_x, into_branches, into_mods = kernel.backward(
            new, branches, gates, shift, scale, *into, eps, interpret=interpret
        )
        *into_gates, into_shift, into_scale = (into_mods[:, k] for k in range(len(branches) + 2))
        cast = [g.astype(gate.dtype) for g, gate in zip(into_gates, gates, strict=True)]
        return into_x, tuple(into_branches), tuple(cast), into_shift.astype(shift.dtype), into_scale.astype(scale.dtype)

    op.defvjp(forward, backward)
    return op


def modulated_residual(
    x: Shaped[Array, "*_"],
    branches: Sequence[Any],
    gates: Sequence[Any],
    shift: Shaped[Array, "*_"],
    scale: Shaped[Array, "*_"],
    *,
    eps: Any = 1e-6,
    implementation: str | None = None,
) -> Modulated:
    """Add gated branches to the residual stream, then normalise and modulate it: see the module.

    Args:
        x: residual stream [B, N, D].
        branches: K arrays [B, N, D], outputs before their gates; none at the first norm of a network.
        gates: K arrays [B, D].
        shift: [B, D].
        scale: [B, D]; 0 leaves the norm as it is.
        eps: added to the variance.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``; the best for the platform by default.

    Returns:
        `Modulated`: x′ and h, both of x's shape and dtype. Sums and statistics are float32 (float64 for float64); x′ is
        rounded before it is normalised, as if it had been written and read.

    Raises:
        ValueError: for shapes that do not fit, a number of gates other than that of branches, ``eps`` ≤ 0, an
            implementation that is unknown or cannot take the call.
        TypeError: for arrays that are not of a real floating type.

    >>> x = jnp.array([[[1.0, 3.0]]])
    >>> out = modulated_residual(x, [2 * x], [jnp.ones((1, 2))], jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> out.x.tolist(), out.h.round(3).tolist()
    ([[[3.0, 9.0]]], [[[-1.0, 1.0]]])
    """
    branches, gates = tuple(branches), tuple(gates)
    _check(x, branches, gates, shift, scale, eps)
    name = _choose(implementation, x, branches, gates, shift, scale)
    if name == "xla":
        return Modulated(*xla.forward(x, branches, gates, shift, scale, eps))
    return run_kernel(KERNELS[name], x, branches, gates, shift, scale, eps)


def run_kernel(
    kernel: Any, x: Array, branches: Any, gates: Any, shift: Array, scale: Array, eps: float, interpret: Any = False
) -> Modulated:
    """A kernel with its gradient, also inside ``jax.shard_map``."""
    count = len(branches)
    x, *rest = vary_alike(x, *branches, *gates, shift, scale)
    arguments = (x, tuple(rest[:count]), tuple(rest[count : 2 * count]), *rest[2 * count :])
    return Modulated(*differentiable(kernel, float(eps), interpret)(*arguments))


def modulated_residual_rows(
    x: Shaped[Array, "*_"],
    branches: Sequence[Any],
    gates: Sequence[Any],
    shift: Shaped[Array, "*_"],
    scale: Shaped[Array, "*_"],
    compute: Shaped[Array, "*_"],
    *,
    limit: Any = None,
    eps: Any = 1e-6,
    implementation: str | None = None,
) -> ModulatedRows:
    """The same for a batch whose samples are at different steps: h only for those that compute the next branch.

    Samples that compute are packed together in the order of the batch. The next branch runs on these R rows, and
    ``cache.at[rows].set(out, mode="drop")`` puts its outputs where they belong.

    Args:
        x: residual stream [B, N, D].
        branches: as for `modulated_residual`; all samples get them.
        gates: as for `modulated_residual`; 0 where a sample does not have a branch pending.
        shift: [B, D].
        scale: [B, D].
        compute: bool [B], data.
        limit: R, room for samples that compute; static. B if ``None``. If more compute, h is NaN throughout, and
            ``number`` says how many there are.
        eps: added to the variance.
        implementation: as for `modulated_residual`.

    Returns:
        `ModulatedRows`.

    Raises:
        ValueError: as `modulated_residual`, or for a ``limit`` outside 1 … B, or a mask that is not bool [B].
        TypeError: as `modulated_residual`. There is no gradient of the kernels: training has no such batches.

    >>> x = jnp.array([[[1.0, 3.0]], [[5.0, 4.0]]])
    >>> zero = jnp.zeros((2, 2))
    >>> out = modulated_residual_rows(x, [], [], zero, zero, jnp.array([False, True]), limit=1)
    >>> out.rows.tolist(), out.h.round(3).tolist()
    ([1], [[[1.0, -1.0]]])
    """
    branches, gates = tuple(branches), tuple(gates)
    _check(x, branches, gates, shift, scale, eps)
    samples = x.shape[0]
    if compute.shape != (samples,) or compute.dtype != jnp.bool_:
        raise ValueError(f"compute is {compute.dtype}{list(compute.shape)}, expected bool[{samples}]")
    limit = samples if limit is None else limit
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= samples:
        raise ValueError(f"limit is {limit!r}, expected an integer from 1 to the {samples} samples of x")
    name = _choose(implementation, x, branches, gates, shift, scale)
    order, rows, count = order_of(compute, limit)
    run = xla.forward_rows if name == "xla" else KERNELS[name].forward_rows
    new, h = run(x, branches, gates, shift, poison(scale, count, limit), eps, order, count, limit)
    return ModulatedRows(new, h, rows, count)
