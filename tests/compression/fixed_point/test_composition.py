"""A decoder and sparse experts in fixed point: floats that train and integers that run give the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.compression import Int8Weight, dequantize, linear
from jaxaccel.compression.fixed_point import (
    FixedPoint,
    FixedPointMatrix,
    calibrate,
    cast,
    exact_matmul,
    fixed_point_matrices,
    from_int,
    int8_weights,
    qdot,
    quantize_params,
    to_int,
)
from jaxaccel.models import DecoderConfig, decoder_forward, init_params
from jaxaccel.models.decoder import decoder_logits, fuse, stack_layers
from jaxaccel.models.generation import generate
from jaxaccel.moe import block_ffn, block_ffn_init

WORD = 8
X = FixedPoint(WORD, 4)
CONFIG = DecoderConfig.tiny(num_layers=1)
PARAMS = jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, init_params(jax.random.key(0), CONFIG))
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
FORWARD = jax.jit(lambda params: decoder_forward(params, TOKENS, CONFIG).hidden)


def is_small(leaf):
    return isinstance(leaf, Int8Weight)


def points(params, word=WORD):
    """One for each matrix; norms stay."""
    return jax.tree.map(lambda p: calibrate(p, word=word) if p.ndim > 1 else None, params)


F = points(PARAMS)


def in_fixed_point(integer, f=F["layers"], **options):
    formats = {"o": FixedPoint(WORD, 6), "down": FixedPoint(WORD, 5)}
    by_layer = [{name: formats.get(name, X) if point is not None else None for name, point in layer.items()}
                for layer in f]  # fmt: skip
    layers = fixed_point_matrices(PARAMS["layers"], f, x_fmt=by_layer, word=WORD, integer=integer, **options)
    return PARAMS | {"layers": layers}


def test_a_decoder_gives_the_same_bits_in_floats_and_in_integers():
    """All seven products of each block; what lies between them is the same program on the same numbers."""
    by_float, by_int = (FORWARD(in_fixed_point(integer)) for integer in (False, True))
    assert int((by_float != by_int).sum()) == 0
    weight = in_fixed_point(True)["layers"][0]["q"]
    assert isinstance(weight, FixedPointMatrix)
    assert weight.values.dtype == jnp.int8
    # It is a model that was quantised, and not another one: 8 bits cost a percent or two of a layer's output.
    wanted = FORWARD(PARAMS)
    assert float(jnp.abs(by_float - wanted).max() / jnp.abs(wanted).max()) < 0.1


def test_a_stacked_decoder_with_a_point_for_each_layer():
    layer = PARAMS["layers"][0]
    params = stack_layers(PARAMS | {"layers": [layer, jax.tree.map(lambda p: 2 * p, layer)]})
    f = {name: calibrate(p, word=WORD, channel_axis=0) if p.ndim > 2 else None for name, p in params["layers"].items()}
    assert f["q"].shape == (2, 1, 1)
    config = DecoderConfig.tiny(num_layers=2, scan_layers=True)

    @jax.jit
    def both(params):
        kinds = (fixed_point_matrices(params["layers"], f, x_fmt=X, word=WORD, integer=i) for i in (False, True))
        return [decoder_forward(params | {"layers": layers}, TOKENS, config).hidden for layers in kinds]

    by_float, by_int = both(params)
    assert int((by_float != by_int).sum()) == 0


def test_gradients_reach_weights_and_points():
    def loss(layers, f):
        return (FORWARD(PARAMS | {"layers": fixed_point_matrices(layers, f, x_fmt=X, word=WORD)}) ** 2).sum()

    by_weights, by_points = jax.jit(jax.grad(loss, (0, 1)))(PARAMS["layers"], F["layers"])
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert float(jnp.abs(by_weights[0][name]).max()) > 0
        assert float(jnp.abs(by_points[0][name])) > 0
        assert jnp.isfinite(by_points[0][name])


def test_int8_weights_are_the_numbers_of_quantize_params():
    params = {name: PARAMS[name] for name in ("head", "final_norm")}
    for axis in (None, -2):
        f = {name: calibrate(p, word=5, channel_axis=axis if p.ndim > 1 else None) for name, p in params.items()}
        small, wanted = int8_weights(params, f, word=5), quantize_params(params, f, word=5)
        plain = jax.tree.map(lambda w: dequantize(w) if is_small(w) else w, small, is_leaf=is_small)
        jax.tree.map(np.testing.assert_array_equal, plain, wanted)
    assert small["head"].q.dtype == jnp.int8
    assert (jnp.log2(small["head"].scale) % 1 == 0).all()


def test_generation_from_int8_weights_is_that_of_the_cast_floats():
    """The int8 path as it is: steps are scales. Same tokens; logits differ by what 16 bits of x lose."""
    run = functools.partial(generate, prompts=TOKENS[:, :4], config=CONFIG, max_new_tokens=8)
    wanted = quantize_params(PARAMS, F, word=WORD)
    small = int8_weights(PARAMS, F, word=WORD)
    tokens = run(wanted).tokens
    np.testing.assert_array_equal(run(fuse(small)).tokens, tokens)
    logits, exact = (decoder_logits(p, FORWARD(p)) for p in (small, wanted))
    np.testing.assert_allclose(logits, exact, atol=2e-3 * float(jnp.abs(exact).max()))


@jax.jit
def experts_in_floats(params, x):
    """The layer with all products of cast numbers, and of its own functions where there are any."""
    whole, routing = block_ffn(params, x, sparse=False)
    count, size, width = params.up.shape
    up = exact_matmul(x, params.up.reshape(-1, width).T, x_fmt=X, w_fmt=X)
    hidden = jax.nn.silu(up.reshape(-1, count, size)) * routing.scores[..., None]
    hidden = cast(hidden.reshape(-1, count * size), X)
    return whole, routing, up, hidden, exact_matmul(hidden, params.down.reshape(-1, width), x_fmt=X, w_fmt=X)


def test_experts_give_the_same_bits_in_floats_and_in_integers():
    params = block_ffn_init(jax.random.key(1), dim=16, num_experts=6, expert_dim=4)
    f = calibrate(params, word=WORD)
    small = quantize_params(params, f, word=WORD)
    x = cast(jax.random.normal(jax.random.key(2), (20, 16)), X)
    whole, routing, up, hidden, y = experts_in_floats(small, x)

    def by_integers(x, w, point):
        w_fmt = FixedPoint(WORD, int(point))
        total = qdot(to_int(x, X), to_int(w, w_fmt), x_fmt=X, w_fmt=w_fmt)
        return from_int(total, FixedPoint(25, X.frac + w_fmt.frac))

    mismatches = [
        int((a != b).sum())
        for a, b in (
            (routing.logits, by_integers(x, params.router, f.router)),
            (up, by_integers(x, params.up.reshape(-1, 16).T, f.up)),
            (y, by_integers(hidden, params.down.reshape(-1, 16), f.down)),
        )
    ]
    assert mismatches == [0, 0, 0]
    # The layer itself, whose hidden numbers are not cast: half a step of each, times the weights of a sum.
    bound = 0.5 * X.resolution * jnp.abs(small.down).sum((0, 1)).max()
    assert float(jnp.abs(whole - y).max()) <= float(bound)


W = {"w": jnp.ones((3, 4))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word": 9}, "word is 9, expected 2 to 8 bits"),
        ({"word": 1}, "word is 1"),
        ({"word": 4.0}, "word is 4.0"),
        ({"rounding": "nearest"}, "rounding is 'nearest'"),
        ({"overflow": "clip"}, "overflow is 'clip'"),
        ({"f": {"w": jnp.zeros(4)}}, r"f has shape \(4,\) for a matrix \(3, 4\), expected a scalar"),
        ({"f": {"w": jnp.zeros((2, 1))}}, "shape"),
        ({"f": {"w": jnp.nan}}, "f is nan, expected finite"),
        ({"params": {"w": jnp.ones((3, 4), int)}}, "params has dtype int32"),
        ({"f": {"b": 1.0}}, "Dict key mismatch|dict"),
    ],
)
def test_int8_weights_refuse(change, message):
    options = {"params": W, "f": {"w": 1.0}, "word": 4} | change
    with pytest.raises(ValueError, match=message):
        int8_weights(options.pop("params"), options.pop("f"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word": 9}, "word is 9, expected 2 to 8 bits"),
        ({"x_fmt": FixedPoint(9, 0)}, "x_fmt.word is 9"),
        ({"x_fmt": FixedPoint(8, 0, signed=False)}, "x_fmt is without sign"),
        ({"x_fmt": {"w": 8}}, "x_fmt has 8 beside a matrix"),
        ({"params": {"w": jnp.ones(4)}}, "expected matrices"),
        ({"params": {"w": jnp.ones((1, 1025))}, "x_fmt": FixedPoint(8, 0), "word": 8}, "at most 2\\^24"),
    ],
)
def test_fixed_point_matrices_refuse(change, message):
    options = {"params": W, "f": {"w": 1.0}, "x_fmt": FixedPoint(4, 1), "word": 4} | change
    with pytest.raises(ValueError, match=message):
        fixed_point_matrices(options.pop("params"), options.pop("f"), **options)


def test_linear_takes_any_product():
    weight = fixed_point_matrices(W, {"w": 1.0}, x_fmt=FixedPoint(4, 1), word=4)["w"]
    assert linear(jnp.ones((2, 5, 4)), weight, jnp.ones(3)).tolist() == [[[5.0] * 3] * 5] * 2
    with pytest.raises(ValueError, match="expected"):
        linear(jnp.ones((2, 5)), weight)
