"""Learn2PD on the small model that is trained here: passes and seconds against one token per pass, beside its goals."""

from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from experiments import learn2pd
from experiments.benchmarks import BenchOptions, Measurement
from experiments.learn2pd_arms import FILTER, FILTER_DUAL, ORACLE, VANILLA, arms, quality, records_of, seconds
from experiments.runner import stats
from jaxaccel.decoding.learn2pd import train_filter

CONFIG = learn2pd.Learn2pdConfig(stages=(2500,), prompts=100)
"""The quick preset's model at the end of its training."""


def _last(steps: Generator[Any, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Filter, and filter with end of text and dual cache; the oracle for comparison."""
    ((_, problem),) = _last(learn2pd.problems(CONFIG, 0))
    trained = train_filter(records_of(problem), steps=CONFIG.filter_steps, key=jax.random.key(0))
    contenders = [
        arm
        for arm in arms(CONFIG.thresholds, trained.params, CONFIG.tau, problem.gen_length, problem.end_id)
        if arm.name in (VANILLA, FILTER, FILTER_DUAL)
    ]
    found, reference = _last(quality(problem, contenders, "answers"))
    timed = _last(seconds(problem, contenders, reference, max(3, options.repeats), "seconds"))["seconds"]
    for name, passes, wall in ((FILTER, ">= 4", ">= 3"), (FILTER_DUAL, "", ">= 6"), (ORACLE, "", "")):
        points = 100 * (found[name]["right"] - found[VANILLA]["right"])
        right = f"{100 * found[name]['right']:.1f} % right, {points:+.1f} points"
        ratio = found[VANILLA]["forwards"] / found[name]["forwards"]
        counted = f"{found[VANILLA]['forwards']:.1f} / {found[name]['forwards']:.1f} passes; {right}"
        yield Measurement(f"passes counted, one token per pass / {name}", ratio, None, passes, counted)
        slow, fast = timed[VANILLA], timed[name]
        yield Measurement(
            f"decoding, one token per pass / {name}",
            float(np.median(slow) / np.median(fast)),
            stats.bootstrap_ratio(slow, fast),
            wall,
            f"{1e3 * np.median(slow):.1f} ms / {1e3 * np.median(fast):.1f} ms an answer; {right}",
        )
