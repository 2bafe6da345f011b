"""Casts are those of ap_fixed, bit for bit, for all floats there are."""

import collections
import dataclasses
import itertools
import types

import apytypes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.compression.fixed_point import FixedPoint, add_format, cast, dot_format, from_int, multiply_format, to_int
from jaxaccel.compression.fixed_point.formats import OVERFLOWS, ROUNDINGS
from jaxaccel.compression.fixed_point.rounding import (
    power_of_two,
    round_and_fit,
    round_as_floats,
    rounds_as_floats,
    take_apart,
)
from tests.compression.fixed_point.exact import exact_casts

MODES = list(itertools.product(ROUNDINGS, OVERFLOWS, (True, False)))


def configurations(v):
    return [
        FixedPoint(word, word - integer, bool(signed), ROUNDINGS[rounding], OVERFLOWS[overflow])
        for word, integer, rounding, overflow, signed in v["cast_cfg"].tolist()
    ]


def test_every_configuration_of_the_compiled_headers(vectors):
    v = vectors("qfx")
    x, formats = jnp.asarray(v["cast_x"], jnp.float32), configurations(v)
    assert len(formats) == 308
    eager = np.stack([to_int(x, f) for f in formats])
    assert (eager != v["cast_int"]).sum() == 0

    # All of them in one program, mapped over rows; formats of the same modes at once, as compilation takes long.
    groups = collections.defaultdict(list)
    for i, f in enumerate(formats):
        groups[f.rounding, f.overflow, f.signed].append(i)

    @jax.jit
    @jax.vmap
    def together(row):
        results = []
        for (rounding, overflow, signed), members in groups.items():
            words, fracs = (np.array([[getattr(formats[i], k)] for i in members]) for k in ("word", "frac"))
            kind = types.SimpleNamespace(word=words, rounding=rounding, overflow=overflow, signed=signed)
            results.append(round_and_fit(take_apart(row), fracs, kind)[0])
        return jnp.concatenate(results), jnp.stack([to_int(row, f) for f in formats[::19]])

    compiled, some = (np.moveaxis(np.asarray(a), 1, 0).reshape(-1, 133) for a in together(x.reshape(7, 19)))
    assert (compiled != v["cast_int"][list(itertools.chain(*groups.values()))]).sum() == 0
    assert (some != v["cast_int"][::19]).sum() == 0


def padded(x):
    """One shape for all numbers that are cast outside jit, so that each operation is compiled once."""
    return np.pad(np.asarray(x, np.float32), (0, 150 - len(x)))


def awkward_floats(dtype, frac):
    """Ties and their neighbours, ends of ranges, the smallest and largest numbers."""
    kind = np.finfo(dtype)
    steps = np.array([0, 0.5, 1, 1.5, 2, 2.5, 3.5, 7.5, 8, 127.5, 128, 255.5, 2**20 + 0.5, 2**30, 2**31, 2**32], dtype)
    values = [np.ldexp(steps, -frac)] if abs(frac) < 90 else []
    values += [np.array([kind.tiny, kind.smallest_subnormal, kind.max, 0.49999997, 8388609.0, 16777215.0], dtype)]
    values = np.concatenate(values).astype(dtype)
    with np.errstate(over="ignore"):
        values = np.concatenate([values, np.nextafter(values, dtype(0)), np.nextafter(values, dtype(np.inf))])
    values = values[np.isfinite(values)]
    return np.concatenate([values, -values])


@pytest.mark.parametrize(("word", "frac"), [(2, 0), (5, -3), (8, 12), (31, 7), (24, 126), (12, -126)])
def test_awkward_numbers_in_every_mode(word, frac):
    x = awkward_floats(np.float32, frac)
    x = padded(x)
    for rounding, overflow, signed in MODES:
        fmt = FixedPoint(word, frac, signed, rounding, overflow)
        np.testing.assert_array_equal(to_int(x, fmt), exact_casts(x, fmt), err_msg=str(fmt))


