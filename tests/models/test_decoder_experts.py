"""Sparse experts in the decoder: reading only a union of them must change nothing but time.

What would be wrong without anyone noticing: padding or finished rows that enlarge the union (right text, wasted reads),
real tokens that are treated as padding, a gradient that stops at the router.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.decoding import MedusaConfig, init_medusa_heads, make_tree
from jaxaccel.models import decoder
from jaxaccel.models.decoder import (
    Decoder,
    decoder_logits,
    fuse,
    has_experts,
    init_params,
    new_cache,
    stack_layers,
    unstack_layers,
)
from jaxaccel.models.decoder_config import BlockFFNConfig, DecoderConfig, parameter_shapes
from jaxaccel.models.decoder_ffn import expert_union
from jaxaccel.models.drafts import DraftDecoder, Drafts, Lookup, cached_model
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.kv_cache import append
from jaxaccel.moe import activation_locality_loss, chunk_sparsification_loss, route, token_sparsity
from jaxaccel.moe.block_ffn import BlockFFNParams

# Compiled as a whole: op by op every new shape would compile a hundred small programs.
decoder_forward = jax.jit(decoder.decoder_forward, static_argnames="config")
EXPERTS = BlockFFNConfig(num_experts=8, expert_dim=6)
CONFIG = DecoderConfig.tiny(block_ffn=EXPERTS, max_positions=128)
DENSE = dataclasses.replace(CONFIG, block_ffn=dataclasses.replace(EXPERTS, sparse=False))
UNION = dataclasses.replace(CONFIG, block_ffn=dataclasses.replace(EXPERTS, sparse=True))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 16)))
PROMPTS = [np.random.default_rng(i).integers(0, 61, n).tolist() for i, n in enumerate((5, 17, 1))]
NEW = 12
# float32: two ways of summing the same products, grown by two layers.
CLOSE = {"rtol": 0, "atol": 5e-5}


@pytest.fixture(scope="module")
def params():
    """Weights large enough for clear logits, experts used by about a third of the tokens, scales of both signs."""
    params = jax.tree.map(lambda w: 4 * w if w.ndim >= 2 else w, init_params(jax.random.key(3), CONFIG))
    for number, layer in enumerate(params["layers"]):
        layer["gamma"] = jnp.where(jnp.arange(8) % 3 == number, -1.0, 1.5)
        # A direction that all tokens share shifts the logits below 0.
        layer["router"] = layer["router"] - 0.1 * jnp.sign(layer["mlp_norm"])[:, None] * (jnp.arange(8) % 2)
    return params


@pytest.fixture(scope="module")
def plain(params):
    return np.asarray(generate(prepare(params), PROMPTS, DENSE, max_new_tokens=NEW).tokens)


def test_shapes_and_counts(params):
    assert jax.tree.map(jnp.shape, params) == parameter_shapes(CONFIG)
    assert CONFIG.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    fresh = init_params(jax.random.key(0), CONFIG)
    assert (fresh["layers"][0]["gamma"] == 1).all()
    assert has_experts(fresh)
    assert has_experts(stack_layers(fresh))
    assert not has_experts(init_params(jax.random.key(0), DecoderConfig.tiny()))


def test_union_dense_scan_and_fused_forms_agree(params):
    real = jnp.arange(16) < jnp.array([[16], [9]])
    scanned = dataclasses.replace(UNION, scan_layers=True)
    wanted = decoder_forward(params, TOKENS, DENSE, real=real)
    stacked = stack_layers(params)
    for form, config in (
        (params, UNION), (fuse(params), UNION), (stacked, scanned), (fuse(stacked), scanned),
        (unstack_layers(stacked), CONFIG),
    ):  # fmt: skip
        got = jax.jit(decoder_forward, static_argnums=2)(form, TOKENS, config, real=real)
        np.testing.assert_allclose(jnp.where(real[..., None], got.hidden - wanted.hidden, 0), 0, **CLOSE)
        for a, b in zip(got.routing, wanted.routing, strict=True):
            assert a.shape == (2, 2, 16, 8)
            np.testing.assert_allclose(jnp.where(real[..., None], a - b, 0), 0, **CLOSE)
    active = np.asarray(wanted.routing.hidden != 0)[:, np.asarray(real)]
    assert 0.1 < active.mean() < 0.7
    assert (np.asarray(wanted.routing.scores) < 0).any()


def test_routing_is_that_of_the_normalised_stream(params):
    """The first layer's routing, from its description."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    layer = params["layers"][0]
    one = params | {"layers": [layer | {"o": 0 * layer["o"]}]}  # attention adds nothing
    x = params["embedding"][TOKENS]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
    wanted = route(BlockFFNParams(layer["router"], layer["gamma"], None, None), x)
    got = decoder_forward(one, TOKENS, config).routing
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a[0], b, **CLOSE)


