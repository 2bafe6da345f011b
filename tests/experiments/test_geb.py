"""The experiment of GEB-1.3B: data, arms and spike counts are as described, analyses on known numbers, one tiny run."""

import dataclasses
import json
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from experiments import geb
from experiments.data.source_code import load_stdlib_source
from experiments.runner import terminal
from experiments.runner.api import from_json
from experiments.runner.execute import run_one
from experiments.runner.interrupt import Interrupt
from experiments.runner.session import RunSettings, open_run
from experiments.runner.sweep import Sweep
from jaxaccel import records
from tests.experiments.test_sweep import trial

TINY = geb.GebConfig(
    seeds=2,
    layers=1,
    width=8,
    inner=8,
    heads=2,
    kv_heads=1,
    context=8,
    batch_size=2,
    steps=4,
    warmup_steps=1,
    norm_learning_rates=(3e-3,),
    validation_rows=2,
)

# Data -----------------------------------------------------------------------------------------------------------------


def test_the_standard_library_is_split_by_position():
    source = load_stdlib_source()
    total = len(source.train) + len(source.validation)
    assert total > 3_000_000
    assert len(source.train) == int(0.95 * total)
    assert load_stdlib_source() is source
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    names = sorted(path.name for path in folder.glob("*.py"))
    assert source.train.tobytes().startswith(
        (folder / names[0]).read_bytes() + b"\n" + (folder / names[1]).read_bytes()
    )
    assert source.validation.tobytes().endswith(b"\n" + (folder / names[-1]).read_bytes())


def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="installed without its sources"):
        load_stdlib_source.__wrapped__()


def test_windows_for_validation_and_test_do_not_overlap():
    batches, held_out = geb.source_data(dataclasses.replace(TINY, validation_rows=50))
    assert held_out.shape == (100, 9)
    assert batches.chunk(0, 0, 3)["tokens"].shape == (3, 2, 9)
    source = load_stdlib_source().validation
    np.testing.assert_array_equal(held_out[0], source[:9])
    np.testing.assert_array_equal(held_out[-1], source[-9:])
    task = geb.language_task(TINY, geb.source_data(TINY), kv_heads=1, norm="pre")
    assert not np.array_equal(task.validation["tokens"], task.test["tokens"])


