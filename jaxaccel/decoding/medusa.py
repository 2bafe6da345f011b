"""Medusa heads: cheap guesses at the tokens after the next, made from the model's last hidden state.

What they make cheaper: generating text one sequence at a time, which waits for the weights to be read once per token.
Head k guesses the token k + 2 places ahead; the model checks a tree of such guesses (`jaxaccel.decoding.tree`,
`jaxaccel.decoding.verify`) in one forward pass, and each step emits every guess that was right, plus one.

    h ← h + SiLU(V h + b)                    num_layers times, with V, b of its own for each head k and layer
    logits_k = W_k h                         W_k a vocabulary matrix of the head, or the LM head shared by all
    loss = c·Σₖ decay^(k+1)·CE(logits_k[t], token[t + 2 + k])                       Medusa-1: the model is frozen
    loss = CE or KL of the model itself + c·s(step)·Σₖ decay^(k+1)·CE_k             Medusa-2: it is trained along

V and b start at zero and W_k as the LM head: a head starts by repeating the model's guess at the next token.

When to use it: batch size 1 to a few, on hardware that has arithmetic to spare. When not: large batches, where the
arithmetic is the limit and wrong guesses cost as much as right ones. Where the vocabulary is large and the model small,
W_k is most of what a step reads: share the LM head (``share_vocab=True``), train only the blocks.

Two things differ from the reference code. Layers have weights of their own; there they are repetitions of one object.
And the self-distillation term is a mean over the positions that count; there masked ones are in the denominator.

Source: Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774;
surveyed in Huang et al., arXiv 2406.10903.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxaccel.compression import linear

SCHEDULES = ("constant", "linear", "sine")


@dataclass(frozen=True)
class MedusaConfig:
    """Size of the heads.

    Attributes:
        num_heads: guesses beyond the next token.
        num_layers: residual blocks in each head.
    """

    num_heads: int = 3
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class MedusaParams(NamedTuple):
    """Parameters of the heads; matrices are [out, in], as in a checkpoint of torch."""

    weight: Float[Array, "heads layers D D"]  # V of the residual blocks
    bias: Float[Array, "heads layers D"]  # b
    vocab: Float[Array, "heads V D"] | None  # W; None if the heads share the LM head


class MedusaTargets(NamedTuple):
    """What a row of heads should have said; row k of ``first = 2`` belongs to head k."""

    tokens: Int[Array, "heads *B T"]  # int32; 0 where nothing is to be learned
    mask: Bool[Array, "heads *B T"]  # which of them count


def init_medusa_heads(
    key: PRNGKeyArray,
    hidden: int,
    vocab: int,
    *,
    config: MedusaConfig | None = None,
    lm_head: Float[Array, "V D"] | None = None,
    share_vocab: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> MedusaParams:
    """Make heads that start as copies of the LM head.

    Args:
        key: of the vocabulary matrices, read only where there is neither ``lm_head`` nor ``share_vocab``.
        hidden: D, size of the hidden state.
        vocab: V, number of tokens.
        config: number of heads and layers; ``MedusaConfig()`` if ``None``.
        lm_head: the model's output matrix, [out, in], that every vocabulary matrix starts from. Without it they are
            normal with variance 1/D.
        share_vocab: whether heads have no matrix of their own; then give ``lm_head`` to `medusa_logits` instead.
        dtype: of the parameters.

    Returns:
        The parameters. All heads and layers are stacked, so that a tree of heads is three arrays.

    Raises:
        ValueError: if a size is not positive or ``lm_head`` does not have shape (vocab, hidden).

    >>> import jax
    >>> heads = init_medusa_heads(jax.random.key(0), 8, 32)
    >>> heads.weight.shape, heads.bias.shape, heads.vocab.shape
    ((3, 1, 8, 8), (3, 1, 8), (3, 32, 8))
    >>> init_medusa_heads(jax.random.key(0), 8, 32, share_vocab=True).vocab is None
    True
    """
    config = MedusaConfig() if config is None else config
    if hidden < 1 or vocab < 1:
        raise ValueError(f"hidden and vocab must be at least 1, got {hidden} and {vocab}")
    if lm_head is not None and lm_head.shape != (vocab, hidden):
        raise ValueError(f"lm_head must have shape (vocab, hidden) = {(vocab, hidden)}, got {lm_head.shape}")
    heads, layers = config.num_heads, config.num_layers
    matrix = None
    if not share_vocab:
        shape = (heads, vocab, hidden)
        start = jax.random.normal(key, shape, dtype) / math.sqrt(hidden) if lm_head is None else lm_head
        matrix = jnp.broadcast_to(start, shape).astype(dtype)
    return MedusaParams(
        jnp.zeros((heads, layers, hidden, hidden), dtype), jnp.zeros((heads, layers, hidden), dtype), matrix
    )


def medusa_hidden(params: MedusaParams, hidden: Float[Array, "*B D"]) -> Float[Array, "heads *B D"]:
    """Hidden state of each head, which its vocabulary matrix reads.

    Args:
        params: of `init_medusa_heads`.
        hidden: the model's last hidden states, after its final norm: what the LM head reads.

    Returns:
        h after the residual blocks.

    Raises:
        ValueError: if ``hidden`` does not have the heads' size.

    >>> import jax, jax.numpy as jnp
    >>> heads = init_medusa_heads(jax.random.key(0), 4, 16)
    >>> medusa_hidden(heads, jnp.ones((2, 5, 4))).shape
    (3, 2, 5, 4)
    """
    heads, layers, size, _ = params.weight.shape
    if hidden.shape[-1] != size:
        raise ValueError(f"hidden must have {size} features like the heads, got {hidden.shape[-1]}")
    dtype = jnp.result_type(hidden, params.weight)
    rows = hidden.reshape(-1, size).astype(dtype)
    weight, bias = params.weight.astype(dtype), params.bias.astype(dtype)[:, :, None]
    # The first layer of all heads is one product, as they read the same state.
    first = linear(rows, weight[:, 0].reshape(heads * size, size)).reshape(-1, heads, size).swapaxes(0, 1)
    state = rows + jax.nn.silu(first + bias[:, 0])
    for layer in range(1, layers):
        product = jnp.stack([linear(state[head], weight[head, layer]) for head in range(heads)])
        state = state + jax.nn.silu(product + bias[:, layer])
    return state.reshape(heads, *hidden.shape)


def medusa_logits(
    params: MedusaParams, hidden: Float[Array, "*B D"], *, lm_head: Float[Array, "V D"] | None = None
) -> Float[Array, "heads *B V"]:
    """Logits of each head: head k guesses the token that follows k + 2 places after the hidden state's own.

    Args:
        params: of `init_medusa_heads`.
        hidden: the model's last hidden states, after its final norm: what the LM head reads.
        lm_head: the model's output matrix, [out, in]; needed if, and only if, the heads share it. Gradients flow into
            it and into ``hidden``: stop them for Medusa-1.

    Returns:
        Logits, heads first, as `jaxaccel.decoding.propose` takes them.

    Raises:
        ValueError: if ``hidden`` or ``lm_head`` does not have the heads' size, or ``lm_head`` is missing or not needed.

    >>> import jax, jax.numpy as jnp
    >>> lm_head = jax.random.normal(jax.random.key(1), (16, 4))
    >>> heads = init_medusa_heads(jax.random.key(0), 4, 16, lm_head=lm_head)
    >>> logits = medusa_logits(heads, jnp.ones((2, 4)))
    >>> logits.shape, bool(jnp.allclose(logits[0], jnp.ones((2, 4)) @ lm_head.T))  # untrained: the model's own guess
    ((3, 2, 16), True)
    """
    if (lm_head is None) == (params.vocab is None):
        raise ValueError(
            "lm_head must be given if and only if the heads have no vocabulary matrices, got "
            f"lm_head {'missing' if lm_head is None else 'given'} and share_vocab={params.vocab is None}"
        )
    state = medusa_hidden(params, hidden)
    matrix = lm_head if params.vocab is None else params.vocab
    assert matrix is not None  # for the type checker; the test above has seen to it
    if matrix.shape[-1] != state.shape[-1]:
        raise ValueError(f"lm_head must have {state.shape[-1]} columns like the heads, got shape {matrix.shape}")
    matrix = matrix.astype(state.dtype)
    if params.vocab is None:
        return linear(state, matrix)
    return jnp.stack([linear(rows, own) for rows, own in zip(state, matrix, strict=True)])


def medusa_targets(
    tokens: Int[Array, "*B T"], num_heads: int, *, mask: Bool[Array, "*B T"] | None = None, first: int = 2
) -> MedusaTargets:
    """Shift tokens so that head k at position t finds token t + first + k.

    Args:
        tokens: whole sequences.
        num_heads: rows to make.
        mask: which tokens are worth predicting, e.g. answers but not prompts or padding; all if ``None``.
        first: 2 for Medusa heads. With 1, and one row more, row 0 holds the model's own targets, as `medusa2_loss`
            wants them.

    Returns:
        Targets; those beyond the end are masked. To save memory, train on some positions only: index the last axis here
        and in ``hidden`` alike.

    Raises:
        ValueError: if ``num_heads`` or ``first`` is below 1.

    >>> import jax.numpy as jnp
    >>> targets = medusa_targets(jnp.array([4, 5, 6, 7]), 2)
    >>> targets.tokens.tolist(), targets.mask.tolist()
    ([[6, 7, 0, 0], [7, 0, 0, 0]], [[True, True, False, False], [True, False, False, False]])
    """
    if num_heads < 1 or first < 1:
        raise ValueError(f"num_heads and first must be at least 1, got {num_heads} and {first}")
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask

    def shifted(values: Array) -> Array:
        room = [(0, 0)] * (values.ndim - 1) + [(0, first + num_heads)]
        padded, length = jnp.pad(values, room), values.shape[-1]
        return jnp.stack([padded[..., first + k : first + k + length] for k in range(num_heads)])

    counts = shifted(mask)
    return MedusaTargets(jnp.where(counts, shifted(tokens), 0).astype(jnp.int32), counts)


def _check_targets(logits: Array, targets: Array, mask: Array, heads: int) -> None:
    expected = (heads, *logits.shape[1:-1])
    for name, array in (("targets", targets), ("mask", mask)):
        if array.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} to go with logits {logits.shape}, got {array.shape}; "
                "medusa_targets makes them from tokens"
            )


def _masked_mean(values: Float[Array, "heads *B"], mask: Bool[Array, "heads *B"]) -> Float[Array, "heads"]:
    """Return one mean per head over the entries that count; 0 where none does."""
    axes = tuple(range(1, values.ndim))
    return jnp.where(mask, values, 0).sum(axes) / jnp.maximum(mask.sum(axes), 1)


def _cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def medusa_loss(
    head_logits: Float[Array, "heads *B V"],
    targets: Int[Array, "heads *B"],
    mask: Bool[Array, "heads *B"],
    *,
    decay: float = 0.8,
    coefficient: float = 1.0,
) -> Float[Array, ""]:
    """Loss of Medusa-1: coefficient · Σₖ decay^(k+1) · mean of CE(head k, token t + 2 + k).

    Args:
        head_logits: of `medusa_logits`, from hidden states behind `jax.lax.stop_gradient`.
        targets: what each head should have said: ``medusa_targets(tokens, heads)``, not the tokens themselves.
        mask: which targets count.
        decay: weight of a head relative to the one before, in (0, 1]. 1 is the reference's first trainer.
        coefficient: > 0. Adam does not see it; the reference's configurations have 0.2.

    Returns:
        The loss, at least float32; a head without any target adds 0.

    Raises:
        ValueError: if shapes do not agree or a number is out of range.

    >>> import jax.numpy as jnp
    >>> targets = medusa_targets(jnp.array([[3, 1, 2, 0]]), 2)
    >>> loss = medusa_loss(jnp.zeros((2, 1, 4, 4)), *targets)  # undecided heads: ln 4 each
    >>> bool(jnp.isclose(loss, (0.8 + 0.64) * jnp.log(4.0)))
    True
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    if not 0 < coefficient < math.inf:
        raise ValueError(f"coefficient must be finite and > 0, got {coefficient}")
    _check_targets(head_logits, targets, mask, head_logits.shape[0])
    losses = _masked_mean(_cross_entropy(head_logits, targets), mask)
    return coefficient * (jnp.asarray([decay ** (k + 1) for k in range(losses.size)], losses.dtype) * losses).sum()


