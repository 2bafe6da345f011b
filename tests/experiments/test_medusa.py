"""The Medusa experiment: targets are the model's own choices further on, a killed run goes on, heads can be used."""

import json

import numpy as np
import pytest

from experiments import medusa, medusa_data
from experiments.medusa import MedusaConfig, draft_vocabulary
from experiments.medusa_data import Frozen, Portion, collect, load_texts, own_text, positions, windows
from experiments.runner import cli
from jaxaccel.decoding.heads_file import load_heads

SMALL = (
    *("--model", "random", "--text", "4", "--own", "2", "--own-batch", "4", "--prompt", "8", "--length", "16"),
    *("--steps", "2", "--batch-size", "4", "--vocabulary", "16", "--guesses", "1", "3", "--prompts", "2"),
    *("--prompt-length", "8", "--new-tokens", "4", "--batches", "1", "--repeats", "3", "--seeds", "2"),
)


@pytest.fixture(scope="module")
def frozen():
    return Frozen.load("random")


@pytest.fixture(scope="module")
def texts(frozen):
    return load_texts("topics", frozen, tokens=0)


def test_along_the_models_own_text_targets_are_the_text(frozen, texts):
    rows = own_text(frozen, windows(texts.train, 2, 8), 8)
    assert rows.shape == (2, 16)
    found = positions(frozen, rows, 3)
    assert found.hidden.shape == (2 * 13, frozen.config.hidden_size)
    targets = found.targets.reshape(3, 2, 13)
    for head in range(3):
        # From the last token of the prompt on: head k at t guesses token t + 2 + k, up to the last one there is.
        np.testing.assert_array_equal(targets[head, :, 7:12], rows[:, 9 + head : 14 + head])


def test_parts_are_kept_and_read_back(frozen, texts, tmp_path, monkeypatch):
    portion = Portion(length=16, text=4, own=4, prompt=8, batch=4)

    def gathered():
        steps = collect(frozen, texts.train, portion, 3, tmp_path)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    first = gathered()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-0.npz", "part-1.npz"]
    monkeypatch.setattr(medusa_data, "positions", None)  # nothing may be computed again
    again = gathered()
    np.testing.assert_array_equal(first.hidden, again.hidden)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert first.hidden.shape == (2 * 4 * 13, 32)


def test_texts_of_a_data_set_of_conversations(frozen, tmp_path):
    path = tmp_path / "talk.json"
    turns = [{"from": "human", "value": "Hello there."}, {"from": "gpt", "value": "General."}]
    path.write_text("\n".join(json.dumps({"id": str(i), "conversations": turns}) for i in range(5)))
    found = load_texts("json", frozen, tokens=100, data_files=str(path))
    assert bytes(found.train.tolist()).startswith(b"human: Hello there.\ngpt: General.\nhuman: ")
    assert len(found.train) + len(found.validation) + len(found.test) >= 100
    with pytest.raises(ValueError, match="at least 500 for a sequence"):
        windows(found.train, 1, 500)
    with pytest.raises(medusa_data.hub.DataError, match="1000 needed"):
        load_texts("json", frozen, tokens=1000, data_files=str(path))


def test_draft_vocabulary_is_the_most_frequent_tokens():
    assert draft_vocabulary(np.array([[5, 5, 9], [9, 5, 2]]), 2).tolist() == [5, 9]
    assert draft_vocabulary(np.array([[1]]), 0) is None
    places, known = medusa._inside(np.array([5, 2, 9]), np.array([5, 9]))
    assert known.tolist() == [True, False, True]
    assert places[known].tolist() == [0, 1]


def test_a_finished_run_leaves_heads_that_fit_the_model_and_no_states(tmp_path, capsys):
    assert cli.main(["run", "medusa", "--devices", "1", "--out", str(tmp_path), *SMALL]) == 0
    assert "tokens per step" in capsys.readouterr().out
    (folder,) = tmp_path.glob("runs/*")
    assert list((folder / "states").iterdir()) == []
    heads, tree, info = load_heads(folder / "heads-1.safetensors")
    assert info.model_name == "random"
    assert len(info.token_ids) == 16
    assert heads.weight.shape == (3, 1, 32, 32)
    assert tree.num_nodes == 4
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {row["cost_kind"] for row in rows} == {"steps", "wall"}
    assert all(row["speedup"] >= 1 for row in rows if row["cost_kind"] == "steps")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": 0, "own": 0}, "one of them at least 1"),
        ({"prompt": 256}, "prompt \\(256\\) must be at least 1 and less than length"),
        ({"guesses": (3, 1)}, "increasing"),
        ({"batches": (32,)}, "batches must be from 1 to prompts"),
        ({"vocabulary": 5}, "vocabulary must be 0 or at least 10"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        MedusaConfig(**changes)