def test_padding_and_finished_rows_take_no_expert(params):
    """The union is that of the real tokens alone, and what padding holds changes nothing."""
    length = np.array([3, 1])
    real = jnp.arange(16) < length[:, None]
    apart = [decoder_forward(params, TOKENS[i : i + 1, :n], UNION).routing.hidden != 0 for i, n in enumerate(length)]
    wanted = jnp.stack([x.any((1, 2)) for x in apart]).any(0).sum(-1)
    result = decoder_forward(params, TOKENS, UNION, real=real)
    assert expert_union(result.routing).tolist() == wanted.tolist()
    alone = decoder_forward(params, TOKENS[1:, :1], UNION)
    np.testing.assert_allclose(result.hidden[1:, :1], alone.hidden, **CLOSE)
    more = decoder_forward(params, TOKENS, UNION).routing
    assert (expert_union(more) > wanted).any()
    assert expert_union(more, real).tolist() == wanted.tolist()
    # The loop says which rows are finished.
    model = cached_model(UNION)
    cache = append(new_cache(UNION, 2, 32), decoder_forward(params, TOKENS[:, :8], UNION).new)
    step = (params, TOKENS[:, 8:9], cache, jnp.full((2, 1), 8), jnp.ones((1, 1), bool))
    both, one = (model.forward(*step, jnp.array([True, live]))[0] for live in (True, False))
    np.testing.assert_allclose(both[0], one[0], **CLOSE)
    assert np.abs(both[1] - one[1]).max() > 1e-2


@pytest.mark.parametrize("scan", [False, True])
def test_cached_steps_equal_the_full_pass(params, scan):
    config = dataclasses.replace(UNION, scan_layers=scan)
    weights = stack_layers(params) if scan else params
    wanted = decoder_forward(weights, TOKENS, config)

    @jax.jit
    def run(tokens):
        prompt = decoder_forward(weights, tokens[:, :8], config)
        cache, parts = append(new_cache(config, 2, 32), prompt.new), [prompt.hidden]
        for at, count in ((8, 3), (11, 1), (12, 4)):
            step = decoder_forward(weights, tokens[:, at : at + count], config, cache=cache)
            cache = append(cache, step.new)
            parts.append(step.hidden)
        return jnp.concatenate(parts, 1)

    np.testing.assert_allclose(run(TOKENS), wanted.hidden, **CLOSE)


def test_text_is_the_same_whatever_is_read_and_whoever_guesses(params, plain):
    """Batches with rows of different lengths, a tree of heads, a draft model with experts, prompt lookup, a scan."""
    ready = prepare(params)
    heads = init_medusa_heads(jax.random.key(0), 32, 61, config=MedusaConfig(num_heads=2))
    tree = Drafts(heads, make_tree([(0,), (1,), (0, 0), (1, 0)], top_k=4))
    few = dataclasses.replace(CONFIG, block_ffn=dataclasses.replace(EXPERTS, sparse=True, max_active=2))
    for config, drafts in (
        (UNION, None), (UNION, tree), (CONFIG, DraftDecoder(ready, UNION, 2)), (few, Lookup(2)),
    ):  # fmt: skip
        out = generate(ready, PROMPTS, config, max_new_tokens=NEW, drafts=drafts)
        np.testing.assert_array_equal(out.tokens, plain)
    stop = int(plain[1, 3])
    out = generate(ready, PROMPTS, UNION, max_new_tokens=NEW, drafts=tree, stop_ids=[stop])
    for row, count in enumerate(out.count.tolist()):
        np.testing.assert_array_equal(out.tokens[row, :count], plain[row, :count])
    scanned = dataclasses.replace(UNION, scan_layers=True)
    out = generate(stack_layers(params), PROMPTS, scanned, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain)


