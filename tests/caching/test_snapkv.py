"""SnapKV against vectors of the reference code, a naive formula, and prompts of different lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.caching.snapkv import SnapKVSelection, compress, snapkv_select, snapkv_votes, snapkv_window

select = jax.jit(snapkv_select, static_argnames=("capacity", "window", "kernel_size", "pooling", "aggregate"))
votes_of = jax.jit(snapkv_votes, static_argnames=("kernel_size", "pooling"))
window_of = jax.jit(snapkv_window, static_argnames="window")
compressed = jax.jit(compress, static_argnames="axis")


def case(data, name):
    window, capacity, kernel, pooling = data[f"{name}_cfg"].tolist()
    options = {"kernel_size": kernel, "pooling": ("avg", "max")[pooling]}
    q, k, v = (jnp.asarray(data[f"{name}_{part}"]) for part in "qkv")
    return q, k, v, window, capacity, options


def prompt(batch=2, tokens=30, heads=4, kv_heads=2, size=8, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, tokens, n, size) for n in (heads, kv_heads, kv_heads)]
    return tuple(2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def naive_votes(q, k, window, kernel, pooling):
    """Votes of one row and head, in float64 and from the whole T×T attention."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    tokens = len(k)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    votes = attention[-window:, : tokens - window].sum(0)
    half = kernel // 2
    padded = np.pad(votes, half, constant_values=0 if pooling == "avg" else -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel)
    return windows.mean(-1) if pooling == "avg" else windows.max(-1)


@pytest.mark.parametrize("name", ["snap_a", "snap_b"])
def test_votes_equal_the_reference(name, vectors):
    q, k, _, window, _, options = case(vectors("llm_acceleration"), name)
    got = votes_of(window_of(q, window), k, **options)
    # float32 softmax of 40 to 48 entries in another order of summation
    np.testing.assert_allclose(got, vectors("llm_acceleration")[f"{name}_pooled"], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["snap_a", "snap_b"])
