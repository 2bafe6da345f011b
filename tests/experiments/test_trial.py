"""One trial: exact resumption, divergence, bad checkpoints, costs, sharding."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.runner import files
from experiments.runner.checkpoints import CheckpointError, Checkpoints
from experiments.runner.devices import Placement
from experiments.runner.interrupt import Interrupt, Interrupted
from experiments.runner.train import Arm
from experiments.runner.trial import TrialResult, compile_programs, load_result, run_trial

ADAM = Arm("adam", optax.adam, (0.1,))


def finish(generator):
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def train(task, directory, *, arm=ADAM, placement=None, rate=0.1, seed=0, interrupt=None, **options) -> TrialResult:
    placement = placement or Placement.over_all_devices(count=1)
    return finish(
        run_trial(
            task,
            arm,
            rate,
            seed,
            programs=compile_programs(task, arm, placement),
            placement=placement,
            directory=directory,
            identity=options.pop("identity", {"config": 1}),
            interrupt=interrupt or Interrupt(),
            **options,
        )
    )


class StopAfter(Interrupt):
    """Asks to stop at the n-th step boundary, as a signal would."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count
        self.requested = count == 1

    def check(self, where: str) -> None:
        super().check(where)
        self.left -= 1
        self.requested = self.left == 1


def test_training_equals_a_plain_loop(task, tmp_path):
    """The runner adds nothing to the arithmetic: a hand-written optax loop gives the same parameters."""
    job = task()
    result = train(job, tmp_path / "t")
    params, state = job.init(jax.random.key(0))
    tx = optax.adam(jnp.float32(0.1))
    opt = tx.init(params)
    losses = []

    @jax.jit
    def step(params, opt, batch):
        (loss, _), grads = jax.value_and_grad(job.loss, has_aux=True)(params, state, batch, None)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    for i in range(job.steps):
        batch = jax.tree.map(lambda a: a[0], job.batches.chunk(0, i, 1))
        params, opt, loss = step(params, opt, batch)
        losses.append(loss)
    # Same operations in a differently fused program: float32 rounding only.
    np.testing.assert_allclose(result.curves["train_loss"], losses, rtol=1e-5, atol=1e-7)
    assert result.status == "ok"
    assert result.final["val_loss"] < losses[0] / 10


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_and_resumed_trial_has_the_same_bits(task, tmp_path, stop_after):
    whole = train(task(), tmp_path / "whole")
    with pytest.raises(Interrupted, match="saved after step"):
        train(task(), tmp_path / "parts", interrupt=StopAfter(stop_after))
    resumed = train(task(), tmp_path / "parts")
    assert resumed.params_digest == whole.params_digest
    for name, values in whole.curves.items():
        np.testing.assert_array_equal(resumed.curves[name], values)
    assert resumed.final == whole.final
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_dispatch_length_and_sync_do_not_change_the_result_beyond_rounding(task, tmp_path):
    reference = train(task(), tmp_path / "a").curves["train_loss"]
    for i, changes in enumerate(({"steps_per_dispatch": 1}, {"steps_per_dispatch": 5}, {"steps_per_sync": 2})):
        losses = train(task(**changes), tmp_path / str(i)).curves["train_loss"]
        np.testing.assert_allclose(losses, reference, rtol=1e-5, atol=1e-7)  # other fusions, float32 rounding


@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_eight_devices_give_the_single_device_curve(task, tmp_path, parameters):
    single = train(task(), tmp_path / "one")
    wide = task(init=lambda key: ({"w": 0.1 * jax.random.normal(key, (4,)), "unused": jnp.ones((16, 3))}, ()))
    sharded = train(wide, tmp_path / "eight", placement=Placement.over_all_devices(parameters), keep_params=True)
    # Means over eight shards are summed in another order: float32 rounding.
    np.testing.assert_allclose(sharded.curves["train_loss"], single.curves["train_loss"], rtol=1e-5, atol=1e-7)
    assert (tmp_path / "eight" / "final").exists()


def test_a_sharded_trial_resumes_with_the_same_bits(task, tmp_path):
    """Eight devices, parameters and optimizer state split over them, saved by shards and read back."""
    wide = task(init=lambda key: ({"w": 0.1 * jax.random.normal(key, (4,)), "unused": jnp.ones((16, 3))}, ()))
    placement = Placement.over_all_devices("fsdp")
    whole = train(wide, tmp_path / "whole", placement=placement)
    with pytest.raises(Interrupted):
        train(wide, tmp_path / "parts", placement=placement, interrupt=StopAfter(2))
    resumed = train(wide, tmp_path / "parts", placement=placement)
    assert resumed.params_digest == whole.params_digest
    np.testing.assert_array_equal(resumed.curves["train_loss"], whole.curves["train_loss"])


def test_fsdp_splits_parameters_and_state(task):
    placement = Placement.over_all_devices("fsdp")
    wide = task(init=lambda key: ({"w": jnp.ones((4,)), "table": jnp.ones((3, 16))}, ()))
    shapes = compile_programs(wide, ADAM, placement).shapes
    assert shapes.params["table"].sharding.spec == jax.P(None, "data")
    assert shapes.opt_state[0].mu["table"].sharding.spec == jax.P(None, "data")
    assert shapes.params["w"].sharding.is_fully_replicated


