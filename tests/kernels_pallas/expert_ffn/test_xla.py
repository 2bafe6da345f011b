"""The loop over active experts equals the equation, skips the others for real, and so do its gradient and its vmap.

What could be wrong unnoticed: an expert of negative score left out, a part of the union dropped where it is larger than
``max_active``, gradients of scores that are zero, an example's experts counting for another one, NaN hidden by a skip.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.expert_ffn import dense_expert_ffn, expert_ffn
from kernels_pallas.expert_ffn.problem import active_experts
from tests.kernels_pallas.expert_ffn.problems import expected, problem

ALL = 6
W = jnp.cos(jnp.arange(16.0))
# Sums of a few dozen products of order one, in another order.
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-12}


@functools.partial(jax.jit, static_argnames=("activation", "max_active"))
def run(x, up, down, scores, active=None, activation="silu", max_active=ALL):
    return expert_ffn(x, up, down, scores, active=active, activation=activation, max_active=max_active)


def poisoned(scores, *weights):
    """The weights, NaN where no score is."""
    off = ~(scores != 0).any(0)[:, None, None]
    return [jnp.where(off, jnp.nan, w).astype(w.dtype) for w in weights]


@pytest.mark.parametrize("tokens", [1, 5])
@settings(max_examples=10, deadline=None)
@given(on=st.sets(st.integers(0, 5)), seed=st.integers(0, 9))
def test_any_union_is_the_equation_and_nothing_else_is_read(tokens, on, seed):
    x, up, down, scores = problem(tokens=tokens, on=tuple(on), seed=seed)
    out = run(x, *poisoned(scores, up, down), scores)
    np.testing.assert_allclose(out, expected(x, up, down, scores), atol=TOLERANCE[jnp.float32])
    np.testing.assert_allclose(out, dense_expert_ffn(x, up, down, scores), atol=TOLERANCE[jnp.float32])


def test_active_experts_are_listed_in_order():
    for on in ([], [0], [5], [1, 2, 4], list(range(6))):
        ids, number = active_experts(jnp.zeros(6, bool).at[jnp.array(on, int)].set(True))
        assert ids.tolist() == on + [0] * (6 - len(on))
        assert int(number) == len(on)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations(activation):
    args = problem()
    want = expected(*args, activation=activation)
    np.testing.assert_allclose(run(*args, activation=activation), want, atol=1e-5)
    np.testing.assert_allclose(dense_expert_ffn(*args, activation=activation), want, atol=1e-5)


def test_float64_and_bfloat16(x64):
    args = problem(dtype=jnp.float64)
    np.testing.assert_allclose(run(*args), expected(*args), atol=TOLERANCE[jnp.float64])
    half = problem(dtype=jnp.bfloat16)
    out = run(*half)
    assert out.dtype == jnp.bfloat16
    wide = expected(*(a.astype(jnp.float32) for a in half))
    # Only the result is rounded to bfloat16: 2^-9 of values up to 4.
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=2e-2)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, None])
def test_more_active_experts_than_the_limit_are_never_dropped(limit):
    args = problem()
    np.testing.assert_allclose(run(*args, max_active=limit), expected(*args), atol=1e-5)


def test_explicit_active_experts_are_the_only_ones():
    x, up, down, scores = problem(on=range(6))
    active = jnp.array([True, False, False, True, False, False])
    scores = scores.at[:, 1].set(jnp.nan)  # not read
    for limit in (ALL, 1):  # the loop, and the dense form
        np.testing.assert_allclose(
            run(x, up, down, scores, active, max_active=limit),
            expected(x, up, down, jnp.where(active, scores, 0)),
            atol=1e-5,
        )


def test_nan_is_not_hidden():
    x, up, down, scores = problem()
    out = run(x, up, down, scores.at[2, 0].set(jnp.nan))
    assert np.isnan(out).all(1).tolist() == [False, False, True, False, False]
    assert not run(x, up, down, scores * 0).any()


def test_leading_axes_share_one_union():
    x, up, down, scores = problem(tokens=6)
    out = expert_ffn(x.reshape(2, 3, 16), up, down, scores.reshape(2, 3, 6))
    np.testing.assert_allclose(out.reshape(6, 16), expected(x, up, down, scores), atol=1e-5)
    assert expert_ffn(x[0], up, down, scores[0]).shape == (16,)
    assert expert_ffn(x[:0], up, down, scores[:0]).shape == (0, 16)


def loss(function, x, up, down, scores):
    return (function(x, up, down, scores) * W).sum()


def gated(active):
    """The dense form with the definition of the gradient: a score outside of ``active`` has none."""
    return lambda x, up, down, scores: dense_expert_ffn(x, up, down, jnp.where(active, scores, 0))


def close(got, want, atol=1e-11):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_gradient_is_that_of_the_dense_form(x64):
    args = problem(dtype=jnp.float64)
    active = (args[3] != 0).any(0)
    got = jax.grad(functools.partial(loss, run), (0, 1, 2, 3))(*args)
    close(got, jax.grad(functools.partial(loss, gated(active)), (0, 1, 2, 3))(*args))
    assert not np.asarray(got[1])[~np.asarray(active)].any()
    assert not np.asarray(got[3])[:, ~np.asarray(active)].any()
    # Inactive experts are not read backwards either: NaN there would reach the gradient of x.
    x, up, down, scores = args
    poison = jax.grad(functools.partial(loss, run), (0, 1, 2, 3))(x, *poisoned(scores, up, down), scores)
    close(poison, got)


def test_a_learned_scale_of_zero_learns_where_active_says_so(x64):
    """With gamma = 0 every score of an expert is zero, but not what gamma's gradient is made of."""
    x, up, down, hidden = problem(on=(1, 3), dtype=jnp.float64)
    gamma = jnp.array([1.0, 0, 1, 1, 1, 1])
    active = (hidden != 0).any(0)

    def scaled(function):
        return jax.grad(lambda gamma: loss(function, x, up, down, hidden * gamma))(gamma)

    want = scaled(dense_expert_ffn)
    assert abs(want[1]) > 0.1
    close(scaled(lambda *args: run(*args, active)), want)
    close(scaled(run), want.at[1].set(0))  # documented: without `active` such an expert is not there


