"""The block-size chooser against brute force, and against the real compilers. Nothing is skipped: CI installs them."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

from kernels_pallas.block_sizes import Axis, LoopNest, Operand, choose_blocks, estimate, matmul_nest, memory_limit
from kernels_pallas.prove import Job, Program, assert_proven, prove

MIB = 2**20


def tpu_matmul(sizes, candidate, dtype, interpret=False):
    """A product on a TPU, cut up as a candidate says."""
    (m, k, n), blocks = sizes, candidate.blocks
    sums = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32
    out = sums if sums == jnp.int32 else dtype
    first, second = candidate.order[:2]
    assert candidate.order[2] == "k"

    def kernel(x_ref, w_ref, y_ref, sums_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        sums_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=sums)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            y_ref[...] = sums_ref[...].astype(out)

    def at(*axes):
        return lambda i, j, step: tuple({first: i, second: j, "k": step}[axis] for axis in axes)

    size = {"m": m, "n": n}
    return pl.pallas_call(
        kernel,
        grid=(*(pl.cdiv(size[axis], blocks[axis]) for axis in (first, second)), k // blocks["k"]),
        in_specs=[
            pl.BlockSpec((blocks["m"], blocks["k"]), at("m", "k")),
            pl.BlockSpec((blocks["k"], blocks["n"]), at("k", "n")),
        ],
        out_specs=pl.BlockSpec((blocks["m"], blocks["n"]), at("m", "n")),
        out_shape=jax.ShapeDtypeStruct((m, n), out),
        scratch_shapes=[pltpu.VMEM((blocks["m"], blocks["n"]), sums)],
        name="matmul",
        interpret=interpret,
    )


def gpu_matmul(sizes, candidate, dtype, stages):
    """A product on a GPU whose programs loop over k."""
    (m, k, n), (bm, bk, bn) = sizes, (candidate.blocks[axis] for axis in "mkn")

    def kernel(x_ref, w_ref, y_ref):
        def step(i, sums):
            x, w = x_ref[:, pl.ds(i * bk, bk)], w_ref[pl.ds(i * bk, bk), :]
            return sums + jnp.dot(x, w, preferred_element_type=jnp.float32)

        y_ref[...] = jax.lax.fori_loop(0, k // bk, step, jnp.zeros((bm, bn), jnp.float32)).astype(dtype)

    return pl.pallas_call(
        kernel,
        grid=(m // bm, n // bn),
        in_specs=[pl.BlockSpec((bm, k), lambda i, j: (i, 0)), pl.BlockSpec((k, bn), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        name="matmul",
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=stages),
    )


def job(name, chip, sizes, dtype, candidate, stages=None):
    """A candidate's product as a job for the prover."""
    m, k, n = sizes
    arguments = (jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((k, n), dtype))

    def build(shape):
        if stages is None:
            call = tpu_matmul(sizes, candidate, jnp.dtype(dtype))
        else:
            call = gpu_matmul(sizes, candidate, jnp.dtype(dtype), stages)
        return Program(call, arguments, flops=2 * m * k * n, bytes=candidate.hbm_bytes)

    return Job(name, chip, {}, build)


# Sizes (M, K, N), dtype, and the candidate: the best one, or blocks (m, k, n) that the model must also get right.
FITTING = {
    "v5e best": ("v5e", (512, 8192, 512), "bfloat16", None),
    "v6e best": ("v6e", (512, 2048, 512), "bfloat16", None),
    "v5e best f32": ("v5e", (512, 8192, 512), "float32", None),
    "v6e best int8": ("v6e", (512, 2048, 512), "int8", None),
    "v5e ragged": ("v5e", (1000, 512, 640), "bfloat16", (256, 128, 384)),
    "v6e one step of k": ("v6e", (1024, 1024, 512), "float32", (256, 1024, 256)),
    "v5e w stays": ("v5e", (1024, 512, 512), "float32", (256, 512, 512)),
    "v5e one step": ("v5e", (256, 256, 256), "float32", (256, 256, 256)),
}
TOO_LARGE = {
    "v5e f32": ("v5e", (1024, 8192, 512), "float32", (512, 4096, 128)),
    "v6e f32": ("v6e", (2048, 8192, 512), "float32", (1024, 4096, 128)),
    "v5e by what is held": ("v5e", (4096, 4096, 4096), "bfloat16", (512, 4096, 256)),
}


