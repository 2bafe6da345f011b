"""Data: exact positions, disjoint splits, full-size loaders on tiny local sets of the same formats."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest

from experiments import tasks_full
from experiments.data import hub
from experiments.data.arrays import Epochs, Windows
from experiments.data.digits import load_digits
from experiments.data.text import load_python_topics


def test_epochs_visit_every_row_once_and_can_be_entered_anywhere():
    data = Epochs({"x": np.arange(24)}, 5)
    whole = data.chunk(3, 0, 12)["x"]
    assert whole.shape == (12, 5)
    for epoch in range(3):
        rows = whole[4 * epoch : 4 * epoch + 4].ravel()
        assert len(set(rows.tolist())) == 20
    for start in (0, 1, 5, 11):
        np.testing.assert_array_equal(data.chunk(3, start, 1)["x"][0], whole[start])
    assert not np.array_equal(whole, data.chunk(4, 0, 12)["x"])


def test_augmentation_depends_on_seed_and_step_alone():
    data = Epochs(
        {"images": np.random.default_rng(0).random((16, 8, 8, 3), np.float32), "labels": np.arange(16)},
        4,
        tasks_full.flip_and_shift,
    )
    whole = data.chunk(0, 0, 8)
    np.testing.assert_array_equal(data.chunk(0, 5, 2)["images"], whole["images"][5:7])
    assert not np.array_equal(whole["images"], data.chunk(1, 0, 8)["images"])


def test_flip_and_shift_moves_pixels_without_changing_them():
    images = np.random.default_rng(0).random((32, 8, 8, 3), np.float32)
    moved = tasks_full.flip_and_shift(np.random.default_rng(1), {"images": images}, pad=1)["images"]
    assert moved.shape == images.shape
    for old, new in zip(images, moved, strict=True):
        # The inner 6x6 pixels of the result come from the image or its mirror image.
        values = {tuple(p) for p in np.round(old.reshape(-1, 3), 6).tolist()}
        assert all(tuple(p) in values for p in np.round(new[1:-1, 1:-1].reshape(-1, 3), 6).tolist())


def test_windows_are_pieces_of_the_text():
    tokens = np.arange(100)
    chunk = Windows(tokens, 7, 3).chunk(0, 10, 4)["tokens"]
    assert chunk.shape == (4, 3, 8)
    assert (np.diff(chunk) == 1).all()
    np.testing.assert_array_equal(Windows(tokens, 7, 3).chunk(0, 12, 1)["tokens"][0], chunk[2])


@pytest.mark.parametrize("size", [0, 25])
def test_impossible_batch_sizes_are_refused(size):
    with pytest.raises(ValueError, match=rf"batch size must be in \[1, 24\], got {size}"):
        Epochs({"x": np.arange(24)}, size)


def test_rows_must_agree():
    with pytest.raises(ValueError, match="same number of rows"):
        Epochs({"x": np.arange(4), "y": np.arange(5)}, 2)
    with pytest.raises(ValueError, match="do not fit"):
        Windows(np.arange(5), 7, 1)


def test_digits_are_real_and_split_without_overlap():
    digits = load_digits()
    assert [len(s.labels) for s in digits] == [1077, 360, 360]
    assert digits.train.images.min() == 0
    assert digits.train.images.max() == 1
    rows = {part: {image.tobytes() for image in split.images} for part, split in digits._asdict().items()}
    assert len(rows["train"] | rows["validation"] | rows["test"]) == sum(map(len, rows.values()))
    with pytest.raises(ValueError, match="must leave test rows"):
        load_digits(1000, 797)


def test_text_ships_with_python_and_splits_do_not_overlap():
    text = load_python_topics()
    assert len(text.train) > 300_000
    letters = "".join(text.alphabet[i] for i in text.test[:2000])
    assert " the " in letters
    assert max(t.max() for t in text[:3]) < len(text.alphabet)


@pytest.fixture
def numbers(tmp_path):
    """A data set in the hub's JSON-lines format, in three shards."""
    for shard in range(3):
        rows = [json.dumps({"value": 100 * shard + i}) for i in range(10)]
        (tmp_path / f"part{shard}.jsonl").write_text("\n".join(rows) + "\n")
    return hub.load("json", "train", data_files=str(tmp_path / "*.jsonl"))


def value(row):
    return {"value": np.asarray(row["value"], np.int64)}


@pytest.mark.parametrize("buffer", [0, 8])
def test_a_stream_can_be_entered_anywhere(numbers, buffer):
    whole = hub.Stream(numbers, value, 4, buffer).chunk(0, 0, 20)["value"]
    assert whole.shape == (20, 4)
    assert len(set(whole.ravel()[:30].tolist())) == 30  # an epoch has every row once
    late = hub.Stream(numbers, value, 4, buffer)
    np.testing.assert_array_equal(late.chunk(0, 11, 3)["value"], whole[11:14])
    np.testing.assert_array_equal(late.chunk(0, 14, 2)["value"], whole[14:16])  # goes on without reading again
    if buffer:
        assert not np.array_equal(whole, hub.Stream(numbers, value, 4, buffer).chunk(1, 0, 20)["value"])
        assert not np.array_equal(whole.ravel()[:30], whole.ravel()[30:60])  # each epoch has its own order


def test_missing_data_sets_are_named(tmp_path):
    with pytest.raises(hub.DataError, match=r"cannot open data set 'json' \(split 'train'\)"):
        hub.load("json", "train", data_files=str(tmp_path / "nothing.jsonl"))


