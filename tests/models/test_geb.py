"""The layout of GEB's weights is found from text that a model with that layout wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.decoding.sampling import Sampling
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.geb import Layout, detect_layout, next_token_loss
from jaxaccel.models.generation import generate
from jaxaccel.models.weights.names import params_from_names

CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(vectors):
    names = {name[2:]: vectors("geb")[name] for name in vectors("geb") if name.startswith("w/")}
    # Strong attention and sharp logits, so that how heads turn decides what comes next.
    factor = {"query": 4, "key_value": 4, "output_layer": 6, "dense": 3}
    return {
        name: array.astype(np.float32) * next((f for part, f in factor.items() if part + ".weight" in name), 1)
        for name, array in names.items()
    }


@pytest.mark.parametrize(
    "layout",
    [
        Layout("half", 1.0, "concat", "pre"),
        Layout("interleaved", 0.5, "per_head", "pre"),
        Layout("interleaved", 1.0, "concat", "post"),
    ],
)
def test_the_layout_that_wrote_the_text_is_found(weights, layout):
    params = jax.tree.map(jnp.asarray, params_from_names(weights, CONFIG, kv_layout=layout.kv_layout))
    prompts = np.random.default_rng(0).integers(0, 37, (8, 4)).astype(np.int32)
    out = generate(
        params, prompts, layout.configure(CONFIG), max_new_tokens=60, sampling=Sampling(temperature=1.0),
        key=jax.random.key(1),
    )  # fmt: skip
    text = np.concatenate([prompts, out.tokens], 1)
    found, losses = detect_layout(weights, text, CONFIG)
    assert found == layout
    assert len(losses) == 16
    second = sorted(losses.values())[1]
    assert losses[layout] < second - 0.05
    np.testing.assert_allclose(losses[layout], next_token_loss(params, text, layout.configure(CONFIG)), rtol=1e-6)


def test_bad_input(weights):
    with pytest.raises(ValueError, match="at least two tokens"):
        detect_layout(weights, np.zeros((1, 1), np.int32), CONFIG)
    with pytest.raises(ValueError, match="ids from 37 to 37, expected 0 to 36"):
        detect_layout(weights, np.full((1, 5), 37), CONFIG)
    broken = weights | {"transformer.output_layer.weight": np.full((37, 16), np.nan, np.float32)}
    with pytest.raises(ValueError, match="no layout gives a finite loss"):
        detect_layout(broken, np.zeros((1, 5), np.int32), CONFIG)
    fewer = {name: array for name, array in weights.items() if "output_layer" not in name}
    with pytest.raises(ValueError, match="output_layer"):
        detect_layout(fewer, np.zeros((1, 5), np.int32), CONFIG)
