"""The layer around local linear attention: equality with the op, the ridge, decoding, positions, bad input.

The op itself is tested in tests/kernels_pallas/local_linear_attention.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccel import attention
from jaxaccel.attention import LLACache, LocalLinearAttention, local_linear_attention
from kernels_pallas import local_linear_attention as op

B, T, D = 2, 6, 16


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def layer(**options):
    return LocalLinearAttention(D, 4, **({"kv_heads": 2} | options), rngs=nnx.Rngs(0))


def rotate(x, positions):
    """Half-split rotary positions: the hook as a user would write it."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] / 100 ** (jnp.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def test_the_op_is_the_same_function():
    for name in op.__all__:
        assert getattr(attention, name) is getattr(op, name)


def test_it_is_projections_around_the_op(x):
    model = layer(ridge=0.5)
    q = (x @ model.query.kernel[...]).reshape(B, T, 4, 4)
    k, v = ((x @ linear.kernel[...]).reshape(B, T, 2, 4) for linear in (model.key, model.value))
    mixed = local_linear_attention(q, k, v, ridge=jnp.full(4, 0.5))
    # float32, sums of 16 products
    np.testing.assert_allclose(model(x), mixed.reshape(B, T, D) @ model.out.kernel[...], atol=2e-6)


def test_parameters_start_where_they_should_and_get_gradients(x):
    model = layer(ridge=(0.01, 0.1, 1.0, 30.0), min_ridge=1e-4)
    np.testing.assert_allclose(model.ridge, [0.01, 0.1, 1.0, 30.0], rtol=1e-5)  # float32, through softplus
    structure, params = nnx.split(model, nnx.Param)

    def loss(params):
        return jnp.sum(nnx.merge(structure, params)(x) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.all(jnp.isfinite(grad[...])), path
        assert jnp.any(grad[...] != 0), path
    # The gradient of the ridge is that of finite differences.
    step = 1e-2
    moved = []
    for sign in (1, -1):
        other = jax.tree.map(lambda leaf: leaf, params)
        other["log_ridge"][...] = params["log_ridge"][...].at[1].add(sign * step)
        moved.append(loss(other))
    # float32 losses of some ten, differences of some thousandths, and a step whose square counts
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), grads["log_ridge"][...][1], rtol=0.03, atol=2e-4)


def test_the_ridge_never_falls_below_its_floor():
    model = layer(min_ridge=0.2)
    model.log_ridge[...] = jnp.full(4, -1e4)
    np.testing.assert_allclose(model.ridge, 0.2)


def test_a_large_ridge_gives_softmax_attention(x):
    model = layer(ridge=1e6)
    q, k, v = model.project(x, jnp.broadcast_to(jnp.arange(T), (B, T)))
    softmax = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, T, D) @ model.out.kernel[...]
    np.testing.assert_allclose(model(x), softmax, atol=1e-5)  # the difference falls as 1 / ridge


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_qk": True, "ridge": 0.1}, {"rotate": rotate, "use_bias": True}, {"solver": "cholesky"}],
    ids=["plain", "normalised", "rotated", "cholesky"],
)
def test_prefill_and_decoding_give_the_whole_sequence(x, options):
    model = layer(**options)
    expected = model(x)
    out, cache = model.prefill(x[:, :3], model.init_cache(B, 8))
    # Unused slots may hold anything.
    poison = jnp.arange(8)[None, :, None, None] >= 3
    cache = cache._replace(key=jnp.where(poison, jnp.nan, cache.key), value=jnp.where(poison, jnp.nan, cache.value))
    step = nnx.jit(lambda model, token, cache: model.decode(token, cache))
    parts = [out]
    for i in range(3, T):
        out, cache = step(model, x[:, i : i + 1], cache)
        parts.append(out)
    assert cache.length.tolist() == [T, T]
    # float32: two orders of the same sums, through a solve with a condition number of some tens
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, atol=2e-5)


def test_sequences_of_different_lengths_decode_together(x):
    model = layer(rotate=rotate)
    _, cache = model.prefill(x, model.init_cache(B, 8))
    ragged = LLACache(cache.key, cache.value, jnp.array([5, 2], jnp.int32))
    token = jnp.stack([x[0, 5:6], x[1, 2:3]])
    out, ragged = model.decode(token, ragged)
    whole = model(x)
    assert ragged.length.tolist() == [6, 3]
    np.testing.assert_allclose(out[0, 0], whole[0, 5], atol=2e-5)  # float32, as above
    np.testing.assert_allclose(out[1, 0], whole[1, 2], atol=2e-5)


