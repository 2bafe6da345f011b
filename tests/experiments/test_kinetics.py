"""The Kinetics frontier: published numbers, loaders on tiny files of the same formats, analyses on known data."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import kinetics, kinetics_traces
from experiments.data.hub import DataError
from experiments.kinetics import KineticsConfig, Option
from jaxaccel.forecasting import beta_coverage


@pytest.fixture(scope="module")
def arms():
    """All published runs with the length of the paper's example."""
    config = KineticsConfig(seeds=1, gen_len=15_000)
    return [kinetics.make_arm(config, run) for run in kinetics.load(config)]


def test_modelled_difficulties_have_the_published_mean_and_the_beta_coverage():
    (run,) = [r for r in kinetics_traces.from_rates(400, 1.0, None) if (r.model, r.attention) == ("Qwen3-4B", "dense")]
    assert run.pass_rate.mean() == pytest.approx(0.7167, abs=0.002)  # 400 quantiles stand for the distribution
    coverage = (1 - (1 - run.pass_rate[:, None]) ** np.array([2, 8])).mean(0)
    np.testing.assert_allclose(coverage, beta_coverage(0.7167, np.array([2, 8])), atol=0.002)
    assert run.lengths.shape == (1, 1)


def test_order_of_the_frontiers_with_equal_lengths(arms):
    """Under eFLOPs every size is tried once before any answers twice; under FLOPs 4B × 32 comes before any 32B."""
    dense = kinetics.options([arm for arm in arms if arm.kind == "dense"])
    names = {c: [o.name.replace(" dense", "") for o in kinetics.efficient(dense, c)] for c in kinetics.CURRENCIES}
    sizes = ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
    assert names["eFLOPs"][:8] == [*(f"{s} × 1" for s in sizes), "8B × 2", "14B × 2"]
    assert names["FLOPs"][:6] == ["0.6B × 1", "1.7B × 1", "1.7B × 2", "4B × 1", "8B × 1", "4B × 2"]
    assert names["FLOPs"].index("4B × 32") < min(i for i, n in enumerate(names["FLOPs"]) if n.startswith("32B"))


def test_choosing_by_flops_never_pays_less_in_eflops(arms):
    dense = kinetics.options([arm for arm in arms if arm.kind == "dense"])
    factors = [factor for _, factor, _, _ in kinetics.overpaid(dense)]
    assert min(factors) >= 1
    assert max(factors) > 1.5


def test_analyses_on_known_options():
    small, twice, large = Option("small", 1, 10, 0.5), Option("small twice", 2, 20, 0.7), Option("large", 5, 8, 0.7)
    rows = kinetics.overpaid([small, twice, large])
    assert rows[-1][1:] == (2.5, twice, large)
    assert kinetics.efficient([small, twice, large], "FLOPs") == [small, twice]
    assert kinetics.efficient([small, twice, large], "eFLOPs") == [large]
    sparse = [Option("sparse", 1, 2, 0.6), Option("sparse twice", 1, 4, 0.8)]
    found = kinetics.gain([small, twice], sparse)
    assert (found.ratio, found.ratio_at) == (5.0, 0.7)
    assert found.points == pytest.approx(0.3)  # at a cost of 10
    assert found.points_anywhere == pytest.approx(0.8)  # at a cost of 4, which buys no dense answer
    assert found.top == pytest.approx(0.1)


def write_results(folder, runs, answers=4):
    """Files as in the authors' repository: a line per question and number of trials."""
    rng = np.random.default_rng(0)
    for run in runs:
        path = folder / kinetics_traces.results_file(run)
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query_id", "query", "choices", "generation_length", "trial", "coverage", "total_cost"])
            for question in (1, 0):
                lengths = json.dumps(rng.integers(1000, 30_000, answers).tolist())
                for trial in (1, 2, 4):
                    coverage = 0.25 + 0.5 * question if trial == 1 else 0.9
                    writer.writerow([question, f"a\nquestion, {question}", "7", lengths, trial, coverage, 1.0])


