"""The kernels as cases for `kernels_pallas.prove`."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.modulated_residual import differentiable, gpu, tpu, xla
from kernels_pallas.modulated_residual.reference import modulate, reference
from kernels_pallas.prove.cases import Case, Program, Shape, normals

EPS = 1e-6


def _arrays(shape: Shape) -> tuple[Any, ...]:
    samples, length, width, count = (shape[axis] for axis in "BNDK")
    dtype = jnp.dtype(shape["dtype"])
    rows = jax.ShapeDtypeStruct((samples, length, width), dtype)
    mods = jax.ShapeDtypeStruct((samples, width), dtype)
    return rows, *[rows] * count, *[mods] * (count + 2)


def _bytes(shape: Shape, passes: float) -> float:
    """Of ``passes`` over the activations, and one over the modulations in float32."""
    samples, length, width, count = (shape[axis] for axis in "BNDK")
    return samples * width * (passes * length * jnp.dtype(shape["dtype"]).itemsize + 4.0 * (count + 2))


def _unpack(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``function(x, branches, gates, shift, scale)`` of flat arguments."""

    def flat(x: Any, *rest: Any) -> Any:
        return function(x, rest[:count], rest[count : 2 * count], *rest[2 * count : 2 * count + 2])

    return flat


def _xla(x: Any, branches: Any, gates: Any, shift: Any, scale: Any) -> Any:
    return reference(x, branches, gates, shift, scale, EPS)


def _xla_gradient(x: Any, branches: Any, gates: Any, shift: Any, scale: Any, into_new: Any, into_h: Any) -> Any:
    _, back = jax.vjp(_xla, x, branches, gates, shift, scale)
    return back((into_new, into_h))


def _gradient(new: Any, branches: Any, gates: Any, shift: Any, scale: Any, into_new: Any, into_h: Any) -> Any:
    """What the backward kernels give, in float32: gradients of x and the branches, and of gates, shift and scale."""
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (new, branches, gates, shift, scale, into_new, into_h))
    new, branches, gates, shift, scale, into_new, into_h = wide
    _, back = jax.vjp(lambda new, shift, scale: modulate(new, shift, scale, EPS), new, shift, scale)
    through_norm, *into_mods = back(into_h)
    into_x = into_new + through_norm
    into_gates = [(into_x * branch).sum(1) for branch in branches]
    return into_x, [gate[:, None] * into_x for gate in gates], jnp.stack([*into_gates, *into_mods], 1)


def _forward(run: Callable[..., Any], passes: Callable[[int], float], note: str) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        count = shape["K"]
        return Program(
            _unpack(run, count), _arrays(shape), flops=0, bytes=_bytes(shape, passes(count)), note=note,
            equation=None if run is _xla else _unpack(_xla, count),
        )  # fmt: skip

    return build


def _backward(run: Callable[..., Any], passes: Callable[[int], float], note: str) -> Callable[[Shape], Program]:
    """The gradient alone: x′ is given, but to XLA, which makes it again."""

    def build(shape: Shape) -> Program:
        count, arrays = shape["K"], _arrays(shape)

        def flat(run: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *rest: run(x, rest[:count], rest[count : 2 * count], *rest[2 * count :])

        return Program(
            flat(run), (*arrays, arrays[0], arrays[0]), flops=0, bytes=_bytes(shape, passes(count)), note=note,
            equation=None if run is _xla_gradient else flat(_gradient),
        )  # fmt: skip

    return build


def _rows(module: ModuleType) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        count, samples = shape["K"], shape["B"]
        limit = samples // 2

        arrays = _arrays(shape)

        def flat(module: ModuleType) -> Callable[..., Any]:
            def function(order: Any, number: Any, x: Any, *rest: Any) -> Any:
                branches, gates = rest[:count], rest[count : 2 * count]
                return module.forward_rows(x, branches, gates, *rest[2 * count :], EPS, order, number, limit)

            return function

        def draw(key: jax.Array) -> tuple[Any, ...]:
            return jax.random.permutation(key, samples).astype(jnp.int32), jnp.int32(limit), *normals(key, arrays)

        scalars = jax.ShapeDtypeStruct((samples,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        return Program(
            flat(module),
            (*scalars, *arrays),
            flops=0,
            bytes=_bytes(shape, 2.5 + count),
            note="half of the samples compute the next branch",
            draw=draw,
            equation=None if module is xla else flat(xla),
        )

    return build


_DIT = {"B": 64, "N": 256, "D": 1152, "K": 2, "dtype": "bfloat16"}
_SIZES = (
    _DIT,  # DiT-XL/2 at 256 pixels
    {**_DIT, "K": 0},
    {**_DIT, "K": 8},
    {**_DIT, "B": 8, "N": 1024},  # at 512 pixels
    {**_DIT, "D": 384},  # DiT-S/2
    {**_DIT, "B": 8, "D": 4096, "K": 1},
    {**_DIT, "B": 2, "N": 17, "D": 768},  # an action head
    {**_DIT, "B": 8, "dtype": "float32"},
)
_LEAN = (_DIT, {**_DIT, "K": 4}, _SIZES[4], _SIZES[6])


def _cases(family: str, module: ModuleType, targets: tuple[str, ...]) -> tuple[Case, ...]:
    once = "x and branches read once, x' and h written once"
    fused = "XLA's own fusions; as many bytes as one pass, where it manages that"
    peers = {"xla": _forward(_xla, lambda count: 3.0 + count, fused)}
    back = {"xla": _backward(_xla_gradient, lambda count: 4.0 + 2 * count, fused)}

    def pull(*arguments: Any) -> Any:
        return module.backward(*arguments, EPS)

    return (
        Case(
            "modulated_residual",
            "forward",
            family,
            _forward(differentiable(module, EPS, False), lambda count: 3.0 + count, once),
            _SIZES,
            targets,
            peers,
        ),
        Case(
            "modulated_residual",
            "backward",
            family,
            _backward(pull, lambda count: 4.0 + 2 * count, "x', both gradients and branches read once"),
            _LEAN,
            targets,
            back,
        ),
        Case("modulated_residual", "rows", family, _rows(module), (_DIT,), targets, {"xla": _rows(xla)}),
    )


CASES = (*_cases("tpu", tpu, ("v5e", "v6e")), *_cases("gpu", gpu, ("h100",)))