def test_rotation_makes_logits_depend_on_distance_alone(x):
    model = layer(rotate=rotate)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    near, far = (model.project(x, positions + shift) for shift in (0, 7))
    logits = [jnp.einsum("btnh,btnh->btn", q[:, 1:, ::2], k[:, :-1]) for q, k, _ in (near, far)]
    np.testing.assert_allclose(*logits, atol=1e-5)  # float32


def test_normalised_queries_and_keys_have_length_one(x):
    model = layer(normalize_qk=True)
    q, k, _ = model.project(x.at[0, 0].set(0), jnp.zeros((B, T), jnp.int32))
    lengths = jnp.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(lengths[0, 1:], 1, rtol=1e-6)  # float32
    np.testing.assert_allclose(jnp.linalg.norm(k[1], axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(lengths[0, 0], 0)
    assert model.scale == 2.0  # √H: logits as those of vectors of length √H over √H
    assert layer().scale == 0.5


def test_masked_tokens_are_not_seen(x):
    model = layer(causal=False)
    mask = jnp.ones((1, 1, T, T), bool).at[..., -1].set(False)
    changed = x.at[:, -1].add(1.0)
    np.testing.assert_array_equal(model(x, mask=mask)[:, :-1], model(changed, mask=mask)[:, :-1])
    assert not np.allclose(model(x)[:, :-1], model(changed)[:, :-1])


def test_bfloat16_computes_in_bfloat16_with_a_float32_ridge(x):
    model = layer(dtype=jnp.bfloat16)
    out = model(x)
    assert out.dtype == jnp.bfloat16
    assert model.ridge.dtype == jnp.float32
    cache = model.init_cache(B, 8)
    assert cache.key.dtype == jnp.bfloat16
    # Eight bits of mantissa: some thousandths of values of order one, through four products.
    np.testing.assert_allclose(out.astype(jnp.float32), layer()(x), atol=0.06)
    step, _ = model.decode(x[:, :1], cache)
    assert step.dtype == jnp.bfloat16


def test_batches_shard_over_eight_devices():
    model = layer()
    x = jax.random.normal(jax.random.key(2), (8, T, D))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    out = nnx.jit(lambda model, x: model(x))(model, sharded)
    # Devices stop their solves at different iterations: agreement is that of the solver's tolerance.
    np.testing.assert_allclose(out, model(x), atol=2e-5)


def test_a_head_size_of_its_own(x):
    model = LocalLinearAttention(D, 3, head_dim=5, rngs=nnx.Rngs(0))
    assert model.query.kernel.shape == (D, 15)
    assert model(x).shape == (B, T, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"head_dim": 0}, "head_dim is 0, expected at least 1"),
        ({"ridge": 0.0}, r"ridge is 0\.0 .* expected 0 < min_ridge < ridge"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"ridge": (1.0, 2.0)}, "ridge has 2 values, expected one, or one for each of 4 heads"),
        ({"min_ridge": 0.0}, r"min_ridge 0\.0, expected 0 < min_ridge"),
        ({"min_ridge": 2.0}, r"min_ridge 2\.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"heads \(3\) do not divide width \(16\): give head_dim"):
        LocalLinearAttention(D, 3, rngs=nnx.Rngs(0))


def test_an_unknown_solver_is_refused_by_the_op(x):
    with pytest.raises(ValueError, match="solver is 'lu'"):
        layer(solver="lu")(x)


def test_bad_caches_are_refused(x):
    model = layer()
    with pytest.raises(ValueError, match=r"batch \(2\) and length \(0\)"):
        model.init_cache(2, 0)
    with pytest.raises(ValueError, match="cache has 4 slots, of which 0 are used: no room for 6 tokens"):
        model.prefill(x, model.init_cache(B, 4))
    _, full = model.prefill(x, model.init_cache(B, T))
    with pytest.raises(ValueError, match="cache has 6 slots, of which 6 are used: no room for 1 tokens"):
        model.decode(x[:, :1], full)
    with pytest.raises(ValueError, match=r"cache has lengths \[6, 6\], expected an empty one"):
        model.prefill(x[:, :1], full)
    with pytest.raises(ValueError, match="cache holds 3 sequences, x has 2"):
        model.decode(x[:, :1], model.init_cache(3, T))
    with pytest.raises(ValueError, match="causal is False"):
        layer(causal=False).decode(x[:, :1], full)
