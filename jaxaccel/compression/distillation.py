"""Layer-wise distillation: a small model learns from the hidden states and the logits of a large one.

It makes small models cheaper to train: hidden states are a richer target than labels, and a few steps of it already
tell good student shapes from bad ones, which is what a search over shapes needs (`jaxaccel.forecasting.pareto`).

With student states s_i [.., D_s], teacher states t_j [.., D_t], a map from student layer i to teacher layer j(i) and
learned projections P_i [D_t, D_s]:

    n(h)   = (h − mean h) / √(var h + eps)                         of each token, over its D features
    L_i    = mean over tokens and features of (n(P_i s_i) − n(t_j(i)))²    = 2·(1 − correlation), between 0 and 4
    states = Σ_i w_i·L_i / Σ_i w_i
    logits = T²·mean over tokens of KL(softmax(z_t / T) ‖ softmax(z_s / T))

T² keeps gradients at the size that they have at T = 1; for T → ∞ the second loss becomes half the variance of z_s − z_t
over the vocabulary. Its last axis may as well be keys: the same function compares attention scores, masked ones (−∞)
included. Progressive transfer starts with the layer next to the input and adds one at a time: `progressive_weights`.

The teacher receives no gradient. Sums are in float32 at least.

When to use it: the student has the teacher's tokens and is at most as deep. When not: without a teacher in memory, or
where only the teacher's text is at hand (then train on that).

Source: Zhang et al., AutoDistill, arXiv 2201.08539 (flash distillation; its teacher is BERT, with the transfer of
MobileBERT, arXiv 2004.02984), surveyed in Huang et al., arXiv 2406.10903; Hinton et al., arXiv 1503.02531, for T². The
normalisation is our choice: without it the layers with the largest states decide.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Mask = Bool[Array, "..."] | Int[Array, "..."] | Float[Array, "..."]


def uniform_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layer for each of the student's, evenly spaced, last to last.

        j(i) = ⌊(i + 1)·teacher_layers / student_layers⌋ − 1,    i = 0, 1, ...

    Args:
        student_layers: layers of the student.
        teacher_layers: layers of the teacher, at least as many.

    Returns:
        Indices from 0, increasing.

    Raises:
        ValueError: if the student has no layer, or more than the teacher.

    >>> uniform_layer_map(4, 12), uniform_layer_map(3, 4)
    ((2, 5, 8, 11), (0, 1, 3))
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"student_layers is {student_layers}, expected at least 1 and at most teacher_layers = {teacher_layers}"
        )
    return tuple((i + 1) * teacher_layers // student_layers - 1 for i in range(student_layers))


def progressive_weights(step: ArrayLike, steps_per_layer: int, num_layers: int) -> Float[Array, "L"]:
    """Weights of the layers at a step: layer i counts from step i·steps_per_layer on.

    Layers that have been learned keep counting, so that they stay learned while those above them start; to train a
    single layer at a time instead, freeze the parameters of the others in the optimizer.

    Args:
        step: steps taken, int []; may be traced.
        steps_per_layer: steps between one layer's start and the next one's.
        num_layers: layers of the student.

    Returns:
        Ones and zeros, float32.

    Raises:
        ValueError: if a number of layers or steps is below 1.

    >>> progressive_weights(25, 10, 4).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    for name, value in (("steps_per_layer", steps_per_layer), ("num_layers", num_layers)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    return (jnp.arange(num_layers) * steps_per_layer <= jnp.asarray(step)).astype(jnp.float32)


def init_projections(
    key: PRNGKeyArray, num_layers: int, student_dim: int, teacher_dim: int, *, dtype: DTypeLike = jnp.float32
) -> list[Float[Array, "out in"]]:
    """Matrices from the student's width to the teacher's, normal with variance 1 / student_dim.

    Args:
        key: of the matrices.
        num_layers: layers of the student.
        student_dim: D_s.
        teacher_dim: D_t.
        dtype: of the matrices.

    Returns:
        One matrix [out, in] for each layer; parameters to be trained along and thrown away afterwards.

    Raises:
        ValueError: if a number is below 1.

    >>> [p.shape for p in init_projections(jax.random.key(0), 2, 8, 32)]
    [(32, 8), (32, 8)]
    """
    for name, value in (("num_layers", num_layers), ("student_dim", student_dim), ("teacher_dim", teacher_dim)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    keys = jax.random.split(key, num_layers)
    return [jax.random.normal(k, (teacher_dim, student_dim), dtype) / math.sqrt(student_dim) for k in keys]


def layerwise_kd_loss(
    student_states: Sequence[Float[Array, "*B Ds"]],
    teacher_states: Sequence[Float[Array, "... Dt"]],
    layer_map: Sequence[int],
    projections: Sequence[Float[Array, "out in"]] | None = None,
    *,
    weights: Float[Array, "L"] | Sequence[float | int] | None = None,
    mask: Mask | None = None,
    eps: float = 1e-6,
) -> Float[Array, ""]:
    """Mean squared distance of normalised hidden states, student layer by student layer.

        Σ_i w_i·mean (n(P_i s_i) − n(t_j(i)))² / Σ_i w_i

    Source: the layer-wise transfer of AutoDistill, arXiv 2201.08539, on normalised states.

    Args:
        student_states: the output of each student layer, such as [B, T, D_s].
        teacher_states: the output of each teacher layer; no gradient goes there.
        layer_map: the teacher's layer for each of the student's, see `uniform_layer_map`; −1 is not allowed.
        projections: a matrix [out, in] for each student layer, see `init_projections`; ``None`` where widths agree.
        weights: of the student's layers, such as `progressive_weights`; all 1 if ``None``.
        mask: true (or a weight >= 0) for the tokens that count, of the states' shape without the last axis.
        eps: added to the variance of each token's features.

    Returns:
        A mean over features, tokens and layers. Without any token or layer that counts it is 0 with zero gradient.

    Raises:
        ValueError: if the numbers of layers, widths or shapes do not fit, or ``eps`` is not positive.

    >>> states = [jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.0, 1.0, 0.0]])]
    >>> float(layerwise_kd_loss(states[:1], states, (0,)))
    0.0
    >>> round(float(layerwise_kd_loss(states[:1], [-3.0 * states[0]], (0,))), 3)  # opposite: 2·(1 + 1)
    4.0
    """
    layers = len(student_states)
    if layers < 1 or len(layer_map) != layers:
        raise ValueError(f"layer_map has {len(layer_map)} entries for {layers} student layers, expected one for each")
    if projections is not None and len(projections) != layers:
        raise ValueError(f"projections has {len(projections)} matrices for {layers} student layers")
    if weights is not None and len(weights) != layers:
        raise ValueError(f"weights has {len(weights)} entries for {layers} student layers")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, expected a number > 0: a token of equal features has no variance")
    losses = []
    for i, (state, j) in enumerate(zip(student_states, layer_map, strict=True)):
        if not 0 <= j < len(teacher_states):
            raise ValueError(f"layer_map[{i}] is {j}, expected one of the teacher's {len(teacher_states)} layers")
        teacher = jax.lax.stop_gradient(teacher_states[j])
        wide = jnp.promote_types(jnp.promote_types(state.dtype, teacher.dtype), jnp.float32)
        if projections is not None:
            matrix = projections[i]
            if matrix.shape != (teacher.shape[-1], state.shape[-1]):
                raise ValueError(
                    f"projections[{i}] has shape {matrix.shape}, expected (teacher, student) = "
                    f"{(teacher.shape[-1], state.shape[-1])}"
                )
            state = jnp.einsum("...i,oi->...o", state, matrix, preferred_element_type=wide)
        if state.shape != teacher.shape:
            raise ValueError(
                f"student_states[{i}] has shape {state.shape}, expected {teacher.shape} of teacher layer {j}"
                + ("; give projections where only the width differs" if projections is None else "")
            )
        difference = _normalise(state.astype(wide), eps) - _normalise(teacher.astype(wide), eps)
        losses.append(_token_mean(jnp.mean(difference**2, axis=-1), mask))
    scale = jnp.ones(layers) if weights is None else jnp.asarray(weights)
    return _weighted_mean(jnp.stack(losses), scale)


def logit_kd_loss(
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "..."],
    temperature: ArrayLike = 1.0,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    """T²·KL(teacher ‖ student) of softened distributions over the last axis.

        L = T²·mean Σ_v p_v·(log p_v − log q_v),    p = softmax(z_t / T), q = softmax(z_s / T)

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531. For attention pass scores
    with heads and queries in front and keys as the last axis.

    Args:
        student_logits: z_s.
        teacher_logits: z_t; no gradient goes there. −∞ is probability 0 and costs nothing.
        temperature: T > 0, may be traced. In float32 the loss has an error of about 1e-7·T²: keep it below 100.
        mask: true (or a weight >= 0) for the rows that count, of the logits' shape without the last axis.

    Returns:
        A mean over rows in nats·T²; infinite where the student rules out what the teacher does not. A mask that selects
        nothing gives 0 with zero gradient.

    Raises:
        ValueError: if shapes differ or the temperature is not positive and finite.

    >>> z = jnp.log(jnp.array([[0.75, 0.25]]))
    >>> round(float(logit_kd_loss(jnp.zeros((1, 2)), z)), 4)  # ln 2 minus the entropy of (3/4, 1/4)
    0.1308
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits has shape {teacher_logits.shape}, expected {student_logits.shape}")
    if isinstance(temperature, (int, float)) and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0")
    wide = jnp.promote_types(jnp.promote_types(student_logits.dtype, teacher_logits.dtype), jnp.float32)
    heat = jnp.asarray(temperature, wide)
    log_q = jax.nn.log_softmax(student_logits.astype(wide) / heat, axis=-1)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(wide) / heat, axis=-1)
    p = jnp.exp(log_p)
    # Where the teacher has probability 0 both logarithms may be −∞, and so may the student's gradient.
    seen = p > 0
    terms = jnp.where(seen, p * (jnp.where(seen, log_p, 0.0) - jnp.where(seen, log_q, 0.0)), 0.0)
    return heat**2 * _token_mean(jnp.sum(terms, axis=-1), mask)


def _normalise(state: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    centred = state - jnp.mean(state, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)


def _token_mean(values: Float[Array, "*B"], mask: Mask | None) -> Float[Array, ""]:
    if mask is None:
        return jnp.mean(values)
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {mask.shape}, expected {values.shape}")
    return _weighted_mean(values, mask)


def _weighted_mean(values: Float[Array, "*B"], weights: Array) -> Float[Array, ""]:
    """A mean that is 0 where all weights are, and does not look at values of weight 0: they may be infinite."""
    weights = weights.astype(values.dtype)
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights != 0, values * weights, 0.0)) / jnp.where(total > 0, total, 1.0)
