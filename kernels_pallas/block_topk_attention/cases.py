"""The decoding kernels as cases for `kernels_pallas.prove`, with dense decoding as the peer."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.block_topk_attention import gpu, tpu, xla
from kernels_pallas.block_topk_attention.plan import Layout, Plan
from kernels_pallas.prove.cases import Case, Program, Shape, normals


def _decode(module: ModuleType, layout: Layout) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        batch, size, num_heads, heads, width = (shape[axis] for axis in "BSNKH")
        plan = Plan.make(size, shape["block"], shape["blocks"], 4, 0, None)
        dtype = jnp.dtype(shape["dtype"])
        outer = (batch, size, heads) if layout == "BSKH" else (batch, heads, size)
        rows = (2 * width,) if layout == "BKSHV" else (width, width)
        caches = [jax.ShapeDtypeStruct((*outer, row), dtype) for row in rows]
        arguments = (
            jax.ShapeDtypeStruct((batch, 1, num_heads, width), dtype),
            jax.ShapeDtypeStruct((batch, heads, plan.num_blocks), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            *caches,
        )
        value = None if layout == "BKSHV" else caches[1]
        if (reason := module.refusal(arguments[0], caches[0], value, plan, layout)) is not None:
            raise ValueError(reason)

        def function(
            q: jax.Array, blocks: jax.Array, length: jax.Array, k: jax.Array, v: jax.Array | None = None
        ) -> jax.Array:
            return module.attend(q, k, v, blocks, length, plan, jnp.float32(width**-0.5), layout)

        def equation(
            q: jax.Array, blocks: jax.Array, length: jax.Array, k: jax.Array, v: jax.Array | None = None
        ) -> jax.Array:
            return xla.attend(q, k, v, blocks, length, plan, jnp.float32(width**-0.5), layout)[0]

        def draw(key: jax.Array) -> tuple[jax.Array, ...]:
            def choose(key: jax.Array) -> jax.Array:
                found = jax.random.choice(key, plan.total - plan.first, (plan.num_blocks,), replace=False)
                return jnp.sort(found + plan.first).astype(jnp.int32)

            query, *rest = normals(key, (arguments[0], *caches))
            keys = jax.random.split(jax.random.fold_in(key, 1), batch * heads)
            blocks = jax.lax.map(choose, keys).reshape(batch, heads, -1)
            return query, blocks, jnp.full((batch,), size, jnp.int32), *rest

        item = dtype.itemsize
        # Grid, copies that are started (no loop where they are few), pages without a block that are cleared.
        loops = (None, None, 0) if plan.num_blocks + plan.tail_blocks > tpu.UNROLL else (None, 0)
        read = 2.0 * batch * heads * plan.rows * width * item
        return Program(
            function,
            arguments,
            flops=4.0 * batch * num_heads * plan.rows * width,
            bytes=read + 2.0 * batch * num_heads * width * item + 4.0 * batch * heads * plan.num_blocks,
            trips={"block_topk_decode": loops} if module is tpu else {},
            note=f"{plan.rows} of {size} rows, all blocks in use; choosing them is XLA's and not counted",
            draw=draw,
            equation=equation,
        )

    return build


def _peer(name: str) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        from kernels_pallas.prove import peers  # peers import every kernel of JAX: only where one is asked for

        return getattr(peers, name)(shape)

    return build


_SIZES = (
    {"B": 8, "T": 1, "S": 8192, "N": 32, "K": 8, "H": 128, "block": 16, "blocks": 64, "dtype": "bfloat16"},
    {"B": 8, "T": 1, "S": 32768, "N": 32, "K": 8, "H": 64, "block": 16, "blocks": 64, "dtype": "bfloat16"},
    {"B": 8, "T": 1, "S": 32768, "N": 32, "K": 8, "H": 128, "block": 64, "blocks": 16, "dtype": "bfloat16"},
    {"B": 8, "T": 1, "S": 65536, "N": 32, "K": 8, "H": 64, "block": 64, "blocks": 16, "dtype": "bfloat16"},
)

CASES = (
    Case(
        "block_topk_attention",
        "decode",
        "tpu",
        _decode(tpu, "BKSHV"),
        _SIZES,
        ("v5e", "v6e", "v5p"),
        {"paged_attention": _peer("paged_decode")},
    ),
    Case(
        "block_topk_attention",
        "decode (k and v apart)",
        "tpu",
        _decode(tpu, "BKSH"),
        (_SIZES[0], _SIZES[2]),
        ("v5e", "v6e", "v5p"),
    ),
    Case(
        "block_topk_attention",
        "decode",
        "gpu",
        _decode(gpu, "BSKH"),
        _SIZES,
        ("h100",),
        {"gqa": _peer("gpu_dense_decode")},
    ),
)
