"""Reference networks in Flax NNX that the methods are shown on, and the decoder that real weights load into."""

from jaxaccel.models.classifiers import CNN, MLP, ResNet18
from jaxaccel.models.decoder import (
    Decoder,
    Forward,
    decoder_forward,
    decoder_logits,
    fuse,
    init_params,
    new_cache,
    stack_layers,
    unstack_layers,
)
from jaxaccel.models.decoder_config import BlockFFNConfig, DecoderConfig, RopeScaling
from jaxaccel.models.decoder_ffn import expert_union
from jaxaccel.models.dit import (
    DiT,
    Modulation,
    dit_apply,
    dit_denoiser,
    dit_forward,
    dit_modulation,
    init_dit,
    stack_blocks,
)
from jaxaccel.models.dit_config import DiTConfig
from jaxaccel.models.dit_weights import dit_from_safetensors, dit_params_from_names, load_dit
from jaxaccel.models.drafts import DraftDecoder, Drafts, Lookup
from jaxaccel.models.generation import Generation, generate, prepare
from jaxaccel.models.kv_cache import BlockTopK, KVCache, NewTokens, append, empty_cache, rewind
from jaxaccel.models.prompts import SnapKV, pad_prompts, prefill
from jaxaccel.models.transformer import AttentionSublayer, CharLM, TransformerBlock, VisionTransformer
from jaxaccel.models.weights import load_pretrained

__all__ = [
    "CNN",
    "MLP",
    "AttentionSublayer",
    "BlockFFNConfig",
    "BlockTopK",
    "CharLM",
    "Decoder",
    "DecoderConfig",
    "DiT",
    "DiTConfig",
    "DraftDecoder",
    "Drafts",
    "Forward",
    "Generation",
    "KVCache",
    "Lookup",
    "Modulation",
    "NewTokens",
    "ResNet18",
    "RopeScaling",
    "SnapKV",
    "TransformerBlock",
    "VisionTransformer",
    "append",
    "decoder_forward",
    "decoder_logits",
    "dit_apply",
    "dit_denoiser",
    "dit_forward",
    "dit_from_safetensors",
    "dit_modulation",
    "dit_params_from_names",
    "empty_cache",
    "expert_union",
    "fuse",
    "generate",
    "init_dit",
    "init_params",
    "load_dit",
    "load_pretrained",
    "new_cache",
    "pad_prompts",
    "prefill",
    "prepare",
    "rewind",
    "stack_blocks",
    "stack_layers",
    "unstack_layers",
]
