"""SmolLM2-135M here: decoding against the bandwidth limit, and transformers and llama.cpp where they are installed."""

import functools
import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import BenchOptions, Measurement, llama_cpp
from experiments.data.text import load_python_topics
from experiments.runner import cost, stats
from jaxaccel.compression import linear
from jaxaccel.decoding.generate import Rules, advance, start
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.drafts import cached_model
from jaxaccel.models.generation import generate, prepare
from jaxaccel.models.kv_cache import BlockTopK
from jaxaccel.models.prompts import SnapKV, prefill
from jaxaccel.models.weights import load_pretrained

MODEL = "smollm2-135m"
CASES = ((1, 32), (8, 32), (1, 2048))
"""Batches and lengths of prompts."""
LONGER, CAPACITY = 4096, 512
"""A long prompt, and the tokens that are kept or read of it."""
NEW = 48
"""Tokens that a run emits; the first comes from the prompt."""


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Decoding at batch 1 and 8, after short and long prompts, dense and compressed."""
    loaded = load_pretrained(MODEL)
    assert loaded.tokenizer is not None
    text = "".join(load_python_topics().alphabet[i] for i in load_python_topics().test)
    tokens = np.array(loaded.tokenizer.encode(text), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        longest = max(length for _, length in CASES) + NEW
        others = dict(llama_cpp.models(loaded.origin, pathlib.Path(folder), longest))
        yield from decoding(options, loaded.params, loaded.config, tokens, CASES, others)
    yield from long_prompts(options, loaded.params, loaded.config, tokens)
    yield from few_rows(options, loaded.params)


def prompts(tokens: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Different pieces of the text [B, T]."""
    starts = np.linspace(0, len(tokens) - length - 1, batch).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def bandwidth(repeats: int = 9) -> float:
    """Bytes a second, read and written, of an array that no cache holds, in place: no page is touched first."""
    array = jnp.ones(2**27)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for _ in range(repeats):
        array = jax.block_until_ready(add(array))
        began = time.perf_counter()
        array = jax.block_until_ready(add(array))
        seconds.append(time.perf_counter() - began)
    return float(2 * array.nbytes / np.median(seconds))


def _bytes_a_token(params: Any, config: DecoderConfig, cached: int) -> int:
    """Weights and cached keys and values that a token of batch 1 needs; a tied embedding is read once."""
    return cost.tree_bytes(params) + 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * cached


class Run(NamedTuple):
    """Seconds of one generation."""

    first: float  # prompt and first token
    rest: float  # the tokens after it
    tokens: np.ndarray  # [B, NEW]


class Turns(NamedTuple):
    """Runs of several contenders in turn."""

    runs: dict[str, list[Run]]
    warming: dict[str, float]  # seconds of the first run of each, which compiles, over those of a later one


def in_turn(calls: dict[str, Callable[[], Run]], repeats: int) -> Turns:
    """Each call once to compile, then all in turn."""
    runs, first = cost.results_in_turn(calls, repeats)
    whole = {name: float(np.median([run.first + run.rest for run in each])) for name, each in runs.items()}
    return Turns(runs, {name: first[name] - whole[name] for name in calls})


def ours(params: Any, config: DecoderConfig, batch: np.ndarray, **options: Any) -> Callable[[], Run]:
    """A generation whose first token is told as it comes, the rest in one compiled call."""

    def call() -> Run:
        times = [time.perf_counter()]

        def heard(tokens: np.ndarray, count: np.ndarray) -> None:
            times.append(time.perf_counter())

        out = generate(params, batch, config, max_new_tokens=NEW, callback=heard, every=NEW, **options)
        return Run(times[1] - times[0], times[-1] - times[1], np.asarray(out.tokens))

    return call


def transformers_model(params: Any, config: DecoderConfig) -> Any:
    """The same weights in transformers, on as many threads, or ``None`` where torch or transformers is missing."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return None
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_positions, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).eval()
    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    state["lm_head.weight"] = params["embedding"]
    names = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for i, layer in enumerate(params["layers"]):
        state |= {f"model.layers.{i}.{theirs}.weight": layer[name] for name, theirs in names.items()}
    model.load_state_dict({name: torch.from_numpy(np.array(leaf)) for name, leaf in state.items()})
    return model


def anchor(model: Any, prompt: np.ndarray) -> Callable[[], Run]:
    """The same with llama.cpp."""
    call = llama_cpp.generation(model, prompt.tolist(), NEW)
    return lambda: Run(*call())


def theirs(model: Any, batch: np.ndarray) -> Callable[[], Run]:
    """The same with transformers' greedy generation."""
    torch: Any = importlib.import_module("torch")
    ids = torch.from_numpy(np.asarray(batch)).long()

    def call() -> Run:
        times = [time.perf_counter()]

        def heard(input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, stopping_criteria=[heard]
            )
        return Run(times[1] - times[0], times[-1] - times[1], np.asarray(out[:, ids.shape[1] :]))

    return call