def named(blocks):
    """Blocks by axis."""
    return dict(zip("mkn", blocks, strict=True))


def candidate_of(chip, sizes, dtype, blocks):
    nest = matmul_nest(*sizes, dtype)
    return choose_blocks(nest, chip)[0] if blocks is None else estimate(nest, named(blocks), chip)


@pytest.fixture(scope="module")
def tpu():
    """All products compiled once, by name: proof and candidate."""
    candidates = {name: candidate_of(*case) for name, case in (FITTING | TOO_LARGE).items()}
    jobs = [job(name, *(FITTING | TOO_LARGE)[name][:3], candidate) for name, candidate in candidates.items()]
    return {proof.job.name: (proof, candidates[proof.job.name]) for proof in prove(jobs)}


@pytest.mark.parametrize("name", FITTING)
def test_the_tpu_compiler_takes_what_the_model_says(tpu, name):
    proof, candidate = tpu[name]
    assert_proven([proof])
    (kernel,) = proof.kernels
    assert candidate.vmem_bytes <= memory_limit(proof.job.target)
    # Float32 is exact but for spilled registers, up to 0.3 MiB here; what is held of others is a rule of thumb.
    tolerance = 0.12 if FITTING[name][2] == "float32" else 0.25
    assert candidate.vmem_bytes == pytest.approx(kernel.vmem, rel=tolerance)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_the_tpu_compiler_refuses_what_the_model_rejects(tpu, name):
    proof, candidate = tpu[name]
    chip, sizes, dtype, blocks = TOO_LARGE[name]
    assert candidate.vmem_bytes > memory_limit(chip)
    assert named(blocks) not in [c.blocks for c in choose_blocks(matmul_nest(*sizes, dtype), chip)]
    assert not proof.accepted
    needed = re.search(r"size (\d+\.\d+)M and limit .* exceeded scoped vmem limit", proof.message)
    assert candidate.vmem_bytes == pytest.approx(float(needed[1]) * MIB, rel=0.1)


def test_the_gpu_compiler_agrees():
    sizes = (4096, 4096, 4096)
    nest = matmul_nest(*sizes, "bfloat16")
    cases = [
        (chip, stages, choose_blocks(nest, chip, stages=stages)[0])
        for chip, stages in [("h100", 2), ("h100", 3), ("a100", 3)]
    ]
    large = estimate(nest, {"m": 256, "n": 256, "k": 128}, "h100")
    jobs = [job(f"{chip} {stages}", chip, sizes, "bfloat16", c, stages) for chip, stages, c in cases]
    *proofs, refused = prove([*jobs, job("large", "h100", sizes, "bfloat16", large, 2)])
    assert_proven(proofs, max_spills=0)
    for proof, (_, _, candidate) in zip(proofs, cases, strict=True):
        assert candidate.vmem_bytes == proof.kernels[0].shared_memory
    assert large.vmem_bytes > memory_limit("h100")
    assert f"Shared memory size limit exceeded: requested {large.vmem_bytes}" in refused.message


@pytest.mark.parametrize("blocks", [(256, 128, 384), (512, 512, 128), (1000, 128, 640)])
def test_the_kernel_of_this_test_is_right(blocks):
    sizes = (1000, 512, 640)
    candidate = estimate(matmul_nest(*sizes, "float32"), named(blocks), "v5e")
    generator = np.random.default_rng(0)
    x, w = (generator.integers(-4, 5, shape).astype(np.float32) for shape in (sizes[:2], sizes[1:]))
    np.testing.assert_array_equal(tpu_matmul(sizes, candidate, jnp.float32, interpret=True)(x, w), x @ w)  # integers


