"""Training of the filter: binary cross-entropy on an oracle's records, full batch.

    loss = mean over records and positions of BCE(z_i, prediction i is right),   AdamW

A position that is wrongly held for final cannot be taken back, so what to watch is the share of false ones among those
that are accepted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key

from jaxaccel.decoding.learn2pd.filter import FilterParams, filter_apply, filter_init


class FilterTraining(NamedTuple):
    """A trained filter, and how it does on records that it was not trained on."""

    params: FilterParams
    train_loss: float
    validation_loss: float
    test_loss: float
    false_share: float  # of test positions accepted at `monitor`, those that are wrong; NaN if none is accepted
    accepted_share: float  # of right test positions, those accepted at `monitor`


def filter_loss(params: FilterParams, confidence: Float[Array, "R b"], correct: Bool[Array, "R b"]) -> Float[Array, ""]:
    """Mean binary cross-entropy of the filter's logits."""
    logits = filter_apply(params, confidence)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, correct.astype(logits.dtype)))


def split_records(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of 80 %, 10 % and 10 % of records, by chance; each has at least one.

    Raises:
        ValueError: for fewer than 3 records.
    """
    if count < 3:
        raise ValueError(f"records hold {count} passes, expected at least 3: for training, validation and test")
    order, held = np.random.default_rng(seed).permutation(count), max(1, count // 10)
    return order[2 * held :], order[:held], order[held : 2 * held]


def train_filter(
    records: Any,
    *,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    steps: int = 4000,
    key: Key[Array, ""],
    monitor: float = 0.9,
) -> FilterTraining:
    """Train a filter on an oracle's records.

    Args:
        records: of `collect_oracle`; anything with ``confidence`` [R, b] and ``correct`` [R, b].
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        steps: full-batch steps. The published notebook takes 40 000.
        key: of the initial parameters and of the split into 80 % training, 10 % validation and 10 % test.
        monitor: probability from which a position counts as accepted in the reported shares.

    Returns:
        The filter and its losses.

    Raises:
        ValueError: for fewer than 3 records, arrays that do not fit together, or numbers out of range.

    >>> confidence = np.random.default_rng(0).uniform(size=(200, 4)).astype(np.float32)
    >>> class Records(NamedTuple):
    ...     confidence: np.ndarray
    ...     correct: np.ndarray
    >>> records = Records(confidence, confidence > 0.5)
    >>> trained = train_filter(records, learning_rate=1e-2, steps=1000, key=jax.random.key(0))
    >>> trained.test_loss < 0.6  # chance is 0.69
    True
    """
    confidence, correct = np.asarray(records.confidence, np.float32), np.asarray(records.correct, bool)
    if confidence.ndim != 2 or confidence.shape != correct.shape:
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape} must both be [records, block]")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, expected a number of at least 0")
    if not 0 < monitor < 1:
        raise ValueError(f"monitor is {monitor}, expected a number in (0, 1)")
    first, second = jax.random.split(key)
    seed = int(jax.random.randint(second, (), 0, 2**31 - 1))
    parts = [(jnp.asarray(confidence[i]), jnp.asarray(correct[i])) for i in split_records(len(confidence), seed)]
    params = filter_init(first, block_length=confidence.shape[1])
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    @jax.jit
    def fit(params: FilterParams, confidence: Array, correct: Array) -> FilterParams:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(filter_loss)(params, confidence, correct), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    params = fit(params, *parts[0])
    losses = [float(filter_loss(params, *part)) for part in parts]
    held, right = parts[2]
    accepted = np.asarray(jax.nn.sigmoid(filter_apply(params, held)) > monitor)
    truth = np.asarray(right)
    total = accepted.sum()
    false_share = float((accepted & ~truth).sum() / total) if total else float("nan")
    found = float((accepted & truth).sum() / truth.sum()) if truth.any() else float("nan")
    train, validation, test = losses
    return FilterTraining(params, train, validation, test, false_share, found)
