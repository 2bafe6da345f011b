"""A task whose answers can be checked, and a masked-diffusion model trained on it here: words, written backwards.

The prompt is an English word from Python's reference topics, the answer that word reversed, a bar, and the word again.
The rest of the answer's space is end of text, as in LLaDA's training. Words for testing are never trained on.
"""

import dataclasses
import functools
import re
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.text import load_python_topics
from experiments.runner.api import Progress
from jaxaccel.models.decoder import init_params
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.masked_diffusion import masked_diffusion_apply, masked_diffusion_loss

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, BAR, END, MASK = 26, 27, 28, 29
"""Tokens beside the 26 letters."""
LONGEST = 8
"""Letters of a word, and tokens of a prompt."""
CHUNK = 50
"""Training steps of one call."""


@functools.cache
def load_words() -> tuple[str, ...]:
    """Words of three to eight letters in Python's reference topics, sorted."""
    text = load_python_topics()
    whole = "".join(text.alphabet[i] for part in (text.train, text.validation, text.test) for i in part)
    return tuple(sorted({w for w in re.findall("[a-z]+", whole.lower()) if 3 <= len(w) <= LONGEST}))


def encode_prompt(word: str) -> np.ndarray:
    """A word as a prompt [8], padded on the left.

    >>> encode_prompt("abc").tolist()
    [26, 26, 26, 26, 26, 0, 1, 2]
    """
    return np.array([PAD] * (LONGEST - len(word)) + [LETTERS.index(c) for c in word], np.int32)


def encode_answer(word: str, length: int) -> np.ndarray:
    """The answer to a word, filled up with end of text.

    >>> encode_answer("abc", 9).tolist()
    [2, 1, 0, 27, 0, 1, 2, 28, 28]
    """
    ids = [LETTERS.index(c) for c in word]
    answer = [*ids[::-1], BAR, *ids]
    return np.array(answer + [END] * (length - len(answer)), np.int32)


def show(token: int) -> str:
    """A token as a character."""
    return {PAD: "_", BAR: "|", END: "\u00b6", MASK: "?"}.get(token) or LETTERS[token]


@dataclasses.dataclass(frozen=True)
class Split:
    """Words that share nothing."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def split_words(words: Sequence[str], test: int, seed: int) -> Split:
    """Words by chance for training and testing.

    Raises:
        ValueError: if there are too few.
    """
    if len(words) < 2 * test:
        raise ValueError(f"there are {len(words)} words, expected at least twice the {test} for testing")
    order = np.random.default_rng(seed).permutation(len(words))
    shuffled = [words[i] for i in order]
    return Split(tuple(shuffled[test:]), tuple(shuffled[:test]))


def model_config(*, layers: int, width: int, heads: int, positions: int) -> DecoderConfig:
    """A small LLaDA over letters."""
    return DecoderConfig(
        vocab_size=MASK + 1, hidden_size=width, intermediate_size=2 * width, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=width // heads, max_positions=positions, causal=False,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "rate", "total"), donate_argnames=("params", "state"))
def _train_chunk(
    params: Any, state: Any, tokens: jax.Array, keys: jax.Array, *, config: DecoderConfig, rate: float, total: int
) -> tuple[Any, Any, jax.Array]:
    answer = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) >= LONGEST, tokens.shape[1:])

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, slope = jax.value_and_grad(
            lambda p: masked_diffusion_loss(
                masked_diffusion_apply(config), p, batch[0], batch[1], mask_id=MASK, answer=answer
            )
        )(params)
        updates, state = _optimizer(rate, total).update(slope, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), (tokens, keys))
    return params, state, losses.mean()


def _optimizer(rate: float, total: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(100, total // 4 + 1), total)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def small_start(key: jax.Array, config: DecoderConfig) -> Any:
    """Random parameters of deviation 1/√width: the decoder's 0.02 is made for wide models, and learns little here."""
    wider = config.hidden_size**-0.5 / 0.02
    return jax.tree.map(lambda w: wider * w if w.ndim > 1 else w, init_params(key, config))


def train_model(
    config: DecoderConfig,
    words: Sequence[str],
    *,
    length: int,
    stages: Sequence[int],
    batch_size: int,
    rate: float,
    seed: int,
) -> Generator[Progress, None, list[Any]]:
    """Train by masked diffusion; the parameters after each number of steps in ``stages``.

    One run: an earlier stage is the later one's past, at the learning rate it then had.
    """
    rows = np.stack([np.concatenate([encode_prompt(w), encode_answer(w, length)]) for w in words])
    params = small_start(jax.random.key(seed), config)
    rng, total = np.random.default_rng(seed), stages[-1]
    state = _optimizer(rate, total).init(params)
    found, done = [], 0
    for stage in stages:
        while done < stage:
            steps = min(CHUNK, stage - done)
            tokens = rows[rng.integers(0, len(rows), (steps, batch_size))]
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed + 1), done), steps)
            params, state, loss = _train_chunk(params, state, tokens, keys, config=config, rate=rate, total=total)
            done += steps
            yield Progress(f"training the model, seed {seed}", done, total, f"loss {float(loss):.3f}")
        found.append(jax.tree.map(jnp.copy, params))  # the next chunk takes the arrays away
    return found
