"""Snapshots of models on the Hugging Face hub, and whether one lies on this machine already."""

import pathlib
from typing import Any

from jaxaccel.models.weights.downloads import Progress
from jaxaccel.models.weights.errors import WeightsError, optional_module
from jaxaccel.models.weights.safetensors_files import INDEX, shard_names

PATTERNS = ("*.safetensors", "*.json", "*.jinja")
_TIMEOUT = 5.0  # seconds for the hub's first answer


def _relay(repository: str, progress: Progress | None) -> Any:
    """A progress bar for `huggingface_hub` that shows nothing and calls ``progress`` with the bytes of all files."""
    bars: Any = optional_module("huggingface_hub.utils", "The Hugging Face hub").tqdm

    class Relay(bars):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))
            # Of its three bars one counts files, and one what the network carries, maybe compressed.
            network = str(kwargs.get("name")).endswith(".transfer")
            self._counts = kwargs.get("unit") == "B" and not network
            self._done = int(kwargs.get("initial") or 0)
            self.total = kwargs.get("total")

        def update(self, n: Any = 1) -> None:
            self._done += int(n or 0)
            if progress is not None and self._counts:
                progress(repository, self._done, int(self.total) if self.total else None)

    return Relay


def is_complete(folder: pathlib.Path) -> bool:
    """Whether a snapshot has its configuration and all its weights.

    Args:
        folder: of the snapshot.

    Returns:
        True if nothing is left to fetch.

    Raises:
        WeightsError: for an index that cannot be read.

    >>> is_complete(pathlib.Path("/nowhere"))
    False
    """
    if not (folder / "config.json").is_file():
        return False
    for prefix in ("", "diffusion_pytorch_"):  # as transformers and as diffusers save
        if (folder / f"{prefix}model.safetensors").is_file():
            return True
        index = folder / f"{prefix}{INDEX}"
        if index.is_file():
            return all((folder / name).is_file() for name in shard_names(index))
    return False


def hub_snapshot(
    repository: str,
    *,
    revision: str | None,
    cache: pathlib.Path,
    progress: Progress | None = None,
    offline: bool = False,
    endpoint: str | None = None,
    subfolder: str = "",
) -> pathlib.Path | None:
    """Find a model's files on this machine, or fetch them from the hub.

    A complete snapshot that is there already is taken without asking the hub; `huggingface_hub` keeps interrupted
    downloads and goes on with them.

    Args:
        repository: ``owner/name``.
        revision: branch, tag or commit; ``None`` is the main branch.
        cache: folder of snapshots.
        progress: called with the repository, bytes done, bytes in total; both grow as files are begun.
        offline: do not fetch.
        endpoint: another address than the hub's.
        subfolder: fetch only this folder of the repository, one model of several.

    Returns:
        The folder, or its ``subfolder``; ``None`` only if ``offline`` and there is none.

    Raises:
        WeightsError: if the hub cannot be reached or refuses, or the model has no safetensors.
        ImportError: without the package ``huggingface_hub``.
    """
    hub = optional_module("huggingface_hub", "The Hugging Face hub")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in PATTERNS]
    where = {"revision": revision, "cache_dir": str(cache), "allow_patterns": patterns, "endpoint": endpoint}
    try:
        found = pathlib.Path(hub.snapshot_download(repository, local_files_only=True, **where)) / subfolder
        if is_complete(found):
            return found
    except OSError:  # LocalEntryNotFoundError: nothing here yet
        pass
    except ValueError as error:
        raise WeightsError(f"{repository!r} is not a hub id ({error})") from error
    if offline:
        return None
    try:
        snapshot = hub.snapshot_download(
            repository, etag_timeout=_TIMEOUT, tqdm_class=_relay(repository, progress), **where
        )
        folder = pathlib.Path(snapshot) / subfolder
    except Exception as error:  # the transport's own kinds differ between versions of huggingface_hub
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"the hub did not give {repository}: {type(error).__name__}: {reason[0]}") from error
    if not is_complete(folder) and subfolder:
        raise WeightsError(
            f"{repository} has no config.json with complete safetensors in {subfolder}/ at revision "
            f"{revision or 'main'}; if it only has .bin files, convert it with diffusers: "
            "DiffusionPipeline.from_pretrained(name).save_pretrained(folder), then load the folder"
        )
    if not is_complete(folder):
        raise WeightsError(
            f"{repository} has no config.json with complete safetensors at revision {revision or 'main'}; "
            "if it only has pytorch_model.bin, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder), then load the folder"
        )
    return folder
