"""Reading a comparison: best rates, targets, spreads, rows, and the pages drawn from them."""

import base64
import json
import re

import numpy as np
import optax
import pytest

from experiments.runner import api, report, stats
from experiments.runner.results import Run
from experiments.runner.sweep import Sweep
from experiments.runner.train import Arm
from experiments.runner.trial import TrialResult
from jaxaccel import records


def trial(arm, rate, seed, values, status="ok"):
    curve = np.asarray(values, np.float32)
    return TrialResult(
        arm=arm,
        learning_rate=rate,
        seed=seed,
        status=status,
        curves={"train_loss": curve, "eval_step": np.arange(1, len(curve) + 1) * 10, "val_loss": curve},
        final={"val_loss": float(curve[-1]), "test_loss": float(curve[-1])} if status == "ok" else {},
        params_digest="0",
        cost={
            "step_s": 0.001,
            "train_s": 0.04,
            "compile_s": 1.0,
            "flops_per_step": 1e6,
            "peak_bytes": 1000,
            "state_bytes": 100,
        },
    )


@pytest.fixture
def sweep(task):
    arms = (Arm("adam", optax.adam, (0.1, 0.2)), Arm("new", optax.adam, (0.1, 0.2), config={"a": 1}, method="exadam"))
    trials = []
    for seed in range(3):
        shift = 0.01 * seed
        trials += [
            trial("adam", 0.1, seed, [0.9, 0.8, 0.7, 0.6 + shift]),
            trial("adam", 0.2, seed, [0.8, 0.6, 0.5, 0.4 + shift]),
            trial("new", 0.1, seed, [0.7, 0.5, 0.4, 0.3 + shift]),
            trial("new", 0.2, seed, [0.1, np.nan, np.nan, np.nan], "diverged" if seed == 0 else "ok"),
        ]
    return Sweep(task(), arms, tuple(trials))


def test_best_rate_avoids_divergence(sweep):
    assert sweep.best_learning_rate("adam") == 0.2
    assert sweep.best_learning_rate("new") == 0.1
    assert [t.seed for t in sweep.best("new")] == [0, 1, 2]


def test_best_rate_uses_only_seeds_that_all_rates_had(task):
    arms = (Arm("a", optax.adam, (0.1, 0.2)),)
    trials = (trial("a", 0.1, 0, [0.5]), trial("a", 0.2, 0, [0.6]), trial("a", 0.2, 1, [0.0]))
    assert Sweep(task(), arms, trials).best_learning_rate("a") == 0.1


def test_steps_to_a_target(sweep):
    first = sweep.select("adam", 0.2)[0]
    assert sweep.steps_to(first, "val_loss", at_most=0.55) == 30
    assert sweep.steps_to(first, "val_loss", at_least=0.55) == 10
    assert sweep.steps_to(first, "val_loss", at_most=0.1) == float("inf")
    with pytest.raises(ValueError, match="one of at_least and at_most"):
        sweep.steps_to(first, "val_loss")


def test_rows_follow_the_schema_and_say_what_is_a_bound(sweep):
    row = sweep.row("adam", "new", "steps", ([40.0, 40.0, 40.0], [20.0, 20.0, 20.0]))
    full = records.make_row(**row, run="r")
    assert full["speedup"] == 2.0
    assert full["speedup_ci"] == [2.0, 2.0]
    assert full["method"] == "exadam"
    assert full["quality_delta"] == pytest.approx(0.1)  # a loss that is lower by 0.1
    assert full["censored"] == []
    # The baseline never got there: the whole budget of 40 steps is a lower bound of its cost.
    bound = records.make_row(**sweep.row("adam", "new", "steps", ([np.inf] * 3, [20.0] * 3)), run="r")
    assert (bound["speedup"], bound["censored"]) == (2.0, ["baseline"])
    nothing = records.make_row(**sweep.row("adam", "new", "steps", ([np.inf] * 3, [np.inf] * 3)), run="r")
    assert (nothing["speedup"], nothing["status"]) == (None, "unsupported")


def test_failures_are_rows(sweep):
    (row,) = sweep.failure_rows("adam")
    full = records.make_row(**row, run="r")
    assert full["status"] == "diverged"
    assert full["speedup"] is None
    assert full["method_config"]["learning_rate"] == 0.2


def test_bootstrap_interval_covers_and_needs_three_pairs():
    assert stats.bootstrap_ratio([1.0, 2.0], [1.0, 1.0]) is None
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        top, bottom = generator.normal(2.0, 0.1, 15), generator.normal(1.0, 0.05, 15)
        low, high = stats.bootstrap_ratio(top, bottom, resamples=400, seed=i)
        covered += low <= 2.0 <= high
    assert 0.85 <= covered / 200 <= 1.0  # nominally 0.95; a percentile interval of 15 medians is a little off
    with pytest.raises(ValueError, match="equal lengths, got 2 and 3"):
        stats.bootstrap_ratio([1.0, 2.0], [1.0, 2.0, 3.0])


def test_comparisons_survive_json(sweep):
    comparison = api.Comparison("h", (), (sweep.best_table(), sweep.cost_table()), (sweep.curves(),), ("n",))
    data = json.loads(json.dumps(api.to_json(comparison)))
    assert api.from_json(data) == comparison


def test_page_holds_every_part_and_escapes_text(sweep, tmp_path):
    comparison = api.Comparison("<b>5 & 6</b>", (), (sweep.best_table(),), (sweep.curves(),), ("a < b",))
    info = {"experiment": "lion", "config": {"x": 1}, "jax_version": "0", "started": "now"}
    page = report.page([Run(tmp_path, info, comparison)])
    assert "&lt;b&gt;5 &amp; 6&lt;/b&gt;" in page
    assert "a &lt; b" in page
    assert "0.410 ± 0.010" in page
    (image,) = re.findall(r"base64,([^\"]+)", page)
    drawing = base64.b64decode(image).decode()
    assert drawing.startswith("<svg")
    assert drawing.count("clip-path") > 2


def test_figures_are_drawn_with_the_same_bytes(sweep):
    assert report.svg(sweep.curves()) == report.svg(sweep.curves())


def test_tables_refuse_ragged_rows():
    with pytest.raises(ValueError, match="a row has 1 cells, expected 2"):
        api.Table("t", ("a", "b"), (("x",),))
