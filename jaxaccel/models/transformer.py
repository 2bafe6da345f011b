"""A pre-norm transformer block, a character language model and a vision transformer made of it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class AttentionSublayer(nnx.Module):
    """Attention behind a LayerNorm and a residual connection: x + Attention(LayerNorm(x))."""

    def __init__(self, width: int, heads: int, *, causal: bool, rngs: nnx.Rngs) -> None:
        if width % heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
        self.heads, self.causal = heads, causal
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply it."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.reshape(batch, length, width))


class TransformerBlock(AttentionSublayer):
    """Attention and a GELU network, each behind a LayerNorm and a residual connection.

    x ← x + Attention(LayerNorm(x));  x ← x + W₂ GELU(W₁ LayerNorm(x))

    Xiong et al., On Layer Normalization in the Transformer Architecture, arXiv 2002.04745 (the "pre-norm" form).
    """

    def __init__(self, width: int, heads: int, *, causal: bool, expansion: int = 4, rngs: nnx.Rngs) -> None:
        super().__init__(width, heads, causal=causal, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, expansion * width, rngs=rngs)
        self.down = nnx.Linear(expansion * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the block."""
        x = self.attend(x)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class CharLM(nnx.Module):
    """A small causal language model over characters, with learned positions.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = CharLM(vocabulary=50, width=32, layers=1, heads=2, length=16, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 16), int)).shape
    (2, 16, 50)
    """

    def __init__(self, *, vocabulary: int, width: int, layers: int, heads: int, length: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List([TransformerBlock(width, heads, causal=True, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Return the logits of the next character at every position."""
        length = tokens.shape[1]
        if length > self.positions.shape[0]:
            raise ValueError(f"{length} tokens do not fit into a context of {self.positions.shape[0]}")
        x = self.embed(tokens) + self.positions[:length]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class VisionTransformer(nnx.Module):
    """Vision transformer with global average pooling. S/16 is ``patch=16, width=384, layers=12, heads=6``.

    Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = VisionTransformer((8, 8, 1), patch=4, width=32, layers=1, heads=2, classes=10, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        *,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        classes: int,
        rngs: nnx.Rngs,
    ) -> None:
        rows, columns, channels = image
        if rows % patch or columns % patch:
            raise ValueError(f"image {rows}x{columns} is not a whole number of {patch}x{patch} patches")
        count = (rows // patch) * (columns // patch)
        self.embed = nnx.Conv(channels, width, (patch, patch), strides=patch, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (count, width)))
        self.blocks = nnx.List([TransformerBlock(width, heads, causal=False, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Return logits."""
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
