"""CogACT's action head against its own code, cached steps, weights by name, and the policy with its cuts."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxaccel.caching import DDIM, EfficientVLAConfig, cache_schedule, sample_actions, uniform_schedule
from jaxaccel.compression import layer_importance
from jaxaccel.diffusion import cosine_betas, noise_schedule, respace, stride_timesteps
from jaxaccel.models import (
    VLA,
    ActionHead,
    HeadConfig,
    VLAConfig,
    cut_vla,
    head_full,
    head_params_from_names,
    head_reuse,
    init_vla,
    load_action_head,
    vla_cognition,
    vla_hidden_states,
    vla_policy,
)
from jaxaccel.models.dit_blocks import attention_branch, layer_norm, mlp_branch
from jaxaccel.models.vla_weights import head_config_from_names
from jaxaccel.models.weights.errors import WeightsError

DATA = np.load(pathlib.Path(__file__).parent.parent / "data" / "efficient_vla.npz")
FILE = {name.removeprefix("dit/"): DATA[name] for name in DATA.files if name.startswith("dit/")}
HEAD = head_config_from_names(FILE, heads=int(DATA["head/config"][2]))
SAMPLER = DDIM(respace(noise_schedule(cosine_betas(100)), stride_timesteps(100, 10)))


def full(params, x, t, cond):
    return head_full(params, x, t, cond, config=HEAD)


def reuse(params, x, residual):
    return head_reuse(params, x, residual, config=HEAD)


def sample(params, noise, cond, interval, **options):
    schedule = cache_schedule(10, interval=interval)
    options = {"cfg_scale": 1.5, "null": params["null"]} | options
    return sample_actions(full, reuse, params, noise, cond, schedule=schedule, sampler=SAMPLER, **options)


# The head ------------------------------------------------------------------------------------------------------------


def test_head_and_all_intervals_are_those_of_the_reference_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, head_params_from_names(FILE, HEAD, dtype=np.float64))
        noise, cond = jnp.asarray(DATA["head/noise"]), jnp.asarray(DATA["head/cond"])[:, 0]
        out, residual = full(params, noise, int(DATA["head/forward_t"]), cond)
        np.testing.assert_allclose(out, DATA["head/forward_out"], atol=1e-12)
        np.testing.assert_allclose(reuse(params, noise, residual), out, atol=1e-12)
        assert SAMPLER.schedule.timesteps == tuple(DATA["head/timesteps"].tolist())
        np.testing.assert_allclose(SAMPLER.schedule.alphas_cumprod, DATA["head/alphas_cumprod"], rtol=1e-12)
        for interval in (1, 2, 3, 5, 10):
            found = jax.jit(sample, static_argnums=3)(params, noise, cond, interval)
            # float64, over 10 steps whose first multiplies errors by 7
            np.testing.assert_allclose(found, DATA[f"head/sample_N{interval}"], atol=1e-10)
            if interval == 1:
                np.testing.assert_allclose(found, DATA["head/sample_full"], atol=1e-10)


def test_one_residual_is_a_cache_of_every_branch():
    params = jax.tree.map(jnp.asarray, head_params_from_names(FILE, HEAD))
    noise = jnp.asarray(DATA["head/noise"], jnp.float32)
    cond = jnp.asarray(DATA["head/cond"], jnp.float32)[:, 0]

    def branches(params, x, t, cond):
        """All branches' outputs, kept apart, and the prediction from their sum."""
        _, residual = full(params, x, t, cond)
        return full(params, x, t, cond)[0], (residual, per_branch(params, x, t, cond))

    def per_branch(params, x, t, cond):
        from jaxaccel.compression import linear
        from jaxaccel.models.dit_blocks import time_features

        first = linear(time_features(t, 256), params["time_in"], params["time_in_bias"])
        first = linear(jax.nn.silu(first), params["time_out"], params["time_out_bias"])
        first = first + linear(cond, params["condition"], params["condition_bias"])
        z = jnp.concatenate([first[:, None], linear(x, params["action"], params["action_bias"])], 1)
        z, kept = z + params["positions"], []
        for block in params["blocks"]:
            for branch in (lambda h, b=block: attention_branch(b, h, HEAD.heads), lambda h, b=block: mlp_branch(b, h)):
                kept.append(branch(layer_norm(z)))
                z = z + kept[-1]
        return kept

    def add_all(params, x, cached):
        total = jnp.zeros_like(cached[0])
        for kept in cached[1]:
            total = total + kept[:, 1:]
        return reuse(params, x, total)

    schedule = cache_schedule(10, interval=3)
    found = jax.jit(
        lambda: sample_actions(
            branches, add_all, params, noise, cond, schedule=schedule, sampler=SAMPLER, cfg_scale=1.5,
            null=params["null"],
        )
    )()  # fmt: skip
    np.testing.assert_allclose(jax.jit(sample, static_argnums=3)(params, noise, cond, 3), found, atol=1e-5)


