"""One compiled interpreter for all programs.

Compiling a program takes longer than training a small model with it, so a search must not compile. A program becomes an
integer table; a loop over its rows looks each function up with `jax.lax.switch` and writes the result to the next
register. Parameters are one flat vector, scalars and numbers per leaf are vectors of equal entries, and the leaves'
boundaries are fixed when the interpreter is made. The same compiled code then runs every program.

Programs are not to be vectorised over with `jax.vmap`: the switch would then compute all 45 functions and select.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxaccel.optim.symbolic import abstract
from jaxaccel.optim.symbolic.functions import CONSTANTS, ELEMENTWISE, FUNCTIONS, REDUCTIONS, clip_factor
from jaxaccel.optim.symbolic.program import INPUTS, Program, ProgramError

_OPCODES = tuple(name for name in FUNCTIONS if name != "invert")
_PARAMETER_TREE = abstract.spec_of(abstract.EXAMPLE_TREE)


class EncodedProgram(NamedTuple):
    """A program as arrays: data for a compiled interpreter.

    Attributes:
        code: rows (opcode, a, b, c, kinds). a, b, c: the registers of the arguments, −1 for the number in
            ``literals``. Statement i writes register 5 + i; registers 0 to 4 are the inputs. kinds: of the first two
            arguments, kind(a) + 3·kind(b), with 0 scalar, 1 a number per leaf, 2 parameter tree.
        literals: the numbers among the arguments, by statement and position.
        length: rows in use.
        outputs: registers of update, m, v.
    """

    code: Int[np.ndarray | Array, "S 5"]  # int32
    literals: Float[np.ndarray | Array, "S 3"]  # float64 on the host, the parameters' dtype in the interpreter
    length: Int[np.ndarray | Array, ""]  # int32
    outputs: Int[np.ndarray | Array, "3"]  # int32


def _kind(spec: abstract.Spec) -> int:
    if spec == _PARAMETER_TREE:
        return 2
    return 0 if spec == abstract.SCALAR else 1


def encode(program: Program, max_statements: int = 60) -> EncodedProgram:
    """Encode a program for `interpret`.

    Source: this library; the paper (arXiv 2302.06675) compiles each program. Dead statements are left out, those that
    only feed a state without influence included.

    Args:
        program: a valid program.
        max_statements: rows S of the table, the same for all programs that are to share compiled code.

    Returns:
        The encoded program.

    Raises:
        ValueError: if the program is not valid or has more than ``max_statements`` live statements.

    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> encoded = encode(LION_PROGRAM, max_statements=8)
    >>> encoded.code.shape, int(encoded.length), encoded.outputs.tolist()
    ((8, 5), 6, [10, 7, 3])
    """
    program = abstract.simplify(program, cross_iteration=True)
    specs = abstract.infer(program)
    if len(program) > max_statements:
        raise ProgramError(f"the program has {len(program)} live statements, expected at most {max_statements=}")
    code = np.zeros((max_statements, 5), np.int32)
    literals = np.zeros((max_statements, 3))
    kinds = {name: _kind(spec) for name, spec in abstract.input_specs().items()}
    registers = {name: index for index, name in enumerate(INPUTS)}
    for i, (statement, spec) in enumerate(zip(program.statements, specs, strict=True)):
        code[i, 0] = _OPCODES.index(statement.op)
        for j, arg in enumerate(statement.args):
            if isinstance(arg, str):
                code[i, j + 1] = registers[arg]
                code[i, 4] += kinds[arg] * (1, 3, 0)[j]
            else:
                code[i, j + 1] = -1
                literals[i, j] = arg
        registers[statement.target], kinds[statement.target] = len(INPUTS) + i, _kind(spec)
    outputs = np.array([registers[name] for name in program.outputs], np.int32)
    return EncodedProgram(code, literals, np.int32(len(program)), outputs)  # type: ignore[arg-type]


def leaf_sizes(tree: Any) -> tuple[int, ...]:
    """Number of elements of each leaf, in the order of ``jax.flatten_util.ravel_pytree``.

    >>> leaf_sizes({"b": jnp.zeros(3), "a": jnp.zeros((2, 2))})
    (4, 3)
    """
    return tuple(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def _branches(sizes: tuple[int, ...], dtype: Any) -> list[Callable[..., Array]]:
    """One function (x, y, z, kinds) → vector per opcode."""
    total = sum(sizes)
    starts = np.cumsum([0, *sizes])
    # Which entries count in a sum: one of all for a scalar, one per leaf, or every one.
    counted = np.zeros((3, total), bool)
    counted[0, :1] = True
    counted[1, [start for start, size in zip(starts, sizes, strict=False) if size]] = True
    counted[2] = True
    masks = jnp.asarray(counted)

    def dot(x: Array, y: Array, kind: Array) -> Array:
        return jnp.sum(jnp.where(masks[kind], x * y, 0))

    def norm_of(x: Array, kind: Array) -> Array:
        return jnp.sqrt(dot(x, x, kind))

    def norm(x: Array, kind: Array) -> Array:
        def leaf(start: int, size: int) -> Array:
            part = jax.lax.dynamic_slice_in_dim(x, start, size)
            return jnp.full((size,), jnp.sqrt(jnp.sum(part * part)))

        whole = jnp.concatenate([leaf(int(s), n) for s, n in zip(starts, sizes, strict=False)])
        return jnp.where(kind == 2, whole, jnp.sqrt(jnp.square(x)))

    reductions: dict[str, Callable[..., Any]] = {
        "norm": lambda x, y, z, a, b: norm(x, a),
        "global_norm": lambda x, y, z, a, b: norm_of(x, a),
        "dot": lambda x, y, z, a, b: dot(x, y, jnp.maximum(a, b)),
        "cosine_sim": lambda x, y, z, a, b: dot(x, y, jnp.maximum(a, b)) / (norm_of(x, a) * norm_of(y, b)),
        "clip_by_global_norm": lambda x, y, z, a, b: x * clip_factor(norm_of(x, a), y),
    }

    def branch(name: str) -> Callable[..., Array]:
        def run(x: Array, y: Array, z: Array, kinds: Array) -> Array:
            if name in CONSTANTS:
                value: Any = CONSTANTS[name]
            elif name in REDUCTIONS:
                value = reductions[name](x, y, z, kinds % 3, kinds // 3)
            else:
                arity, call = ELEMENTWISE[name]
                value = call(*(x, y, z)[:arity])
            return jnp.broadcast_to(jnp.asarray(value, dtype), (total,))

        return run

    return [branch(name) for name in _OPCODES]


def interpret(
    encoded: EncodedProgram,
    w: Float[Array, "n"],
    g: Float[Array, "n"],
    m: Float[Array, "n"],
    v: Float[Array, "n"],
    lr: Any,
    sizes: Sequence[int],
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Run one iteration of an encoded program; equal to `execute` on the flattened tree.

    Source: this library. When: inside ``jit`` with the program as an argument, to try many programs on one small
    model. When not: for one program on a large model: each statement reads and writes memory here, where `as_transform`
    fuses them all.

    States that no update depends on are returned as they came. A sum over many elements is added in another order than
    in `execute`, and numbers in the program are rounded to the parameters' dtype first; both show in the last digits.

    Args:
        encoded: made by `encode`; may be traced.
        w: parameters, flat.
        g: gradient, flat.
        m: first state, flat.
        v: second state, flat.
        lr: a scalar.
        sizes: number of elements of each leaf; they add up to n. Fixed at compile time.

    Returns:
        The update, to be subtracted from ``w``, and the new m and v, flat.

    Raises:
        ValueError: if ``sizes`` do not add up to n.

    >>> import jax, jax.numpy as jnp
    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> step = jax.jit(interpret, static_argnames="sizes")
    >>> w, g, zero = jnp.ones(3), jnp.array([3.0, -3.0, 0.0]), jnp.zeros(3)
    >>> update, m, v = step(encode(LION_PROGRAM), w, g, zero, zero, 0.5, sizes=(1, 2))
    >>> [round(float(x), 4) for x in update]
    [0.55, -0.45, 0.05]
    """
    sizes = tuple(sizes)
    if sum(sizes) != w.size:
        raise ValueError(f"sizes must add up to the {w.size} parameters, got sizes={sizes}")
    rows = encoded.code.shape[0]
    code, literals = jnp.asarray(encoded.code), jnp.asarray(encoded.literals, w.dtype)
    inputs = jnp.stack([w, g, m, v, jnp.full_like(w, lr)])
    registers = jnp.concatenate([inputs, jnp.zeros((rows, w.size), w.dtype)])
    branches = _branches(sizes, w.dtype)

    def statement(i: Array, registers: Array) -> Array:
        def argument(j: int) -> Array:
            index = code[i, j + 1]
            return jnp.where(index < 0, literals[i, j], registers[jnp.maximum(index, 0)])

        value = jax.lax.switch(code[i, 0], branches, argument(0), argument(1), argument(2), code[i, 4])
        return jax.lax.dynamic_update_index_in_dim(registers, value, len(INPUTS) + i, 0)

    registers = jax.lax.fori_loop(0, encoded.length, statement, registers)
    update, new_m, new_v = (registers[encoded.outputs[k]] for k in range(3))
    return update, new_m, new_v
