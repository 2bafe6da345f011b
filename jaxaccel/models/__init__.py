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
from jaxaccel.models.decoder_config import DecoderConfig, RopeScaling
from jaxaccel.models.generation import Drafts, Generation, generate, prepare
from jaxaccel.models.kv_cache import BlockTopK, KVCache, NewTokens, append, empty_cache
from jaxaccel.models.prompts import SnapKV, pad_prompts, prefill
from jaxaccel.models.transformer import AttentionSublayer, CharLM, TransformerBlock, VisionTransformer
from jaxaccel.models.weights import load_pretrained

__all__ = [
    "CNN",
    "MLP",
    "AttentionSublayer",
    "BlockTopK",
    "CharLM",
    "Decoder",
    "DecoderConfig",
    "Drafts",
    "Forward",
    "Generation",
    "KVCache",
    "NewTokens",
    "ResNet18",
    "RopeScaling",
    "SnapKV",
    "TransformerBlock",
    "VisionTransformer",
    "append",
    "decoder_forward",
    "decoder_logits",
    "empty_cache",
    "fuse",
    "generate",
    "init_params",
    "load_pretrained",
    "new_cache",
    "pad_prompts",
    "prefill",
    "prepare",
    "stack_layers",
    "unstack_layers",
]
