"""Shapes of Llama-class models: GEB-1.3B, SmolLM2, TinyLlama, Llama 2 and 3, Qwen2, LLaDA, by numbers alone.

A configuration also fixes the tree of parameters (`parameter_shapes`), which the module, the pure functions and the
loaders of weights share. Matrices are ``[out, in]``, as files have them: it is also the order in which XLA on CPU
multiplies a few rows fastest (``python -m experiments bench generation`` shows by how much).
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, Literal

RopeLayout = Literal["half", "interleaved"]
Norm = Literal["pre", "post"]
Attention = Literal["dense", "local_linear", "block_topk"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched frequencies: those slower than the trained context are divided by ``factor``."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class BlockFFNConfig:
    """Sparse experts instead of the SwiGLU network: see `jaxaccel.moe.block_ffn`.

    Raises:
        ValueError: for numbers out of range.
    """

    num_experts: int
    """Ne."""
    expert_dim: int
    """Neurons of an expert. A SwiGLU network of width F has as many weights where 2·Ne·expert_dim = 3·F."""
    eps: float = 1e-5
    """Added to the mean square of the router's activations."""
    sparse: Literal["auto"] | bool = "auto"
    """Whether a pass reads only the experts that its tokens use: ``"auto"`` does so for at most 64 tokens."""
    max_active: int | None = None
    """Most experts that are read one by one; where more are used, all are."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps is {self.eps}, expected a positive number")
        if self.sparse not in ("auto", True, False):
            raise ValueError(f"sparse is {self.sparse!r}, expected 'auto', True or False")
        if self.max_active is not None and not 1 <= self.max_active <= self.num_experts:
            raise ValueError(f"max_active is {self.max_active}, expected 1 to num_experts = {self.num_experts}")
        if self.max_active is not None and self.sparse is False:
            raise ValueError("max_active is given, but sparse=False reads all experts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Numbers that make a decoder. Defaults are GEB-1.3B's.

    Raises:
        ValueError: for numbers that do not fit together.

    >>> DecoderConfig().num_parameters
    1348044800
    >>> DecoderConfig.preset("smollm2-135m").num_parameters
    134515008
    """

    vocab_size: int = 64_896
    """Rows of the embedding V; a tokenizer may have fewer words."""
    hidden_size: int = 2048
    """Width D."""
    intermediate_size: int = 5632
    """Width F of the SwiGLU network; not read with ``block_ffn``."""
    num_layers: int = 24
    """Blocks L."""
    num_heads: int = 16
    """Query heads N."""
    num_kv_heads: int = 4
    """Key and value heads K; divides N."""
    head_dim: int = 128
    """Size H of a head."""
    max_positions: int = 4096
    """Longest context."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_layout: RopeLayout = "half"
    """Which channels turn together: (i, i + R/2), or (2i, 2i + 1)."""
    rotary_fraction: float = 1.0
    """Share of a head's channels that turn."""
    rope_scaling: RopeScaling | None = None
    """Stretched frequencies, as Llama 3.1 has them."""
    norm: Norm = "pre"
    """x + f(norm(x)), or norm(x + f(x))."""
    qkv_bias: bool = False
    """Biases of the query, key and value products (Qwen2)."""
    tie_embeddings: bool = False
    """The output matrix is the embedding."""
    attention: Attention = "dense"
    """How the tokens of a prompt, and new ones, attend."""
    causal: bool = True
    """Whether a token sees only those before it. LLaDA, which fills in masks, sees all (`masked_diffusion`)."""
    attention_ridge: float = 1.0
    """Ridge of local linear attention."""
    block_ffn: BlockFFNConfig | None = None
    """Sparse experts in the place of the SwiGLU network."""
    dtype: str | None = None
    """Of activations; that of the embedding by default. Norms, softmax and rotations are always worked in float32."""
    scan_layers: bool = False
    """Keep layers stacked [L, ...] and scan over them: compile time does not grow with depth. Good for training and
    accelerators; decoding on CPU is faster without, as XLA copies each layer's slice first."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_positions"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        for name, values in (("rope_layout", ("half", "interleaved")), ("norm", ("pre", "post")),
                             ("attention", ("dense", "local_linear", "block_topk"))):  # fmt: skip
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}")
        if not self.causal and self.attention != "dense":
            raise ValueError(f"attention is {self.attention!r}, expected 'dense' for a model that is not causal")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_size % 2 or not self.rotary_size:
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} turns {self.rotary_size} "
                "channels, expected an even number of at least 2 and at most head_dim"
            )
        for name in ("norm_eps", "rope_theta", "attention_ridge"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")

    @property
    def rotary_size(self) -> int:
        """Channels of a head that turn, R."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def num_parameters(self) -> int:
        """Exact count."""
        layer = sum(math.prod(shape) for shape in layer_shapes(self).values())
        top = sum(math.prod(shape) for name, shape in parameter_shapes(self).items() if name != "layers")
        return top + self.num_layers * layer

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DecoderConfig":
        """The configuration of a published model, with fields changed.

        Raises:
            ValueError: for an unknown name, suggesting the nearest.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(PRESETS)}"
            raise ValueError(f"unknown model {name!r}; {hint}")
        return dataclasses.replace(PRESETS[name](), **changes)

    @classmethod
    def tiny(cls, **changes: Any) -> "DecoderConfig":
        """A decoder of 2 layers for tests and examples, with fields changed."""
        numbers: dict[str, Any] = {
            "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 8, "max_positions": 128,
        }  # fmt: skip
        return cls(**(numbers | changes))


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's parameters."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * size, config.num_kv_heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (width,),
        "q": (queries, width),
        "k": (keys, width),
        "v": (keys, width),
        "o": (width, queries),
        "mlp_norm": (width,),
    }
    if config.block_ffn is None:
        shapes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    else:
        experts, neurons = config.block_ffn.num_experts, config.block_ffn.expert_dim
        slabs = (experts, neurons, width)
        shapes |= {"router": (width, experts), "gamma": (experts,), "expert_up": slabs, "expert_down": slabs}
    if config.qkv_bias:
        shapes |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    return shapes


def parameter_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The tree of parameters: ``embedding``, ``layers`` (a list of `layer_shapes`), ``final_norm``, maybe ``head``."""
    shapes: dict[str, Any] = {
        "embedding": (config.vocab_size, config.hidden_size),
        "layers": [layer_shapes(config) for _ in range(config.num_layers)],
        "final_norm": (config.hidden_size,),
    }
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, config.hidden_size)
    return shapes


