"""Every kind of decoder gives the logits of Hugging Face transformers on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.models.decoder import decoder_forward, decoder_logits
from tests.peers.transformers_logits import CASES, tokens, weights


@pytest.mark.parametrize("name", CASES)
def test_logits_of_transformers(vectors, name):
    params = jax.tree.map(jnp.asarray, weights(CASES[name]))
    actual = decoder_logits(params, decoder_forward(params, jnp.asarray(tokens()), CASES[name]).hidden)
    wanted = vectors("transformers_logits")[name]
    # Both in float32, in sums of different orders: some 2^-24, times the square root of the terms and two layers.
    assert np.abs(np.asarray(actual) - wanted).max() < 1e-5 * np.abs(wanted).max()
