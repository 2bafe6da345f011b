"""The kernels of local linear attention as cases for `kernels_pallas.prove`, with softmax attention as the peer.

How many iterations the solver takes depends on the data: every shape says how many are assumed (``iterations``). FLOPs
are those of the passes that the matrix unit makes: a product whose operands are split into pieces counts several times,
and heads that are padded to whole lanes count as such. Bytes are those of the kernels: on TPUs XLA arranges queries,
keys and values for them before, which is not counted.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.local_linear_attention import decode, gpu, gpu_decode, gpu_plan, tpu, tpu_decode, xla
from kernels_pallas.local_linear_attention.problem import Cotangents, Forward, Inputs, Options
from kernels_pallas.local_linear_attention.tpu_pieces import (
    Precision,
    chunk_counts,
    is_doubled,
    lanes,
    precision_of,
)
from kernels_pallas.local_linear_attention.tpu_plan import Plan, plan_of
from kernels_pallas.local_linear_attention.tpu_rows import Layout
from kernels_pallas.prove.cases import Case, Program, Shape, normals

OP = "local_linear_attention"
F32 = jnp.float32
CAUSAL = Options(static_offset=0)
STEP = Options(is_causal=False)


def _inputs(shape: Shape) -> Inputs:
    batch, queries, keys, heads, key_heads, size = (shape[axis] for axis in "BTSNKH")
    make, dtype = jax.ShapeDtypeStruct, jnp.dtype(shape["dtype"])
    q, k = make((batch, queries, heads, size), dtype), make((batch, keys, key_heads, size), dtype)
    numbers = make((), F32), make((batch, queries, heads), F32), make((), jnp.int32)  # scale, ridge, offset
    return Inputs(*cast(Any, (q, k, k, *numbers)))


def _saved(inputs: Inputs) -> tuple[Forward, Cotangents]:
    rows = inputs.q.shape[:3]
    out = jax.ShapeDtypeStruct((*rows, inputs.v.shape[-1]), inputs.q.dtype)
    x, number = jax.ShapeDtypeStruct(inputs.q.shape, F32), jax.ShapeDtypeStruct(rows, F32)
    count = jax.ShapeDtypeStruct(rows, jnp.int32)
    return Forward(*cast(Any, (out, x, x, number, count))), Cotangents(*cast(Any, (out, x, number)))


def _draw_inputs(key: jax.Array, inputs: Inputs) -> Inputs:
    q, k, v = normals(key, (inputs.q, inputs.k, inputs.v))
    scale = jnp.asarray(inputs.q.shape[-1] ** -0.5, F32)
    return Inputs(q, k, v, scale, jnp.ones(inputs.ridge.shape), jnp.int32(0))


def _forward_equation(*arrays: Any) -> tuple[Any, ...]:
    """Without the iterations, of which the kernels' tiles have counts of their own."""
    return tuple(xla.forward(Inputs(*arrays), CAUSAL)[:4])


def _backward_runs(inputs: Inputs) -> dict[str, Any]:
    """How the backward pass is drawn and what it should give."""
    structure = jax.tree.structure((inputs, *_saved(inputs)))

    def draw(key: jax.Array) -> tuple[Any, ...]:
        drawn = _draw_inputs(key, inputs)
        _, cot = _saved(inputs)
        saved = jax.jit(lambda x: xla.forward(x, CAUSAL))(drawn)
        return tuple(jax.tree.leaves((drawn, saved, Cotangents(*normals(jax.random.fold_in(key, 1), cot)))))

    def equation(*arrays: Any) -> tuple[Any, ...]:
        given, saved, cot = jax.tree.unflatten(structure, arrays)
        return tuple(xla.backward(given, CAUSAL, saved, cot))

    return {"draw": draw, "equation": equation}


