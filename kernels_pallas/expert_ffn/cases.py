"""The union kernels as cases for `kernels_pallas.prove`, beside kernels for sorted tokens: megablox and ragged_dot."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.expert_ffn import gpu, tpu
from kernels_pallas.expert_ffn.problem import Active
from kernels_pallas.expert_ffn.reference import naive
from kernels_pallas.prove.cases import Case, Program, Shape, normals


def _forward(module: ModuleType) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        tokens, width, experts, size, active = (shape[name] for name in ("n", "D", "Ne", "de", "active"))
        dtype = jnp.dtype(shape["dtype"])
        x = jax.ShapeDtypeStruct((tokens, width), dtype)
        weights = jax.ShapeDtypeStruct((experts, size, width), dtype)
        scores = jax.ShapeDtypeStruct((tokens, experts), dtype)
        ids, number = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((experts,), ()))
        if (reason := module.refusal(x, weights, weights, experts)) is not None:
            raise ValueError(reason)

        def function(
            x: jax.Array, up: jax.Array, down: jax.Array, scores: jax.Array, ids: jax.Array, number: jax.Array
        ) -> jax.Array:
            return module.forward(
                x, up, down, scores, Active(ids, number), 0, activation="silu", max_active=experts
            )  # fmt: skip

        def draw(key: jax.Array) -> tuple[jax.Array, ...]:
            of_ids, of_scores = jax.random.split(jax.random.fold_in(key, 1))
            tokens_, up, down = normals(key, (x, weights, weights))
            up, down = ((w.astype(jnp.float32) * n**-0.5).astype(dtype) for w, n in ((up, width), (down, size)))
            order = jax.random.permutation(of_ids, experts).astype(jnp.int32)
            # The union: every active expert counts for every token, the others for none.
            used = jnp.zeros(experts, bool).at[order[:active]].set(True)
            chosen = jnp.where(used, jax.random.uniform(of_scores, scores.shape), 0).astype(dtype)
            return tokens_, up, down, chosen, order, jnp.int32(active)

        item = dtype.itemsize
        return Program(
            function,
            (x, weights, weights, scores, ids, number),
            flops=4.0 * tokens * active * size * width,
            bytes=2.0 * active * size * width * item + 2.0 * tokens * width * item + tokens * experts * item,
            busy=active / experts,
            note="bytes and FLOPs are those of the active experts; finding which ones is XLA's and not counted",
            draw=draw,
            equation=lambda x, up, down, scores, ids, number: naive(x, up, down, scores),
        )

    return build


def _peer(name: str) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        from kernels_pallas.prove import peers  # peers import every kernel of JAX: only where one is asked for

        return getattr(peers, name)(shape)

    return build


def _size(n: int, width: int, experts: int, size: int, active: int, dtype: str = "bfloat16") -> Shape:
    return {"n": n, "D": width, "Ne": experts, "de": size, "active": active, "dtype": dtype}


_SIZES = (
    _size(1, 768, 48, 64, 9),
    _size(32, 768, 48, 64, 18),
    _size(8, 1792, 56, 128, 14),
    _size(32, 1792, 56, 128, 18, "float32"),
    _size(64, 2048, 64, 128, 20),
)

CASES = (
    Case(
        "expert_ffn",
        "forward",
        "tpu",
        _forward(tpu),
        _SIZES,
        ("v5e", "v6e"),
        {"megablox": _peer("megablox_ffn"), "ragged_dot": _peer("ragged_dot_ffn")},
    ),
    Case("expert_ffn", "forward", "gpu", _forward(gpu), _SIZES, ("h100",), {"ragged_dot": _peer("gpu_ragged_dot_ffn")}),
)
