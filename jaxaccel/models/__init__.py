"""Reference networks in Flax NNX that the methods are shown on."""

from jaxaccel.models.classifiers import CNN, MLP, ResNet18
from jaxaccel.models.transformer import CharLM, TransformerBlock, VisionTransformer

__all__ = ["CNN", "MLP", "CharLM", "ResNet18", "TransformerBlock", "VisionTransformer"]
