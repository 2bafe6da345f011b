"""Medusa on a real model: heads trained here, then tokens per step and tokens per second against plain decoding.

Heads learn from states of the frozen model (`experiments.medusa_data`), a tree is built from their accuracies for each
number of guesses, and text that was held out is continued greedily with every tree and without. The text must be the
same; what differs is how many passes it takes, and how long. Heads and the largest tree are saved as one file, which
`python -m experiments generate --medusa FILE` takes. Where the table says that fewer guesses are faster, save the
heads anew with the beginning of that tree's paths, which is the best tree of its size.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.medusa_config import TOP, MedusaConfig
from experiments.medusa_data import RANDOM, Frozen, Portion, Positions, Texts, collect, load_texts, positions, windows
from experiments.runner import stats
from experiments.runner.api import Cell, Comparison, Experiment, Figure, Progress, Series, Table
from experiments.runner.cost import results_in_turn
from experiments.runner.session import Session
from experiments.runner.sweep import spread
from jaxaccel.compression import take_rows
from jaxaccel.decoding import MedusaConfig as HeadsConfig
from jaxaccel.decoding import build_tree, init_medusa_heads, make_tree, medusa_logits, medusa_loss, rank_accuracies
from jaxaccel.decoding.heads_file import load_heads, save_heads
from jaxaccel.decoding.medusa import MedusaParams
from jaxaccel.models.decoder import output_matrix
from jaxaccel.models.drafts import Drafts
from jaxaccel.models.generation import generate

# Training -------------------------------------------------------------------------------------------------------------


def draft_vocabulary(targets: np.ndarray, count: int) -> np.ndarray | None:
    """The ``count`` most frequent targets, by id; ``None`` for the whole vocabulary."""
    if not count:
        return None
    ids, times = np.unique(targets, return_counts=True)
    return np.sort(ids[np.argsort(-times, kind="stable")[:count]]).astype(np.int32)


def _rows(frozen: Frozen, ids: np.ndarray | None) -> Any:
    """Rows of the output matrix that heads share, or all of it."""
    matrix = output_matrix(frozen.params)
    return matrix if ids is None else take_rows(matrix, jnp.asarray(ids))


def _inside(targets: np.ndarray, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Targets as places in the draft vocabulary, and which of them are in it."""
    if ids is None:
        return targets, np.ones(targets.shape, bool)
    place = np.minimum(np.searchsorted(ids, targets), len(ids) - 1)
    known = ids[place] == targets
    return np.where(known, place, 0).astype(np.int32), known


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("heads", "state"))
def _train_step(
    heads: MedusaParams, state: Any, rows: Any, batch: Any, *, config: MedusaConfig
) -> tuple[MedusaParams, Any, jax.Array]:
    hidden, targets, known = batch

    def loss(heads: MedusaParams) -> jax.Array:
        return medusa_loss(medusa_logits(heads, hidden, lm_head=rows), targets, known, decay=config.decay)

    value, slope = jax.value_and_grad(loss)(heads)
    updates, state = _optimizer(config).update(slope, state, heads)
    return optax.apply_updates(heads, updates), state, value


def _optimizer(config: MedusaConfig) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))


def train(
    config: MedusaConfig, frozen: Frozen, data: Positions, ids: np.ndarray | None, seed: int
) -> Generator[Progress, None, MedusaParams]:
    """Heads that share rows of the model's output matrix, trained on random batches of positions."""
    heads = init_medusa_heads(
        jax.random.key(seed),
        frozen.config.hidden_size,
        frozen.config.vocab_size,
        config=HeadsConfig(num_heads=config.num_heads),
        share_vocab=True,
    )
    targets, known = _inside(data.targets, ids)
    rows, rng = _rows(frozen, ids), np.random.default_rng(seed)
    state, loss = _optimizer(config).init(heads), float("nan")
    for step in range(config.steps):
        at = rng.integers(0, len(data.hidden), config.batch_size)
        heads, state, value = _train_step(
            heads, state, rows, (data.hidden[at], targets[:, at], known[:, at]), config=config
        )
        if step % 20 == 0:
            loss = float(value)
            yield Progress(f"training heads, seed {seed}", step, config.steps, f"loss {loss:.3f}")
    yield Progress(f"training heads, seed {seed}", config.steps, config.steps, f"loss {float(value):.3f}")
    return heads


