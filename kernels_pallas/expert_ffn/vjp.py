"""The union kernel under ``grad`` and ``vmap``, whichever implementation computes it.

A loop whose trip count depends on data can be neither reversed nor batched by JAX: reversing raises, and batching runs
every example for the largest count and selects. Both are therefore said here.

``vmap`` of tokens: examples that share the weights become more tokens of one call, with the union of their experts.
``vmap`` of weights: one example after the other, each reading its own active slabs in place.
``grad``: a loop over the active experts that also writes their weights' gradients. Its own derivatives, forwards or
backwards, are those of the dense form, at the dense form's price.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from kernels_pallas.expert_ffn import xla
from kernels_pallas.expert_ffn.problem import Activation, Active, active_experts
from kernels_pallas.expert_ffn.reference import dense_expert_ffn

Kernel = Callable[[Array, Array, Array, Array, Active, Any], Array]
"""``kernel(x, up, down, scores, union, first)``: expert e is slab first + e."""


def _dense(x: Array, up: Array, down: Array, scores: Array, active: Array, activation: Activation) -> Array:
    return dense_expert_ffn(x, up, down, jnp.where(active, scores, 0), activation=activation)


def _own(weights: Array, first: Any, experts: int) -> Array:
    """The slabs of one example out of those of all."""
    return weights if weights.shape[0] == experts else jax.lax.dynamic_slice_in_dim(weights, first, experts)


def _spread(array: Any, size: int, batched: bool) -> Array:
    return array if batched else jnp.broadcast_to(array, (size, *array.shape))


def _one_by_one(run: Callable[..., Any], size: int, batched: Sequence[bool], arguments: Sequence[Any]) -> Any:
    """Examples in a sequential loop. Weights are put on top of each other instead of sliced by the loop."""
    x, up, down, scores, active, first, *rest = arguments
    first = _spread(first, size, batched[5])
    if batched[1] or batched[2]:
        up, down = (_spread(w, size, b) for w, b in zip((up, down), batched[1:3], strict=True))
        first = first + jnp.arange(size, dtype=first.dtype) * up.shape[1]
        up, down = (w.reshape(-1, *w.shape[2:]) for w in (up, down))
    moving = [_spread(a, size, b) for a, b in zip((x, scores, active), (batched[0], *batched[3:5]), strict=True)]
    rest = [_spread(a, size, b) for a, b in zip(rest, batched[6:], strict=True)]

    def one(example: tuple[Array, ...]) -> Any:
        x, scores, active, first, *rest = example
        return run(x, up, down, scores, active, first, *rest)

    return jax.lax.map(one, (*moving, first, *rest))


@functools.cache
def differentiable(kernel: Kernel, activation: Activation, max_active: int) -> Callable[..., Array]:
    """``op(x, up, down, scores, active)`` on top of a kernel; with more than ``max_active`` experts it is dense."""

    @custom_vmap
    def run(x: Array, up: Array, down: Array, scores: Array, active: Array, first: Any) -> Array:
        union, experts = active_experts(active), scores.shape[1]

        def sparse() -> Array:
            return kernel(x, up, down, scores, union, first)

        def dense() -> Array:
            return _dense(x, _own(up, first, experts), _own(down, first, experts), scores, active, activation)

        return sparse() if max_active >= experts else jax.lax.cond(union.number > max_active, dense, sparse)

    @run.def_vmap
    def _run_batched(size: int, batched: Sequence[bool], *arguments: Any) -> tuple[Array, bool]:
        if batched[1] or batched[2] or batched[5]:
            return _one_by_one(run, size, batched, arguments), True
        x, up, down, scores, active, first = arguments
        x, scores, active = (
            _spread(a, size, b) for a, b in zip((x, scores, active), (batched[0], *batched[3:5]), strict=True)
        )
        # An expert that is in the union because of another example must not count for this one.
        scores = jnp.where(active[:, None, :], scores, 0)
        out = run(
            x.reshape(-1, x.shape[-1]), up, down, scores.reshape(-1, scores.shape[-1]), active.any(0), first
        )  # fmt: skip
        return out.reshape(x.shape), True

    @custom_vmap
    def pull(
        x: Array, up: Array, down: Array, scores: Array, active: Array, first: Any, grad: Array
    ) -> tuple[Array, Array, Array, Array]:
        return xla.backward(x, up, down, scores, active_experts(active), first, grad, activation)

    @pull.def_vmap
    def _pull_batched(size: int, batched: Sequence[bool], *arguments: Any) -> tuple[Any, Any]:
        # Each example has gradients of its own for the weights: no product is shared.
        return _one_by_one(pull, size, batched, arguments), (True,) * 4

    # What a first derivative runs skips; what a second one differentiates is the dense form.
    @jax.custom_jvp
    def forward(x: Array, up: Array, down: Array, scores: Array, active: Array) -> Array:
        return run(x, up, down, scores, active, jnp.int32(0))

    @forward.defjvp
    def _forward_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        def dense(x: Array, up: Array, down: Array, scores: Array) -> Array:
            return _dense(x, up, down, scores, primals[4], activation)

        return forward(*primals), jax.jvp(dense, primals[:4], tangents[:4])[1]

    @jax.custom_jvp
    def backward(
        x: Array, up: Array, down: Array, scores: Array, active: Array, grad: Array
    ) -> tuple[Array, Array, Array, Array]:
        return pull(x, up, down, scores, active, jnp.int32(0), grad)

    @backward.defjvp
    def _backward_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        def dense(x: Array, up: Array, down: Array, scores: Array) -> Array:
            return _dense(x, up, down, scores, primals[4], activation)

        def dense_backward(grad: Array, *arrays: Array) -> Any:
            return jax.vjp(dense, *arrays)[1](grad)

        return backward(*primals), jax.jvp(dense_backward, (primals[5], *primals[:4]), (tangents[5], *tangents[:4]))[1]

    @jax.custom_vjp
    def op(x: Array, up: Array, down: Array, scores: Array, active: Array) -> Array:
        return forward(x, up, down, scores, active)

    def op_forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
        return forward(*arguments), arguments

    def op_backward(arguments: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
        return (*backward(*arguments, grad), None)

    op.defvjp(op_forward, op_backward)
    return op
