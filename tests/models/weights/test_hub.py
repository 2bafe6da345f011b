"""Snapshots from a stand-in for the hub on this machine, through the real `huggingface_hub`."""

import hashlib
import json
import pathlib
import urllib.parse

import numpy as np
import pytest

from jaxaccel.models.weights import WeightsError
from jaxaccel.models.weights.hub import _relay, hub_snapshot, is_complete
from jaxaccel.models.weights.safetensors_files import INDEX
from tests.models.weights.making import TINY, random_params, write_folder, write_json, write_safetensors
from tests.models.weights.test_downloads import serving

COMMIT = "0123456789" * 4


def hub_of(files):
    """What the hub answers for a repository of one commit."""

    def answer(handler, number):
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        if path.startswith("/api/models/tiny/model/revision/"):
            siblings = [{"rfilename": name} for name in files]
            body, extra = json.dumps({"id": "tiny/model", "sha": COMMIT, "siblings": siblings}).encode(), {}
            kind = "application/json"
        elif path.startswith("/api/models/tiny/model/tree/"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in files.items()]
            body, extra, kind = json.dumps(tree).encode(), {}, "application/json"
        elif (name := path.removeprefix(f"/tiny/model/resolve/{COMMIT}/")) in files:
            body, kind = files[name], "application/octet-stream"
            extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        else:
            handler.send_error(404)
            return
        handler.send_response(200)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **extra}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    return answer


@pytest.fixture
def files(tmp_path):
    folder = write_folder(tmp_path / "source", TINY, random_params(TINY))
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"pickle"}


def fetch(url, cache, **options):
    endpoint = url.rsplit("/", 1)[0]
    return hub_snapshot("tiny/model", **({"revision": None, "cache": cache, "endpoint": endpoint} | options))


def test_a_snapshot_is_fetched_once(tmp_path, files):
    cache, steps = tmp_path / "cache", []
    with serving(hub_of(files)) as (url, asked):
        assert fetch(url, cache, offline=True) is None
        folder = fetch(url, cache, progress=lambda *step: steps.append(step))
        count = len(asked)
        assert fetch(url, cache) == folder  # without a question
        assert len(asked) == count
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert fetch(url, cache, offline=True) == folder  # nobody answers now
    sizes = sum(len(files[name]) for name in ("config.json", "model.safetensors"))
    assert {name for name, *_ in steps} == {"tiny/model"}
    assert steps[-1] == ("tiny/model", sizes, sizes)


def test_without_safetensors_there_is_advice(tmp_path, files):
    del files["model.safetensors"]
    with serving(hub_of(files)) as (url, _), pytest.raises(WeightsError, match=r"only has pytorch_model.bin, convert"):
        fetch(url, tmp_path / "cache")


def test_refusals_are_told(tmp_path):
    refused = pytest.raises(WeightsError, match="the hub did not give tiny/model: ")
    with serving(lambda handler, number: handler.send_error(404)) as (url, _), refused:
        fetch(url, tmp_path / "cache")
    with pytest.raises(WeightsError, match="'a/b/c' is not a hub id"):
        hub_snapshot("a/b/c", revision=None, cache=tmp_path)


def test_of_the_bars_only_bytes_on_disk_are_told():
    steps = []
    bar = _relay("a/b", lambda *step: steps.append(step))
    for options in (
        {"unit": "it", "total": 3},
        {"unit": "B", "total": 9, "name": "huggingface_hub.snapshot_download.transfer"},
        {"unit": "B", "total": 0, "name": "huggingface_hub.snapshot_download", "initial": 2},
    ):
        with bar(desc="x", **options) as shown:
            shown.update(5)
            shown.update(None)
    assert steps == [("a/b", 7, None)] * 2
    with _relay("a/b", None)(total=1, unit="B") as shown:  # nobody listens
        shown.update(1)


def test_when_a_snapshot_is_complete(tmp_path):
    assert not is_complete(tmp_path)
    write_json(tmp_path / "config.json", {})
    assert not is_complete(tmp_path)
    write_json(tmp_path / INDEX, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    write_safetensors(tmp_path / "one.safetensors", {"a": np.ones(1)})
    assert not is_complete(tmp_path)
    write_safetensors(tmp_path / "two.safetensors", {"b": np.ones(1)})
    assert is_complete(pathlib.Path(tmp_path))
    write_json(tmp_path / INDEX, {"weight_map": []})
    with pytest.raises(WeightsError, match="no weight_map"):
        is_complete(tmp_path)
