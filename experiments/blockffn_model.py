"""The networks of the experiment on BlockFFN: one small language model, and four feed-forward layers for it.

All experts are pairs of matrices with a SiLU between them, and all layers have as many parameters. They differ in who
decides which experts a token gets: a ReLU and an RMSNorm (BlockFFN), the k largest of a softmax (top-k), a ReLU alone
(ReMoE), nobody (dense). In training all compute all experts, so that a step costs about the same.

Top-k's balance loss: Switch Transformers, arXiv 2101.03961. ReMoE: arXiv 2412.14711.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxaccel.models import AttentionSublayer
from jaxaccel.moe import BlockFFN, Routing, block_ffn_init
from kernels_pallas.expert_ffn import dense_expert_ffn

Kind = Literal["blockffn", "topk", "remoe", "dense"]


class Experts(nnx.Module):
    """Experts behind any router ``logits -> scores``."""

    def __init__(
        self, width: int, experts: int, size: int, scores: Callable[[jax.Array], jax.Array], rngs: nnx.Rngs
    ) -> None:
        params = block_ffn_init(rngs.params(), dim=width, num_experts=experts, expert_dim=size)
        self.router, self.up, self.down = nnx.Param(params.router), nnx.Param(params.up), nnx.Param(params.down)
        self.scores = scores

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """Apply the layer."""
        logits = x @ self.router[...]
        scores = self.scores(logits)
        return dense_expert_ffn(x, self.up[...], self.down[...], scores), Routing(logits, scores, scores)


class Dense(nnx.Module):
    """The same network without a router, wider by what the router would weigh."""

    def __init__(self, width: int, inner: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(jax.random.normal(rngs.params(), (width, inner)) * width**-0.5)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (inner, width)) * inner**-0.5)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Apply the layer."""
        return jax.nn.silu(x @ self.up[...]) @ self.down[...], None


def top_k_scores(logits: jax.Array, k: int) -> jax.Array:
    """Softmax over the k largest logits, 0 elsewhere; scaled so that the squares sum to Ne as BlockFFN's do at γ = 1.

    Without the factor the layer would begin with outputs many times smaller than the others'.
    """
    values, ids = jax.lax.top_k(logits, k)
    shares = jax.nn.softmax(values, -1) * (k * logits.shape[-1]) ** 0.5
    return jnp.sum(jax.nn.one_hot(ids, logits.shape[-1]) * shares[..., None], -2)


class Output(NamedTuple):
    """What a pass gives."""

    logits: Any  # [B, T, V]
    routing: Any  # per layer a Routing, () for the dense network
    inputs: Any  # per layer [B, T, D], what its feed-forward layer is given


class ExpertLM(nnx.Module):
    """A causal language model with learned positions, whose feed-forward layers are of one kind."""

    def __init__(
        self,
        kind: Kind,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        length: int,
        experts: int,
        expert_dim: int,
        top_k: int,
        rngs: nnx.Rngs,
    ) -> None:
        def network() -> nnx.Module:
            if kind == "blockffn":
                return BlockFFN(width, experts, expert_dim, sparse=False, rngs=rngs)
            if kind == "dense":
                return Dense(width, experts * expert_dim + experts // 2, rngs)
            scores = jax.nn.relu if kind == "remoe" else lambda logits: top_k_scores(logits, top_k)
            return Experts(width, experts, expert_dim, scores, rngs)

        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.attention = nnx.List([AttentionSublayer(width, heads, causal=True, rngs=rngs) for _ in range(layers)])
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(layers)])
        self.networks = nnx.List([network() for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> Output:
        """Logits of the next token, and what happened inside."""
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        routing, inputs = [], []
        for attention, norm, network in zip(self.attention, self.norms, self.networks, strict=True):
            x = attention.attend(x)
            inputs.append(norm(x))
            y, routed = network(inputs[-1])
            x = x + y
            routing.append(routed)
        logits = self.head(self.norm(x))
        return Output(logits, () if routing[0] is None else tuple(routing), tuple(inputs))


# Losses of the others -------------------------------------------------------------------------------------------------


def balance_loss(routing: Routing) -> jax.Array:
    """Switch's loss: Ne·Σ_e f_e·P_e, with the share f of choices and the mean probability P of an expert; 1 if even."""
    probabilities = jax.nn.softmax(routing.logits, -1)
    chosen = (routing.scores != 0).astype(jnp.float32)
    axes = tuple(range(chosen.ndim - 1))
    share = chosen.mean(axes) / chosen.mean(axes).sum()
    return chosen.shape[-1] * jnp.sum(share * probabilities.mean(axes))


def remoe_penalty(routing: Routing, top_k: int) -> jax.Array:
    """ReMoE's L1 norm of the scores, each expert weighted by how much more than its share it is used."""
    active = (routing.scores != 0).astype(jnp.float32)
    axes = tuple(range(active.ndim - 1))
    weights = jax.lax.stop_gradient(active.mean(axes)) * (active.shape[-1] / top_k)
    return jnp.sum(weights * routing.scores.mean(axes))


def remoe_factor(factor: jax.Array, routings: tuple[Routing, ...], top_k: int) -> jax.Array:
    """ReMoE's controller: the factor on its penalty, 1.2 times up or down after each step, towards k/Ne active."""
    active = jnp.mean(jnp.stack([jnp.mean(r.scores != 0) for r in routings]))
    return factor * 1.2 ** jnp.sign(active - top_k / routings[0].scores.shape[-1])
