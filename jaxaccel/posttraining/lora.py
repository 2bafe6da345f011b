"""LoRA: fine-tuning through low-rank additions to chosen matrices of any tree of parameters.

It makes fine-tuning cheaper in memory: only the two factors are trained, so the optimizer's state and the checkpoints
shrink by a factor of about min(in, out)/(2·rank); once merged, the model costs what it cost before.

    W' = W + (α/r)·B A,    A [r, in] random, B [out, r] zero at the start, so that W' = W

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.

Parameters are a pytree; a leaf is named by its path, "layers/0/q". Two ways of using the factors give the same result:

- `apply_lora`: build the tree of adapted parameters inside the loss and call the model as it is. No change of the
  model, but the backward pass holds the gradient of each whole matrix for a moment.
- `lora_linear`: x Wᵀ + (α/r)·(x Aᵀ) Bᵀ inside a model of your own, cheaper where tokens are few.

``layout`` says how the matrices are stored: ``"out_in"`` (this library, torch) or ``"in_out"`` (Flax, Keras).
Leaves with more than two axes are stacks of matrices, [L, out, in].
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

Lora = dict[str, dict[str, Array]]
"""Path of a matrix -> ``{"a": [..., r, in], "b": [..., out, r]}``, whatever the layout of the matrix."""


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_layout(layout: str) -> None:
    if layout not in ("out_in", "in_out"):
        raise ValueError(f"layout must be 'out_in' or 'in_out', got layout={layout!r}")


def _sizes(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """Return (out, in) of matrices."""
    return (shape[-2], shape[-1]) if layout == "out_in" else (shape[-1], shape[-2])


def _check_target(name: str, leaf: Any, rank: int, layout: str) -> None:
    shape = jnp.shape(leaf)
    if len(shape) < 2:
        raise ValueError(f"targets select {name!r} of shape {shape}, expected matrices: narrow the targets")
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(f"targets select {name!r} of dtype {jnp.result_type(leaf)}, expected real floating point")
    limit = min(_sizes(shape, layout))
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must be in [1, {limit}] for {name!r} of shape {shape}, got rank={rank}")


def init_lora(
    key: PRNGKeyArray,
    params: Any,
    *,
    rank: int,
    targets: str | Callable[[str], bool],
    dtype: Any = None,
    layout: str = "out_in",
) -> Lora:
    r"""Return fresh factors for the chosen matrices: A uniform in ±1/√in, B zero.

    Source: arXiv 2106.09685; the distribution of A is that of the authors' code.

    Args:
        key: random key; each matrix gets one of its own.
        params: any pytree of parameters (or of shapes: only paths, shapes and dtypes are read).
        rank: of the additions; at most the smaller side of every chosen matrix.
        targets: a regular expression that must match a leaf's whole path, such as ``r"layers/\d+/(q|v)"``, or a
            predicate of the path.
        dtype: of the factors; by default float32, or the matrix's dtype where that is wider. bfloat16 factors lose
            small updates.
        layout: how the matrices are stored.

    Returns:
        A dictionary from path to ``{"a": [..., r, in], "b": [..., out, r]}``: a pytree to be trained by any optimizer.

    Raises:
        ValueError: if targets match nothing or a leaf that is no matrix, or the rank is out of range; the leaf is
            named.
        TypeError: if a chosen matrix, or ``dtype``, is not real floating point.

    >>> import jax, jax.numpy as jnp
    >>> params = {"layers": [{"q": jnp.ones((4, 6)), "norm": jnp.ones(6)}]}
    >>> lora = init_lora(jax.random.key(0), params, rank=2, targets=r"layers/\d+/q")
    >>> jax.tree.map(jnp.shape, lora)
    {'layers/0/q': {'a': (2, 6), 'b': (4, 2)}}
    """
    _check_layout(layout)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a real floating dtype, got dtype={jnp.dtype(dtype).name}")
    chosen = targets if callable(targets) else lambda name: re.fullmatch(targets, name) is not None
    paths = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    leaves = dict(paths)
    found = {name: leaf for name, leaf in leaves.items() if chosen(name)}
    if not found:
        some = ", ".join(repr(name) for name, leaf in leaves.items() if len(jnp.shape(leaf)) > 1)
        raise ValueError(f"targets {targets!r} match no leaf; matrices are {some[:400] or 'not there at all'}")
    for name, leaf in found.items():
        count = sum(other == name for other, _ in paths)
        if count > 1:  # a key may hold the separator
            raise ValueError(f"{name!r} is the path of {count} leaves, expected one")
        _check_target(name, leaf, rank, layout)

    def factors(key: Array, leaf: Any) -> dict[str, Array]:
        stack, (outputs, inputs) = jnp.shape(leaf)[:-2], _sizes(jnp.shape(leaf), layout)
        kind = jnp.promote_types(jnp.result_type(leaf), jnp.float32) if dtype is None else dtype
        bound = 1 / math.sqrt(inputs)
        return {
            "a": jax.random.uniform(key, (*stack, rank, inputs), kind, -bound, bound),
            "b": jnp.zeros((*stack, outputs, rank), kind),
        }

    keys = jax.random.split(key, len(found))
    return {name: factors(keys[i], leaf) for i, (name, leaf) in enumerate(found.items())}


def lora_delta(
    adapter: dict[str, Array], *, alpha: ArrayLike, layout: str = "out_in"
) -> Float[Array, "*stack rows columns"]:
    """Return the addition of one adapter.

        (α/r)·B A    (transposed where ``layout="in_out"``)

    Source: arXiv 2106.09685.

    Args:
        adapter: ``{"a": [..., r, in], "b": [..., out, r]}``, one entry of `init_lora`'s result.
        alpha: scale; the addition is multiplied by alpha/rank, so that a change of rank needs no new learning rate.
        layout: how the matrix is stored.

    Returns:
        A matrix, or a stack of them, in float32 or wider.

    Raises:
        ValueError: for an unknown layout.

    >>> import jax.numpy as jnp
    >>> lora_delta({"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0], [0.0], [3.0]])}, alpha=2.0).tolist()
    [[2.0, 4.0], [0.0, 0.0], [6.0, 12.0]]
    """
    _check_layout(layout)
    a, b = adapter["a"], adapter["b"]
    kind = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    equation = "...or,...ri->...oi" if layout == "out_in" else "...or,...ri->...io"
    scale = jnp.asarray(alpha, kind) / a.shape[-2]
    return jnp.einsum(equation, b * scale, a, preferred_element_type=kind)


def merge_lora(params: Any, lora: Lora, *, alpha: ArrayLike, layout: str = "out_in") -> Any:
    """Return the parameters with the additions in them, to be saved or served at the cost of the original model.

        W' = W + (α/r)·B A

    Source: arXiv 2106.09685.

    Sums are made in float32 and rounded once to the matrix's dtype. An addition below half a unit in the last place
    of a bfloat16 weight (2⁻⁹ of it) is lost in that rounding: merge into float32 weights where that matters.

    Args:
        params: the tree given to `init_lora`.
        lora: its adapters.
        alpha: scale, as in training.
        layout: how the matrices are stored, as in training.

    Returns:
        A tree like ``params``; leaves without an adapter are the same arrays, dtypes and shardings are kept.

    Raises:
        ValueError: if an adapter has no leaf, or does not fit its leaf; the path is named.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.ones((3, 2)), "norm": jnp.ones(2)}
    >>> lora = init_lora(jax.random.key(0), params, rank=1, targets="w")
    >>> bool(jnp.array_equal(merge_lora(params, lora, alpha=1.0)["w"], params["w"]))  # B is zero
    True
    """
    _check_layout(layout)
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    missing = sorted(lora.keys() - set(paths))
    if missing:
        raise ValueError(f"lora has adapters for {', '.join(map(repr, missing))}, which params do not have")

    def leaf(path: Any, weight: Any) -> Any:
        adapter = lora.get(_name(path))
        if adapter is None:
            return weight
        (*stack, outputs, _), inputs = adapter["b"].shape, adapter["a"].shape[-1]
        expected = (*stack, outputs, inputs) if layout == "out_in" else (*stack, inputs, outputs)
        if jnp.shape(weight) != expected:  # a sum of other shapes might broadcast
            raise ValueError(
                f"the adapter of {_name(path)!r} is for weights of shape {expected} with layout={layout!r}, got "
                f"{jnp.shape(weight)}"
            )
        return (weight + lora_delta(adapter, alpha=alpha, layout=layout)).astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def apply_lora(params: Any, lora: Lora, *, alpha: ArrayLike, layout: str = "out_in") -> Any:
    """Return adapted parameters for use inside a loss: `merge_lora` with ``params`` frozen.

    Source: arXiv 2106.09685. Gradients flow into ``lora`` only; through a bfloat16 weight they pass its rounding
    unchanged, although an addition too small for that rounding does not show in the loss.

    Args:
        params: the tree given to `init_lora`; no gradient flows into it.
        lora: its adapters.
        alpha: scale; a common choice is 2·rank.
        layout: how the matrices are stored.

    Returns:
        A tree like ``params``, with its dtypes.

    Raises:
        ValueError: if an adapter has no leaf, or does not fit its leaf; the path is named.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.eye(2)}
    >>> lora = init_lora(jax.random.key(0), params, rank=1, targets="w")
    >>> loss = lambda lora: jnp.sum(apply_lora(params, lora, alpha=1.0)["w"] @ jnp.ones(2))
    >>> slopes = jax.grad(loss)(lora)["w"]
    >>> bool(slopes["b"].any()), bool(slopes["a"].any())  # A moves once B is not zero
    (True, False)
    """
    return merge_lora(jax.lax.stop_gradient(params), lora, alpha=alpha, layout=layout)


def lora_linear(
    x: Float[Array, "*B inputs"],
    weight: Float[Array, "rows columns"],
    adapter: dict[str, Array],
    *,
    alpha: ArrayLike,
    layout: str = "out_in",
) -> Float[Array, "*B outputs"]:
    """Return the adapted product without building the adapted matrix.

        y = x Wᵀ + (α/r)·(x Aᵀ) Bᵀ    (x W + ... where ``layout="in_out"``)

    Source: arXiv 2106.09685. It costs r·(in + out) products per row of x; `apply_lora` costs r·in·out per call and is
    cheaper once there are more rows than about in·out/(in + out).

    Args:
        x: rows to be multiplied.
        weight: the frozen matrix; no gradient flows into it.
        adapter: its entry of `init_lora`'s result.
        alpha: scale.
        layout: how ``weight`` is stored.

    Returns:
        Products in the dtype of ``x @ weight``.

    Raises:
        ValueError: for an unknown layout.

    >>> import jax.numpy as jnp
    >>> adapter = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0], [0.0], [3.0]])}
    >>> lora_linear(jnp.ones((1, 2)), jnp.zeros((3, 2)), adapter, alpha=2.0).tolist()
    [[6.0, 0.0, 18.0]]
    """
    _check_layout(layout)
    weight = jax.lax.stop_gradient(weight)
    base = x @ (weight.T if layout == "out_in" else weight)
    a, b = adapter["a"], adapter["b"]
    # Factors may be wider than x (bfloat16 activations) or narrower: neither is rounded to the other.
    added = (x.astype(jnp.promote_types(x.dtype, a.dtype)) @ a.T) @ b.T
    return base + (added * (jnp.asarray(alpha, added.dtype) / a.shape[-2])).astype(base.dtype)
