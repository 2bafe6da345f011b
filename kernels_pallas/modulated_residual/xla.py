"""Without Pallas: what XLA makes of the equation. The default on CPU, and what is differentiated more than once."""

from collections.abc import Sequence

from jax import Array

from kernels_pallas.modulated_residual.reference import modulate, reference, stream


def forward(
    x: Array, branches: Sequence[Array], gates: Sequence[Array], shift: Array, scale: Array, eps: float
) -> tuple[Array, Array]:
    """See the module of the op."""
    return reference(x, branches, gates, shift, scale, eps)


def forward_rows(
    x: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    eps: float,
    order: Array,
    count: Array,
    limit: int,
) -> tuple[Array, Array]:
    """The stream of all samples; the norm of the first ``limit`` in order."""
    del count
    new, own = stream(x, branches, gates), order[:limit]
    return new, modulate(new[own], shift[own], scale[own], eps)
