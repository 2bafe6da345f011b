"""The ways to decode that are compared, and what is measured of each: passes, tokens computed, correctness, seconds."""

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.learn2pd_words import END, MASK, Split, encode_answer, encode_prompt, show
from experiments.runner.api import Progress
from jaxaccel.decoding.learn2pd import Filter, FilterParams, Oracle, Policy, Threshold, TopK, collect_oracle, decode

VANILLA, HALF, ORACLE = "one token per pass", "two tokens per pass", "oracle"
FILTER, FILTER_END = "filter", "filter + end of text"
FILTER_PREFIX, FILTER_DUAL = "filter + end of text + prefix cache", "filter + end of text + dual cache"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, prompts of one length, and who can tell whether an answer is right."""

    model: Any  # `DiffusionModel`
    params: Any
    filter_prompts: np.ndarray  # int32 [F, P]: the filter learns from these
    prompts: np.ndarray  # int32 [N, P]
    right: Callable[[int, np.ndarray], bool]  # of a prompt's number and the answer's tokens up to its end
    show: Callable[[int], str]  # a token as text
    gen_length: int
    block_length: int
    mask_id: int
    end_id: int
    batch: int  # prompts decoded at a time where seconds do not count


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to decode."""

    name: str
    policy: Policy
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of `decode`


