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
from jaxaccel.models.dit_serving import (
    DiTRequests,
    dit_admit,
    dit_forward_rows,
    dit_requests,
    dit_serve_step,
    rows_needed,
)
from jaxaccel.models.dit_weights import dit_from_safetensors, dit_params_from_names, load_dit
from jaxaccel.models.drafts import DraftDecoder, Drafts, Lookup
from jaxaccel.models.generation import Generation, generate, prepare
from jaxaccel.models.kv_cache import BlockTopK, KVCache, NewTokens, append, empty_cache, rewind
from jaxaccel.models.prompts import SnapKV, pad_prompts, prefill
from jaxaccel.models.transformer import AttentionSublayer, CharLM, TransformerBlock, VisionTransformer
from jaxaccel.models.vla import VLA, VLAConfig, cut_vla, init_vla, vla_cognition, vla_hidden_states, vla_policy
from jaxaccel.models.vla_head import ActionHead, HeadConfig, head_full, head_reuse, init_head
from jaxaccel.models.vla_weights import head_params_from_names, load_action_head
from jaxaccel.models.weights import load_pretrained

__all__ = [
    "CNN",
    "MLP",
    "VLA",
    "ActionHead",
    "AttentionSublayer",
    "BlockFFNConfig",
    "BlockTopK",
    "CharLM",
    "Decoder",
    "DecoderConfig",
    "DiT",
    "DiTConfig",
    "DiTRequests",
    "DraftDecoder",
    "Drafts",
    "Forward",
    "Generation",
    "HeadConfig",
    "KVCache",
    "Lookup",
    "Modulation",
    "NewTokens",
    "ResNet18",
    "RopeScaling",
    "SnapKV",
    "TransformerBlock",
    "VLAConfig",
    "VisionTransformer",
    "append",
    "cut_vla",
    "decoder_forward",
    "decoder_logits",
    "dit_admit",
    "dit_apply",
    "dit_denoiser",
    "dit_forward",
    "dit_forward_rows",
    "dit_from_safetensors",
    "dit_modulation",
    "dit_params_from_names",
    "dit_requests",
    "dit_serve_step",
    "empty_cache",
    "expert_union",
    "fuse",
    "generate",
    "head_full",
    "head_params_from_names",
    "head_reuse",
    "init_dit",
    "init_head",
    "init_params",
    "init_vla",
    "load_action_head",
    "load_dit",
    "load_pretrained",
    "new_cache",
    "pad_prompts",
    "prefill",
    "prepare",
    "rewind",
    "rows_needed",
    "stack_blocks",
    "stack_layers",
    "unstack_layers",
    "vla_cognition",
    "vla_hidden_states",
    "vla_policy",
]
