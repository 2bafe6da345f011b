"""The diffusion transformer: the reference's numbers, three ways to reuse branches, transformations, bad inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.diffusion import (
    ddim_sample,
    double_batch,
    epsilon_loss,
    guide_denoiser,
    linear_betas,
    noise_schedule,
    respace,
    uniform_timesteps,
)
from jaxaccel.models import (
    DiT,
    DiTConfig,
    Modulation,
    dit_apply,
    dit_denoiser,
    dit_forward,
    dit_modulation,
    dit_params_from_names,
    init_dit,
    stack_blocks,
)
from jaxaccel.models.dit_blocks import from_patches, grid_positions, layer_norm, time_features, to_patches

TINY = DiTConfig.tiny(width=16, heads=2)
FULL = noise_schedule(linear_betas())
THIN = respace(FULL, uniform_timesteps(1000, 4))
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 8, 8, 1))
LABELS = jnp.arange(8)


def noisy_params(config, seed=1):
    """Parameters none of which is zero: gates let everything through."""
    params = init_dit(KEY, config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    spread = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, spread)


PARAMS = noisy_params(TINY)
CACHE = jax.random.normal(jax.random.key(5), (4, 8, 16, 16))
static = jax.jit(dit_apply, static_argnames=("config", "compute"))
apply = jax.jit(dit_apply, static_argnames="config")


# The reference --------------------------------------------------------------------------------------------------------


def from_reference(reference, dtype=np.float64):
    image, patch, width, depth, heads, classes, *_ = (int(n) for n in reference["config"])
    config = DiTConfig(width=width, depth=depth, heads=heads, patch=patch, image_size=image, num_classes=classes)
    names = {name.removeprefix("param/"): reference[name] for name in reference if name.startswith("param/")}
    return config, jax.tree.map(jnp.asarray, dit_params_from_names(names, config, dtype=dtype))


def nhwc(images):
    return np.transpose(images, (0, 2, 3, 1))


def test_the_reference_in_float64(vectors, x64):
    reference = vectors("dit")
    config, params = from_reference(reference)
    schedule = respace(FULL, tuple(reference["timestep_map"].tolist()))
    noise, labels = jnp.asarray(nhwc(reference["noise"])), jnp.asarray(reference["labels"])
    out, outputs = apply(params, noise, jnp.asarray(reference["forward/t"]), labels, config)
    # Some hundred roundings of float64, 1e-16 each, in values of about 1.
    np.testing.assert_allclose(out, nhwc(reference["forward/out"]), rtol=1e-10, atol=1e-12)
    assert outputs.shape == (4, 4, 4, 32)
    assert out.dtype == outputs.dtype == jnp.float64

    scale = float(reference["hyper"][0])
    guided = guide_denoiser(dit_denoiser(config, schedule), scale=scale, cfg_channels=3)

    def sample(noise, cond):
        one = guided(params, noise, 2, cond)[0]
        return one, ddim_sample(lambda x, i: guided(params, x, i, cond)[0][..., :4], schedule, noise)

    # Modulations of all steps ahead are those of each step.
    ahead = dit_modulation(params, schedule.timestep(jnp.arange(5))[:, None], labels, config)
    for cond in (labels, ahead):
        one, samples = jax.jit(sample)(noise, cond)
        np.testing.assert_allclose(one, nhwc(reference["forward/out_cfg"]), rtol=1e-10, atol=1e-12)
        # The first step multiplies roundings by 1/√ᾱ = 157.
        np.testing.assert_allclose(samples, nhwc(reference["ddim_full"]), rtol=1e-10, atol=1e-11)


def test_sizes_as_published():
    assert DiTConfig.preset("XL/2").num_parameters == 675_129_632
    millions = {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}  # the paper's table
    for name, count in millions.items():
        config = DiTConfig.preset(name)
        d, pixels, tokens = config.width, 2 * 2 * 4, 256
        blocks = config.depth * (18 * d**2 + 15 * d)
        inputs = d * (pixels + 1) + 257 * d + d**2 + d + 1001 * d + tokens * d
        assert config.num_parameters == blocks + inputs + 2 * d**2 + 2 * d + 2 * pixels * (d + 1)
        assert abs(config.num_parameters / 1e6 - count) < 0.6
    latents = DiTConfig.preset("XL/2", image_size=64)
    assert latents.num_parameters == 675_129_632 + 768 * 1152  # more positions
    assert {DiTConfig.preset(f"{size}/{patch}").patch for size in ("S", "XL") for patch in (2, 4, 8)} == {2, 4, 8}
    params = init_dit(KEY, TINY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == TINY.num_parameters - 16 * 16
    assert (TINY.tokens, TINY.num_branches, TINY.null_label, TINY.out_channels) == (16, 4, 10, 1)


def test_parts_by_their_formulas():
    images = jnp.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    patches = to_patches(images, 2)
    np.testing.assert_array_equal(patches[1, 2], images[1, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(from_patches(patches, 2, 2), images)
    places = grid_positions(3, 8)
    np.testing.assert_allclose(places[5], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), np.sin(1), np.sin(0.01),
                                           np.cos(1), np.cos(0.01)], atol=1e-7)  # fmt: skip
    features = time_features(jnp.array([[7]]), 4)
    np.testing.assert_allclose(features[0, 0], [np.cos(7), np.cos(0.07), np.sin(7), np.sin(0.07)], rtol=1e-5)
    normed = layer_norm(3 + 2 * X.reshape(8, 64))
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(normed.std(-1), 1, rtol=1e-5)


# Reuse ----------------------------------------------------------------------------------------------------------------


def test_cond_static_and_soft_are_one():
    stacked = stack_blocks(PARAMS)
    full, fresh = apply(PARAMS, X, 500, LABELS, TINY)
    np.testing.assert_allclose(apply(stacked, X, 500, LABELS, TINY)[0], full, rtol=1e-5, atol=1e-5)
    for flags in [(True,) * 4, (False, True, True, False), (False,) * 4]:
        hard = static(PARAMS, X, 500, LABELS, TINY, cache=CACHE, compute=flags)
        for way in (
            apply(PARAMS, X, 500, LABELS, TINY, cache=CACHE, compute=jnp.array(flags)),
            apply(PARAMS, X, 500, LABELS, TINY, cache=CACHE, weights=jnp.array(flags, float)),
            apply(stacked, X, 500, LABELS, TINY, cache=CACHE, compute=jnp.array(flags)),
            apply(stacked, X, 500, LABELS, TINY, cache=CACHE, weights=jnp.array(flags, float)),
        ):
            for one, other in zip(hard, way, strict=True):  # float32: programs may order sums differently
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        reused = ~np.array(flags)
        np.testing.assert_array_equal(hard[1][reused], CACHE[reused])
        if all(flags):
            np.testing.assert_allclose(hard[0], full, rtol=1e-5, atol=1e-5)
    # The outputs of a step are a cache with which the same step gives the same, whatever is reused.
    again = static(PARAMS, X, 500, LABELS, TINY, cache=fresh, compute=(False,) * 4)
    np.testing.assert_allclose(again[0], full, rtol=1e-5, atol=1e-5)
    soft = apply(PARAMS, X, 500, LABELS, TINY, cache=CACHE, weights=jnp.array([0.25, 1, 1, 1]))
    np.testing.assert_allclose(soft[1][0], 0.75 * CACHE[0] + 0.25 * fresh[0], rtol=1e-4, atol=1e-5)


def test_skipped_branches_are_no_part_of_the_program():
    def products(**choice):
        jaxpr = jax.make_jaxpr(lambda cache: dit_apply(PARAMS, X, 500, LABELS, TINY, cache=cache, **choice))(CACHE)
        return str(jaxpr).count("dot_general")

    everything, nothing = products(), products(compute=(False,) * 4)
    attention = products(compute=(True, False, False, False))
    mlp = products(compute=(False, False, False, True))
    assert (attention - nothing, mlp - nothing) == (4, 2)
    assert everything - nothing == 2 * (4 + 2)
    assert products(compute=(True,) * 4) == everything  # with a cache but no choice everything is computed


def test_gates_are_those_of_the_current_step():
    modulation = dit_modulation(PARAMS, jnp.full(8, 300), LABELS, TINY)
    shut = Modulation(modulation.blocks.at[:, :, jnp.array([2, 5])].set(0), modulation.final)
    outs = [dit_forward(PARAMS, X, shut, TINY, cache=c, compute=(False,) * 4)[0] for c in (CACHE, 0 * CACHE)]
    np.testing.assert_array_equal(*outs)  # closed gates: what is cached does not matter
    fresh, _ = dit_forward(PARAMS, X, shut, TINY)
    np.testing.assert_allclose(outs[0], fresh, rtol=1e-5, atol=1e-6)
    # With open gates another condition changes what the same cache gives.
    other = dit_modulation(PARAMS, jnp.full(8, 900), LABELS, TINY)._replace(final=modulation.final)
    opened = [dit_forward(PARAMS, X, m, TINY, cache=CACHE, compute=(False,) * 4)[0] for m in (modulation, other)]
    assert float(jnp.abs(opened[0] - opened[1]).max()) > 1e-2


def test_a_soft_choice_has_gradients():
    loss = jax.jit(
        lambda weights: jnp.mean(
            dit_apply(PARAMS, X[:2], 500, LABELS[:2], TINY, cache=CACHE[:, :2], weights=weights)[0]
        )
    )
    weights = jnp.array([0.3, 0.9, 0.1, 0.5])
    slope = jax.grad(loss)(weights)
    assert float(jnp.abs(slope).min()) > 0
    step = 1e-2
    for k in (0, 3):  # float32: 1e-7 of the loss, divided by the step
        numeric = (loss(weights.at[k].add(step)) - loss(weights.at[k].add(-step))) / (2 * step)
        np.testing.assert_allclose(slope[k], numeric, rtol=0.02, atol=2e-5)


# Transformations ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="scale")
def sample(params, noise, labels, scale):
    guided = guide_denoiser(dit_denoiser(TINY, THIN), scale=scale)
    both, cond = double_batch(noise, labels, TINY.null_label)
    return ddim_sample(lambda x, i: guided(params, x, i, cond)[0], THIN, both)[: len(noise)]


def test_samples_do_not_depend_on_the_number_of_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    alone = sample(PARAMS, X, LABELS, 1.5)
    spread = sample(jax.device_put(PARAMS, everywhere), jax.device_put(X, rows), jax.device_put(LABELS, rows), 1.5)
    # float32, and the first step multiplies differences by 157.
    np.testing.assert_allclose(spread, alone, rtol=1e-3, atol=1e-3 * float(jnp.abs(alone).max()))
    step = jax.jit(lambda x, labels: dit_apply(PARAMS, x, 500, labels, TINY))
    out, _outputs = step(jax.device_put(X, rows), jax.device_put(LABELS, rows))
    assert out.sharding.is_equivalent_to(rows, 4)
    np.testing.assert_allclose(out, apply(PARAMS, X, 500, LABELS, TINY)[0], rtol=1e-5, atol=1e-5)


def test_bfloat16():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    full, _ = apply(PARAMS, X, 500, LABELS, TINY)
    out, outputs = apply(half, X, 500, LABELS, TINY, cache=CACHE, compute=jnp.array([True] * 4))
    assert out.dtype == jnp.float32
    assert outputs.dtype == jnp.bfloat16
    # 8 bits, through two blocks.
    assert float(jnp.linalg.norm(out - full) / jnp.linalg.norm(full)) < 0.03


def test_vmap_over_models_and_steps():
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, noisy_params(TINY, 2))
    many = jax.vmap(lambda p: dit_apply(p, X[:2], 500, LABELS[:2], TINY)[0])(models)
    np.testing.assert_allclose(many[0], apply(PARAMS, X, 500, LABELS, TINY)[0][:2], rtol=1e-4, atol=1e-4)
    each = apply(PARAMS, X, jnp.arange(8) * 100, LABELS, TINY)[0]
    np.testing.assert_allclose(each[5], apply(PARAMS, X, 500, LABELS, TINY)[0][5], rtol=1e-4, atol=1e-4)


def test_the_module_learns():
    model = DiT(TINY, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(X, 999, LABELS), 0)  # adaLN-Zero
    optimizer = optax.adam(3e-3)
    params = model.parameters()
    state = optimizer.init(params)
    denoise = dit_denoiser(TINY, FULL)
    data = jnp.broadcast_to(jnp.sign(jnp.sin(jnp.arange(8.0) + 1))[:, None, None, None], (8, 8, 8, 1))

    @jax.jit
    def train(params, state, keys):
        def step(carry, key):
            params, state = carry
            loss, slopes = jax.value_and_grad(
                lambda p: epsilon_loss(lambda x, i, c: denoise(p, x, i, c)[0], FULL, key, data, LABELS, null=10)
            )(params)
            updates, state = optimizer.update(slopes, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), keys)

    (params, _), losses = train(params, state, jax.random.split(KEY, 60))
    assert float(losses[:5].mean()) > 0.9
    assert float(losses[-10:].mean()) < 0.6
    trained = DiT(TINY, params=params)
    np.testing.assert_allclose(trained(X, 500, LABELS), apply(params, X, 500, LABELS, TINY)[0], rtol=1e-4, atol=1e-4)
    graph, arrays = nnx.split(trained)
    assert nnx.merge(graph, arrays).config == TINY


def test_labels_beyond_the_last_are_not_a_class():
    out, _ = apply(PARAMS, X, 500, jnp.array([0, 10, 11, -1, 0, 0, 0, 0]), TINY)
    np.testing.assert_array_equal(np.isnan(out).any((1, 2, 3)), [False, False, True, True] + [False] * 4)


# Bad inputs -----------------------------------------------------------------------------------------------------------

STATIC = (True, False, True, True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DiTConfig.tiny(image_size=9), "image_size is 9, expected a multiple of patch = 2"),
        (lambda: DiTConfig.tiny(heads=3), "expected a multiple of heads"),
        (lambda: DiTConfig.tiny(width=6, heads=2), "a multiple of 4"),
        (lambda: DiTConfig.tiny(depth=0), "depth is 0"),
        (lambda: DiTConfig.tiny(patch=True), "patch is True"),
        (lambda: DiTConfig.preset("XL/3"), "did you mean XL/"),
        (lambda: dit_apply(PARAMS, X[:, :4], 0, LABELS, TINY), "expected \\[B, 8, 8, 1\\]"),
        (lambda: dit_apply(PARAMS, X[0], 0, LABELS, TINY), "x has shape"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS[:3], TINY), r"labels has shape \(3,\)"),
        (lambda: dit_apply(PARAMS, X, jnp.zeros(3), LABELS, TINY), r"t has shape \(3,\)"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE[:, :4], compute=STATIC), "cache has shape"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE[:2], compute=STATIC), "cache has shape"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, compute=STATIC), "cache is None"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, compute=jnp.array(STATIC)), "cache is None"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, weights=jnp.ones(4)), "cache is None"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE, compute=STATIC[:3]), "compute has shape"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE, compute=(1, 0, 1, 1)), "expected bools"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE, compute=jnp.ones(4)), "expected bool"),
        (lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE, weights=jnp.ones(3)), "weights has shape"),
        (
            lambda: dit_apply(PARAMS, X, 0, LABELS, TINY, cache=CACHE, weights=jnp.ones(4), compute=STATIC),
            "both given",
        ),
        (
            lambda: dit_forward(PARAMS, X, dit_modulation(PARAMS, jnp.zeros(2), LABELS[:2], TINY), TINY),
            "modulation.blocks has shape",
        ),
        (
            lambda: dit_denoiser(TINY, THIN)(PARAMS, X, 0, dit_modulation(PARAMS, jnp.zeros(8), LABELS, TINY)),
            "schedule's T = 4",
        ),
        (lambda: guide_denoiser(dit_denoiser(TINY, THIN), scale=2.0)(PARAMS, X[:3], 0, LABELS[:3]), "3 rows"),
        (lambda: dit_denoiser(TINY, THIN)(PARAMS, X, 4, LABELS), "i is 4"),
        (lambda: DiT(TINY), "either rngs"),
    ],
)
def test_bad_inputs_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
