"""The kernels, interpreted, equal the equation; what they cannot take they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import expert_ffn as op
from kernels_pallas.expert_ffn import gpu, tpu
from tests.kernels_pallas.expert_ffn.problems import expected, problem

# Float32: sums of a few hundred products of order one. Bfloat16: the hidden activations are rounded to it as well.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 4e-2}
NAMES = ("pallas_tpu", "pallas_gpu")


@functools.partial(jax.jit, static_argnames=("name", "activation", "limit"))
def interpreted(x, up, down, scores, active=None, *, name, activation="silu", limit=None):
    return op._run(x, up, down, scores, active, activation, limit, name, interpret=True)


def compare(name, dtype=jnp.float32, activation="silu", limit=None, poison=True, **options):
    x, up, down, scores = problem(**{"width": 256, "size": 32, **options}, dtype=dtype)
    want = expected(x, up, down, scores, activation=activation)
    if poison:  # an inactive expert is not read
        off = ~(scores != 0).any(0)[:, None, None]
        up, down = (jnp.where(off, jnp.nan, w).astype(dtype) for w in (up, down))
    out = interpreted(x, up, down, scores, name=name, activation=activation, limit=limit)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), np.asarray(want, np.float64), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on", [(), (2,), (5,), (1, 3, 4), range(6)], ids=str)
def test_any_number_of_active_experts(name, on):
    compare(name, on=on)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_and_many(name):
    compare(name, tokens=1)
    compare(name, tokens=33)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [3, 16])
def test_bfloat16(name, tokens):
    compare(name, dtype=jnp.bfloat16, tokens=tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations(name, activation):
    compare(name, activation=activation)


@pytest.mark.parametrize("name", NAMES)
def test_large_experts_one_a_step_and_in_parts(name, monkeypatch):
    compare(name, size=128, width=128, experts=3, on=(0, 2))
    # 1 MiB of slabs and room for less: the TPU kernel reads them in four parts.
    monkeypatch.setattr(tpu, "VMEM_BYTES", 400_000)
    compare(name, size=256, width=256, experts=3, on=(0, 2), seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_is_the_dense_form_where_more_are_active(name):
    compare(name, limit=4, on=(1, 3, 4))
    compare(name, limit=3, on=(1, 3, 4))
    compare(name, limit=2, on=(1, 3, 4), poison=False)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_vmap_of_a_kernel(name):
    x, up, down, scores = problem(width=128, size=32)

    def loss(x, up, scores):
        return (interpreted(x, up, down, scores, name=name) * jnp.cos(jnp.arange(128))).sum()

    got = jax.grad(loss, (0, 1, 2))(x, up, scores)
    active = (scores != 0).any(0)

    def dense(x, up, scores):
        y = op.dense_expert_ffn(x, up, down, jnp.where(active, scores, 0))
        return (y * jnp.cos(jnp.arange(128))).sum()

    for a, b in zip(got, jax.grad(dense, (0, 1, 2))(x, up, scores), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of 128 numbers in float32, up to 30 in size
    ups = jnp.stack([up, up[::-1]])
    mapped = jax.vmap(lambda up: interpreted(x, up, down, scores, name=name))(ups)
    for one, weights in zip(mapped, ups, strict=True):
        np.testing.assert_allclose(one, expected(x, weights, down, scores), atol=1e-5)


def test_refusals():
    def refusals(tokens=8, width=256, size=64, dtype=jnp.bfloat16, other=None):
        x = jax.ShapeDtypeStruct((tokens, width), dtype)
        weights = jax.ShapeDtypeStruct((8, size, width), other or dtype)
        return tuple(module.refusal(x, weights, weights, 8) for module in (tpu, gpu))

    assert refusals() == (None, None)
    for options, on_tpu, on_gpu in [
        ({"width": 192}, "D is 192, expected a multiple of 128", "D is 192, expected a multiple of 128"),
        ({"size": 40}, "de is 40, expected a multiple of 16 for bfloat16", "de is 40, expected a multiple of 32"),
        ({"other": jnp.float32}, "dtypes are bfloat16, float32, float32", "dtypes are bfloat16, float32, float32"),
        ({"dtype": jnp.float16}, "expected all float32 or all bfloat16", None),
        ({"tokens": 129}, None, "x has 129 tokens, expected at most 128"),
        ({"tokens": 8192, "width": 2048}, "do not fit in", "expected at most 128"),
    ]:
        for found, wanted in zip(refusals(**options), (on_tpu, on_gpu), strict=True):
            assert (found is None) == (wanted is None), (options, found)
            assert wanted is None or wanted in found
    for name in NAMES:
        with pytest.raises(ValueError, match="cannot take this call: D is 16"):
            op._run(*problem(), None, "silu", None, name, interpret=True)