@pytest.mark.usefixtures("x64")
def test_float64():
    x = awkward_floats(np.float64, 9)
    x = np.concatenate([x, [2.0**60 + 2**20, -(2.0**52) - 1, 1.0 + 2.0**-52]])
    for rounding, overflow in itertools.product(ROUNDINGS, OVERFLOWS[::3]):
        fmt = FixedPoint(31, 9, True, rounding, overflow)
        np.testing.assert_array_equal(to_int(x, fmt), exact_casts(x, fmt), err_msg=str(fmt))
        q = cast(x, fmt)
        assert q.dtype == jnp.float64
        np.testing.assert_array_equal(q, np.asarray(to_int(x, fmt)) / 512.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_all_numbers_of_sixteen_bits(dtype):
    x = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    x = x[np.flatnonzero(jnp.isfinite(x))]
    exact = np.asarray(x).astype(np.float64)
    # In float64 v + 1/2 of such short numbers has the right floor, if v is 0 or far from the smallest.
    v = exact * 2.0**5
    nearest = np.clip(np.floor(v + 0.5), -128, 127)
    down = np.where(exact < 0, np.minimum(np.floor(v), -1), np.floor(v))

    @jax.jit
    def casts(x):
        fmt = FixedPoint(8, 5)
        return to_int(x, fmt), to_int(x, dataclasses.replace(fmt, rounding="trn")), cast(x, fmt)

    raw, truncated, q = casts(x)
    np.testing.assert_array_equal(raw, nearest)
    np.testing.assert_array_equal(truncated, np.clip(down, -128, 127))
    assert q.dtype == jnp.float32
    np.testing.assert_array_equal(q, nearest / 32)


APY_ROUNDING = {r: getattr(apytypes.QuantizationMode, r.upper()) for r in ROUNDINGS}
APY_OVERFLOW = {"sat": apytypes.OverflowMode.SAT, "wrap": apytypes.OverflowMode.WRAP}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(2, 31),
    st.integers(-12, 40),
    st.booleans(),
    st.sampled_from(ROUNDINGS),
    st.sampled_from(list(APY_OVERFLOW)),
    st.integers(0, 2**32 - 1),
)
def test_equals_apytypes(word, frac, signed, rounding, overflow, seed):
    rng = np.random.default_rng(seed)
    scale = 2.0 ** (rng.integers(-3, 3, 150) + word - frac - rng.integers(0, word, 150))
    x = (rng.standard_normal(150) * scale).astype(np.float32)
    x[::3] = np.ldexp(np.round(np.ldexp(x[::3], frac + 1)), -frac - 1)  # ties
    # 64 bits in all: the version tested with does not wrap what comes from longer words.
    x = np.ldexp(np.round(np.ldexp(x, frac + 20)), -frac - 20)
    wide = apytypes.APyFixedArray.from_float(x, word - frac + 7, frac + 20)
    modes = {"quantization": APY_ROUNDING[rounding], "overflow": APY_OVERFLOW[overflow]}
    if signed:
        theirs = wide.cast(word - frac, frac, **modes).to_numpy()
    else:
        # Their numbers have a sign: saturate by one more bit and then at 0; the low bits are the same.
        theirs = wide.cast(word + 1 - frac, frac, **modes).to_numpy()
        theirs = theirs % 2.0 ** (word - frac) if overflow == "wrap" else np.maximum(theirs, 0)
    ours = to_int(x, FixedPoint(word, frac, signed, rounding, overflow))
    np.testing.assert_array_equal(np.ldexp(np.asarray(ours, np.float64), -frac), theirs)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_laws(rounding):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(-3.9, 3.9, 150), jnp.float32)
    fmt = FixedPoint(8, 5, rounding=rounding)
    q = cast(x, fmt)
    np.testing.assert_array_equal(cast(q, fmt), q)
    np.testing.assert_array_equal(from_int(to_int(x, fmt), fmt), q)
    error = np.abs(np.asarray(q, np.float64) - np.asarray(x, np.float64))
    assert error.max() < fmt.resolution if rounding.startswith("trn") else error.max() <= fmt.resolution / 2
    # Numbers of 12 bits, so that the sum with the period is exact in float32.
    short = jnp.round(x * 256) / 256
    wrap = dataclasses.replace(fmt, overflow="wrap")
    for periods in (0, 1, -3, 64) if rounding in ("rnd", "rnd_min_inf", "rnd_conv", "trn") else (0,):  # not of the sign
        np.testing.assert_array_equal(cast(short + periods * 8.0, wrap), cast(short, wrap))


def test_wide_words_leave_a_network_as_it_is():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (200, 16))
    w1, w2 = jax.random.normal(keys[1], (16, 16)) / 4, jax.random.normal(keys[2], (16, 10)) / 4
    fmt = FixedPoint(24, 12)

    def network(x, w1, w2, cast=lambda x: x):
        return cast(jax.nn.relu(cast(cast(x) @ cast(w1))) @ cast(w2))

    exact, fixed = jax.jit(lambda *a: (network(*a), network(*a, lambda x: cast(x, fmt))))(x, w1, w2)
    assert (exact.argmax(-1) == fixed.argmax(-1)).all()
    # About 16 products whose factors are off by 2^-13 each, twice.
    assert jnp.abs(exact - fixed).max() < 16 * 2 * 2**-13