def test_selection_equals_the_reference(name, vectors):
    data = vectors("llm_acceleration")
    q, k, v, window, capacity, options = case(data, name)
    got = select(window_of(q, window), k, capacity=capacity, window=window, aggregate="none", **options)
    kept, tokens = data[f"{name}_kept"], k.shape[1]
    assert got.indices.shape == kept.shape
    assert got.kept.tolist() == [capacity] * len(kept)
    assert (np.diff(got.indices, axis=-1) > 0).all()
    assert (np.asarray(got.indices)[..., -window:] == np.arange(tokens - window, tokens)).all()
    if options["pooling"] == "avg":
        np.testing.assert_array_equal(got.indices, kept)
    # Max pooling makes plateaus, on which any choice is right: the votes that were kept must be the same.
    votes = np.asarray(data[f"{name}_pooled"])
    for ours, theirs, row in zip(got.indices, kept, votes, strict=True):
        for a, b, scores in zip(np.asarray(ours), theirs, row, strict=True):
            chosen = [np.sort(scores[x[x < tokens - window]]) for x in (a, b)]
            np.testing.assert_allclose(chosen[0], chosen[1], rtol=1e-5)
    # What is stored, for every query head.
    stored = compressed(v, got)
    group = q.shape[2] // v.shape[2]
    for b, n in np.ndindex(kept.shape[:2]):
        np.testing.assert_array_equal(stored[b, :, n], v[b, :, n // group][got.indices[b, n]])


def test_short_prompt_is_kept_whole(vectors):
    data = vectors("llm_acceleration")
    q, k, v, window, capacity, options = case(data, "snap_short")
    got = select(window_of(q, window), k, capacity=capacity, window=window, **options)
    tokens = k.shape[1]
    assert got.kept.tolist() == [tokens]
    np.testing.assert_array_equal(got.indices[..., :tokens], data["snap_short_kept"])
    np.testing.assert_array_equal(compressed(v, got)[:, :tokens], v)


@pytest.mark.parametrize("capacity", [30, 31, 64])
def test_capacity_for_all_changes_nothing(capacity):
    q, k, v = prompt()
    got = select(window_of(q, 4), k, capacity=capacity, window=4)
    assert got.kept.tolist() == [30, 30]
    np.testing.assert_array_equal(compressed(v, got)[:, :30], v)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_equals_the_naive_formula(kernel, pooling):
    q, k, _ = prompt()
    window, capacity = 4, 12
    options = {"kernel_size": kernel, "pooling": pooling}
    votes = votes_of(window_of(q, window), k, **options)
    expected = np.stack(
        [[naive_votes(q[b, :, n], k[b, :, n // 2], window, kernel, pooling) for n in range(4)] for b in range(2)]
    )
    np.testing.assert_allclose(votes, expected, rtol=2e-5, atol=1e-7)  # float32
    for aggregate, scores in (("none", votes), ("mean", votes.reshape(2, 2, 2, -1).mean(2))):
        got = select(window_of(q, window), k, capacity=capacity, window=window, aggregate=aggregate, **options)
        # A stable sort breaks ties as documented: the lowest position first.
        best = np.sort(np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., : capacity - window], -1)
        np.testing.assert_array_equal(got.indices[..., : capacity - window], best)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("aggregate", ["mean", "none"])
def test_padded_prompts_are_as_if_alone(pooling, aggregate):
    q, k, v = prompt(batch=5, tokens=32)
    lengths = np.array([32, 13, 12, 5, 2])  # full, one too many, just fitting, short, below the window
    window, capacity = 4, 12
    options = {"capacity": capacity, "window": window, "kernel_size": 5, "pooling": pooling, "aggregate": aggregate}
    # What lies beyond a prompt's end must not matter.
    padding = (np.arange(32) >= lengths[:, None])[..., None, None]
    q, k = jnp.where(padding, 1e4, q), jnp.where(padding, -1e4, k)
    length = jnp.asarray(lengths)
    together = select(window_of(q, window, length=length), k, length=length, **options)
    assert together.kept.tolist() == np.minimum(lengths, capacity).tolist()
    votes = votes_of(window_of(q, window, length=length), k, length=length, pooling=pooling)
    for b, n in enumerate(lengths.tolist()):
        assert (votes[b, :, max(n - window, 0) :] == -jnp.inf).all()
        if n <= capacity:
            np.testing.assert_array_equal(
                together.indices[b], np.broadcast_to(np.arange(capacity), (4 if aggregate == "none" else 2, capacity))
            )
            continue
        alone = select(window_of(q[b : b + 1, :n], window), k[b : b + 1, :n], **options)
        np.testing.assert_array_equal(together.indices[b], alone.indices[0])
        one = votes_of(window_of(q[b : b + 1, :n], window), k[b : b + 1, :n], pooling=pooling)
        np.testing.assert_allclose(votes[b, :, : n - window], one[0], rtol=1e-5, atol=1e-7)  # float32 sums
    assert np.isfinite(compressed(v, together)).all()


def test_permuted_prefix_gives_permuted_selection():
    q, k, _ = prompt()
    order = np.random.default_rng(0).permutation(26)
    moved = k.at[:, :26].set(k[:, order])
    options = {"capacity": 12, "window": 4, "kernel_size": 1}
    before, after = (select(window_of(q, 4), keys, **options).indices for keys in (k, moved))
    for b, head in np.ndindex(2, 2):
        assert set(order[np.asarray(after[b, head, :8])]) == set(np.asarray(before[b, head, :8]).tolist())


def test_ties_go_to_the_lowest_position():
    q, k = jnp.ones((1, 2, 1, 4)), jnp.zeros((1, 10, 1, 4))  # every key is as good
    assert select(q, k, capacity=5, window=2, kernel_size=1).indices.tolist() == [[[0, 1, 2, 8, 9]]]
    # A plateau of max pooling around position 5, cut by the capacity.
    k = k.at[0, 5].set(3.0)
    got = select(q, k, capacity=4, window=2, kernel_size=3, pooling="max")
    assert got.indices.tolist() == [[[4, 5, 8, 9]]]


def test_mean_and_none_agree_without_groups():
    q, k, _ = prompt(heads=2, kv_heads=2)
    window = window_of(q, 4)
    mean, none = (select(window, k, capacity=9, window=4, aggregate=a).indices for a in ("mean", "none"))
    np.testing.assert_array_equal(mean, none)


def test_finds_the_needle():
    """The last tokens ask for what one earlier token says: its place survives a small capacity."""
    _, k, v = prompt(batch=1, tokens=60)
    needle = k[:, 17:18]
    window = jnp.repeat(6 * jnp.repeat(needle, 2, axis=2), 2, axis=1)
    got = select(window, k, capacity=4, window=2, kernel_size=1)
    assert (np.asarray(got.indices) == 17).any(-1).all()
    dense = jax.nn.dot_product_attention(window[:, -1:], k, v)
    short = jax.nn.dot_product_attention(window[:, -1:], compressed(k, got), compressed(v, got))
    # The needle holds all but about e^-20 of the attention.
    np.testing.assert_allclose(short, dense, atol=1e-3)


def test_axes_and_group_repetition():
    _, _, v = prompt()
    rng = np.random.default_rng(0)
    for heads in (2, 4):
        indices = jnp.asarray(np.sort(rng.permuted(np.tile(np.arange(30), (2, heads, 1)), axis=-1)[..., :7], -1))
        selection = SnapKVSelection(indices, jnp.array([7, 7]))
        first = compressed(v, selection)
        second = compressed(v.swapaxes(1, 2), selection, axis=2)
        assert first.shape == (2, 7, heads, 8)
        np.testing.assert_array_equal(first, second.swapaxes(1, 2))
        for b, n in np.ndindex(2, heads):
            np.testing.assert_array_equal(first[b, :, n], v[b, indices[b, n], n // (heads // 2)])
    codes = jnp.arange(2 * 30 * 2 * 1).reshape(2, 30, 2, 1).astype(jnp.int8)
    assert compressed(codes, SnapKVSelection(indices, jnp.array([7, 7]))).dtype == jnp.int8  # quantised caches too


def test_bfloat16_votes_are_float32():
    q, k, _ = prompt(dtype=jnp.bfloat16)
    low = votes_of(window_of(q, 4), k)
    high = votes_of(window_of(q, 4).astype(jnp.float32), k.astype(jnp.float32))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=1e-4, atol=1e-6)  # products of bfloat16 are exact in float32


def test_maps_and_never_forms_the_square():
    q, k, _ = prompt(batch=3)
    options = {"capacity": 9, "window": 4}
    whole = select(window_of(q, 4), k, **options)
    one = functools.partial(snapkv_select, **options)
    mapped = jax.vmap(lambda q, k: one(window_of(q[None], 4), k[None]))(q, k)
    np.testing.assert_array_equal(mapped.indices[:, 0], whole.indices)
    # The largest intermediate has W·T entries per head, not T².
    jaxpr = jax.make_jaxpr(one)(jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 512, 2, 8)))
    sizes = [v.aval.size for equation in jaxpr.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) <= 4 * 4 * 512


def test_bad_arguments_are_refused():
    q, k, v = prompt()
    window = snapkv_window(q, 4)
    good = {"capacity": 12, "window": 4}
    selection = SnapKVSelection(jnp.zeros((2, 2, 5), jnp.int32), jnp.array([5, 5]))
    for message, call in (
        ("capacity must be greater than window = 4, got 4", lambda: snapkv_select(window, k, capacity=4, window=4)),
        ("capacity must be greater", lambda: snapkv_select(window, k, capacity=0, window=4)),
        ("window = 5 queries, got 4", lambda: snapkv_select(window, k, capacity=12, window=5)),
        ("kernel_size must be odd", lambda: snapkv_select(window, k, **good, kernel_size=4)),
        ("kernel_size must be odd", lambda: snapkv_votes(window, k, kernel_size=-1)),
        ("pooling must be one of 'avg', 'max', got 'sum'", lambda: snapkv_select(window, k, **good, pooling="sum")),
        ("aggregate must be one of", lambda: snapkv_select(window, k, **good, aggregate="max")),
        ("between 1 and T = 3 queries, got 4", lambda: snapkv_votes(window, k[:, :3])),
        ("divides the queries' 4, got 3", lambda: snapkv_votes(window, jnp.zeros((2, 30, 3, 8)))),
        ("between 1 and T = 30, got 31", lambda: snapkv_window(q, 31)),
        ("window must be between", lambda: snapkv_window(q, 0)),
        ("4 axes", lambda: compress(v[0], selection)),
        ("axis must be 1 or 2", lambda: compress(v, selection, axis=3)),
        ("must agree with selection", lambda: compress(v[:1], selection)),
        ("must agree with selection", lambda: compress(jnp.zeros((2, 30, 3, 8)), selection)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
