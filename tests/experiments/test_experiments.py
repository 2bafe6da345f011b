"""Every experiment in its smallest form, through the runner, and both presets of each."""

import json

import numpy as np
import pytest

from experiments import registry
from experiments.runner import cli
from jaxaccel import records
from jaxaccel.catalogue import METHODS

SMALLEST = {
    "exadam": ["--model", "mlp", "--epochs", "3", "--learning-rates", "0.0001", "0.003", "--target-accuracy", "0.5"],
    "lion": [
        "--batch-sizes",
        "8",
        "--steps",
        "20",
        "--evaluations",
        "2",
        "--adamw-learning-rates",
        "0.003",
        "--lion-learning-rates",
        "0.001",
    ],
    "accelat": ["--epochs", "3", "--start-rates", "0.1", "--test-attack-steps", "2", "--train-attack-steps", "1"],
    "kinetics": ["--questions", "20", "--budgets", "5", "--trials", "1", "4"],
    "block_topk_recall": [
        *("--pairs", "4", "--questions", "2", "--noise", "4", "--budgets", "8", "12", "--steps", "2", "--layers", "1"),
        *("--width", "8", "--batch-size", "4", "--language-steps", "1", "--language-length", "16"),
        *("--language-budgets", "8"),
    ],
    "block_topk_latency": ["--lengths", "64", "128", "--num-blocks", "1", "--repeats", "3", "--cold-bytes", "1000"],
    "local_linear_regression": [
        *("--segments", "1", "2", "--length", "8", "--size", "2", "--streams", "1", "--tuning-streams", "1"),
        *("--tables", "diabetes", "--splits", "1", "--ridges", "1", "10", "--solver-length", "8", "--solver-size", "2"),
        *("--repeats", "3"),
    ],
    "local_linear_in_context": [
        *("--tasks", "linear", "--size", "2", "--points", "3", "--layers", "1"),
        *("--width", "4", "--batch-size", "2", "--steps", "2", "--learning-rates", "0.01"),
    ],
    "medusa": [
        *("--model", "random", "--text", "4", "--own", "2", "--own-batch", "4", "--prompt", "8", "--length", "16"),
        *("--steps", "2", "--batch-size", "4", "--vocabulary", "16", "--guesses", "1", "3", "--prompts", "2"),
        *("--prompt-length", "8", "--new-tokens", "4", "--batches", "1", "--repeats", "1"),
    ],
    "snapkv_recall": [
        *("--pairs", "4", "--questions", "2", "--noise", "4", "--budgets", "8", "--steps", "2", "--layers", "1"),
        *("--width", "8", "--batch-size", "4", "--num-sink", "3", "--capacities", "8", "5"),
    ],
    "geb": [
        *("--layers", "1", "--width", "8", "--inner", "8", "--heads", "2", "--kv-heads", "1", "--context", "8"),
        *("--batch-size", "2", "--steps", "4", "--warmup-steps", "1", "--norm-learning-rates", "0.003"),
        *("--validation-rows", "2"),
    ],
    "blockffn": [
        *("--width", "8", "--heads", "2", "--layers", "1", "--experts", "4", "--expert-dim", "2", "--top-k", "2"),
        *("--length", "8", "--chunk-size", "4", "--batch-size", "2", "--steps", "2", "--rates", "0.003"),
        *("--heal-steps", "1", "--validation-rows", "2", "--decoded", "1", "2", "--repeats", "3"),
    ],
    "learn2pd": [
        *("--layers", "1", "--width", "8", "--heads", "2", "--stages", "2", "3", "--batch-size", "2"),
        *("--gen-length", "32", "--block-length", "8", "--thresholds", "0.9", "--values", "0.5", "0.9"),
        *("--filter-prompts", "2", "--filter-steps", "2", "--prompts", "2", "--decode-batch", "2", "--timed", "3"),
    ],
    "gbnn": [
        *("--tables", "diabetes", "--rows", "60", "--units", "4", "--units-per-step", "1", "2", "--kept", "0.5", "1.0"),
        *("--rates", "0.1", "--adam-rates", "0.01", "--penalties", "0.01", "--inner-steps", "3", "--epochs", "16"),
        *("--lbfgs-steps", "16", "--repeats", "3"),
    ],
    "harmonica": [
        *(
            "--width",
            "8",
            "--depth",
            "1",
            "--heads",
            "2",
            "--train-steps",
            "2",
            "--train-batch",
            "2",
            "--num-steps",
            "3",
        ),
        *(
            "--betas",
            "1e-6",
            "--betas-equal",
            "1e-3",
            "--router-epochs",
            "2",
            "--router-batch",
            "2",
            "--intervals",
            "2",
        ),
        *("--fewer-steps", "2", "--random-shares", "0.3", "--samples", "4", "--timed-batch", "2", "--repeats", "3"),
    ],
    "efficient_vla": [
        *("--layers", "3", "--width", "8", "--head-depth", "1", "--head-width", "12", "--window", "2", "--steps", "4"),
        *("--batch", "2", "--draws", "1", "--boards", "2", "--calibration", "2", "--drops", "1", "--tokens", "6"),
        *("--intervals", "2", "--together", "1", "6", "2", "--repeats", "3", "--language-model", ""),
    ],
    "qfx": [
        *("--models", "mlp", "--words", "4", "--hot", "1", "--hot-words", "4", "--steps", "3", "--batch-size", "4"),
        *("--checked-rows", "4"),
    ],
    "gbrl": [
        *("--tasks", "key_door", "--steps", "1024", "--tree-rates", "1.0", "--network-rates", "0.001"),
        *("--sizes", "64", "2", "3", "--repeats", "3"),
    ],
    "trees": [
        *("--tables", "diabetes", "--rows", "60", "--models", "boosting", "random forest", "--bins", "4"),
        *("--boosted-trees", "2", "--boosted-depth", "1", "--stops", "1", "2", "--forest-trees", "4"),
        *("--forest-depth", "1"),
    ],
    "lion_search": ["--population", "8", "--evaluations", "16", "--steps", "20", "--funnel-programs", "2"],
}


