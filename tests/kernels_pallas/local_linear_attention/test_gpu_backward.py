"""The GPU kernels, forward and backward, in interpret mode against the reference and its gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.local_linear_attention import gpu
from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options
from tests.kernels_pallas.local_linear_attention.problems import (
    cotangents,
    error,
    expected,
    expected_gradients,
    problem,
)


def forward_and_gradients(inputs: Inputs, options: Options) -> tuple[Forward, dict[str, jax.Array]]:
    @jax.jit
    def run(inputs, cot):
        fwd = gpu.forward(inputs, options, interpret=True)
        back = gpu.backward(inputs, options, fwd, cot, interpret=True)
        dq = inputs.scale * back.logit + (back.solved if options.solve else 0)
        grads = {"q": dq, "k": back.dk, "v": back.dv, "scale": jnp.sum(inputs.q.astype(jnp.float32) * back.logit)}
        if options.solve:
            return fwd, grads | {"ridge": -jnp.sum(fwd.x * back.solved, -1)}
        return fwd, grads | {"probe": back.solved}

    return run(inputs, cotangents(inputs))


# Results: float32: 2^-24 a product, and 1 + x·c cancels where x is large (first rows): 5e-5. bfloat16: half a unit of
# the last place of what is rounded to it, 2^-8 of it at worst; x keeps 16 bits of every product, 2^-17, times a
# condition of some ten. float16: 2^-11 and the same 16 bits.
# Gradients: the same, times sums of terms that cancel, most of all in those of scale and ridge.
@pytest.mark.parametrize(
    ("dtype", "options", "sizes", "offset", "rounded", "x", "kept"),
    [
        ("float32", Options(max_iters=64), (2, 70, 70, 4, 2, 16, 24), 0, 5e-5, 5e-6, 5e-5),  # GQA, Hv != H
        ("bfloat16", Options(max_iters=64), (1, 150, 150, 2, 1, 64, 64), 0, 4e-3, 1e-4, 5e-4),
        ("float16", Options(max_iters=64), (1, 40, 40, 2, 2, 32, 32), 0, 1e-3, 1e-4, 1e-3),
        # No key is masked, not even padding.
        ("float32", Options(False, preconditioner="jacobi"), (1, 30, 128, 2, 1, 32, 32), 0, 5e-5, 5e-6, 5e-5),
        ("float32", Options(), (1, 30, 20, 2, 1, 32, 32), -4, 5e-5, 5e-6, 5e-5),  # the first rows see no key
        ("bfloat16", Options(solve=False), (1, 30, 90, 2, 1, 20, 32), 50, 4e-3, 1e-5, 5e-4),
    ],
)
def test_values_and_gradients(dtype, options, sizes, offset, rounded, x, kept):
    inputs = problem(dtype, sizes, offset=offset, probe=not options.solve)
    (result, actual), fwd = forward_and_gradients(inputs, options), expected(inputs, options)
    assert result.out.dtype == inputs.q.dtype
    assert error(result.out, fwd.out) < rounded
    assert error(result.x, fwd.x) < x
    assert error(result.mean, fwd.mean) < x
    assert error(result.lse, fwd.lse) < 1e-5
    iterations = np.asarray(result.iterations)
    assert ((iterations > 0) & (iterations < options.max_iters)).all() if options.solve else not iterations.any()
    wanted = expected_gradients(inputs, options, cotangents(inputs))
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert error(gradient, wanted[name]) < (rounded if name in "kv" else kept), name
    if offset < 0:
        for array in (result.out, result.x, result.mean, actual["q"]):
            assert not np.asarray(array[:, :-offset]).any()
        assert (np.asarray(result.lse[:, :-offset]) == -np.inf).all()
