"""Parallel decoding of a masked-diffusion model: every mode of the reference, limits, what could go wrong unseen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.decoding.learn2pd import Filter, FilterParams, Oracle, Threshold, TopK, decode, filter_init
from jaxaccel.decoding.learn2pd.decode import buckets
from jaxaccel.models import init_params
from jaxaccel.models.decoder import stack_layers
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.masked_diffusion import diffusion_model, masked_diffusion_apply
from tests.decoding.llada import sure_of, table, tiny_config, tiny_filter, tiny_params

V, MASK, END = 12, 11, 10


def unchecked(function):
    """The function as users have it, without the shape checks that the suite adds to annotations."""
    return function.__wrapped__


@pytest.fixture(scope="module")
def reference(vectors):
    return vectors("learn2pd")


@pytest.fixture(scope="module")
def tiny(reference):
    """Decode the vectors' prompts with the vectors' model; modes that share a program share its compilation."""
    params, config = tiny_params(reference), tiny_config(reference["meta"])
    _, end, mask, *_, gen_length, block = map(int, reference["meta"])
    prompts = reference["prompts"].astype(np.int32)

    def run(policy, rows=slice(None), cut=False, **options):
        return decode(
            diffusion_model(config), params, prompts[rows], gen_length=gen_length, block_length=block, policy=policy,
            mask_id=mask, eot_id=end if cut else None, pad_id=-1, **options,
        )  # fmt: skip

    return run


MODES = {
    "vanilla": {},
    "vanilla_half": {"steps": 16},
    "vanilla_cfg": {"cfg_scale": 0.5},
    "l2p": {"filter": True},
    "l2p_eot": {"filter": True, "cut": True},
    "l2p_eot_prefix": {"filter": True, "cut": True, "cache": "prefix"},
    "l2p_eot_dual": {"filter": True, "cut": True, "cache": "dual"},
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_lengths_and_the_length_of_every_pass_are_the_references(mode, tiny, reference):
    options = dict(MODES[mode])
    policy = tiny_filter(reference) if options.pop("filter", False) else TopK()
    out = tiny(policy, **options)
    lengths = reference[f"{mode}/query_lengths"]
    np.testing.assert_array_equal(out.tokens, reference[f"{mode}/tokens"])
    np.testing.assert_array_equal(out.lengths, reference[f"{mode}/length"])
    np.testing.assert_array_equal(out.num_forwards, reference[f"{mode}/num_forwards"])
    np.testing.assert_array_equal(out.query_lengths[:, : lengths.shape[1]], lengths)
    assert np.all(np.asarray(out.query_lengths)[:, lengths.shape[1] :] == -1)
    halves = 2 if mode == "vanilla_cfg" else 1
    np.testing.assert_array_equal(out.tokens_processed, halves * np.maximum(lengths, 0).sum(1))
    order, ends = np.asarray(out.revealed_at), np.asarray(out.lengths) - 7
    for row in range(6):
        assert np.all(order[row, : ends[row]] >= 0)
        assert np.all(order[row, ends[row] :] == -1)
        assert order[row].max() == out.num_forwards[row] - 1  # the last pass revealed something


def test_filter_that_accepts_nothing_or_everything(tiny, reference):
    own = tiny_filter(reference)
    slow = tiny(Filter(own.params, 1 - 2**-24))
    np.testing.assert_array_equal(slow.tokens, reference["vanilla/tokens"])
    np.testing.assert_array_equal(slow.num_forwards, 32)
    np.testing.assert_array_equal(slow.tokens_processed, 32 * 39)
    always = FilterParams(own.params.w1, own.params.b1, jnp.zeros((16, 16)), jnp.full(16, jnp.inf))
    fast = tiny(Filter(always, 0.5))
    np.testing.assert_array_equal(fast.num_forwards, 2)
    np.testing.assert_array_equal(fast.revealed_at, np.repeat([[0, 1]], 16, 1).repeat(6, 0))


def test_the_oracle_gives_its_reference_whether_the_model_agrees_or_not(tiny, reference):
    answer = reference["vanilla/tokens"][:, 7:].astype(np.int32)
    out = tiny(Oracle(jnp.asarray(answer)))
    np.testing.assert_array_equal(out.tokens[:, 7:], answer)
    np.testing.assert_array_equal(out.num_forwards[0], reference["egp/num_forwards"])
    assert np.all(np.asarray(out.num_forwards) <= 32)
    other = (answer + 1) % 40
    stuck = tiny(Oracle(jnp.asarray(other)))
    np.testing.assert_array_equal(stuck.tokens[:, 7:], other)
    assert np.all(np.asarray(stuck.num_forwards) >= 4)  # a block that never agrees is copied at its second pass


def test_an_end_of_text_cuts_only_where_one_is_named(tiny, reference):
    out = tiny(tiny_filter(reference), cut=True, eot_rule=None)
    np.testing.assert_array_equal(out.tokens, reference["l2p/tokens"])
    np.testing.assert_array_equal(out.lengths, 39)


# One layer: keys and values of what does not change are exact ---------------------------------------------------------


@pytest.fixture(scope="module")
def shallow():
    config = DecoderConfig.tiny(num_layers=1, causal=False)
    params = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, init_params(jax.random.key(3), config))
    params["head"] *= 4  # sure of some tokens
    return config, params, jnp.arange(10, dtype=jnp.int32).reshape(2, 5)


def test_with_one_layer_all_caches_agree_exactly(shallow):
    config, params, prompt = shallow
    numbers = {"gen_length": 12, "block_length": 4, "policy": Threshold(0.6), "mask_id": 60}
    plain = decode(masked_diffusion_apply(config), params, prompt, **numbers)
    assert np.all(np.asarray(plain.num_forwards) < 12)
    assert np.all(np.asarray(plain.num_forwards) > 3)  # blocks have passes that use a cache
    prefix = decode(diffusion_model(config), params, prompt, cache="prefix", **numbers)
    scanned = DecoderConfig.tiny(num_layers=1, causal=False, scan_layers=True)
    dual = decode(diffusion_model(scanned), stack_layers(params), prompt, cache="dual", **numbers)
    for other in (prefix, dual):
        np.testing.assert_array_equal(other.tokens, plain.tokens)
        np.testing.assert_array_equal(other.revealed_at, plain.revealed_at)
    cost = [int(out.tokens_processed.sum()) for out in (plain, prefix, dual)]
    assert cost[0] > cost[1] > cost[2]


def test_guidance_with_a_cache_keeps_both_halves(shallow):
    config, params, prompt = shallow
    numbers = {"gen_length": 4, "block_length": 4, "policy": TopK(), "mask_id": 60, "cfg_scale": 1.5}
    plain = decode(diffusion_model(config), params, prompt, **numbers)
    dual = decode(diffusion_model(config), params, prompt, cache="dual", **numbers)
    np.testing.assert_array_equal(dual.tokens, plain.tokens)
    np.testing.assert_array_equal(dual.tokens_processed, 2 * (9 + 3 * 4))


# Models that are tables -----------------------------------------------------------------------------------------------


def fill(logits, policy, gen_length=8, block_length=4, prompt=((1, 2),), **options):
    return decode(
        table, logits, jnp.array(prompt), gen_length=gen_length, block_length=block_length, policy=policy,
        mask_id=MASK, pad_id=-1, **options,
    )  # fmt: skip


ANSWER = [0, 0, 3, 4, 5, 6, 7, 8, 9, 1]


def test_ranks_never_reach_a_later_block():
    """Half the steps, and a threshold that leaves one mask: the two tokens of the schedule are not both there."""
    logits = sure_of(ANSWER, [0.5] * 2 + [0.9, 0.9, 0.9, 0.6] + [0.95] * 4, V)
    out = fill(logits, Threshold(0.8), steps=4)
    assert out.tokens[0, 2:].tolist() == ANSWER[2:]
    assert out.revealed_at[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]


def test_confidences_of_one_are_ties_that_the_first_position_wins():
    logits = sure_of(ANSWER, [0.5] * 10, V).at[:].multiply(1000).astype(jnp.bfloat16)
    out = fill(logits, TopK())
    assert out.revealed_at[0].tolist() == list(range(8))


def test_the_mask_is_never_predicted():
    out = fill(sure_of([MASK] * 10, [0.9] * 10, V), TopK())
    assert int(out.num_forwards[0]) == 8
    assert MASK not in np.asarray(out.tokens)


def test_end_of_text_rules():
    """An accepted end cuts at the first; an unlikely end in a later block cuts under the reference's rule alone."""
    answer = [0, 0, 3, END, END, 6, 7, 8, END, 1]
    sure = sure_of(answer, [0.5] * 2 + [0.99, 0.97, 0.99, 0.6] + [0.9, 0.9, 0.3, 0.9], V)
    out = fill(sure, Threshold(0.95), eot_id=END)
    assert out.tokens[0].tolist() == [1, 2, 3, END] + [-1] * 6
    assert (int(out.lengths[0]), int(out.num_forwards[0])) == (4, 1)
    unlikely = sure_of([0, 0, 3, 4, 5, 6, 7, 8, END, 1], [0.5] * 2 + [0.99, 0.97, 0.99, 0.6] + [0.9, 0.9, 0.3, 0.9], V)
    reference = fill(unlikely, Threshold(0.95), eot_id=END)
    assert int(reference.lengths[0]) == 9
    assert reference.query_lengths[0, :3].tolist() == [10, 9, 9]  # the end was cut before it was reached
    confident = fill(unlikely, Threshold(0.95), eot_id=END, eot_rule="confident")
    assert confident.query_lengths[0, :3].tolist() == [10, 10, 10]
    assert int(confident.lengths[0]) == 9  # revealed in the end, by rank
    assert confident.tokens[0, 8:].tolist() == [END, -1]


