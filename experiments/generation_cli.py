"""`python -m experiments generate`: text from a model, streamed, with any of the ways to decode faster.

The text goes to stdout and everything else to stderr, so that a pipe gets the answer alone.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.status import Status

from experiments.runner.cli import FAILED, OK, UsageError
from jaxaccel.decoding.heads_file import HeadsInfo, load_heads
from jaxaccel.decoding.sampling import Sampling
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.drafts import Drafts
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.kv_cache import BlockTopK
from jaxaccel.models.prompts import SnapKV
from jaxaccel.models.weights import Pretrained, StreamDecoder, Tokenizer, WeightsError, load_pretrained
from jaxaccel.models.weights.known import known_model

EVERY = 4
"""Steps between two writes to the terminal."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What to generate, and how."""

    model: str = "smollm2-135m"
    """A known name, a hub id (owner/name), a folder, or a .safetensors or .gguf file."""
    prompt: str = ""
    """The question or the beginning of the text; - reads it from stdin."""
    prompt_file: pathlib.Path | None = None
    """Read the prompt from this UTF-8 file. One line end at its end is dropped, as it is from stdin."""
    max_new_tokens: int = 200
    """Most tokens to generate."""
    raw: bool = False
    """Continue the prompt as it is, without the model's chat template."""
    system: str = ""
    """What the model is told before the prompt, where its chat template has a place for it."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it, tokens are drawn."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens only that together reach this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred become less likely."""
    seed: int = 0
    """Of the draws: the same seed gives the same text."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """In what the weights are kept. Fewer bits decode faster, and change the text a little."""
    snapkv: int | None = None
    """Keep this many tokens of a longer prompt in each layer's cache, those that its end attends to."""
    medusa: pathlib.Path | None = None
    """Guess several tokens ahead with the heads of this file. Greedy text stays what it is."""
    block_topk: int | None = None
    """Read this many blocks of 16 tokens of a longer cache in each step, besides its ends."""
    stats: bool = False
    """Compile with a warm-up first, so that times at the end are without compilation."""


@dataclasses.dataclass(frozen=True)
class _Request:
    """Arguments of `generate` other than the model, all of them checked."""

    prompt: list[int]
    stop_ids: tuple[int, ...]
    settings: dict[str, Any]

    def run(self, params: Any, config: DecoderConfig, callback: Callable[[np.ndarray, np.ndarray], None]) -> Any:
        return generate(
            params, [self.prompt], config, stop_ids=self.stop_ids, callback=callback, every=EVERY, **self.settings
        )


def generate_command(options: GenerateOptions) -> int:
    """Generate text to stdout; the last line on stderr says what it took.

    Args:
        options: of the command line.

    Returns:
        The exit code: 0, or 1 if the model or a file could not be read, which one line on stderr explains.

    Raises:
        UsageError: for options that cannot be meant, by themselves or for this model.
    """
    try:
        return _generate(options)
    except BrokenPipeError:  # the reader of a pipe has seen enough; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (WeightsError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _generate(options: GenerateOptions) -> int:
    sampling, accelerations = _check_options(options)
    text = _prompt_text(options)
    drafts, info = _read_heads(options.medusa) if options.medusa is not None else (None, None)
    with _progress(options.model) as progress:
        dtype = jnp.bfloat16 if options.weights == "bfloat16" else np.float32
        model = load_pretrained(options.model, dtype=dtype, progress=progress)
        if model.tokenizer is None:
            raise WeightsError(f"{options.model} has no tokenizer: {model.tokenizer_problem}")
        prompt = _encode(model.tokenizer, text, options)
        _check_fit(model, prompt, options, drafts)
        params = prepare(jax.tree.map(jnp.asarray, model.params), options.weights)
    if model.tokenizer.vocab_size < model.config.vocab_size:  # rows of the output matrix that are no words
        sampling = dataclasses.replace(sampling, vocab_size=model.tokenizer.vocab_size)
    for note in _notes(options, len(prompt), info):
        print(f"note: {note}", file=sys.stderr)
    settings = accelerations | {"max_new_tokens": options.max_new_tokens, "sampling": sampling, "drafts": drafts}
    settings["key"] = None if sampling.greedy else jax.random.key(options.seed)
    request = _Request(prompt, model.tokenizer.eos_ids, settings)
    warm = _warm_up(request, params, model.config) if options.stats else None
    stream = _Stream(model.tokenizer, request.stop_ids)
    with stream:
        result = request.run(params, model.config, stream)
    print(_summary(len(prompt), stream, int(result.steps), drafts is not None, warm), file=sys.stderr)
    return OK


