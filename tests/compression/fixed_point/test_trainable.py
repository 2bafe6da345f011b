"""Gradients of the learned binary point, and what goes with it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.compression.fixed_point import (
    FixedPoint,
    binary_point,
    calibrate,
    cast,
    frac_labels,
    freeze,
    k_hot,
    quantize_params,
    to_int,
    trainable_cast,
)
from jaxaccel.compression.fixed_point.formats import ROUNDINGS

LN2 = math.log(2)


@pytest.mark.parametrize("case", range(4))
def test_gradients_of_the_vectors(vectors, case):
    v = vectors("qfx")
    x, g = (jnp.asarray(v[f"grad{case}_{k}"], jnp.float32) for k in "xg")
    word = int(v[f"grad{case}_W"])
    q, pull = jax.vjp(
        lambda x, f: trainable_cast(x, f, word=word, grad_scale="none"), x, jnp.float32(v[f"grad{case}_f"])
    )
    gx, gf = pull(g)
    np.testing.assert_array_equal(q, v[f"grad{case}_q"].astype(np.float32))
    np.testing.assert_array_equal(gx, np.asarray(v[f"grad{case}_gx"], np.float32))
    # A sum of 63 numbers in float32; the vectors are float64.
    np.testing.assert_allclose(gf, v[f"grad{case}_gf"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("overflow", "outside"), [("sat", 7), ("sat_sym", 7), ("sat_zero", 0)])
def test_gradient_is_that_of_the_smooth_function(overflow, outside):
    """q(f) = (x·2^f + c)·2^(−f) inside, c what rounding added; m·2^(−f) outside. Central differences in float64."""
    x, F = np.array([0.3, -0.6, 1.1, 9.0]), 2
    slope = jax.grad(lambda f, x: trainable_cast(x, f, word=4, overflow=overflow, grad_scale="none"), (0, 1))
    by_point, by_x = jax.jit(jax.vmap(slope))(jnp.full(4, float(F)), jnp.asarray(x, jnp.float32))
    added = np.floor(x * 4 + 0.5) - x * 4

    def smooth(f):
        inside = (x * 2.0**f + added) * 2.0**-f
        return np.where(x > 2, outside * 2.0**-f, inside)

    h = 1e-5
    np.testing.assert_allclose(by_point, (smooth(F + h) - smooth(F - h)) / (2 * h), rtol=1e-5, atol=1e-6)
    assert by_x.tolist() == [1, 1, 1, 0]


def test_wrapping_is_for_those_who_ask():
    x = jnp.array([0.3, 9.0])
    with pytest.raises(ValueError, match="overflow is 'wrap', expected a saturating mode in training"):
        trainable_cast(x, 1.0, word=4, overflow="wrap")

    def loss(x, f):
        return trainable_cast(x, f, word=4, overflow="wrap", allow_wrap=True, grad_scale="none").sum()

    q, (gx, gf) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, 1.0)
    assert q == 0.5 + 1.0  # 18 - 16 = 2 steps
    assert gx.tolist() == [1, 1]
    np.testing.assert_allclose(gf, LN2 * (0.3 - 0.5 + 9.0 - 1.0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (3, 1, 5)])
def test_points_that_are_shared(shape):
    x = jax.random.normal(jax.random.key(0), (3, 4, 5)) * 2
    f = jax.random.uniform(jax.random.key(1), shape, minval=0.6, maxval=3.4)
    weight = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def gradients(x, f):
        def loss(f, scale):
            return (weight * trainable_cast(x, f, word=4, grad_scale=scale)).sum()

        apart = jax.vmap(
            jax.vmap(jax.vmap(jax.grad(lambda f, x, w: w * trainable_cast(x, f, word=4, grad_scale="none"))))
        )
        entries = apart(jnp.broadcast_to(f, x.shape), x, weight)
        return jax.grad(loss)(f, "none"), jax.grad(loss)(f, "lsq"), entries, trainable_cast(x, f, word=4)

    plain, scaled, entries, q = gradients(x, f)
    assert plain.shape == shape
    axes = tuple(i for i, n in enumerate((1,) * (3 - len(shape)) + shape) if n == 1)
    # Sums of up to 60 numbers of size 1 in float32.
    np.testing.assert_allclose(plain, entries.sum(axes, keepdims=True).reshape(shape), rtol=1e-5, atol=1e-5)
    sharing = x.size / max(np.prod(shape), 1)
    np.testing.assert_allclose(scaled, plain / np.sqrt(sharing * 7), rtol=1e-5, atol=1e-6)
    F = np.broadcast_to(binary_point(f, word=4), x.shape)
    for one in np.unique(F):
        np.testing.assert_array_equal(np.asarray(q)[one == F], np.asarray(cast(x, FixedPoint(4, int(one))))[one == F])


def test_all_roundings_and_no_sign():
    x = jax.random.normal(jax.random.key(0), (50,)) * 3

    @jax.jit
    def together(x, f):
        return [trainable_cast(x, f, word=5, rounding=r, signed=s) for r in ROUNDINGS for s in (True, False)]

    for q, (r, s) in zip(together(x, 2.2), [(r, s) for r in ROUNDINGS for s in (True, False)], strict=True):
        np.testing.assert_array_equal(q, cast(x, FixedPoint(5, 2, s, r)))


def test_modes_of_differentiation_agree():
    x, f = jax.random.normal(jax.random.key(0), (3, 7)), jnp.linspace(0.6, 3.3, 7)
    dx, df, g = (jax.random.normal(jax.random.key(i), s) for i, s in ((1, (3, 7)), (2, (7,)), (3, (3, 7))))

    def q(x, f):
        return trainable_cast(x, f, word=3)

    forward, back = jax.jit(lambda: (jax.jvp(q, (x, f), (dx, df))[1], jax.vjp(q, x, f)[1](g)))()
    np.testing.assert_allclose((forward * g).sum(), (back[0] * dx).sum() + (back[1] * df).sum(), rtol=1e-5)
    # 16 bits in, float32 out, 16 bits of gradient.
    half = x.astype(jnp.bfloat16)
    assert jax.eval_shape(q, half, f).dtype == jnp.float32
    gx, gf = jax.jit(jax.grad(lambda x, f: q(x, f).sum(), (0, 1)))(half, f.astype(jnp.bfloat16))
    assert gx.dtype == gf.dtype == jnp.bfloat16


def test_points_stay_where_words_are_useful():
    assert binary_point(jnp.array([-99.0, 99.0, 0.5, 1.5]), word=8).tolist() == [-24, 39, 0, 2]
    q = jax.jit(lambda f: trainable_cast(jnp.ones(2), f, word=8))
    assert q(99.0).tolist() == [127 * 2.0**-39] * 2
    assert q(-99.0).tolist() == [0.0, 0.0]
    for bad in (jnp.nan, jnp.inf):
        assert jnp.isnan(q(bad)).all()
        with pytest.raises(ValueError, match=f"f is {bad}, expected finite numbers"):
            trainable_cast(jnp.ones(2), bad, word=8)
    assert jnp.isnan(trainable_cast(jnp.array([jnp.nan]), 1.0, word=8)).all()


def test_sharded_gradients():
    x = jax.random.normal(jax.random.key(0), (16, 3))
    f = jnp.array([1.0, 2.0, 3.0])
    gradient = jax.jit(jax.grad(lambda x, f: (trainable_cast(x, f, word=4) ** 2).sum(), (0, 1)))
    sharding = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    for ours, alone in zip(gradient(jax.device_put(x, sharding), f), gradient(x, f), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)  # sums in another order


def test_few_ones_in_training():
    x = jax.random.normal(jax.random.key(0), (40,)) * 3

    def q(x, f):
        return trainable_cast(x, f, word=6, hot=2, hot_mode="truncate", grad_scale="none")

    @jax.jit
    def both(x, f):
        value, pull = jax.vjp(q, x, f)
        direct = k_hot(to_int(x, FixedPoint(6, 3)), k=2, word=6, mode="truncate") / 8.0
        return value, direct, *pull(jnp.ones(40))

    value, direct, gx, gf = both(x, jnp.float32(3))
    np.testing.assert_array_equal(value, direct)
    inside = (x * 8 >= -32.5) & (x * 8 < 31.5)
    np.testing.assert_array_equal(gx, inside)
    np.testing.assert_allclose(gf, LN2 * (jnp.where(inside, x, 0) - value).sum(), rtol=1e-5)


def test_trees_and_labels_train_with_optax():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, 8))
    w = jax.random.normal(keys[1], (8, 2))
    weights = {"dense": {"w": 0.3 * jax.random.normal(keys[2], (8, 2)), "b": jnp.zeros(2)}}
    points = calibrate({"dense": {"w": w, "b": None}}, word=4, method="max")
    state = {"weights": weights, "frac": {"dense": {"w": points["dense"]["w"] + 2, "b": None}}}
    labels = frac_labels(state)
    assert labels["frac"]["dense"]["w"] == "frac"
    assert labels["weights"]["dense"] == {"w": "weights", "b": "weights"}
    optimizer = optax.multi_transform({"frac": optax.adam(3e-2), "weights": optax.adam(1e-2)}, labels)

    def loss(state):
        p = quantize_params(state["weights"], state["frac"], word=4)["dense"]
        return ((x @ p["w"] + p["b"] - x @ w) ** 2).mean()

    @jax.jit
    def train(state):
        def step(carry, _):
            value, slope = jax.value_and_grad(loss)(carry[0])
            updates, inner = optimizer.update(slope, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), inner), value

        return jax.lax.scan(step, (state, optimizer.init(state)), None, 300)

    (trained, _), losses = train(state)
    # The point starts two steps too fine, so that most weights saturate: it has to move for the loss to fall.
    assert losses[-1] < 0.1 * losses[0]
    assert trained["frac"]["dense"]["w"] < state["frac"]["dense"]["w"] - 0.6
    formats = freeze(trained["frac"], word=4)
    assert formats["dense"]["b"] is None
    quantised = quantize_params(trained["weights"], trained["frac"], word=4)
    np.testing.assert_array_equal(
        quantised["dense"]["w"], cast(trained["weights"]["dense"]["w"], formats["dense"]["w"])
    )
    np.testing.assert_array_equal(quantised["dense"]["b"], trained["weights"]["dense"]["b"])


def test_frozen_channels():
    formats = freeze(jnp.array([[1.2], [-2.6]]), word=5, rounding="trn", overflow="wrap", signed=False)
    assert formats == tuple(FixedPoint(5, F, False, "trn", "wrap") for F in (1, -3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word": 1}, "word is 1, expected 2 to 31 bits"),
        ({"word": 32}, "word is 32, expected 2 to 31 bits"),
        ({"word": 4.0}, "word is 4.0, expected a Python integer"),
        ({"word": 26}, "word is 26, and float32 holds all words of up to 25 bits"),
        ({"rounding": "up"}, "rounding is 'up', expected one of"),
        ({"overflow": "clip"}, "overflow is 'clip', expected one of"),
        ({"grad_scale": "sqrt"}, "grad_scale is 'sqrt', expected 'lsq' or 'none'"),
        ({"f": jnp.ones(2)}, r"f has shape \(2,\), expected one that broadcasts to that of x, \(4, 3\)"),
        ({"f": jnp.ones((1, 1, 1))}, r"f has shape \(1, 1, 1\), expected one that broadcasts"),
        ({"f": float("nan")}, "f is nan, expected finite numbers"),
        ({"x": jnp.ones(3, jnp.int32)}, "x has dtype int32, expected floats"),
        ({"hot": 0}, "k is 0, expected a positive integer"),
        ({"hot": 1, "hot_mode": "up"}, "mode is 'up', expected 'nearest' or 'truncate'"),
    ],
)
def test_bad_options(options, message):
    options = {"x": jnp.ones((4, 3)), "f": 1.0, "word": 4, **options}
    with pytest.raises(ValueError, match=message):
        trainable_cast(options.pop("x"), options.pop("f"), **options)


def test_bad_trees():
    with pytest.raises(ValueError, match="word is missing"):
        quantize_params({"w": jnp.ones(2)}, {"w": 1.0})
    with pytest.raises(ValueError, match="key"):
        quantize_params({"w": jnp.ones(2)}, {"v": 1.0}, word=4)
    with pytest.raises(ValueError, match=r"f has shape \(2, 3\), expected a scalar or one axis of channels"):
        freeze(jnp.ones((2, 3)), word=4)
    with pytest.raises(ValueError, match="expected finite numbers"):
        freeze(jnp.array(jnp.nan), word=4)
