"""Peer kernels that ship with JAX, as programs: what ours are compared with, compiled by the same compilers.

Every maker takes the sizes of a case (B batch, T queries, S keys, N query heads, K key heads, H head size, dtype) and
passes over names that it does not know. Blocks of the forward passes are the best of 512, 1024 and 2048 by the prover's
static cycles for v5e at S = 8192 and H = 128, so that the comparison is with a tuned peer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as gpu_attention
from jax.experimental.pallas.ops.gpu import decode_attention as gpu_decode
from jax.experimental.pallas.ops.tpu import flash_attention as tpu_flash
from jax.experimental.pallas.ops.tpu import megablox
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from kernels_pallas.prove.cases import Program, Shape, normals

FLASH_BLOCK = 1024
SPLASH_BLOCK = 1024


def attention_flops(shape: Shape, products: int = 2) -> float:
    """FLOPs of ``products`` causal [T, S] products of head size H: half of the dense ones."""
    return products * 2.0 * shape["B"] * shape["N"] * shape["T"] * shape["S"] * shape["H"] / 2


def _item(shape: Shape) -> int:
    return jnp.dtype(shape["dtype"]).itemsize


def _arrays(shape: Shape, layout: str, heads: str = "NNN") -> tuple[jax.ShapeDtypeStruct, ...]:
    """Query, key and value in a layout such as ``BNTH``."""
    sizes = [{**shape, "N": shape[h], "T": shape[t]} for h, t in zip(heads, "TSS", strict=True)]
    return tuple(
        jax.ShapeDtypeStruct(tuple(size[axis] for axis in layout), jnp.dtype(shape["dtype"])) for size in sizes
    )


def _streamed(shape: Shape, block: int) -> float:
    """Bytes of a causal pass that reads K and V once per block of queries, and q and the output once."""
    row = shape["H"] * _item(shape)
    blocks = -(-shape["T"] // block)
    return shape["B"] * shape["N"] * row * (2.0 * shape["T"] + 2.0 * shape["S"] * (blocks + 1) / 2)


def flash_attention(shape: Shape) -> Program:
    """One causal forward pass of ``jax.experimental.pallas.ops.tpu.flash_attention``."""
    block = min(FLASH_BLOCK, shape["S"], shape["T"])
    sizes = tpu_flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
    blocks = shape["S"] // block
    return Program(
        lambda q, k, v: tpu_flash.flash_attention(q, k, v, causal=True, block_sizes=sizes),
        _arrays(shape, "BNTH"),
        flops=attention_flops(shape),
        bytes=_streamed(shape, block),
        busy=(blocks + 1) / (2 * blocks),
        note=f"one causal pass, blocks of {block}",
    )


def splash_attention(shape: Shape) -> Program:
    """One causal forward pass of ``jax.experimental.pallas.ops.tpu.splash_attention``."""
    block = min(SPLASH_BLOCK, shape["S"], shape["T"])
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=min(512, block))
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((shape["T"], shape["S"]))] * shape["N"])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    blocks = shape["S"] // block
    return Program(
        lambda q, k, v: jax.vmap(kernel)(q, k, v),
        _arrays(shape, "BNTH"),
        flops=attention_flops(shape),
        bytes=_streamed(shape, block),
        busy=(blocks + 1) / (2 * blocks),
        note=f"one causal pass, blocks of {block}",
    )


def flash_attention_backward(shape: Shape) -> Program:
    """The gradient of one causal pass of the TPU flash attention, forward pass included."""
    block = min(512, shape["S"], shape["T"])
    names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv",
             "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")  # fmt: skip
    sizes = tpu_flash.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    blocks = shape["S"] // block

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tpu_flash.flash_attention(q, k, v, causal=True, block_sizes=sizes).astype(jnp.float32).sum()

    return Program(
        jax.grad(loss, argnums=(0, 1, 2)),
        _arrays(shape, "BNTH"),
        flops=attention_flops(shape, 9),
        bytes=4 * _streamed(shape, block),
        busy=(blocks + 1) / (2 * blocks),
        note=f"one causal pass and its gradient, blocks of {block}",
    )


def paged_decode(shape: Shape) -> Program:
    """Dense decoding of one token by ``jax.experimental.pallas.ops.tpu.paged_attention``, K and V read once."""
    page, compute = 64, min(8, shape["S"] // 64)
    pages = shape["S"] // page
    cache = jax.ShapeDtypeStruct((shape["K"], shape["B"] * pages, page, shape["H"]), jnp.dtype(shape["dtype"]))
    query = jax.ShapeDtypeStruct((shape["B"], shape["N"], shape["H"]), jnp.dtype(shape["dtype"]))
    lengths = jax.ShapeDtypeStruct((shape["B"],), jnp.int32)
    table = jax.ShapeDtypeStruct((shape["B"], pages), jnp.int32)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        own = jnp.arange(shape["B"] * pages, dtype=jnp.int32).reshape(table.shape)
        return *normals(key, (query, cache, cache)), jnp.full(lengths.shape, shape["S"], jnp.int32), own

    return Program(
        lambda q, k, v, n, t: paged_attention(q, k, v, n, t, pages_per_compute_block=compute),
        (query, cache, cache, lengths, table),
        flops=4.0 * shape["B"] * shape["N"] * shape["S"] * shape["H"],
        bytes=2.0 * shape["B"] * shape["K"] * shape["S"] * shape["H"] * _item(shape),
        note=f"dense decode of one token, pages of {page}",
        draw=draw,
    )


def gpu_flash_attention(shape: Shape) -> Program:
    """One causal forward pass of ``jax.experimental.pallas.ops.gpu.attention.mha``."""
    return Program(
        lambda q, k, v: gpu_attention.mha(q, k, v, None, causal=True),
        _arrays(shape, "BTNH"),
        flops=attention_flops(shape),
        bytes=4.0 * shape["B"] * shape["N"] * shape["S"] * shape["H"] * _item(shape),
        note="one causal pass",
    )


def gpu_flash_attention_backward(shape: Shape) -> Program:
    """The gradient of one causal pass of the GPU attention, forward pass included."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return gpu_attention.mha(q, k, v, None, causal=True).astype(jnp.float32).sum()

    return Program(
        jax.grad(loss, argnums=(0, 1, 2)),
        _arrays(shape, "BTNH"),
        flops=attention_flops(shape, 9),
        bytes=12.0 * shape["B"] * shape["N"] * shape["S"] * shape["H"] * _item(shape),
        note="one causal pass and its gradient",
    )