def test_second_derivatives_in_both_modes(x64):
    args = problem(dtype=jnp.float64)
    dense = gated((args[3] != 0).any(0))

    def squares(function):
        return lambda *args: sum((g**2).sum() for g in jax.grad(functools.partial(loss, function), (0, 1, 3))(*args))

    close(jax.grad(squares(run), (0, 1, 2, 3))(*args), jax.grad(squares(dense), (0, 1, 2, 3))(*args), 1e-9)
    pushed = [
        jax.jvp(jax.grad(functools.partial(loss, f), (0, 1, 2, 3)), args, args)[1] for f in (run, dense)
    ]  # fmt: skip
    close(*pushed)


def examples():
    """Three examples with unions of their own, and three sets of weights."""
    x, up, down, _ = problem(dtype=jnp.float64)
    xs = jnp.stack([x, x[::-1], 2 * x])
    scores = jnp.stack([problem(on=on, dtype=jnp.float64, seed=7)[3] for on in ((0, 1), (1, 5), ())])
    return xs, jnp.stack([up, up + 1, -up]), down, scores


@pytest.mark.parametrize("axes", [(0, None, None, 0), (None, 0, None, None), (0, 0, None, 0), (None, None, None, 0)])
def test_vmap_and_gradients_under_it(x64, axes):
    xs, ups, down, scores = examples()
    args = [a if axis == 0 else a[0] for a, axis in zip((xs, ups), axes[:2], strict=True)]
    args += [down, scores if axes[3] == 0 else scores[0]]

    def one(index):
        return [a if axis is None else a[index] for a, axis in zip(args, axes, strict=True)]

    out = jax.jit(jax.vmap(run, axes))(*args)
    close(list(out), [expected(*one(i)) for i in range(3)])
    gradient = jax.grad(functools.partial(loss, run), (0, 1, 2, 3))
    got = jax.jit(jax.vmap(gradient, axes))(*args)
    want = [gradient(*one(i)) for i in range(3)]
    close(got, jax.tree.map(lambda *g: jnp.stack(g), *want))
    total = jax.grad(lambda down: jax.vmap(functools.partial(loss, run), axes)(args[0], args[1], down, args[3]).sum())
    close(total(down), got[2].sum(0))


