"""BlockFFN, Learn2PD and GBNN as experiments: full-size data on tiny files, arms, and what they refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments import (
    blockffn,
    blockffn_training,
    gbnn,
    gbnn_models,
    learn2pd,
    learn2pd_arms,
    learn2pd_full,
    learn2pd_words,
)
from experiments.blockffn_model import balance_loss, remoe_factor, top_k_scores
from experiments.data import hub, tables
from jaxaccel.decoding.learn2pd import Threshold
from jaxaccel.models import DecoderConfig
from jaxaccel.moe import Routing
from tests.models.weights.making import (
    LLADA_LAYER,
    LLADA_TOP,
    byte_words,
    llada_settings,
    named,
    random_params,
    write_json,
    write_safetensors,
)


@pytest.fixture
def write(tmp_path):
    def make(name, rows):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return {"data_files": {split: str(path) for split in ("train", "validation", "test")}}

    return make


# BlockFFN -------------------------------------------------------------------------------------------------------------


def test_texts_of_a_hub_by_bytes(write):
    options = write("c4.jsonl", [{"text": "a small text " * 3}, {"text": "b"}, {"text": "another one"}])
    data = blockffn_training.load_data("json", 8, 2, 2, **options)
    assert data.vocabulary == 256
    assert data.validation.tolist()[0] == list(b"a small t")
    assert data.validation.tolist()[1] == [ord("b"), *[0] * 8]
    assert data.train.chunk(0, 0, 3)["tokens"].shape == (3, 2, 9)
    with pytest.raises(hub.DataError, match="expected text"):
        blockffn_training.load_data("json", 8, 2, 2, **write("no.jsonl", [{"body": "x"}]))


def test_top_k_scores_are_k_and_as_large_as_the_others():
    scores = top_k_scores(jax.random.normal(jax.random.key(0), (5, 8)), 3)
    assert ((scores != 0).sum(-1) == 3).all()
    equal = top_k_scores(jnp.zeros((1, 8)), 3)
    np.testing.assert_allclose((equal**2).sum(), 8, rtol=1e-6)


def test_balance_is_one_when_even_and_more_when_not():
    logits = 10 * jnp.eye(4)
    even = Routing(logits, logits, top_k_scores(logits, 1))
    np.testing.assert_allclose(balance_loss(even), 1, rtol=1e-5)
    one = jnp.tile(logits[:1], (4, 1))
    assert balance_loss(Routing(one, one, top_k_scores(one, 1))) > 3


def test_remoe_factor_goes_towards_its_target():
    def routing(share):
        scores = jnp.where(jnp.arange(8) < 8 * share, 1.0, 0.0)[None]
        return (Routing(scores, scores, scores),)

    np.testing.assert_allclose(remoe_factor(jnp.float32(1), routing(0.75), 2), 1.2)
    np.testing.assert_allclose(remoe_factor(jnp.float32(1), routing(0.125), 2), 1 / 1.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 17}, "chunk_size .17. must divide length"),
        ({"top_k": 25}, "top_k must be 1 to experts"),
        ({"heads": 5}, "heads .5. must divide width"),
        ({"arms": ("dense",)}, "must hold 'BlockFFN'"),
        ({"decoded": (0,)}, "decoded must be"),
        ({"rates": ()}, "no learning rates"),
        ({"sparsification": 0.0}, "positive"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_blockffn_settings(change, message):
    with pytest.raises(ValueError, match=message):
        blockffn.BlockFFNConfig(**change)


# Learn2PD -------------------------------------------------------------------------------------------------------------


def test_questions_and_prompts_of_a_hub(write):
    questions = write("gsm.jsonl", [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(3)])
    assert learn2pd_full.load_questions("json", "test", 2, **questions) == [
        ("0 + 1?", "so #### 1"),
        ("1 + 1?", "so #### 2"),
    ]
    prompts = write("flan.jsonl", [{"inputs": "Translate"}, {"inputs": "Sum up"}])
    assert learn2pd_full.load_inputs("json", "train", 5, **prompts) == ["Translate", "Sum up"]
    with pytest.raises(hub.DataError, match="expected question and answer"):
        learn2pd_full.load_questions("json", "test", 2, **prompts)
    with pytest.raises(hub.DataError, match="expected inputs"):
        learn2pd_full.load_inputs("json", "train", 2, **questions)


@pytest.fixture
def tiny_llada(tmp_path):
    """A folder as LLaDA's on the hub: random weights, 256 bytes and a few specials as its tokens."""
    pre, words = tokenizers.pre_tokenizers, {word: i for i, word in enumerate(byte_words())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<mask>"])
    folder = tmp_path / "llada"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = DecoderConfig.tiny(
        vocab_size=258, causal=False, num_kv_heads=DecoderConfig.tiny().num_heads, max_positions=160
    )
    tensors = named(random_params(config), LLADA_TOP, LLADA_LAYER, "model.transformer.blocks.")
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", llada_settings(config))
    for name, rows in {
        "gsm/train": [{"question": "1 + 1?", "answer": "It is #### 2"}],
        "gsm/test": [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(3)],
        "flan/train": [{"inputs": "Translate"}, {"inputs": "Sum up " * 40}],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def drained(generator):
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def test_a_pretrained_model_and_its_questions(tiny_llada):
    config = learn2pd.Learn2pdConfig(
        model=str(tiny_llada / "llada"), dataset=str(tiny_llada / "gsm"), dataset_name="",
        filter_dataset=str(tiny_llada / "flan"), shots=1, gen_length=16, block_length=8, pad_to=16, prompts=2,
        decode_batch=2, filter_prompts=2,
    )  # fmt: skip
    [(name, problem)] = drained(learn2pd.problems(config, 0))
    assert name == config.model
    text = "".join(map(problem.show, problem.prompts[0].tolist())).lstrip("\u00b6")
    assert text == "Question:_1_+_1?_Answer:_It_is_####_2__Question:_0_+_1?_Answer:"
    assert problem.prompts.shape == (2, 64)
    assert problem.filter_prompts.shape == (2, 144)  # cut on the left to what the model's positions leave room for
    assert problem.right(1, np.array(list(b"that makes 2")))
    assert not problem.right(1, np.array(list(b"that makes 3")))
    out = learn2pd_arms.in_batches(problem, learn2pd_arms.Arm("threshold", Threshold(0.5)), problem.prompts)
    assert out["tokens"].shape == (2, 80)
    assert (out["tokens"][:, 64:] != problem.mask_id).all()
    short = dataclasses.replace(config, shots=0, pad_to=200)
    with pytest.raises(
        ValueError, match="questions have 200 tokens, which with 16 of the answer exceed the model's 160"
    ):
        drained(learn2pd_full.load_problem(short, 0))


def test_words_are_split_and_encoded_as_described():
    words = learn2pd_words.load_words()
    assert len(words) > 1000
    split = learn2pd_words.split_words(words, 100, 0)
    assert not set(split.train) & set(split.test)
    assert len(split.test) == 100
    row = learn2pd_words.encode_answer("abcd", 20)
    assert "".join(map(learn2pd_words.show, row)).startswith("dcba|abcd\u00b6")
    with pytest.raises(ValueError, match="at least twice"):
        learn2pd_words.split_words(words[:10], 8, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gen_length": 60}, "must divide gen_length"),
        ({"gen_length": 16}, "at least 18 for the longest word"),
        ({"stages": (5, 3)}, "stages must be increasing"),
        ({"tau": 1.0}, r"tau must be in \(0, 1\)"),
        ({"thresholds": (0.0,)}, "thresholds must be numbers"),
        ({"timed": 2}, "at least 3"),
        ({"shots": -1}, "shots must be at least 0"),
    ],
)
def test_learn2pd_settings(change, message):
    with pytest.raises(ValueError, match=message):
        learn2pd.Learn2pdConfig(**change)


# GBNN -----------------------------------------------------------------------------------------------------------------


def test_tables_of_a_hub(write, monkeypatch):
    rows = [{"a": i, "b": i % 3, "class": i % 2} for i in range(40)]
    monkeypatch.setitem(tables.HUB, "magic", tables.HubTable("json", "class", "binary"))
    split = tables.split_table("magic", 0, rows=30, **write("magic.jsonl", rows))
    assert (len(split.train.x), len(split.validation.x), len(split.test.x)) == (18, 6, 6)
    np.testing.assert_allclose(split.train.x.mean(0), 0, atol=1e-6)
    assert set(split.train.y) == {0, 1}
    monkeypatch.setitem(tables.HUB, "magic", tables.HubTable("json", "label", "binary"))
    with pytest.raises(hub.DataError, match="no column 'label'"):
        tables.split_table("magic", 0, **write("magic.jsonl", rows))
    with pytest.raises(ValueError, match="unknown table 'x'"):
        tables.read_table("x")


def test_constant_features_stay_finite():
    def read(name, **options):
        return np.stack([np.ones(20), np.arange(20.0)], 1), np.arange(20.0), "regression"

    split = tables.split_table("any", 0, read=read)
    assert np.isfinite(split.train.x).all()
    np.testing.assert_allclose(split.train.y.std(), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="leave a part of 20 rows empty"):
        tables.split_table("any", 0, read=read, shares=(1.0, 0.0))


def test_the_best_setting_is_never_a_nan():
    scores = np.array([[[1.0, np.nan], [0.5, 2.0]]])
    assert gbnn_models.best("regression", scores) == [(1, 0)]
    assert gbnn_models.best("classes", scores) == [(1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": ("titanic",)}, "tables must be some of"),
        ({"units_per_step": (3,)}, "must divide the sizes"),
        ({"kept": (0.5,)}, "end with 1"),
        ({"epochs": 10}, "multiple of 16"),
        ({"subsample": 0.0}, "subsample"),
        ({"rates": (0.0,)}, "positive and finite"),
    ],
)
def test_gbnn_settings(change, message):
    with pytest.raises(ValueError, match=message):
        gbnn.GBNNConfig(**change)