def medusa2_loss(
    base_logits: Float[Array, "*B V"],
    head_logits: Float[Array, "heads *B V"],
    targets: Int[Array, "heads+1 *B"],
    mask: Bool[Array, "heads+1 *B"],
    *,
    strength: ArrayLike = 1.0,
    decay: float = 0.8,
    coefficient: float = 0.2,
    teacher_logits: Float[Array, "*B V"] | None = None,
) -> Float[Array, ""]:
    """Loss of Medusa-2, where the model learns along: its own loss plus strength · `medusa_loss`.

    The model's own loss is the cross-entropy of the next token or, with a teacher, KL(teacher ‖ model), which keeps a
    model in place whose training data are not at hand. It is a mean over unmasked positions; the reference code divides
    by all of them, so that there the term weakens as more is masked.

    Args:
        base_logits: of the model being trained.
        head_logits: of `medusa_logits` on the same hidden states.
        targets: ``medusa_targets(tokens, heads + 1, first=1)``: the model's own, then those of each head.
        mask: which targets count.
        strength: s(step) of `medusa_schedule`.
        decay: as in `medusa_loss`.
        coefficient: as there; 0.2 after a first stage with the model frozen, 0.01 without.
        teacher_logits: of the model before training, e.g. with its adapters off; no gradient flows into them.

    Returns:
        The loss.

    Raises:
        ValueError: if shapes do not agree or a number is out of range.

    >>> import jax.numpy as jnp
    >>> targets = medusa_targets(jnp.array([3, 1, 2, 0]), 3, first=1)
    >>> loss = medusa2_loss(jnp.zeros((4, 4)), jnp.zeros((2, 4, 4)), *targets)
    >>> bool(jnp.isclose(loss, (1 + 0.2 * (0.8 + 0.64)) * jnp.log(4.0)))
    True
    """
    if base_logits.shape != head_logits.shape[1:]:
        raise ValueError(f"base_logits must have shape {head_logits.shape[1:]}, got {base_logits.shape}")
    _check_targets(head_logits, targets, mask, head_logits.shape[0] + 1)
    heads = medusa_loss(head_logits, targets[1:], mask[1:], decay=decay, coefficient=coefficient)
    if teacher_logits is None:
        own = _cross_entropy(base_logits, targets[0])
    else:
        if teacher_logits.shape != base_logits.shape:
            raise ValueError(f"teacher_logits must have shape {base_logits.shape}, got {teacher_logits.shape}")
        dtype = jnp.promote_types(base_logits.dtype, jnp.float32)
        teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(dtype), -1)
        student = jax.nn.log_softmax(base_logits.astype(dtype), -1)
        # Tokens that the teacher excludes have probability 0 and add nothing, whatever the difference there.
        own = jnp.where(teacher > -jnp.inf, jnp.exp(teacher) * (teacher - student), 0).sum(-1)
    return _masked_mean(own[None], mask[:1])[0] + strength * heads


