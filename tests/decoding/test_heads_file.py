"""Files of Medusa heads: what was saved comes back, and nothing else is taken for it."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from jaxaccel.decoding import MedusaConfig, MedusaParams, init_medusa_heads, make_tree
from jaxaccel.decoding.heads_file import HeadsInfo, load_heads, save_heads

PATHS = ((0,), (1,), (0, 0), (0, 2))


def heads(dtype=jnp.float32, share_vocab=False):
    keys = jax.random.split(jax.random.key(1), 2)
    start = init_medusa_heads(
        keys[0], 8, 24, config=MedusaConfig(num_heads=2, num_layers=2), share_vocab=share_vocab, dtype=dtype
    )
    return start._replace(weight=jax.random.normal(keys[1], start.weight.shape, dtype))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "heads.safetensors"
    save_heads(path, heads(), PATHS, model_name="tiny", top_k=3)
    return path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("share_vocab", [False, True])
def test_what_was_saved_comes_back(tmp_path, dtype, share_vocab):
    saved = heads(dtype, share_vocab)
    path = tmp_path / "new" / "folder" / "heads.safetensors"
    save_heads(path, saved, PATHS[::-1], model_name="smollm2-135m", top_k=5)
    loaded, tree, info = load_heads(str(path))
    assert (loaded.vocab is None) == share_vocab
    for before, after in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        assert isinstance(after, jax.Array)
        assert after.dtype == dtype
        np.testing.assert_array_equal(before, after)
    assert tree == make_tree(PATHS, top_k=5)  # sorted by make_tree
    assert info == HeadsInfo("smollm2-135m", 8, 1)


@pytest.mark.parametrize("share_vocab", [False, True])
def test_tokens_that_are_guessed_come_back(tmp_path, share_vocab):
    ids = jnp.arange(24) * 2
    save_heads(tmp_path / "h", heads(share_vocab=share_vocab), PATHS, model_name="tiny", top_k=3, token_ids=ids)
    loaded, _, info = load_heads(tmp_path / "h")
    assert (loaded.vocab is None) == share_vocab
    assert info.token_ids.dtype == np.int32
    np.testing.assert_array_equal(info.token_ids, ids)


def test_the_root_alone_is_a_tree(tmp_path):
    save_heads(tmp_path / "h", heads(), [], model_name="tiny")
    assert load_heads(tmp_path / "h")[1].num_nodes == 1


def test_others_can_read_the_file(file):
    with safetensors.safe_open(file, framework="numpy") as opened:
        assert sorted(opened.keys()) == ["bias", "vocab", "weight"]
        said = opened.metadata()
    assert json.loads(said["tree_paths"]) == [[0], [1], [0, 0], [0, 2]]
    assert (said["hidden_size"], said["model"], said["version"], said["top_k"]) == ("8", "tiny", "1", "3")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_heads(file, heads(jnp.bfloat16), PATHS, model_name="other")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_file_is_replaced_and_has_ordinary_permissions(file):
    save_heads(file, heads(), [(0,)], model_name="other")
    assert load_heads(file)[2].model_name == "other"
    assert os.listdir(file.parent) == [file.name]
    ordinary = file.parent / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{file.name}: truncated, or not a safetensors file"):
        load_heads(file)


def test_something_else_is_named(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match=r"picture\.png: truncated, or not a safetensors file"):
        load_heads(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        load_heads(tmp_path / "nowhere")


def test_a_model_is_not_heads(tmp_path):
    save_file({"model.norm.weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: not a file of Medusa heads: its format is 'pt'"):
        load_heads(tmp_path / "model.safetensors")
    save_file({"model.norm.weight": np.ones(4, np.float32)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors: not a file of Medusa heads: its format is None"):
        load_heads(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("said", "arrays", "message"),
    [
        ({"version": "2"}, {}, "its format has version '2', expected 1"),
        ({"top_k": None}, {}, "corrupt: its metadata lack 'top_k'"),
        ({"top_k": "ten"}, {}, "corrupt: invalid literal"),
        ({"tree_paths": "[[0"}, {}, "corrupt: Expecting"),
        ({"tree_paths": "7"}, {}, "corrupt: tree_paths must be a list of lists, got 7"),
        ({"tree_paths": "[[0.5]]"}, {}, "corrupt: tree_paths must hold whole numbers"),
        ({"tree_paths": "[[0, 0]]"}, {}, "corrupt: paths must hold every ancestor"),
        ({"tree_paths": "[[7]]"}, {}, "corrupt: paths must hold ranks below top_k = 3"),
        ({"tree_paths": "[[0], [0, 0], [0, 0, 0]]"}, {}, "corrupt: the tree guesses 3 tokens ahead"),
        ({"hidden_size": "9"}, {}, r"corrupt: weight must have shape \(heads, layers, 9, 9\), got \(2, 2, 8, 8\)"),
        ({}, {"weight": None}, "corrupt: heads must have weight and bias, got bias, vocab"),
        ({}, {"weight": np.zeros((0, 2, 8, 8), np.float32)}, "corrupt: weight must have shape"),
        ({}, {"bias": np.zeros((2, 2, 9), np.float32)}, r"corrupt: bias must have shape \(2, 2, 8\) like the weight"),
        ({}, {"vocab": np.zeros((3, 24, 8), np.float32)}, r"corrupt: vocab must have shape \(2, V, 8\)"),
        ({}, {"bias": np.zeros((2, 2, 8), np.int32)}, "corrupt: bias is of I32, expected F64 or F32"),
        ({}, {"token_ids": np.arange(24, dtype=np.int64)}, "corrupt: token_ids is of I64, expected I32"),
        (
            {},
            {"token_ids": np.arange(9, dtype=np.int32)},
            "corrupt: token_ids must have a token for each of vocab's",
        ),
        ({}, {"token_ids": np.full(24, -1, np.int32)}, "corrupt: token_ids must be a list of ids >= 0"),
        ({}, {"extra": np.zeros(1, np.float32)}, "corrupt: unknown arrays extra"),
    ],
)
def test_each_mistake_in_a_file_is_named(tmp_path, said, arrays, message):
    path = tmp_path / "heads.safetensors"
    whole = {
        "format": "jaxaccel.medusa", "version": "1", "model": "tiny", "hidden_size": "8", "top_k": "3",
        "tree_paths": json.dumps(PATHS),
    }  # fmt: skip
    values = {name: np.asarray(array) for name, array in heads()._asdict().items()} | arrays
    metadata = {name: text for name, text in (whole | said).items() if text is not None}
    save_file({name: array for name, array in values.items() if array is not None}, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"heads\.safetensors: {message}"):
        load_heads(path)


def test_what_cannot_be_saved(tmp_path):
    path, good = tmp_path / "heads.safetensors", heads()
    with pytest.raises(ValueError, match=r"paths must hold every ancestor, got \(1, 0\) without \(1,\)"):
        save_heads(path, good, [(0,), (1, 0)], model_name="tiny")
    with pytest.raises(ValueError, match="guesses 3 tokens ahead, but there are only 2 heads"):
        save_heads(path, good, [(0,), (0, 0), (0, 0, 0)], model_name="tiny")
    with pytest.raises(ValueError, match=r"bias must have shape \(2, 2, 8\) like the weight, got \(2, 2, 4\)"):
        save_heads(path, MedusaParams(good.weight, good.bias[..., :4], None), PATHS, model_name="tiny")
    with pytest.raises(TypeError, match="bias must be of float16, bfloat16, float32 or float64, got int32"):
        save_heads(path, good._replace(bias=np.zeros((2, 2, 8), np.int32)), PATHS, model_name="tiny")
    with pytest.raises(ValueError, match="token_ids must hold at least the tree's top_k = 3 tokens, got 2"):
        save_heads(path, good._replace(vocab=None), PATHS, model_name="tiny", top_k=3, token_ids=[5, 6])
    assert os.listdir(tmp_path) == []
