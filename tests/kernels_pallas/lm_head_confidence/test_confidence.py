"""Every implementation gives the token and the probability of the whole logits, ties, tile borders and NaN included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.lm_head_confidence import _op, lm_head_confidence, xla
from kernels_pallas.lm_head_confidence.reference import naive

NAMES = ("xla", "pallas_tpu", "pallas_gpu")
# float32 sums of a few thousand exponentials in another order; products of bfloat16 are exact in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """Sizes here are so small that one part would hold all."""
    monkeypatch.setattr(xla, "WHOLE", 0)


def run(name, hidden, weight, forbid=None):
    return _op(name, forbid, name != "xla")(hidden, weight)


@functools.cache
def random(rows, size, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(rows + size), 2)
    hidden = jax.random.normal(keys[0], (rows, width)).astype(dtype)
    return hidden, (0.3 * jax.random.normal(keys[1], (size, width))).astype(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "size", "width", "dtype"),
    [(1, 1, 16, jnp.float32), (5, 1000, 48, jnp.float32), (70, 5001, 32, jnp.float32), (33, 300, 64, jnp.bfloat16)],
)
def test_equal_to_all_logits(name, rows, size, width, dtype):
    hidden, weight = random(rows, size, width, dtype)
    token, confidence = run(name, hidden, weight)
    expected, probability = naive(hidden, weight)
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_allclose(confidence, probability, **CLOSE)
    assert (token.dtype, confidence.dtype) == (jnp.int32, jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_forbidden_token_is_not_chosen_but_counts(name):
    hidden, weight = random(5, 1000, 48)
    first, _ = naive(hidden, weight)
    forbid = int(first[0])
    token, confidence = run(name, hidden, weight, forbid)
    assert token[0] != forbid
    expected, probability = naive(hidden, weight, forbid)
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_allclose(confidence, probability, **CLOSE)
    assert confidence[0] < naive(hidden, weight)[1][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("places", [(0, 1), (127, 128), (511, 512), (4095, 4096), (8190, 8191)])
def test_of_equal_logits_the_first_wins_across_tiles(name, places):
    weight = np.zeros((8192, 16), np.float32)
    weight[list(places)] = 1.0
    token, confidence = run(name, jnp.ones((2, 16)), jnp.asarray(weight))
    np.testing.assert_array_equal(token, places[0])
    np.testing.assert_allclose(confidence, np.exp(16.0) / (2 * np.exp(16.0) + 8190), **CLOSE)
    forbidden, _ = run(name, jnp.ones((2, 16)), jnp.asarray(weight), places[0])
    np.testing.assert_array_equal(forbidden, places[1])


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name):
    """Far apart, all equal, all hugely negative: no overflow, no division by zero."""
    weight = jnp.zeros((300, 16)).at[7, 0].set(1.0)
    hidden = jnp.zeros((3, 16)).at[0, 0].set(1e4).at[2, 0].set(-1e4)
    token, confidence = run(name, hidden, weight)
    np.testing.assert_array_equal(token, [7, 0, 0])
    np.testing.assert_allclose(confidence, [1, 1 / 300, 1 / 299], rtol=1e-6)
    _, low = run(name, jnp.full((1, 16), -1e30), jnp.ones((300, 16)))
    np.testing.assert_allclose(low, 1 / 300, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0, 299])
def test_nan_is_never_confident(name, place):
    hidden, weight = jnp.ones((2, 16)).at[1, 3].set(jnp.nan), jnp.ones((300, 16))
    _, confidence = run(name, hidden, weight)
    assert np.isnan(confidence).tolist() == [False, True]
    _, spoiled = run(name, jnp.ones((1, 16)), weight.at[place].set(jnp.nan))
    assert np.isnan(spoiled).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_finite_logit_are_never_confident(name):
    weight = jnp.ones((300, 16))
    token, confidence = run(name, jnp.full((2, 16), -jnp.inf), weight)
    assert np.isnan(confidence).all()
    assert (token < 300).all()
    # All but the forbidden one at −∞: its probability is 1, that of any other 0.
    one = jnp.full((300, 16), -jnp.inf).at[0].set(1.0)
    token, confidence = run(name, jnp.ones((2, 16)), one, 0)
    assert (token != 0).all()
    np.testing.assert_array_equal(confidence, 0)


def test_few_logits_need_no_parts(monkeypatch):
    hidden, weight = random(70, 5001, 32)
    parts = lm_head_confidence(hidden, weight, forbid=3)
    assert "dynamic_slice" in str(jax.make_jaxpr(lm_head_confidence)(hidden, weight))
    monkeypatch.setattr(xla, "WHOLE", 70 * 5001)
    whole = lm_head_confidence(hidden, weight, forbid=3)
    np.testing.assert_array_equal(whole.token, parts.token)
    np.testing.assert_allclose(whole.confidence, parts.confidence, **CLOSE)


def test_leading_axes_vmap_and_jit():
    hidden, weight = random(6, 1000, 48)
    flat = lm_head_confidence(hidden, weight, forbid=3)
    shaped = lm_head_confidence(hidden.reshape(2, 3, 48), weight, forbid=3)
    mapped = jax.jit(jax.vmap(lambda h: lm_head_confidence(h, weight, forbid=3)))(hidden.reshape(2, 3, 48))
    for found in (shaped, mapped):
        assert found.token.shape == (2, 3)
        np.testing.assert_array_equal(found.token.reshape(-1), flat.token)
        np.testing.assert_allclose(found.confidence.reshape(-1), flat.confidence, **CLOSE)
    empty = lm_head_confidence(hidden[:0], weight)
    assert empty.token.shape == empty.confidence.shape == (0,)


def test_rows_sharded_over_devices():
    hidden, weight = random(16, 1000, 48)
    mesh = Mesh(jax.devices(), ("rows",))
    split = jax.device_put(hidden, NamedSharding(mesh, PartitionSpec("rows")))
    found = jax.jit(lm_head_confidence)(split, jax.device_put(weight, NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_array_equal(found.token, naive(hidden, weight)[0])

    def own(hidden, weight):
        return lm_head_confidence(hidden, weight)

    spec = PartitionSpec("rows")
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(split, weight)
    np.testing.assert_array_equal(mapped.token, found.token)


def test_no_gradient():
    hidden, weight = random(5, 1000, 48)
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda h: lm_head_confidence(h, weight).confidence.sum())(hidden)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": jnp.ones((2, 8))}, ValueError, r"expected \[..., 16\]"),
        ({"hidden": jnp.ones((2, 16), int)}, TypeError, "hidden has dtype int32"),
        ({"weight": jnp.ones((0, 16))}, ValueError, r"expected \[V, D\]"),
        ({"weight": jnp.ones(16)}, ValueError, r"expected \[V, D\]"),
        ({"forbid": 20}, ValueError, "forbid is 20, expected a token of the 20"),
        ({"forbid": -1}, ValueError, "forbid is -1"),
        ({"forbid": 1.5}, TypeError, "forbid is 1.5, expected an integer"),
        ({"weight": jnp.ones((1, 16)), "forbid": 0}, ValueError, "leaves no token"),
        ({"implementation": "pallas_tpu"}, ValueError, "cannot run on platform 'cpu'"),
        ({"implementation": "cuda"}, ValueError, "expected one of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"hidden": jnp.ones((2, 16)), "weight": jnp.ones((20, 16))} | change
    with pytest.raises(error, match=message):
        lm_head_confidence(arguments.pop("hidden"), arguments.pop("weight"), **arguments)


def test_kernels_say_what_they_cannot_take():
    from kernels_pallas.lm_head_confidence import gpu, tpu

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    assert tpu.refusal(array(64, 4096), array(126464, 4096)) is None
    assert "dtypes" in tpu.refusal(array(64, 4096), array(126464, 4096, dtype=jnp.float32))
    assert "rows of 4096 need" in tpu.refusal(array(4096, 4096), array(126464, 4096))
    assert gpu.refusal(array(64, 576), array(49152, 576)) is None
    assert "multiple of 16" in gpu.refusal(array(64, 24), array(49152, 24))