def medusa_schedule(kind: str, num_steps: int, *, fraction: float = 1.0) -> optax.Schedule:
    """Return how strongly Medusa-2 weighs its heads at each step, from 0 to 1.

    Args:
        kind: ``"constant"`` (1), ``"linear"`` (x) or ``"sine"`` (sin(π/2·x)), with x = step/(fraction·num_steps), at
            most 1.
        num_steps: steps of the training.
        fraction: of the training after which 1 is reached, in (0, 1]; ``sine_0.5`` of the reference is ``"sine"`` with
            0.5.

    Returns:
        A schedule: step, int [] → strength, float [].

    Raises:
        ValueError: if ``kind`` is unknown or a number out of range.

    >>> schedule = medusa_schedule("sine", 100, fraction=0.5)
    >>> [round(float(schedule(step)), 3) for step in (0, 25, 50, 90)]
    [0.0, 0.707, 1.0, 1.0]
    """
    if kind not in SCHEDULES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, SCHEDULES))}, got {kind!r}")
    if num_steps < 1 or not 0 < fraction <= 1:
        raise ValueError(
            f"num_steps must be at least 1 and fraction in (0, 1], got num_steps={num_steps} and fraction={fraction}"
        )

    def schedule(step: ArrayLike) -> Array:
        x = jnp.minimum(jnp.asarray(step, float) / (fraction * num_steps), 1.0)
        if kind == "constant":
            return jnp.ones_like(x)
        return x if kind == "linear" else jnp.sin(jnp.pi / 2 * x)

    return schedule


