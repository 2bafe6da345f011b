"""`python -m experiments generate` on a tiny model folder: its text, its acceleration flags, its errors."""

import io
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from experiments import generation_cli
from experiments.runner.cli import main
from jaxaccel.decoding import MedusaConfig, init_medusa_heads, make_tree
from jaxaccel.decoding.heads_file import save_heads
from jaxaccel.decoding.sampling import Sampling
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.drafts import Drafts
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.kv_cache import BlockTopK
from jaxaccel.models.prompts import SnapKV
from jaxaccel.models.weights import load_pretrained
from tests.experiments.conftest import ROOT, cli_environment

# Four rows more than the tokenizer has words.
CONFIG = DecoderConfig.tiny(vocab_size=264, max_positions=256)
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QUESTION, NEW = "Wie heißt du?", 24
LONG = "abcdefg hijk lmnop " * 8  # 152 bytes, as many tokens


def make_tokenizer():
    """A token for each byte, and the marks of a chat."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={word: i for i, word in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(["<|start|>", "<|end|>", "<|pad|>", "<|other|>"])
    return words


def make_weights():
    """Arrays under the names of Hugging Face's Llama; large ones, so that ties cannot flip."""
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return (0.25 * rng.standard_normal(shape)).astype(np.float32)

    width, inner, queries, keys = CONFIG.hidden_size, CONFIG.intermediate_size, 32, 16
    names = {"model.embed_tokens.weight": matrix(264, width), "lm_head.weight": matrix(264, width)}
    names["model.norm.weight"] = np.ones(width, np.float32)
    for layer in range(CONFIG.num_layers):
        start = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"{start}{norm}.weight"] = np.ones(width, np.float32)
        for name, shape in {
            "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }.items():  # fmt: skip
            names[f"{start}{name}.weight"] = matrix(*shape)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    settings = {
        "model_type": "llama", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(settings))
    save_file(make_weights(), path / "model.safetensors")
    make_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    return path


TREE = ((0,), (1,), (0, 0))


@pytest.fixture(scope="module")
def heads(folder):
    """The file, and what is in it."""
    path = folder.parent / "heads.safetensors"
    made = init_medusa_heads(jax.random.key(0), 32, 264, config=MedusaConfig(num_heads=2))
    save_heads(path, made, TREE, model_name=str(folder), top_k=2)
    return path, Drafts(made, make_tree(TREE, top_k=2))


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


@pytest.fixture
def run(capsys, folder):
    """Run the command on the tiny model; returns the exit code, stdout and the lines of stderr."""

    def call(*words, model=folder, new=NEW):
        code = main(["generate", "--model", str(model), "--max-new-tokens", str(new), *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


def direct(model, text, *, raw=False, weights="float32", new=NEW, system=None, **settings):
    """The same text by calling the library."""
    tokenizer = model.tokenizer
    messages = [{"role": "system", "content": system}] if system else []
    ids = tokenizer.encode(text) if raw else tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
    params = prepare(jax.tree.map(jnp.asarray, model.params), weights)
    settings = {"sampling": Sampling(vocab_size=260)} | settings
    out = generate(params, [ids], model.config, max_new_tokens=new, stop_ids=tokenizer.eos_ids, **settings)
    made = np.asarray(out.tokens)[0, : int(out.count[0])].tolist()
    return tokenizer.decode([token for token in made if token not in tokenizer.eos_ids])


def test_streamed_text_is_that_of_generate(run, model):
    code, out, err = run("--prompt", QUESTION)
    assert (code, out) == (0, direct(model, QUESTION) + "\n")
    count = len(model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}]))
    assert len(err) == 1
    assert re.fullmatch(
        rf"{count} prompt tokens, first token after \d+\.\d\d s, {NEW} new tokens, \d+\.\d tokens/s, "
        r"times include compilation \(--stats tells it apart\)",
        err[0],
    )


def test_raw_text_and_a_system_message_are_other_prompts(run, model):
    raw = run("--prompt", QUESTION, "--raw")[1]
    told = run("--prompt", QUESTION, "--system", "Be brief.")[1]
    assert raw == direct(model, QUESTION, raw=True) + "\n"
    assert told == direct(model, QUESTION, system="Be brief.") + "\n"
    assert len({raw, told, run("--prompt", QUESTION)[1]}) == 3


