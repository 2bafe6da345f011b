"""Handwritten digits that ship with scikit-learn: 1797 real 8x8 images in ten classes."""

import functools
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images ``[N, 8, 8, 1]`` f32 in [0, 1] and labels ``[N]`` i32."""

    images: np.ndarray
    labels: np.ndarray


class Digits(NamedTuple):
    """Disjoint splits."""

    train: Split
    validation: Split
    test: Split


@functools.cache
def load_digits(train: int = 1077, validation: int = 360, seed: int = 0) -> Digits:
    """Load and split the digits; what is left after ``train`` and ``validation`` rows is the test split.

    Raises:
        ValueError: if no rows are left for the test split.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    if train < 1 or validation < 1 or train + validation >= len(images):
        raise ValueError(f"train ({train}) and validation ({validation}) must leave test rows of {len(images)}")
    order = np.random.default_rng(seed).permutation(len(images))
    images = (images.reshape(-1, 8, 8, 1)[order] / 16.0).astype(np.float32)
    labels = labels[order].astype(np.int32)
    parts = [slice(0, train), slice(train, train + validation), slice(train + validation, None)]
    return Digits(*(Split(images[part], labels[part]) for part in parts))
