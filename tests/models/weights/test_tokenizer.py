"""Tokenizers from tokenizer.json and from GGUF, chat templates in their sandbox, text that streams."""

import json

import numpy as np
import pytest
import tokenizers

from jaxaccel.models.weights import StreamDecoder, Tokenizer, WeightsError
from jaxaccel.models.weights.errors import NoTokenizerError
from jaxaccel.models.weights.gguf_header import GgufFile
from jaxaccel.models.weights.gguf_tokenizer import tokenizer_from_gguf
from tests.models.weights.making import byte_words, write_json

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hi"}]
TEXTS = ["", "def f(x):\n\treturn x**2  # 12345", "naïve Größe 東京 — e\u0301", "👩🏽‍🚀 🎉", " spaces  \r\n\n here "]


def gguf(tmp_path, merges=(), *, pre="llama-bpe", words=(), **changes):
    """The tokenizer of a GGUF file with the 256 bytes, what merges make of them, further words and two specials."""
    tokens = [*byte_words(), *(merge.replace(" ", "") for merge in merges), *words, "<s>", "</s>"]
    metadata = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": list(merges),
        "token_type": [1] * (len(tokens) - 2) + [3, 3], "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    } | changes  # fmt: skip
    named = {f"tokenizer.ggml.{name}": value for name, value in metadata.items() if value is not None}
    named["tokenizer.chat_template"] = TEMPLATE
    return tokenizer_from_gguf(GgufFile(tmp_path / "x.gguf", named, {}))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_texts_survive(tmp_path, pre):
    tokenizer = gguf(tmp_path, ["a b", "1 2", "Ġ s"], pre=pre)
    for text in TEXTS:
        wanted = text.replace("e\u0301", "é") if pre == "qwen2" else text  # Qwen composes letters first
        assert tokenizer.decode(tokenizer.encode(text)) == wanted
    assert tokenizer.vocab_size == 256 + 3 + 2


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]


def test_each_kind_cuts_digits_in_its_own_way(tmp_path):
    merges = ["1 2", "12 3", "4 5", "123 45", "Ġ 1"]
    assert pieces(gguf(tmp_path, merges, pre="gpt-2"), "12345 1") == ["12345", " 1"]
    assert pieces(gguf(tmp_path, merges, pre="llama-bpe"), "12345 1") == ["123", "45", " ", "1"]
    assert pieces(gguf(tmp_path, merges, pre="qwen2"), "123 1") == ["1", "2", "3", " ", "1"]
    assert pieces(gguf(tmp_path, merges, pre="smollm"), "123 1") == ["1", "2", "3", " ", "1"]


def test_whole_words_of_llama_3_need_no_merges(tmp_path):
    assert pieces(gguf(tmp_path, words=["abc"], pre="llama-bpe"), "abc") == ["abc"]
    assert pieces(gguf(tmp_path, words=["abc"], pre="qwen2"), "abc") == ["a", "b", "c"]


def test_tokens_around_a_text(tmp_path):
    letter = byte_words().index("a")
    for pre, changes, wanted in (
        ("llama-bpe", {}, [256, letter]),
        ("llama-bpe", {"add_bos_token": False}, [letter]),
        ("qwen2", {}, [letter]),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [256, letter, 257]),
    ):
        tokenizer = gguf(tmp_path, pre=pre, **changes)
        assert tokenizer.encode("a") == wanted
        assert tokenizer.encode("a", add_special_tokens=False) == [letter]
    assert tokenizer.encode("<s>a</s>", add_special_tokens=False) == [256, letter, 257]
    assert tokenizer.decode([256, letter, 257]) == "a"
    assert tokenizer.decode([256, letter, 257], skip_special_tokens=False) == "<s>a</s>"
    assert (tokenizer.eos_ids, tokenizer.bos_token, tokenizer.eos_token) == ((257,), "<s>", "</s>")
    assert gguf(tmp_path, eot_token_id=256).eos_ids == (257, 256)
    assert gguf(tmp_path, eos_token_id=None, bos_token_id=None).eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": None}, NoTokenizerError, "has no tokenizer"),
        ({"model": "llama"}, NoTokenizerError, "of the kind 'llama', expected 'gpt2'"),
        ({"pre": "tekken"}, NoTokenizerError, "tokenizer.ggml.pre is 'tekken', expected one of gpt-2, smollm"),
        ({"pre": None}, NoTokenizerError, "tokenizer.ggml.pre is None"),
        ({"tokens": None}, WeightsError, "tokenizer.ggml.tokens or tokenizer.ggml.merges is missing"),
        ({"token_type": [1]}, WeightsError, "1 token types for 258 tokens"),
        ({"merges": ["a zebra"]}, WeightsError, "its merges do not fit its tokens"),
        ({"merges": ["ab"]}, WeightsError, "its merges do not fit its tokens"),
        ({"eos_token_id": 999}, WeightsError, "eos_token_id is 999, expected 0 to 257"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, WeightsError, "2 tokens are only 1 different ones"),
    ],
)
def test_what_is_wrong_with_gguf_is_named(tmp_path, changes, kind, message):
    with pytest.raises(WeightsError, match=message) as raised:
        gguf(tmp_path, **changes)
    assert type(raised.value) is kind


