"""Lion's companions: AdamW's settings translated, momentum in bfloat16 that does not stall, packing of tiny leaves.

Lion keeps one momentum m where Adam keeps two moments, which halves the optimizer's memory:

    c = b1·m + (1 − b1)·g
    θ ← θ − lr·(sign(c) + λ·θ)
    m ← b2·m + (1 − b2)·g                     after its use, with the raw gradient

Chen et al., *Symbolic Discovery of Optimization Algorithms*, arXiv 2302.06675. The optimizer itself is `optax.lion` and
is not repeated here; note that its default ``weight_decay`` is 1e-3 where the paper's is 0. This module adds what it
lacks:

- `lion_from_adamw`: Lion's learning rate and weight decay from AdamW's.
- `scale_by_lion_lowp`, `lion_lowp`: float32 arithmetic on a momentum that is stored in a narrower type, with stochastic
  rounding, so that small gradients are not lost.
- `pack_tree`, `unpack_tree`, `pack_small_leaves`: one buffer for many tiny leaves.

The search that found Lion is in `jaxaccel.optim.symbolic`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from jaxaccel.optim import _checks


def lion_from_adamw(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule, *, ratio: float | int = 10.0
) -> tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule]:
    """Translate AdamW's learning rate and weight decay into Lion's.

        lr_lion = lr / ratio,    λ_lion = λ·ratio,    so that lr·λ is unchanged

    Source: arXiv 2302.06675, section on hyper-parameters: the rate 3 to 10 times lower, the decay as much higher.

    When: as the first guess for `optax.lion` from a tuned AdamW. When not: as a replacement for tuning; on small tasks
    the best ratio measured here was nearer to 3. A schedule is scaled as a whole: its first, peak and last values.

    Args:
        learning_rate: AdamW's rate, a number >= 0 or a schedule.
        weight_decay: AdamW's decoupled weight decay (multiplied by the rate, as in optax), a number >= 0 or a schedule.
        ratio: how many times shorter Lion's steps are to be, > 0.

    Returns:
        Lion's learning rate and weight decay, each a number or a schedule as it was given.

    Raises:
        ValueError: if ``ratio`` is not a finite number > 0, or a given number is negative or not finite.

    >>> lion_from_adamw(1e-3, 0.1)
    (0.0001, 1.0)
    >>> rate, decay = lion_from_adamw(optax.linear_schedule(0.0, 3e-3, 10), 0.1, ratio=3.0)
    >>> round(float(rate(10)), 6)
    0.001
    """
    _checks.check_positive("ratio", ratio)
    _checks.check_learning_rate(learning_rate)
    _checks.check_non_negative("weight_decay", weight_decay)
    # Division by the ratio and not multiplication by its inverse, so that 1e-3 becomes exactly 1e-4.
    lr = (lambda count: learning_rate(count) / ratio) if callable(learning_rate) else learning_rate / ratio
    decay = (lambda count: weight_decay(count) * ratio) if callable(weight_decay) else weight_decay * ratio
    return lr, decay


class ScaleByLionLowpState(NamedTuple):
    """State of `scale_by_lion_lowp`.

    Attributes:
        count: steps taken.
        mu: momentum.
        key: the words of the random key given at construction, or None without stochastic rounding. It never changes:
            each step and leaf derives its own, so that a restored run repeats exactly.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # int32; the name hides tuple.count, as in optax
    mu: optax.Updates  # the parameters' shapes, mu_dtype
    key: UInt32[Array, "words"] | None = None


