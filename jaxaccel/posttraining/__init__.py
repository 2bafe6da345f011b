"""After pre-training: losses of fine-tuning and preference optimisation, low-rank adapters."""

from jaxaccel.posttraining.lora import apply_lora, init_lora, lora_delta, lora_linear, merge_lora
from jaxaccel.posttraining.losses import dpo_loss, implicit_reward, sequence_logps, sft_loss

__all__ = [
    "apply_lora",
    "dpo_loss",
    "implicit_reward",
    "init_lora",
    "lora_delta",
    "lora_linear",
    "merge_lora",
    "sequence_logps",
    "sft_loss",
]
