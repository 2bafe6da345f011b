"""Layers, networks: bits equal to those of integers, gradients, calibration, and a decoder and experts beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxaccel.compression.fixed_point import (
    BinaryPoint,
    QBatchNorm,
    QConv,
    QDense,
    QInput,
    QMean,
    QRelu,
    QResidual,
    QSequential,
    adders,
    calibrate_layers,
    count_ones,
    frac_labels,
    from_int,
    int_forward,
    set_mode,
    to_int,
    weight_integers,
)

W = 4
X = jax.random.uniform(jax.random.key(1), (16, 4, 4, 2))


def network():
    rngs = nnx.Rngs(0)
    half = {"strides": (2, 2), "word": W, "in_word": W + 2, "rngs": rngs}
    body = QSequential([QConv(3, 4, (3, 3), hot=1, **half), QBatchNorm(4, word=W, hot=2)])
    short = QSequential([QConv(3, 4, (1, 1), out_word=W, bias=True, **half)])
    return QSequential(
        [
            QInput(word=W),
            QConv(2, 3, (3, 3), word=W, per_channel=True, rngs=rngs),
            QRelu(),
            QResidual(body, short, word=W),
            QMean(word=W),
            QDense(4, 3, word=W, out_word=W + 4, rngs=rngs),
        ]
    )


@nnx.jit(static_argnames="train")
def apply(model, x, train=False):
    return model(x, train=train)


@pytest.fixture(scope="module")
def calibrated():
    model = network()
    model.layers[1].w[...] *= jnp.array([1.0, 8.0, 0.1])  # channels that need points of their own
    norm = model.layers[3].body.layers[1]
    norm.mean[...], norm.var[...] = jnp.array([0.1, -0.2, 0.0, 0.3]), jnp.array([0.5, 1.0, 2.0, 0.3])
    calibrate_layers(model, X)
    return model


def test_the_frozen_network_gives_the_same_bits(calibrated):
    y = apply(calibrated, X)
    spec, params = calibrated.freeze((4, 4, 2))
    assert [node.op for node in spec.nodes] == ["conv", "relu", "conv", "scale", "conv", "add", "mean", "dense"]
    points = [fmt.frac for fmt in spec.nodes[0].w]
    assert points[2] > points[0] > points[1]
    forward = jax.jit(int_forward, static_argnums=0)
    raw = forward(spec, params, to_int(X, spec.fmt))
    np.testing.assert_array_equal(from_int(raw, spec.nodes[-1].out), y)
    assert len(np.unique(raw)) > 10
    # Also under vmap and with no batch at all.
    alone = jax.vmap(lambda x: forward(spec, params, x))(to_int(X, spec.fmt))
    np.testing.assert_array_equal(alone, raw)
    assert int(count_ones(params["layer3_body0"]["w"]).max()) == 1
    assert int(count_ones(params["layer3_body1"]["a"]).max()) <= 2
    matrices = weight_integers(params)
    assert [m.shape for m in matrices] == [(18, 3), (27, 4), (1, 4), (3, 4), (4, 3)]
    assert int(adders(matrices[1]).multipliers) == 0


def test_training_moves_weights_points_and_statistics(calibrated):
    graph, points, params, rest = nnx.split(calibrated, BinaryPoint, nnx.Param, ...)
    assert len(jax.tree.leaves(points)) == 15
    assert set(jax.tree.leaves(frac_labels(points))) == {"frac"}
    assert set(jax.tree.leaves(frac_labels(params))) == {"weights"}
    labels = jnp.arange(16) % 3

    @jax.jit
    def step(points, params, rest):
        def loss(points, params):
            model = nnx.merge(graph, points, params, rest, copy=True)
            logits = model(X, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), nnx.state(model)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(points, params)

    (value, state), slopes = step(points, params, rest)
    assert jnp.isfinite(value)
    for slope in jax.tree.leaves(slopes):
        assert bool(jnp.isfinite(slope).all())
    assert sum(bool((slope != 0).any()) for slope in jax.tree.leaves(slopes)) > 15
    moved = state["layers"][3]["body"]["layers"][1]["mean"][...]
    assert bool((moved != calibrated.layers[3].body.layers[1].mean[...]).all())


def test_many_bits_are_as_good_as_floats():
    rngs = nnx.Rngs(0)
    model = QSequential([QInput(word=12), QDense(8, 3, word=10, in_word=12, bias=True, out_word=14, rngs=rngs)])
    x = X.reshape(-1, 8)
    set_mode(model, "float")
    wanted = model(x)
    calibrate_layers(model, x, method="max")
    assert model.layers[0].mode == "fixed"
    np.testing.assert_allclose(apply(model, x), wanted, atol=8 * 2 * 2.0**-9)  # eight products, half a step of 2^-8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: QDense(0, 2, word=W, rngs=r), r"sizes are \(0, 2\)"),
        (lambda r: QDense(2, 2, word=1, rngs=r), "word is 1"),
        (lambda r: QDense(2, 2, word=W, in_word=99, rngs=r), "word is 99"),
        (lambda r: QDense(2, 2, word=W, out_word=0, rngs=r), "the word of 'out': word is 0"),
        (lambda r: QDense(2, 2, word=W, hot=0, rngs=r), "k is 0"),
        (lambda r: QDense(2, 2, word=W, rounding="up", rngs=r), "rounding is 'up'"),
        (lambda r: QConv(2, 2, (3,), word=W, rngs=r), "kernel is"),
        (lambda r: QConv(2, 2, (3, 3), word=W, padding="same", rngs=r), "padding is 'same'"),
        (lambda r: QBatchNorm(2, word=W, momentum=1), "momentum is 1"),
        (lambda r: QBatchNorm(2, word=W, eps=0), "eps is 0"),
        (lambda r: QInput(word=W, overflow="clip"), "overflow is 'clip'"),
        (lambda r: set_mode(QInput(word=W), "int8"), "mode is 'int8'"),
        (lambda r: calibrate_layers(QInput(word=W), X, method="best"), "method is 'best'"),
        (lambda r: QSequential([]).freeze((2,)), "the first layer is NoneType, expected QInput"),
        (lambda r: QSequential([QRelu()]).freeze((2,)), "the first layer is QRelu"),
        (
            lambda r: QSequential([QInput(word=5), QDense(2, 2, word=W, rngs=r)]).freeze((2,)),
            "layer1: inputs have 5 bits, expected in_word, 4",
        ),
        (lambda r: QSequential([QInput(word=5), QMean(word=W)]).freeze((3, 3, 1)), "the mean of 9 numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))


def test_sums_that_float32_would_round_are_refused_and_integers_do_them():
    model = QSequential([QInput(word=W), QDense(2, 2, word=W, bias=True, rngs=nnx.Rngs(0))])
    model.layers[1].frac["b"][...] = jnp.array(-17.0)
    with pytest.raises(ValueError, match="layer1: a sum at frac 4 and -17 can reach"):
        model.freeze((2,))
    spec, params = model.freeze((2,), exact=False)
    assert int_forward(spec, params, np.ones((1, 2), int)).shape == (1, 2)
