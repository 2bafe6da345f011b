"""The TPU backward kernels in interpret mode against automatic differentiation of the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.local_linear_attention import tpu
from kernels_pallas.local_linear_attention.problem import Inputs, Options
from tests.kernels_pallas.local_linear_attention.problems import cotangents, error, expected_gradients, problem


def gradients(inputs: Inputs, options: Options, **static) -> dict[str, jax.Array]:
    cot = cotangents(inputs)
    static = {"interpret": True, "block": 128, **static}

    @jax.jit
    def run(inputs, cot):
        fwd = tpu.forward(inputs, options, **static)
        back = tpu.backward(inputs, options, fwd, cot, **static)
        dq = inputs.scale * back.logit + (back.solved if options.solve else 0)
        grads = {"q": dq, "k": back.dk, "v": back.dv, "scale": jnp.sum(inputs.q.astype(jnp.float32) * back.logit)}
        if options.solve:
            return grads | {"ridge": -jnp.sum(fwd.x * back.solved, -1)}
        return grads | {"probe": back.solved}

    return run(inputs, cot)


# float32: as the forward pass, times sums of cancelling terms. bfloat16: dk and dv are rounded, 2^-8 at worst; what is
# returned in float32 keeps 16 bits of every product, and terms of dscale and dridge cancel. float16: 2^-11 of rounding.
@pytest.mark.parametrize(
    ("dtype", "options", "sizes", "offset", "rounded", "kept"),
    [
        ("float32", Options(max_iters=64), (2, 70, 70, 4, 2, 16, 24), 0, 5e-5, 5e-5),
        ("float32", Options(max_iters=64), (1, 131, 131, 2, 1, 80, 130), 0, 5e-5, 5e-5),
        ("bfloat16", Options(max_iters=64), (1, 150, 150, 2, 1, 64, 64), 0, 4e-3, 5e-4),
        ("float16", Options(max_iters=64), (1, 40, 40, 2, 2, 32, 32), 0, 1e-3, 1e-3),
        ("float32", Options(is_causal=False), (1, 30, 150, 2, 2, 32, 32), 0, 5e-5, 5e-5),
        ("float32", Options(), (1, 30, 150, 2, 1, 32, 32), 120, 5e-5, 5e-5),
        ("float32", Options(), (1, 30, 20, 2, 1, 32, 32), -4, 5e-5, 5e-5),  # the first rows see no key
        ("float32", Options(solve=False), (1, 30, 150, 2, 1, 32, 32), 100, 5e-5, 5e-5),
        ("bfloat16", Options(is_causal=False, solve=False), (1, 30, 150, 2, 1, 128, 64), 0, 4e-3, 5e-4),
    ],
)
def test_gradients(dtype, options, sizes, offset, rounded, kept):
    inputs = problem(dtype, sizes, offset=offset, probe=not options.solve)
    actual, wanted = gradients(inputs, options), expected_gradients(inputs, options, cotangents(inputs))
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert error(gradient, wanted[name]) < (rounded if name in "kv" else kept), name
    if offset < 0:
        assert not np.asarray(actual["q"][:, :-offset]).any()


def test_weights_computed_again_give_the_same_gradients():
    inputs = problem("bfloat16", (1, 150, 150, 2, 1, 64, 64))
    kept, again = (gradients(inputs, Options(), is_cached=cached) for cached in (True, False))
    for name in kept:
        np.testing.assert_array_equal(np.asarray(kept[name], np.float32), np.asarray(again[name], np.float32))
