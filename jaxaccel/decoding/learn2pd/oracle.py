"""What a filter learns from: decoding along a known answer, and at each pass which predictions were right.

The answer is the model's own, from decoding a token at a time. So a filter learns to confirm what the model would say
anyway, its errors among it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.decoding.learn2pd.decode import check_shape
from jaxaccel.decoding.learn2pd.loop import Rules, run
from jaxaccel.decoding.learn2pd.policies import Oracle


class OracleRecords(NamedTuple):
    """R passes over a block of length b, and what they cost."""

    confidence: Float[np.ndarray, "R b"]  # float32, of all positions of the block
    correct: Bool[np.ndarray, "R b"]  # whether the prediction equals the answer
    block: Int[np.ndarray, "R"]  # int32, which block of its text
    row: Int[np.ndarray, "R"]  # int32, which text
    num_forwards: Int[np.ndarray, "B"]  # int32, passes of each text


def collect_oracle(
    apply_fn: Any,
    params: Any,
    prompt: Int[Array, "B P"] | np.ndarray,
    reference: Int[Array, "B G"] | np.ndarray,
    *,
    block_length: int,
    mask_id: int,
    deduplicate: bool = False,
) -> OracleRecords:
    """Decode revealing exactly what equals the answer, and keep what each pass said.

    Args:
        apply_fn: as for `decode`.
        params: of the model.
        prompt: token ids.
        reference: the answer [B, G], of `decode` with `TopK` and steps = gen_length.
        block_length: b.
        mask_id: of the mask.
        deduplicate: leave out the last pass of a block that got stuck, whose predictions are those of the pass before.

    Returns:
        Records in the order of texts, blocks and passes, as NumPy arrays.

    Raises:
        ValueError: for a reference with masks in it or of another batch, and as `decode`.
    """
    prompt, reference = jnp.asarray(prompt), jnp.asarray(reference, jnp.int32)
    if reference.ndim != 2 or len(reference) != len(prompt):
        raise ValueError(f"reference has shape {reference.shape}, expected [{len(prompt)}, G]")
    size = reference.shape[1]
    check_shape(prompt, gen_length=size, block_length=block_length, steps=size, mask_id=mask_id, eot_id=None)
    if np.any(np.asarray(reference) == mask_id):
        raise ValueError(f"reference contains the mask, token {mask_id}: it is no finished answer")
    rules = Rules(size, block_length, block_length, mask_id, buckets=(size // block_length,), record=True, oracle=True)
    state = run(params, prompt, Oracle(reference), None, model=apply_fn, rules=rules)
    confidence, correct, used = (np.asarray(x) for x in (state.confidence, state.correct, state.recorded))
    if deduplicate:
        used = used & ~_repeated(confidence, correct, used)
    row, block, _ = np.nonzero(used)
    return OracleRecords(
        confidence[used], correct[used], block.astype(np.int32), row.astype(np.int32), np.asarray(state.forwards)
    )


def _repeated(confidence: np.ndarray, correct: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Passes that say what the one before them said."""
    same = (confidence[:, :, 1:] == confidence[:, :, :-1]) & (correct[:, :, 1:] == correct[:, :, :-1])
    repeated = np.zeros_like(used)
    repeated[:, :, 1:] = same.all(-1) & used[:, :, 1:] & used[:, :, :-1]
    return repeated
