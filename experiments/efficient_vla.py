"""EfficientVLA in small: a policy that reads images and words, with its parts cut one by one and together.

Nothing is retrained. Success is an end point inside the right tile, on digits that training has not seen; seconds are
those of one whole step at batch 1 in one compiled program.
"""

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import efficient_vla_board as board
from experiments.data.text import load_python_topics
from experiments.runner import cost, stats
from experiments.runner.api import Comparison, Config, Experiment, Figure, Progress, Series, Table, Tile, check_rates
from experiments.runner.session import Session
from experiments.runner.sweep import spread
from jaxaccel.caching import EfficientVLAConfig
from jaxaccel.compression import layer_importance, prune_layers, select_layers
from jaxaccel.models import (
    DecoderConfig,
    HeadConfig,
    VLAConfig,
    cut_vla,
    decoder_forward,
    decoder_logits,
    load_action_head,
    load_pretrained,
    stack_layers,
    vla_cognition,
    vla_hidden_states,
    vla_policy,
)
from jaxaccel.models.vla import head_actions

FULL = "full"
PASSAGES = 64
"""Of 128 tokens, for the language model: one half ranks its layers, the other is measured."""
POLICY = jax.jit(vla_policy, static_argnames=("config", "cuts"))


@dataclasses.dataclass(frozen=True)
class EfficientVLAExperiment(Config):
    """A policy with its parts cut, without training."""

    layers: int = 6
    """Of the language model."""
    width: int = 64
    """Of the language model."""
    head_depth: int = 4
    """Blocks of the action head."""
    head_width: int = 48
    """Of the action head."""
    window: int = 8
    """Way-points."""
    steps: int = 1200
    """Of training."""
    batch: int = 48
    """Boards of a training step."""
    draws: int = 4
    """Noises for each board of a training step."""
    rate: float = 2e-3
    """Highest learning rate."""
    boards: int = 300
    """Held-out boards that success is counted on, for each seed."""
    calibration: int = 64
    """Boards, of training digits, that rank layers."""
    drops: tuple[int, ...] = (1, 2)
    """Layers to leave out."""
    tokens: tuple[int, ...] = (20, 16, 10)
    """Visual tokens to keep, of 25."""
    intervals: tuple[int, ...] = (2, 4, 5, 10)
    """Denoising steps from one full step to the next."""
    mlp_keep: float = 0.5
    """Share of the MLPs' channels that stays where they are sliced."""
    together: tuple[int, int, int] = (1, 16, 4)
    """Layers out, tokens kept and interval of the arm with all cuts."""
    repeats: int = 45
    """Turns of timing: steps of a few milliseconds are noisy."""
    language_model: str = "smollm2-135m"
    """A real language model whose layers are left out; empty for none."""
    language_drops: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Layers to leave out of it."""
    head_weights: str = ""
    """Safetensors with the action head of CogACT, or a hub id, whose intervals are timed; empty for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates("rate", (self.rate,))
        for name in ("steps", "batch", "draws", "boards", "calibration", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % 4:
            raise ValueError(f"steps must be a multiple of 4, got {self.steps}")
        if any(not 0 < drop < self.layers for drop in (*self.drops, self.together[0])):
            raise ValueError(f"drops must be 1 to layers - 1 = {self.layers - 1}, got {self.drops}")
        for keep in (*self.tokens, self.together[1]):
            if not 4 <= keep <= board.SIDE**2:
                raise ValueError(f"tokens must be 4 to {board.SIDE**2}, got {self.tokens}")

    @property
    def vla(self) -> VLAConfig:
        """The policy."""
        decoder = DecoderConfig.tiny(
            hidden_size=self.width, intermediate_size=2 * self.width, num_layers=self.layers, num_heads=4,
            num_kv_heads=4, head_dim=self.width // 4, vocab_size=len(board.WORDS),
        )  # fmt: skip
        head = HeadConfig(
            width=self.head_width, depth=self.head_depth, heads=3, token_size=self.width, window=self.window, channels=2
        )
        return VLAConfig(decoder=decoder, head=head, num_visual=board.SIDE**2, visual_size=board.VISUAL)


def arms(config: EfficientVLAExperiment) -> dict[str, tuple[str, EfficientVLAConfig]]:
    """Name, part of the model, and what is left out; the first is the whole policy."""
    drop, keep, interval = config.together
    make = EfficientVLAConfig
    found = {FULL: ("", make())}
    found |= {f"{n} of {config.layers} layers out": ("language", make(num_drop_layers=n)) for n in config.drops}
    found[f"{config.mlp_keep:.0%} of MLP channels"] = ("language", make(mlp_keep_ratio=config.mlp_keep))
    found |= {f"{k} of 25 tokens": ("tokens", make(num_keep_tokens=k)) for k in config.tokens}
    found |= {f"interval {n}": ("head", make(cache_interval=n)) for n in config.intervals}
    sliced = make(mlp_keep_ratio=config.mlp_keep, cache_interval=interval)
    found[f"{config.mlp_keep:.0%} of MLP channels, interval {interval}"] = ("together", sliced)
    found[f"{keep} tokens, interval {interval}"] = ("together", make(num_keep_tokens=keep, cache_interval=interval))
    every = make(num_drop_layers=drop, num_keep_tokens=keep, cache_interval=interval)
    found[f"all: {drop} out, {keep} tokens, interval {interval}"] = ("together", every)
    found[f"{keep} of 25 tokens at random"] = ("control", make(num_keep_tokens=keep))
    return found


def _train(config: EfficientVLAExperiment, session: Session) -> Generator[Progress, None, dict[str, Any]]:
    vla, chunks = config.vla, 4
    seeds = list(session.seeds)
    parts = [board.split_digits(seed) for seed in seeds]
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    encoders, accuracy = zip(
        *(board.train_encoder(jax.random.fold_in(k, 1), *p[0]) for k, p in zip(keys, parts, strict=True)), strict=True
    )
    encoder = jax.tree.map(lambda *leaves: jnp.stack(leaves), *encoders)
    digits, held = jnp.stack([p[0][0] for p in parts]), jnp.stack([p[1] for p in parts])
    chunk = config.steps // chunks
    init, advance = board.trainer(vla, config.batch, config.draws, config.rate, config.steps, chunk)
    params, state = init(keys)
    losses: list[float] = []
    for number in range(chunks):
        yield Progress("training", number * chunk, config.steps, f"loss {losses[-1]:.3f}" if losses else "")
        own = jax.vmap(lambda k, n=number: jax.random.split(jax.random.fold_in(k, 100 + n), chunk))(keys)
        params, state, loss = advance(params, state, encoder, digits, own)
        losses.append(float(loss.mean()))
    yield Progress("training", config.steps, config.steps, f"loss {losses[-1]:.3f}")
    return {"params": params["vla"], "encoder": encoder, "digits": digits, "held": held, "accuracy": accuracy}


def _measure(config: EfficientVLAExperiment, trained: dict[str, Any], seeds: Any) -> Generator[Progress, None, Any]:
    vla, contenders = config.vla, arms(config)
    success: dict[str, list[float]] = {name: [] for name in contenders}
    calls: dict[str, Any] = {}
    picture, ranks = None, []
    states = jax.jit(vla_hidden_states, static_argnames="config")
    for number, seed in enumerate(seeds):
        yield Progress("success", number, len(seeds))
        own = jax.tree.map(lambda x, n=number: x[n], trained["params"])
        encoder = jax.tree.map(lambda x, n=number: x[n], trained["encoder"])
        key = jax.random.key(1000 + seed)
        calibration = board.make_boards(jax.random.fold_in(key, 1), trained["digits"][number], config.calibration)
        visual = board.visual_tokens(encoder, calibration.tiles)
        importance = np.asarray(layer_importance(states(own, visual, calibration.text, vla)))
        ranks.append(importance.tolist())
        test = board.make_boards(jax.random.fold_in(key, 2), trained["held"][number], config.boards)
        visual = board.visual_tokens(encoder, test.tiles)
        noise = jax.random.normal(jax.random.fold_in(key, 3), (config.boards, config.window, 2))
        for name, (part, cuts) in contenders.items():
            params, smaller = cut_vla(own, vla, cuts, importance=importance)
            choice = None
            if part == "control":
                order = jax.random.uniform(jax.random.fold_in(key, 4), (config.boards, board.SIDE**2)).argsort(-1)
                choice = jnp.sort(order[:, : cuts.num_keep_tokens], -1)
            actions = POLICY(params, visual, test.text, noise, smaller, cuts=cuts, choice=choice)
            inside = jnp.all(jnp.abs(board.end_points(actions) - test.goal) <= board.HALF, -1)
            success[name].append(float(inside.mean()))
            if number == 0 and part != "control":
                single = jax.jit(functools.partial(vla_policy, config=smaller, cuts=cuts))
                arguments = (params, visual[:1], test.text[:1], noise[:1])
                calls[name] = functools.partial(single, *arguments)
        if number == 0:
            cuts = EfficientVLAConfig(num_keep_tokens=config.together[1])
            _, kept = vla_cognition(own, visual[:1], test.text[:1], vla, cuts=cuts)
            picture = (np.asarray(test.tiles[0]), np.asarray(kept[0]), int(test.place[0]))
    yield Progress("timing", 0, 1)
    timed = cost.time_in_turn(calls, repeats=config.repeats)
    return {
        "success": success,
        "seconds": {name: list(t.seconds) for name, t in timed.items()},
        "tiles": picture[0].tolist() if picture else [],
        "kept": picture[1].tolist() if picture else [],
        "place": picture[2] if picture else 0,
        "importance": ranks,
    }


def language(config: EfficientVLAExperiment) -> list[list[float]]:
    """Perplexity of a real language model on real text with its least important layers left out."""
    model = load_pretrained(config.language_model)
    data = load_python_topics()
    words = "".join(data.alphabet[i] for i in data.train[:120_000])
    assert model.tokenizer is not None, "the model comes with its tokenizer"
    ids = np.asarray(model.tokenizer.encode(words))[: PASSAGES * 129].reshape(PASSAGES, 129)
    params = jax.tree.map(jnp.asarray, model.params)
    stacked = stack_layers(params)
    hidden = _language_states(stacked, jnp.asarray(ids[: PASSAGES // 2, :-1]), model.config)
    importance = np.asarray(layer_importance(hidden))
    found = []
    for drop in config.language_drops:
        kept = select_layers(importance, num_drop=drop)
        smaller = stacked | {"layers": prune_layers(stacked["layers"], kept)}
        numbers = dataclasses.replace(model.config, num_layers=len(kept), scan_layers=True)
        loss = _language_loss(smaller, jnp.asarray(ids[PASSAGES // 2 :]), numbers)
        found.append([drop, float(jnp.exp(loss)), *(i for i in range(len(importance)) if i not in kept)])
    return found


@functools.partial(jax.jit, static_argnames="config")
def _language_states(params: Any, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    from jaxaccel.models.decoder import block, embed, prompt_context

    x = embed(params, tokens, config)
    context = prompt_context(x, config)

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        after, _ = block(layer, x, None, context, config)
        return after, after

    return jnp.concatenate([x[None], jax.lax.scan(step, x, params["layers"])[1]])


@functools.partial(jax.jit, static_argnames="config")
def _language_loss(params: Any, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    def some(tokens: jax.Array) -> jax.Array:
        logits = decoder_logits(params, decoder_forward(params, tokens[:, :-1], config).hidden)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))

    # Logits of all passages at once would be gigabytes.
    return jnp.mean(jax.lax.map(some, tokens.reshape(-1, 8, tokens.shape[1])))


def real_head(config: EfficientVLAExperiment) -> dict[str, list[float]]:
    """Seconds of CogACT's own action head with each interval."""
    params, head = load_action_head(config.head_weights)
    decoder = dataclasses.replace(config.vla.decoder, hidden_size=head.token_size)
    vla = dataclasses.replace(config.vla, decoder=decoder, head=head)
    noise, cond = jnp.ones((1, head.window, head.channels)), jnp.ones((1, head.token_size))
    params = jax.tree.map(jnp.asarray, params)
    calls = {}
    for interval in (1, *config.intervals):
        call = jax.jit(functools.partial(head_actions, config=vla, interval=interval))
        calls[f"interval {interval}"] = functools.partial(call, params, noise, cond)
    return {name: list(t.seconds) for name, t in cost.time_in_turn(calls, repeats=config.repeats).items()}


def run(config: EfficientVLAExperiment, session: Session) -> Generator[Progress, None, Comparison]:
    """Train, cut, count and time; what is finished is kept when the run is interrupted."""
    found = session.load("policy")
    if found is None:
        trained = yield from _train(config, session)
        found = yield from _measure(config, trained, session.seeds)
        found["encoder"] = [float(a) for a in trained["accuracy"]]
        session.save("policy", found)
    if config.language_model:
        done = session.load("language")
        if done is None:
            yield Progress("language model", 0, 1, config.language_model)
            done = {"perplexity": language(config)}
            session.save("language", done)
        found = found | done
    if config.head_weights:
        yield Progress("head", 0, 1, config.head_weights)
        found = found | {"head": real_head(config)}
    return compare(config, found)


# What was found ------------------------------------------------------------------------------------------------------


def compare(config: EfficientVLAExperiment, found: dict[str, Any]) -> Comparison:
    """Tables, figures, rows and the headline."""
    success, seconds = found["success"], found["seconds"]
    whole = float(np.median(seconds[FULL]))
    lines: list[tuple[str, str, float | None, float | None]] = []
    rows: list[Any] = []
    points: list[tuple[float, float, str]] = []
    for name, (part, _) in arms(config).items():
        mean = float(np.mean(success[name]))
        if name not in seconds:
            lines.append((name, spread(success[name]), None, None))
            continue
        ratio = whole / float(np.median(seconds[name]))
        lines.append((name, spread(success[name]), 1e3 * whole / ratio, ratio))
        points.append((1e3 * whole / ratio, mean, part))
        if name != FULL:
            rows.append(_row(config, name, found, ratio))
    tables = [
        Table(
            f"Success and milliseconds of one policy step ({len(success[FULL])} seeds)",
            ("what is left out", "success", "ms, batch 1", "times as fast"),
            tuple(lines),
            "success: mean ± deviation over seeds; milliseconds: medians in turn, first seed, one program each",
        )
    ]
    if "perplexity" in found:
        tables.append(
            Table(
                f"Layers left out of {config.language_model}",
                ("layers out", "perplexity", "which"),
                tuple((int(n), p, ", ".join(str(int(i)) for i in which)) for n, p, *which in found["perplexity"]),
                f"{PASSAGES // 2} passages of Python's reference; ranked on as many others",
            )
        )
    if "head" in found:
        top = float(np.median(found["head"]["interval 1"]))
        tables.append(
            Table(
                "CogACT's action head with its own weights",
                ("interval", "ms", "times as fast"),
                tuple(
                    (name, 1e3 * float(np.median(s)), top / float(np.median(s))) for name, s in found["head"].items()
                ),
            )
        )
    best = next(name for name in seconds if name.startswith("all"))
    return Comparison(
        headline=_headline(found, best, whole),
        rows=tuple(rows),
        tables=tuple(tables),
        figures=(_scatter(points), _picture(found)),
        notes=(
            f"Tile encoder: {np.mean(found['encoder']):.1%} right on its own training task; frozen.",
            "Nothing is retrained after a cut. The paper's policy has 32 layers to choose from, this one "
            f"{config.layers}: dropped layers cost more here.",
            "Image tokens hold their place on the board, as encoders of images add it.",
            "SIMPLER and the 7 B policy of the paper are not part of this experiment.",
        ),
    )


def _row(config: EfficientVLAExperiment, name: str, found: dict[str, Any], ratio: float) -> dict[str, Any]:
    success, seconds = found["success"], found["seconds"]
    return {
        "method": "efficient_vla",
        "method_config": {"arm": name},
        "baseline": "whole policy",
        "task": {"kind": "inference", "name": "digit board", "metric": "success", "higher_is_better": True},
        "model": {"family": "vla", "params": config.vla.decoder.num_parameters},
        "workload": {"batch": 1, "steps": config.vla.sample_steps, "seeds": len(success[name])},
        "cost_kind": "wall",
        "speedup": ratio,
        "speedup_ci": stats.bootstrap_ratio(seconds[FULL], seconds[name]),
        "quality": float(np.mean(success[name])),
        "quality_baseline": float(np.mean(success[FULL])),
    }


def _headline(found: dict[str, Any], best: str, whole: float) -> str:
    success, seconds = found["success"], found["seconds"]
    base = float(np.mean(success[FULL]))
    ratios = {name: whole / float(np.median(s)) for name, s in seconds.items()}
    near = {name: r for name, r in ratios.items() if np.mean(success[name]) >= base - 0.02}
    fastest = max(near, key=lambda name: near[name])
    random = next(name for name in success if name.endswith("at random"))
    return (
        f"all cuts together {ratios[best]:.1f}x as fast, success {np.mean(success[best]):.1%} against {base:.1%}; "
        f"within 2 points of the whole policy: {near[fastest]:.1f}x ({fastest}); "
        f"random tokens {np.mean(success[random]):.1%}"
    )


def _scatter(points: list[tuple[float, float, str]]) -> Figure:
    series = []
    for part in dict.fromkeys(p[2] for p in points):
        own = sorted(p[:2] for p in points if p[2] in (part, ""))
        label = part or "whole policy"
        series.append(Series(label, tuple(p[0] for p in own), tuple(p[1] for p in own)))
    return Figure("Success against compute", "milliseconds at batch 1", "success", tuple(series))


def _picture(found: dict[str, Any]) -> Figure:
    """The board pixel by pixel would be 40 × 40 cells: tiles by their mean ink, with kept ones named."""
    tiles = np.asarray(found["tiles"]).reshape(board.SIDE, board.SIDE, 8, 8)
    pixels = tiles.transpose(0, 2, 1, 3).reshape(8 * board.SIDE, 8 * board.SIDE)
    kept = set(found["kept"])

    def cell(row: int, column: int) -> Tile:
        number = row // 8 * board.SIDE + column // 8
        return Tile("", float(pixels[row, column])) if number in kept else Tile("", None)

    size = 8 * board.SIDE
    grid = tuple(tuple(cell(row, column) for column in range(size)) for row in range(size))
    return Figure(
        f"Image tokens that are kept, {len(kept)} of {board.SIDE**2}", "", "", tiles=grid, tile_label="ink",
        note="grey: left out",
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="efficient_vla",
    method="efficient_vla",
    claim="1.9x faster policy steps at 0.6 points less success, without training",
    config=EfficientVLAExperiment,
    presets={
        "quick": EfficientVLAExperiment(seeds=3),
        "full": EfficientVLAExperiment(
            seeds=5, layers=32, width=512, head_depth=12, head_width=768, window=16, steps=20_000, batch=128, draws=8,
            rate=3e-4, boards=2000, drops=(4, 10), together=(10, 10, 5), head_weights="cogact-base-head.safetensors",
        ),
    },
    run=run,
)  # fmt: skip
