"""The tokenizer in a GGUF file's metadata: byte-level BPE, as Llama 3, Qwen2, SmolLM and GPT-2 have it."""

from typing import Any

from jaxaccel.models.weights.errors import NoTokenizerError, WeightsError, optional_module
from jaxaccel.models.weights.gguf_header import GgufFile
from jaxaccel.models.weights.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How texts are cut before merging, by tokenizer.ggml.pre; None is ByteLevel's own expression, GPT-2's.
_PATTERNS = {
    "gpt-2": None,
    "smollm": None,  # after cutting out every digit
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}


def _pre_tokenizer(kind: str) -> Any:
    pre = optional_module("tokenizers.pre_tokenizers", "A tokenizer")
    pattern = _PATTERNS[kind]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        regex = optional_module("tokenizers", "A tokenizer").Regex(pattern)
        return pre.Sequence([pre.Split(regex, "isolated"), level])
    return pre.Sequence([pre.Digits(individual_digits=True), level]) if kind == "smollm" else level


def _add_specials(backend: Any, words: list[str], kinds: list[int]) -> None:
    added = optional_module("tokenizers", "A tokenizer").AddedToken
    for kind in (_CONTROL, _USER_DEFINED):
        chosen = [word for word, its in zip(words, kinds, strict=True) if its == kind]
        add = backend.add_special_tokens if kind == _CONTROL else backend.add_tokens
        add([added(word, normalized=False, special=kind == _CONTROL) for word in chosen])


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
        file: from `gguf_header.read_gguf`.

    Returns:
        The tokenizer, with the file's chat template.

    Raises:
        NoTokenizerError: if the file has none, or one of another kind (SentencePiece's), or does not say how texts are
            cut before merging.
        WeightsError: if its lists do not fit together.

    >>> tokenizer_from_gguf(read_gguf("smollm2.gguf")).encode("Hello")  # doctest: +SKIP
    [19556]
    """
    get = file.metadata.get
    model, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if model is None:
        raise NoTokenizerError(f"{file.path}: has no tokenizer (tokenizer.ggml.model)")
    if model != "gpt2":
        raise NoTokenizerError(
            f"{file.path}: its tokenizer is of the kind {model!r}, expected 'gpt2' (byte-level BPE); "
            "load the model's tokenizer.json with Tokenizer.from_file"
        )
    if pre not in _PATTERNS:
        # Another guess would give other ids than the model was trained with, and nothing would show it.
        raise NoTokenizerError(f"{file.path}: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(_PATTERNS)}")
    words, merges = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.merges")
    if not words or merges is None:
        raise WeightsError(f"{file.path}: tokenizer.ggml.tokens or tokenizer.ggml.merges is missing")
    kinds = get("tokenizer.ggml.token_type") or [1] * len(words)
    if len(kinds) != len(words):
        raise WeightsError(f"{file.path}: {len(kinds)} token types for {len(words)} tokens")
    tokenizers = optional_module("tokenizers", "A tokenizer")
    vocab = {word: i for i, word in enumerate(words)}
    if len(vocab) != len(words):
        raise WeightsError(f"{file.path}: {len(words)} tokens are only {len(vocab)} different ones")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        bpe = tokenizers.models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises bare Exceptions
        raise WeightsError(f"{file.path}: its merges do not fit its tokens ({error})") from error
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    _add_specials(backend, words, kinds)
    numbers = {name: get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    for name, number in numbers.items():
        if number is not None and not 0 <= number < len(words):
            raise WeightsError(f"{file.path}: {name}_token_id is {number}, expected 0 to {len(words) - 1}")
    bos, eos, eot = numbers["bos"], numbers["eos"], numbers["eot"]
    # Files of Llama 3 may leave out that their texts begin with a token.
    first = [bos] if get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None else []
    last = [eos] if get("tokenizer.ggml.add_eos_token", False) and eos is not None else []
    if first or last:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*(words[i] for i in first), "$A", *(words[i] for i in last)],
            special_tokens=[(words[i], i) for i in dict.fromkeys(first + last)],
        )
    return Tokenizer(
        backend,
        tuple(dict.fromkeys(i for i in (eos, eot) if i is not None)),
        None if bos is None else words[bos],
        None if eos is None else words[eos],
        get("tokenizer.chat_template"),
    )
