"""Text to token ids and back, chat prompts, and text that grows token by token."""

import dataclasses
import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxaccel.models.weights.errors import NoTokenizerError, WeightsError, optional_module, read_json

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the library ``tokenizers``, with what a chat needs.

    Make one with `from_file`, with `gguf_tokenizer.tokenizer_from_gguf`, or from a ``tokenizers.Tokenizer``.
    """

    backend: Any = dataclasses.field(repr=False)
    """The ``tokenizers.Tokenizer``."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end an answer."""
    bos_token: str | None = None
    """First token of a text, for the chat template."""
    eos_token: str | None = None
    """Last token of a text, for the chat template."""
    chat_template: str | None = dataclasses.field(default=None, repr=False)
    """Jinja source of the chat format."""

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, specials included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text.

        Names of special tokens inside ``text`` become these tokens: do not pass on what strangers wrote unseen.

        Args:
            text: any text.
            add_special_tokens: put the tokens before and after it that the model was trained with, if any.

        Returns:
            Ids in order.
        """
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: ids in order.
            skip_special_tokens: leave out tokens such as the end of an answer.

        Returns:
            The text.

        Raises:
            ValueError: for an id outside of the vocabulary.
        """
        whole = [int(i) for i in ids]
        outside = [i for i in whole if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"id {outside[0]} is outside of the vocabulary, expected 0 to {self.vocab_size - 1}")
        return self.backend.decode(whole, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Write a conversation the way the model was trained to read it.

        The template comes with the weights, so it runs in Jinja's sandbox.

        Args:
            messages: mappings with ``role`` and ``content``, oldest first.
            add_generation_prompt: end with the beginning of the model's answer.

        Returns:
            The prompt; `encode` it with ``add_special_tokens=False``, as the template writes them itself.

        Raises:
            WeightsError: if there is no template, or it refuses the messages.
            ValueError: if there are no messages, or one lacks ``role`` or ``content``.
        """
        if self.chat_template is None:
            raise WeightsError(
                "this tokenizer has no chat template: it belongs to a base model; write the prompt yourself"
            )
        if not messages:
            raise ValueError("messages is empty, expected at least one")
        for i, message in enumerate(messages):
            for key in ("role", "content"):
                if key not in message:
                    raise ValueError(f"messages[{i}] lacks {key!r}, it has {sorted(message)}")
        optional_module("jinja2", "A chat template")
        try:
            return _compiled(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except Exception as error:  # what a template computes may fail in any way
            raise WeightsError(f"the chat template refuses these messages: {type(error).__name__}: {error}") from error

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: `apply_chat_template`, then `encode`."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt), add_special_tokens=False)

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Read a tokenizer.json, and what lies beside it.

        Args:
            path: the file, or its folder. ``tokenizer_config.json``, ``generation_config.json`` and
                ``chat_template.jinja`` in the same folder add ends of text and the chat template.

        Returns:
            The tokenizer.

        Raises:
            NoTokenizerError: if there is no such file, or the folder only has a SentencePiece model.
            WeightsError: naming a file that is corrupt.
        """
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        folder = path.parent
        if not path.is_file():
            models = sorted(folder.glob("*.model"))
            if models:
                raise NoTokenizerError(
                    f"{models[0]}: SentencePiece models are not read; convert it to tokenizer.json with transformers: "
                    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )
            raise NoTokenizerError(f"{path}: no such file")
        try:
            backend = optional_module("tokenizers", "A tokenizer").Tokenizer.from_file(str(path))
        except ImportError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise WeightsError(f"{path}: corrupt, or not a tokenizer ({error})") from error
        # Files may hold the lengths that training used; a prompt must not be cut or padded unasked.
        backend.no_truncation()
        backend.no_padding()
        settings, generation = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in ("tokenizer_config.json", "generation_config.json")
        )
        bos, eos = (_content(settings.get(name)) for name in ("bos_token", "eos_token"))
        ends = generation.get("eos_token_id")
        ids = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
        if eos is not None and backend.token_to_id(eos) is not None:
            ids.insert(0, backend.token_to_id(eos))
        jinja = folder / "chat_template.jinja"
        template = jinja.read_text(encoding="utf-8") if jinja.is_file() else _template(settings.get("chat_template"))
        return cls(backend, tuple(dict.fromkeys(ids)), bos, eos, template)


def _content(token: Any) -> str | None:
    """A token's text; files have it bare or as an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _template(value: Any) -> str | None:
    """The default of several named templates, or the only one."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value}
        return named.get("default")
    return value


@functools.cache
def _compiled(source: str) -> Any:
    """A template with the functions and settings that templates of language models rely on."""
    sandbox = optional_module("jinja2.sandbox", "A chat template")
    jinja2 = optional_module("jinja2", "A chat template")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


class StreamDecoder:
    """Text of an answer as its tokens arrive, never half a character.

    What `push` and then `finish` return, joined, is what ``tokenizer.decode`` makes of all ids at once.

    Args:
        tokenizer: whose ids are pushed.
        skip_special_tokens: leave out tokens such as the end of an answer.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # the tokens shown last, for the spaces that depend on them, then those held back
        self._shown = 0  # how many of them have been shown

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def push(self, token: int) -> str:
        """Add a token.

        Args:
            token: its id.

        Returns:
            The text that is certain now; empty while a character is incomplete.
        """
        self._ids.append(int(token))
        text = self._text(self._ids)
        if text.endswith("\ufffd"):  # maybe the first bytes of a character; `finish` shows it if not
            return ""
        return self._show(text)

    def finish(self) -> str:
        """Return what was held back, and start anew."""
        rest = self._show(self._text(self._ids))
        self._ids, self._shown = [], 0
        return rest

    def _show(self, text: str) -> str:
        new = text[len(self._text(self._ids[: self._shown])) :]
        if new:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return new
