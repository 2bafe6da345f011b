"""The prover finds what is wrong with a kernel, and counts right. Nothing is skipped: CI installs the compilers."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.prove import (
    TARGETS,
    CompilerMissingError,
    Job,
    assert_proven,
    compilers,
    find_cases,
    get_target,
    jobs_of,
    prove,
    render,
)
from kernels_pallas.prove.__main__ import main, parse_shape
from kernels_pallas.prove.llo import read_schedule
from tests.kernels_pallas.prove import kernels

TPUS = tuple(name for name, target in TARGETS.items() if target.family == "tpu")
GPUS = tuple(name for name, target in TARGETS.items() if target.family == "gpu")
MIB = 2**20


@pytest.fixture(scope="module")
def sound():
    """The sound kernels on every chip, compiled once."""
    nested = kernels.nested_loops(6, 5.0)
    unknown = kernels.nested_loops(6, None)
    x, square = kernels.struct(1024, 128), kernels.struct(64, 64)
    on_tpu = kernels.program(kernels.double(1024, 256), x)
    on_gpu = kernels.program(kernels.double(1024, 32, "gpu"), x)
    jobs = [
        *(Job("double", chip, {}, on_tpu) for chip in TPUS),
        *(Job("double", chip, {}, on_gpu) for chip in GPUS),
        Job("nested", "v5e", {}, nested),
        Job("unknown", "v5e", {}, unknown),
        Job("product", "h100", {}, kernels.program(kernels.product(64), square, square)),
    ]
    proofs = prove(jobs)
    assert_proven(proofs)
    return {(proof.job.name, proof.job.target): proof for proof in proofs}


@pytest.mark.parametrize("chip", TPUS)
def test_tpu_memory_and_cycles(sound, chip):
    proof = sound["double", chip]
    (kernel,) = proof.kernels
    # two windows of 256 x 128 floats, each double buffered: 512 KiB, and the compiler's own scratch on top
    assert 4 * 256 * 128 * 4 <= kernel.vmem < MIB
    assert kernel.spills == 0
    assert kernel.cycles > 4 * 256 * 128 / 1024  # a load of 8 x 128 a cycle at most, 4 steps
    assert proof.static_seconds == pytest.approx(kernel.cycles / get_target(chip).clock)
    assert proof.bound == "bytes"


@pytest.mark.parametrize("chip", GPUS)
def test_gpu_binary(sound, chip):
    (kernel,) = sound["double", chip].kernels
    assert kernel.grid[0] == 32
    assert kernel.warps == 4
    assert kernel.stages == 2
    assert 8 <= kernel.registers <= 255
    assert kernel.spills == 0
    assert kernel.instructions["global load"] >= 1
    assert kernel.instructions["all"] > 20


def test_tensor_cores_are_counted(sound):
    (kernel,) = sound["product", "h100"].kernels
    assert kernel.instructions["tensor"] > 0
    assert kernel.shared_memory >= 64 * 64 * 4


def test_trips_multiply_through_nested_loops(sound):
    (kernel,) = sound["nested", "v5e"].kernels
    grid, tiles, halving = kernel.loops[1:]
    assert [loop.depth for loop in kernel.loops] == [0, 1, 2, 2]
    # the pipeline's loop has two more steps than the grid: one to fill it and one to empty it
    assert grid.trips == 4 + 2
    assert tiles.trips == grid.trips * 6
    assert halving.trips == grid.trips * 5.0
    assert kernel.cycles == sum(loop.bundles * loop.trips for loop in kernel.loops)
    assert tiles.busy["MXU"] > 0
    assert halving.busy["MXU"] == 0


def test_unknown_trips_are_not_guessed(sound):
    proof = sound["unknown", "v5e"]
    (kernel,) = proof.kernels
    assert [loop.trips for loop in kernel.loops] == [1.0, 6, 36, None]
    assert kernel.cycles is None
    assert proof.static_seconds is None
    assert " ? " in render([proof])


def test_a_stale_list_of_trips_is_an_error():
    text = "  0   : { a }\n  0x1 LB: > { b }"
    table = "== CAPACITY\nMXU, SALU\n4 2\n==\n0 1\n4 0"
    schedule = read_schedule("f", "loop: start=0, step=1, limit=7\n// loop_pre_header", text, table)
    assert schedule.cycles == 1 + 7
    with pytest.raises(ValueError, match=r"trips has 2 entries, but the schedule has 1 loops"):
        read_schedule("f", "", text, table, trips=(1.0, 2.0))
    with pytest.raises(ValueError, match="2 bundles, but 1 rows"):
        read_schedule("f", "", text, "== CAPACITY\nMXU, SALU\n4 2\n==\n0 1")


# Each fault passes interpret mode, as the test shows, and is refused by the compiler of the chip.
def faults():
    x = kernels.struct(1024, 128)
    whole = {"rows": 2**16, "block": 2**15}
    big = kernels.struct(2**16, 128)
    return {
        "VMEM": ("v5e", kernels.double(**whole), (big,), r"limit 16\.00M exceeded scoped vmem limit", False),
        "VMEM v6e": ("v6e", kernels.double(**whole), (big,), r"limit 32\.00M exceeded scoped vmem limit", False),
        "shared memory": (
            "h100", kernels.product(256), (kernels.struct(256, 256),) * 2, "Shared memory size limit exceeded", False,
        ),
        "layout": ("v5e", kernels.odd_blocks(), (kernels.struct(12, 200),), "divisible by 8 and 128", False),
        "boolean carry": ("v5e", kernels.boolean_carry(), (kernels.struct(8, 128),), "legalize|failed", False),
        "bf16 at high precision": (
            "v5e", kernels.high_precision(), (kernels.struct(128, 128, dtype=jnp.bfloat16),), "Bad lhs type", False,
        ),
        "no power of two": ("h100", kernels.odd_sizes(), (kernels.struct(12, 100),), "power of 2", False),
        "sound": ("v5e", kernels.floor_division(jax.lax.div), (kernels.struct(64, 128),), "", True),
        "sound too": ("v5e", kernels.double(1024, 256), (x,), "", True),
    }  # fmt: skip


def test_planted_faults_are_refused():
    planted = faults()
    jobs = [Job(name, chip, {}, kernels.program(call, *args)) for name, (chip, call, args, _, _) in planted.items()]
    for proof, (name, (_, _, _, words, good)) in zip(prove(jobs), planted.items(), strict=True):
        assert proof.accepted == good, f"{name}: {proof.message}"
        assert re.search(words, proof.message), proof.message
        if not good:
            with pytest.raises(AssertionError, match="1 of 1 programs were refused"):
                assert_proven([proof])
            assert proof.message[:40] in render([proof])


def test_floor_division_needs_a_lowering_that_knows_the_chip():
    """``//`` on traced integers asks which chip it is for: lowered for "a TPU" it fails, the prover names the chip."""
    halves, x = kernels.floor_division(jnp.floor_divide), kernels.struct(64, 128)
    with pytest.raises(ValueError, match="Unsupported TPU device kind: cpu"):
        jax.jit(halves).trace(x).lower(lowering_platforms=("tpu",))
    assert_proven(prove([Job("halves", chip, {}, kernels.program(halves, x)) for chip in ("v5e", "v6e")]))


