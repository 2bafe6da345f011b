"""Learn2PD: passes and seconds of a masked-diffusion model with a filter, thresholds, fixed schedules and an oracle.

A small LLaDA is trained here on words written backwards (`learn2pd_words`), where every answer can be checked. It is
looked at twice, half-trained and trained. Each time a filter is trained on the sampler's own records, and all ways to
decode (`learn2pd_arms`) answer the same words that were held out. The full preset does it with LLaDA-8B and GSM8K.
"""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import learn2pd_full
from experiments.learn2pd_arms import (
    FILTER,
    FILTER_DUAL,
    FILTER_END,
    ORACLE,
    VANILLA,
    Arm,
    Problem,
    arms,
    call,
    frontier,
    quality,
    records_of,
    seconds,
    word_problem,
)
from experiments.learn2pd_report import compare
from experiments.learn2pd_words import LONGEST, load_words, model_config, split_words, train_model
from experiments.runner.api import Comparison, Config, Experiment, Progress
from experiments.runner.session import Session
from jaxaccel.decoding.learn2pd import Filter, Threshold, save_filter, train_filter
from jaxaccel.models.masked_diffusion import diffusion_model

WORDS = "words"
"""Name of the small model that is trained here."""


@dataclasses.dataclass(frozen=True)
class Learn2pdConfig(Config):
    """Train a small LLaDA and a filter for it, and decode with all policies."""

    model: str = WORDS
    """words: a small one, trained here. Else a name or folder that `load_pretrained` knows."""
    dataset: str = "openai/gsm8k"
    """Questions for a pretrained model, read through Hugging Face datasets; columns as GSM8K's."""
    dataset_name: str = "main"
    """Its configuration."""
    filter_dataset: str = "Muennighoff/flan"
    """Prompts on which a pretrained model's filter is trained; a column ``inputs``, as FLAN's."""
    shots: int = 5
    """Solved questions before each question."""
    pad_to: int = 64
    """Prompts of a pretrained model are padded on the left to one length, a multiple of this."""
    dtype: str = "float32"
    """Of a pretrained model's parameters."""
    layers: int = 3
    """Blocks of the small model."""
    width: int = 64
    """Its width."""
    heads: int = 4
    """Its heads."""
    stages: tuple[int, ...] = (800, 2500)
    """Training steps after which it is looked at; the last is the end."""
    batch_size: int = 64
    """Words of a step."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    gen_length: int = 64
    """Tokens of an answer."""
    block_length: int = 16
    """Tokens of a block."""
    thresholds: tuple[float, ...] = (0.8, 0.9, 0.95)
    """Confidence thresholds that the filter is compared with."""
    values: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Thresholds and probabilities of the curve of passes against right answers."""
    tau: float = 0.96
    """Probability above which the filter's position is final."""
    filter_prompts: int = 60
    """Prompts that the filter learns from."""
    filter_steps: int = 4000
    """Its training steps, over all records each."""
    prompts: int = 200
    """Held-out prompts."""
    decode_batch: int = 50
    """Prompts decoded at a time where seconds do not count."""
    timed: int = 15
    """Prompts decoded one by one for the seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "width", "heads", "batch_size", "gen_length", "block_length", "filter_prompts",
                     "filter_steps", "prompts", "decode_batch", "pad_to"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.timed < 3:
            raise ValueError(f"timed must be at least 3 for a median with an interval, got {self.timed}")
        if self.shots < 0:
            raise ValueError(f"shots must be at least 0, got {self.shots}")
        if self.gen_length % self.block_length:
            raise ValueError(f"block_length ({self.block_length}) must divide gen_length ({self.gen_length})")
        if self.model == WORDS and self.gen_length < 2 * LONGEST + 2:
            raise ValueError(
                f"gen_length must be at least {2 * LONGEST + 2} for the longest word, got {self.gen_length}"
            )
        if self.gen_length % 2 or (self.gen_length // 2) % (self.gen_length // self.block_length):
            raise ValueError(f"half of gen_length ({self.gen_length}) must be a multiple of the number of blocks")
        if not self.stages or list(self.stages) != sorted(set(self.stages)) or self.stages[0] < 1:
            raise ValueError(f"stages must be increasing numbers of at least 1, got {self.stages}")
        for name in ("thresholds", "values"):
            numbers = getattr(self, name)
            if not numbers or not all(0 < value < 1 for value in numbers):
                raise ValueError(f"{name} must be numbers in (0, 1), got {numbers}")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau must be in (0, 1), got {self.tau}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")


def problems(config: Learn2pdConfig, seed: int) -> Generator[Progress, None, list[tuple[str, Problem]]]:
    """What is decoded, by stage of training."""
    if config.model != WORDS:
        problem = yield from learn2pd_full.load_problem(config, seed)
        return [(config.model, problem)]
    split = split_words(load_words(), config.prompts, seed)
    model = model_config(
        layers=config.layers, width=config.width, heads=config.heads, positions=LONGEST + config.gen_length
    )
    found = yield from train_model(
        model, split.train, length=config.gen_length, stages=config.stages, batch_size=config.batch_size,
        rate=config.learning_rate, seed=seed,
    )  # fmt: skip
    names = [*(f"after {steps} steps" for steps in config.stages[:-1]), "trained"]
    return [
        (
            name,
            word_problem(
                diffusion_model(model), params, split, filter_words=config.filter_prompts,
                gen_length=config.gen_length, block_length=config.block_length, batch=config.decode_batch,
            ),
        )
        for name, params in zip(names, found, strict=True)
    ]  # fmt: skip


def measure(
    config: Learn2pdConfig, session: Session, stage: str, problem: Problem, seed: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Train a filter and measure all arms of one problem."""
    task = f"seed {seed}, {stage}"
    yield Progress(f"{task}: filter", 0, 2, "the sampler's records")
    records = records_of(problem)
    yield Progress(f"{task}: filter", 1, 2, f"{len(records.confidence)} records")
    trained = train_filter(records, steps=config.filter_steps, key=jax.random.key(seed))
    number = stage.replace(" ", "-").replace("/", "-")
    save_filter(
        session.directory / f"filter-{seed}-{number}.safetensors",
        trained.params,
        model_name=config.model,
        tau=config.tau,
    )
    yield Progress(f"{task}: filter", 2, 2)
    contenders = arms(config.thresholds, trained.params, config.tau, problem.gen_length, problem.end_id)
    found, reference = yield from quality(problem, contenders, f"{task}: answers")
    yield Progress(f"{task}: curve", 0, 1)
    curve = frontier(
        problem, {"threshold": Threshold, "filter": lambda value: Filter(trained.params, value)}, config.values
    )
    yield Progress(f"{task}: curve", 1, 1)
    timed = yield from seconds(problem, contenders, reference, config.timed, f"{task}: seconds")
    return {
        "stage": stage,
        "seed": seed,
        "records": len(records.confidence),
        "test_loss": trained.test_loss,
        "false_share": None if np.isnan(trained.false_share) else trained.false_share,
        "quality": found,
        "curve": curve,
        "examples": _examples(problem, contenders),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        **timed,
    }