def accuracies(heads: MedusaParams, frozen: Frozen, data: Positions, ids: np.ndarray | None) -> np.ndarray:
    """Share of positions where the target is a head's r-th guess [heads, TOP]; 0 for what cannot be guessed."""
    targets, known = _inside(data.targets, ids)
    ranked = jax.jit(lambda h, rows, x, t, m: rank_accuracies(medusa_logits(h, x, lm_head=rows), t, m, top_k=TOP))
    shares = ranked(heads, _rows(frozen, ids), data.hidden, targets, known)
    return np.asarray(shares, np.float64) * known.mean(1)[:, None]


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One generation: text, passes, and seconds after the first token."""

    tokens: np.ndarray
    passes: int
    histogram: tuple[int, ...]
    seconds: float

    @property
    def per_step(self) -> float:
        """Tokens that a sequence gained in a step."""
        total = sum(self.histogram)
        return sum((i + 1) * n for i, n in enumerate(self.histogram)) / total if total else float("nan")


def decode(config: MedusaConfig, frozen: Frozen, prompts: np.ndarray, drafts: Drafts | None) -> Decoded:
    """Continue prompts greedily."""
    times = []
    out = generate(
        frozen.params, prompts, frozen.config, max_new_tokens=config.new_tokens, drafts=drafts,
        callback=lambda tokens, count: times.append(time.perf_counter()), every=config.new_tokens,
    )  # fmt: skip
    return Decoded(
        np.asarray(out.tokens), int(out.steps), tuple(np.asarray(out.histogram).tolist()), times[-1] - times[0]
    )


def _drafts(heads: MedusaParams, ids: np.ndarray | None, tree: Sequence[Sequence[int]]) -> Drafts:
    return Drafts(heads, make_tree(tree, top_k=TOP), ids)


def time_trees(
    config: MedusaConfig, frozen: Frozen, prompts: np.ndarray, trees: Mapping[int, Drafts | None]
) -> dict[int, list[Decoded]]:
    """Each tree once to compile, then all in turn."""
    calls = {n: functools.partial(decode, config, frozen, prompts, drafts) for n, drafts in trees.items()}
    return results_in_turn(calls, config.repeats)[0]


# The experiment -------------------------------------------------------------------------------------------------------


def run(config: MedusaConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Collect, train each seed, decode; what is finished is kept when the run is interrupted."""
    yield Progress("loading the model", 0, 1)
    frozen = Frozen.load(config.model)
    needed = (config.text + config.own) * config.length
    texts = load_texts(config.dataset, frozen, tokens=needed)
    yield Progress("loading the model", 1, 1)
    portion = Portion(config.length, config.text, config.own, config.prompt, config.own_batch)
    parts = session.directory / "states"
    data: Positions | None = None
    ids: np.ndarray | None = None
    results: list[dict[str, Any]] = []
    for seed in session.seeds:
        saved, path = session.load(f"seed-{seed}"), session.directory / f"heads-{seed}.safetensors"
        if saved is None:
            if data is None:
                began = time.perf_counter()
                data = yield from collect(frozen, texts.train, portion, config.num_heads, parts)
                session.save("collecting", session.load("collecting") or time.perf_counter() - began)
                ids = draft_vocabulary(data.targets, config.vocabulary)
            saved = yield from _one_seed(config, frozen, texts, data, ids, seed, path)
            session.save(f"seed-{seed}", saved)
        results.append(saved)
    speeds = session.load("speeds")
    if speeds is None:
        heads, _, info = load_heads(session.directory / "heads-0.safetensors")
        speeds = yield from _speeds(config, frozen, texts, results[0], heads, info.token_ids)
        session.save("speeds", speeds)
    for part in parts.glob("part-*.npz"):
        part.unlink()
    return compare(config, frozen, results, speeds, session.load("collecting"), session.directory)