def arms(thresholds: Sequence[float], params: FilterParams, tau: float, gen_length: int, end_id: int) -> list[Arm]:
    """All arms but the oracle, whose answer depends on the prompts."""
    own, cut = Filter(params, tau), {"eot_id": end_id}
    middle = thresholds[len(thresholds) // 2]
    return [
        Arm(VANILLA, TopK()),
        Arm(HALF, TopK(), {"steps": gen_length // 2}),
        *(Arm(f"threshold {t:g}", Threshold(t)) for t in thresholds),
        Arm(f"threshold {middle:g} + end of text + dual cache", Threshold(middle), cut | {"cache": "dual"}),
        Arm(FILTER, own),
        Arm(FILTER_END, own, cut),
        Arm(f"{FILTER_END} (sure ends only)", own, cut | {"eot_rule": "confident"}),
        Arm(FILTER_PREFIX, own, cut | {"cache": "prefix"}),
        Arm(FILTER_DUAL, own, cut | {"cache": "dual"}),
    ]


def call(problem: Problem, arm: Arm, prompts: Any, params: Any = None) -> Any:
    """Decode prompts."""
    return decode(
        problem.model, problem.params if params is None else params, prompts, gen_length=problem.gen_length,
        block_length=problem.block_length, policy=arm.policy, mask_id=problem.mask_id, pad_id=problem.end_id,
        **arm.options,
    )  # fmt: skip


def in_batches(problem: Problem, arm: Arm, prompts: np.ndarray) -> dict[str, np.ndarray]:
    """Decode all prompts, a batch at a time: one shape, compiled once. An oracle's reference is split alike."""
    parts: list[Any] = []
    for i in range(0, len(prompts), problem.batch):
        rows = np.arange(i, min(i + problem.batch, len(prompts)))
        padded = np.resize(rows, problem.batch)
        now = arm
        if isinstance(arm.policy, Oracle):
            now = dataclasses.replace(arm, policy=Oracle(jnp.asarray(arm.policy.reference[padded])))
        out = call(problem, now, prompts[padded])
        parts.append({name: np.asarray(value)[: len(rows)] for name, value in out._asdict().items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def answers(problem: Problem, out: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Tokens of each answer up to its end."""
    start = out["tokens"].shape[1] - problem.gen_length
    found = []
    for row, length in zip(out["tokens"], out["lengths"], strict=True):
        answer = row[start:length]
        ends = np.flatnonzero(answer == problem.end_id)
        found.append(answer[: ends[0]] if len(ends) else answer)
    return found


def records_of(problem: Problem) -> Any:
    """The sampler's own records: an oracle along what the model says a token at a time, from the filter's prompts."""
    parts = []
    start = problem.filter_prompts.shape[1]
    reference = in_batches(problem, Arm(VANILLA, TopK()), problem.filter_prompts)["tokens"][:, start:]
    for i in range(0, len(reference), problem.batch):
        rows = np.resize(np.arange(i, min(i + problem.batch, len(reference))), problem.batch)
        found = collect_oracle(
            problem.model, problem.params, problem.filter_prompts[rows], reference[rows],
            block_length=problem.block_length, mask_id=problem.mask_id,
        )  # fmt: skip
        kept = found.row < min(problem.batch, len(reference) - i)
        parts.append((found.confidence[kept], found.correct[kept]))
    return _Records(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class _Records:
    confidence: np.ndarray
    correct: np.ndarray


def quality(
    problem: Problem, contenders: Sequence[Arm], task: str
) -> Generator[Progress, None, tuple[dict[str, Any], np.ndarray]]:
    """Right answers, agreement with one token per pass, passes and tokens computed, of each arm and of the oracle.

    Returns:
        By name; and the answers [N, G] of one token per pass, which the oracle has for its reference.
    """
    found: dict[str, Any] = {}
    reference: list[np.ndarray] = []
    start = problem.prompts.shape[1]
    contenders, number = list(contenders), 0
    whole = np.zeros(0)
    while contenders:
        arm = contenders.pop(0)
        yield Progress(task, number, number + len(contenders) + 1, arm.name)
        number += 1
        out = in_batches(problem, arm, problem.prompts)
        texts = answers(problem, out)
        if arm.name == VANILLA:
            reference, whole = texts, out["tokens"][:, start:]
            contenders.append(Arm(ORACLE, Oracle(whole)))
        found[arm.name] = {
            "right": float(np.mean([problem.right(i, text) for i, text in enumerate(texts)])),
            "same": float(np.mean([np.array_equal(a, b) for a, b in zip(texts, reference, strict=True)])),
            "forwards": float(out["num_forwards"].mean()),
            "processed": float(out["tokens_processed"].mean()),
        }
    return found, whole


def frontier(problem: Problem, policies: Mapping[str, Callable[[float], Policy]], values: Sequence[float]) -> Any:
    """Passes and right answers of policies at each value: nothing is compiled again."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, make in policies.items():
        points = []
        for value in values:
            out = in_batches(problem, Arm(name, make(value)), problem.prompts)
            right = [problem.right(i, text) for i, text in enumerate(answers(problem, out))]
            points.append((float(out["num_forwards"].mean()), float(np.mean(right))))
        found[name] = points
    return found


def seconds(
    problem: Problem, contenders: Sequence[Arm], reference: np.ndarray, count: int, task: str
) -> Generator[Progress, None, dict[str, Any]]:
    """Seconds of each arm for each of the first prompts, one at a time, arms in turn; the first round compiles.

    The oracle is told the answer, so its seconds are a bound and no method's.
    """
    params = jax.tree.map(jnp.asarray, problem.params)

    def once(arm: Arm, row: int) -> float:
        prompt = jnp.asarray(problem.prompts[row : row + 1])
        if arm.name == ORACLE:
            arm = dataclasses.replace(arm, policy=Oracle(jnp.asarray(reference[row : row + 1])))
        jax.block_until_ready(prompt)
        began = time.perf_counter()
        jax.block_until_ready(call(problem, arm, prompt, params))
        return time.perf_counter() - began

    everyone = [*contenders, Arm(ORACLE, Oracle(reference))]
    compiling: dict[str, float] = {}
    for number, arm in enumerate(everyone):
        yield Progress(task, number, len(everyone) + count, f"compiling {arm.name}")
        compiling[arm.name] = once(arm, 0)
    found: dict[str, list[float]] = {arm.name: [] for arm in everyone}
    for row in range(count):
        yield Progress(task, len(everyone) + row, len(everyone) + count)
        for arm in everyone:
            found[arm.name].append(once(arm, row % len(problem.prompts)))
    return {"seconds": found, "compiling": compiling}


def word_problem(
    model: Any, params: Any, split: Split, *, filter_words: int, gen_length: int, block_length: int, batch: int
) -> Problem:
    """The words' task as a problem."""
    expected = [encode_answer(w, gen_length) for w in split.test]

    def right(number: int, answer: np.ndarray) -> bool:
        wanted = expected[number]
        return np.array_equal(answer, wanted[: int(np.argmax(wanted == END))])

    return Problem(
        model, params, np.stack([encode_prompt(w) for w in split.train[:filter_words]]),
        np.stack([encode_prompt(w) for w in split.test]), right, show, gen_length, block_length, MASK, END, batch,
    )  # fmt: skip