def png(generator, shape):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(path, column, rows, shape, seed=0):
    """A parquet file as the hub's image data sets have it: encoded pictures and integer labels."""
    import datasets

    generator = np.random.default_rng(seed)
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    table = {column: [{"bytes": png(generator, shape), "path": None} for _ in range(rows)]}
    table["label"] = generator.integers(0, 10, rows).tolist()
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))


def test_cifar_loader_reads_the_hubs_format(tmp_path):
    parquet(tmp_path / "train.parquet", "img", 40, (32, 32, 3))
    parquet(tmp_path / "test.parquet", "img", 12, (32, 32, 3), seed=1)
    files = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet")}
    splits = tasks_full.cifar_splits("parquet", validation=10, data_files=files)
    assert {part: data["images"].shape for part, data in splits.items()} == {
        "train": (30, 32, 32, 3),
        "validation": (10, 32, 32, 3),
        "test": (12, 32, 32, 3),
    }
    assert splits["train"]["images"].max() <= 1
    task = tasks_full.cifar10_task(batch_size=10, epochs=1, splits=splits)
    assert task.steps == 3
    assert 2.9e6 < task.model["params"] < 3.7e6
    with pytest.raises(ValueError, match="validation must be in"):
        tasks_full.cifar_splits("parquet", validation=40, data_files=files)


def test_imagenet_task_trains_from_a_stream(tmp_path):
    """The full-size path on pictures of unequal sizes: decode, cut, stream, train two epochs."""
    import optax

    from experiments.runner.devices import Placement
    from experiments.runner.interrupt import Interrupt
    from experiments.runner.train import Arm
    from experiments.runner.trial import compile_programs, run_trial

    parquet(tmp_path / "train.parquet", "image", 32, (40, 33, 3))
    parquet(tmp_path / "validation.parquet", "image", 16, (20, 37, 3), seed=1)
    files = {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}
    task = tasks_full.imagenet_vit_task(
        batch_size=8,
        epochs=2,
        name="parquet",
        size=32,
        classes=10,
        n_train=32,
        validation_rows=8,
        patch=16,
        width=32,
        layers=1,
        heads=2,
        buffer=16,
        data_files=files,
    )
    assert (task.steps, task.eval_every) == (8, 4)
    placement = Placement.over_all_devices()
    arm = Arm("adam", optax.adam, (1e-3,))
    trial = run_trial(
        task,
        arm,
        1e-3,
        0,
        programs=compile_programs(task, arm, placement),
        placement=placement,
        directory=tmp_path / "trial",
        identity={},
        interrupt=Interrupt(),
    )
    try:
        while True:
            next(trial)
    except StopIteration as end:
        result = end.value
    assert result.status == "ok"
    assert set(result.final) == {"val_loss", "val_accuracy", "test_loss", "test_accuracy"}
    assert np.isfinite(result.curves["train_loss"]).all()


def test_ids_of_processes_are_checked():
    from experiments.runner.devices import initialize_processes

    with pytest.raises(ValueError, match="needs all of"):
        initialize_processes("127.0.0.1:1", 2, None)
    with pytest.raises(ValueError, match=r"--process-id must be in \[0, 2\), got 2"):
        initialize_processes("127.0.0.1:1", 2, 2)
    assert jax.process_count() == 1


def test_search_reads_windows_of_bytes_from_text(tmp_path):
    from experiments.lion_search import text_windows

    texts = ["abcdefghijkl" * 3, "xyz", "0123456789" * 4]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n")
    options = {"name": "json", "data_files": str(tmp_path / "text.jsonl")}
    windows = text_windows("train", 4, 8, **options)
    assert windows.dtype == np.uint8
    assert bytes(windows[0]).decode() == "abcdefghi"
    assert bytes(text_windows("train", 2, 8, skip=1, **options)[0]).decode() == "012345678"
    with pytest.raises(hub.DataError, match="gives 8 windows after 0 rows, not 100"):
        text_windows("train", 100, 8, **options)


def test_full_adversarial_task_traces_with_the_papers_network(tmp_path):
    """ResNet-18 and PGD on the hub's format: shapes of the loss, its gradient and the metrics, without compiling."""
    from experiments import accelat

    parquet(tmp_path / "train.parquet", "img", 24, (32, 32, 3))
    parquet(tmp_path / "test.parquet", "img", 8, (32, 32, 3), seed=1)
    files = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet")}
    splits = tasks_full.cifar_splits("parquet", validation=8, data_files=files)
    splits["train"]["labels"][0] = 9  # ten classes, whatever the few labels drawn
    config = accelat.EXPERIMENT.presets["full"]
    task = accelat.make_task(dataclasses.replace(config, batch_size=8), splits)
    key = jax.random.key(0)
    params, state = jax.eval_shape(task.init, key)
    batch = jax.tree.map(lambda a: a[0], task.batches.chunk(0, 0, 1))
    (loss, new_state), grads = jax.eval_shape(jax.value_and_grad(task.loss, has_aux=True), params, state, batch, key)
    assert loss.shape == ()
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: a.shape, new_state) == jax.tree.map(lambda a: a.shape, state)
    assert set(jax.eval_shape(task.final, params, state, task.test, key)) == {"pgd", "clean"}
    assert task.model["params"] == 11_173_962