PRESETS: dict[str, Callable[[], DecoderConfig]] = {
    "geb-1.3b": DecoderConfig,
    "smollm2-135m": lambda: DecoderConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, max_positions=8192, rope_theta=100_000.0, tie_embeddings=True,
    ),
    "smollm2-360m": lambda: DecoderConfig(
        vocab_size=49_152, hidden_size=960, intermediate_size=2560, num_layers=32, num_heads=15, num_kv_heads=5,
        head_dim=64, max_positions=8192, rope_theta=100_000.0, tie_embeddings=True,
    ),
    "tinyllama-1.1b": lambda: DecoderConfig(
        vocab_size=32_000, num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64, max_positions=2048,
    ),
    "llama2-7b": lambda: DecoderConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_layers=32, num_heads=32, num_kv_heads=32,
    ),
    "llama3-8b": lambda: DecoderConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
        max_positions=8192, rope_theta=500_000.0,
    ),
    "llama3.2-1b": lambda: DecoderConfig(
        vocab_size=128_256, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
        max_positions=131_072, rope_theta=500_000.0, tie_embeddings=True, rope_scaling=RopeScaling(factor=32.0),
    ),
    "qwen2-0.5b": lambda: DecoderConfig(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_heads=14, num_kv_heads=2, head_dim=64,
        max_positions=32_768, norm_eps=1e-6, rope_theta=1_000_000.0, qkv_bias=True, tie_embeddings=True,
    ),
    "llada-8b": lambda: DecoderConfig(
        vocab_size=126_464, hidden_size=4096, intermediate_size=12_288, num_layers=32, num_heads=32, num_kv_heads=32,
        rope_theta=500_000.0, causal=False,
    ),
}  # fmt: skip
"""Published models by name, for `DecoderConfig.preset`."""