def test_schedule_and_flags_of_all_branches_agree():
    for interval in (1, 3, 5, 20):
        flags = np.asarray(uniform_schedule(10, 4, interval=interval)).all(1)[::-1]  # theirs counts noise
        assert cache_schedule(10, interval=interval) == tuple(flags.tolist())


def test_head_in_bf16_its_gradient_and_a_batch_at_many_devices():
    params = jax.tree.map(jnp.asarray, head_params_from_names(FILE, HEAD))
    noise = jax.random.normal(jax.random.key(0), (8, 16, 7))
    cond = jax.random.normal(jax.random.key(1), (8, 20))
    call = jax.jit(lambda p, x, c: full(p, x, 3, c)[0])
    exact = call(params, noise, cond)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, noise, cond))
    assert call(*half).dtype == jnp.bfloat16
    np.testing.assert_allclose(call(*half).astype(jnp.float32), exact, atol=0.15)  # 8 bits through 2 blocks
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    rows = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("b",)), PartitionSpec("b"))
    np.testing.assert_allclose(call(params, *jax.device_put((noise, cond), rows)), exact, atol=1e-5)
    jax.test_util.check_grads(
        lambda x, c: jnp.sum(jnp.sin(call(params, jnp.asarray(x), jnp.asarray(c)))), (noise[:1], cond[:1]), 1, ["rev"]
    )
    head = ActionHead(HEAD, params=params)
    np.testing.assert_allclose(head(noise, 3, cond), exact, atol=1e-5)
    assert HeadConfig() == HeadConfig.preset("B")


