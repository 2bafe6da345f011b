"""What the prover's cases count, checked by hand; that the compilers accept them is tested for all ops together."""

import pytest

from kernels_pallas.prove.cases import find_cases
from kernels_pallas.prove.proving import describing
from kernels_pallas.prove.targets import get_target

CASES = {(case.kernel, case.family): case for case in find_cases("local_linear_attention")}


def build(kernel: str, family: str, target: str, **shape):
    case = CASES[kernel, family]
    with describing(get_target(target)):
        return case.build(case.shape(shape))


def test_counts_of_a_forward_pass():
    program = build("forward", "tpu", "v5e", T=4096, S=4096, H=128, iterations=8)
    # Tiles of 256 rows see blocks of 512 keys: 1, 1, 2, 2, ... 8, 8. A product with made numbers takes two passes.
    pairs = 8 * 256 * 512 * 2 * sum(range(1, 9))
    assert program.flops == 2 * 128 * pairs * (1 + 2 + 8 * (2 + 2) + 2 + 2)
    grid, whole, diagonal, center, iterations, products, output = program.trips["lla_forward"]
    assert grid is None
    # Two grid steps a tile, which share the blocks; the first block of keys that a tile does not see whole is its last.
    assert (whole, diagonal, center, output) == (3.5 / 2, 1 / 2, 4.5 / 2, 4.5 / 2)
    assert (iterations, products) == (8 / 2, 4.5)


def test_the_plan_is_the_one_for_the_chip():
    sizes = {"T": 49152, "S": 49152, "H": 64}
    assert "made again" in build("forward (float32)", "tpu", "v5p", **sizes).note  # 64 MiB of VMEM
    assert "made again" not in build("forward (float32)", "tpu", "v5e", **sizes).note  # 128 MiB


@pytest.mark.parametrize("slots", [32768, 9000])
def test_a_decoding_step_reads_the_cache_once(slots):
    program = build("decode", "tpu", "v5e", S=slots, H=128, N=8)
    cache = 8 * 8 * slots * 128 * 2 * 2
    assert cache < program.bytes < 1.01 * cache
    grid, parts, rest, *again, solves, iterations = program.trips["lla_decode"]
    steps = -(-slots // 8192)
    assert (parts * steps, rest * steps) == (slots // 4096, -(-(slots % 4096) // 512))
    assert again == [parts, rest]
    assert (grid, solves * 8 * steps, iterations) == (None, 1, 8)
