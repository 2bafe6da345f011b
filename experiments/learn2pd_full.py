"""LLaDA-8B on GSM8K: weights through `load_pretrained`, questions and prompts through Hugging Face datasets."""

import dataclasses
import re
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import hub
from experiments.learn2pd_arms import Problem
from experiments.runner.api import Progress
from jaxaccel.models.decoder import stack_layers
from jaxaccel.models.masked_diffusion import LLADA_END, LLADA_MASK, diffusion_model
from jaxaccel.models.weights import load_pretrained


def load_questions(path: str, split: str, count: int, **options: Any) -> list[tuple[str, str]]:
    """Questions and worked answers of a data set with GSM8K's columns, ``question`` and ``answer``.

    Raises:
        DataError: if there are none, or rows lack the columns.
    """
    rows: list[tuple[str, str]] = []
    for row in hub.load(path, split, **options):
        if len(rows) >= count:
            break
        if "question" not in row or "answer" not in row:
            raise hub.DataError(f"{path} has columns {', '.join(sorted(row))}, expected question and answer")
        rows.append((str(row["question"]), str(row["answer"])))
    if not rows:
        raise hub.DataError(f"data set {path!r} (split {split!r}) has no rows")
    return rows


def load_inputs(path: str, split: str, count: int, **options: Any) -> list[str]:
    """Prompts of a data set with FLAN's column ``inputs``.

    Raises:
        DataError: if there are none, or rows lack the column.
    """
    rows: list[str] = []
    for row in hub.load(path, split, **options):
        if len(rows) >= count:
            break
        if "inputs" not in row:
            raise hub.DataError(f"{path} has columns {', '.join(sorted(row))}, expected inputs")
        rows.append(str(row["inputs"]))
    if not rows:
        raise hub.DataError(f"data set {path!r} (split {split!r}) has no rows")
    return rows


def final_number(text: str) -> str | None:
    r"""The number after ``####``, else the last one; without commas and a trailing point.

    >>> final_number("so 3 + 4 = 7\n#### 1,007"), final_number("It is $12.50."), final_number("none")
    ('1007', '12.50', None)
    """
    marked = text.rpartition("####")[2] if "####" in text else text
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked)
    return numbers[-1 if marked is text else 0].replace(",", "") if numbers else None


def with_shots(question: str, shots: Sequence[tuple[str, str]]) -> str:
    """A question after solved ones."""
    solved = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
    return f"{solved}Question: {question}\nAnswer:"


def pad_left(rows: Sequence[Sequence[int]], multiple: int, pad_id: int) -> np.ndarray:
    """Prompts of one length, a multiple of a number, filled up on the left.

    >>> pad_left([[1, 2, 3], [4]], 4, 0).tolist()
    [[0, 1, 2, 3], [0, 0, 0, 4]]
    """
    size = -(-max(map(len, rows)) // multiple) * multiple
    return np.array([[pad_id] * (size - len(row)) + list(row) for row in rows], np.int32)


def load_problem(config: Any, seed: int, **options: Any) -> Generator[Progress, None, Problem]:
    """A pretrained model and its questions. ``options`` go to `hub.load`.

    Raises:
        ValueError: if the model is causal, has no tokenizer, or prompts and answers exceed its positions.
    """
    yield Progress(f"loading {config.model}", 0, 2)
    loaded = load_pretrained(config.model, dtype=jnp.dtype(config.dtype))
    if loaded.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer: {loaded.tokenizer_problem}")
    numbers = loaded.config
    # Smaller models of the same format, as in tests, have smaller vocabularies.
    mask, end = (LLADA_MASK, LLADA_END) if numbers.vocab_size > LLADA_MASK else (numbers.vocab_size - 1, 0)
    yield Progress(f"loading {config.model}", 1, 2, config.dataset)
    name = {"name": config.dataset_name} if config.dataset_name else {}
    shots = load_questions(config.dataset, "train", config.shots, **name, **options) if config.shots else []
    asked = load_questions(config.dataset, "test", config.prompts, **name, **options)
    inputs = load_inputs(config.filter_dataset, "train", config.filter_prompts, **options)
    encode, room = loaded.tokenizer.encode, numbers.max_positions - config.gen_length
    prompts = pad_left([_chat(loaded.tokenizer, with_shots(q, shots)) for q, _ in asked], config.pad_to, end)
    learned = pad_left([encode(text)[-room:] for text in inputs], config.pad_to, end)
    for what, rows in (("questions", prompts), ("filter prompts", learned)):
        if rows.shape[1] > room:
            raise ValueError(
                f"{what} have {rows.shape[1]} tokens, which with {config.gen_length} of the answer exceed the model's "
                f"{numbers.max_positions} positions"
            )
    wanted = [final_number(answer) for _, answer in asked]
    tokenizer = loaded.tokenizer

    def right(number: int, answer: np.ndarray) -> bool:
        return final_number(tokenizer.decode(answer.tolist())) == wanted[number]

    def show(token: int) -> str:
        return "\u00b6" if token == end else tokenizer.decode([token]).strip() or "_"

    params = jax.tree.map(jnp.asarray, stack_layers(loaded.params))
    yield Progress(f"loading {config.model}", 2, 2)
    return Problem(
        diffusion_model(dataclasses.replace(numbers, scan_layers=True)), params, learned, prompts, right, show,
        config.gen_length, config.block_length, mask, end, config.decode_batch,
    )  # fmt: skip


def _chat(tokenizer: Any, text: str) -> list[int]:
    """A prompt in the model's chat format, where it has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text))
    return list(tokenizer.encode_chat([{"role": "user", "content": text}]))
