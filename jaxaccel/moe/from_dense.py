"""A trained dense feed-forward layer as a BlockFFN: neurons that fire together become an expert.

    1. Neurons are clustered into Ne experts of equal size by their activations on given inputs.
    2. The router is the ridge regression of how much each expert adds for an input, less what the k-th largest adds.
    3. γ is the least-squares fit of the layer's output.

It is a start for training, not a substitute: experts that are left out were small, not zero, and a linear router
guesses which. The docs' page on BlockFFN says how much a model loses, before and after some further steps.

It takes layers without gates, y = act(x·upᵀ)·down, as BlockFFN's experts are. A SwiGLU layer multiplies two projections
of the input and has no such form: distil it instead (`jaxaccel.compression.distillation`).

Clustering by activations: Zhang et al., MoEfication, 2022, arXiv 2110.01786.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxaccel.moe._checks import check_count
from jaxaccel.moe.block_ffn import Activation, BlockFFNParams, route
from kernels_pallas.expert_ffn.problem import ACTIVATIONS, check_activation

__all__ = ["cluster_neurons", "from_dense"]


def cluster_neurons(features: np.ndarray, clusters: int, *, seed: int = 0, rounds: int = 10) -> np.ndarray:
    """Equal clusters of rows: k-means in which the nearest pairs of row and centre are taken first.

    Args:
        features: one row per neuron [F, n]; scaled to length 1 here.
        clusters: number of clusters, which divides F.
        seed: of the first centres.
        rounds: of k-means.

    Returns:
        int [clusters, F/clusters], the neurons of each.
    """
    count = len(features)
    size = count // clusters
    rows = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    centres = rows[np.random.default_rng(seed).choice(count, clusters, replace=False)]
    owner = np.zeros(count, int)
    for _ in range(rounds):
        order = np.argsort(-(rows @ centres.T), axis=None, kind="stable")
        owner, room = np.full(count, -1), np.full(clusters, size)
        for pair in order:
            neuron, cluster = divmod(int(pair), clusters)
            if owner[neuron] < 0 and room[cluster]:
                owner[neuron] = cluster
                room[cluster] -= 1
        centres = np.stack([rows[owner == cluster].mean(0) for cluster in range(clusters)])
    return np.stack([np.flatnonzero(owner == cluster) for cluster in range(clusters)])


def from_dense(
    up: Float[Array, "_ _"],
    down: Float[Array, "_ _"],
    inputs: Float[Array, "_ _"],
    *,
    num_experts: int,
    active: int,
    activation: Activation = "silu",
    ridge: float = 1e-3,
    eps: float = 1e-5,
    key: Key[Array, ""],
) -> BlockFFNParams:
    """Cut a trained layer y = act(x·upᵀ)·down into experts.

    Args:
        up: first matrix, one row per neuron [F, D].
        down: second matrix, one row per neuron [F, D].
        inputs: what the layer is given, normalised as it is there [N, D]; a few thousand tokens of real text.
        num_experts: Ne, which divides F.
        active: k, about how many experts a token should use, 1 up to Ne.
        activation: of the layer.
        ridge: of the router's regression, times the mean square of the inputs.
        eps: the router's, as in `route`.
        key: of the first centres of the clusters.

    Returns:
        Parameters in the dtype of ``up``; `block_ffn` with them approximates the layer.

    Raises:
        ValueError: for shapes that do not fit, experts that do not divide the neurons, ``active`` out of range, fewer
            inputs than experts, inputs that are not finite.

    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> up, down, x = (jax.random.normal(k, shape) for k, shape in zip(keys, ((32, 8), (32, 8), (200, 8))))
    >>> params = from_dense(up, down, x, num_experts=8, active=4, key=jax.random.key(1))
    >>> params.up.shape, 0.2 < float((route(params, x).hidden != 0).mean()) < 0.8
    ((8, 4, 8), True)
    """
    check_activation(activation)
    for name, value in (("num_experts", num_experts), ("active", active)):
        check_count(name, value)
    if up.ndim != 2 or down.shape != up.shape:
        raise ValueError(f"up has shape {up.shape} and down {down.shape}, expected [F, D] for both")
    if up.shape[0] % num_experts:
        raise ValueError(f"num_experts is {num_experts}, expected a divisor of the {up.shape[0]} neurons of up")
    if active > num_experts:
        raise ValueError(f"active is {active}, expected 1 up to num_experts = {num_experts}")
    if inputs.ndim != 2 or inputs.shape[1] != up.shape[1]:
        raise ValueError(f"inputs has shape {inputs.shape}, expected [N, {up.shape[1]}] as up is {up.shape}")
    if inputs.shape[0] < num_experts:
        raise ValueError(f"inputs has {inputs.shape[0]} rows, expected at least one for each of {num_experts} experts")
    if not bool(jnp.isfinite(inputs).all()):
        raise ValueError("inputs must be finite, got NaN or infinity")
    x = inputs.astype(jnp.float32)
    hidden = ACTIVATIONS[activation](x @ up.astype(jnp.float32).T)  # [N, F]
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    groups = cluster_neurons(np.asarray(jnp.abs(hidden)).T, num_experts, seed=seed)
    slabs_up, slabs_down = up[groups], down[groups]
    added = jnp.einsum("neh,ehd->end", hidden[:, groups], slabs_down.astype(jnp.float32))  # [Ne, N, D]
    norms = jnp.linalg.norm(added, axis=-1).T
    # Positive for the k experts that add most. Inputs are centred nowhere: the router has no bias.
    last = -jnp.sort(-norms, -1)
    bar = last[:, active - 1] if active == num_experts else (last[:, active - 1] + last[:, active]) / 2
    gram = x.T @ x
    strength = ridge * jnp.trace(gram) / len(gram)
    router = jnp.linalg.solve(gram + strength * jnp.eye(len(gram)), x.T @ (norms - bar[:, None]))
    params = BlockFFNParams(router, jnp.ones(num_experts), slabs_up, slabs_down)
    weighed = route(params, x, eps=eps).hidden.T[..., None] * added  # [Ne, N, D]
    normal = jnp.einsum("end,fnd->ef", weighed, weighed)
    wanted = jnp.einsum("end,nd->e", weighed, added.sum(0))
    small = 1e-6 * jnp.trace(normal) / num_experts + 1e-12
    gamma = jnp.linalg.solve(normal + small * jnp.eye(num_experts), wanted)
    dtype = up.dtype
    return BlockFFNParams(router.astype(dtype), gamma.astype(dtype), slabs_up, slabs_down.astype(dtype))