def fetched(nest, blocks, order):
    """Bytes of inputs and outputs by walking through the grid: a block moves when its index changes."""
    sizes = {axis.name: axis.size for axis in nest.axes}
    total = 0
    for operand in nest.operands:
        last = None
        if operand.role == "accumulator":
            continue
        for index in itertools.product(*(range(-(-sizes[axis] // blocks[axis])) for axis in order)):
            at = dict(zip(order, index, strict=True))
            place = tuple(at.get(axis, 0) for axis in operand.axes)
            if place != last:
                ends = [
                    axis
                    if isinstance(axis, int)
                    else min(sizes[axis], (at[axis] + 1) * blocks[axis]) - at[axis] * blocks[axis]
                    for axis in operand.axes
                ]
                total += math.prod(ends) * operand.itemsize
            last = place
    return total


@pytest.mark.parametrize("order", [("m", "n", "k"), ("n", "m", "k")])
@pytest.mark.parametrize(
    "blocks", [(64, 128, 128), (200, 128, 128), (64, 256, 128), (64, 128, 300), (200, 256, 300), (64, 256, 300)]
)
def test_bytes_are_those_of_a_walk_through_the_grid(blocks, order):
    nest = matmul_nest(200, 256, 300, "bfloat16")
    blocks = named(blocks)
    assert estimate(nest, blocks, "v5e", order=order).hbm_bytes == fetched(nest, blocks, order)


def batched():
    """Batched rows against one table of weights, with a row of scales."""
    axes = (Axis("b", 6), Axis("t", 48), Axis("n", 256))
    return LoopNest(
        axes,
        (
            Operand("x", ("b", "t", 128), "float32"),
            Operand("w", (128, "n"), "float32"),
            Operand("scale", (1, "n"), "float32"),
            Operand("y", ("b", "t", "n"), "bfloat16", "output"),
        ),
    )


def test_other_nests():
    nest = batched()
    found = choose_blocks(nest, "v5e")
    assert {c.order for c in found} == set(itertools.permutations("btn"))
    for candidate in found[:: len(found) // 40]:
        assert candidate.hbm_bytes == fetched(nest, candidate.blocks, candidate.order)
        assert candidate.blocks["t"] % 16 == 0  # rows of y, in 16 bits
        assert candidate.blocks["n"] % 128 == 0
    assert {1, 2, 3, 4, 6} == {c.blocks["b"] for c in found}
    # All of it fits: everything moves once, in a single step.
    assert (found[0].hbm_bytes, found[0].steps) == (4 * (6 * 48 * 128 + 128 * 256 + 256) + 2 * 6 * 48 * 256, 1)
    # A row of scales takes a tile of 8 rows: 4 KiB more a lane tile, not 512 bytes.
    assert found[0].vmem_bytes == 4 * (6 * 48 * 128 + 128 * 256 + 8 * 256) + 2 * 6 * 48 * 256


def test_candidates_are_ordered_and_fit():
    nest = matmul_nest(1024, 2048, 1536, "bfloat16")
    found = choose_blocks(nest, "v5e", headroom=0.25)
    costs = [(c.hbm_bytes, c.steps, c.vmem_bytes) for c in found]
    assert costs == sorted(costs)
    assert max(c.vmem_bytes for c in found) <= 0.75 * 16 * MIB
    assert all(c == estimate(nest, c.blocks, "v5e", order=c.order) for c in found)
    assert all(2048 % c.blocks["k"] == 0 for c in found)
    more = choose_blocks(nest, "v5e", limit=64 * MIB)
    assert more[0].hbm_bytes == 2 * (1024 * 2048 + 2048 * 1536 + 1024 * 1536)  # each array once
    assert (more[0].hbm_bytes, more[0].steps) < (found[0].hbm_bytes, found[0].steps)


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 8), ("bfloat16", 16), ("int8", 32)])
def test_tiles_follow_the_dtype(dtype, rows):
    found = choose_blocks(matmul_nest(512, 512, 512, dtype), "v6e")
    assert min(c.blocks["m"] for c in found) == rows
    assert {c.blocks["k"] % 128 for c in found} | {c.blocks["n"] % 128 for c in found} == {0}


def test_odd_sizes_are_taken_whole_or_left_over():
    found = choose_blocks(matmul_nest(100, 300, 200, "float32"), "v5e")
    assert {c.blocks["k"] for c in found} == {300}  # no multiple of 128 divides it
    assert {c.blocks["n"] for c in found} == {128, 200}
    assert {c.blocks["m"] for c in found} == {8, 16, 32, 64, 100}


def test_blocks_of_gpus_are_powers_of_two_and_sums_fit_registers():
    found = choose_blocks(matmul_nest(4096, 4096, 4096, "float32"), "a100")
    for candidate in found:
        assert all(size & (size - 1) == 0 and size >= 16 for size in candidate.blocks.values())
        assert candidate.blocks["m"] * candidate.blocks["n"] <= 128 * 256
    best = found[0].blocks
    assert {best["m"], best["n"]} == {128, 256}
    assert found[0].hbm_bytes == 4 * 4096**2 * (4096 // 128 + 4096 // 256 + 1)


def test_sizes_restrict_an_axis():
    nest = matmul_nest(1024, 1024, 1024, "bfloat16")
    found = choose_blocks(nest, "v5e", sizes={"k": [1024], "n": [384]})
    assert {(c.blocks["k"], c.blocks["n"]) for c in found} == {(1024, 384)}


MATMUL = matmul_nest(1024, 1024, 1024, "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "v5"}, "target is 'v5', expected one of"),
        ({"limit": 0}, "limit is 0 bytes"),
        ({"headroom": 1.0}, r"headroom is 1.0, expected a fraction in \[0, 1\)"),
        ({"sizes": {"q": [128]}}, "sizes has axis 'q', expected one of"),
        ({"sizes": {"m": []}}, "sizes has no block for axis 'm'"),
        ({"sizes": {"m": [24]}}, "block of axis 'm' is 24, which v5e cannot have: expected 1024 or multiples of 16"),
        ({"sizes": {"k": [384]}}, "block of axis 'k' is 384.*that divide it"),
        ({"sizes": {"k": [96]}, "target": "h100"}, "block of axis 'k' is 96, which h100 cannot have: .*powers of two"),
        ({"limit": 1000}, r"no blocks fit into 1000 bytes of v5e less 5%: the smallest, .*'m': 16.* need \d+"),
        ({"stages": 0, "target": "h100"}, "stages is 0"),
    ],
)
def test_wrong_calls_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_blocks(MATMUL, **{"target": "v5e", **arguments})


@pytest.mark.parametrize(
    ("blocks", "order", "message"),
    [
        ({"m": 8, "n": 128}, None, r"blocks has \['m', 'n'\]"),
        ({"m": 0, "n": 128, "k": 128}, None, "block of axis 'm' is 0"),
        ({"m": 16, "n": 128, "k": 128}, "mk", r"order \['k', 'm'\]"),
        ({"m": 16, "n": 128, "k": 128}, "mkn", r"expected the reductions \['k'\] last"),
    ],
)
def test_wrong_blocks_are_explained(blocks, order, message):
    with pytest.raises(ValueError, match=message):
        estimate(MATMUL, blocks, "v5e", order=order)


@pytest.mark.parametrize(
    ("axes", "operands", "message"),
    [
        ((), (), "expected at least one"),
        ((Axis("m", 4), Axis("m", 4)), (), "with different names"),
        ((Axis("m", 0),), (), "axis 'm' has size 0"),
        ((Axis("m", 8),), (Operand("x", ("m",), "float32"),), "operand 'x' has 1 dimensions"),
        ((Axis("m", 8),), (Operand("x", ("m", "n"), "float32"),), "operand 'x' has axis 'n', expected one of"),
        ((Axis("m", 8),), (Operand("x", ("m", 8), "int8", held_over="n"),), "has axis 'n'"),
        (
            (Axis("m", 8), Axis("k", 8, is_reduction=True)),
            (Operand("y", ("m", "k"), "float32", "output"),),
            "output 'y' has the reduction axis 'k'",
        ),
    ],
)
def test_wrong_nests_are_explained(axes, operands, message):
    with pytest.raises(ValueError, match=message):
        LoopNest(axes, operands)


def test_tpus_have_no_64_bits():
    with pytest.raises(TypeError, match="operand 'x' is float64, expected at most 32 bits"):
        choose_blocks(matmul_nest(128, 128, 128, "float64"), "v5e")