@pytest.mark.parametrize("name", registry.names())
def test_smallest_form_gives_tables_figures_and_valid_rows(name, tmp_path, capsys):
    words = ["run", name, "--seeds", "1", "--devices", "1", "--out", str(tmp_path), *SMALLEST[name]]
    assert cli.main(words) == 0, capsys.readouterr().err
    (result,) = tmp_path.glob("runs/*/result.json")
    comparison = json.loads(result.read_text())
    assert comparison["headline"] in capsys.readouterr().out.replace("\n", " ")
    assert comparison["tables"]
    assert comparison["figures"]
    rows = records.read_rows(tmp_path / "records.jsonl").rows
    assert rows
    assert {row["method"] for row in rows} <= {method.slug for method in METHODS} | {"adamw"}
    assert all(row["experiment"] == name for row in rows)


@pytest.mark.parametrize("name", registry.names())
def test_presets_are_of_the_config_type_and_named_as_everywhere(name):
    experiment = registry.get(name)
    assert set(experiment.presets) == {"quick", "full"}
    assert all(type(preset) is experiment.config for preset in experiment.presets.values())
    assert experiment.name == name


def test_exadam_compares_at_one_rate_and_at_each_arms_own(tmp_path, capsys):
    """The analysis on curves that are known: exadam twice as fast at the paper's rate, equal when each is fastest."""
    from experiments.exadam import ExadamConfig, compare, make_arms, make_task
    from experiments.runner.sweep import Sweep
    from tests.experiments.test_sweep import trial

    config = ExadamConfig(model="mlp", epochs=4, learning_rates=(1e-4, 1e-2), target_accuracy=0.9)
    task, arms = make_task(config), make_arms(config)
    accuracy = {
        ("adam", 1e-4): [0.1, 0.2, 0.3, 0.9],
        ("adam", 1e-2): [0.9, 0.9, 0.9, 0.9],
        ("exadam", 1e-4): [0.1, 0.9, 0.9, 0.9],
        ("exadam", 1e-2): [0.9, 0.9, 0.9, 0.9],
        ("exadam-v1", 1e-4): [0.1, 0.1, 0.1, 0.1],
        ("exadam-v1", 1e-2): [0.1, 0.9, 0.9, 0.9],
    }
    trials = []
    for (arm, rate), values in accuracy.items():
        for seed in range(3):
            made = trial(arm, rate, seed, [1 - v for v in values])
            made.curves["val_accuracy"] = np.asarray(values, np.float32)
            made.curves["eval_step"] = np.arange(1, 5) * task.eval_every
            made.final["test_accuracy"] = values[-1]
            trials.append(made)
    comparison = compare(config, Sweep(task, arms, tuple(trials)))
    assert "2 against Adam's 4 at the paper's rate 0.0001; 1 against 1 with each" in comparison.headline
    found = {
        (r["method_config"]["step_growth"], r["method_config"]["setting"]): (r["speedup"], r["censored"])
        for r in comparison.rows
        if r["cost_kind"] == "steps"
    }
    assert found[("none", "same_lr")] == (2.0, [])
    assert found[("none", "fastest_lr")] == (1.0, [])
    assert found[("log", "same_lr")] == (1.0, ["method"])  # at most: it never got there