# Options -------------------------------------------------------------------------------------------------------------


def _check_options(options: GenerateOptions) -> tuple[Sampling, dict[str, Any]]:
    """What can be checked before anything is loaded."""
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {options.max_new_tokens}, expected at least 1")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed is {options.seed}, expected a number from 0 to {2**32 - 1}")
    if options.raw and options.system:
        raise UsageError("--system is a part of the chat template, which --raw leaves out")
    if options.block_topk is not None and options.block_topk < 1:
        raise UsageError(f"--block-topk is {options.block_topk}, expected at least 1 block")
    _check_name(options.model)
    try:
        snapkv = None if options.snapkv is None else SnapKV(capacity=options.snapkv)
    except ValueError as error:
        raise UsageError(f"--snapkv: {error}") from error
    try:
        sampling = Sampling(options.repetition_penalty, options.temperature, top_k=options.top_k, top_p=options.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from error
    sparse = None if options.block_topk is None else BlockTopK(num_blocks=options.block_topk)
    return sampling, {"snapkv": snapkv, "sparse": sparse}


def _check_name(name: str) -> None:
    """A word that is neither a file nor known is a slip of the keyboard, not a failure to load."""
    path = pathlib.Path(name).expanduser()
    if "/" in name or "\\" in name or path.suffix.lower() in (".gguf", ".safetensors", ".json") or path.exists():
        return
    try:
        known_model(name)
    except WeightsError as error:
        raise UsageError(str(error)) from error


def _prompt_text(options: GenerateOptions) -> str:
    if options.prompt and options.prompt_file is not None:
        raise UsageError("give --prompt or --prompt-file, not both")
    if options.prompt_file is None and options.prompt != "-":
        text = options.prompt
    else:
        where = str(options.prompt_file or "stdin")
        try:
            text = sys.stdin.read() if options.prompt_file is None else options.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(f"{where}: the prompt is not UTF-8 ({error})") from error
        text = text.removesuffix("\n")
    if not text.strip():
        raise UsageError("the prompt is empty; give it with --prompt TEXT, --prompt - (stdin) or --prompt-file FILE")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid text ({error})") from error
    return text


def _encode(tokenizer: Tokenizer, text: str, options: GenerateOptions) -> list[int]:
    if options.raw:
        return tokenizer.encode(text)
    if tokenizer.chat_template is None:
        raise UsageError(f"{options.model} has no chat template: it continues text; add --raw")
    system = [{"role": "system", "content": options.system}] if options.system else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


def _read_heads(path: pathlib.Path) -> tuple[Drafts, HeadsInfo]:
    try:
        heads, tree, info = load_heads(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    return Drafts(heads, tree, info.token_ids), info


def _check_fit(model: Pretrained, prompt: Sequence[int], options: GenerateOptions, drafts: Drafts | None) -> None:
    """What depends on the model."""
    config, new = model.config, options.max_new_tokens
    if not prompt:
        raise UsageError("the prompt is empty: it has no tokens")
    if len(prompt) + new > config.max_positions:
        raise UsageError(
            f"the prompt of {len(prompt)} tokens and --max-new-tokens {new} do not fit into the "
            f"{config.max_positions} positions of {options.model}"
        )
    if options.top_k is not None and options.top_k > config.vocab_size:
        raise UsageError(f"--top-k is {options.top_k}, but {options.model} has {config.vocab_size} tokens")
    if drafts is not None:
        try:
            drafts.check(config)
        except ValueError as error:
            raise UsageError(f"{options.medusa}: {error}") from error


def _notes(options: GenerateOptions, prompt: int, info: HeadsInfo | None) -> Iterator[str]:
    """Options that will do nothing, or less than they might."""
    kept = prompt if options.snapkv is None else min(prompt, options.snapkv)
    if options.snapkv is not None and kept == prompt:
        yield f"--snapkv {options.snapkv} changes nothing, as the prompt has only {prompt} tokens"
    if options.block_topk is not None:
        budget, longest = BlockTopK(num_blocks=options.block_topk).budget, kept + options.max_new_tokens
        if budget >= longest:
            yield f"--block-topk {options.block_topk} reads up to {budget} tokens, and there are at most {longest}"
    if info is not None and info.model_name != options.model:
        yield f"the heads of {options.medusa} were trained on {info.model_name!r}"
    if options.temperature == 0 and (options.top_k is not None or options.top_p is not None):
        yield "--top-k and --top-p change nothing at temperature 0"


# What is seen --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(model: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Bars of what is fetched where stderr is a terminal, a line every few seconds where it is none."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        last = [time.monotonic()]

        def line(name: str, done: int, total: int | None) -> None:
            if time.monotonic() - last[0] > 5:
                last[0] = time.monotonic()
                size = "" if total is None else f" of {total / 1e6:.0f}"
                print(f"  {name}: {done / 1e6:.0f}{size} MB", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}
        bars.add_task(f"loading {escape(model)}", total=None)

        def update(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(escape(name), total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield update


def _waiting(doing: str) -> Status:
    """A sign of life on a terminal."""
    return Console(stderr=True).status(doing)


class _Clock:
    """Callback of `generate` that notes when the first and the later tokens came."""

    def __init__(self) -> None:
        self.start, self.times, self.count = time.perf_counter(), list[float](), 0

    def __call__(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        self.times.append(time.perf_counter() - self.start)
        self.count = int(counts[0])

    @property
    def after_two_calls(self) -> float:
        """Seconds until all programs had run once."""
        return self.times[min(1, len(self.times) - 1)]


class _Stream(_Clock):
    """Writes text as its tokens come. As a context it ends the line, also of a text that was interrupted."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        # A terminal that cannot show a character is no reason to stop.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._decoder, self._stop = StreamDecoder(tokenizer), stop_ids
        self._wait = _waiting("reading the prompt")
        self._wait.start()
        super().__init__()

    def __call__(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        self._wait.stop()
        shown = self.count
        super().__call__(tokens, counts)
        ids = [token for token in tokens[0, shown : self.count].tolist() if token not in self._stop]
        self._write("".join(map(self._decoder.push, ids)))

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._wait.stop()
        if kind is None or (kind is KeyboardInterrupt and self.count):
            self._write(self._decoder.finish() + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class _Warm(Exception):  # noqa: N818 - not an error
    """Everything is compiled."""


def _warm_up(request: _Request, params: Any, config: DecoderConfig) -> _Clock:
    """Run what will run until each program has run once."""
    clock = _Clock()

    def callback(tokens: np.ndarray, counts: np.ndarray) -> None:
        clock(tokens, counts)
        if len(clock.times) == 2:
            raise _Warm

    with contextlib.suppress(_Warm), _waiting("compiling"):
        request.run(params, config, callback)
    return clock


def _summary(prompt: int, clock: _Clock, steps: int, speculative: bool, warm: _Clock | None) -> str:
    """The last line."""
    parts = [f"{prompt} prompt tokens", f"first token after {clock.times[0]:.2f} s", f"{clock.count} new tokens"]
    if steps:
        parts.append(f"{(clock.count - 1) / (clock.times[-1] - clock.times[0]):.1f} tokens/s")
    if speculative and steps:
        parts.append(f"{(clock.count - 1) / steps:.2f} tokens per step")
    if warm is None:
        parts.append("times include compilation (--stats tells it apart)")
    else:
        parts.append(f"compilation apart: {max(warm.after_two_calls - clock.after_two_calls, 0):.2f} s")
    return ", ".join(parts)