@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_rows_end_at_different_places_and_the_rest_goes_on(cache):
    """A model of two rows: one ends in its first block, one never; each is what it is alone."""

    def rows(params, tokens, *, kv=None, positions=None, key_mask=None, return_kv=False):
        short = (tokens[:, :1] == 1) if positions is None else kv[:, :1, 0, 0] == 1
        out = table(params, tokens, kv=kv, positions=positions, return_kv=return_kv)
        logits = out[0] if return_kv else out
        end = 50 * (jnp.arange(V) == END)
        at = jnp.arange(tokens.shape[1]) if positions is None else positions
        logits = jnp.where((short & (at == 4))[..., None], end, logits)
        first = jnp.broadcast_to(tokens[:, :1, None, None], (*tokens.shape, 1, 1)).astype(float)
        return (logits, first if kv is None else kv) if return_kv else logits

    logits = sure_of(ANSWER, [0.5] * 10, V)
    run = functools.partial(
        decode, rows, logits, gen_length=8, block_length=4, policy=Threshold(0.99), mask_id=MASK, eot_id=END, pad_id=-1,
        cache=cache, eot_rule="confident",
    )  # fmt: skip
    both = run(jnp.array([[1, 2], [5, 2]]))
    assert both.lengths.tolist() == [5, 10]
    assert both.num_forwards.tolist() == [3, 8]
    for row, prompt in enumerate(([[1, 2]], [[5, 2]])):
        alone = run(jnp.array(prompt))
        for name in ("tokens", "lengths", "num_forwards", "tokens_processed", "revealed_at"):
            np.testing.assert_array_equal(getattr(both, name)[row], getattr(alone, name)[0], err_msg=name)


