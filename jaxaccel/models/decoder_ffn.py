"""The feed-forward part of a decoder's block: SwiGLU, or the sparse experts of BlockFFN.

    SwiGLU      W₂ (silu(W₁ x) ⊙ W₃ x)
    BlockFFN    Σₑ Aₑ(x) · silu(x upₑᵀ) downₑ,   A the router's weights, mostly zero

All tokens of a pass share one union of experts, and only these are read: one token of plain decoding, the draft of a
speculative step, the rows of a batch. `expert_union` counts them.

On several devices, shard ``expert_up`` and ``expert_down`` [Ne, de, D] over de: then each device holds a part of every
expert, reads that part of the union, and the partial sums are added. Sharded over Ne, a device would wait for the
experts of others, and the loop over the union would move slabs between devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.compression import linear
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.moe import BlockFFNParams, Routing, block_ffn

Layer = dict[str, Any]


def feed_forward(
    layer: Layer, x: Float[Array, "B n D"], config: DecoderConfig, real: Bool[Array, "B n"] | None = None
) -> tuple[Float[Array, "B n D"], Any]:
    """What is added to the residual stream.

    Args:
        layer: parameters of a block.
        x: normalised stream.
        config: of the model.
        real: tokens that are no padding; all by default. Padding takes no expert.

    Returns:
        The sum, and the `Routing` of sparse experts, else ().

    Raises:
        ValueError: if parameters and configuration are of different kinds.
    """
    experts = config.block_ffn
    if ("router" in layer) != (experts is not None):
        held, wanted = ("sparse experts", "a dense network") if experts is None else ("no experts", repr(experts))
        raise ValueError(f"the parameters hold {held}, but the configuration has {wanted}")
    if experts is None:
        if "gate_up" in layer:
            gate, up = jnp.split(linear(x, layer["gate_up"]), 2, -1)
        else:
            gate, up = linear(x, layer["gate"]), linear(x, layer["up"])
        return linear(jax.nn.silu(gate) * up, layer["down"]), ()
    # The router has no bias: a row of zeros takes no expert.
    rows = x if real is None else jnp.where(real[..., None], x, 0)
    params = BlockFFNParams(layer["router"], layer["gamma"], layer["expert_up"], layer["expert_down"])
    return block_ffn(params, rows, eps=experts.eps, sparse=experts.sparse, max_active=experts.max_active)


def expert_union(routing: Routing, real: Bool[Array, "B n"] | None = None) -> Int[Array, "*L"]:
    """How many experts a pass reads in each layer: those that any of its tokens uses.

    Args:
        routing: of `decoder_forward`, [L, B, n, Ne], or of one layer.
        real: tokens that count; all by default.

    >>> hidden = jnp.array([[[0.0, 2.0, 0.0], [0.0, 1.0, 1.0]]])
    >>> int(expert_union(Routing(hidden, hidden, hidden)))
    2
    """
    used = routing.hidden != 0
    used = used if real is None else used & real[..., None]
    return used.any((-3, -2)).sum(-1)
