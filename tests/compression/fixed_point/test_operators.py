"""Operators are exact up to their one cast: against compiled C++, and against rational and 64-bit arithmetic."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.compression.fixed_point import (
    FixedPoint,
    cast,
    exact_matmul,
    fold_batch_norm,
    from_int,
    qadd,
    qbatchnorm,
    qdot,
    qmean,
    qmul,
    requantise,
    to_int,
)
from jaxaccel.compression.fixed_point.formats import OVERFLOWS, ROUNDINGS
from tests.compression.fixed_point.exact import exact_cast, exact_casts

X, W = FixedPoint(8, 5), FixedPoint(6, 5)
BOTH = {"x_fmt": X, "w_fmt": W}
HARDWARE = {"rounding": "trn", "overflow": "wrap"}


def columns(x, w):
    """The six results that the C++ program printed."""
    wide = {**BOTH, "acc_fmt": FixedPoint(24, 12, **HARDWARE)}
    product = qmul(x[:, 0], w[0], a_fmt=X, b_fmt=W)
    product_fmt = FixedPoint(14, 10, **HARDWARE)
    return (
        qdot(x, w, acc_fmt=FixedPoint(10, 5, **HARDWARE), accumulate="stepwise", **BOTH),
        qdot(x, w, acc_fmt=FixedPoint(10, 5), accumulate="stepwise", **BOTH),
        qdot(x, w, **wide),
        qdot(x, w, out_fmt=FixedPoint(8, 5), **wide),
        qdot(x, w, out_fmt=FixedPoint(6, 2, rounding="rnd_conv", overflow="wrap"), **wide),
        qadd(product, w[1], a_fmt=product_fmt, b_fmt=W, out_fmt=FixedPoint(8, 5)),
    )


@pytest.mark.parametrize("terms", [5, 33])
def test_dot_products_of_compiled_code(vectors, terms):
    v = vectors("qfx")
    x = to_int(jnp.asarray(v[f"dot{terms}_x"], jnp.float32), X)
    w = to_int(jnp.asarray(v[f"dot{terms}_w"], jnp.float32), W)
    out = v[f"dot{terms}_out"].T
    np.testing.assert_array_equal(jnp.stack(jax.jit(columns)(x, w)), out)
    # The accumulator that is cast at each step is another function than one cast of the exact sum.
    assert (out[1] != qdot(x, w, out_fmt=FixedPoint(10, 5), **BOTH)).mean() > 0.3


def test_eager_and_mapped(vectors):
    v = vectors("qfx")
    x, w = to_int(jnp.asarray(v["dot5_x"], jnp.float32), X), to_int(jnp.asarray(v["dot5_w"], jnp.float32), W)
    np.testing.assert_array_equal(jnp.stack(columns(x, w)), v["dot5_out"].T)
    mapped = jax.jit(jax.vmap(lambda row: jnp.stack(columns(row[None], w))))(x)
    np.testing.assert_array_equal(mapped[:, :, 0], v["dot5_out"])


@pytest.mark.parametrize("words", [(8, 8), (8, 9), (12, 12), (16, 8)])
def test_sums_are_exact_at_every_width(words):
    # The last two sums leave what float32 holds exactly, and are taken in int32.
    rng = np.random.default_rng(0)
    x_fmt, w_fmt = (FixedPoint(n, 3) for n in words)
    x = rng.integers(x_fmt.lo, x_fmt.hi + 1, (3, 4, 70), np.int32)
    w = rng.integers(w_fmt.lo, w_fmt.hi + 1, (70, 5), np.int32)
    x[0, 0], w[:, 0] = x_fmt.lo, w_fmt.lo
    total = x.astype(np.int64) @ w.astype(np.int64)
    dot = jax.jit(functools.partial(qdot, x_fmt=x_fmt, w_fmt=w_fmt))
    np.testing.assert_array_equal(dot(x, w), total)
    formats = tuple(FixedPoint(words[1], frac) for frac in (0, 3, 5, -2, 9))
    channels = jax.jit(lambda x, w: qdot(x, w, x_fmt=x_fmt, w_fmt=formats, out_fmt=FixedPoint(9, 2)))(x, w)
    for i, f in enumerate(formats):
        expected = exact_casts([Fraction(t) / 2 ** (3 + f.frac) for t in total[..., i].ravel().tolist()], X9)
        np.testing.assert_array_equal(channels[..., i].ravel(), expected)


X9 = FixedPoint(9, 2)


def test_order_matters_unless_it_truncates_and_wraps():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (40, 16), np.int32), rng.integers(-32, 32, (16, 3), np.int32)
    step = jax.jit(functools.partial(qdot, accumulate="stepwise", **BOTH), static_argnames="acc_fmt")
    free, bound = FixedPoint(12, 10, **HARDWARE), FixedPoint(8, 5)
    np.testing.assert_array_equal(step(x, w, acc_fmt=free), step(x[:, ::-1], w[::-1], acc_fmt=free))
    np.testing.assert_array_equal(step(x, w, acc_fmt=free), qdot(x, w, acc_fmt=free, **BOTH))
    assert (step(x, w, acc_fmt=bound) != step(x[:, ::-1], w[::-1], acc_fmt=bound)).mean() > 0.3
    # One by one in rational numbers.
    total = np.zeros(3, np.int64)
    for xk, wk in zip(x[0].tolist(), w.tolist(), strict=True):
        total = np.array(
            [
                exact_cast(Fraction(t, 32) + Fraction(xk * wki, 1024), bound)
                for t, wki in zip(total.tolist(), wk, strict=True)
            ]
        )
    np.testing.assert_array_equal(step(x, w, acc_fmt=bound)[0], total)


def test_requantise_in_every_mode():
    rng = np.random.default_rng(0)
    m = rng.integers(-(2**31), 2**31, 40) >> rng.integers(0, 31, 40)
    m = np.concatenate([m, [0, 1, -1, 3, -3, 2**30, -(2**30), 2**31 - 1, -(2**31), -(2**31) + 1]]).astype(np.int32)
    for (rounding, overflow), frac in itertools.product(
        itertools.product(ROUNDINGS, OVERFLOWS), (-40, -3, 0, 1, 31, 32, 33, 90)
    ):
        fmt = FixedPoint(9, 0, True, rounding, overflow)
        exact = exact_casts([Fraction(n) / Fraction(2) ** frac for n in m.tolist()], fmt)
        np.testing.assert_array_equal(requantise(m, frac=frac, out_fmt=fmt), exact, err_msg=f"{fmt} from {frac}")
    for dtype in (jnp.int8, jnp.int16):
        assert requantise(jnp.array([-128, 127], dtype), frac=1, out_fmt=FixedPoint(7, 0)).tolist() == [-64, 63]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_small_operators_in_rational_numbers(rounding):
    rng = np.random.default_rng(0)
    a_fmt, b_fmt, out = FixedPoint(7, 2), FixedPoint(5, 6, signed=False), FixedPoint(6, 3, rounding=rounding)
    a, b = rng.integers(-64, 64, (6, 8), np.int32), rng.integers(0, 32, (6, 8), np.int32)
    fa = [Fraction(n, 4) for n in a.ravel().tolist()]
    fb = [Fraction(n, 64) for n in b.ravel().tolist()]
    pairs = list(zip(fa, fb, strict=True))
    formats = {"a_fmt": a_fmt, "b_fmt": b_fmt, "out_fmt": out}

    @jax.jit
    def together(a, b):
        norm = qbatchnorm(a, b[0], a[0], x_fmt=a_fmt, a_fmt=b_fmt, b_fmt=a_fmt, out_fmt=out)
        means = [qmean(a[:, :n], axis=1, fmt=a_fmt, out_fmt=out) for n in (3, 4, 7)]
        coarse = qmean(a[:3], axis=(0, 1), fmt=a_fmt, out_fmt=FixedPoint(6, -1, rounding=rounding))
        return qadd(a, b, **formats), qmul(a, b, **formats), norm, means, coarse

    total, product, norm, means, coarse = together(a, b)
    np.testing.assert_array_equal(total.ravel(), exact_casts([x + y for x, y in pairs], out))
    np.testing.assert_array_equal(product.ravel(), exact_casts([x * y for x, y in pairs], out))
    line = exact_casts([x * fb[i % 8] + fa[i % 8] for i, x in enumerate(fa)], out)
    np.testing.assert_array_equal(norm.ravel(), line)
    for n, mean in zip((3, 4, 7), means, strict=True):
        np.testing.assert_array_equal(mean, exact_casts([sum(fa[8 * i : 8 * i + n]) / n for i in range(6)], out))
    assert coarse == exact_cast(sum(fa[:24]) / 24, FixedPoint(6, -1, rounding=rounding))


def test_exact_results_need_no_format():
    a, b = FixedPoint(7, 2), FixedPoint(5, 6, signed=False)
    assert qadd(jnp.array([-64]), jnp.array([31]), a_fmt=a, b_fmt=b).tolist() == [-64 * 16 + 31]
    assert qmul(jnp.array([-64]), jnp.array([31]), a_fmt=a, b_fmt=b).tolist() == [-64 * 31]
    both = jax.jit(lambda a0, b0, x, w: (qadd(a0, b0, a_fmt=a, b_fmt=b), qdot(x, w, **BOTH)))
    total, product = both(jnp.array([-16.0]), jnp.array([31 / 64]), jnp.ones((1, 3)), jnp.ones(3) / 2)
    assert total.tolist() == [-16 + 31 / 64]
    assert product.tolist() == [1.5]


def test_floats_give_the_same_numbers_and_straight_through_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    out = FixedPoint(7, 4)
    x = cast(jax.random.normal(keys[0], (12, 6)), X)
    w = cast(jax.random.normal(keys[1], (6, 3)) / 2, W)
    a, b = cast(jax.random.normal(keys[2], (3,)), W), cast(jax.random.normal(keys[3], (3,)), X)

    def fixed(x, w, a, b):
        y = qdot(x, w, out_fmt=X, **BOTH)
        z = qbatchnorm(y, a, b, x_fmt=X, a_fmt=W, b_fmt=X, out_fmt=out)
        z = qmul(z, z, a_fmt=out, b_fmt=out, out_fmt=X)
        return qadd(qmean(z, axis=0, fmt=X, out_fmt=out), b, a_fmt=out, b_fmt=X, out_fmt=out)

    def real(x, w, a, b):
        z = cast((cast(x @ w, X)) * a + b, out)
        z = cast(z * z, X)
        return cast(cast(z.mean(0), out) + b, out)

    def weighted(f):
        return lambda *args: (f(*args) * jnp.array([1.0, -2.0, 3.0])).sum()

    args = x, w, a, b
    (value, ours), (expected, theirs) = jax.jit(
        lambda args: [jax.value_and_grad(weighted(f), (0, 1, 2, 3))(*args) for f in (fixed, real)]
    )(args)
    assert value == expected
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # sums of float32 in another order
        assert jnp.abs(one).max() > 0

    @jax.jit
    def kinds(x, w):
        """On floats, on raw integers, and on bfloat16, which holds words of nine bits."""
        results = []
        for options in ({"out_fmt": X}, {"acc_fmt": X, "accumulate": "stepwise"}):
            raw = qdot(to_int(x, X), to_int(w, W), **options, **BOTH)
            half = qdot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), **options, **BOTH)
            results.append((qdot(x, w, **options, **BOTH), from_int(raw, X), half))
        return results

    for one, *others in kinds(x, w):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_gradients_stop_where_the_result_saturates():
    f = FixedPoint(4, 0)
    x, w = jnp.array([[3.0, 4.0], [1.0, 2.0]]), jnp.array([1.0, 1.0])
    formats = {"x_fmt": f, "w_fmt": f}
    out = FixedPoint(3, 0)
    wraps = FixedPoint(3, 0, overflow="wrap")

    @jax.jit
    def gradients(x):
        return [jax.grad(lambda x: qdot(x, w, out_fmt=f, **formats).sum())(x) for f in (out, wraps)]  # noqa: B023

    assert [g.tolist() for g in gradients(x)] == [[[0, 0], [1, 1]], [[1, 1], [1, 1]]]


def test_sharded_rows():
    x = jax.random.randint(jax.random.key(0), (16, 6), -128, 128)
    w = jax.random.randint(jax.random.key(1), (6, 4), -32, 32)
    mesh = Mesh(jax.devices(), ("rows",))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    exact = functools.partial(qdot, out_fmt=X, **BOTH)
    stepwise = functools.partial(qdot, acc_fmt=X, accumulate="stepwise", **BOTH)
    for f in (exact, stepwise):
        y = jax.jit(f)(jax.device_put(x, sharding), w)
        np.testing.assert_array_equal(y, f(x, w))
        assert y.sharding.is_equivalent_to(sharding, 2)
    local = jax.shard_map(
        stepwise, mesh=mesh, in_specs=(PartitionSpec("rows"), PartitionSpec()), out_specs=PartitionSpec("rows")
    )
    np.testing.assert_array_equal(jax.jit(local)(x, w), stepwise(x, w))


def test_exact_matmul():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (9, 50)), rng.integers(-32, 32, (50, 7))
    y = exact_matmul(jnp.asarray(x / 2.0**9, jnp.float32), jnp.asarray(w * 2.0**4, jnp.float32), x_fmt=X, w_fmt=W)
    np.testing.assert_array_equal(y, (x @ w) / 32)
    with pytest.raises(
        ValueError, match="a sum of 1025 products of 8 and 8 bits can reach 16793600 steps, expected at most"
    ):
        exact_matmul(jnp.ones((1, 1025)), jnp.ones((1025, 1)), x_fmt=X, w_fmt=X)


def test_folding_is_batch_normalisation():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (50, 4)) * 3 + 1
    scale, bias = jax.random.normal(keys[1], (4,)), jax.random.normal(keys[2], (4,))
    mean, var = x.mean(0), x.var(0)
    expected = (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias
    a, b = fold_batch_norm(mean, var, scale=scale, bias=bias, eps=1e-3)
    np.testing.assert_allclose(a * x + b, expected, rtol=1e-5, atol=1e-5)  # float32
    a, b = fold_batch_norm(mean, var)
    np.testing.assert_allclose((a * x + b).var(0), 1, rtol=1e-4)


I = np.ones((2, 3), np.int32)  # noqa: E741
W16 = FixedPoint(16, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: qdot(np.ones((1, 3), np.int32), np.ones((3, 1), np.int32), x_fmt=W16, w_fmt=W16),
            r"a sum of 3 products of 16 and 16 bits can reach 3221225472 = 2\^31.., expected at most 2\^31 - 1",
        ),
        (
            lambda: qdot(I, I[0], acc_fmt=FixedPoint(28, 1), accumulate="stepwise", **BOTH),
            "the sum of an accumulator of 28 bits at frac 1 and a product of 8 and 6 bits at frac 10 can reach",
        ),
        (lambda: qmul(I, I, a_fmt=W16, b_fmt=FixedPoint(17, 1)), "the product of 16 and 17 bits can reach 2147483648"),
        (
            lambda: qadd(I, I, a_fmt=FixedPoint(30, 0), b_fmt=FixedPoint(8, 3), out_fmt=X),
            "the sum of 30 and 8 bits at frac 0 and 3 can reach 4294967424",
        ),
        (
            lambda: qbatchnorm(I, I, I, x_fmt=W16, a_fmt=FixedPoint(17, 5), b_fmt=X, out_fmt=X),
            "the product of 16 times 17 bits can reach",
        ),
        (
            lambda: qbatchnorm(I, I, I, x_fmt=W16, a_fmt=W16, b_fmt=FixedPoint(24, 2), out_fmt=X),
            "the sum of 16 times 16 bits at frac 10, and 24 bits at frac 2 can reach",
        ),
        (lambda: qmean(I, axis=1, fmt=FixedPoint(30, 0), out_fmt=FixedPoint(8, 2)), "the mean of 3 numbers of 30 bits"),
        (lambda: qmean(I, axis=1, fmt=FixedPoint(8, 60), out_fmt=FixedPoint(8, 2)), "the mean of 3 numbers of 8 bits"),
        (lambda: qmean(I[:0], axis=0, fmt=X, out_fmt=X), "expected at least one entry along axis 0"),
        (
            lambda: qdot(I, I[0], accumulate="pairwise", **BOTH),
            "accumulate is 'pairwise', expected 'exact' or 'stepwise'",
        ),
        (lambda: qdot(I, I[0], accumulate="stepwise", **BOTH), "acc_fmt is None, expected the accumulator's format"),
        (
            lambda: qdot(I, I.T, x_fmt=X, w_fmt=[W, W], acc_fmt=X, accumulate="stepwise"),
            "w_fmt has channels, expected one format",
        ),
        (
            lambda: qdot(I, I.T, x_fmt=X, w_fmt=[W] * 3),
            "w_fmt has 3 channels and w shape .3, 2., expected one for each",
        ),
        (lambda: qdot(I * 1.0, I.T * 1.0, x_fmt=X, w_fmt=[W, W]), "out_fmt is None, expected a format for floats"),
        (lambda: qdot(I, I, **BOTH), r"x has shape \(2, 3\) and w \(2, 3\): expected \[..., K\] and \[K, N\]"),
        (lambda: qdot(I, I[0] * 1.0, **BOTH), "operands are x int32, w float.., expected raw integers or floats"),
        (lambda: qdot(I, I[0], implementation="cuda", **BOTH), "implementation is 'cuda', expected one of"),
        (lambda: qdot(I, I[0], implementation="pallas_tpu", **BOTH), "which this op does not have"),
        (lambda: requantise(jnp.ones(2), frac=1, out_fmt=X), "m has dtype float32, expected integers that int32 holds"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