def save(folder, **settings):
    """A tokenizer.json with lengths of training, and what lies beside it."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate([*byte_words(), "ab"])}, [("a", "b")])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        write_json(folder / "tokenizer_config.json", settings)
    return folder


def test_from_file(tmp_path):
    folder = save(tmp_path, bos_token="<s>", eos_token={"content": "</s>", "special": True}, chat_template=TEMPLATE)
    write_json(folder / "generation_config.json", {"eos_token_id": [258, 259]})
    for path in (folder, str(folder / "tokenizer.json")):
        tokenizer = Tokenizer.from_file(path)
        assert (tokenizer.eos_ids, tokenizer.bos_token, tokenizer.eos_token) == ((258, 259), "<s>", "</s>")
        assert tokenizer.vocab_size == 260
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template(HELLO) == "<user>Hi</s>\n<assistant>"
    ids = tokenizer.encode_chat(HELLO, add_generation_prompt=False)
    assert ids == tokenizer.encode("<user>Hi</s>\n")
    assert 258 in ids
    write_json(folder / "generation_config.json", {"eos_token_id": 259})
    assert Tokenizer.from_file(folder).eos_ids == (258, 259)


def test_templates_in_their_three_places(tmp_path):
    assert Tokenizer.from_file(save(tmp_path)).chat_template is None
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    assert Tokenizer.from_file(save(tmp_path, chat_template=several)).apply_chat_template(HELLO) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_file(tmp_path).apply_chat_template(HELLO) == "file"


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(NoTokenizerError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(NoTokenizerError, match=r"tokenizer.model: SentencePiece models are not read; convert"):
        Tokenizer.from_file(tmp_path)
    for content in ("", "{", '{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(WeightsError, match=r"tokenizer.json: corrupt, or not a tokenizer") as raised:
            Tokenizer.from_file(tmp_path)
        assert not isinstance(raised.value, NoTokenizerError)
    save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(WeightsError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="holds a list, expected a JSON object"):
        Tokenizer.from_file(tmp_path)


def chat(template, messages=HELLO):
    return Tokenizer(None, chat_template=template, bos_token="<s>").apply_chat_template(messages)


def test_what_templates_rely_on():
    assert chat("{{ bos_token }}|{{ eos_token }}|{{ {'ä': 1}|tojson }}") == '<s>||{"ä": 1}'
    assert json.loads(chat("{{ messages|tojson(indent=2) }}")) == HELLO
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert chat("{{ strftime_now('%Y') }}").startswith("2")
    assert chat("  {% if true %}\nx\n  {% endif %}\n") == "x\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ undefined.attribute }}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: .*roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_templates_of_strangers_are_held(template, message):
    with pytest.raises(WeightsError, match=message):
        chat(template)


def test_wrong_messages_are_named():
    with pytest.raises(WeightsError, match="this tokenizer has no chat template"):
        chat(None)
    with pytest.raises(ValueError, match="messages is empty"):
        chat(TEMPLATE, [])
    with pytest.raises(ValueError, match=r"messages\[1\] lacks 'content', it has \['role'\]"):
        chat(TEMPLATE, [*HELLO, {"role": "user"}])
    with pytest.raises(WeightsError, match="no tools"):
        chat(TEMPLATE, [{"role": "tool", "content": ""}])


def test_ids_outside_of_the_vocabulary_are_named(tmp_path):
    for bad in (-1, 258):
        with pytest.raises(ValueError, match=f"id {bad} is outside of the vocabulary, expected 0 to 257"):
            gguf(tmp_path).decode([5, bad])


def test_streams_never_show_half_a_character(tmp_path):
    tokenizer = gguf(tmp_path, ["a b"])
    stream = StreamDecoder(tokenizer)
    shown = [stream.push(i) for i in tokenizer.encode("aé👍", add_special_tokens=False)]
    assert shown == ["a", "", "é", "", "", "", "👍"]
    assert stream.finish() == ""
    assert [stream.push(byte_words().index("Ã")), stream.finish(), stream.finish()] == ["", "\ufffd", ""]
    # After `finish` it starts anew.
    assert stream.push(byte_words().index("a")) == "a"


def test_a_stream_joined_is_the_whole(tmp_path):
    tokenizer = gguf(tmp_path, ["a b", "Ġ s"])
    rng = np.random.default_rng(0)
    texts = [tokenizer.encode(text) for text in TEXTS] + [rng.integers(0, 260, 40).tolist() for _ in range(50)]
    for ids in texts:
        for skip in (True, False):
            stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
            joined = "".join([*map(stream.push, ids), stream.finish()])
            assert joined == tokenizer.decode(ids, skip_special_tokens=skip)


def test_streams_of_tokenizers_that_hide_a_first_space():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"▁a": 0, "▁b": 1, "c": 2}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in (0, 1, 2, 0)] == ["a", " b", "c", " a"]
