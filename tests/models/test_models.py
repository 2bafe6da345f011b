"""Reference networks: exact sizes, causality, equivalences, bad shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.tasks import functional
from jaxaccel.models import CNN, MLP, CharLM, ResNet18, TransformerBlock, VisionTransformer


def size(build):
    state = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_parameter_counts_are_the_published_ones():
    # ResNet-18 for CIFAR-10, and ViT-S/16 without class token, pooled (22.05 M with a class token and its position).
    assert size(lambda rngs: ResNet18(classes=10, rngs=rngs)) == 11_173_962
    vit = size(
        lambda r: VisionTransformer((224, 224, 3), patch=16, width=384, layers=12, heads=6, classes=1000, rngs=r)
    )
    assert vit == 22_050_664 - 2 * 384


def test_language_model_is_causal():
    model = CharLM(vocabulary=11, width=16, layers=2, heads=2, length=8, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None] % 11
    changed = tokens.at[0, 5].set(9)
    before, after = model(tokens), model(changed)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert not np.allclose(before[0, 5:], after[0, 5:])
    with pytest.raises(ValueError, match="9 tokens do not fit into a context of 8"):
        model(jnp.zeros((1, 9), jnp.int32))


def test_block_equals_its_equation():
    """Against a loop over heads and an explicit softmax, in float64."""
    with jax.enable_x64(True):
        block = TransformerBlock(8, 2, causal=True, rngs=nnx.Rngs(0))
        block = nnx.merge(
            *jax.tree.map(lambda a: a.astype(jnp.float64) if hasattr(a, "astype") else a, nnx.split(block))
        )
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)))
        qkv = block.qkv(block.attention_norm(x)).reshape(2, 5, 3, 2, 4)
        heads = []
        for h in range(2):
            q, k, v = (qkv[:, :, i, h] for i in range(3))
            scores = jnp.einsum("btd,bsd->bts", q, k) / 2.0
            scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), scores, -jnp.inf)
            heads.append(jax.nn.softmax(scores, -1) @ v)
        y = x + block.out(jnp.concatenate(heads, -1))
        y = y + block.down(jax.nn.gelu(block.up(block.mlp_norm(y))))
        # dot_product_attention takes its softmax in float32; outputs are of order one.
        np.testing.assert_allclose(block(x), y, atol=1e-6)


def test_functional_form_equals_the_module_and_keeps_batch_statistics():
    init, apply = functional(lambda rngs: ResNet18(classes=3, width=4, rngs=rngs))
    params, state = init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    model = ResNet18(classes=3, width=4, rngs=nnx.Rngs(jax.random.key(0)))
    y, new = jax.jit(lambda p, s, x: apply(p, s, x, train=True))(params, state, x)
    model.train()
    np.testing.assert_allclose(y, model(x), rtol=1e-4, atol=1e-5)  # float32 through 18 layers, other fusions
    assert jax.tree.structure(new) == jax.tree.structure(state)
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True)]
    assert any(changed)
    _, kept = apply(params, state, x, train=False)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_initialisation_depends_on_the_key_alone():
    init, _ = functional(lambda rngs: MLP([4, 3, 2], rngs=rngs))
    first, again, other = (init(jax.random.key(k))[0] for k in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not jax.tree.all(jax.tree.map(np.array_equal, first, other))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: MLP([4], rngs=r), "widths must be"),
        (lambda r: CNN((8, 6, 1), [4, 4], hidden=8, classes=2, rngs=r), "8x6 cannot be halved 2 times"),
        (lambda r: TransformerBlock(10, 4, causal=True, rngs=r), r"width \(10\) must be a multiple of heads \(4\)"),
        (
            lambda r: VisionTransformer((10, 8, 3), patch=4, width=8, layers=1, heads=1, classes=2, rngs=r),
            "not a whole number of 4x4 patches",
        ),
    ],
)
def test_impossible_shapes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
