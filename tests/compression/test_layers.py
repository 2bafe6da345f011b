"""Layers ranked by how they turn the stream, layers left out, MLPs with fewer channels."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.compression import (
    accumulate_importance,
    finalize_importance,
    init_importance,
    layer_importance,
    prune_layers,
    select_layers,
    slice_mlp,
)

DATA = np.load(pathlib.Path(__file__).parent.parent / "data" / "efficient_vla.npz")
HIDDEN = np.asarray(DATA["layers/hidden"], np.float32)
importance = jax.jit(layer_importance)


def test_importance_and_order_are_those_of_the_vectors():
    found = importance(HIDDEN)
    np.testing.assert_allclose(found, DATA["layers/importance"], atol=1e-6)  # float32
    with jax.enable_x64(True):
        exact = layer_importance(jnp.asarray(DATA["layers/hidden"]))
        np.testing.assert_allclose(exact, DATA["layers/importance"], atol=1e-14)
    ranked = DATA["layers/ranked"].tolist()
    for drop in range(len(ranked)):
        assert set(range(len(ranked))) - set(select_layers(found, num_drop=drop)) == set(ranked[:drop])


def test_batches_accumulate_to_the_whole():
    state = init_importance(len(HIDDEN) - 1)
    for rows in (slice(0, 1), slice(1, 4)):
        state = jax.jit(accumulate_importance)(state, HIDDEN[:, rows])
    np.testing.assert_allclose(finalize_importance(state), importance(HIDDEN), atol=1e-6)


def test_identity_negation_zero_and_scale():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    stack = jnp.stack([x, x, -x, 1e-15 * x, 0 * x])
    np.testing.assert_allclose(importance(stack), [0, 2, 0, 0], atol=1e-6)  # norms below the floor count as unturned
    scaled = jnp.asarray(HIDDEN) * jnp.asarray([1, 1e-6, 1e6, 3, 1, 1e20, 1, 7, 1])[:, None, None, None]
    np.testing.assert_allclose(importance(scaled), importance(HIDDEN), atol=1e-6)


def test_masked_positions_do_not_count_and_lengths_do_not_weigh():
    mask = np.ones(HIDDEN.shape[1:3], bool)
    mask[0, 2:] = False
    mask[3] = False
    broken = HIDDEN.copy()
    broken[:, 0, 2:] = np.nan
    broken[:, 3] = np.nan
    rows = [layer_importance(HIDDEN[:, :1, :2]), layer_importance(HIDDEN[:, 1:2]), layer_importance(HIDDEN[:, 2:3])]
    np.testing.assert_allclose(layer_importance(broken, mask=mask), sum(rows) / 3, atol=1e-6)


def test_bf16_states_are_worked_in_float32():
    found = importance(HIDDEN.astype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, DATA["layers/importance"], atol=2e-2)  # 8 bits of each entry


def test_ties_drop_the_lower_index_and_stacks_and_lists_agree():
    kept = select_layers(np.array([0.5, 0.2, 0.2, 0.2, 0.1]), num_drop=3)
    assert kept == (0, 3)
    stacked = {"w": jnp.arange(10.0).reshape(5, 2), "b": jnp.arange(5)}
    listed = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(5)]
    pruned = prune_layers(stacked, kept)
    for i, layer in enumerate(prune_layers(listed, kept)):
        assert jax.tree.all(jax.tree.map(lambda a, b, i=i: jnp.array_equal(a[i], b), pruned, layer))
    assert prune_layers((1, 2), (0, 1)) == (1, 2)


def test_sliced_mlp_drops_the_least_channels_and_nothing_else():
    key = jax.random.split(jax.random.key(1), 3)
    layer = {
        "gate": jax.random.normal(key[0], (5, 3)), "up": jax.random.normal(key[1], (5, 3)),
        "down": jax.random.normal(key[2], (3, 5)).at[:, 2].set(0), "o": jnp.ones(3),
    }  # fmt: skip
    sliced = slice_mlp(layer, keep_ratio=0.75)  # ceil(3.75)
    assert sliced["gate"].shape == (4, 3)

    def mlp(p, x):
        return (jax.nn.silu(x @ p["gate"].T) * (x @ p["up"].T)) @ p["down"].T

    x = jnp.arange(3.0)
    np.testing.assert_allclose(mlp(sliced, x), mlp(layer, x), rtol=1e-6)  # the channel with no output went
    assert slice_mlp(layer, keep_ratio=1.0).keys() == layer.keys()
    own = slice_mlp(layer, keep_ratio=0.2, scores=jnp.array([0, 0, 1.0, 1.0, 0]))
    assert jnp.array_equal(own["up"], layer["up"][2:3])
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), layer)
    both = jax.jit(lambda p: slice_mlp(p, keep_ratio=0.75))(stacked)
    np.testing.assert_array_equal(both["down"][0], sliced["down"])
    biased = slice_mlp(
        {"up": jnp.eye(2), "up_bias": jnp.array([5.0, 7.0]), "down": jnp.array([[1.0, 2]])}, keep_ratio=0.5
    )
    assert biased["up_bias"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_importance(jnp.ones((1, 2, 3, 4))), "at least one layer"),
        (lambda: layer_importance(jnp.ones((2, 3, 4))), "expected .L"),
        (lambda: layer_importance(HIDDEN, mask=np.ones((2, 2), bool)), "mask has shape"),
        (lambda: init_importance(0), "num_layers is 0"),
        (lambda: accumulate_importance(init_importance(3), HIDDEN), "expected 3 as state"),
        (lambda: select_layers([1.0, 2.0], num_drop=2), "num_drop is 2, expected 0 to 1"),
        (lambda: select_layers([1.0, 2.0], num_drop=-1), "num_drop is -1"),
        (lambda: select_layers([1.0, 2.0], num_drop=1.0), "num_drop is 1.0"),
        (lambda: select_layers([1.0, np.nan], num_drop=1), r"layers \[1\] is NaN"),
        (lambda: select_layers([], num_drop=0), "importance has shape"),
        (lambda: prune_layers([1, 2], ()), "kept is empty"),
        (lambda: prune_layers([1, 2], (1, 0)), "rising indices"),
        (lambda: prune_layers([1, 2], (0, 2)), "from 0 to 1"),
        (lambda: prune_layers({"a": jnp.ones(2), "b": jnp.ones(3)}, (0,)), "expected equal numbers"),
        (lambda: slice_mlp({"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}, keep_ratio=0), "keep_ratio is 0"),
        (lambda: slice_mlp({"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}, keep_ratio=1.1), "keep_ratio is 1.1"),
        (lambda: slice_mlp({"up": jnp.ones((2, 2))}, keep_ratio=0.5), "expected down"),
        (lambda: slice_mlp({"up": jnp.ones((3, 2)), "down": jnp.ones((2, 2))}, keep_ratio=0.5), "up has 3 channels"),
        (
            lambda: slice_mlp({"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}, keep_ratio=0.5, scores=jnp.ones(3)),
            "scores has shape",
        ),
        (
            lambda: slice_mlp(
                {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}, keep_ratio=0.5, scores=jnp.array([1, jnp.nan])
            ),
            "scores has NaN",
        ),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
