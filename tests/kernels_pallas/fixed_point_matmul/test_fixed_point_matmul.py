"""Every implementation gives the bits of the equation in 64 bits, in all modes and at odd sizes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.compression.fixed_point import FixedPoint, requantise
from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.fixed_point_matmul import AVAILABLE, RUN, SLOWER, fixed_point_matmul, run, xla
from kernels_pallas.fixed_point_matmul.epilogue import OVERFLOWS, ROUNDINGS, finish
from kernels_pallas.fixed_point_matmul.reference import finish as naive_finish
from kernels_pallas.fixed_point_matmul.reference import reference

NAMES = tuple(RUN)
MODES = list(itertools.product(ROUNDINGS, OVERFLOWS))


def random(m, k, n, seed=0):
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.integers(-128, 128, shape), jnp.int8) for shape in ((m, k), (k, n)))
    return x, w, jnp.asarray(rng.integers(-5000, 5000, n), jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def all_modes(total, shift, word):
    return jnp.stack([finish(total, None, shift, *modes, word) for modes in MODES])


@pytest.mark.parametrize(("shift", "word"), [(0, 8), (1, 5), (6, 8), (24, 2), (31, 4)])
def test_the_epilogue_is_exact_in_all_modes(shift, word):
    """Also at the ends of int32, where adding one half first would overflow, and it is what `requantise` gives."""
    near = np.arange(-300, 300)
    total = np.concatenate([near, near * 2 ** max(0, shift - 1), [2**31 - 1, -(2**31), 2**31 - 2, 1 - 2**31]])
    total = np.clip(total, -(2**31), 2**31 - 1).astype(np.int32)
    found = all_modes(jnp.asarray(total), shift, word)
    for (rounding, overflow), m in zip(MODES, found, strict=True):
        np.testing.assert_array_equal(m, naive_finish(total, shift, rounding, overflow, word), f"{rounding} {overflow}")
    for at in (0, 6, 27):  # the two formulations share no line; three modes keep the compile time small
        rounding, overflow = MODES[at]
        out = FixedPoint(word, -shift, rounding=rounding, overflow=overflow)
        np.testing.assert_array_equal(found[at], requantise(jnp.asarray(total), frac=0, out_fmt=out))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("m", "k", "n", "rounding", "overflow"),
    [
        (1, 1, 1, "rnd", "sat"),
        (3, 130, 70, "rnd_conv", "wrap"),
        (40, 2500, 129, "trn", "sat_zero"),  # several steps of terms, with zeros after the last one
        (530, 256, 1100, "rnd_inf", "sat_sym"),  # several blocks of rows and columns, the last ones not full
    ],
)
def test_equal_to_the_equation(name, m, k, n, rounding, overflow):
    x, w, bias = random(m, k, n)
    for b in (bias, None):
        found = run(name, x, w, b, 10, rounding, overflow, 8, interpret=name != "xla")
        assert found.dtype == jnp.int8
        np.testing.assert_array_equal(found, reference(x, w, b, 10, rounding, overflow, 8))


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_sums_are_exact(name):
    """1025 products of −128 and −128 are beyond what float32 counts."""
    x, w = jnp.full((2, 4097), -128, jnp.int8), jnp.full((4097, 3), -128, jnp.int8)
    bias = jnp.array([0, 1, -1], jnp.int32)
    found = run(name, x.at[:, 0].set(-127), w, bias, 0, "trn", "wrap", 8, interpret=name != "xla")
    np.testing.assert_array_equal(found, reference(x.at[:, 0].set(-127), w, bias, 0, "trn", "wrap", 8))


def test_jit_vmap_batches_and_rows_sharded_over_devices():
    x, w, bias = random(16, 96, 24)
    call = functools.partial(fixed_point_matmul, shift=8)
    whole = jax.jit(call)(x, w, bias)
    np.testing.assert_array_equal(whole, reference(x, w, bias, 8, "rnd", "sat", 8))
    several = jax.jit(jax.vmap(call, (0, None, None)))(x.reshape(4, 4, 96), w, bias)
    np.testing.assert_array_equal(several.reshape(16, 24), whole)
    np.testing.assert_array_equal(call(x.reshape(2, 8, 96), w, bias).reshape(16, 24), whole)
    mesh = Mesh(jax.devices(), ("rows",))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows")))
    np.testing.assert_array_equal(jax.jit(call)(split, w, bias), whole)
    mapped = jax.shard_map(
        lambda x: run("pallas_tpu", x, w, bias, 8, "rnd", "sat", 8, interpret=True),
        mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"), check_vma=False,
    )  # fmt: skip
    np.testing.assert_array_equal(mapped(x), whole)


def test_no_gradient():
    x, w, _ = random(2, 3, 4)
    with pytest.raises(TypeError, match="real- or complex-valued inputs"):
        jax.grad(lambda x: fixed_point_matmul(x, w, shift=1).sum())(x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((2, 3))}, TypeError, "x has dtype float32, expected int8"),
        ({"w": jnp.ones((3, 4), jnp.int32)}, TypeError, "w has dtype int32"),
        ({"bias": jnp.ones(4, jnp.int8)}, TypeError, "bias has dtype int8, expected int32"),
        ({"w": jnp.ones((2, 4), jnp.int8)}, ValueError, "x has shape"),
        ({"w": jnp.ones(3, jnp.int8)}, ValueError, "x has shape"),
        ({"x": jnp.ones((0, 3), jnp.int8)}, ValueError, "none of them zero"),
        ({"bias": jnp.ones(3, jnp.int32)}, ValueError, r"bias has shape \(3,\), expected \(4,\)"),
        (
            {"x": jnp.ones((1, 131072), jnp.int8), "w": jnp.ones((131072, 4), jnp.int8)},
            ValueError,
            "there are 131072 terms",
        ),
        ({"shift": -1}, ValueError, "shift is -1, expected a Python integer from 0 to 31"),
        ({"shift": 32}, ValueError, "shift is 32"),
        ({"shift": True}, ValueError, "shift is True"),
        ({"word": 9}, ValueError, "word is 9, expected a Python integer from 2 to 8"),
        ({"word": 1}, ValueError, "word is 1"),
        ({"rounding": "nearest"}, ValueError, "rounding is 'nearest', expected one of rnd,"),
        ({"overflow": "clip"}, ValueError, "overflow is 'clip', expected one of sat,"),
        ({"implementation": "cuda"}, ValueError, "expected one of"),
        ({"implementation": "pallas_tpu"}, ValueError, "cannot run on platform 'cpu'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": jnp.ones((2, 3), jnp.int8), "w": jnp.ones((3, 4), jnp.int8), "shift": 1} | change
    with pytest.raises(error, match=message):
        fixed_point_matmul(arguments.pop("x"), arguments.pop("w"), **arguments)


@pytest.mark.parametrize("rows", [2, 8])
def test_one_row_as_several_is_the_same_row(rows):
    """What runs on CPUs and on GPUs, where a product of one row is slow."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-128, 128, shape), jnp.int8) for shape in ((1, 40), (40, 7)))
    np.testing.assert_array_equal(xla.no_fewer(x, w, rows), np.asarray(x, np.int32) @ np.asarray(w, np.int32))


def test_gpus_take_the_librarys_product_unless_the_kernel_is_named():
    assert resolve_implementation(None, AVAILABLE, "gpu", slower=SLOWER) == "xla"
    assert resolve_implementation("pallas_gpu", AVAILABLE, "gpu", slower=SLOWER) == "pallas_gpu"
    assert resolve_implementation(None, AVAILABLE, "tpu", slower=SLOWER) == "pallas_tpu"