@pytest.mark.parametrize("mask_removed", [False, True])
def test_a_dual_cache_sees_what_was_cut_away_until_the_next_block(mask_removed):
    """The model predicts how many keys it sees."""

    def counting(params, tokens, *, kv=None, positions=None, key_mask=None, return_kv=False):
        seen = jnp.sum(key_mask, -1)[:, None]
        at = jnp.arange(tokens.shape[1]) if positions is None else positions
        token = jnp.where((at == 4) & (kv is None), END, jnp.broadcast_to(seen, tokens.shape))
        logits = 9 * jax.nn.one_hot(token, V)
        logits = jnp.where((at == 2)[..., None], logits / 20, logits)  # position 2 comes last
        return logits, jnp.zeros((*tokens.shape, 1, 1)) if kv is None else kv

    out = decode(
        counting, (), jnp.array([[1, 2]]), gen_length=6, block_length=3, policy=Threshold(0.9), mask_id=MASK,
        eot_id=END, cache="dual", mask_removed=mask_removed,
    )  # fmt: skip
    # Positions 2 to 4 are the first block; its first pass ends the text at 4, and 5 of 8 keys are left.
    assert int(out.lengths[0]) == 5
    assert out.tokens[0].tolist()[2] == (5 if mask_removed else 8)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_random_remasking_reveals_by_chance_and_repeats_with_its_key():
    logits = sure_of(ANSWER, np.linspace(0.9, 0.2, 10), V)
    run = functools.partial(fill, logits, TopK(), prompt=[[1, 2]] * 40, remasking="random")
    first, again, other = (run(key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first.revealed_at, again.revealed_at)
    assert np.any(first.revealed_at != other.revealed_at)
    np.testing.assert_array_equal(first.tokens[:, 2:], jnp.array([ANSWER[2:]] * 40))
    # Of 80 rows each position of the first block comes first 20 times; 4 standard deviations are 15.5.
    earliest = np.concatenate([np.asarray(x.revealed_at[:, :4]).argmin(1) for x in (first, other)])
    assert np.all(np.abs(np.bincount(earliest, minlength=4) - 20) < 15.5)


def test_a_temperature_draws_from_the_softened_distribution():
    logits = jnp.zeros((10, V)).at[:, 3].set(jnp.log(4.0)).at[:, MASK].set(5.0)
    # Revealed by chance: by confidence, the likelier draws of a pass would come first, and the rest be drawn again.
    options = {"temperature": 2.0, "remasking": "random", "key": jax.random.key(0)}
    out = fill(logits, TopK(), prompt=[[1, 2]] * 60, **options)
    share = np.mean(np.asarray(out.tokens[:, 2:]) == 3)
    assert abs(share - 2 / 12) < 4 * (2 / 12 * 10 / 12 / 480) ** 0.5  # √4 beside ten of weight 1; 4 standard deviations
    assert MASK not in np.asarray(out.tokens)


# Transformations ------------------------------------------------------------------------------------------------------


def test_under_jit_and_over_eight_devices():
    logits = sure_of(ANSWER, np.linspace(0.9, 0.2, 10), V)
    prompt = jnp.arange(16, dtype=jnp.int32).reshape(8, 2) % 9
    run = functools.partial(
        decode, table, gen_length=8, block_length=4, policy=Threshold(0.6), mask_id=MASK, eot_id=1, eot_rule="confident"
    )
    plain = run(logits, prompt)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(prompt, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    sharded = jax.jit(run)(logits, placed)
    for one, other in zip(plain, sharded, strict=True):
        np.testing.assert_array_equal(one, other)


# Bad input ------------------------------------------------------------------------------------------------------------

GOOD = {"gen_length": 8, "block_length": 4, "policy": TopK(), "mask_id": MASK, "eot_id": END}
FILTER = Filter(filter_init(jax.random.key(0), block_length=8))
ORACLE = Oracle(jnp.zeros((1, 8), int))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 3}, "block_length is 3, which does not divide gen_length = 8"),
        ({"gen_length": 0}, "gen_length is 0, expected at least 1"),
        ({"block_length": 0}, "block_length is 0, expected at least 1"),
        ({"steps": 3}, "steps is 3, expected a multiple of the number of blocks, 2"),
        ({"steps": 16}, "steps is 16, expected at most gen_length = 8"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"mask_id": 12}, "mask_id is 12, expected an id below the vocabulary's 12"),
        ({"mask_id": -1}, "mask_id is -1, expected a token id"),
        ({"mask_id": 2, "eot_id": 3}, "prompt contains the mask, token 2"),
        ({"eot_id": MASK}, "eot_id is 11, which is also the mask"),
        ({"eot_id": -2}, "eot_id is -2, expected a token id"),
        ({"policy": FILTER}, "block_length is 4, but the filter was trained for 8"),
        ({"policy": FILTER._replace(tau=1.0), "block_length": 8}, r"tau is 1.0, expected a number in \(0, 1\)"),
        ({"policy": Threshold(0.0)}, r"threshold is 0.0, expected a number in \(0, 1\)"),
        ({"policy": Threshold(float("nan"))}, "threshold is nan"),
        ({"policy": Oracle(jnp.zeros((1, 4), int))}, r"reference has shape \(1, 4\), expected \(1, 8\)"),
        ({"policy": ORACLE, "remasking": "random", "key": jax.random.key(0)}, "an oracle reveals"),
        ({"eot_rule": "first"}, "eot_rule is 'first', expected one of"),
        ({"cache": "triple"}, "cache is 'triple', expected one of"),
        ({"remasking": "none"}, "remasking is 'none', expected one of"),
        ({"cfg_scale": -1.0}, "cfg_scale is -1.0, expected 0 or a positive"),
        ({"temperature": float("inf")}, "temperature is inf, expected 0 or a positive"),
        ({"temperature": 1.0}, "sampling needs a key"),
        ({"remasking": "random"}, "sampling needs a key"),
        ({"max_buckets": 0}, "max_buckets is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(decode)(table, jnp.zeros((10, V)), jnp.array([[1, 2]]), **(GOOD | changes))


def test_a_policy_that_is_none():
    with pytest.raises(TypeError, match="policy is a float, expected TopK"):
        unchecked(decode)(table, jnp.zeros((10, V)), jnp.array([[1, 2]]), **(GOOD | {"policy": 0.9}))
    with pytest.raises(ValueError, match="prompt is float32"):
        unchecked(decode)(table, jnp.zeros((10, V)), jnp.zeros((1, 2)), **GOOD)


def test_lengths_for_which_a_pass_is_compiled():
    assert buckets(1, 8) == (1,)
    assert buckets(3, 1) == (3,)
    for count in range(1, 40):
        found = buckets(count, 8)
        assert found[-1] == count
        assert list(found) == sorted(set(found))