def test_stats_tell_compilation_apart_and_change_no_text(run):
    plain, (code, out, err) = run("--prompt", QUESTION)[1], run("--prompt", QUESTION, "--stats")
    assert (code, out, len(err)) == (0, plain, 1)
    assert re.search(r"tokens/s, compilation apart: \d+\.\d\d s$", err[0])


def test_one_token_has_no_rate(run):
    code, _, err = run("--prompt", QUESTION, "--stats", new=1)
    assert code == 0
    assert "1 new tokens, compilation apart" in err[0]


def test_prompts_from_stdin_and_files(run, tmp_path, monkeypatch):
    expected = run("--prompt", QUESTION)[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    assert run("--prompt", "-")[1] == expected
    (tmp_path / "prompt.txt").write_text(QUESTION + "\n", encoding="utf-8")
    assert run("--prompt-file", tmp_path / "prompt.txt")[1] == expected


def test_the_seed_decides_drawn_text(run, model):
    words = ["--prompt", QUESTION, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.2]
    first = run(*words, "--seed", 3)
    assert first[:2] == run(*words, "--seed", 3)[:2]
    assert first[1] != run(*words, "--seed", 4)[1]
    sampling = Sampling(1.2, 1.5, top_k=50, top_p=0.9, vocab_size=260)
    assert first[1] == direct(model, QUESTION, sampling=sampling, key=jax.random.key(3)) + "\n"


@pytest.mark.parametrize("flags", ["bfloat16", "int8", "snapkv", "medusa", "block_topk", "all"])
def test_each_acceleration_alone_and_all_together(run, model, heads, flags):
    path, drafts = heads
    words, settings = [], {}
    if flags in ("bfloat16", "int8", "all"):
        settings["weights"] = "bfloat16" if flags == "bfloat16" else "int8"
        words += ["--weights", settings["weights"]]
    if flags in ("snapkv", "all"):
        settings["snapkv"] = SnapKV(capacity=130 if flags == "all" else 48)
        words += ["--snapkv", settings["snapkv"].capacity]
    if flags in ("medusa", "all"):
        settings["drafts"] = drafts
        words += ["--medusa", path]
    if flags in ("block_topk", "all"):
        settings["sparse"] = BlockTopK(num_blocks=1)
        words += ["--block-topk", 1]
    code, out, err = run("--prompt", LONG, *words)
    assert code == 0
    assert out == direct(model, LONG, **settings) + "\n"
    assert len(err) == 1  # no notes: each flag has an effect
    assert ("tokens per step" in err[0]) == ("drafts" in settings)


def test_heads_that_share_the_vocabulary_matrix(run, heads, folder):
    path = folder.parent / "shared.safetensors"
    made = init_medusa_heads(jax.random.key(0), 32, 264, config=MedusaConfig(num_heads=1), share_vocab=True)
    save_heads(path, made, [(0,)], model_name="other", top_k=1)
    plain, (code, out, err) = run("--prompt", QUESTION)[1], run("--prompt", QUESTION, "--medusa", path)
    assert (code, out) == (0, plain)
    assert err[0] == f"note: the heads of {path} were trained on 'other'"
    save_heads(path, made, [(0,)], model_name="other", top_k=1, token_ids=range(100, 200))
    assert run("--prompt", QUESTION, "--medusa", path)[:2] == (0, plain)


def test_options_without_effect_are_noted(run):
    plain = run("--prompt", QUESTION)[1]
    code, out, err = run("--prompt", QUESTION, "--snapkv", 200, "--block-topk", 9, "--top-k", 5)
    assert (code, out) == (0, plain)
    assert [line.startswith("note: --") for line in err] == [True, True, True, False]
    assert re.match(r"note: --snapkv 200 changes nothing, as the prompt has only \d+ tokens", err[0])


def test_characters_are_never_torn(model, capsys):
    with generation_cli._Stream(model.tokenizer, model.tokenizer.eos_ids) as stream:
        tokens = np.array([[*model.tokenizer.encode("é€"), *model.tokenizer.eos_ids, 0]], np.int32)
        seen = []
        for count in range(1, 7):
            stream(tokens, np.array([count]))
            seen.append(capsys.readouterr().out)
    assert seen == ["", "é", "", "", "€", ""]
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "smolm2-135m", "--prompt", "x"], "did you mean 'smollm2-135m'?"),
        ([], "the prompt is empty; give it with --prompt TEXT"),
        (["--prompt", " \n"], "the prompt is empty; give it with"),
        (["--prompt", "x", "--prompt-file", "x"], "give --prompt or --prompt-file, not both"),
        (["--prompt", "x\udcff"], "the prompt is not valid text"),
        (["--prompt", LONG * 2], "the prompt of 323 tokens and --max-new-tokens 24 do not fit into the 256 positions"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["--prompt", "x", "--temperature", "-0.5"], "temperature is -0.5, expected 0 (greedy) or a positive number"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p is 1.5, expected a number in (0, 1], or None"),
        (["--prompt", "x", "--top-k", "0"], "top_k is 0, expected at least 1, or None"),
        (["--prompt", "x", "--top-k", "999"], "--top-k is 999, but"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0, expected a positive number"),
        (["--prompt", "x", "--seed", "-1"], "--seed is -1, expected a number from 0"),
        (["--prompt", "x", "--snapkv", "32"], "--snapkv: capacity is 32, expected more than window = 32"),
        (["--prompt", "x", "--block-topk", "0"], "--block-topk is 0, expected at least 1 block"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system is a part of the chat template"),
    ],
)
def test_wrong_usage_is_one_line(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert message in err[0]


def test_words_that_are_no_options(run):
    assert run("--prompt", "x", "--weights", "int4")[0] == 2
    assert run("--prompt", "x", "--colour")[0] == 2


@pytest.mark.parametrize(("width", "vocab"), [(16, 264), (32, 100)])
def test_heads_of_another_model_are_refused(run, tmp_path, width, vocab):
    made = init_medusa_heads(jax.random.key(0), width, vocab)
    save_heads(tmp_path / "h.safetensors", made, TREE, model_name="another")
    code, out, err = run("--prompt", "x", "--medusa", tmp_path / "h.safetensors")
    assert (code, out, len(err)) == (2, "", 1)
    assert f"h.safetensors: heads of another model, of width {width} with {vocab} tokens" in err[0]


def test_files_that_cannot_be_used_are_failures(run, heads, folder, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(heads[0].read_bytes()[:-1])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    copies = {name: shutil.copytree(folder, tmp_path / name) for name in ("wordless", "torn", "base")}
    (copies["wordless"] / "tokenizer.json").unlink()
    weights = copies["torn"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (copies["base"] / "tokenizer_config.json").write_text("{}")
    for words, model, message, expected in (
        (["--prompt", "x", "--medusa", tmp_path / "torn.safetensors"], folder, "torn.safetensors: truncated", 1),
        (["--prompt", "x", "--medusa", tmp_path / "none"], folder, "No such file or directory", 1),
        (["--prompt-file", tmp_path / "latin.txt"], folder, "latin.txt: the prompt is not UTF-8", 1),
        (["--prompt-file", tmp_path / "none"], folder, "No such file or directory", 1),
        (["--prompt", "x"], tmp_path / "none", "none: no such file or folder", 1),
        (["--prompt", "x"], copies["wordless"], "has no tokenizer: ", 1),
        (["--prompt", "x"], copies["torn"], "model.safetensors: truncated", 1),
        (["--prompt", "x"], copies["base"], "has no chat template: it continues text; add --raw", 2),
    ):
        code, out, err = run(*words, model=model)
        assert (code, out, len(err)) == (expected, "", 1), err
        assert err[0].startswith("error: ")
        assert message in err[0]


def test_an_interrupt_ends_the_line_and_says_so(run, monkeypatch):
    def stopped(params, prompts, config, *, callback, **settings):
        callback(np.array([[0, 0]], np.int32), np.array([1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(generation_cli, "generate", stopped)
    code, out, err = run("--prompt", "x")
    assert (code, err) == (130, ["stopped"])
    assert out.endswith("\n")


def test_a_closed_pipe_is_no_traceback(folder):
    words = ["-m", "experiments", "generate", "--model", str(folder), "--prompt", QUESTION, "--max-new-tokens", "100"]
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=cli_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_help_names_the_command(capsys):
    assert main(["--help"]) == 0
    assert "generate --prompt TEXT" in capsys.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert "--block-topk" in capsys.readouterr().out