def _held_out(config: MedusaConfig, ids: np.ndarray) -> np.ndarray:
    return windows(ids, config.prompts, config.prompt_length)


def _one_seed(
    config: MedusaConfig,
    frozen: Frozen,
    texts: Texts,
    data: Positions,
    ids: np.ndarray | None,
    seed: int,
    path: pathlib.Path,
) -> Generator[Progress, None, dict[str, Any]]:
    """Train; build trees from accuracies along the model's own continuations of validation text; decode the test."""
    began = time.perf_counter()
    heads = yield from train(config, frozen, data, ids, seed)
    seconds = time.perf_counter() - began
    shares = {}
    for name, part in (("validation", texts.validation), ("test", texts.test)):
        plain = decode(config, frozen, _held_out(config, part), None)
        own = np.concatenate([_held_out(config, part), plain.tokens], 1)
        found = positions(frozen, own, config.num_heads)
        per_row = own.shape[1] - config.num_heads
        keep = np.arange(len(found.hidden)) % per_row >= config.prompt_length - 1  # states that guess new tokens
        shares[name] = accuracies(heads, frozen, Positions(found.hidden[keep], found.targets[:, keep]), ids)
    nodes = max(config.guesses)
    tree = build_tree(shares["validation"], nodes)
    save_heads(path, heads, tree, model_name=config.model, top_k=TOP, token_ids=ids)
    trees: dict[str, Any] = {}
    plain = decode(config, frozen, _held_out(config, texts.test), None)
    for number, n in enumerate(config.guesses):
        yield Progress(f"decoding, seed {seed}", number, len(config.guesses), f"{n} guesses")
        out = decode(config, frozen, _held_out(config, texts.test), _drafts(heads, ids, tree[:n]))
        trees[str(n)] = {
            "per_step": out.per_step,
            "histogram": list(out.histogram),
            "same": float(np.mean(out.tokens == plain.tokens)),
        }
    yield Progress(f"decoding, seed {seed}", len(config.guesses), len(config.guesses))
    return {
        "seconds": seconds,
        "positions": len(data.hidden),
        "tree": [list(p) for p in tree],
        "accuracies": {name: value.tolist() for name, value in shares.items()},
        "trees": trees,
    }


def _speeds(
    config: MedusaConfig,
    frozen: Frozen,
    texts: Texts,
    result: Mapping[str, Any],
    heads: MedusaParams,
    ids: np.ndarray | None,
) -> Generator[Progress, None, dict[str, Any]]:
    """Seconds of every tree and of plain decoding, at each batch."""
    trees: dict[int, Drafts | None] = {0: None}
    trees |= {n: _drafts(heads, ids, [tuple(p) for p in result["tree"][:n]]) for n in config.guesses}
    speeds: dict[str, Any] = {}
    for number, batch in enumerate(config.batches):
        yield Progress("timing", number, len(config.batches), f"batch {batch}")
        found = time_trees(config, frozen, _held_out(config, texts.test)[:batch], trees)
        speeds[str(batch)] = {
            str(n): {
                "seconds": [d.seconds for d in runs],
                "passes": runs[0].passes,
                "tokens": int(runs[0].tokens.size - batch),  # the first of each sequence comes from the prompt
            }
            for n, runs in found.items()
        }
    yield Progress("timing", len(config.batches), len(config.batches))
    return speeds


# What was found -------------------------------------------------------------------------------------------------------


def _per_step(results: Sequence[Mapping[str, Any]], n: int) -> list[float]:
    return [r["trees"][str(n)]["per_step"] for r in results]


def _best(speeds: Mapping[str, Any], batch: int) -> int:
    """The number of guesses, 0 among them, that was fastest."""
    medians = {int(n): float(np.median(timed["seconds"])) for n, timed in speeds[str(batch)].items()}
    return min(medians, key=lambda n: medians[n])