def _examples(problem: Problem, contenders: Sequence[Arm]) -> dict[str, Any]:
    """The first prompt's answer: each token as text, and the pass that revealed it."""
    found = {}
    for arm in contenders:
        if arm.name in (VANILLA, FILTER, FILTER_END, FILTER_DUAL):
            out = call(problem, arm, jnp.asarray(problem.prompts[:1]))
            texts = [problem.show(int(token)) for token in out.tokens[0, -problem.gen_length :]]
            order = [int(number) for number in out.revealed_at[0]]
            found[arm.name] = [[text, number] for text, number in zip(texts, order, strict=True)]
    prompt = "".join(problem.show(int(token)) for token in problem.prompts[0])
    return {"prompt": prompt, "arms": found}


def _finished(config: Learn2pdConfig, session: Session) -> Iterator[Mapping[str, Any]]:
    for seed in session.seeds:
        yield from session.load(f"seed-{seed}") or ()


def run(config: Learn2pdConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Train, measure each seed and stage; what is finished is kept when the run is interrupted."""
    for seed in session.seeds:
        if session.load(f"seed-{seed}") is None:
            results = []
            for stage, problem in (yield from problems(config, seed)):
                results.append((yield from measure(config, session, stage, problem, seed)))
            session.save(f"seed-{seed}", results)
    return compare(config, list(_finished(config, session)))


EXPERIMENT = Experiment(
    name="learn2pd",
    method="learn2pd",
    claim="22.6 times the tokens/s of LLaDA-8B on GSM8K at length 1024 with filter and end-of-text prediction, no loss "
    "of accuracy; 57.5 times with a dual cache, 3.6 points lower",
    config=Learn2pdConfig,
    presets={
        "quick": Learn2pdConfig(seeds=2),
        "full": Learn2pdConfig(
            seeds=1,
            model="llada-8b",
            dtype="bfloat16",
            gen_length=1024,
            block_length=32,
            filter_prompts=2640,
            filter_steps=40_000,
            prompts=1319,
            decode_batch=1,
            timed=16,
        ),
    },
    run=run,
)

__all__ = ["EXPERIMENT", "ORACLE", "Learn2pdConfig"]