def test_per_question_results_of_the_authors(tmp_path):
    runs = [r for r in kinetics_traces.PUBLISHED if r.model == "Qwen3-8B"]
    write_results(tmp_path, runs)
    found = list(kinetics_traces.load_results(str(tmp_path), runs))
    assert [(r.model, r.attention) for r in found] == [(r.model, r.attention) for r in runs]
    np.testing.assert_array_equal(found[0].pass_rate, [0.25, 0.75])  # in the order of question numbers
    assert found[0].trials == 4
    assert found[0].lengths.shape == (2, 4)
    arms = [kinetics.make_arm(KineticsConfig(seeds=1), run) for run in found]
    assert arms[0].trials == (1, 2, 4)  # no more than were recorded
    np.testing.assert_allclose(arms[0].score, [[0.25, 0.5, 1], [0.75, 1, 1]], rtol=1e-12)
    assert arms[0].cost["eFLOPs"].shape == (2, 3)
    comparison = kinetics.compare(KineticsConfig(seeds=1, source="results"), arms)
    assert comparison.rows
    assert len(comparison.figures) == 4
    with pytest.raises(DataError, match=r"there is no .*qwen3-0-6b_dense.*cost_model/aime24"):
        list(kinetics_traces.load_results(str(tmp_path)))


def test_raw_traces_in_parquet(tmp_path):
    rows = [(q, 100.0 * (q == 0 or a == 0), "word " * (30 * (a + 1))) for a in range(3) for q in range(2)]
    table = pa.table(
        {
            "query": [f"question {q}" for q, _, _ in rows],
            "score": [score for _, score, _ in rows],
            "prediction": [[text] for _, _, text in rows],
        }
    )
    pq.write_table(table, tmp_path / "aime24_qwen3-0-6b_dense.parquet")
    (found,) = kinetics_traces.load_generations(str(tmp_path), ["Qwen3-0.6B"], chars_per_token=5.0)
    np.testing.assert_allclose(found.pass_rate, [1, 1 / 3])
    np.testing.assert_allclose(found.lengths, [[30, 60, 90], [30, 60, 90]])
    with pytest.raises(DataError, match=r"Qwen3-32B|cannot open"):
        list(kinetics_traces.load_generations(str(tmp_path), ["Qwen3-32B"]))
    pq.write_table(table.drop_columns(["prediction"]), tmp_path / "aime24_qwen3-4b_dense.parquet")
    with pytest.raises(DataError, match="no column 'prediction'"):
        list(kinetics_traces.load_generations(str(tmp_path), ["Qwen3-4B"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": ()}, "trials must be increasing"),
        ({"trials": (2, 1)}, "trials must be increasing"),
        ({"prompt_len": -1}, "prompt_len must be at least 0"),
        ({"gen_len": 0}, "gen_len must be at least 1"),
        ({"concentration": 0.0}, "concentration must be positive"),
        ({"budgets": 1}, "budgets must be at least 2"),
    ],
)
def test_bad_settings_of_the_frontier(changes, message):
    with pytest.raises(ValueError, match=message):
        KineticsConfig(**changes)


def test_an_oracle_is_shown_for_the_authors_questions_only(arms):
    """The paper's oracle: of one model, the best attention and number of trials for each question."""
    modelled = kinetics._budget_table(KineticsConfig(seeds=1), arms)
    assert "oracle" not in modelled.columns
    one = kinetics.Arm(
        "m", "dense", "m dense", {"eFLOPs": np.array([100.0, 900.0])}, np.array([[1.0, 1], [0, 1]]), (1, 2), 1
    )
    two = kinetics.Arm("m", "top-k", "m top-k", {"eFLOPs": np.array([[200.0], [250]])}, np.array([[0.0], [1]]), (1,), 1)
    table = kinetics._budget_table(KineticsConfig(seeds=1, source="results"), [one, two])
    assert table.columns.count("oracle") == 2
    assert table.rows[0] == ("300", "m × 1", 50.0, 50.0, "m × 1", 50.0, 100.0)  # a tie goes to the cheaper one
    assert table.rows[1] == ("1,000", "m × 2", 100.0, 100.0, "m × 2", 100.0, 100.0)
