"""English text that ships with Python itself: the reference topics behind ``help()``."""

import functools
from typing import NamedTuple

import numpy as np


class Characters(NamedTuple):
    """A character corpus: token ids u8/i32 ``[N]`` for training, validation and test, and the alphabet."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    alphabet: str


@functools.cache
def load_python_topics() -> Characters:
    """Read ``pydoc_data.topics`` (about 700 kB with Python 3.11); the last tenth is for validation and test.

    Topics are joined in alphabetical order, so the splits hold different topics, and the text is the same on every
    machine with the same Python version.
    """
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = np.fromiter((index[c] for c in text), np.int32, len(text))
    first, second = int(0.9 * len(tokens)), int(0.95 * len(tokens))
    return Characters(tokens[:first], tokens[first:second], tokens[second:], alphabet)