def _round_stochastically(key: Array, x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Round ``x`` to a neighbour in the narrower ``dtype``, up or down with the odds that make the mean exact."""
    info = jnp.finfo(dtype)
    # A unit in the last place of x in the narrow type; below its smallest normal number the spacing stays constant.
    # frexp gives a mantissa in [0.5, 1), hence the − 1.
    exponent = jnp.maximum(jnp.frexp(x)[1] - 1, int(info.minexp)) - int(info.nmant)
    # ldexp and not a power: dividing by a power of two is exact. Two steps keep the scale itself in range.
    scaled = jnp.ldexp(x, -exponent)
    rounded = jnp.ldexp(jnp.floor(scaled + jax.random.uniform(key, x.shape, x.dtype)), exponent)
    # Infinities and NaN have no neighbours: they are stored as they are.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def scale_by_lion_lowp(
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    *,
    mu_dtype: Any = jnp.bfloat16,
    stochastic_rounding: bool = False,
    key: Array | None = None,
) -> optax.GradientTransformation:
    """Rescale gradients to Lion's direction (a sign; not negated), with the momentum stored in a narrow type.

        c = b1·m + (1 − b1)·g,    u = sign(c),    m ← round(b2·m + (1 − b2)·g)

    Source: arXiv 2302.06675 (which trains with bfloat16 momentum); arithmetic by `optax.scale_by_lion`.

    The increment (1 − b2)·(g − m) is about a hundredth of the gradient, and bfloat16 keeps eight bits. Rounded to
    nearest, the momentum stands still once the increment falls under half a unit in the last place. With a constant
    gradient of 0.3 it stops at 70 % of its fixed point in `optax.lion` with ``mu_dtype=bfloat16``, and at 83 % here
    without ``stochastic_rounding``: float32 arithmetic alone cannot help where the stored number does not move. With
    stochastic rounding the mean of the stored momentum is that of the exact one (measured: 99.99 %), and single entries
    fluctuate by about a unit in the last place (0.3 %).

    When: the memory of a float32 momentum matters and gradients change slowly. When not: on a CPU, where drawing a
    random number per parameter costs more than the saved bytes; there keep float32.

    Args:
        b1: rate of interpolation in the direction, in [0, 1).
        b2: decay rate of the momentum, in [0, 1).
        mu_dtype: dtype of the stored momentum; ``None`` keeps the parameters' dtypes. Arithmetic is float32 at least.
        stochastic_rounding: round up or down at random, without bias. It needs ``key``. No effect where ``mu_dtype``
            is as wide as the arithmetic.
        key: a random key, typed or uint32. The counter-based ``impl="rbg"`` is cheaper on accelerators.

    Returns:
        A transformation with state `ScaleByLionLowpState`. Updates keep the dtypes of the gradients.

    Raises:
        ValueError: if a rate is outside [0, 1), ``stochastic_rounding`` is asked for without a key, or a parameter or
            gradient is not real floating point (the leaf is named).
        TypeError: if ``mu_dtype`` is not real floating point.

    >>> import jax, jax.numpy as jnp
    >>> tx = scale_by_lion_lowp(stochastic_rounding=True, key=jax.random.key(0))
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> direction, state = tx.update({"w": jnp.array([0.5, -2.0])}, state)
    >>> direction["w"].tolist(), state.mu["w"].dtype.name
    ([1.0, -1.0], 'bfloat16')
    """
    _checks.check_beta("b1", b1)
    _checks.check_beta("b2", b2)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)
    if stochastic_rounding and key is None:
        raise ValueError("stochastic_rounding=True needs key=, a jax.random.key, got key=None")
    key_words = key_impl = None
    if stochastic_rounding and key is not None:
        typed = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        key_words, key_impl = jax.random.key_data(typed), jax.random.key_impl(typed)
    lion = optax.scale_by_lion(b1, b2)

    def init(params: Any) -> ScaleByLionLowpState:
        _check_floating("params", params)
        # A copy: a step that donates its state must not delete the words for the next init.
        words = None if key_words is None else jnp.copy(key_words)
        return ScaleByLionLowpState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype), words)

    def update(updates: Any, state: ScaleByLionLowpState, params: Any = None) -> tuple[Any, ScaleByLionLowpState]:
        del params
        _check_floating("updates", updates)
        _checks.check_same_structure("updates", updates, "the state", state.mu)

        def wide(g: Array, x: Array) -> Array:
            # Eight-bit floats do not promote, and need not be asked: float32 holds them.
            return x.astype(jnp.result_type(jnp.float32, *(a.dtype for a in (g, x) if a.dtype.itemsize > 1)))

        # These casts fuse with the arithmetic; only the narrow momentum is read from and written to memory.
        mu = jax.tree.map(wide, updates, state.mu)
        gradients = jax.tree.map(wide, state.mu, updates)
        direction, moved = lion.update(gradients, optax.ScaleByLionState(state.count, mu))
        if state.key is None:
            stored = optax.tree.cast_like(moved.mu, state.mu)
        else:
            leaves, treedef = jax.tree.flatten(moved.mu)
            step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=key_impl), state.count)
            rounded = [
                _round_stochastically(jax.random.fold_in(step_key, i), x, old.dtype)
                if jnp.finfo(old.dtype).nmant < jnp.finfo(x.dtype).nmant
                else x.astype(old.dtype)
                for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(state.mu), strict=True))
            ]
            stored = jax.tree.unflatten(treedef, rounded)
        return optax.tree.cast_like(direction, updates), ScaleByLionLowpState(moved.count, stored, state.key)

    return optax.GradientTransformation(init, update)


def lion_lowp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    mu_dtype: Any = jnp.bfloat16,
    stochastic_rounding: bool = False,
    key: Array | None = None,
) -> optax.GradientTransformation:
    """Return Lion with a momentum stored in a narrow type, and decoupled weight decay.

        θ ← θ − lr·(u + weight_decay·θ),    u from `scale_by_lion_lowp`

    Source: arXiv 2302.06675. When and when not: as `scale_by_lion_lowp`; with a float32 momentum use `optax.lion`.

    Args:
        learning_rate: a number >= 0 or a schedule.
        b1: as in `scale_by_lion_lowp`; 0.95 for language models.
        b2: as in `scale_by_lion_lowp`; 0.98 for language models.
        weight_decay: a number >= 0 or a schedule. The default is the paper's 0, not optax's 1e-3.
        mask: which leaves decay: a tree of booleans, or a function of the parameters, as in ``optax.lion``.
        mu_dtype: as in `scale_by_lion_lowp`.
        stochastic_rounding: as in `scale_by_lion_lowp`.
        key: as in `scale_by_lion_lowp`.

    Returns:
        A transformation to be used with ``optax.apply_updates``. Under ``optax.inject_hyperparams`` name the arguments
        that are no numbers: ``static_args=("mask", "mu_dtype", "stochastic_rounding", "key")``.

    Raises:
        ValueError: if a number is out of range, or as in `scale_by_lion_lowp`.
        TypeError: if ``mu_dtype`` is not real floating point.

    >>> import jax.numpy as jnp
    >>> tx = lion_lowp(1e-4, weight_decay=0.1)
    >>> w = jnp.array([1.0, -1.0])
    >>> updates, state = tx.update(jnp.array([0.5, 0.0]), tx.init(w), w)
    >>> [round(float(u), 6) for u in updates]  # −1e-4·(1 + 0.1·1) and −1e-4·(0 − 0.1·1)
    [-0.00011, 1e-05]
    """
    _checks.check_learning_rate(learning_rate)
    _checks.check_non_negative("weight_decay", weight_decay)
    # A weight decay that is known to be zero must not ask for parameters that it does not read.
    no_decay = mask is None and _checks.concrete(weight_decay) == 0.0
    return optax.chain(
        scale_by_lion_lowp(b1, b2, mu_dtype=mu_dtype, stochastic_rounding=stochastic_rounding, key=key),
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _check_floating(name: str, tree: Any) -> None:
    """Raise ``ValueError`` naming the first leaf that is not real floating point."""
    try:
        _checks.check_floating_tree(name, tree)
    except TypeError as error:
        raise ValueError(str(error)) from None


class PackedTree(NamedTuple):
    """A tree whose small leaves lie in one buffer per dtype.

    Attributes:
        buffers: by dtype name, all small leaves of that dtype, one after the other, [total size].
        large: the other leaves, in their order and shapes.
    """

    buffers: dict[str, Float[Array, "_"]]
    large: tuple[Array, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PackLayout:
    """Where each leaf of a packed tree lies. Hashable, and without arrays: pass it through ``jit`` or close over it."""

    treedef: Any
    """Structure of the tree."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each leaf."""
    groups: tuple[str | None, ...]
    """The buffer of each leaf, None for a large one."""


def _layout(tree: Any, threshold: int) -> PackLayout:
    if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 1:
        raise ValueError(f"threshold must be a whole number >= 1, got threshold={threshold!r}")
    _check_floating("tree", tree)
    leaves, treedef = jax.tree.flatten(tree)
    return PackLayout(
        treedef,
        tuple(jnp.shape(leaf) for leaf in leaves),
        tuple(jnp.result_type(leaf).name if jnp.size(leaf) < threshold else None for leaf in leaves),
    )


def _pack(tree: Any, layout: PackLayout) -> PackedTree:
    leaves = layout.treedef.flatten_up_to(tree)
    members: dict[str, list[Array]] = {}
    for leaf, group in zip(leaves, layout.groups, strict=True):
        if group is not None:
            members.setdefault(group, []).append(jnp.reshape(leaf, -1))
    large = tuple(leaf for leaf, group in zip(leaves, layout.groups, strict=True) if group is None)
    return PackedTree({group: jnp.concatenate(parts) for group, parts in sorted(members.items())}, large)


def pack_tree(tree: Any, *, threshold: int = 4096) -> tuple[PackedTree, PackLayout]:
    """Join the leaves of fewer than ``threshold`` elements into one buffer per dtype.

    When: a model has hundreds of leaves under about 4,000 elements, and the parameters *stay* packed: keep the packed
    tree as the training state, let the loss call `unpack_tree`, and differentiate with respect to the packed tree. The
    gradients then arrive packed, and any optimizer that acts on each element alone sees a single leaf. When not: for
    large leaves (they gain nothing), for transforms that look at whole leaves (trust ratios, factored moments, masks by
    name), or where small leaves are sharded differently from one another.

    Measured on two CPU cores with 1,000 leaves of 1,000 float32 elements, jitted and donated: an update of `optax.lion`
    took 0.9 ms packed and 10.4 ms plain; with the gradient of a sum over all leaves 2.0 and 11.0 ms.
    ``python -m experiments bench`` repeats it.

    Args:
        tree: parameters or anything of floating leaves.
        threshold: leaves with fewer elements are packed, >= 1.

    Returns:
        The packed tree, and the layout with which `unpack_tree` restores the original.

    Raises:
        ValueError: if ``threshold`` is not a whole number >= 1 or a leaf is not real floating point.

    >>> import jax, jax.numpy as jnp, optax
    >>> params = {"scale": jnp.ones(3), "bias": jnp.zeros(()), "kernel": jnp.ones((100, 100))}
    >>> packed, layout = pack_tree(params)
    >>> {name: buffer.shape for name, buffer in packed.buffers.items()}, len(packed.large)
    ({'float32': (4,)}, 1)
    >>> loss = lambda packed: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(unpack_tree(packed, layout)))
    >>> tx = optax.lion(1e-3)
    >>> updates, state = tx.update(jax.grad(loss)(packed), tx.init(packed), packed)
    >>> unpack_tree(optax.apply_updates(packed, updates), layout)["scale"].shape
    (3,)
    """
    layout = _layout(tree, threshold)
    return _pack(tree, layout), layout


def unpack_tree(packed: PackedTree, layout: PackLayout) -> Any:
    """Return the tree that `pack_tree` packed; differentiable in both modes.

    Args:
        packed: as made by `pack_tree`, or updates or gradients of such a tree; its dtypes are kept.
        layout: as made by `pack_tree`.

    Returns:
        A tree of the original structure and shapes.

    Raises:
        ValueError: if the buffers do not have the sizes that the layout needs.

    >>> import jax.numpy as jnp
    >>> unpack_tree(*pack_tree((jnp.arange(3.0), [jnp.ones((1, 2))])))
    (Array([0., 1., 2.], dtype=float32), [Array([[1., 1.]], dtype=float32)])
    """
    sizes: dict[str, list[int]] = {}
    for shape, group in zip(layout.shapes, layout.groups, strict=True):
        if group is not None:
            sizes.setdefault(group, []).append(math.prod(shape))
    wanted = {group: sum(parts) for group, parts in sizes.items()}
    got = {group: buffer.size for group, buffer in packed.buffers.items()}
    if got != wanted or len(packed.large) != layout.groups.count(None):
        raise ValueError(
            f"packed does not fit the layout: got buffers {got} and {len(packed.large)} large leaves, "
            f"expected {wanted} and {layout.groups.count(None)}"
        )
    # split and not slices: its transpose is one concatenation, where that of n slices is n padded buffers.
    parts = {group: iter(jax.lax.split(packed.buffers[group], sizes[group])) for group in sizes}
    large = iter(packed.large)
    return layout.treedef.unflatten(
        next(large) if group is None else next(parts[group]).reshape(shape)
        for shape, group in zip(layout.shapes, layout.groups, strict=True)
    )


class PackSmallLeavesState(NamedTuple):
    """State of `pack_small_leaves`.

    Attributes:
        inner_state: state of the wrapped transformation for a `PackedTree`: one buffer per dtype for all small leaves.
    """

    inner_state: Any


def pack_small_leaves(
    tx: optax.GradientTransformation, *, threshold: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Let ``tx`` see the leaves of fewer than ``threshold`` elements as one buffer per dtype.

    The state of ``tx`` stays packed from step to step. Gradients and parameters arrive as leaves, so they are
    concatenated in each step and the updates are cut apart again; that copying eats most of the gain. Measured on two
    CPU cores with `optax.lion` and 1,000 leaves of 1,000 elements: 7.4 ms per update here, 10.4 ms for plain leaves,
    and 0.9 ms with `pack_tree`, which avoids the copies and is the form to prefer. Compilation took 11 s in place of 3.

    When: only the optimizer is yours to change, and ``tx`` acts on each element alone (lion, adam, sgd, weight decay,
    learning rates, schedules). When not: ``tx`` looks at leaves or at names (`optax.lamb`, `optax.adafactor`, masks by
    name, per-leaf clipping): it would see the buffer as one leaf, and nothing can warn of it. Clipping by global norm
    is safe.

    Args:
        tx: the element-wise transformation.
        threshold: leaves with fewer elements are packed, >= 1; others pass untouched.

    Returns:
        A transformation with state `PackSmallLeavesState`; extra arguments are handed to ``tx``.

    Raises:
        ValueError: if ``threshold`` is not a whole number >= 1, a leaf is not real floating point, or (in ``update``)
            gradients and parameters do not match.

    >>> import jax.numpy as jnp, optax
    >>> tx = pack_small_leaves(optax.lion(1e-3, weight_decay=0.0))
    >>> params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    >>> state = tx.init(params)
    >>> [m.shape for m in jax.tree.leaves(state) if m.ndim]  # one momentum for both
    [(6,)]
    >>> updates, state = tx.update(params, state, params)
    >>> jax.tree.map(jnp.shape, updates)
    {'a': (2,), 'b': (2, 2)}
    """
    _layout((), threshold)  # reports a bad threshold here, not in the first step
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> PackSmallLeavesState:
        return PackSmallLeavesState(tx.init(pack_tree(params, threshold=threshold)[0]))

    def update(
        updates: Any, state: PackSmallLeavesState, params: Any = None, **extra: Any
    ) -> tuple[Any, PackSmallLeavesState]:
        # The parameters' dtypes decide, as they did in init; gradients may differ.
        layout = _layout(updates if params is None else params, threshold)
        if params is not None:
            _checks.check_same_structure("updates", updates, "params", params)
        values = None if params is None else _pack(params, layout)
        moved, inner_state = tx.update(_pack(updates, layout), state.inner_state, values, **extra)
        return optax.tree.cast_like(unpack_tree(moved, layout), updates), PackSmallLeavesState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