def test_experts_split_over_eight_devices_give_the_same_text(params, plain):
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))

    def place(path, leaf):
        split = str(path[-1]).find("expert_") >= 0  # a part of every expert on each device
        spec = PartitionSpec(None, "model") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, prepare(params))
    assert placed["layers"][0]["expert_up"].addressable_shards[0].data.shape == (8, 3, 32)
    out = generate(placed, PROMPTS, UNION, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain)


def loss_of(config):
    def loss(params, tokens):
        result = decoder_forward(params, tokens, config)
        logits = decoder_logits(params, result.hidden[:, :-1])
        own = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        chunks = jnp.mean(jax.vmap(lambda h: chunk_sparsification_loss(h, chunk_size=8))(result.routing.hidden))
        local = jnp.mean(jax.vmap(lambda a: activation_locality_loss(a))(result.routing.logits))
        return own + 0.1 * chunks + 2e-3 * local, own

    return loss


def test_gradients_are_those_of_the_dense_form_and_reach_everything(params):
    grads = [jax.jit(jax.grad(lambda p, c=c: loss_of(c)(p, TOKENS)[0]))(params) for c in (UNION, DENSE)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        # Sums of 32 tokens' products in float32.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max() + 1e-7)
    for layer in grads[0]["layers"]:
        for name in ("router", "gamma", "expert_up", "expert_down"):
            assert np.isfinite(layer[name]).all()
            assert np.abs(layer[name]).max() > 0


def test_a_few_steps_of_training_with_both_losses():
    """As a Flax NNX module, whose routing feeds the losses: text is learned, and tokens use fewer experts."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.tile(np.arange(16) % 7, (4, 1)) + np.arange(4)[:, None])
    tx = optax.adam(1e-2)
    loss = loss_of(CONFIG)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            (_, own), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), own

        return jax.lax.scan(step, (params, tx.init(params)), None, length=40)

    (params, _), losses = train(model.parameters())
    assert losses[-1] < 0.3 * losses[0]
    logits, routing = Decoder(CONFIG, params=params).with_routing(tokens)
    np.testing.assert_allclose(logits, decoder_logits(params, decoder_forward(params, tokens, CONFIG).hidden), **CLOSE)
    _, before = model.with_routing(tokens)
    assert float(token_sparsity(routing.scores)) > 0.1 + float(token_sparsity(before.scores))


def test_the_union_of_a_draft_is_counted(params):
    routing = decoder_forward(params, TOKENS, UNION).routing
    used = np.asarray(routing.hidden) != 0
    wanted = [len({e for b in range(2) for t in range(16) for e in np.flatnonzero(layer[b, t])}) for layer in used]
    assert expert_union(routing).tolist() == wanted
    one = jax.tree.map(lambda x: x[0], routing)
    assert int(expert_union(one)) == wanted[0]


def test_half_precision_and_bad_input(params):
    half = prepare(params, "bfloat16")
    out = generate(half, PROMPTS[:1], UNION, max_new_tokens=3)
    assert out.count.tolist() == [3]
    with pytest.raises(ValueError, match="dtype is 'int8', but the parameters hold sparse experts"):
        prepare(params, "int8")
    with pytest.raises(ValueError, match="hold sparse experts, but the configuration has a dense network"):
        decoder_forward(params, TOKENS, DecoderConfig.tiny())
    dense = init_params(jax.random.key(0), DecoderConfig.tiny())
    with pytest.raises(ValueError, match=r"the parameters hold no experts, but the configuration has BlockFFNConfig\("):
        decoder_forward(dense, TOKENS, CONFIG)
    for changes, message in (
        ({"num_experts": 0}, "num_experts is 0, expected at least 1"),
        ({"expert_dim": -1}, "expert_dim is -1"),
        ({"eps": 0.0}, "eps is 0.0, expected a positive number"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"max_active": 9}, "max_active is 9, expected 1 to num_experts = 8"),
        ({"max_active": 2, "sparse": False}, "sparse=False reads all experts"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(EXPERTS, **changes)