def test_streamed_texts_are_joined_and_cut(tmp_path):
    for split, count in (("train", 40), ("validation", 20)):
        rows = [json.dumps({"text": f"{split} text {i:02}", "url": "x"}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    config = dataclasses.replace(TINY, dataset="c4")
    stream, held_out = geb.c4_data(config, "json", buffer=0, data_files=files)
    expected = b"".join(f"validation text {i:02}\0".encode() for i in range(20))
    assert held_out.astype(np.uint8).tobytes() == expected[: 4 * 9]
    chunk = stream.chunk(0, 0, 3)["tokens"]
    assert (chunk.shape, chunk.dtype) == ((3, 2, 9), np.int32)
    assert chunk.astype(np.uint8).tobytes() == b"".join(f"train text {i:02}\0".encode() for i in range(40))[: 6 * 9]
    with pytest.raises(geb.hub.DataError, match="json has 42 sequences for validation, 80 needed"):
        geb.c4_data(dataclasses.replace(config, validation_rows=40), "json", data_files=files)


def test_a_tokenizer_must_fit_the_vocabulary(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    backend.save(str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(TINY, dataset="c4", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="vocab_size is 256, the tokenizer has 300 tokens"):
        geb.c4_data(config, "json")


# Task and arms --------------------------------------------------------------------------------------------------------


def test_the_full_preset_is_geb():
    full = geb.EXPERIMENT.presets["full"]
    model = full.decoder(full.kv_heads, "pre")
    assert model.num_parameters == 1_348_044_800
    assert (model.num_kv_heads, model.head_dim, model.max_positions) == (4, 128, 4096)
    stub = None, np.zeros((2 * full.validation_rows, full.context + 1), np.int32)
    task = geb.language_task(full, stub, kv_heads=4, norm="pre")
    assert task.model["params"] == 1_348_044_800
    params, state = jax.eval_shape(task.init, jax.random.key(0))
    batch = {"tokens": jax.ShapeDtypeStruct((2, full.context + 1), jnp.int32)}
    grads = jax.value_and_grad(task.loss, has_aux=True)
    (loss, _), slopes = jax.eval_shape(grads, params, state, batch, jax.random.key(0))
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}


def test_an_untrained_model_knows_nothing():
    task = geb.language_task(TINY, geb.source_data(TINY), kv_heads=1, norm="pre")
    params, state = task.init(jax.random.key(0))
    loss = jax.jit(task.evaluate)(params, state, task.validation, jax.random.key(0))["val_loss"]
    assert float(loss) == pytest.approx(np.log(256), abs=0.1)


@pytest.mark.parametrize("name", list(geb.MEASURES))
def test_arms_are_what_they_are_called(name):
    arm = geb.make_arm(TINY, name, (0.1,))
    tx = arm.optimizer(0.1)
    params = {"embedding": jnp.ones(4), "head": jnp.ones(4)}
    gradient = {"embedding": jnp.full(4, 3.0), "head": jnp.full(4, 0.1)}

    def losses_to_updates(rate, losses):
        tx = optax.with_extra_args_support(arm.optimizer(rate))  # a traced rate, as the runner's is

        def step(state, loss):
            updates, state = tx.update(gradient, state, params, value=loss)
            return state, updates["head"]

        return jax.lax.scan(step, tx.init(params), losses)[1]

    moved = jax.jit(losses_to_updates)
    once, twice = (moved(rate, jnp.array([2.0] * 22 + [9.0])) for rate in (0.1, 0.2))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)  # float32
    assert not once[0].any()  # the warm-up starts at 0
    assert once[1].all()
    assert bool(once[-1].any()) == ("skip" not in name)
    first = tx.update(gradient, tx.init(params), params, **({"value": 2.0} if "skip" in name else {}))[1]
    (mu,) = (s.mu for s in jax.tree.leaves(first, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    # First moments are a tenth of the clipped gradients: what they are tells whether EGS came before the clip.
    scale = TINY.alpha if "EGS" in name else 1.0
    norm = max(1.0, np.sqrt(4 * (3.0 * scale) ** 2 + 4 * 0.1**2))
    np.testing.assert_allclose(mu["embedding"], 0.1 * 3.0 * scale / norm, rtol=1e-5)  # float32
    np.testing.assert_allclose(mu["head"], 0.1 * 0.1 / norm, rtol=1e-5)
    assert arm.method == ("adamw" if name == "adamw" else "geb")


def test_spikes_are_counted_in_the_losses_of_a_run():
    losses = np.full(60, 2.0, np.float32)
    losses[5] = 50.0  # warming up
    assert geb.count_spikes(losses, geb.COUNTED) == 0
    losses[5] = 2.0
    losses[[30, 31, 50]] = 4.5
    assert geb.count_spikes(losses, geb.COUNTED) == 3
    losses[:30] += np.sin(np.arange(30)) * 0.01
    losses[40] = 2.5
    assert geb.count_spikes(losses, geb.COUNTED) == 3
    assert geb.count_spikes(losses, geb.SKIPPED) == 4
    losses[55:] = np.nan
    assert geb.count_spikes(losses, geb.COUNTED) == 3


# The analysis ---------------------------------------------------------------------------------------------------------


def known(spiking):
    """Sweeps on made-up losses; AdamW diverges at the raised rate with the second seed."""
    config = dataclasses.replace(TINY, norm_learning_rates=(3e-3, 1e-2))
    data = geb.source_data(config)
    tasks = [geb.language_task(config, data, kv_heads=k, norm=n) for k, n in ((1, "pre"), (1, "post"), (2, "pre"))]

    def made(name, rate, seed, values, status="ok"):
        found = trial(name, rate, seed, values, status)
        losses = np.full(40, 2.0, np.float32)
        if spiking and rate == 0.03 and "skip" not in name:
            losses[30:32] = 10.0
        found.curves["train_loss"] = losses
        return found

    def sweep(task, arms, values, **failed):
        trials = [
            made(arm.name, rate, seed, [3.0, values[arm.name, rate]], failed.get(arm.name, ("ok", "ok"))[seed])
            for arm in arms
            for rate in arm.learning_rates
            for seed in range(2)
        ]
        return Sweep(task, tuple(arms), tuple(trials))

    grid = [geb.make_arm(config, "adamw", (3e-3, 1e-2))]
    raised = [geb.make_arm(config, name, (0.03,)) for name in geb.MEASURES]
    ends = {("adamw", 0.03): 2.5, ("EGS", 0.03): 2.25, ("skip", 0.03): 2.0, ("EGS + skip", 0.03): 2.75}
    return config, geb.Sweeps(
        pre=sweep(tasks[0], grid, {("adamw", 3e-3): 1.5, ("adamw", 1e-2): 1.25}),
        post=sweep(tasks[1], grid, {("adamw", 3e-3): 1.75, ("adamw", 1e-2): 2.0}),
        separate=sweep(tasks[2], [geb.make_arm(config, "adamw", (3e-3,))], {("adamw", 3e-3): 1.375}),
        raised=sweep(tasks[0], raised, ends, adamw=("ok", "diverged")),
    )


def test_analysis_on_known_numbers():
    comparison = geb.compare(*known(spiking=True))
    heads, norms, stability = comparison.tables
    assert [row[:4] for row in heads.rows] == [
        (1, heads.rows[0][1], 32, "1.500 ± 0.000"),
        (2, heads.rows[1][1], 64, "1.375 ± 0.000"),
    ]
    assert heads.rows[1][1] - heads.rows[0][1] == 2 * 4 * 8  # keys and values of one more head
    assert norms.rows == (
        ("0.003", "1.500 ± 0.000", "2/2", "1.750 ± 0.000", "2/2"),
        ("0.01", "1.250 ± 0.000", "2/2", "2.000 ± 0.000", "2/2"),
    )
    assert stability.rows == (
        ("adamw, usual rate", 0, 0, "1.500 ± 0.000", "2/2"),
        ("adamw", 4, 4, "2.500", "1/2"),
        ("EGS", 4, 4, "2.250 ± 0.000", "2/2"),
        ("skip", 0, 0, "2.000 ± 0.000", "2/2"),
        ("EGS + skip", 0, 0, "2.750 ± 0.000", "2/2"),
    )
    assert "spikes adamw 4 / EGS 4 / skip 0 / EGS + skip 0" in comparison.headline
    assert "pre-norm 1.250 ± 0.000 at its best rate 0.01, post-norm 1.750 ± 0.000 at 0.003" in comparison.headline
    by_part = {row["method_config"].get("part"): row for row in comparison.rows if row["method"] == "geb"}
    row = by_part["grouped queries"]
    assert (row["speedup"], row["quality"], row["quality_baseline"]) == (2.0, 1.5, 1.375)
    skip = next(row for row in comparison.rows if row["method_config"].get("skip") and row["quality"] == 2.0)
    assert skip["baseline"] == "adamw"
    assert skip["method_config"]["alpha"] == 1.0
    assert [row["status"] for row in comparison.rows if row["method"] == "adamw"] == ["diverged"]


def test_nothing_that_spikes_is_said():
    assert "nothing spikes, with or without the measures" in geb.compare(*known(spiking=False)).headline


def test_smallest_form_through_the_runner(tmp_path):
    config = dataclasses.replace(TINY, seeds=1)
    with Interrupt() as interrupt:
        directory = open_run(geb.EXPERIMENT, config, "quick", tmp_path, resume=False)
        settings = RunSettings(tmp_path, device_count=1)
        run_one(geb.EXPERIMENT, config, settings, directory, interrupt, terminal.Screen(quiet=True))
    comparison = from_json(json.loads((directory / "result.json").read_text()))
    assert len(comparison.tables) == 3
    assert len(comparison.figures) == 2
    assert "nothing spikes" in comparison.headline
    rows = records.read_rows(tmp_path / "records.jsonl").rows
    assert {row["method"] for row in rows} == {"geb"}
    assert [row["cost_kind"] for row in rows] == ["bytes", "steps", "steps", "steps"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_learning_rates": (1e-4,)}, r"learning_rate 0.003 is not in norm_learning_rates \(0.0001,\)"),
        ({"norm_learning_rates": ()}, "no learning rates to try"),
        ({"stress": 1.0}, "stress must be finite and more than 1, got 1.0"),
        ({"stress": float("nan")}, "stress"),
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1.0"),
        ({"warmup_steps": 0}, r"warmup_steps \(0\) must be at least 1 and less than steps"),
        ({"warmup_steps": 4}, r"warmup_steps \(4\) must be at least 1 and less than steps \(4\)"),
        ({"width": 6}, r"width \(6\) must be a multiple of 2 · heads \(4\)"),
        ({"vocab_size": 100}, "dataset 'source' is read as bytes"),
        ({"tokenizer": "x"}, "dataset 'source' is read as bytes"),
        ({"kv_heads": 3}, "multiple of num_kv_heads"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
