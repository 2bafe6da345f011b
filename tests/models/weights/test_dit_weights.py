"""Files of diffusion transformers: both families of names, and what does not fit."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from jaxaccel.models import DiTConfig, dit_from_safetensors, dit_params_from_names, load_dit
from jaxaccel.models import dit_weights as module
from jaxaccel.models.dit_blocks import grid_positions
from jaxaccel.models.dit_weights import dit_config_from_diffusers, dit_config_from_names, dit_file_shapes
from jaxaccel.models.weights import WeightsError
from jaxaccel.models.weights.hub import hub_snapshot, is_complete
from tests.models.weights.making import write_json, write_safetensors
from tests.models.weights.test_downloads import serving
from tests.models.weights.test_hub import hub_of

TINY = DiTConfig.tiny(width=8, heads=2, channels=2, learn_sigma=True)


def original(config=TINY):
    """Tensors by the published code's names."""
    rng = np.random.default_rng(0)
    d, k = config.width, config.patch
    shapes = {
        "x_embedder.proj": (d, config.channels, k, k), "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d),
        "final_layer.adaLN_modulation.1": (2 * d, d), "final_layer.linear": (k * k * config.out_channels, d),
    }  # fmt: skip
    for b in range(config.depth):
        block = {"adaLN_modulation.1": (6 * d, d), "attn.qkv": (3 * d, d), "attn.proj": (d, d)}
        block |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        shapes |= {f"blocks.{b}.{name}": shape for name, shape in block.items()}
    tensors = {"y_embedder.embedding_table.weight": rng.standard_normal((config.num_classes + 1, d), np.float32)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = rng.standard_normal(shape, np.float32)
        tensors[f"{name}.bias"] = rng.standard_normal(shape[0], np.float32)
    return tensors | {"pos_embed": grid_positions(config.image_size // k, d)[None].astype(np.float32)}


def diffusers(tensors, depth=2):
    """The same by diffusers' names: queries, keys and values apart, networks of time and label in every block."""
    moved = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
    moved |= {"final_layer.linear": "proj_out_2"}
    for b in range(depth):
        old, new = f"blocks.{b}.", f"transformer_blocks.{b}."
        moved |= {old + "adaLN_modulation.1": new + "norm1.linear", old + "attn.proj": new + "attn1.to_out.0"}
        moved |= {old + "mlp.fc1": new + "ff.net.0.proj", old + "mlp.fc2": new + "ff.net.2"}
    out = {f"{new}.{end}": tensors[f"{old}.{end}"] for old, new in moved.items() for end in ("weight", "bias")}
    for b in range(depth):
        block = f"transformer_blocks.{b}"
        for end in ("weight", "bias"):
            for part, rows in zip("qkv", np.split(tensors[f"blocks.{b}.attn.qkv.{end}"], 3), strict=True):
                out[f"{block}.attn1.to_{part}.{end}"] = rows
            for i, j in ((0, 1), (2, 2)):
                name = f"{block}.norm1.emb.timestep_embedder.linear_{j}.{end}"
                out[name] = tensors[f"t_embedder.mlp.{i}.{end}"]
        name = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
        out[name] = tensors["y_embedder.embedding_table.weight"]
    return out


def settings(config=TINY, **changes):
    return {
        "_class_name": "Transformer2DModel", "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads, "num_layers": config.depth, "patch_size": config.patch,
        "sample_size": config.image_size, "in_channels": config.channels, "out_channels": config.out_channels,
        "num_embeds_ada_norm": config.num_classes, "norm_type": "ada_norm_zero", "attention_bias": True,
        "activation_fn": "gelu-approximate",
    } | changes  # fmt: skip


def leaves(params):
    top = {name: value for name, value in params.items() if name != "blocks"}
    return top | {f"{b}.{name}": value for b, block in enumerate(params["blocks"]) for name, value in block.items()}


def test_both_families_of_names_are_one_model(tmp_path):
    tensors = original()
    expected = leaves(dit_params_from_names(tensors, TINY))
    np.testing.assert_array_equal(
        expected["patch"].reshape(8, 2, 2, 2), tensors["x_embedder.proj.weight"].transpose(0, 2, 3, 1)
    )
    assert {name: value.shape for name, value in tensors.items() if name != "pos_embed"} == dit_file_shapes(TINY)
    assert {k: v.shape for k, v in diffusers(tensors).items()} == dit_file_shapes(TINY, family="diffusers")

    file = write_safetensors(tmp_path / "published.safetensors", tensors)
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    write_safetensors(pipeline / "transformer" / "diffusion_pytorch_model.safetensors", diffusers(tensors))
    write_json(pipeline / "transformer" / "config.json", settings())
    for loaded in (dit_from_safetensors(file, heads=2), load_dit(pipeline), load_dit(str(pipeline / "transformer"))):
        assert loaded.config == TINY
        for name, value in leaves(loaded.params).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
            assert value.flags.owndata or value.base.flags.owndata
    half = dit_from_safetensors(file, config=TINY, dtype=ml_dtypes.bfloat16)
    assert half.params["labels"].dtype == ml_dtypes.bfloat16


def test_shards_by_an_index(tmp_path):
    tensors = diffusers(original())
    names = sorted(tensors)
    where = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    write_json(tmp_path / "config.json", settings())
    write_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": where})
    assert not is_complete(tmp_path)
    for file in set(where.values()):
        write_safetensors(tmp_path / file, {name: tensors[name] for name in names if where[name] == file})
    assert is_complete(tmp_path)
    assert dit_from_safetensors(tmp_path).config == TINY


def test_the_published_model_by_its_settings():
    xl = DiTConfig.preset("XL/2")
    assert dit_config_from_diffusers(settings(xl)) == xl
    shapes = {name: np.broadcast_to(np.float32(0), shape) for name, shape in dit_file_shapes(xl).items()}
    shapes["pos_embed"] = np.broadcast_to(np.float32(0), (1, 256, 1152))
    assert dit_config_from_names(shapes) == xl  # heads by width and depth
    assert sum(value.size for value in shapes.values()) == xl.num_parameters


def test_only_the_transformer_of_a_pipeline_is_fetched(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_safetensors(folder / "weights", diffusers(original()))
    write_json(folder / "config", settings())
    files = {
        "transformer/config.json": (folder / "config").read_bytes(),
        "transformer/diffusion_pytorch_model.safetensors": (folder / "weights").read_bytes(),
        "vae/config.json": b"{}", "model_index.json": json.dumps({"_class_name": "DiTPipeline"}).encode(),
    }  # fmt: skip
    options = {"revision": None, "cache": tmp_path / "cache", "subfolder": "transformer"}
    with serving(hub_of(files)) as (url, _):
        found = hub_snapshot("tiny/model", endpoint=url.rsplit("/", 1)[0], **options)
    assert found.name == "transformer"
    assert [path.name for path in found.parent.iterdir()] == ["transformer"]
    assert (
        hashlib.sha256((found / "config.json").read_bytes()).digest()
        == hashlib.sha256(files["transformer/config.json"]).digest()
    )
    assert dit_from_safetensors(found).config == TINY
    del files["transformer/diffusion_pytorch_model.safetensors"]
    with serving(hub_of(files)) as (url, _), pytest.raises(WeightsError, match=r"in transformer/ at revision main"):
        hub_snapshot("tiny/model", endpoint=url.rsplit("/", 1)[0], **(options | {"cache": tmp_path / "other"}))


def test_names_go_to_the_hub(monkeypatch, tmp_path):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", diffusers(original()))
    write_json(tmp_path / "config.json", settings())
    asked = []
    monkeypatch.setattr(module, "hub_snapshot", lambda repository, **options: asked.append(repository) or tmp_path)
    assert load_dit("dit-xl-2-256").config == load_dit("owner/name").config == TINY
    assert asked == ["facebook/DiT-XL-2-256", "owner/name"]


def changed(**changes):
    tensors = original()
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    return tensors


def without(*names):
    return {name: value for name, value in original().items() if name not in names}


BIAS = "blocks.1.mlp.fc1.bias"


def test_all_that_does_not_fit_is_named():
    tensors = without(BIAS, "t_embedder.mlp.0.weight")
    tensors["x_embedder.proj.weight"] = np.zeros((8, 2, 3, 3), np.float32)
    tensors["final_layer.linear.bias"] = np.zeros(16, np.int32)
    tensors["blocks.2.attn.qkv.bias"] = np.zeros(1)
    with pytest.raises(WeightsError) as error:
        dit_params_from_names(tensors, TINY)
    for words in (
        f"missing: t_embedder.mlp.0.weight, {BIAS}",
        "unexpected: blocks.2.attn.qkv.bias",
        "wrong shapes: x_embedder.proj.weight is [8, 2, 3, 3], expected [8, 2, 2, 2]",
        "not floating point: final_layer.linear.bias (int32)",
    ):
        assert words in str(error.value)


def copies_differ():
    tensors = diffusers(original())
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    return tensors | {name: tensors[name] + 1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: dit_params_from_names(copies_differ(), TINY), "transformer_blocks.1.norm1.emb.class.* differs"),
        (lambda path: dit_params_from_names(changed(pos_embed=np.zeros((1, 16, 8))), TINY), "not the fixed sines"),
        (lambda path: dit_params_from_names(diffusers(without()) | {"extra": np.ones(1)}, TINY), "unexpected: extra"),
        (
            lambda path: dit_config_from_diffusers(settings(norm_type="ada_norm_single")),
            "norm_type is 'ada_norm_single'",
        ),
        (lambda path: dit_config_from_diffusers({"num_layers": 2}), "lacks num_attention_heads"),
        (lambda path: dit_config_from_diffusers(settings(out_channels=5)), "out_channels is 5"),
        (lambda path: dit_config_from_diffusers(settings(sample_size=7)), "does not fit together: image_size is 7"),
        (lambda path: dit_config_from_names(without("pos_embed")), "missing: pos_embed"),
        (lambda path: dit_config_from_names(original()), "pass heads"),
        (lambda path: dit_config_from_names(original(), heads=3), "shapes do not fit together"),
        (lambda path: load_dit(path / "nothing"), "no such file"),
        (lambda path: load_dit("unknown"), "one of dit-xl-2-256"),
        (lambda path: dit_from_safetensors(path / "model.pt"), "pickled"),
        (lambda path: dit_from_safetensors(path), "found none"),
        (
            lambda path: dit_from_safetensors(write_safetensors(path / "a.safetensors", without(BIAS)), heads=2),
            rf"a.safetensors: tensors do not fit the configuration; missing: {BIAS}",
        ),
        (
            lambda path: dit_from_safetensors(write_safetensors(path / "b.safetensors", diffusers(original()))),
            "config.json: cannot be read",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, call, words):
    with pytest.raises(WeightsError, match=words):
        call(tmp_path)


def test_other_mistakes():
    with pytest.raises(TypeError, match="expected floating point"):
        dit_params_from_names(original(), TINY, dtype=np.int32)
    with pytest.raises(ValueError, match="expected torch or diffusers"):
        dit_file_shapes(TINY, family="flax")
