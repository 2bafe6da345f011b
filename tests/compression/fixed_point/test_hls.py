"""Exported C++ is compiled against the open headers of ap_fixed and run; its bits are those of `int_forward`."""

import subprocess

import numpy as np
import pytest

from jaxaccel.compression.fixed_point import FixedPoint, Spec, export_hls, int_forward
from jaxaccel.models.weights.ap_types import fetch_ap_types

F = FixedPoint
X, W = F(5, 3), F(4, 3)


@pytest.fixture(scope="session")
def headers():
    return fetch_ap_types()


def integers(fmt, shape, rng):
    fmt = fmt[0] if isinstance(fmt, tuple) else fmt
    return rng.integers(fmt.lo, fmt.hi + 1, shape).astype(np.int32)


def weights(spec, rng):
    shapes = spec.weight_shapes()
    return {
        node.name: {
            key: integers(node.b if key == "b" else node.w, shape, rng) for key, shape in shapes[node.name].items()
        }
        for node in spec.nodes
        if node.name in shapes
    }


# Every operator, every rounding and overflow mode but the default's repetition, channels, narrow accumulators.
NETWORK = (
    Spec((4, 4, 2), X)
    .conv("conv1", 3, kernel=(3, 3), w=(F(4, 3), F(4, 5), F(4, 1)), out=F(9, 5))
    .scale("norm1", a=F(4, 2), b=F(5, 1), out=F(5, 3, rounding="rnd_conv"))
    .relu("relu1")
    .conv(
        "conv2", 3, kernel=(3, 3), strides=(2, 2), w=W, b=F(6, 8), acc=F(10, 5), accumulate="stepwise",
        out=F(8, 4, overflow="sat_sym"),
    )
    .conv("conv3", 3, kernel=(1, 1), w=W, acc=F(10, 5, True, "trn", "wrap"), out=F(8, 4), padding="VALID")
    .add("joined", "conv2", out=F(6, 3, rounding="rnd_zero"))
    .mean("pool", window=(2, 1), out=F(5, 3, rounding="rnd_inf"))
    .dense("fc1", 6, w=W, b=F(5, 2), out=F(7, 3, False, "rnd_min_inf", "sat_zero"))
    .dense("fc2", 4, w=tuple(F(4, i) for i in range(4)), b=F(5, 3), out=F(10, 3, True, "trn_zero", "wrap"))
)  # fmt: skip