def test_bad_heads_and_samples():
    params = jax.tree.map(jnp.asarray, head_params_from_names(FILE, HEAD))
    noise, cond = jnp.zeros((1, 16, 7)), jnp.zeros((1, 20))
    arguments = {"sampler": SAMPLER, "schedule": cache_schedule(10, interval=2)}
    for call, message in (
        (lambda: HeadConfig(width=10, heads=3), "multiple of heads"),
        (lambda: HeadConfig(depth=0), "depth is 0"),
        (lambda: HeadConfig.preset("XL"), "size is 'XL'"),
        (lambda: full(params, noise[:, :3], 0, cond), "x has shape"),
        (lambda: full(params, noise, 0, cond[:, :3]), "cond has shape"),
        (lambda: reuse(params, noise, cond), "residual has shape"),
        (lambda: cache_schedule(10, interval=0), "interval is 0"),
        (lambda: cache_schedule(0, interval=1), "num_steps is 0"),
        (lambda: cache_schedule(10, interval=2.5), "interval is 2.5"),
        (lambda: sample(params, noise, cond, 2, null=None), "null is None"),
        (
            lambda: sample_actions(full, reuse, params, noise, cond, **arguments | {"schedule": (True,) * 9}),
            "schedule has 9 steps, expected 10",
        ),
        (
            lambda: sample_actions(full, reuse, params, noise, cond, **arguments | {"schedule": (False,) * 10}),
            "starts with a reused step",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert sample(params, noise, cond, 4, cfg_scale=None, null=None).shape == noise.shape


# Weights -------------------------------------------------------------------------------------------------------------


def test_a_file_of_a_whole_policy_is_read_and_says_what_is_wrong(tmp_path):
    named = {f"action_model.net.{name}": np.asarray(value, np.float32) for name, value in FILE.items()}
    path = tmp_path / "head.safetensors"
    save_file(named | {"projector.weight": np.zeros(1, np.float32)}, path)
    params, config = load_action_head(path, heads=4)
    assert config == HEAD
    assert load_action_head(tmp_path, config=HEAD)[1] == HEAD
    exact = head_params_from_names(FILE, HEAD)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, exact))
    gone = "action_model.net.blocks.1.attn.qkv.bias"
    for change, message in (
        ({gone: None}, "missing: blocks.1.attn.qkv.bias"),
        ({"action_model.net.odd": np.zeros(2, np.float32)}, "unexpected: odd"),
        ({gone: np.zeros(2, np.float32)}, r"blocks.1.attn.qkv.bias is \[2\], expected \[72\]"),
        ({gone: np.zeros(72, np.int32)}, "not floating point: blocks.1.attn.qkv.bias"),
        ({"action_model.net.positional_embedding": None}, "missing: positional_embedding"),
    ):
        save_file({name: value for name, value in (named | change).items() if value is not None}, path)
        with pytest.raises(WeightsError, match=message):
            load_action_head(path, heads=4)
    save_file(named, path)
    for where, message in (
        (path, "pass heads"), (tmp_path / "a.pt", "pickled"), (tmp_path / "none.safetensors", "no such file"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=message):
            load_action_head(where)
    with pytest.raises(TypeError, match="floating point"):
        head_params_from_names(FILE, HEAD, dtype=np.int32)


# The policy ----------------------------------------------------------------------------------------------------------

CONFIG = VLAConfig.tiny()
PARAMS = init_vla(jax.random.key(0), CONFIG)
VISUAL = jax.random.normal(jax.random.key(1), (2, 6, 5))
TEXT = jnp.array([[1, 2, 3], [4, 5, 6]])
cognition = jax.jit(vla_cognition, static_argnames=("config", "cuts"))


def test_cuts_that_cut_nothing_change_nothing():
    plain, none = cognition(PARAMS, VISUAL, TEXT, CONFIG)
    assert none is None
    every = EfficientVLAConfig(num_keep_tokens=6)
    same, kept = cognition(PARAMS, VISUAL, TEXT, CONFIG, cuts=every)
    assert kept.tolist() == [list(range(6))] * 2
    np.testing.assert_allclose(same, plain, atol=1e-5)
    params, config = cut_vla(PARAMS, CONFIG, EfficientVLAConfig())
    assert config == CONFIG
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params, PARAMS))
    states = vla_hidden_states(PARAMS, VISUAL, TEXT, CONFIG)
    assert states.shape == (4, 2, 9, 32)


def test_a_pruned_sequence_is_one_whose_dropped_keys_are_not_seen():
    cuts = EfficientVLAConfig(num_keep_tokens=4, num_key=2)
    found, kept = cognition(PARAMS, VISUAL, TEXT, CONFIG, cuts=cuts)
    assert kept.shape == (2, 4)
    from jaxaccel.models.decoder import block, embed, prompt_context, rms_norm

    x = jnp.concatenate([VISUAL @ PARAMS["visual"].T, embed(PARAMS["decoder"], TEXT, CONFIG.decoder)], 1)
    context = prompt_context(x, CONFIG.decoder)
    for layer in (0, 1):
        x, _ = block(PARAMS["decoder"]["layers"][layer], x, None, context, CONFIG.decoder)
    rows = []
    for row in range(2):  # by hand: the last layer on the kept tokens with the angles of their old places
        places = jnp.array([*kept[row].tolist(), 6, 7, 8])
        angles = tuple(part[row : row + 1, places] for part in context.angles)
        short = x[row : row + 1, places]
        out, _ = block(PARAMS["decoder"]["layers"][2], short, None, context._replace(angles=angles), CONFIG.decoder)
        rows.append(rms_norm(out[0, -1], PARAMS["decoder"]["final_norm"], CONFIG.decoder.norm_eps))
    np.testing.assert_allclose(found, jnp.stack(rows), atol=1e-5)


