"""The fused residual, norm and modulation: every implementation equals the equation, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from kernels_pallas.modulated_residual import gpu, modulated_residual, modulated_residual_rows, run_kernel, tpu, xla
from kernels_pallas.modulated_residual.problem import order_of, poison
from kernels_pallas.modulated_residual.reference import reference

EPS = 1e-6
KERNELS = {"tpu": tpu, "gpu": gpu}
# Samples, tokens, width, branches: odd lengths, a width that is no power of two, blocks that reach past the end.
SHAPES = [(2, 5, 40, 0), (2, 17, 96, 2), (1, 150, 192, 1), (3, 33, 130, 3)]


def problem(samples, tokens, width, count, dtype=jnp.float32, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 2 * count + 3))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    x = draw(samples, tokens, width) + 1
    branches = tuple(draw(samples, tokens, width) for _ in range(count))
    gates = tuple(draw(samples, width) for _ in range(count))
    return x, branches, gates, draw(samples, width), draw(samples, width)


def exact(arrays):
    """The equation in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arrays)
        return jax.tree.map(np.asarray, reference(*wide, EPS))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_equation(name, shape, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 16 * shape[2])  # several chunks, and steps, already in small problems
    arrays = problem(*shape)
    found = KERNELS[name].forward(*arrays, EPS, interpret=True)
    for value, expected in zip(found, exact(arrays), strict=True):
        # A few roundings of float32 for sums of up to 200 numbers of size 1.
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_rounds_the_stream_before_the_norm(name):
    arrays = problem(2, 17, 96, 2, jnp.bfloat16)
    new, h = KERNELS[name].forward(*arrays, EPS, interpret=True)
    expected, normal = reference(*arrays, EPS)
    assert new.dtype == h.dtype == jnp.bfloat16
    # Equal, but for sums next to a tie of rounding; then one unit in the last place, 2^-7 of the value.
    np.testing.assert_allclose(new.astype(float), expected.astype(float), rtol=2**-7)
    np.testing.assert_allclose(h.astype(float), normal.astype(float), rtol=2**-7, atol=0.02)
    assert np.mean(np.asarray(new) == np.asarray(expected)) > 0.99


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(2, 17, 96, 2), (2, 150, 40, 1)])
def test_gradients_of_kernels(name, shape, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 16 * shape[2])
    arrays = problem(*shape)
    weights = [jax.random.normal(jax.random.key(k), arrays[0].shape) for k in (1, 2)]

    def loss(run):
        def of(*arrays):
            new, h = run(*arrays)
            return jnp.vdot(new, weights[0]) + jnp.vdot(h, weights[1])

        return of

    ours = jax.grad(loss(functools.partial(run_kernel, KERNELS[name], eps=EPS, interpret=True)), tuple(range(5)))
    naive = jax.grad(loss(functools.partial(reference, eps=EPS)), tuple(range(5)))
    for value, expected in zip(jax.tree.leaves(ours(*arrays)), jax.tree.leaves(naive(*arrays)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-4)  # sums over 150 tokens in float32


def test_gradient_of_the_equation_is_that_of_differences(x64):
    arrays = jax.tree.map(lambda a: a.astype(jnp.float64), problem(1, 3, 5, 1))

    def of(*arrays):
        return tuple(modulated_residual(*jax.tree.map(jnp.asarray, arrays)))

    check_grads(of, arrays, order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["xla", *KERNELS])
@pytest.mark.parametrize("compute", [[False, True, False, True], [False] * 4, [True] * 4])
def test_rows(name, compute, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 16 * 40)
    arrays, limit = problem(4, 70, 40, 2), 3
    order, rows, count = order_of(jnp.array(compute), limit)
    if name == "xla":
        new, h = xla.forward_rows(*arrays[:4], poison(arrays[4], count, limit), EPS, order, count, limit)
    else:
        module, scale = KERNELS[name], poison(arrays[4], count, limit)
        new, h = module.forward_rows(*arrays[:4], scale, EPS, order, count, limit, interpret=True)
    expected, normal = reference(*arrays, EPS)
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-5)
    assert h.shape == (limit, 70, 40)
    ids = [k for k, flag in enumerate(compute) if flag]
    assert int(count) == len(ids)
    if len(ids) > limit:
        assert np.isnan(h).all()
        return
    assert rows.tolist() == ids + [4] * (limit - len(ids))
    np.testing.assert_allclose(h[: len(ids)], normal[jnp.array(ids, int)], rtol=1e-5, atol=1e-5)