def _decode_runs(arguments: tuple[Any, ...], keys_last: bool = False) -> dict[str, Any]:
    """How a step is drawn and what it should give; without a ridge, the moments."""
    q, k, v, length, _, *ridge = arguments
    slots = k.shape[-1 if keys_last else 1]

    def draw(key: jax.Array) -> tuple[Any, ...]:
        full = jnp.full(length.shape, slots, jnp.int32)
        return *normals(key, (q, k, v)), full, F32(q.shape[-1] ** -0.5), *(jnp.ones(r.shape) for r in ridge)

    def equation(q: jax.Array, k: jax.Array, v: jax.Array, length: Any, scale: Any, *ridge: Any) -> Any:
        if keys_last:
            k, v = (jnp.moveaxis(x, -1, 1) for x in (k, v))
        if ridge:
            return decode.decode(q, k, v, length, scale, ridge[0], STEP)[0]
        return tuple(decode.partial_state(q, k, v, length, scale))

    return {"draw": draw, "equation": equation}


def _flat(function: Callable[..., Any], *trees: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of trees as one of arrays and to arrays, as programs travel to the compilers."""
    leaves, structure = jax.tree.flatten(trees)
    return lambda *arrays: tuple(jax.tree.leaves(function(*jax.tree.unflatten(structure, arrays)))), tuple(leaves)


def _bytes(*trees: Any) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees)))


def _item(inputs: Inputs) -> int:
    return jnp.dtype(inputs.q.dtype).itemsize


def _pairs(a: int, b: int, order: int) -> int:
    """Products of pieces i of ``a`` and j of ``b`` with i + j < order."""
    return sum(min(b, max(order - i, 0)) for i in range(a))


class _Work:
    """What the kernels do in a causal call: what a row and a key cost that meet, and how many of them do.

    Costs are in lanes of width H or Hv that the matrix unit contracts, or sums into: products of keys with given rows
    (``logits``) and with made ones (``project``), of values with cotangents (``pull``), and sums with made weights of
    keys (``gather``), of values or cotangents (``output``) and of made rows (``outer``).
    """

    def __init__(self, layout: Layout, precision: Precision, widths: tuple[int, int], is_doubled: bool):
        given, made = precision.given, precision.order
        size, value_size = widths
        self.logits = size * sum(chunk_counts(precision, given, is_doubled))
        self.project = size * sum(chunk_counts(precision, None, is_doubled))
        self.pull = value_size * _pairs(given, given, made)
        self.gather, self.output = size * _pairs(made, given, made), value_size * _pairs(made, given, made)
        self.outer = size * _pairs(made, made, made)
        row = np.arange(layout.rows)
        seen = np.where(row < layout.positions * layout.group, row // layout.group + 1, 0)
        seen = np.minimum(seen, layout.keys).reshape(layout.tiles, layout.tile)
        self.some = -(-seen.max(axis=1) // layout.block)  # blocks that some rows of each tile see
        self.full = float((seen.min(axis=1) // layout.block).mean())
        self.rows = float(layout.batch * layout.heads * layout.rows)
        self.keys = float(layout.batch * layout.heads * layout.padded_keys)
        self.pairs = self.rows * float(self.some.mean()) * layout.block

    def forward(self, iterations: int, is_cached: bool) -> float:
        """FLOPs of a forward pass; weights that are not kept are made again in each pass."""
        again = 0 if is_cached else self.logits
        solve = iterations * (self.project + self.gather + again)
        return 2 * self.pairs * (self.logits + self.gather + solve + self.project + self.output + again)

    def backward(self, iterations: int, is_cached: bool) -> float:
        """FLOPs of a backward pass, both kernels."""
        again = 0 if is_cached else self.logits
        sums = self.logits + self.pull + self.gather
        solve = iterations * (self.project + self.gather + again)
        scatter = self.pull + 2 * self.project + self.gather + again
        of_keys = self.logits + 2 * self.project + self.pull + self.output + 2 * self.outer + self.gather
        return 2 * self.pairs * (sums + solve + scatter + of_keys)


def _tpu_rows(shape: Shape, is_backward: bool) -> tuple[Inputs, Plan, _Work, int, float]:
    """Also the grid steps that read values, and the values that a tile fetches."""
    inputs = _inputs(shape)
    plan = plan_of(inputs, is_backward=is_backward)
    layout, precision = plan.layout, precision_of(inputs.q.dtype)
    work = _Work(layout, precision, (lanes(layout.head), plan.value_lanes), is_doubled(layout.head))
    fetched = float((-(-work.some // plan.values)).mean()) * plan.values * layout.block
    return inputs, plan, work, layout.blocks // plan.values, fetched


def _note(iterations: int, is_cached: bool) -> str:
    return f"{iterations} iterations assumed" + ("" if is_cached else ", weights made again in each")


def _tpu_forward(shape: Shape) -> Program:
    n = shape["iterations"]
    inputs, plan, work, steps, fetched = _tpu_rows(shape, False)
    function, arguments = _flat(lambda inputs: tpu.forward(inputs, CAUSAL), inputs)
    L, Lv, given, item = lanes(plan.layout.head), plan.value_lanes, precision_of(inputs.q.dtype).given, _item(inputs)
    some, first = float(work.some.mean()), 1 / steps  # the first of a tile's grid steps solves
    per_row = item * (L + Lv) + 8 * L + 8 * 8 + 2 * given * Lv * fetched / plan.layout.tile
    return Program(
        function,
        arguments,
        flops=work.forward(n, plan.is_cached),
        bytes=work.rows * per_row + 2 * given * work.keys * L,
        trips={
            "lla_forward": (
                None,  # the grid
                work.full * first,  # logits, blocks that all rows see
                (some - work.full) * first,  # logits, blocks on the diagonal
                some * first,  # weights and mean keys
                n * first,  # iterations
                some,  # their products
                some * first,  # output
            )
        },
        note=_note(n, plan.is_cached),
        draw=lambda key: tuple(_draw_inputs(key, inputs)[:6]),
        equation=_forward_equation,
    )


def _tpu_backward(shape: Shape) -> Program:
    n = shape["iterations"]
    inputs, plan, work, steps, fetched = _tpu_rows(shape, True)
    layout = plan.layout
    function, arguments = _flat(lambda i, fwd, cot: tpu.backward(i, CAUSAL, fwd, cot), inputs, *_saved(inputs))
    L, Lv, given, item = lanes(layout.head), plan.value_lanes, precision_of(inputs.q.dtype).given, _item(inputs)
    some, once = float(work.some.mean()), 1 / (2 * steps)  # values pass by twice
    row = item * (L + Lv) + 8 * L + 8 * 4
    rows = work.rows * (row + 12 * L + 8 * 4 + 4 * given * Lv * fetched / layout.tile)
    visits = float(layout.batch * layout.heads * work.some.sum())  # tiles of rows and blocks of keys that meet
    of_keys = visits * layout.tile * row + work.keys * (L + Lv) * (2 * given + item)
    return Program(
        function,
        arguments,
        flops=work.backward(n, plan.is_cached),
        bytes=rows + 2 * given * work.keys * L + of_keys,
        trips={
            "lla_backward_rows": (
                None,  # the grid
                work.full * once,  # g and t, blocks that all rows see
                (some - work.full) * once,  # g and t, blocks on the diagonal
                n * once,  # iterations
                some,  # their products
                some * once,  # D and e
            ),
            "lla_backward_keys": (visits,),  # the grid's other steps do nothing
        },
        note=_note(n, plan.is_cached),
        **_backward_runs(inputs),
    )


def _gpu_rows(shape: Shape, kernel: str) -> tuple[Inputs, _Work]:
    inputs = _inputs(shape)
    plan = gpu_plan.plan_of(inputs, CAUSAL, kernel)
    return inputs, _Work(plan.layout, plan.precision, (plan.head, plan.value_head), False)


def _gpu_forward(shape: Shape) -> Program:
    inputs, work = _gpu_rows(shape, "forward")
    function, arguments = _flat(lambda inputs: gpu.forward(inputs, CAUSAL), inputs)
    saved, _ = _saved(inputs)
    note = _note(shape["iterations"], False) + "; every array moves once, the cache holds what is read again"
    return Program(
        function,
        arguments,
        flops=work.forward(shape["iterations"], False),
        bytes=_bytes(inputs, saved),
        note=note,
        draw=lambda key: tuple(_draw_inputs(key, inputs)[:6]),
        equation=_forward_equation,
    )


def _gpu_backward(shape: Shape) -> Program:
    inputs, work = _gpu_rows(shape, "rows")
    function, arguments = _flat(lambda i, fwd, cot: gpu.backward(i, CAUSAL, fwd, cot), inputs, *_saved(inputs))
    note = _note(shape["iterations"], False) + "; every array moves once, the cache holds what is read again"
    # Both kernels read the inputs; what the first one leaves for the second are two vectors per row.
    return Program(
        function,
        arguments,
        flops=work.backward(shape["iterations"], False),
        bytes=2 * _bytes(inputs, *_saved(inputs)) + 16.0 * inputs.q.size,
        note=note,
        **_backward_runs(inputs),
    )


def _step(shape: Shape, keys_last: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v, length, scale, ridge of a decoding step."""
    batch, slots, heads, key_heads, size = (shape[axis] for axis in "BSNKH")
    make, dtype = jax.ShapeDtypeStruct, jnp.dtype(shape["dtype"])
    cache = make((batch, key_heads, size, slots) if keys_last else (batch, slots, key_heads, size), dtype)
    q, ridge = make((batch, heads, size), dtype), make((batch, heads), F32)
    return q, cache, cache, make((batch,), jnp.int32), make((), F32), ridge


def _tpu_cache(shape: Shape) -> tuple[int, float, tuple[float | None, ...]]:
    """Of a pass over the cache: its grid steps per key head, its FLOPs, and the trips of its loops."""
    batch, slots, heads, key_heads, size = (shape[axis] for axis in "BSNKH")
    precision, group = precision_of(jnp.dtype(shape["dtype"])), heads // key_heads
    block, part, edge = tpu_decode.sizes_of(slots, group * size * precision.given)
    steps = -(-slots // block)
    products = _pairs(precision.order, precision.given, precision.order)
    flops = 2.0 * batch * key_heads * slots * (-(-group // 8) * 8 + group * size) * 2 * size * products
    parts = (slots // part / steps, -(-(slots % part) // edge) / steps)  # whole ones, and pieces of what is left
    return steps, flops, (None, *parts, *parts)  # the grid, the logits, the moments


def _tpu_decode(shape: Shape) -> Program:
    batch, heads, key_heads, size, n = (shape[name] for name in ("B", "N", "K", "H", "iterations"))
    steps, flops, trips = _tpu_cache(shape)
    arguments = _step(shape, keys_last=True)
    solves = -(-heads // tpu_decode.SYSTEMS) / (key_heads * steps)  # in the last step of a sequence
    return Program(
        functools.partial(tpu_decode.decode_lanes, options=STEP),
        arguments,
        flops=flops,
        bytes=_bytes(*arguments[1:3]) + batch * heads * 16.0 * size,
        trips={"lla_decode": (*trips, solves, n)},
        note=f"all slots in use, {n} iterations assumed",
        **_decode_runs(arguments, keys_last=True),
    )


def _tpu_moments(shape: Shape) -> Program:
    _, flops, trips = _tpu_cache(shape)
    q, k, v, length, scale, _ = _step(shape, keys_last=False)
    size = shape["H"]
    return Program(
        lambda *arrays: tuple(tpu_decode.partial_state(*arrays)),
        (q, k, v, length, scale),
        flops=flops,
        bytes=_bytes(k, v) + 4.0 * shape["B"] * shape["N"] * (2 * size * size + 8 * (2 * size + 128)),
        trips={"lla_moments": trips},
        note="all slots in use",
        **_decode_runs((q, k, v, length, scale)),
    )


def _gpu_decode(shape: Shape) -> Program:
    batch, slots, heads, _, size = (shape[axis] for axis in "BSNKH")
    arguments = _step(shape, keys_last=False)
    q, k, v = arguments[:3]
    if (reason := gpu_decode.refusal(q, k, v, STEP)) is not None:
        raise ValueError(reason)
    plan = gpu_decode.plan_of(q, k, v)
    parts = plan.parts
    products = _pairs(plan.precision.order, plan.precision.given, plan.order)
    moments = 4.0 * batch * heads * parts * (2 * size * size + 2 * size + 2)
    return Program(
        lambda q, k, v, length, scale, ridge: gpu_decode.decode(q, k, v, length, scale, ridge, STEP)[0],
        arguments,
        flops=2.0 * batch * heads * slots * (size + gpu_decode.MIN_SIZE / products) * 2 * size * products,
        bytes=_bytes(k, v) + 2 * moments + batch * heads * 12.0 * size,
        note=f"all slots in use; {parts} programs share the keys of a head; the second kernel merges and solves",
        **_decode_runs(arguments),
    )


def _peer(name: str) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        from kernels_pallas.prove import peers  # peers import every kernel of JAX: only where one is asked for

        return getattr(peers, name)(shape)

    return build


def _size(T: int, H: int, iterations: int = 8, **changes: Any) -> Shape:
    return {"B": 1, "T": T, "S": T, "N": 8, "K": 8, "H": H, "dtype": "bfloat16", "iterations": iterations, **changes}


def _cache(S: int, H: int, **changes: Any) -> Shape:
    return {"B": 8, "T": 1, "S": S, "N": 32, "K": 8, "H": H, "dtype": "bfloat16", "iterations": 8, **changes}


TPUS = ("v5e", "v6e", "v5p")

CASES = (
    Case(
        OP,
        "forward",
        "tpu",
        _tpu_forward,
        (_size(8192, 128),),
        ("v5e", "v6e"),
        {"flash_attention": _peer("flash_attention"), "splash_attention": _peer("splash_attention")},
    ),
    # Several query heads per key head in a long call; and one whose weights do not fit into VMEM.
    Case(OP, "forward (groups)", "tpu", _tpu_forward, (_size(32768, 64, K=2),), ("v5e",)),
    Case(OP, "forward (float32)", "tpu", _tpu_forward, (_size(49152, 64, dtype="float32"),), ("v5p",)),
    Case(
        OP,
        "backward",
        "tpu",
        _tpu_backward,
        (_size(8192, 128),),
        ("v5e",),
        {"flash_attention_backward": _peer("flash_attention_backward")},
    ),
    Case(
        OP,
        "decode",
        "tpu",
        _tpu_decode,
        (_cache(8192, 128), _cache(32768, 64)),
        TPUS,
        {"paged_attention": _peer("paged_decode")},
    ),
    Case(OP, "moments", "tpu", _tpu_moments, (_cache(8192, 128),), ("v5e",)),
    Case(
        OP,
        "forward",
        "gpu",
        _gpu_forward,
        (_size(8192, 128),),
        ("h100", "a100"),
        {"attention": _peer("gpu_flash_attention")},
    ),
    Case(
        OP,
        "backward",
        "gpu",
        _gpu_backward,
        (_size(8192, 128),),
        ("h100", "a100"),
        {"attention_backward": _peer("gpu_flash_attention_backward")},
    ),
    Case(
        OP,
        "decode",
        "gpu",
        _gpu_decode,
        (_cache(8192, 128), _cache(32768, 64)),
        ("h100", "a100"),
        {"gqa": _peer("gpu_dense_decode")},
    ),
)
