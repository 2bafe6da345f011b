"""The tiny LLaDA behind the vectors, and models that are tables: what the tests of its decoding share."""

import jax
import jax.numpy as jnp

from jaxaccel.decoding.learn2pd import Filter, FilterParams
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.weights import params_from_names


def tiny_config(meta):
    """Of the vectors' model: meta holds V, eot, mask, d, layers, heads, kv_heads, mlp, P, G, b."""
    vocab, _, _, width, layers, heads, kv_heads, inner = map(int, meta[:8])
    return DecoderConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=width // heads, max_positions=64, rope_theta=500_000.0, causal=False,
    )  # fmt: skip


def tensors(vectors):
    return {name.removeprefix("param/"): vectors[name] for name in vectors.files if name.startswith("param/")}


def tiny_params(vectors):
    return jax.tree.map(jnp.asarray, params_from_names(tensors(vectors), tiny_config(vectors["meta"])))


def tiny_filter(vectors):
    params = FilterParams(*(jnp.asarray(vectors[f"filter/{name}"]) for name in FilterParams._fields))
    return Filter(params, float(vectors["accept_threshold"]))


def table(params, tokens, *, kv=None, positions=None, key_mask=None, return_kv=False):
    """A model whose logits [S, V] depend on the position alone."""
    at = jnp.arange(tokens.shape[1]) if positions is None else jnp.minimum(positions, len(params) - 1)
    logits = jnp.broadcast_to(params[at], (*tokens.shape, params.shape[-1]))
    kept = jnp.zeros((*tokens.shape, 1, 1)) if kv is None else kv
    return (logits, kept) if return_kv else logits


def sure_of(answer, confidence, vocab):
    """Logits [S, V] that predict ``answer`` with the given probabilities; the rest is spread evenly."""
    answer, confidence = jnp.asarray(answer), jnp.asarray(confidence, jnp.float32)
    odds = jnp.log(confidence) - jnp.log((1 - confidence) / (vocab - 1))
    return odds[:, None] * (jnp.arange(vocab) == answer[:, None])
