"""What Medusa heads learn from: hidden states of a frozen model and the tokens that it goes on with, from two sources.

Teacher-forced text: one pass over a text gives, at each position, the model's state and its own greedy choice of the
next token; head k at position t learns the choice at position t + 1 + k. No token is generated, so it is quick; but the
model's choices are those along somebody else's text.

The model's own text: greedy continuations of pieces of the text, passed through the model once more. That is what the
heads will meet when they are used, and costs the generation, many sequences at a time.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import hub
from experiments.data.text import load_python_topics
from experiments.runner.api import Progress
from jaxaccel.models.decoder import decoder_forward, decoder_logits, init_params
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.weights import load_pretrained

RANDOM = "random"
"""Name of a tiny model with random weights that reads bytes: for trying the experiment out, not for results."""
CHUNK = 8
"""Sequences in a teacher-forced pass."""


class Texts(NamedTuple):
    """Token ids of a text, cut into parts that share nothing."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Positions(NamedTuple):
    """P positions in sequences: what heads see, and what each should say."""

    hidden: np.ndarray  # float32 [P, D], after the final norm
    targets: np.ndarray  # int32 [heads, P]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model that is not trained: parameters as decoding likes them, its numbers, and how it reads text."""

    params: Any
    config: DecoderConfig
    encode: Any

    @classmethod
    def load(cls, name: str) -> "Frozen":
        """A pretrained model by name or path, or the random one."""
        if name == RANDOM:
            config = DecoderConfig.tiny(vocab_size=256, max_positions=512)
            return cls(prepare(init_params(jax.random.key(0), config)), config, lambda text: list(text.encode()))
        loaded = load_pretrained(name)
        if loaded.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer: {loaded.tokenizer_problem}")
        return cls(prepare(loaded.params), loaded.config, loaded.tokenizer.encode)


def load_texts(dataset: str, frozen: Frozen, *, tokens: int, **options: Any) -> Texts:
    """Texts as ids: Python's reference topics, or conversations streamed from a hub (columns as in ShareGPT's files).

    Args:
        dataset: ``"topics"``, or a name or path for `hub.load`.
        frozen: the model that reads them.
        tokens: of a streamed data set, so many are read.
        options: go to `hub.load`.
    """
    if dataset == "topics":
        text = load_python_topics()
        parts = (text.train, text.validation, text.test)
        return Texts(*(np.asarray(frozen.encode("".join(text.alphabet[i] for i in p)), np.int32) for p in parts))
    ids: list[int] = []
    for row in hub.load(dataset, "train", **options):
        for turn in row["conversations"]:
            ids += frozen.encode(f"{turn['from']}: {turn['value']}\n")
        if len(ids) >= tokens:
            break
    if len(ids) < tokens:
        raise hub.DataError(f"{dataset} has {len(ids)} tokens, {tokens} needed")
    joined = np.asarray(ids, np.int32)
    return Texts(*np.split(joined, [int(0.9 * len(joined)), int(0.95 * len(joined))]))


def windows(ids: np.ndarray, count: int, length: int, seed: int | None = None) -> np.ndarray:
    """``count`` pieces [count, length]: spread over the text, or at random places.

    Raises:
        ValueError: if the text is too short for one.
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least {length} for a sequence")
    if seed is None:
        starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    else:
        starts = np.random.default_rng(seed).integers(0, len(ids) - length + 1, count)
    return ids[starts[:, None] + np.arange(length)]


@functools.partial(jax.jit, static_argnames="config")
def _states(params: Any, tokens: jax.Array, *, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    hidden = decoder_forward(params, tokens, config).hidden
    return hidden, jnp.argmax(decoder_logits(params, hidden), -1)


def positions(frozen: Frozen, sequences: np.ndarray, num_heads: int) -> Positions:
    """One teacher-forced pass over sequences [S, T]: all positions after which each head has a target."""
    hidden, chosen = [], []
    for i in range(0, len(sequences), CHUNK):
        rows = sequences[i : i + CHUNK]
        padded = np.resize(rows, (CHUNK, rows.shape[1]))  # one shape, compiled once
        states, choices = _states(frozen.params, jnp.asarray(padded), config=frozen.config)
        hidden.append(np.asarray(states)[: len(rows)])
        chosen.append(np.asarray(choices)[: len(rows)])
    states, choices = np.concatenate(hidden), np.concatenate(chosen)
    count = states.shape[1] - num_heads
    targets = np.stack([choices[:, 1 + k : 1 + k + count].ravel() for k in range(num_heads)])
    return Positions(np.asarray(states[:, :count], np.float32).reshape(-1, states.shape[-1]), targets)


def own_text(frozen: Frozen, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
    """Prompts [S, P] with the model's greedy continuations: [S, P + new_tokens]."""
    out = generate(frozen.params, prompts, frozen.config, max_new_tokens=new_tokens)
    return np.concatenate([prompts, np.asarray(out.tokens)], 1)


@dataclasses.dataclass(frozen=True)
class Portion:
    """How much to collect of each source."""

    length: int  # tokens of a sequence
    text: int  # teacher-forced sequences
    own: int  # sequences that the model continues itself
    prompt: int  # of these, tokens of the text
    batch: int  # of these, continued at a time


def collect(
    frozen: Frozen, ids: np.ndarray, portion: Portion, num_heads: int, folder: pathlib.Path
) -> Generator[Progress, None, Positions]:
    """Training positions of both sources. Parts are kept in ``folder``, so that a killed run goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["text"] * -(-portion.text // portion.batch) + ["own"] * -(-portion.own // portion.batch)
    parts = []
    for number, kind in enumerate(kinds):
        yield Progress("states of the frozen model", number, len(kinds), f"{kind} text" if kind == "own" else kind)
        path = folder / f"part-{number}.npz"
        if not path.exists():
            if kind == "text":
                rows = windows(ids, portion.batch, portion.length, seed=number)
            else:
                prompts = windows(ids, portion.batch, portion.prompt, seed=number)
                rows = own_text(frozen, prompts, portion.length - portion.prompt)
            part = positions(frozen, rows, num_heads)
            unfinished = path.with_suffix(".tmp.npz")
            np.savez(unfinished, **part._asdict())
            unfinished.replace(path)
        with np.load(path, allow_pickle=False) as stored:
            parts.append(Positions(stored["hidden"], stored["targets"]))
    yield Progress("states of the frozen model", len(kinds), len(kinds))
    return Positions(np.concatenate([p.hidden for p in parts]), np.concatenate([p.targets for p in parts], 1))