def compare(
    config: MedusaConfig,
    frozen: Frozen,
    results: Sequence[Mapping[str, Any]],
    speeds: Mapping[str, Any],
    collecting: float | None,
    directory: pathlib.Path,
) -> Comparison:
    """Tables, figures, rows and the headline."""
    same = min(t["same"] for r in results for t in r["trees"].values())
    return Comparison(
        headline=_headline(config, results, speeds, same),
        rows=tuple(_record_rows(config, frozen, results, speeds)),
        tables=(_heads_table(results), _steps_table(config, results), *_speed_tables(config, speeds)),
        figures=(_figure(config, results, speeds),),
        notes=(
            f"Share of tokens equal to plain greedy decoding's, smallest over trees and seeds: {same:.3f}. Where it is "
            "1, the text is the same; ties in the last bit of float32 could make it less.",
            f"{results[0]['positions']:,} training positions; collecting took {collecting or float('nan'):.0f} s, "
            f"training {np.mean([r['seconds'] for r in results]):.0f} s a seed on this machine.",
            f"Heads and tree of the first seed: {directory.name}/heads-0.safetensors, for "
            "`python -m experiments generate --medusa`.",
            "Trees are built from accuracies on validation text; prompts here are held out, from the same reference "
            "works. On other text heads guess worse.",
        ),
    )


