"""Problems of the union kernel: random ones with a chosen set of active experts."""

import jax
import jax.numpy as jnp

from kernels_pallas.expert_ffn.reference import naive

expected = jax.jit(naive, static_argnames="activation")


def problem(tokens=5, width=16, experts=6, size=8, on=(1, 3, 4), dtype=jnp.float32, seed=0):
    """x, up, down and scores of both signs; experts outside of ``on`` have score zero."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (tokens, width))
    up = jax.random.normal(keys[1], (experts, size, width)) / width**0.5
    down = jax.random.normal(keys[2], (experts, size, width)) / size**0.5
    mask = jnp.zeros(experts).at[jnp.asarray(on, int)].set(1)
    scores = jax.random.normal(keys[3], (tokens, experts)) * mask
    return tuple(a.astype(dtype) for a in (x, up, down, scores))