def test_all_cuts_in_one_program():
    cuts = EfficientVLAConfig(num_drop_layers=1, num_keep_tokens=4, num_key=2, cache_interval=5, mlp_keep_ratio=0.75)
    importance = layer_importance(vla_hidden_states(PARAMS, VISUAL, TEXT, CONFIG))
    params, config = cut_vla(PARAMS, CONFIG, cuts, importance=importance)
    assert config.decoder.num_layers == len(params["decoder"]["layers"]) == 2
    assert config.decoder.intermediate_size == 36
    noise = jax.random.normal(jax.random.key(2), (2, 4, 2))
    policy = jax.jit(vla_policy, static_argnames=("config", "cuts"))
    found = policy(params, VISUAL, TEXT, noise, config, cuts=cuts)
    assert found.shape == noise.shape
    assert jnp.isfinite(found).all()
    alone = policy(params, VISUAL[:1], TEXT[:1], noise[:1], config, cuts=cuts)
    np.testing.assert_allclose(found[:1], alone, atol=1e-4)  # rows of a batch do not meet
    model = VLA(config, params=params)
    np.testing.assert_allclose(model(VISUAL, TEXT, noise, cuts=cuts), found, atol=1e-4)


def test_bad_policies():
    decoder = CONFIG.decoder
    for call, message in (
        (lambda: dataclasses.replace(CONFIG, head=HeadConfig.tiny()), "head.token_size is 12"),
        (lambda: dataclasses.replace(CONFIG, decoder=dataclasses.replace(decoder, scan_layers=True)), "scan_layers"),
        (lambda: dataclasses.replace(CONFIG, num_visual=0), "num_visual is 0"),
        (lambda: vla_cognition(PARAMS, VISUAL[:, :3], TEXT, CONFIG), "visual has shape"),
        (lambda: vla_cognition(PARAMS, VISUAL, TEXT[:1], CONFIG), "text has shape"),
        (lambda: vla_cognition(PARAMS, VISUAL, TEXT, CONFIG, cuts=EfficientVLAConfig(num_keep_tokens=7)), "num_keep"),
        (lambda: cut_vla(PARAMS, CONFIG, EfficientVLAConfig(num_drop_layers=1)), "importance is None"),
        (lambda: cut_vla(PARAMS, CONFIG, EfficientVLAConfig(num_drop_layers=1), importance=[1.0]), "expected 3 layers"),
        (lambda: cut_vla(PARAMS, CONFIG, EfficientVLAConfig(num_drop_layers=3), importance=[1.0] * 3), "num_drop"),
        (lambda: EfficientVLAConfig(num_drop_layers=-1), "num_drop_layers is -1"),
        (lambda: EfficientVLAConfig(num_keep_tokens=3), "expected at least num_key"),
        (lambda: EfficientVLAConfig(cache_interval=0), "cache_interval is 0"),
        (lambda: EfficientVLAConfig(task_ratio=2.0), "task_ratio is 2"),
        (lambda: EfficientVLAConfig(mlp_keep_ratio=0.0), "mlp_keep_ratio is 0"),
        (lambda: VLA(CONFIG), "either rngs"),
        (lambda: ActionHead(HEAD, rngs=nnx.Rngs(0), params={}), "either rngs"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
