"""The filter, its records, its training and its file; and the rules by which predictions are accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxaccel.decoding.heads_file import load_heads
from jaxaccel.decoding.learn2pd import (
    Filter,
    Oracle,
    OracleRecords,
    Threshold,
    TopK,
    accept_mask,
    collect_oracle,
    confidence_and_token,
    filter_apply,
    filter_init,
    load_filter,
    num_transfer_tokens,
    save_filter,
    train_filter,
)
from jaxaccel.decoding.learn2pd.train import filter_loss, split_records
from jaxaccel.models.masked_diffusion import diffusion_model
from tests.decoding.llada import sure_of, table, tiny_config, tiny_filter, tiny_params


@pytest.fixture(scope="module")
def reference(vectors):
    return vectors("learn2pd")


def unchecked(function):
    """The function as users have it, without the shape checks that the suite adds to annotations."""
    return function.__wrapped__


# The filter -----------------------------------------------------------------------------------------------------------


def test_outputs_of_the_reference_also_for_a_short_block(reference):
    params = tiny_filter(reference).params
    # Sums of 16 products of numbers of order 1, in float32.
    np.testing.assert_allclose(
        filter_apply(params, jnp.asarray(reference["filter/in"])), reference["filter/logits"], atol=1e-5
    )
    short = filter_apply(params, jnp.asarray(reference["filter/short_in"]))
    np.testing.assert_allclose(short, reference["filter/short_logits"], atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 32])
def test_size_and_range_of_fresh_parameters(block):
    params = filter_init(jax.random.key(1), block_length=block)
    assert sum(leaf.size for leaf in params) == 2 * block * (block + 1)
    assert all(float(jnp.abs(leaf).max()) <= block**-0.5 for leaf in params)
    if block == 32:  # uniform: its deviation is the bound over √3; 1024 numbers know it to 5 %
        np.testing.assert_allclose(params.w1.std() * (3 * block) ** 0.5, 1, atol=0.05)
    with pytest.raises(ValueError, match="block_length is 0"):
        filter_init(jax.random.key(0), block_length=0)


def test_more_positions_than_it_was_trained_for_are_refused():
    params = filter_init(jax.random.key(0), block_length=4)
    with pytest.raises(ValueError, match="5 positions, but the filter was trained for block_length = 4"):
        filter_apply(params, jnp.ones((1, 5)))
    with pytest.raises(ValueError, match="trained for block_length = 4"):
        accept_mask(Filter(params), jnp.ones((1, 5)), jnp.ones((1, 5), bool), num_min=1)


def test_gradients_of_its_loss(x64):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), filter_init(jax.random.key(0), block_length=3))
    confidence, correct = jnp.asarray(rng.uniform(size=(4, 3))), jnp.asarray(rng.uniform(size=(4, 3)) > 0.5)
    check_grads(lambda p: filter_loss(p, confidence, correct), (params,), order=1, modes=["rev"])
    logits = np.asarray(filter_apply(params, confidence))
    by_hand = np.where(correct, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))).mean()
    np.testing.assert_allclose(filter_loss(params, confidence, correct), by_hand, rtol=1e-12)


# Schedules and rules --------------------------------------------------------------------------------------------------


def test_schedule_of_the_reference(reference):
    masked = jnp.asarray(reference["ntt/mask"].sum(1), jnp.int32)
    np.testing.assert_array_equal(num_transfer_tokens(masked, steps=5), reference["ntt/out"])
    with pytest.raises(ValueError, match="steps is 0"):
        num_transfer_tokens(masked, steps=0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 64), min_size=1, max_size=4), st.integers(1, 40))
def test_a_schedule_reveals_all_masks_and_never_speeds_up(masked, steps):
    found = np.asarray(num_transfer_tokens(jnp.array(masked, jnp.int32), steps=steps))
    assert found.sum(1).tolist() == masked
    assert np.all(np.diff(found) <= 0)
    assert np.all(found.max(1) - found.min(1) <= 1)


rows = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=5, max_size=5)


@settings(deadline=None, max_examples=60)
@given(rows, st.integers(0, 9), st.floats(0.05, 0.9))
def test_accepted_are_masked_enough_of_them_and_more_for_less(row, count, tau):
    confidence = jnp.array([[c for c, _ in row]])
    masked = jnp.array([[m for _, m in row]])
    params = jax.tree.map(lambda x: 4 * x, filter_init(jax.random.key(2), block_length=5))
    for policy in (Threshold, lambda value: Filter(params, value)):
        strict, loose = (
            np.asarray(accept_mask(policy(value), confidence, masked, num_min=count)) for value in (tau + 0.05, tau)
        )
        assert not np.any(loose & ~np.asarray(masked))
        assert not np.any(strict & ~loose)
        assert loose.sum() >= min(count, int(masked.sum()))
    ranked = np.asarray(accept_mask(TopK(), confidence, masked, num_min=count))[0]
    assert ranked.sum() == min(count, int(masked.sum()))
    order = sorted((i for i in range(5) if row[i][1]), key=lambda i: (-row[i][0], i))
    assert set(np.flatnonzero(ranked)) == set(order[:count])


def test_the_oracle_accepts_what_is_right():
    tokens, masked = jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]])
    policy = Oracle(jnp.array([[1, 9, 3]]))
    confidence = jnp.zeros((1, 3))
    assert accept_mask(policy, confidence, masked, num_min=0, tokens=tokens).tolist() == [[True, False, False]]
    with pytest.raises(ValueError, match="tokens is None"):
        accept_mask(policy, confidence, masked, num_min=0)
    with pytest.raises(ValueError, match="threshold is 1"):
        accept_mask(Threshold(1), confidence, masked, num_min=0)


def test_rules_batch_with_vmap_and_jit():
    confidence = jax.random.uniform(jax.random.key(0), (3, 2, 4))
    masked = confidence > 0.2
    policy = Filter(filter_init(jax.random.key(1), block_length=4), 0.5)
    each = jnp.stack([accept_mask(policy, c, m, num_min=1) for c, m in zip(confidence, masked, strict=True)])
    both = jax.jit(jax.vmap(lambda c, m: accept_mask(policy, c, m, num_min=1)))(confidence, masked)
    np.testing.assert_array_equal(both, each)


# Confidence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_confidence_is_the_largest_probability(dtype):
    logits = 20 * jax.random.normal(jax.random.key(0), (50, 30)).astype(dtype)
    token, confidence = confidence_and_token(logits)
    wide = np.asarray(logits, np.float64)
    odds = np.exp(wide - wide.max(-1, keepdims=True))
    np.testing.assert_allclose(confidence, 1 / odds.sum(-1), rtol=1e-6)  # float32, whatever the logits are
    np.testing.assert_array_equal(token, wide.argmax(-1))
    if dtype == jnp.bfloat16:  # in bfloat16 itself the surest would all be 1
        assert len(np.unique(confidence)) > len(np.unique(confidence_and_token(logits, dtype=jnp.bfloat16)[1]))


def test_forbidden_tokens_keep_their_probability():
    token, confidence = confidence_and_token(jnp.log(jnp.array([0.2, 0.7, 0.1])), forbid=1)
    assert int(token) == 0
    np.testing.assert_allclose(confidence, 0.2, rtol=1e-6)
    for options, message in (
        ({"forbid": 3}, "forbid is 3"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "needs a key"),
    ):
        with pytest.raises(ValueError, match=message):
            confidence_and_token(jnp.zeros(3), **options)


# Records and training -------------------------------------------------------------------------------------------------


def test_records_of_the_reference(reference):
    _, _, mask, *_, block = map(int, reference["meta"])
    records = collect_oracle(
        diffusion_model(tiny_config(reference["meta"])), tiny_params(reference),
        reference["prompts"][:1].astype(np.int32), reference["vanilla/tokens"][:1, 7:].astype(np.int32),
        block_length=block, mask_id=mask,
    )  # fmt: skip
    np.testing.assert_array_equal(records.block, reference["egp/block"])
    np.testing.assert_array_equal(records.correct, reference["egp/is_correct"])
    np.testing.assert_allclose(records.confidence, reference["egp/confidence"], atol=5e-6)  # two layers in float32
    assert records.num_forwards.tolist() == [int(reference["egp/num_forwards"])]


def test_a_block_that_is_stuck_is_recorded_twice_unless_asked_not_to():
    logits = sure_of([0, 1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6, 0.5], 9)
    answer = jnp.array([[1, 2, 3, 5]])  # the last is never right
    options = {"block_length": 2, "mask_id": 8}
    records = collect_oracle(table, logits, jnp.array([[0]]), answer, **options)
    assert records.block.tolist() == [0, 1, 1]
    assert records.correct.tolist() == [[True, True], [True, False], [True, False]]
    np.testing.assert_allclose(records.confidence, [[0.8, 0.7], [0.6, 0.5], [0.6, 0.5]], rtol=1e-5)
    fewer = collect_oracle(table, logits, jnp.array([[0]]), answer, deduplicate=True, **options)
    assert fewer.block.tolist() == [0, 1]
    with pytest.raises(ValueError, match="reference contains the mask"):
        collect_oracle(table, logits, jnp.array([[0]]), jnp.array([[1, 2, 3, 8]]), **options)
    with pytest.raises(ValueError, match=r"reference has shape \(2, 4\)"):
        unchecked(collect_oracle)(table, logits, jnp.array([[0]]), jnp.tile(answer, (2, 1)), **options)


def some_records(count=200, block=4):
    confidence = np.random.default_rng(0).uniform(size=(count, block)).astype(np.float32)
    return OracleRecords(
        confidence, confidence > 0.7, np.zeros(count, np.int32), np.arange(count, dtype=np.int32), np.ones(1, np.int32)
    )


def test_training_finds_a_threshold_and_repeats_with_its_key():
    records = some_records()
    first, again, other = (
        train_filter(records, learning_rate=3e-2, steps=600, key=jax.random.key(i)) for i in (0, 0, 1)
    )
    assert first.test_loss < 0.4  # chance is 0.61, the entropy of three in ten
    assert first.false_share < 0.1
    assert first.accepted_share > 0.3
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert np.any(first.params.w1 != other.params.w1)
    train, validation, test = split_records(200, 0)
    assert sorted(np.concatenate([train, validation, test])) == list(range(200))
    assert (len(validation), len(test)) == (20, 20)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {}, "records hold 2 passes, expected at least 3"),
        (9, {"steps": 0}, "steps is 0"),
        (9, {"learning_rate": -1.0}, "learning_rate is -1.0"),
        (9, {"weight_decay": float("nan")}, "weight_decay is nan"),
        (9, {"monitor": 1.0}, "monitor is 1.0"),
    ],
)
def test_training_refuses(count, options, message):
    with pytest.raises(ValueError, match=message):
        train_filter(some_records(count), key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="must both be"):
        train_filter(some_records()._replace(correct=np.ones((3, 4), bool)), key=jax.random.key(0))


# The file -------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda x, d=dtype: x.astype(d), filter_init(jax.random.key(0), block_length=4))
        path = tmp_path / "folder" / "filter.safetensors"
        save_filter(path, params, model_name="tiny", tau=0.9)
        again, info = load_filter(path)
        jax.tree.map(np.testing.assert_array_equal, again, params)
        assert again.w1.dtype == dtype
        assert (info.model_name, info.block_length, info.tau) == ("tiny", 4, 0.9)
    assert [file.name for file in path.parent.iterdir()] == ["filter.safetensors"]


def test_files_that_are_no_filter_are_refused(tmp_path):
    from safetensors.numpy import save_file

    params = filter_init(jax.random.key(0), block_length=4)
    path = tmp_path / "filter.safetensors"
    with pytest.raises(ValueError, match=r"tau is 2.0, expected a number in \(0, 1\)"):
        save_filter(path, params, model_name="tiny", tau=2.0)
    with pytest.raises(TypeError, match="w1 must be of float16"):
        unchecked(save_filter)(path, params._replace(w1=jnp.ones((4, 4), int)), model_name="tiny")
    with pytest.raises(ValueError, match=r"b2 has shape \(3,\), expected \(4,\)"):
        unchecked(save_filter)(path, params._replace(b2=jnp.ones(3)), model_name="tiny")
    save_filter(path, params, model_name="tiny")
    with pytest.raises(ValueError, match=r"not a file of Medusa heads: its format is 'jaxaccel\.learn2pd'"):
        load_heads(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"filter\.safetensors: truncated"):
        load_filter(path)
    arrays = {name: np.asarray(value) for name, value in params._asdict().items()}
    said = {"format": "jaxaccel.learn2pd", "version": "1", "model": "tiny", "block_length": "4", "tau": "0.9"}
    for changes, message in (
        ({"format": "other"}, "not a file of a filter"),
        ({"version": "2"}, "version '2', expected 1"),
        ({"block_length": "5"}, "block_length is 5, but the arrays are for 4"),
        ({"tau": "none"}, "corrupt"),
        ({"tau": "1.5"}, "tau is 1.5"),
    ):
        save_file(arrays, path, metadata=said | changes)
        with pytest.raises(ValueError, match=message):
            load_filter(path)
    save_file(arrays, path, metadata={name: said[name] for name in ("format", "version", "model", "tau")})
    with pytest.raises(ValueError, match="corrupt: its metadata lack 'block_length'"):
        load_filter(path)
    save_file({"w1": arrays["w1"]}, path, metadata=said)
    with pytest.raises(ValueError, match="arrays are w1, expected w1, b1, w2, b2"):
        load_filter(path)
