"""Recorded answers of Qwen3 models to AIME24: as published averages, as published per-question results, as raw traces.

The numbers in `PUBLISHED` are averages over the authors' per-question results (30 questions, up to 32 answers each; 8
of the 32B model, 16 of the dense 14B). What an average hides is modelled: see `from_rates`.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.data import hub
from jaxaccel.forecasting import BlockTopK, TopK
from jaxaccel.forecasting.kinetics import Attention

RESULTS_URL = (
    "https://raw.githubusercontent.com/Infini-AI-Lab/Kinetics/e7765597e6718d1d30dde243e181ce6b3b2f5508"
    "/cost_model/aime24"
)
"""Folder of the authors' per-question results, at the commit that has them."""


class Published(NamedTuple):
    """Averages of one published run."""

    model: str  # name in `jaxaccel.forecasting.QWEN3`
    attention: Attention  # used in decoding
    pass_rate: float  # mean pass@1
    mean_len: float  # mean tokens of an answer


def _published() -> Iterator[Published]:
    dense = {
        "0.6B": (0.1146, 14245), "1.7B": (0.4583, 15275), "4B": (0.7167, 13186),
        "8B": (0.7521, 13939), "14B": (0.7958, 12316), "32B": (0.8208, 11616),
    }  # fmt: skip
    topk = {
        "0.6B": {32: (0.0260, 10278), 64: (0.0490, 12091), 128: (0.0677, 12650), 256: (0.0812, 13310)},
        "1.7B": {32: (0.1448, 21548), 64: (0.2500, 19474), 128: (0.3375, 17333), 256: (0.3875, 16175)},
        "4B": {
            32: (0.2198, 23996), 64: (0.3750, 20313), 128: (0.5656, 17655),
            256: (0.6552, 15579), 512: (0.6938, 14797), 1024: (0.7010, 13619),
        },
        "8B": {
            32: (0.2260, 26225), 64: (0.4198, 22049), 128: (0.6427, 18540),
            256: (0.7010, 15963), 512: (0.7562, 14819), 1024: (0.7594, 14320),
        },
        "14B": {512: (0.7719, 13248), 1024: (0.7875, 12750)},
        "32B": {128: (0.7167, 15185), 256: (0.7542, 13743), 512: (0.7583, 12363), 1024: (0.7917, 12330)},
    }  # fmt: skip
    blocks = {
        "1.7B": {(64, 4): (0.2417, 21208), (32, 16): (0.3844, 18403), (16, 64): (0.4438, 16611)},
        "4B": {(64, 4): (0.4438, 19232), (32, 16): (0.6698, 16331), (16, 64): (0.7125, 14293)},
        "8B": {(64, 4): (0.4521, 20246), (32, 16): (0.6594, 16879), (16, 64): (0.7354, 15621)},
    }
    for size, numbers in dense.items():
        yield Published(f"Qwen3-{size}", "dense", *numbers)
    for size, by_budget in topk.items():
        for budget, numbers in by_budget.items():
            yield Published(f"Qwen3-{size}", TopK(budget), *numbers)
    for size, by_blocks in blocks.items():
        for (block_size, num_blocks), numbers in by_blocks.items():
            yield Published(f"Qwen3-{size}", BlockTopK(block_size, num_blocks, num_sink=0), *numbers)


PUBLISHED: tuple[Published, ...] = tuple(_published())
"""All runs of the authors on AIME24 whose per-question results are public."""


class Recorded(NamedTuple):
    """What is known of one model with one attention on Q questions."""

    model: str  # name in `jaxaccel.forecasting.QWEN3`
    attention: Attention  # used in decoding
    pass_rate: np.ndarray  # f64[Q], share of right answers, or the modelled probability of one
    trials: int | None  # recorded answers per question; None where the probability itself is known
    lengths: np.ndarray  # f64[Q, n] tokens of the recorded answers, or f64[1, 1] where one mean stands for all


def describe(attention: Attention) -> str:
    """A short name: dense, top-k 256, block 16 x 64."""
    if isinstance(attention, str):
        return attention
    if isinstance(attention, TopK):
        return f"top-k {attention.budget}"
    return f"block {attention.block_size} x {attention.num_blocks}"


