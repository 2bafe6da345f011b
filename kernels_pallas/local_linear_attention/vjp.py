"""The custom gradients of the op, one for the full call and one for decoding, whichever implementation runs."""

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.local_linear_attention import decode
from kernels_pallas.local_linear_attention.problem import Backward, Cotangents, Forward, Inputs, Options

_MODULES = {"xla": "xla", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}
_DECODERS = {"xla": "decode", "pallas_tpu": "tpu_decode", "pallas_gpu": "gpu_decode"}


def implementation_module(name: str) -> ModuleType:
    """The module of an implementation, imported when it is first wanted."""
    return importlib.import_module(f"kernels_pallas.local_linear_attention.{_MODULES[name]}")


def decoding_module(name: str) -> ModuleType:
    """The module of an implementation of decoding, imported when it is first wanted."""
    return importlib.import_module(f"kernels_pallas.local_linear_attention.{_DECODERS[name]}")


def _static(name: str, interpret: bool) -> dict[str, Any]:
    return {} if name == "xla" else {"interpret": interpret}


# Compiled once per shape and options, also where the caller does not use `jit`.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_forward(name: str, options: Options, interpret: bool, inputs: Inputs) -> Forward:
    return implementation_module(name).forward(inputs, options, **_static(name, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_backward(
    name: str, options: Options, interpret: bool, inputs: Inputs, fwd: Forward, cot: Cotangents
) -> Backward:
    return implementation_module(name).backward(inputs, options, fwd, cot, **_static(name, interpret))


def _no_second_derivative(*_: Any) -> Any:
    # Without this a second derivative through Cholesky would be wrong: `Forward.mean` has no gradient of its own.
    raise NotImplementedError("second derivatives of local_linear_attention are not implemented")


_run_backward.defvjp(_no_second_derivative, _no_second_derivative)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(name: str, options: Options, interpret: bool, inputs: Inputs) -> Forward:
    """The forward pass by implementation ``name``; differentiable in all arrays but offset and mask.

    Forward-mode differentiation is not offered: a loss has one output, and the transposed rule is the one that saves.
    """
    return _run_forward(name, options, interpret, inputs)


def _forward(name: str, options: Options, interpret: bool, inputs: Inputs) -> tuple[Forward, tuple[Inputs, Forward]]:
    fwd = attend(name, options, interpret, inputs)
    return fwd, (inputs, fwd)


def _backward(
    name: str, options: Options, interpret: bool, saved: tuple[Inputs, Forward], grads: Forward
) -> tuple[Inputs]:
    inputs, fwd = saved
    cot = Cotangents(grads.out, grads.x, grads.lse)
    back = _run_backward(name, options, interpret, inputs, fwd, cot)
    seen = jnp.isfinite(fwd.lse)[..., None] | jnp.isnan(fwd.lse)[..., None]
    solved = jnp.where(seen, back.solved, 0)
    q = inputs.q.astype(inputs.ridge.dtype)
    dq = inputs.scale * back.logit + (solved if options.solve else 0)
    dridge = -jnp.sum(fwd.x * solved, -1) if options.solve else jnp.zeros_like(inputs.ridge)
    # `mean` is saved for the backward pass and is no output of the public function: its cotangent is zero.
    return (
        Inputs(
            q=dq.astype(inputs.q.dtype),
            k=back.dk,
            v=back.dv,
            scale=jnp.sum(q * back.logit),
            ridge=dridge,
            offset=None,  # type: ignore[arg-type]
            mask=None,
            probe=None if inputs.probe is None else solved,
        ),
    )


attend.defvjp(_forward, _backward)


class Step(NamedTuple):
    """The arrays of a decoding step; *acc* is float32, or float64 for float64 inputs."""

    q: Array  # [B, N, H]
    k: Array  # [B, S, K, H]
    v: Array  # [B, S, K, Hv]
    length: Array  # [B] int32
    scale: Array  # [] acc
    ridge: Array | None = None  # [B, N] acc; None where only moments are wanted


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def decode_step(name: str, options: Options, interpret: bool, step: Step) -> Array | decode.DecodeState:
    """Output [B, N, Hv] of a decoding step by implementation ``name``, or its moments where ``ridge`` is None."""
    if name == "xla":
        return _decode_step(name, options, interpret, step)
    return _decode_by_kernel(name, options, interpret, step)


def _decode_step(name: str, options: Options, interpret: bool, step: Step) -> Array | decode.DecodeState:
    module, static = decoding_module(name), _static(name, interpret)
    if step.ridge is None:
        return module.partial_state(*step[:-1], **static)
    return module.decode(*step, options, **static)[0].astype(step.scale.dtype)


# Training through decoding is rare: the kernels borrow the gradient of XLA's version.
_decode_by_kernel = jax.custom_vjp(_decode_step, nondiff_argnums=(0, 1, 2))


def _decode_forward(name: str, options: Options, interpret: bool, step: Step) -> tuple[Any, Step]:
    return _decode_step(name, options, interpret, step), step


def _decode_backward(name: str, options: Options, interpret: bool, step: Step, grads: Any) -> tuple[Step]:
    _, pull = jax.vjp(lambda step: _decode_step("xla", options, False, step), step)
    return pull(grads)


_decode_by_kernel.defvjp(_decode_forward, _decode_backward)
