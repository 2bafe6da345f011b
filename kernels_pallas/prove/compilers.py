"""Where the compilers are, and how to get them: they come as wheels and need no chip, driver or toolkit."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

VARIABLE = "KERNELS_PALLAS_COMPILERS"
"""Environment variable with the folder that the compilers were installed into."""

_PROBES = {"tpu": ("libtpu",), "gpu": ("jax_plugins/xla_cuda12", "jax_plugins/xla_cuda13")}


class CompilerMissingError(RuntimeError):
    """A compiler that a proof needs is not installed; the message says how to get it."""


def default_folder() -> pathlib.Path:
    """Where `install` puts the compilers, and where they are looked for when nothing else is said."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "kernels_pallas" / f"compilers-jax-{importlib.metadata.version('jax')}"


def requirements() -> list[str]:
    """What to install for the JAX that is here, as pip takes it."""
    version = importlib.metadata.version("jax")
    libtpu = next(
        match[1]
        for requirement in importlib.metadata.requires("jax") or ()
        if (match := re.match(r"(libtpu\s*[=~<>!][^;]*)", requirement))
    )
    return [
        libtpu.strip().replace(" ", ""),
        f"jax-cuda12-plugin=={version}",
        f"jax-cuda12-pjrt=={version}",
        "nvidia-cuda-nvcc-cu12",
        "nvidia-cuda-nvdisasm",
        "flatbuffers",  # for the worker, where the environment has none
    ]


def install(folder: pathlib.Path | None = None) -> pathlib.Path:
    """Install the compilers into a folder of their own, about 1.1 GB; the environment stays as it is."""
    folder = default_folder() if folder is None else folder
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*command, *requirements()], check=True)
    return folder


def search_path() -> list[pathlib.Path]:
    """Folders that are searched, best first: the variable's, the environment's packages, the default folder."""
    named = os.environ.get(VARIABLE)
    return [
        *([pathlib.Path(named)] if named else []),
        *(pathlib.Path(entry) for entry in sys.path if entry),
        default_folder(),
    ]


def find(family: str) -> pathlib.Path:
    """The folder with the compiler of a family of chips.

    Raises:
        CompilerMissingError: if there is none.
    """
    for folder in search_path():
        if any((folder / probe).is_dir() for probe in _PROBES[family]):
            return folder
    packages = " ".join(f"'{r}'" for r in requirements())
    raise CompilerMissingError(
        f"the {family.upper()} compiler is not installed: run `python -m kernels_pallas.prove --install`, which is "
        f"`pip install --no-deps --target {default_folder()} {packages}`, or set {VARIABLE} to a folder that has it"
    )


def find_tool(name: str) -> str | None:
    """Path of ``ptxas`` or ``nvdisasm``: from NVIDIA's wheels, else from the PATH; ``None`` if there is none."""
    for folder in search_path():
        for path in sorted(folder.glob(f"nvidia/*/bin/{name}")):
            return str(path)
    return shutil.which(name)