def medusa_adam(
    learning_rate: ArrayLike | optax.Schedule, *, matrix_multiplier: float = 4.0, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Return the authors' optimizer for `MedusaParams`: Adam, with a larger learning rate for matrices than for biases.

    Their rates are 5e-4 after 40 warm-up steps, falling along a cosine, for two epochs and without weight decay:
    ``optax.warmup_cosine_decay_schedule(0.0, 5e-4, 40, num_steps)``.

    Args:
        learning_rate: of the biases; a number or a schedule.
        matrix_multiplier: times the rate for ``weight`` and ``vocab``, > 0.
        b1: decay rate of Adam's first moment.
        b2: decay rate of its second.

    Returns:
        A transformation for a `MedusaParams` tree; put it in an ``optax.partition`` to train the model along.

    Raises:
        ValueError: if ``matrix_multiplier`` is not positive.

    >>> import jax, jax.numpy as jnp, optax
    >>> heads = init_medusa_heads(jax.random.key(0), 4, 16, share_vocab=True)
    >>> tx = medusa_adam(1e-3)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, heads), tx.init(heads))
    >>> [round(float(leaf.max()), 4) for leaf in jax.tree.leaves(updates)]
    [-0.004, -0.001]
    """
    if not 0 < matrix_multiplier < math.inf:
        raise ValueError(f"matrix_multiplier must be finite and > 0, got {matrix_multiplier}")

    def matrices(params: MedusaParams) -> MedusaParams:
        return MedusaParams(True, False, None if params.vocab is None else True)  # type: ignore[arg-type]  # a mask

    return optax.chain(
        optax.scale_by_adam(b1, b2),
        optax.masked(optax.scale(matrix_multiplier), matrices),
        optax.scale_by_learning_rate(learning_rate),
    )


def rank_accuracies(
    head_logits: Float[Array, "heads *B V"],
    targets: Int[Array, "heads *B"],
    mask: Bool[Array, "heads *B"],
    *,
    top_k: int = 10,
) -> Float[Array, "heads top_k"]:
    """Share of positions where the target is the r-th best token of head k: what `build_tree` chooses by.

    Measure it where it will be used: with the model's own greedy output as ``tokens`` of `medusa_targets`.

    Args:
        head_logits: of `medusa_logits`.
        targets: of `medusa_targets`.
        mask: which targets count.
        top_k: ranks to count.

    Returns:
        Shares, float32; the rest up to 1 is where the target ranks lower.

    Raises:
        ValueError: if shapes do not agree or ``top_k`` is not between 1 and V.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]])
    >>> rank_accuracies(logits, jnp.array([[0, 2]]), jnp.array([[True, True]]), top_k=3).tolist()
    [[0.5, 0.5, 0.0]]
    """
    _check_targets(head_logits, targets, mask, head_logits.shape[0])
    if not 1 <= top_k <= head_logits.shape[-1]:
        raise ValueError(f"top_k must be between 1 and the vocabulary ({head_logits.shape[-1]}), got {top_k}")
    value = jnp.take_along_axis(head_logits, targets[..., None], -1)
    # The rank is counted, not sorted out; equal logits go by id, as in jax.lax.top_k.
    earlier = jnp.arange(head_logits.shape[-1]) < targets[..., None]
    rank = ((head_logits > value) | ((head_logits == value) & earlier)).sum(-1)
    hits = (rank[..., None] == jnp.arange(top_k)) & mask[..., None]
    axes = tuple(range(1, mask.ndim))
    return (hits.sum(axes) / jnp.maximum(mask.sum(axes), 1)[:, None]).astype(jnp.float32)