def from_rates(questions: int, concentration: float, gen_len: float | None) -> list[Recorded]:
    """The published averages, with difficulties modelled as quantiles of Beta(s·p, s·(1 − p)).

    Args:
        questions: quantiles that stand for the questions.
        concentration: s; 1 makes most questions nearly always or nearly never solved.
        gen_len: length of every answer; each run's own mean if ``None``.
    """
    from scipy.stats import beta  # type: ignore[import-untyped]

    middles = (np.arange(questions) + 0.5) / questions
    return [
        Recorded(
            run.model,
            run.attention,
            beta.ppf(middles, concentration * run.pass_rate, concentration * (1 - run.pass_rate)),
            None,
            np.array([[run.mean_len if gen_len is None else gen_len]]),
        )
        for run in PUBLISHED
    ]


def results_file(run: Published) -> str:
    """Where the authors' repository keeps the per-question results of a run, below their folder ``aime24``."""
    model = run.model.lower().replace(".", "-")
    if isinstance(run.attention, str):
        return f"dense/aime24_{model}_dense_numTrials_tradeoff.csv"
    if isinstance(run.attention, TopK):
        return f"topk/aime24_{model}_local0_topk{run.attention.budget}_numTrials_tradeoff.csv"
    blocks = f"block{run.attention.block_size}_blocktopk{run.attention.num_blocks}"
    return f"block_topk/aime24_{model}_local0_{blocks}_tradeoff.csv"


def load_results(folder: str, runs: Iterable[Published] = PUBLISHED) -> Iterator[Recorded]:
    """Read the authors' per-question results (CSV), from their repository or a local copy of that folder.

    The columns that are read: ``query_id``, ``trial``, ``coverage`` (pass@trial) and ``generation_length`` (a list of
    tokens of all recorded answers).
    """
    for run in runs:
        path = f"{folder.rstrip('/')}/{results_file(run)}"
        if "://" not in path and not pathlib.Path(path).exists():
            raise hub.DataError(f"there is no {path}; give the folder cost_model/aime24 of the authors' repository")
        rows = [row for row in hub.load("csv", "train", data_files=path) if row["trial"] == 1]
        if not rows:
            raise hub.DataError(f"{path} has no rows with trial = 1")
        rows.sort(key=lambda row: row["query_id"])
        lengths = np.array([json.loads(row["generation_length"]) for row in rows], np.float64)
        rates = np.array([row["coverage"] for row in rows])
        yield Recorded(run.model, run.attention, rates, lengths.shape[1], lengths)


def load_generations(
    name: str, models: Iterable[str], *, split: str = "train", chars_per_token: float = 3.0
) -> Iterator[Recorded]:
    """Read raw traces with dense attention: one row an answer.

    Assumed, and not verified for InfiniAILab/Kinetics-generations (its page could not be read where this was written;
    the authors' scripts write such rows): a file per model that has its name in lower case with dashes, e.g.
    ``aime24_qwen3-0-6b_dense.jsonl``, and the columns ``query``, ``score`` (0 to 100) and ``prediction`` (a list with
    one text). A column ``num_tokens`` is used if there is one; else a token is taken for ``chars_per_token`` letters.
    """
    for model in models:
        pattern = f"**/*{model.lower().replace('.', '-')}_dense*"
        by_question: dict[str, list[tuple[float, float]]] = {}
        for row in hub.load(name, split, data_files=pattern):
            if row.get("score") is None and row.get("prediction") is None:
                continue  # the authors' files begin with a line about the run
            score, length = _answer(row, chars_per_token)
            by_question.setdefault(row["query"], []).append((score, length))
        trials = min(map(len, by_question.values()), default=0)
        if trials == 0:
            raise hub.DataError(f"{name} has no answers of {model} (files {pattern})")
        answers = np.array([found[:trials] for found in by_question.values()])
        yield Recorded(model, "dense", answers[:, :, 0].mean(1), trials, answers[:, :, 1])


def _answer(row: Mapping[str, Any], chars_per_token: float) -> tuple[float, float]:
    missing = {"query", "score", "prediction"} - row.keys()
    if missing:
        raise hub.DataError(f"traces have no column {sorted(missing)[0]!r}, but {sorted(row)}")
    length = row.get("num_tokens") or len(row["prediction"][0]) / chars_per_token
    return row["score"] / 100, max(1.0, length)
