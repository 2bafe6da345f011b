"""BlockFFN: a feed-forward layer of many small experts, of which neighbouring tokens agree on few.

What gets cheaper: decoding, which waits for weights. A chunk of n tokens, one or the draft of a speculative decoder,
reads only the experts that some token of it uses, |union| of Ne slabs. Training costs what the dense layer of the same
size costs. Two losses make the union small: `activation_locality_loss` and `chunk_sparsification_loss`.

    A0 = x·W_r                        router, no bias
    A1 = relu(A0)                     no softmax, no top-k, no capacity: a token takes as many experts as it likes
    H  = A1/√(mean_e A1² + eps)       over all Ne experts, zeros included
    A  = γ ∘ H                        γ [Ne] learned, of any sign
    y  = Σ_e A_e · (act(x·up_eᵀ)·down_e)

When to use it: a model that is trained from scratch for devices where decoding is bound by memory, with small batches.
When not: large batches, where the union of all tokens is all experts; a trained dense model, which must be converted
(`from_dense`) and trained on. Tokens may use no expert at all: y is 0 there, and gradients are finite.

    params = block_ffn_init(key, dim=768, num_experts=48, expert_dim=64)
    y, routing = block_ffn(params, x)                                        # x [..., D], already normalised
    loss += 2e-3 * activation_locality_loss(routing.logits)
    loss += factor * chunk_sparsification_loss(routing.hidden)               # factor from `adaptive_factor`

An expert is active where H ≠ 0, that is, before γ: the paper's inference code looks at A > 0 and so drops experts whose
γ is negative, which its training code keeps. NaN in the logits of a token makes all of its H NaN, and so its y: it
counts as active everywhere, is never skipped, and does not reach other tokens.

"BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation Sparsity", C. Song,
W. Zhao, X. Han, C. Xiao, Y. Chen, Y. Li, Z. Liu, M. Sun, 2025, arXiv 2507.08771.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxaccel.moe._checks import check_count
from kernels_pallas.expert_ffn import dense_expert_ffn, expert_ffn

Activation = Literal["silu", "gelu", "relu"]
Sparse = Literal["auto"] | bool

SPARSE_TOKENS = 64
"""``sparse="auto"`` reads the union for up to that many tokens; more of them hardly leave an expert out."""


class BlockFFNParams(NamedTuple):
    """Parameters of a layer with Ne experts of ``de`` neurons each."""

    router: Any  # [D, Ne]
    gamma: Any  # [Ne]
    up: Any  # [Ne, de, D]
    down: Any  # [Ne, de, D]: one contiguous slab for each expert


class Routing(NamedTuple):
    """What the router says of each token: losses and metrics are made of it."""

    logits: Any  # [..., Ne], A0: for `activation_locality_loss`
    hidden: Any  # [..., Ne], H >= 0: for `chunk_sparsification_loss`
    scores: Any  # [..., Ne], A: weights of the experts, for the metrics


def block_ffn_init(
    key: Key[Array, ""],
    *,
    dim: int,
    num_experts: int,
    expert_dim: int,
    init_std: float | None = None,
    dtype: DTypeLike = jnp.float32,
) -> BlockFFNParams:
    """Random normal matrices; γ = 1.

    Args:
        key: random key.
        dim: width of the residual stream, D.
        num_experts: Ne.
        expert_dim: neurons of an expert, de. Ne·de is the width of a dense layer of the same size.
        init_std: deviation of all matrices. By default 1/√D for router and ``up``, 1/√(Ne·de) for ``down``. The paper's
            code has 0.1/√(D/256) for all, together with muP's scale of the residual and of the logits.
        dtype: of all arrays.

    Returns:
        Parameters.

    Raises:
        ValueError: for a size below 1, or a deviation that is not a positive finite number.
        TypeError: for a size that is no integer.

    >>> params = block_ffn_init(jax.random.key(0), dim=16, num_experts=6, expert_dim=4)
    >>> params.router.shape, params.up.shape, params.down.shape
    ((16, 6), (6, 4, 16), (6, 4, 16))
    """
    for name, value in (("dim", dim), ("num_experts", num_experts), ("expert_dim", expert_dim)):
        check_count(name, value)
    if init_std is not None and not 0 < init_std < math.inf:
        raise ValueError(f"init_std is {init_std}, expected a positive finite number")
    narrow, wide = (init_std or size**-0.5 for size in (dim, num_experts * expert_dim))
    router, up, down = jax.random.split(key, 3)
    shape = (num_experts, expert_dim, dim)
    return BlockFFNParams(
        narrow * jax.random.normal(router, (dim, num_experts), dtype),
        jnp.ones(num_experts, dtype),
        narrow * jax.random.normal(up, shape, dtype),
        wide * jax.random.normal(down, shape, dtype),
    )


def _check_router(params: BlockFFNParams, x: Array, eps: float) -> None:
    if params.router.ndim != 2:
        raise ValueError(f"router has shape {params.router.shape}, expected [D, Ne]")
    width, experts = params.router.shape
    if params.gamma.shape != (experts,):
        raise ValueError(f"gamma has shape {params.gamma.shape}, expected ({experts},) as router is {(width, experts)}")
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"x has shape {x.shape}, expected [..., {width}] as router is {(width, experts)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}, expected a real floating type")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a positive finite number")


def route(params: BlockFFNParams, x: Float[Array, "*_ D"], *, eps: float = 1e-5) -> Routing:
    """Weights of the experts for each token: ReLU, RMSNorm over all experts, learned scale.

        A0 = x·W_r,   H = relu(A0)/√(mean_e relu(A0)² + eps),   A = γ ∘ H

    The mean square is worked in float32 at least, as in the reference. A token without a positive logit has H = A = 0.
    Where all logits are far below √eps, ``eps`` and not the other experts sets the scale of H.

    Args:
        params: of the layer; ``up`` and ``down`` are not read.
        x: tokens [..., D].
        eps: added to the mean square. Shipped configurations have 1e-5, the code's default is 1e-6.

    Returns:
        A0, H and A [..., Ne] in the dtype of ``x``.

    Raises:
        ValueError: for sizes of router, γ and ``x`` that do not fit, or an ``eps`` that is not positive.
        TypeError: for ``x`` that is not of a real floating type.

    >>> params = BlockFFNParams(jnp.eye(2), jnp.array([1.0, -2.0]), None, None)
    >>> route(params, jnp.array([[3.0, 3.0], [-1.0, -1.0]])).scores.round(3).tolist()
    [[1.0, -2.0], [0.0, -0.0]]
    """
    _check_router(params, x, eps)
    logits = x @ params.router.astype(x.dtype)
    wide = jax.nn.relu(logits).astype(jnp.promote_types(x.dtype, jnp.float32))
    hidden = (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)).astype(x.dtype)
    return Routing(logits, hidden, params.gamma.astype(x.dtype) * hidden)


def block_ffn(
    params: BlockFFNParams,
    x: Float[Array, "*_ D"],
    *,
    eps: float = 1e-5,
    activation: Activation = "silu",
    sparse: Sparse = "auto",
    max_active: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*_ D"], Routing]:
    """The layer: y = Σ_e A_e·(act(x·up_eᵀ)·down_e), over the experts that some token of ``x`` uses.

    All tokens of ``x`` share one union: give what is decoded together. Both ways of computing have the same value and
    the same gradients up to the order of sums: an expert that no token uses has weight 0 and gradients 0, and behind
    the ReLU its logits have none either.

    Args:
        params: from `block_ffn_init` or `from_dense`.
        x: tokens [..., D], normalised as the layer was trained on; leading axes are flattened.
        eps: as in `route`.
        activation: ``"silu"``, ``"gelu"`` (tanh form) or ``"relu"``.
        sparse: ``True`` reads the union only, ``False`` all experts as one pair of dense products. ``"auto"``: the
            union for at most 64 tokens. The choice is static; training batches are dense.
        max_active: with the union, most experts that are computed one by one, as in `expert_ffn`. More of them fall
            back to the dense products; nothing is cut off.
        implementation: of the union's kernel, as in `expert_ffn`.

    Returns:
        y in the shape and dtype of ``x``, and the routing.

    Raises:
        ValueError: as `route` and `expert_ffn`; for a ``sparse`` that is none of the three, for ``max_active`` or
            ``implementation`` together with ``sparse=False``, which uses neither.
        TypeError: as `route` and `expert_ffn`.

    >>> params = block_ffn_init(jax.random.key(0), dim=8, num_experts=4, expert_dim=3)
    >>> y, routing = block_ffn(params, jnp.ones((2, 5, 8)))
    >>> y.shape, routing.scores.shape
    ((2, 5, 8), (2, 5, 4))
    """
    if not (isinstance(sparse, bool) or sparse == "auto"):
        raise ValueError(f"sparse is {sparse!r}, expected 'auto', True or False")
    if sparse is False:
        for name, value in (("max_active", max_active), ("implementation", implementation)):
            if value is not None:
                raise ValueError(f"{name} is {value!r} together with sparse=False, which does not use it")
    _check_experts(params)
    routing = route(params, x, eps=eps)
    experts = params.gamma.shape[0]
    if max_active is not None and not 1 <= max_active <= experts:
        raise ValueError(f"max_active is {max_active}, expected 1 up to the {experts} experts")
    tokens = math.prod(x.shape[:-1])
    if sparse is True or (sparse == "auto" and tokens <= SPARSE_TOKENS):
        y = expert_ffn(
            x,
            params.up,
            params.down,
            routing.scores,
            active=(routing.hidden != 0).reshape(-1, experts).any(0),  # NaN != 0: it must show
            activation=activation,
            max_active=max_active,
            implementation=implementation,
        )
    else:
        y = dense_expert_ffn(x, params.up, params.down, routing.scores, activation=activation)
    return y, routing


def _check_experts(params: BlockFFNParams) -> None:
    up, down = params.up, params.down
    if up.ndim != 3 or down.shape != up.shape:
        raise ValueError(f"up has shape {up.shape} and down {down.shape}, expected [Ne, de, D] for both")
    if params.router.ndim == 2 and (up.shape[2], up.shape[0]) != params.router.shape:
        raise ValueError(
            f"router has shape {params.router.shape}, expected {(up.shape[2], up.shape[0])} as up is {up.shape}"
        )


class BlockFFN(nnx.Module):
    """The layer as a Flax NNX module. It returns its routing, for the losses: nothing is kept in globals.

    Args:
        dim: as in `block_ffn_init`, also the next two.
        num_experts: number of experts.
        expert_dim: neurons of an expert.
        eps: as in `block_ffn`, also the next four.
        activation: name of the experts' activation.
        sparse: whether the union is read.
        max_active: most experts that are computed one by one.
        implementation: of the union's kernel.
        init_std: as in `block_ffn_init`.
        param_dtype: of the parameters.
        params: ready parameters instead of random ones; sizes and ``rngs`` are then left out.
        rngs: source of random parameters.

    Raises:
        ValueError: as `block_ffn_init`, or where neither or both of sizes with ``rngs`` and ``params`` are given.

    >>> layer = BlockFFN(8, 4, 3, rngs=nnx.Rngs(0))
    >>> y, routing = layer(jnp.ones((2, 5, 8)))
    >>> y.shape, routing.logits.shape
    ((2, 5, 8), (2, 5, 4))
    """

    def __init__(
        self,
        dim: int | None = None,
        num_experts: int | None = None,
        expert_dim: int | None = None,
        *,
        eps: float = 1e-5,
        activation: Activation = "silu",
        sparse: Sparse = "auto",
        max_active: int | None = None,
        implementation: str | None = None,
        init_std: float | None = None,
        param_dtype: DTypeLike = jnp.float32,
        params: BlockFFNParams | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        if params is None:
            if rngs is None or dim is None or num_experts is None or expert_dim is None:
                raise ValueError("expected dim, num_experts, expert_dim and rngs, or params")
            params = block_ffn_init(
                rngs.params(),
                dim=dim,
                num_experts=num_experts,
                expert_dim=expert_dim,
                init_std=init_std,
                dtype=param_dtype,
            )
        elif any(value is not None for value in (dim, num_experts, expert_dim, rngs)):
            raise ValueError("params are given: leave out dim, num_experts, expert_dim and rngs")
        self.router, self.gamma = nnx.Param(params.router), nnx.Param(params.gamma)
        self.up, self.down = nnx.Param(params.up), nnx.Param(params.down)
        # One by one and not as a dict: what is static must be hashable.
        self.eps, self.activation, self.sparse = eps, activation, sparse
        self.max_active, self.implementation = max_active, implementation

    def parameters(self) -> BlockFFNParams:
        """The arrays, for the pure functions."""
        return BlockFFNParams(self.router[...], self.gamma[...], self.up[...], self.down[...])

    def __call__(self, x: Float[Array, "*_ D"]) -> tuple[Float[Array, "*_ D"], Routing]:
        """Apply the layer."""
        return block_ffn(
            self.parameters(),
            x,
            eps=self.eps,
            activation=self.activation,
            sparse=self.sparse,
            max_active=self.max_active,
            implementation=self.implementation,
        )