def run(testbench, headers):
    program = testbench.with_suffix("")
    command = ["g++", "-std=c++17", "-O0", "-w", "-I", str(headers), str(testbench), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


def test_compiled_bits_are_those_of_jax_and_a_wrong_one_is_found(tmp_path, headers):
    rng = np.random.default_rng(0)
    params, inputs = weights(NETWORK, rng), integers(X, (6, 4, 4, 2), rng)
    header, testbench = export_hls(NETWORK, params, tmp_path / "out", inputs=inputs)
    assert "typedef ap_fixed<5, 2, AP_RND_CONV, AP_SAT> norm1_t;" in header.read_text()
    assert "typedef ap_ufixed<7, 4, AP_RND_MIN_INF, AP_SAT_ZERO> fc1_t;" in header.read_text()
    found = run(testbench, headers)
    assert (found.returncode, found.stdout) == (0, "0 of 24 outputs differ\n")
    # One expected output off by one.
    expected = np.asarray(int_forward(NETWORK, params, inputs)).ravel()
    assert len(set(expected.tolist())) > 8
    text = testbench.read_text()
    first = f"tb_expected[24] = {{\n  {expected[0]},"
    assert first in text
    testbench.write_text(text.replace(first, f"tb_expected[24] = {{\n  {expected[0] + 1},"))
    found = run(testbench, headers)
    assert found.returncode == 1
    assert f"input 0, output 0: {expected[0]}, expected {expected[0] + 1}" in found.stdout
    assert found.stdout.endswith("1 of 24 outputs differ\n")


SMALL = Spec((2,), X).dense("fc", 1, w=W, out=X)
GOOD = {"fc": {"w": np.array([[1], [2]])}}
ONE = np.array([[1, 2]])


@pytest.mark.parametrize(
    ("spec", "params", "options", "message"),
    [
        (Spec((2,), X), {}, {}, "spec has no nodes"),
        (SMALL, GOOD, {"name": "fc"}, "name is 'fc'"),
        (SMALL, GOOD, {"name": "a-b"}, "name is 'a-b'"),
        (SMALL, GOOD, {"inputs": np.zeros((0, 2), int)}, r"inputs has shape \(0, 2\), expected \[B, 2\]"),
        (SMALL, GOOD, {"inputs": np.array([[16, 0]])}, "inputs goes from 0 to 16, expected -16 to 15: 5 bits"),
        (SMALL, GOOD, {"inputs": np.array([[0.5, 0]])}, "inputs has dtype float.*, expected raw integers"),
        (SMALL, {}, {}, r"params has \[\], expected \['fc'\]"),
        (SMALL, {"fc": {}}, {}, r"params\['fc'\] has \[\], expected \['w'\]"),
        (SMALL, {"fc": {"w": np.ones((2, 2), int)}}, {}, r"params\['fc'\]\['w'\] has shape \(2, 2\), expected"),
        (SMALL, {"fc": {"w": np.array([[9], [0]])}}, {}, "goes from 0 to 9, expected -8 to 7"),
        (
            Spec((3, 3, 1), X).mean("pool", out=X),
            {},
            {"inputs": np.zeros((1, 3, 3, 1), int)},
            "the mean of 9 numbers needs a divider",
        ),
        (
            Spec((2,), X).dense("fc", 2, w=(F(4, -40), F(4, 40)), out=X),
            {"fc": {"w": np.ones((2, 2), int)}},
            {},
            "binary points of channels go from -40 to 40",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, spec, params, options, message):
    with pytest.raises(ValueError, match=message):
        export_hls(spec, params, tmp_path / "out", **{"inputs": ONE, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Spec((2, 2), X), r"shape is \(2, 2\)"),
        (lambda: Spec((0,), X), r"shape is \(0,\)"),
        (lambda: SMALL.dense("fc", 1, w=W, out=X), "name is 'fc', expected one that is not taken"),
        (lambda: SMALL.relu("int"), "name is 'int'"),
        (lambda: SMALL.relu("x_w"), "name is 'x_w'"),
        (lambda: SMALL.relu("2"), "name is '2'"),
        (lambda: SMALL.relu("r1", source="nothing"), "source is 'nothing', expected one of input, fc"),
        (lambda: SMALL.dense("g", 0, w=W, out=X), "number of outputs is 0"),
        (lambda: SMALL.dense("g", 2, w=(W,), out=X), "w has 1 formats"),
        (lambda: SMALL.dense("g", 2, w=W, out=X, accumulate="fast"), "accumulate is 'fast'"),
        (lambda: SMALL.dense("g", 2, w=W, out=X, accumulate="stepwise"), "expected acc"),
        (lambda: SMALL.add("g", "input", out=X), r"shapes are \(1,\) and \(2,\)"),
        (lambda: SMALL.conv("g", 1, kernel=(3, 3), w=W, out=X), r"expected \[H, W, C\]"),
        (lambda: Spec((2, 2, 1), X).conv("g", 1, kernel=(3, 0), w=W, out=X), "kernel is"),
        (lambda: Spec((2, 2, 1), X).conv("g", 1, kernel=(3, 3), w=W, out=X, strides=(1,)), "strides is"),
        (lambda: Spec((2, 2, 1), X).conv("g", 1, kernel=(3, 3), w=W, out=X, padding="same"), "padding is 'same'"),
        (lambda: Spec((2, 2, 1), X).conv("g", 1, kernel=(3, 3), w=W, out=X, padding=((0, -1), (0, 0))), "padding is"),
        (lambda: Spec((2, 2, 1), X).conv("g", 1, kernel=(3, 3), w=W, out=X, padding="VALID"), "kernel is"),
        (lambda: Spec((2, 3, 1), X).mean("g", window=(2, 2), out=X), "window is"),
    ],
)
def test_networks_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_int_forward_refuses_shapes_and_sums_that_do_not_fit():
    with pytest.raises(ValueError, match=r"x has shape \(1, 3\), expected \[..., 2\]"):
        int_forward(SMALL, GOOD, np.zeros((1, 3), int))
    with pytest.raises(ValueError, match="source is 'g'"):
        int_forward(SMALL, GOOD, ONE, keep=["g"])
    wide = Spec((2,), X).dense("fc", 1, w=W, b=F(8, -25), out=X)
    with pytest.raises(ValueError, match="the sum with the bias"):
        int_forward(wide, {"fc": {"w": GOOD["fc"]["w"], "b": np.array([1])}}, ONE)
    y, kept = int_forward(SMALL, GOOD, ONE, keep=["input", "fc"])
    np.testing.assert_array_equal(kept["fc"], y)
    np.testing.assert_array_equal(kept["input"], ONE)
