"""LoRA: three ways to the same product, bounds of the rank, stacks, dtypes, where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxaccel.models.decoder_config import DecoderConfig, parameter_shapes
from jaxaccel.posttraining import apply_lora, init_lora, lora_delta, lora_linear, merge_lora

KEY = jax.random.key(0)


def tree(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "embed": jax.random.normal(keys[0], (9, 6), dtype),
        "layers": [
            {"q": jax.random.normal(keys[1], (4, 6), dtype), "norm": jnp.ones(6, dtype)},
            {"q": jax.random.normal(keys[2], (4, 6), dtype), "norm": jnp.ones(6, dtype)},
        ],
    }


def filled(lora, seed=2):
    """Adapters whose B is not zero any more."""
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


Q = r"layers/\d+/q"


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_three_ways_to_the_same_product(layout, x64):
    params = {"w": jax.random.normal(KEY, (5, 8), jnp.float64)}
    outputs, inputs = (5, 8) if layout == "out_in" else (8, 5)
    lora = filled(init_lora(KEY, params, rank=3, targets="w", layout=layout))
    a, b = lora["w"]["a"], lora["w"]["b"]
    assert (a.shape, b.shape) == ((3, inputs), (outputs, 3))
    x = jax.random.normal(jax.random.key(3), (2, 7, inputs), jnp.float64)
    weight = params["w"] if layout == "out_in" else params["w"].T
    expected = x @ (weight + 16.0 / 3 * b @ a).T
    merged, applied = (function(params, lora, alpha=16.0, layout=layout)["w"] for function in (merge_lora, apply_lora))
    np.testing.assert_array_equal(merged, applied)
    np.testing.assert_allclose(x @ (merged.T if layout == "out_in" else merged), expected, rtol=1e-12, atol=1e-12)
    got = lora_linear(x, params["w"], lora["w"], alpha=16.0, layout=layout)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_changes_nothing_to_the_bit():
    params = tree()
    lora = init_lora(KEY, params, rank=2, targets=Q)
    merged = merge_lora(params, lora, alpha=7.0)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    assert merged["embed"] is params["embed"]
    x = jnp.ones((1, 6))
    np.testing.assert_array_equal(
        lora_linear(x, params["layers"][0]["q"], lora["layers/0/q"], alpha=7.0), x @ params["layers"][0]["q"].T
    )


def test_factors_are_drawn_from_their_own_keys_within_their_bound():
    params = {"w": jnp.zeros((50, 100)), "v": jnp.zeros((50, 100))}
    lora = init_lora(KEY, params, rank=8, targets="w|v")
    jax.tree.map(np.testing.assert_array_equal, lora, init_lora(KEY, params, rank=8, targets="w|v"))
    assert not np.array_equal(lora["w"]["a"], lora["v"]["a"])
    for factors in lora.values():
        assert np.abs(factors["a"]).max() <= 0.1
        assert np.var(factors["a"]) == pytest.approx(0.1**2 / 3, rel=0.15)  # 800 draws: 3 % deviation
        np.testing.assert_array_equal(factors["b"], 0.0)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_addition_has_at_most_the_rank(rank):
    lora = filled(init_lora(KEY, tree(), rank=rank, targets="layers/1/q"))
    assert np.linalg.matrix_rank(np.asarray(lora_delta(lora["layers/1/q"], alpha=1.0))) == rank


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_ranks_out_of_range_are_named_with_their_leaf(rank):
    message = rf"rank must be in \[1, 4\] for 'layers/0/q' of shape \(4, 6\), got rank={rank}"
    with pytest.raises(ValueError, match=message):
        init_lora(KEY, tree(), rank=rank, targets=Q)


def test_stacks_are_adapted_layer_by_layer():
    params = tree()
    stacked = {"layers": {"q": jnp.stack([layer["q"] for layer in params["layers"]])}}
    lora = filled(init_lora(KEY, stacked, rank=2, targets="layers/q"))
    a, b = lora["layers/q"]["a"], lora["layers/q"]["b"]
    assert (a.shape, b.shape) == ((2, 2, 6), (2, 4, 2))
    assert not np.array_equal(a[0], a[1])
    each = {f"layers/{i}/q": {"a": a[i], "b": b[i]} for i in range(2)}
    got = merge_lora(stacked, lora, alpha=4.0)["layers"]["q"]
    expected = merge_lora(params, each, alpha=4.0)["layers"]
    for i in range(2):
        np.testing.assert_allclose(got[i], expected[i]["q"], rtol=1e-6, atol=1e-6)  # float32


def test_a_scanned_decoder_is_a_stack():
    config = DecoderConfig.tiny(scan_layers=True)
    layers = parameter_shapes(config)["layers"]
    params = {"layers": {name: jnp.zeros((len(layers), *shape)) for name, shape in layers[0].items()}}
    lora = init_lora(KEY, params, rank=2, targets="layers/(q|v)")
    assert {name: x["b"].shape for name, x in lora.items()} == {"layers/q": (2, 32, 2), "layers/v": (2, 16, 2)}


def test_dtypes_are_kept_and_factors_are_float32():
    params = tree(jnp.bfloat16)
    lora = filled(init_lora(KEY, params, rank=2, targets=Q))
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    merged = merge_lora(params, lora, alpha=1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    weight = params["layers"][0]["q"]
    exact = weight.astype(jnp.float32) + lora_delta(lora["layers/0/q"], alpha=1.0)
    np.testing.assert_array_equal(merged["layers"][0]["q"], exact.astype(jnp.bfloat16))  # rounded once
    x = jnp.ones((3, 6), jnp.bfloat16)
    assert lora_linear(x, weight, lora["layers/0/q"], alpha=1.0).dtype == jnp.bfloat16
    assert lora_delta(lora["layers/0/q"], alpha=1.0).dtype == jnp.float32
    for dtype in ("bfloat16", np.dtype("bfloat16"), jnp.bfloat16):
        low = init_lora(KEY, params, rank=2, targets=Q, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}
    assert lora_delta(low["layers/0/q"], alpha=1.0).dtype == jnp.float32


def test_an_input_wider_than_the_factors_is_not_rounded(x64):
    adapter = {"a": jnp.ones((1, 2), jnp.float32), "b": jnp.ones((3, 1), jnp.float32)}
    x = jnp.array([[1.0, 2.0**-40]], jnp.float64)
    got = lora_linear(x, jnp.zeros((3, 2), jnp.float64), adapter, alpha=1.0)
    np.testing.assert_array_equal(got, 1 + 2.0**-40)


def test_gradients_go_into_adapters_only():
    params = tree()
    lora = filled(init_lora(KEY, params, rank=2, targets=Q))
    x = jax.random.normal(jax.random.key(4), (3, 6))

    def loss(params, lora):
        adapted = apply_lora(params, lora, alpha=2.0)
        return sum(jnp.sum(jnp.tanh(x @ layer["q"].T)) for layer in adapted["layers"]) + adapted["embed"].sum()

    frozen, slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, lora)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), frozen)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(slopes))

    def linear(weight, lora):
        outputs = (lora_linear(x, w, lora[f"layers/{i}/q"], alpha=2.0) for i, w in enumerate(weight))
        return sum(jnp.sum(jnp.tanh(y)) for y in outputs)

    weights = [layer["q"] for layer in params["layers"]]
    frozen, other = jax.jit(jax.grad(linear, argnums=(0, 1)))(weights, lora)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), slopes, other)  # float32


def test_gradients_against_differences(x64):
    params = {"w": jax.random.normal(KEY, (3, 4), jnp.float64)}
    lora = filled(init_lora(KEY, params, rank=2, targets="w"))
    x = jax.random.normal(jax.random.key(5), (2, 4), jnp.float64)
    # jit: check_grads hands over NumPy arrays, the library expects JAX's.
    for function in (
        lambda lora, alpha: jnp.tanh(x @ apply_lora(params, lora, alpha=alpha)["w"].T),
        lambda lora, alpha: jnp.tanh(lora_linear(x, params["w"], lora["w"], alpha=alpha)),
    ):
        jitted = jax.jit(function)
        check_grads(jitted, (lora, 2.0), order=1, modes=("fwd", "rev"))


def test_training_finds_a_change_of_low_rank():
    params = {"w": jax.random.normal(KEY, (6, 5))}
    change = jnp.outer(jnp.arange(1.0, 7.0), jnp.array([1.0, -1.0, 0.5, 0.0, 2.0])) / 6
    x = jax.random.normal(jax.random.key(6), (64, 5))
    y = x @ (params["w"] + change).T
    tx = optax.adam(0.03)

    def step(carry, _):
        lora, state = carry
        loss, slopes = jax.value_and_grad(
            lambda lora: jnp.mean((x @ apply_lora(params, lora, alpha=1.0)["w"].T - y) ** 2)
        )(lora)
        updates, state = tx.update(slopes, state)
        return (optax.apply_updates(lora, updates), state), loss

    lora = init_lora(KEY, params, rank=1, targets="w")
    (lora, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=400))((lora, tx.init(lora)))
    assert losses[-1] < 1e-4 * losses[0]
    np.testing.assert_allclose(merge_lora(params, lora, alpha=1.0)["w"], params["w"] + change, atol=0.02)


def test_alpha_scales_and_may_be_traced():
    lora = filled(init_lora(KEY, tree(), rank=2, targets=Q))["layers/0/q"]
    one = lora_delta(lora, alpha=1.0)
    np.testing.assert_allclose(one, lora["b"] @ lora["a"] / 2, rtol=1e-5)  # float32
    np.testing.assert_allclose(jax.jit(lambda alpha: lora_delta(lora, alpha=alpha))(8), 8 * one, rtol=1e-6)


def test_vmap_over_adapters_serves_several_users():
    params = {"w": jax.random.normal(KEY, (3, 4))}
    users = [filled(init_lora(KEY, params, rank=2, targets="w"), seed) for seed in range(3)]
    x = jax.random.normal(jax.random.key(7), (3, 5, 4))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *users)
    got = jax.vmap(lambda x, lora: lora_linear(x, params["w"], lora["w"], alpha=2.0))(x, both)
    for i, user in enumerate(users):
        expected = x[i] @ merge_lora(params, user, alpha=2.0)["w"].T
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-5)  # float32


def test_a_flax_model_is_adapted_in_its_own_layout():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 7, rngs=rngs)
            self.second = nnx.Linear(7, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    model = Model(nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    lora = filled(init_lora(KEY, params, rank=2, targets=r".*/kernel", layout="in_out"))
    assert {name: (f["a"].shape, f["b"].shape) for name, f in lora.items()} == {
        "first/kernel": ((2, 4), (7, 2)),
        "second/kernel": ((2, 7), (2, 2)),
    }
    nnx.replace_by_pure_dict(state, apply_lora(params, lora, alpha=2.0, layout="in_out"))
    x = jax.random.normal(jax.random.key(8), (3, 4))
    first, second = (
        lambda h, name=name: (
            lora_linear(h, params[name]["kernel"], lora[f"{name}/kernel"], alpha=2.0, layout="in_out")
            + params[name]["bias"]
        )
        for name in ("first", "second")
    )
    np.testing.assert_allclose(nnx.merge(graph, state)(x), second(jnp.tanh(first(x))), rtol=1e-5, atol=1e-5)  # float32


def test_sharded_weights_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.random.normal(KEY, (16, 4))}
    lora = filled(init_lora(KEY, params, rank=2, targets="w"))
    expected = merge_lora(params, lora, alpha=1.0)["w"]
    sharded = jax.device_put(params, sharding)
    merged = jax.jit(lambda params, lora: merge_lora(params, lora, alpha=1.0))(sharded, lora)["w"]
    assert merged.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(merged, expected, rtol=1e-6)  # float32
    assert merge_lora(sharded, lora, alpha=1.0)["w"].sharding.is_equivalent_to(sharding, 2)


def test_shapes_are_enough_to_start():
    shapes = jax.eval_shape(tree)
    got = init_lora(KEY, shapes, rank=2, targets=Q)
    jax.tree.map(np.testing.assert_array_equal, got, init_lora(KEY, tree(), rank=2, targets=Q))
    again = jax.jit(lambda key: init_lora(key, shapes, rank=2, targets=Q))(KEY)
    jax.tree.map(np.testing.assert_array_equal, got, again)


def test_targets_may_be_a_predicate():
    assert list(init_lora(KEY, tree(), rank=1, targets=lambda name: name.endswith("0/q"))) == ["layers/0/q"]


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        (tree(), {"targets": "q"}, ValueError, r"targets 'q' match no leaf; matrices are 'embed', 'layers/0/q'"),
        ({"b": jnp.ones(2)}, {"targets": "q"}, ValueError, "match no leaf; matrices are not there at all"),
        (tree(), {"targets": ".*"}, ValueError, r"targets select 'layers/0/norm' of shape \(6,\), expected matrices"),
        ({"w": jnp.ones((2, 2), jnp.int8)}, {"targets": "w"}, TypeError, "'w' of dtype int8, expected real floating"),
        ({"w": jnp.ones((2, 2), jnp.complex64)}, {"targets": "w"}, TypeError, "'w' of dtype complex64"),
        (tree(), {"targets": Q, "layout": "oi"}, ValueError, "layout must be 'out_in' or 'in_out', got layout='oi'"),
        (tree(), {"targets": Q, "dtype": jnp.int32}, TypeError, "dtype must be a real floating dtype, got dtype=int32"),
        (
            {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))},
            {"targets": "a/b"},
            ValueError,
            "'a/b' is the path of 2 leaves",
        ),
    ],
)
def test_wrong_arguments_are_named(params, options, error, message):
    with pytest.raises(error, match=message):
        init_lora(KEY, params, rank=1, **options)


def test_adapters_must_fit():
    params = tree()
    lora = init_lora(KEY, params, rank=2, targets=Q)
    with pytest.raises(ValueError, match="lora has adapters for 'layers/0/q', 'layers/1/q', which params do not have"):
        merge_lora({"embed": params["embed"]}, lora, alpha=1.0)
    message = r"'layers/0/q' is for weights of shape \(6, 4\) with layout='in_out', got \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        apply_lora(params, lora, alpha=1.0, layout="in_out")
    stacked = {"w": jnp.ones((3, 4, 6))}
    other = init_lora(KEY, stacked, rank=2, targets="w")
    for weight in (jnp.ones((4, 6)), jnp.ones((2, 4, 6)), jnp.ones((1, 4, 6)), jnp.ones(6)):
        with pytest.raises(ValueError, match="the adapter of 'w'"):  # and does not broadcast
            merge_lora({"w": weight}, other, alpha=1.0)
    for function in (
        lambda: lora_delta(other["w"], alpha=1.0, layout="?"),
        lambda: merge_lora(stacked, other, alpha=1.0, layout="?"),
        lambda: lora_linear(jnp.ones((1, 6)), jnp.ones((4, 6)), lora["layers/0/q"], alpha=1.0, layout="?"),
    ):
        with pytest.raises(ValueError, match="layout must be"):
            function()