def test_interpret_mode_lets_the_faults_pass():
    x = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
    halves = kernels.floor_division(jnp.floor_divide, interpret=True)(x)
    np.testing.assert_array_equal(halves, 2 * x.reshape(8, 8, 128)[:4].sum(0))
    np.testing.assert_array_equal(kernels.odd_blocks(interpret=True)(np.ones((12, 200), np.float32)), 2.0)
    assert float(kernels.boolean_carry(interpret=True)(np.full((8, 128), 3.0, np.float32)).max()) <= 1.0
    bf16 = jnp.eye(128, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(kernels.high_precision(interpret=True)(bf16), bf16)
    np.testing.assert_array_equal(kernels.odd_sizes(interpret=True)(np.ones((12, 100), np.float32)), 3.0)
    square = np.eye(256, dtype=np.float32)
    np.testing.assert_array_equal(kernels.product(256, interpret=True)(square, square), square)


def test_spills_and_missing_kernels_fail_the_helper(sound):
    proof = sound["double", "v5e"]
    loop = dataclasses.replace(proof.kernels[0].loops[1], spills=7)
    spilling = dataclasses.replace(proof, kernels=(dataclasses.replace(proof.kernels[0], loops=(loop,)),))
    assert_proven([spilling], max_spills=7)
    with pytest.raises(AssertionError, match="at most 6 spills"):
        assert_proven([spilling], max_spills=6)
    with pytest.raises(AssertionError, match="no kernel was found"):
        assert_proven(prove([Job("no kernel", "v5e", {}, kernels.program(lambda x: x + 1, kernels.struct(8, 128)))]))
    with pytest.raises(AssertionError, match="nothing was proven"):
        assert_proven([])


def test_a_compiler_that_dies_or_hangs_is_one_refusal(monkeypatch):
    job = Job("double", "v5e", {}, kernels.program(kernels.double(1024, 256), kernels.struct(1024, 128)))
    hung = prove([job], timeout=0.01)[0]
    assert not hung.accepted
    assert "no answer within" in hung.message
    monkeypatch.setattr(compilers, "find", lambda family: pathlib.Path("/nowhere"))
    refused = prove([job])[0]
    assert not refused.accepted
    assert "TPU support not installed" in refused.message


def test_missing_compilers_say_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(compilers.VARIABLE, str(tmp_path))
    monkeypatch.setattr(compilers, "search_path", lambda: [tmp_path])
    with pytest.raises(CompilerMissingError, match=r"prove --install.*pip install --no-deps --target .*libtpu"):
        compilers.find("tpu")
    assert compilers.find_tool("nvdisasm-of-nowhere") is None
    assert main(["tests.kernels_pallas.prove.kernels:OWN", "--target", "v5e"]) == 2
    assert "the TPU compiler is not installed" in capsys.readouterr().err


def test_command_line(capsys):
    own = "tests.kernels_pallas.prove.kernels:OWN"
    assert main([own, "--list"]) == 0
    assert "double forward tpu  chips v5e, v6e  peers none" in capsys.readouterr().out
    assert main([own, "--target", "v5e", "--target", "h100", "--shape", "rows=2048", "--loops"]) == 0
    captured = capsys.readouterr()
    assert "[2/2] double forward gpu on h100: accepted" in captured.err
    assert "rows=2048" in captured.out
    assert "* estimates" in captured.out
    assert "> loop 1" in captured.out
    assert main([own, "--target", "v5e", "--shape", "rows=131072,block=65536", "--markdown"]) == 1
    assert "exceeded scoped vmem limit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "op is 'nowhere', expected one of"),
        (["nowhere.module:CASES"], "cannot be imported"),
        (["tests.kernels_pallas.prove.kernels:GPU"], "expected a Case or a sequence of them, got CompilerParams"),
        (
            ["tests.kernels_pallas.prove.kernels:OWN", "--target", "v5"],
            "target is 'v5', expected one of .*did you mean",
        ),
        (["tests.kernels_pallas.prove.kernels:OWN", "--kernel", "backward"], "kernel is .*expected one of"),
        (["tests.kernels_pallas.prove.kernels:OWN", "--compare", "magic"], "compare is 'magic'"),
        (["tests.kernels_pallas.prove.kernels:OWN", "--shape", "rows"], "expected name=value"),
        (["tests.kernels_pallas.prove.kernels:OWN", "--shape", "columns=3"], "which double forward tpu has not"),
    ],
)
def test_wrong_calls_are_explained(arguments, message, capsys):
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_jobs(sound):
    cases = find_cases("tests.kernels_pallas.prove.kernels:OWN")
    assert [job.target for job in jobs_of(cases)] == ["v5e", "v6e", "h100"]
    assert [job.shape for job in jobs_of(cases, targets=["v4"], shapes=[{"rows": 512}])] == [
        {"rows": 512, "block": 256}
    ]
    assert parse_shape("a=-1, b=x") == {"a": -1, "b": "x"}