def test_rows_and_a_cache_are_what_each_sample_alone_would_do():
    """A branch on packed rows, its outputs put back: as if every sample had been served by itself."""
    x, branches, _, shift, scale = problem(4, 6, 8, 1)
    cache, compute = branches[0], jnp.array([True, False, True, False])

    def branch(h):
        return jnp.tanh(h) * 2

    @jax.jit
    def served(x, cache, compute):
        out = modulated_residual_rows(x, (), (), shift, scale, compute, limit=2)
        return cache.at[out.rows].set(branch(out.h), mode="drop")

    alone = jnp.where(compute[:, None, None], branch(modulated_residual(x, (), (), shift, scale).h), cache)
    np.testing.assert_allclose(served(x, cache, compute), alone, rtol=1e-6, atol=1e-6)


def test_limits():
    x, branches, gates, shift, scale = problem(2, 4, 16, 2)
    zero = jnp.zeros_like(shift)
    plain = modulated_residual(x, branches, (zero, zero), zero, zero)
    np.testing.assert_array_equal(plain.x, x)
    np.testing.assert_allclose(plain.h.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(plain.h.std(-1), 1, rtol=1e-5)
    # One after the other is all at once, in exact sums.
    first = modulated_residual(x, branches[:1], gates[:1], shift, scale)
    both = modulated_residual(first.x, branches[1:], gates[1:], shift, scale)
    np.testing.assert_allclose(both.h, modulated_residual(x, branches, gates, shift, scale).h, rtol=1e-5, atol=1e-5)
    constant = modulated_residual(jnp.full((1, 2, 16), 3.0), (), (), shift[:1], scale[:1])
    np.testing.assert_allclose(constant.h, jnp.broadcast_to(shift[:1, None], (1, 2, 16)), atol=1e-6)


def test_jit_vmap_and_eight_devices():
    arrays = problem(8, 4, 16, 2)
    expected = modulated_residual(*arrays)
    mapped = jax.jit(jax.vmap(modulated_residual))(*jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), arrays))
    np.testing.assert_allclose(mapped.h.reshape(8, 4, 16), expected.h, rtol=1e-5, atol=1e-5)
    mesh, spec = Mesh(jax.devices(), ("data",)), PartitionSpec("data")
    split = jax.device_put(arrays, NamedSharding(mesh, spec))
    np.testing.assert_allclose(jax.jit(modulated_residual)(*split).h, expected.h, rtol=1e-5, atol=1e-5)

    def kernel(*arrays):
        out = run_kernel(tpu, *arrays, EPS, True)
        return out.x, out.h

    within = jax.shard_map(kernel, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    np.testing.assert_allclose(within(*split)[1], expected.h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((2, 4))}, ValueError, r"x has shape \(2, 4\), expected \[B, N, D\]"),
        ({"x": jnp.ones((2, 0, 8))}, ValueError, "none of them zero"),
        ({"x": jnp.ones((2, 4, 8), int)}, TypeError, "x has dtype int32"),
        ({"gates": []}, ValueError, "1 branches and 0 gates"),
        ({"branches": [jnp.ones((2, 5, 8))]}, ValueError, r"branches\[0\] has shape \(2, 5, 8\), expected \(2, 4, 8\)"),
        ({"gates": [jnp.ones((3, 8))]}, ValueError, r"gates\[0\] has shape"),
        ({"shift": jnp.ones((2, 1))}, ValueError, "shift has shape"),
        ({"scale": jnp.ones((2, 8), bool)}, TypeError, "scale has dtype bool"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"implementation": "pallas_tpu"}, ValueError, "cannot run on platform 'cpu'"),
        ({"implementation": "cuda"}, ValueError, "expected one of"),
        ({"compute": jnp.ones(3, bool)}, ValueError, r"compute is bool\[3\], expected bool\[2\]"),
        ({"compute": jnp.ones(2)}, ValueError, "expected bool"),
        ({"compute": jnp.ones(2, bool), "limit": 3}, ValueError, "limit is 3, expected an integer from 1 to the 2"),
        ({"compute": jnp.ones(2, bool), "limit": 0}, ValueError, "limit is 0"),
    ],
)
def test_bad_input(change, error, message):
    x, mod = jnp.ones((2, 4, 8)), jnp.ones((2, 8))
    arguments = {"x": x, "branches": [x], "gates": [mod], "shift": mod, "scale": mod} | change
    with pytest.raises(error, match=message):
        (modulated_residual_rows if "compute" in change else modulated_residual)(**arguments)


@pytest.mark.parametrize("module", [tpu, gpu])
def test_kernels_say_what_they_cannot_take(module):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, mod = array(2, 256, 1152), array(2, 1152)
    assert module.refusal(x, [x] * 8, [mod] * 8, mod, mod) is None
    assert "dtypes" in module.refusal(x, [array(2, 256, 1152, dtype=jnp.float32)], [mod], mod, mod)
    assert "branches, expected at most" in module.refusal(x, [x] * 17, [mod] * 17, mod, mod)
    wide = array(2, 256, 2**20)
    assert "rows" in module.refusal(wide, [], [], array(2, 2**20), array(2, 2**20))
