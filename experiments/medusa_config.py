"""Settings of the Medusa experiment."""

import dataclasses

from experiments.runner.api import Config

TOP = 10
"""Ranks of each head that a tree may use."""


@dataclasses.dataclass(frozen=True)
class MedusaConfig(Config):
    """Train Medusa heads for a language model, and decode with them."""

    model: str = "smollm2-135m"
    """A model that `load_pretrained` knows, or "random": a tiny one, for trying out."""
    dataset: str = "topics"
    """topics: Python's reference texts. Else a data set of conversations, read through Hugging Face datasets."""
    num_heads: int = 3
    """Guesses ahead."""
    vocabulary: int = 4096
    """Tokens that are guessed, the most frequent; 0 for all, with a matrix for each head."""
    length: int = 256
    """Tokens of a training sequence."""
    text: int = 256
    """Training sequences of text."""
    own: int = 192
    """Training sequences that the model continues itself."""
    prompt: int = 32
    """Of such a sequence, tokens of text."""
    own_batch: int = 32
    """Of them, continued at a time."""
    steps: int = 600
    """Training steps of the heads."""
    batch_size: int = 512
    """Positions of a step."""
    learning_rate: float = 2e-3
    """Peak rate of Adam; a cosine to 0 follows."""
    decay: float = 0.8
    """Weight of a head's loss relative to the one before."""
    guesses: tuple[int, ...] = (1, 3, 7, 15)
    """Sizes of trees, without the root."""
    prompts: int = 16
    """Held-out prompts, and as many to choose the tree with."""
    prompt_length: int = 96
    """Tokens of each."""
    new_tokens: int = 64
    """Tokens by which each is continued."""
    batches: tuple[int, ...] = (1, 8)
    """Prompts decoded at a time when speed is measured."""
    repeats: int = 7
    """Turns of measurement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = ("num_heads", "length", "own_batch", "steps", "batch_size", "prompts", "prompt_length", "new_tokens")
        for name in (*numbers, "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text < 0 or self.own < 0 or self.text + self.own < 1:
            raise ValueError(f"text ({self.text}) and own ({self.own}) must be >= 0, and one of them at least 1")
        if not 0 < self.prompt < self.length:
            raise ValueError(f"prompt ({self.prompt}) must be at least 1 and less than length ({self.length})")
        if not self.guesses or min(self.guesses) < 1 or list(self.guesses) != sorted(set(self.guesses)):
            raise ValueError(f"guesses must be increasing numbers of at least 1, got {self.guesses}")
        if not self.batches or min(self.batches) < 1 or max(self.batches) > self.prompts:
            raise ValueError(f"batches must be from 1 to prompts ({self.prompts}), got {self.batches}")
        if self.vocabulary < 0 or 0 < self.vocabulary < TOP:
            raise ValueError(f"vocabulary must be 0 or at least {TOP}, got {self.vocabulary}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