def _rests(runs: list[Run]) -> list[float]:
    return [run.rest for run in runs]


def _speed(name: str, top: list[float], bottom: list[float], goal: str, detail: str) -> Measurement:
    ratio = float(np.median(top) / np.median(bottom))
    return Measurement(name, ratio, stats.bootstrap_ratio(top, bottom), goal, detail)


def _shown(turns: Turns) -> str:
    """Tokens a second of each, seconds to the first token, and seconds of compilation."""
    runs = turns.runs
    rows = {name: r[0].tokens.size // NEW for name, r in runs.items()}
    speed = ", ".join(f"{n} {rows[n] * (NEW - 1) / np.median(_rests(r)):.1f}" for n, r in runs.items())
    first = ", ".join(f"{n} {np.median([run.first for run in r]):.2f} s" for n, r in runs.items())
    compiling = ", ".join(f"{n} {seconds:.1f} s" for n, seconds in turns.warming.items())
    return f"tokens/s: {speed}; prompt and first token: {first}; first run longer by: {compiling}"


def products(params: Any, repeats: int) -> list[float]:
    """Seconds of the products of ``NEW - 1`` steps at batch 1, one after the other as in the model, nothing else."""

    def step(_: jax.Array, x: jax.Array, params: Any) -> jax.Array:
        for layer in params["layers"]:
            width = x.shape[1]
            x = x + linear(linear(x, layer["qkv"])[:, :width], layer["o"])
            both = linear(x, layer["gate_up"])
            x = x + linear(both[:, : both.shape[1] // 2], layer["down"])
            x = x * jax.lax.rsqrt(jnp.mean(x**2))
        return x + 1e-9 * linear(x, params["embedding"])[:, : x.shape[1]]

    chain = jax.jit(lambda x, params: jax.lax.fori_loop(0, NEW - 1, lambda i, x: step(i, x, params), x))
    x = jnp.ones((1, params["final_norm"].size))
    timings = cost.time_in_turn({"": functools.partial(chain, x, params)}, repeats=repeats, min_seconds=0.0)
    return list(timings[""].seconds)


def decoding(
    options: BenchOptions,
    params: Any,
    config: DecoderConfig,
    tokens: np.ndarray,
    cases: tuple[tuple[int, int], ...],
    others: Mapping[str, Any],
) -> Iterator[Measurement]:
    """Tokens a second at several batches and lengths of prompts, float32 and int8, beside other engines' at batch 1."""
    forms = {"float32": prepare(params), "int8": prepare(params, "int8")}
    model = transformers_model(params, config)
    rate = bandwidth()
    repeats = max(3, options.repeats // 3)
    alone: list[float] = []
    for batch, length in cases:
        text = prompts(tokens, batch, length)
        calls = {name: ours(form, config, text) for name, form in forms.items()}
        if model is not None:
            calls["transformers"] = theirs(model, text)
        if batch == 1:
            calls |= {name: anchor(other, text[0]) for name, other in others.items()}
        where = f"batch {batch}, prompt {length}"
        turns = in_turn(calls, repeats)
        runs, detail = turns.runs, _shown(turns)
        mine = _rests(runs["float32"])
        if model is not None:
            same = float(np.mean(runs["float32"][0].tokens == runs["transformers"][0].tokens))
            yield Measurement(f"share of greedy tokens equal to transformers', {where}", same, None, ">= 1")
            goal = ">= 1.3" if batch == 1 else ""
            top = _rests(runs["transformers"])
            yield _speed(f"transformers / ours, float32, {where}", top, mine, goal, detail)
            top, bottom = ([run.first for run in runs[name]] for name in ("transformers", "float32"))
            rate_ = batch * length / np.median(bottom)
            yield _speed(
                f"transformers / ours, prompt and first token, {where}", top, bottom, "",
                f"ours {rate_:.0f} prompt tokens/s",
            )  # fmt: skip
        if batch == 1:
            alone = mine if length == cases[0][1] else alone
            limit = rate / _bytes_a_token(forms["float32"], config, length + NEW // 2)
            name = f"bandwidth limit's time / ours, float32, {where}"
            note = f"limit {limit:.1f} tokens/s at {rate / 1e9:.1f} GB/s copied; {detail}"
            yield _speed(name, [(NEW - 1) / limit] * len(mine), mine, ">= 0.8", note)
            yield _speed(f"float32 / int8, {where}", mine, _rests(runs["int8"]), ">= 2", detail)
            for name in others:
                goal = ">= 0.8" if name.endswith("Q8_0") else ""
                form = "float32" if name.endswith("F32") else "int8"
                yield _speed(f"{name} / ours, {form}, {where}", _rests(runs[name]), _rests(runs[form]), goal, detail)
            if length == cases[0][1]:
                for form, params_ in forms.items():
                    alone_ = products(params_, repeats)
                    yield _speed(
                        f"share of a step in products of weights, {form}", alone_, _rests(runs[form]), "",
                        f"products alone {1e3 * np.median(alone_) / (NEW - 1):.1f} ms, weights read at "
                        f"{cost.tree_bytes(params_) * (NEW - 1) / np.median(alone_) / 1e9:.1f} GB/s",
                    )  # fmt: skip
        else:
            more = [batch * seconds for seconds in alone]
            yield _speed(f"tokens/s of batch {batch} / batch 1, prompt {length}", more, mine, ">= 4", detail)


def long_prompts(
    options: BenchOptions, params: Any, config: DecoderConfig, tokens: np.ndarray
) -> Iterator[Measurement]:
    """Decoding after a long prompt: all of it, what SnapKV keeps, blocks of it."""
    ready = prepare(params)
    text = prompts(tokens, 1, LONGER)
    ways: dict[str, dict[str, Any]] = {
        "dense": {},
        "snapkv": {"snapkv": SnapKV(capacity=CAPACITY)},
        "block top-k": {"sparse": BlockTopK(num_blocks=CAPACITY // 16 - 5, num_local=48)},
    }
    calls = {name: steps_after(ready, config, text, **way) for name, way in ways.items()}
    timings = cost.time_in_turn(calls, repeats=max(5, options.repeats // 2), min_seconds=0.0)
    speed = ", ".join(f"{name} {(NEW - 1) / timing.median:.1f}" for name, timing in timings.items())
    for name, goal in (("snapkv", ">= 1.5"), ("block top-k", "")):
        value, interval = cost.ratio(timings, "dense", name)
        yield Measurement(f"dense / {name} of {CAPACITY}, prompt {LONGER}", value, interval, goal, f"tokens/s: {speed}")
    for name, way in ways.items():
        held, step = memory(ready, config, text, **way)
        yield Measurement(
            f"MB of cache after a prompt of {LONGER}, {name}", held / 1e6, None, "",
            f"weights {cost.tree_bytes(ready) / 1e6:.0f} MB, a step needs {step / 1e6:.0f} MB with both",
        )  # fmt: skip


def steps_after(params: Any, config: DecoderConfig, batch: np.ndarray, **options: Any) -> Callable[[], jax.Array]:
    """``NEW - 1`` steps after a prompt that was read once: each call starts from a copy of what it left."""
    rules, length = Rules(), jnp.full(len(batch), batch.shape[1], jnp.int32)
    parts = prefill(params, jnp.asarray(batch), length, config, room=NEW + 1, **options)
    state = start(*parts, rules=rules, max_new_tokens=NEW)

    def call() -> jax.Array:
        own = jax.tree.map(jnp.copy, state)
        return advance(params, None, own, jnp.int32(NEW), model=cached_model(config), rules=rules).tokens

    return call


def memory(params: Any, config: DecoderConfig, batch: np.ndarray, **options: Any) -> tuple[int, int]:
    """Bytes of a cache after a prompt, and of all that a step holds, from shapes and from the compiled program."""
    rules, room = Rules(), NEW + 1
    length = jnp.full(len(batch), batch.shape[1], jnp.int32)
    shapes = jax.eval_shape(
        lambda params, tokens, length: prefill(params, tokens, length, config, room=room, **options),
        params, jnp.asarray(batch), length,
    )  # fmt: skip
    state = jax.eval_shape(functools.partial(start, rules=rules, max_new_tokens=NEW), *shapes)
    step = advance.lower(params, None, state, jnp.int32(1), model=cached_model(config), rules=rules).compile()
    return cost.tree_bytes(shapes[2]), cost.peak_bytes(step) or 0


def few_rows(options: BenchOptions, params: Any) -> Iterator[Measurement]:
    """Eight rows through the feed-forward matrices of all layers, one after the other: `linear` against ``x @ W``."""
    pairs = [(jnp.asarray(layer["up"]), jnp.asarray(layer["down"])) for layer in params["layers"]]
    turned = [(up.T.copy(), down.T.copy()) for up, down in pairs]

    def through(product: Callable[..., jax.Array]) -> Any:
        def run(x: jax.Array, matrices: Any) -> jax.Array:
            for up, down in matrices:
                x = x + product(product(x, up), down)
            return x

        return jax.jit(run)

    rows = {count: jnp.ones((count, pairs[0][0].shape[1])) for count in (1, 8)}
    ours_, plain = through(linear), through(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {
        "ours 8": functools.partial(ours_, rows[8], pairs),
        "plain 8": functools.partial(plain, rows[8], turned),
        "ours 1": functools.partial(ours_, rows[1], pairs),
    }
    timings = cost.time_in_turn(calls, repeats=options.repeats)
    for top, bottom, name in (
        ("plain 8", "ours 8", "x @ W [in, out] / linear with W [out, in], 8 rows"),
        ("ours 8", "ours 1", "linear, 8 rows / 1 row"),
    ):
        value, interval = cost.ratio(timings, top, bottom)
        size = cost.tree_bytes(pairs) / 1e9
        detail = f"{size / timings[bottom].median:.1f} GB/s of weights in the second"
        yield Measurement(f"{name}, feed-forward matrices", value, interval, "", detail)
