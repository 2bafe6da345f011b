"""SmolLM2-135M on this machine: decoding against the bandwidth limit and against transformers where it is installed."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import BenchOptions, Measurement
from experiments.data.text import load_python_topics
from experiments.runner import cost, stats
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.generation import SnapKV, generate, prepare
from jaxaccel.models.kv_cache import BlockTopK
from jaxaccel.models.weights import load_pretrained

MODEL = "smollm2-135m"
SHORT, LONG, LONGER = 32, 2048, 4096
NEW = 48
"""Tokens that a run emits; the first comes from the prompt."""


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Decoding at batch 1 and 8, after short and long prompts, dense and compressed."""
    loaded = load_pretrained(MODEL)
    assert loaded.tokenizer is not None
    text = "".join(load_python_topics().alphabet[i] for i in load_python_topics().test)
    tokens = np.array(loaded.tokenizer.encode(text), np.int32)
    yield from decoding(options, loaded.params, loaded.config, tokens, (SHORT, LONG))
    yield from long_prompts(options, loaded.params, loaded.config, tokens)


def prompts(tokens: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Different pieces of the text [B, T]."""
    starts = np.linspace(0, len(tokens) - length - 1, batch).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def bandwidth() -> float:
    """Bytes a second that all threads copy, of an array that no cache holds."""
    array = jnp.ones(2**26)
    timing = cost.time_in_turn({"copy": functools.partial(jax.jit(lambda x: x + 1), array)}, repeats=9)["copy"]
    return 2 * array.nbytes / timing.median


def _bytes_a_token(params: Any, config: DecoderConfig, cached: int) -> int:
    """Weights and cached keys and values that a token of batch 1 needs; a tied embedding is read once."""
    return cost.tree_bytes(params) + 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * cached


def decode_seconds(
    calls: dict[str, Callable[[int], Any]], new: int, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of decoding, and of prompt and first token: runs of ``new`` tokens and of one, in turn, taken apart."""
    both = {(name, n): functools.partial(call, n) for name, call in calls.items() for n in (1, new)}
    timings = cost.time_in_turn({f"{name} {n}": call for (name, n), call in both.items()}, repeats=repeats)
    result = {}
    for name in calls:
        first, whole = (np.array(timings[f"{name} {n}"].seconds) for n in (1, new))
        result[name] = ((whole - first).tolist(), first.tolist())
    return result


def ours(params: Any, config: DecoderConfig, batch: np.ndarray, **options: Any) -> Callable[[int], Any]:
    """A call that generates so many tokens."""

    def call(new: int) -> Any:
        return generate(params, batch, config, max_new_tokens=new, **options).tokens

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


def theirs(model: Any, batch: np.ndarray) -> Callable[[int], Any]:
    """The same call with transformers' greedy generation."""
    torch: Any = importlib.import_module("torch")
    ids = torch.from_numpy(np.asarray(batch)).long()

    def call(new: int) -> np.ndarray:
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        return np.asarray(out[:, ids.shape[1] :])

    return call


def _speed(name: str, top: list[float], bottom: list[float], goal: str, detail: str) -> Measurement:
    ratio = float(np.median(top) / np.median(bottom))
    return Measurement(name, ratio, stats.bootstrap_ratio(top, bottom), goal, detail)


def decoding(
    options: BenchOptions, params: Any, config: DecoderConfig, tokens: np.ndarray, lengths: tuple[int, ...]
) -> Iterator[Measurement]:
    """Tokens a second at batch 1 and 8, float32 and int8."""
    forms = {"float32": prepare(params), "int8": prepare(params, "int8")}
    model = transformers_model(params, config)
    rate = bandwidth()
    repeats = max(3, options.repeats // 3)
    for length in lengths:
        alone: list[float] = []
        for batch in (1, 8):
            text = prompts(tokens, batch, length)
            calls = {name: ours(form, config, text) for name, form in forms.items()}
            if model is not None:
                calls["transformers"] = theirs(model, text)
            where = f"batch {batch}, prompt {length}"
            if model is not None and length == lengths[0]:
                same = np.mean(np.asarray(calls["float32"](NEW)) == calls["transformers"](NEW))
                yield Measurement(f"greedy tokens equal to transformers', {where}", float(same), None, ">= 1")
            seconds = decode_seconds(calls, NEW, repeats)
            speed = {name: batch * (NEW - 1) / np.median(times) for name, (times, _) in seconds.items()}
            shown = ", ".join(f"{name} {value:.1f}" for name, value in speed.items())
            first = ", ".join(f"{name} {np.median(times):.2f} s" for name, (_, times) in seconds.items())
            limit = rate / _bytes_a_token(forms["float32"], config, length + NEW // 2)
            detail = f"tokens/s: {shown}; prompt and first token: {first}"
            mine = seconds["float32"][0]
            if model is not None:
                goal = ">= 1.3" if batch == 1 else ""
                yield _speed(f"transformers / ours, float32, {where}", seconds["transformers"][0], mine, goal, detail)
            if batch == 1:
                alone = mine
                name = f"ours float32 / bandwidth limit, tokens/s, {where}"
                note = f"limit {limit:.1f} tokens/s at {rate / 1e9:.1f} GB/s; {detail}"
                yield Measurement(name, float(speed["float32"] / limit), None, ">= 0.8", note)
                yield _speed(f"float32 / int8, {where}", mine, seconds["int8"][0], ">= 2", detail)
            else:
                yield _speed(
                    f"tokens/s of batch 8 / batch 1, prompt {length}", [8 * t for t in alone], mine, ">= 4", detail
                )


def long_prompts(
    options: BenchOptions, params: Any, config: DecoderConfig, tokens: np.ndarray
) -> Iterator[Measurement]:
    """Decoding after a long prompt: all of it, what SnapKV keeps, blocks of it."""
    ready = prepare(params)
    text = prompts(tokens, 1, LONGER)
    ways: dict[str, dict[str, Any]] = {
        "dense": {},
        "snapkv": {"snapkv": SnapKV(capacity=512)},
        "block top-k": {"sparse": BlockTopK(num_blocks=28, num_local=48)},
    }
    calls = {name: ours(ready, config, text, **way) for name, way in ways.items()}
    seconds = decode_seconds(calls, NEW, max(3, options.repeats // 5))
    shown = ", ".join(f"{name} {(NEW - 1) / np.median(times):.1f}" for name, (times, _) in seconds.items())
    first = ", ".join(f"{name} {np.median(times):.2f} s" for name, (_, times) in seconds.items())
    detail = f"tokens/s: {shown}; prompt and first token: {first}"
    for name, goal in (("snapkv", ">= 1.5"), ("block top-k", "")):
        yield _speed(f"dense / {name} of 512, prompt {LONGER}", seconds["dense"][0], seconds[name][0], goal, detail)