def _heads_table(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for head in range(len(results[0]["accuracies"]["test"])):
        shares = [np.asarray(r["accuracies"]["test"][head]) for r in results]
        rows.append(
            (
                f"{head + 1} (token t + {head + 2})",
                spread([float(s[0]) for s in shares]),
                spread([float(s[:5].sum()) for s in shares]),
            )
        )
    note = "along the model's own continuations of held-out text; mean ± standard deviation over seeds"
    return Table("How often a head is right", ("head", "first guess", "one of five"), tuple(rows), note)


def _steps_table(config: MedusaConfig, results: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for n in config.guesses:
        depth = max(len(path) for path in results[0]["tree"][:n])
        histogram = np.sum([np.asarray(r["trees"][str(n)]["histogram"]) for r in results], 0)
        shares = " / ".join(f"{share:.0%}" for share in histogram / max(histogram.sum(), 1))
        rows.append((n, depth, spread(_per_step(results, n)), shares))
    columns = ("guesses", "depth", "tokens per step", "steps with 0 / 1 / ... guesses right")
    return Table("Tokens per pass through the model, held-out text", columns, tuple(rows))


def _speed_tables(config: MedusaConfig, speeds: Mapping[str, Any]) -> list[Table]:
    tables = []
    for batch in config.batches:
        timed = speeds[str(batch)]
        plain = timed["0"]["seconds"]
        rows: list[tuple[Cell, ...]] = []
        for n in (0, *config.guesses):
            seconds, passes = timed[str(n)]["seconds"], timed[str(n)]["passes"]
            median = float(np.median(seconds))
            ratio, (low, high) = float(np.median(plain) / median), stats.bootstrap_ratio(plain, seconds) or (1.0, 1.0)
            cost = (median / passes) / (float(np.median(plain)) / timed["0"]["passes"])
            words = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
            rows.append((n or "none", timed[str(n)]["tokens"] / median, words, f"{cost:.2f}"))
        note = f"medians of {config.repeats} turns; cost: seconds of a pass over those of a plain one, heads included"
        columns = ("guesses", "tokens/s", "over plain (95 %)", "cost of a pass")
        tables.append(Table(f"Speed at batch {batch}", columns, tuple(rows), note))
    return tables


def _figure(config: MedusaConfig, results: Sequence[Mapping[str, Any]], speeds: Mapping[str, Any]) -> Figure:
    xs = tuple(float(n) for n in config.guesses)
    values = [_per_step(results, n) for n in config.guesses]
    lines = [
        Series(
            "tokens per step",
            xs,
            tuple(float(np.mean(v)) for v in values),
            tuple(map(min, values)),
            tuple(map(max, values)),
        )
    ]
    for batch in config.batches:
        timed = speeds[str(batch)]
        plain = float(np.median(timed["0"]["seconds"]))
        ratios = tuple(plain / float(np.median(timed[str(n)]["seconds"])) for n in config.guesses)
        lines.append(Series(f"speed over plain, batch {batch}", xs, ratios))
    return Figure(
        "What guesses buy",
        "guesses in a step",
        "times plain decoding",
        tuple(lines),
        note="speed falls behind tokens per step by what a pass of more tokens costs; band: smallest to largest seed",
    )


def _record_rows(
    config: MedusaConfig, frozen: Frozen, results: Sequence[Mapping[str, Any]], speeds: Mapping[str, Any]
) -> Generator[dict[str, Any], None, None]:
    common = {
        "method": "llm_acceleration",
        "baseline": "greedy decoding",
        "task": {
            "kind": "inference",
            "name": "continuation",
            "modality": "text",
            "dataset": "pydoc-topics" if config.dataset == "topics" else config.dataset,
            "metric": "share of equal tokens",
            "higher_is_better": True,
        },
        "model": {
            "family": "decoder",
            "params": sum(leaf.size for leaf in jax.tree.leaves(frozen.params)),
            "layers": frozen.config.num_layers,
            "width": frozen.config.hidden_size,
            "heads": frozen.config.num_heads,
            "kv_heads": frozen.config.num_kv_heads,
            "dtype": "float32",
        },
    }
    for n in config.guesses:
        equal = min(r["trees"][str(n)]["same"] for r in results)
        settings = {"part": "medusa", "guesses": n, "heads": config.num_heads}
        workload = {"prompt_length": config.prompt_length, "gen_length": config.new_tokens, "seeds": len(results)}
        yield common | {
            "method_config": settings,
            "workload": workload | {"batch": config.prompts},
            "cost_kind": "steps",
            "speedup": float(np.mean(_per_step(results, n))),
            "quality": equal,
            "quality_baseline": 1.0,
        }
        for batch in config.batches:
            plain, timed = (speeds[str(batch)][str(i)]["seconds"] for i in (0, n))
            yield common | {
                "method_config": settings,
                "workload": workload | {"batch": batch, "seeds": 1},
                "cost_kind": "wall",
                "speedup": float(np.median(plain) / np.median(timed)),
                "speedup_ci": stats.bootstrap_ratio(plain, timed),
                "quality": equal,
                "quality_baseline": 1.0,
            }


def _headline(
    config: MedusaConfig, results: Sequence[Mapping[str, Any]], speeds: Mapping[str, Any], same: float
) -> str:
    each = " / ".join(f"{np.mean(_per_step(results, n)):.2f}" for n in config.guesses)
    parts = []
    for batch in config.batches:
        best = _best(speeds, batch)
        timed = speeds[str(batch)]
        ratio = float(np.median(timed["0"]["seconds"]) / np.median(timed[str(best)]["seconds"]))
        words = f"{ratio:.2f} times plain with {best} guesses" if best else "plain decoding is fastest"
        parts.append(f"batch {batch}: {words}")
    text = "the same text" if same == 1 else f"{same:.1%} of the text the same"
    guesses = " / ".join(map(str, config.guesses))
    return (
        f"Medusa on {config.model}: {each} tokens per step with {guesses} guesses on held-out text, {text}; "
        f"tokens/s at {', '.join(parts)}"
    )


EXPERIMENT = Experiment(
    name="medusa",
    method="llm_acceleration",
    claim="Medusa-1 decodes more than 2.2 times faster with the same greedy text (Vicuna-7B, batch 1, GPU)",
    config=MedusaConfig,
    presets={
        "quick": MedusaConfig(),
        "full": MedusaConfig(
            model="lmsys/vicuna-7b-v1.5",
            dataset="Aeala/ShareGPT_Vicuna_unfiltered",
            num_heads=4,
            vocabulary=0,
            length=1024,
            text=16_384,
            own=4096,
            prompt=64,
            steps=40_000,
            batch_size=2048,
            learning_rate=1e-3,
            guesses=(3, 7, 15, 31, 63),
            prompts=80,
            new_tokens=256,
        ),
    },
    run=run,
)

__all__ = ["EXPERIMENT", "RANDOM", "MedusaConfig"]