def test_numbers_that_are_not_finite():
    x = padded([jnp.nan, jnp.inf, -jnp.inf])
    expected = {"sat": [0, 7, -8], "sat_sym": [0, 7, -7], "sat_zero": [0, 0, 0], "wrap": [0, 0, 0]}
    for frac in (1, -126, 126):
        for overflow, raw in expected.items():
            assert to_int(x, FixedPoint(4, frac, overflow=overflow)).tolist()[:3] == raw
    q = np.asarray(cast(x, FixedPoint(4, 1)))
    assert np.isnan(q[0])
    assert q[1:3].tolist() == [3.5, -4.0]


def test_gradients_pass_inside_the_range():
    x = jnp.array([0.3, 3.74, 3.76, -4.2, -4.3, 9.0, jnp.inf])
    fmt = FixedPoint(4, 1)  # rounds to integers -8..7
    inside = [1, 1, 0, 1, 0, 0, 0]

    @jax.jit
    def slopes(x):
        formats = [dataclasses.replace(fmt, overflow=o) for o in ("sat", "wrap", "sat_sym")]
        back = [jax.grad(lambda x: cast(x, f).sum())(x) for f in formats]  # noqa: B023
        half = jax.grad(lambda x: cast(x, fmt).sum())(x.astype(jnp.bfloat16))
        return *back, half, jax.jvp(lambda x: cast(x, fmt), (x,), (2 * jnp.ones_like(x),))[1]

    saturated, wrapped, symmetric, half, forward = slopes(x)
    assert saturated.tolist() == inside
    assert forward.tolist() == [2 * i for i in inside]
    assert wrapped.tolist() == [1] * 7
    assert symmetric.tolist() == [1, 1, 0, 0, 0, 0, 0]  # -8 has no opposite
    assert half.dtype == jnp.bfloat16


def test_channels_and_sharding():
    x = jax.random.normal(jax.random.key(0), (16, 3)) * 4
    formats = [FixedPoint(5, frac) for frac in (0, 2, 7)]
    apart = jax.jit(lambda x: jnp.stack([cast(x[:, i], f) for i, f in enumerate(formats)], -1))(x)
    sharding = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    together = jax.jit(lambda x: cast(x, formats))(jax.device_put(x, sharding))
    assert together.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_array_equal(from_int(to_int(x, formats), formats), apart)


def test_formats():
    a, b = FixedPoint(8, 5), FixedPoint(6, 7, signed=False)
    assert (a.min, a.max, a.integer_bits, b.lo, b.hi, b.integer_bits) == (-4.0, 127 / 32, 3, 0, 63, -1)
    assert FixedPoint(8, 5, overflow="sat_sym").lo == -127
    for fmt, numbers in (
        (multiply_format(a, b), [x * y for x in (a.min, a.max) for y in (b.min, b.max)]),
        (add_format(a, b), [x + y for x in (a.min, a.max) for y in (b.min, b.max)]),
        (add_format(b, b), [2 * b.max, b.min]),
        (add_format(a, a, 5), [5 * a.min, 5 * a.max]),
        (dot_format(a, b, 33), [33 * a.min * b.max, 33 * a.max * b.max]),
    ):
        assert from_int(to_int(padded(numbers), fmt), fmt).tolist()[: len(numbers)] == numbers
        assert fmt.signed is (fmt != add_format(b, b))
    assert hash(a) == hash(FixedPoint(8, 5))
    assert a != FixedPoint(8, 5, overflow="wrap")


def test_powers_of_two_are_exact():
    exponents = np.arange(-126, 128)
    np.testing.assert_array_equal(jax.jit(power_of_two)(exponents), np.ldexp(np.float32(1), exponents))