def test_vmap_of_vmap(x64):
    xs, ups, down, scores = examples()
    inner = jax.vmap(run, (0, None, None, 0))
    got = jax.vmap(inner, (None, 0, None, None))(xs, ups, down, scores)
    other = jax.vmap(jax.vmap(run, (None, 0, None, None)), (0, None, None, 0))(xs, ups, down, scores)
    want = jnp.stack([jnp.stack([expected(x, up, down, s) for x, s in zip(xs, scores, strict=True)]) for up in ups])
    close(got, want)
    close(other, want.swapaxes(0, 1))


def test_eight_devices():
    x, up, down, scores = problem(tokens=16, size=8)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    want = expected(x, up, down, scores)

    def put(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    np.testing.assert_allclose(run(put(x, "d"), up, down, put(scores, "d")), want, atol=1e-5)
    np.testing.assert_allclose(run(x, put(up, None, "d"), put(down, None, "d"), scores), want, atol=1e-5)

    def total(x, up, down, scores):
        return jax.lax.psum(loss(functools.partial(expert_ffn, max_active=ALL), x, up, down, scores), "d")

    spec = PartitionSpec("d")
    mapped = jax.shard_map(
        total, mesh=mesh, in_specs=(spec, PartitionSpec(), PartitionSpec(), spec), out_specs=PartitionSpec()
    )
    got = jax.jit(jax.grad(mapped, (1, 2)))(x, up, down, scores)
    want = jax.grad(functools.partial(loss, dense_expert_ffn), (1, 2))(x, up, down, scores)
    close(got, want, 1e-4)


def test_bad_input():
    x, up, down, scores = problem()
    for change, match in [
        ({"x": x[:, :8]}, r"x has shape \(5, 8\), expected \[..., 16\]"),
        ({"up": up[0]}, r"up has shape \(8, 16\), expected \[Ne, de, D\]"),
        ({"up": up[:0], "down": down[:0]}, "none of them zero"),
        ({"down": down.swapaxes(1, 2)}, r"down has shape \(6, 16, 8\), expected \(6, 8, 16\)"),
        ({"scores": scores[:, :5]}, r"scores has shape \(5, 5\), expected \(5, 6\)"),
        ({"scores": scores[:4]}, r"scores has shape \(4, 6\), expected \(5, 6\)"),
        ({"active": jnp.ones(5, bool)}, r"active has shape \(5,\), expected \(6,\)"),
        ({"max_active": 0}, "max_active is 0, expected 1 up to the 6 experts"),
        ({"max_active": 7}, "max_active is 7, expected 1 up to the 6 experts"),
        ({"implementation": "cuda"}, "implementation is 'cuda', expected one of"),
        ({"implementation": "pallas_tpu"}, "cannot run on platform 'cpu'"),
    ]:
        given = {"x": x, "up": up, "down": down, "scores": scores, **change}
        with pytest.raises(ValueError, match=match):
            expert_ffn(**given)
    with pytest.raises(TypeError, match="scores has dtype bool, expected a real floating type"):
        expert_ffn.__wrapped__(x, up, down, scores != 0)
    for function in (expert_ffn, dense_expert_ffn):
        with pytest.raises(ValueError, match="activation is 'tanh', expected one of silu, gelu, relu"):
            function.__wrapped__(x, up, down, scores, activation="tanh")
