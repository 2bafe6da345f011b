"""Real weights for `jaxaccel.models`: files, names, tokenizers, and where to fetch them."""

from jaxaccel.models.weights.errors import WeightsError
from jaxaccel.models.weights.hf_config import config_from_hf
from jaxaccel.models.weights.names import params_from_names
from jaxaccel.models.weights.sources import Pretrained, load_pretrained
from jaxaccel.models.weights.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Pretrained",
    "StreamDecoder",
    "Tokenizer",
    "WeightsError",
    "config_from_hf",
    "load_pretrained",
    "params_from_names",
]