def test_dtypes_that_hold_the_words():
    fmt = FixedPoint(9, 3)
    short = jax.jit(
        lambda m, x: (from_int(m, fmt, jnp.bfloat16), cast(x, fmt, jnp.bfloat16), cast(x, FixedPoint(25, 3)))
    )
    held, small, wide = short(jnp.array([-256, 255]), jnp.array([-99.0, 5.25]))
    assert held.tolist() == [-32.0, 31.875]
    assert small.tolist() == [-32.0, 5.25]
    assert wide.tolist() == [-99.0, 5.25]
    assert (held.dtype, small.dtype, wide.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for call in (
        lambda: cast(jnp.ones(2), FixedPoint(10, 3), jnp.bfloat16),
        lambda: cast(jnp.ones(2), FixedPoint(26, 3)),
        lambda: from_int(jnp.ones(2, jnp.int32), FixedPoint(25, 3, signed=False)),
    ):
        with pytest.raises(ValueError, match=r"word is \d+, and \w+ holds all words of up to \d+ bits"):
            call()
    with pytest.raises(ValueError, match="frac is -14 and word 4, which float16 does not hold"):
        from_int(jnp.array([1]), FixedPoint(4, -14), jnp.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word": 1}, "word is 1, expected 2 to 31 bits for a signed format"),
        ({"word": 0, "signed": False}, "word is 0, expected 1 to 31 bits for an unsigned format"),
        ({"word": 32}, "word is 32, expected 2 to 31"),
        ({"word": 8.0}, "word is 8.0, expected a Python integer"),
        ({"word": True}, "word is True, expected a Python integer"),
        ({"word": np.int32(8)}, "expected a Python integer"),
        ({"frac": 1.5}, "frac is 1.5, expected a Python integer"),
        ({"frac": 127}, "frac is 127, expected -126 to 126"),
        ({"signed": 1}, "signed is 1, expected True or False"),
        ({"rounding": "nearest"}, "rounding is 'nearest', expected one of rnd, rnd_zero"),
        ({"rounding": None}, "rounding is None, expected one of"),
        ({"overflow": "clip"}, "overflow is 'clip', expected one of sat, sat_zero, sat_sym, wrap"),
    ],
)
def test_bad_formats(options, message):
    with pytest.raises(ValueError, match=message):
        FixedPoint(**{"word": 8, "frac": 3, **options})


def test_bad_arguments():
    f = FixedPoint(8, 3)
    with pytest.raises(ValueError, match="x has dtype int32, expected floats"):
        cast(jnp.array([1, 2]), f)
    with pytest.raises(ValueError, match="m has dtype float32, expected integers"):
        from_int(jnp.ones(2), f)
    with pytest.raises(ValueError, match="fmt is 8, expected a FixedPoint or a sequence of them"):
        cast(jnp.ones(2), 8)
    with pytest.raises(ValueError, match=r"fmt is \[\], expected"):
        to_int(jnp.ones(2), [])
    with pytest.raises(ValueError, match="channels that differ in more than frac"):
        cast(jnp.ones(2), [f, FixedPoint(7, 3)])
    with pytest.raises(ValueError, match="fmt has 2 channels, expected as many as the last axis"):
        cast(jnp.ones(3), [f, f])
    with pytest.raises(ValueError, match="the product of 16 and 16 bits needs word 32, expected at most 31 bits"):
        multiply_format(FixedPoint(16, 3), FixedPoint(16, 3))
    with pytest.raises(ValueError, match="the sum of 2 numbers of 31 and 31 bits needs word 32"):
        add_format(FixedPoint(31, 3), FixedPoint(31, 3))
    with pytest.raises(ValueError, match="terms is 0, expected at least 1"):
        add_format(f, f, 0)


@pytest.mark.parametrize("overflow", ["sat", "sat_sym", "sat_zero"])
def test_rounding_in_floats_gives_the_bits_of_rounding_in_integers(overflow):
    """Any bits of a float, and those next to halves; F as far as learned points go."""
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 20000, np.uint32).view(np.float32)
    halves = np.arange(-300, 300, dtype=np.float32) / 2
    beside = [np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf)]
    special = np.array([0.49999997, -0.0, 8388607.5], np.float32)
    x = jnp.asarray(np.concatenate([any_bits, halves, *beside, special]))

    @jax.jit
    def both(x, F):
        found = []
        for word, signed in ((4, True), (25, True), (3, False)):
            kind = FixedPoint(word, 0, signed, "rnd", overflow)
            assert rounds_as_floats(kind)
            m, inside = round_and_fit(take_apart(x), F, kind)
            found.append((jnp.where(jnp.isnan(x), jnp.nan, m.astype(x.dtype)), inside, *round_as_floats(x, F, kind)))
        return found

    for F in (-30, 0, 3, 56):
        for m, inside, by_floats, inside_by_floats in both(x, F):
            np.testing.assert_array_equal(by_floats, m)
            np.testing.assert_array_equal(jnp.signbit(by_floats) & ~jnp.isnan(m), jnp.signbit(m) & ~jnp.isnan(m))
            np.testing.assert_array_equal(inside_by_floats, inside)
    assert not rounds_as_floats(FixedPoint(4, 0, overflow="wrap"))
    assert not rounds_as_floats(FixedPoint(4, 0, rounding="trn"))
    assert not rounds_as_floats(FixedPoint(4, 0), np.array([3, -90]))