def gpu_dense_decode(shape: Shape) -> Program:
    """Dense decoding of one token by ``jax.experimental.pallas.ops.gpu.decode_attention.gqa``."""
    query = jax.ShapeDtypeStruct((shape["B"], shape["N"], shape["H"]), jnp.dtype(shape["dtype"]))
    cache = jax.ShapeDtypeStruct((shape["B"], shape["S"], shape["K"], shape["H"]), jnp.dtype(shape["dtype"]))
    return Program(
        lambda q, k, v: gpu_decode.gqa(q, k, v),
        (query, cache, cache),
        flops=4.0 * shape["B"] * shape["N"] * shape["S"] * shape["H"],
        bytes=2.0 * shape["B"] * shape["K"] * shape["S"] * shape["H"] * _item(shape),
        note="dense decode of one token",
    )


def megablox_ffn(shape: Shape) -> Program:
    """The experts of n tokens by two grouped products of ``jax.experimental.pallas.ops.tpu.megablox``.

    Its form of the union over a chunk: every active expert gets a copy of all n tokens, filled up to whole tiles of 16
    rows, as groups that share no tile. Between the products the activation, and after them the sum, are XLA's.
    """
    tokens, width, experts, size, active = (shape[name] for name in ("n", "D", "Ne", "de", "active"))
    dtype = jnp.dtype(shape["dtype"])
    rows = -(-tokens // 16) * 16
    sorted_tokens = jax.ShapeDtypeStruct((active * rows, width), dtype)
    weights = jax.ShapeDtypeStruct((experts, size, width), dtype)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        return *normals(key, (sorted_tokens, weights, weights)), jnp.where(jnp.arange(experts) < active, rows, 0)

    def function(x: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
        hidden = megablox.gmm(x, up, sizes, tiling=(rows, width, size), transpose_rhs=True)
        out = megablox.gmm(jax.nn.silu(hidden).astype(dtype), down, sizes, tiling=(rows, size, width))
        return out.reshape(active, rows, width).sum(0)

    item = dtype.itemsize
    return Program(
        function,
        (sorted_tokens, weights, weights, sizes),
        flops=4.0 * active * rows * size * width,
        bytes=2.0 * active * size * width * item + active * rows * (width * (item + 8) + size * (item + 8)),
        trips={"gmm": (active,)},  # its grid is as long as there are groups with rows, which is known at run time
        note="two grouped products over a copy of the tokens for each active expert",
        draw=draw,
    )


def _ragged(shape: Shape) -> Program:
    tokens, width, experts, size, active = (shape[name] for name in ("n", "D", "Ne", "de", "active"))
    dtype = jnp.dtype(shape["dtype"])

    # In float32 as in the kernels: GPUs would round operands to 10 bits by default.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = functools.partial(jax.lax.ragged_dot, precision=precision, preferred_element_type=jnp.float32)

    def function(x: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
        hidden = product(x, up, sizes)
        out = product(jax.nn.silu(hidden).astype(dtype), down, sizes)
        return out.reshape(active, tokens, width).sum(0)

    shapes = ((active * tokens, width), (experts, width, size), (experts, size, width))
    arrays = tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        return *normals(key, arrays), jnp.where(jnp.arange(experts) < active, tokens, 0)

    return Program(
        function,
        (*arrays, jax.ShapeDtypeStruct((experts,), jnp.int32)),
        flops=4.0 * active * tokens * size * width,
        bytes=2.0 * active * size * width * dtype.itemsize + active * tokens * (width + size) * (dtype.itemsize + 4),
        note="two ragged products over a copy of the tokens for each active expert",
        draw=draw,
    )


def ragged_dot_ffn(shape: Shape) -> Program:
    """The experts of n tokens by two ``jax.lax.ragged_dot``, which XLA gives to a kernel of its own on TPUs.

    Grid steps of that kernel are counted at run time, so that there is no static time.
    """
    return _ragged(shape)


def gpu_ragged_dot_ffn(shape: Shape) -> Program:
    """The experts of n tokens by two ``jax.lax.ragged_dot`` as XLA compiles them for GPUs.

    It writes a copy of each row for every expert, zero but for its own, and multiplies these with all experts.
    """
    program = _ragged(shape)
    tokens, width, experts, size, active = (shape[name] for name in ("n", "D", "Ne", "de", "active"))
    item = jnp.dtype(shape["dtype"]).itemsize
    copies = 2.0 * active * tokens * experts * (width + size) * item  # written, then read
    return dataclasses.replace(
        program,
        flops=program.flops * experts,
        bytes=program.bytes + copies + 2.0 * (experts - active) * size * width * item,
        note="two ragged products; XLA multiplies masked copies of the tokens with all experts",
    )
