"""Integers of few ones, against search over all of them, and where points start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.compression.fixed_point import (
    FixedPoint,
    adders,
    calibrate,
    cast,
    count_ones,
    csd,
    csd_digits,
    k_hot,
    trainable_cast,
)


def ones(m):
    return abs(m).bit_count()


def test_vectors(vectors):
    v = vectors("qfx")
    for k in (1, 2, 3):
        np.testing.assert_array_equal(k_hot(v["khot_m"], k=k, word=8), v[f"khot_nearest_{k}"])
        np.testing.assert_array_equal(k_hot(v["khot_m"], k=k, word=8, mode="truncate"), v[f"khot_trunc_{k}"])


@pytest.mark.parametrize(("word", "signed"), [(2, True), (7, True), (6, False)])
def test_by_search(word, signed):
    hi = 2 ** (word - signed) - 1
    m = np.arange(-hi - 1 if signed else 0, hi + 1)
    for k in range(1, word + 2):
        near = jax.jit(lambda m, k=k: (k_hot(m, k=k, word=word, signed=signed), csd(m, k=k, word=word, signed=signed)))
        nearest, digits = (np.asarray(a).tolist() for a in near(m))
        allowed = [n for n in range(hi + 1) if ones(n) <= k]
        for wanted, found, short in zip(m.tolist(), nearest, digits, strict=True):
            if abs(wanted) > hi:  # the one word that has no opposite is a power of two
                assert found == short == wanted
                continue
            best = min(allowed, key=lambda n: (abs(n - abs(wanted)), n))
            assert found == (best if wanted >= 0 else -best)
            assert abs(short) <= hi
            assert count_ones(short, digits="csd") <= k
            if k >= word - signed:
                assert found == short == wanted
    truncated = np.asarray(k_hot(m, k=2, word=word, mode="truncate", signed=signed))
    assert (np.abs(truncated) <= np.abs(m)).all()


def test_signed_digits():
    m = np.concatenate([np.arange(-128, 128), [2**30 + 1, -(2**30) + 1]]).astype(np.int32)
    digits = np.asarray(csd_digits(m, word=31), np.int64)
    np.testing.assert_array_equal(digits @ 2 ** np.arange(32), m)
    assert not (digits[:, 1:] & digits[:, :-1]).any()
    np.testing.assert_array_equal(count_ones(m, digits="csd"), (digits != 0).sum(1))
    np.testing.assert_array_equal(count_ones(m), [ones(n) for n in m.tolist()])
    assert (count_ones(m, digits="csd") <= count_ones(m)).all()
    # Half the worst error of as many ones, in a format that has room for them.
    room = np.arange(256, dtype=np.int32)
    errors = [np.abs(np.asarray(f(room, k=2, word=12)) - room).sum() for f in (k_hot, csd)]
    assert errors[1] < 0.7 * errors[0]


def test_costs():
    w = jnp.array([[3, 0, -7], [1, 0, 8], [-6, 4, 0]])
    cost = adders(w)
    assert [int(n) for n in cost] == [2 + 1 + 2 + 1 + 3 + 1, 4 + 0 + 3, 3]
    assert int(adders(w, digits="csd").adders) == 4 + 0 + 2
    assert int(adders(w.T, axis=1).adders) == 7
    assert int(adders(k_hot(w, k=1, word=5)).multipliers) == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("word", [2, 4, 8])
def test_calibration_by_search(word, signed):
    x = jax.random.normal(jax.random.key(word), (200,)) * 3
    x = x if signed else jnp.abs(x)
    start = word - signed - int(np.ceil(np.log2(np.abs(x).max())))
    errors = {F: float(((cast(x, FixedPoint(word, F, signed)) - x) ** 2).sum()) for F in range(start - 1, start + 5)}
    assert calibrate(x, word=word, method="max", signed=signed) == start
    assert calibrate(x, word=word, signed=signed) == min(errors, key=errors.get)


def test_calibration_of_trees_and_channels():
    x = jax.random.normal(jax.random.key(0), (30, 5)) * 2.0 ** jnp.arange(-4, 6, 2)
    f = jax.jit(lambda t: calibrate(t, word=4, channel_axis=-1))({"w": x, "none": None})
    assert f["none"] is None
    np.testing.assert_array_equal(f["w"], [calibrate(x[:, i], word=4) for i in range(5)])
    other = calibrate(x.T, word=4, channel_axis=0)
    np.testing.assert_array_equal(other, f["w"][:, None])
    whole = calibrate(x, word=4)
    by_channel, by_tensor = jax.jit(lambda *fs: [((trainable_cast(x, f, word=4) - x) ** 2).sum() for f in fs])(
        f["w"], whole
    )
    assert by_channel < by_tensor
    # Powers of two exactly, nothing but 0, the smallest numbers, 16 bits.
    for value, F in ((1.0, 3), (1.5, 2), (0.0, 3), (2.0**-20, 23), (2.0**-100, 35)):
        assert calibrate(jnp.array([-value, value / 2]), word=4, method="max") == F
    assert calibrate(x.astype(jnp.bfloat16), word=4) == whole


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: k_hot(1, k=0, word=4), "k is 0, expected a positive integer"),
        (lambda: k_hot(1, k=1.0, word=4), "k is 1.0, expected a positive integer"),
        (lambda: k_hot(1, k=1, word=32), "word is 32, expected 2 to 31 bits"),
        (lambda: csd(1, k=1, word=1), "word is 1, expected 2 to 31 bits"),
        (lambda: k_hot(1, k=1, word=4, mode="floor"), "mode is 'floor', expected 'nearest' or 'truncate'"),
        (lambda: k_hot(1.0, k=1, word=4), "m has dtype float32, expected integers"),
        (lambda: count_ones(1, digits="naf"), "digits is 'naf', expected 'ones' or 'csd'"),
        (lambda: calibrate(jnp.ones(2), word=4, method="kl"), "method is 'kl', expected 'mse' or 'max'"),
        (lambda: calibrate(jnp.ones(2), word=1), "word is 1, expected 2 to 31 bits"),
        (lambda: calibrate(jnp.array([jnp.nan]), word=4), "holds NaN or infinity, expected finite numbers"),
        (lambda: calibrate(jnp.ones((0, 2)), word=4), r"shape \(0, 2\), expected at least one entry"),
        (lambda: calibrate(jnp.ones(2, jnp.int32), word=4), "dtype int32, expected floats"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
