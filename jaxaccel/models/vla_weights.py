"""Real weights for `vla_head`: CogACT's action head by the names of its code.

Names may begin with ``action_model.`` and ``net.``, as in the published checkpoints. Those hold pickled tensors,
which can run code and are not read: convert one to safetensors, or give a dict of arrays.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxaccel.models.vla_head import SIZES, HeadConfig, head_shapes
from jaxaccel.models.weights.downloads import Progress
from jaxaccel.models.weights.errors import WeightsError, listed
from jaxaccel.models.weights.hub import hub_snapshot
from jaxaccel.models.weights.safetensors_files import open_safetensors
from jaxaccel.models.weights.sources import cache_folder

_TOP = {
    "action": "x_embedder.linear", "condition": "z_embedder.linear", "time_in": "t_embedder.mlp.0",
    "time_out": "t_embedder.mlp.2", "final": "final_layer.linear",
}  # fmt: skip
_BLOCK = {"qkv": "attn.qkv", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
_OTHER = {"positions": "positional_embedding", "null": "z_embedder.uncondition"}
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def _names(config: HeadConfig) -> dict[tuple[Any, ...], str]:
    """The name in a file of each parameter, by its path in the tree."""
    names: dict[tuple[Any, ...], str] = {(key,): name for key, name in _OTHER.items()}

    def add(path: tuple[Any, ...], name: str) -> None:
        names[path] = f"{name}.weight"
        names[(*path[:-1], f"{path[-1]}_bias")] = f"{name}.bias"

    for key, name in _TOP.items():
        add((key,), name)
    for block in range(config.depth):
        for key, name in _BLOCK.items():
            add(("blocks", block, key), f"blocks.{block}.{name}")
    return names


def _stripped(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Names without prefixes, and as they are; of a whole policy only those of its action head."""
    whole = any(name.startswith("action_model.") for name in mapping)
    chosen = [name for name in mapping if not whole or name.startswith("action_model.")]
    return {re.sub(r"^(action_model\.)?(net\.)?", "", name): name for name in chosen}


def head_config_from_names(mapping: Mapping[str, Any], *, heads: int | None = None) -> HeadConfig:
    """The numbers that tensors have by their shapes.

    Args:
        mapping: tensors by name.
        heads: of attention, which shapes do not say; known for the published widths and depths.

    Raises:
        WeightsError: naming what is missing, or asking for ``heads``.
    """
    found = _stripped(mapping)
    needed = (*_OTHER.values(), "x_embedder.linear.weight", "z_embedder.linear.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in found]
    if missing:
        raise WeightsError(f"no action head of CogACT; missing: {listed(missing)}")
    shapes = {name: np.shape(mapping[found[name]]) for name in needed}
    depth = 1 + max(int(part[1]) for name in found if (part := re.match(r"blocks\.(\d+)\.", name)))
    try:
        window, width = shapes["positional_embedding"]
        if heads is None:
            heads = {(w, d): h for w, d, h in SIZES.values()}.get((width, depth))
        if heads is None:
            raise WeightsError(f"shapes do not say how many heads {depth} blocks of width {width} have; pass heads")
        return HeadConfig(
            width=width, depth=depth, heads=heads, token_size=shapes["z_embedder.linear.weight"][1],
            window=window - 1, channels=shapes["x_embedder.linear.weight"][1],
            mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] // width,
        )  # fmt: skip
    except WeightsError:
        raise
    except (ValueError, IndexError) as error:
        raise WeightsError(f"shapes do not fit together: {error}") from error


def head_params_from_names(
    mapping: Mapping[str, Any], config: HeadConfig, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """Turn tensors by CogACT's names into the tree of parameters.

    Args:
        mapping: NumPy arrays, or what ``np.asarray`` takes; of a whole policy the other parts are not read.
        config: of the head.
        dtype: floating dtype of the parameters.

    Returns:
        NumPy arrays in the tree of `vla_head.head_shapes`. They own their memory.

    Raises:
        WeightsError: listing all missing, unexpected and misshapen tensors by name, and those that are not floating
            point.
        TypeError: if ``dtype`` is not floating point.

    >>> config = HeadConfig.tiny()
    >>> head_params_from_names({}, config)
    Traceback (most recent call last):
    ...
    jaxaccel.models.weights.errors.WeightsError: tensors do not fit the configuration; missing: ...
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype is {dtype}, expected floating point")
    found, names, shapes = _stripped(mapping), _names(config), head_shapes(config)
    missing = [name for name in names.values() if name not in found]
    # Written by CogACT's code, but never used by its network.
    unexpected = sorted(set(found) - set(names.values()) - {n for n in found if n.startswith("history_embedder.")})
    wrong: list[str] = []
    integers: list[str] = []
    params: dict[str, Any] = {"blocks": [{} for _ in range(config.depth)]}
    for path, name in names.items():
        if name not in found:
            continue
        value = np.asarray(mapping[found[name]])
        shape: Any = shapes
        target: Any = params
        for part in path:
            shape = shape[part]
        for part in path[:-1]:
            target = target[part]
        if path == ("null",) and value.ndim == 2 and value.shape[0] == 1:
            value = value[0]
        if value.shape != shape:
            wrong.append(f"{name} is {list(value.shape)}, expected {list(shape)}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            integers.append(f"{name} ({value.dtype})")
        else:
            target[path[-1]] = np.array(value, dtype)
    titles = ("missing", "unexpected", "wrong shapes", "not floating point")
    problems = [
        f"{title}: {listed(items)}"
        for title, items in zip(titles, (missing, unexpected, wrong, integers), strict=True)
        if items
    ]
    if problems:
        raise WeightsError("tensors do not fit the configuration; " + "; ".join(problems))
    return params


def load_action_head(
    name_or_path: str | os.PathLike[str],
    *,
    config: HeadConfig | None = None,
    heads: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], HeadConfig]:
    """Load an action head from safetensors on this machine or on the Hugging Face hub.

    Args:
        name_or_path: a ``.safetensors`` file, a folder with one, or a hub id ``"owner/name"``.
        config: use these numbers instead of the file's.
        heads: as for `head_config_from_names`.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; default ``$JAXACCEL_CACHE``, else ``~/.cache/jaxaccel``.
        dtype: floating dtype of the parameters.
        progress: called with name, bytes done and bytes in total while fetching.

    Returns:
        Parameters and configuration.

    Raises:
        WeightsError: for files that are missing, pickled or of another model, tensors that do not fit, or if the hub
            cannot be reached or has no safetensors.

    >>> load_action_head("cogact-base-head.safetensors")[1].depth  # doctest: +SKIP
    12
    """
    text = os.fspath(name_or_path)
    where = pathlib.Path(text).expanduser()
    if where.suffix.lower() in _PICKLED:
        raise WeightsError(
            f"{where}: files of pickled tensors can run code and are not read; convert it to safetensors, "
            "or give a dict of arrays to head_params_from_names"
        )
    if not where.exists():
        if not isinstance(name_or_path, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
            raise WeightsError(f"{text}: no such file or folder, or hub id (owner/name)")
        snapshot = hub_snapshot(text, revision=revision, cache=cache_folder(cache_dir) / "hub", progress=progress)
        assert snapshot is not None
        where = snapshot
    tensors = open_safetensors(where)
    try:
        config = config or head_config_from_names(tensors, heads=heads)
        return head_params_from_names(tensors, config, dtype=dtype), config
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error