def test_batch_that_does_not_divide_over_devices_is_refused(task):
    from experiments.data.arrays import Epochs

    job = task(batches=Epochs({"x": np.ones((64, 4), np.float32), "y": np.ones(64, np.float32)}, 6))
    with pytest.raises(ValueError, match="batch size 6 is not a multiple of the 8 devices"):
        compile_programs(job, ADAM, Placement.over_all_devices())


def test_divergence_is_a_result(task, tmp_path):
    result = train(task(), tmp_path / "t", arm=Arm("sgd", optax.sgd, (1e30,)), rate=1e30)
    assert result.status == "diverged"
    assert result.final == {}
    assert np.isnan(result.curves["train_loss"][-1])
    again = load_result(tmp_path / "t")
    assert again is not None
    assert again.status == "diverged"


def test_checkpoint_of_another_configuration_is_refused(task, tmp_path):
    with pytest.raises(Interrupted):
        train(task(), tmp_path / "t", interrupt=StopAfter(1), identity={"config": {"lr": 1}})
    with pytest.raises(CheckpointError, match=r"another configuration \(config: \{'lr': 1\} there, \{'lr': 2\} here\)"):
        train(task(), tmp_path / "t", identity={"config": {"lr": 2}})
    assert train(task(), tmp_path / "t", identity={"config": {"lr": 1}}).status == "ok"  # nothing was lost


def test_broken_checkpoint_is_named_and_kept(task, tmp_path):
    with pytest.raises(Interrupted):
        train(task(), tmp_path / "t", interrupt=StopAfter(2))
    step = max(int(p.name) for p in (tmp_path / "t" / "checkpoints").iterdir())
    broken = tmp_path / "t" / "checkpoints" / str(step)
    for path in broken.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"checkpoint .*{step} cannot be read"):
        train(task(), tmp_path / "t")
    assert broken.exists()


def test_foreign_checkpoint_is_refused(task, tmp_path):
    """A directory that somebody else's program saved with orbax."""
    foreign = Checkpoints(tmp_path / "t" / "checkpoints", {"program": "other"})
    foreign.save(10, {"weights": jnp.ones(3)})
    foreign.close()
    with pytest.raises(CheckpointError, match="another configuration"):
        train(task(), tmp_path / "t")


def test_broken_result_is_named(task, tmp_path):
    train(task(), tmp_path / "t")
    (tmp_path / "t" / "curves.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(files.OutputError, match="cannot be read"):
        load_result(tmp_path / "t")
    (tmp_path / "t" / "result.json").write_text('{"arm": ')
    with pytest.raises(files.OutputError, match="not valid JSON"):
        load_result(tmp_path / "t")


def test_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.OutputError, match="cannot write"):
        files.write_json(tmp_path / "file" / "below.json", {})


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    files.write_json(path, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.OutputError, match="No space left on device"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_costs_come_from_the_compiled_program(tmp_path):
    """The compiler's count for one step of a matrix product, times nothing: loops are counted once."""
    from experiments.runner.cost import compile_with_cost, tree_bytes

    x = jnp.ones((64, 64))
    loop = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=10)[0])
    _, cost = compile_with_cost(loop, x)
    assert cost.flops == pytest.approx(2 * 64**3, rel=0.01)
    assert cost.peak_bytes is not None
    assert cost.peak_bytes >= 2 * x.nbytes
    assert tree_bytes({"a": x, "b": jnp.ones(3, jnp.bfloat16)}) == x.nbytes + 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 40, "eval_every": 7}, "multiple of eval_every"),
        ({"steps_per_sync": 3}, "must divide eval_every"),
        ({"steps_per_sync": 5, "steps_per_dispatch": 2}, "must divide steps_per_sync"),
    ],
)
def test_impossible_budgets_are_refused(task, changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_arm_refuses_impossible_learning_rates(rate):
    with pytest.raises(ValueError, match="must be positive and finite"):
        Arm("adam", optax.adam, (rate,))


def test_missing_metric_is_named(task, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate returns \['val_loss'\], which lacks metric 'accuracy'"):
        train(task(metric="accuracy"), tmp_path / "t")


def test_feedback_reaches_the_optimizer_at_each_evaluation(task, tmp_path):
    """The extra arguments: accuracy is the last evaluated score, epoch_end true only on the step after it."""
    calls = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros((), jnp.int32), jnp.zeros(())),
        lambda updates, state, params=None, *, accuracy, epoch_end, **_: (
            jax.tree.map(lambda u: -0.01 * u, updates),
            (state[0] + epoch_end, state[1] + jnp.where(epoch_end, accuracy, 0.0)),
        ),
    )
    job = task(feedback="val_loss", final=lambda params, state, data, key: {"loss": jnp.zeros(())})
    placement = Placement.over_all_devices(count=1)
    arm = Arm("probe", lambda rate: calls, (0.1,))
    programs = compile_programs(job, arm, placement)
    states = []

    def chunk(state, *rest):
        state, losses = programs.chunk(state, *rest)
        states.append(jax.tree.map(np.asarray, state.opt_state))
        return state, losses

    result = finish(
        run_trial(
            job,
            arm,
            0.1,
            0,
            programs=dataclasses.replace(programs, chunk=chunk),
            placement=placement,
            directory=pathlib.Path(tmp_path / "t"),
            identity={},
            interrupt=Interrupt(),
        )
    )
    counts = [int(s[0]) for s in states]
    assert counts == [0, 1, 2, 3]
    assert states[-1][1] == pytest.approx(float(result.curves["val_loss"][:3].sum()), rel=1e-6)
