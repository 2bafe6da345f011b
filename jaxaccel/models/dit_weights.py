"""Real weights for `dit`: files by the names of diffusers, or of the published code.

Matrices stay ``[out, in]``; the convolution over patches becomes a matrix over their pixels. diffusers has a copy of
the time and label networks in each block, which must be equal. Fixed positions in a file must be those of the model.

Time steps are described as the published code does, by frequencies 10000^(−k/128): the models are trained with them.
diffusers divides k by 127 (``downscale_freq_shift=1``), so its samples differ slightly.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxaccel.models.dit_blocks import grid_positions
from jaxaccel.models.dit_config import SIZES, DiTConfig, dit_shapes
from jaxaccel.models.weights.downloads import Progress
from jaxaccel.models.weights.errors import WeightsError, listed, read_json
from jaxaccel.models.weights.hub import hub_snapshot
from jaxaccel.models.weights.safetensors_files import INDEX, open_safetensors
from jaxaccel.models.weights.sources import cache_folder

KNOWN_DITS = {"dit-xl-2-256": "facebook/DiT-XL-2-256", "dit-xl-2-512": "facebook/DiT-XL-2-512"}
"""Short names of models on the Hugging Face hub."""

# Where a parameter lies in a file, without ``.weight`` or ``.bias``.
_TOP: dict[str, dict[str, str]] = {
    "torch": {
        "patch": "x_embedder.proj", "time_in": "t_embedder.mlp.0", "time_out": "t_embedder.mlp.2",
        "labels": "y_embedder.embedding_table", "final_modulation": "final_layer.adaLN_modulation.1",
        "final": "final_layer.linear",
    },
    "diffusers": {"patch": "pos_embed.proj", "final_modulation": "proj_out_1", "final": "proj_out_2"},
}  # fmt: skip
_COPIED = {  # diffusers: in every block
    "time_in": "norm1.emb.timestep_embedder.linear_1", "time_out": "norm1.emb.timestep_embedder.linear_2",
    "labels": "norm1.emb.class_embedder.embedding_table",
}  # fmt: skip
_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": {
        "modulation": ("adaLN_modulation.1",), "qkv": ("attn.qkv",), "out": ("attn.proj",), "up": ("mlp.fc1",),
        "down": ("mlp.fc2",),
    },
    "diffusers": {
        "modulation": ("norm1.linear",), "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "out": ("attn1.to_out.0",),
        "up": ("ff.net.0.proj",), "down": ("ff.net.2",),
    },
}  # fmt: skip
_PREFIX = {"torch": "blocks.", "diffusers": "transformer_blocks."}
_POSITIONS = ("pos_embed", "pos_embed.pos_embed")


@dataclasses.dataclass(frozen=True)
class PretrainedDiT:
    """A diffusion transformer that was loaded."""

    params: dict[str, Any] = dataclasses.field(repr=False)
    """NumPy arrays in the tree of `dit_config.dit_shapes`."""
    config: DiTConfig
    """Its numbers."""
    origin: pathlib.Path
    """The file or folder it was read from."""


def _family(names: Mapping[str, Any]) -> str:
    return "diffusers" if any(name.startswith(_PREFIX["diffusers"]) for name in names) else "torch"


def _sources(config: DiTConfig, family: str) -> dict[tuple[Any, ...], tuple[list[str], bool]]:
    """For each parameter, by its path in the tree: names in the file, and whether they are copies (else: row parts)."""
    plan: dict[tuple[Any, ...], tuple[list[str], bool]] = {}

    def add(path: tuple[Any, ...], names: list[str], copies: bool = False) -> None:
        plan[path] = ([f"{name}.weight" for name in names], copies)
        if path[-1] != "labels":
            plan[(*path[:-1], f"{path[-1]}_bias")] = ([f"{name}.bias" for name in names], copies)

    for name, file in _TOP[family].items():
        add((name,), [file])
    prefix = _PREFIX[family]
    if family == "diffusers":
        for name, file in _COPIED.items():
            add((name,), [f"{prefix}{b}.{file}" for b in range(config.depth)], copies=True)
    for b in range(config.depth):
        for name, files in _LAYER[family].items():
            add(("blocks", b, name), [f"{prefix}{b}.{file}" for file in files])
    return plan


def _file_shape(path: tuple[Any, ...], shape: tuple[int, ...], parts: int, config: DiTConfig) -> tuple[int, ...]:
    if path == ("patch",):
        return (config.width, config.channels, config.patch, config.patch)
    return (shape[0] // parts, *shape[1:])


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def dit_file_shapes(config: DiTConfig, *, family: str = "torch") -> dict[str, tuple[int, ...]]:
    """Tensors that a file of a model has, and their shapes; without the fixed positions.

    Args:
        config: the model's numbers.
        family: ``"torch"``, the published code's names, or ``"diffusers"``.

    Raises:
        ValueError: for another family.

    >>> dit_file_shapes(DiTConfig.preset("XL/2"))["x_embedder.proj.weight"]
    (1152, 4, 2, 2)
    """
    if family not in _PREFIX:
        raise ValueError(f"family is {family!r}, expected torch or diffusers")
    shapes = dit_shapes(config)
    return {
        name: _file_shape(path, _at(shapes, path), 1 if copies else len(names), config)
        for path, (names, copies) in _sources(config, family).items()
        for name in names
    }


def dit_params_from_names(mapping: Mapping[str, Any], config: DiTConfig, *, dtype: Any = np.float32) -> dict[str, Any]:
    """Turn tensors by their names in files into the tree of parameters.

    Args:
        mapping: NumPy arrays, or what ``np.asarray`` takes, by the names of diffusers or of the published code.
        config: the model's numbers.
        dtype: floating dtype of the parameters.

    Returns:
        NumPy arrays in the tree of `dit_config.dit_shapes`. They own their memory.

    Raises:
        WeightsError: listing all missing, unexpected and misshapen tensors by name, those that are not floating point,
            copies that differ, or positions that are not the fixed ones.
        TypeError: if ``dtype`` is not floating point.

    >>> tensors = {name: np.zeros(shape) for name, shape in dit_file_shapes(DiTConfig.tiny()).items()}
    >>> dit_params_from_names(tensors, DiTConfig.tiny())["patch"].shape
    (32, 4)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype is {dtype}, expected floating point")
    family = _family(mapping)
    plan, shapes = _sources(config, family), dit_file_shapes(config, family=family)
    missing = [name for name in shapes if name not in mapping]
    unexpected = sorted(set(mapping) - set(shapes) - set(_POSITIONS))
    problems = [f"missing: {listed(missing)}"] if missing else []
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    bad_shapes, integers, differing = [], [], []
    params: dict[str, Any] = {"blocks": [{} for _ in range(config.depth)]}
    for path, (names, copies) in plan.items():
        target, values = _at(params, path[:-1]), []
        for name in names:
            if name not in mapping:
                continue
            value = np.asarray(mapping[name])
            if value.shape != shapes[name]:
                bad_shapes.append(f"{name} is {list(value.shape)}, expected {list(shapes[name])}")
            elif not jnp.issubdtype(value.dtype, jnp.floating):
                integers.append(f"{name} ({value.dtype})")
            else:
                values.append(value)
        if len(values) < len(names):
            continue
        if copies:
            differing += [
                f"{name} differs from {names[0]}"
                for name, value in zip(names, values, strict=True)
                if not np.array_equal(value, values[0])
            ]
            values = values[:1]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        if path == ("patch",):
            whole = whole.transpose(0, 2, 3, 1).reshape(config.width, -1)
        target[path[-1]] = np.array(whole, dtype)  # a copy: a view would keep a mapped file alive
    for title, found in (("wrong shapes", bad_shapes), ("not floating point", integers), ("copies", differing)):
        if found:
            problems.append(f"{title}: {listed(found)}")
    fixed = grid_positions(config.image_size // config.patch, config.width)
    for name in _POSITIONS:
        if name in mapping and not problems:
            value = np.asarray(mapping[name], np.float64).reshape(-1, np.shape(mapping[name])[-1])
            # Files in half precision round to 8 bits or more.
            if value.shape != fixed.shape or np.abs(value - fixed).max() > 4e-3:
                problems.append(f"{name} is not the fixed sines and cosines of {fixed.shape[0]} patches")
    if problems:
        raise WeightsError("tensors do not fit the configuration; " + "; ".join(problems))
    return params


def dit_config_from_diffusers(settings: Mapping[str, Any]) -> DiTConfig:
    """The numbers in a ``config.json`` of diffusers' transformer.

    Args:
        settings: its content.

    Returns:
        The configuration.

    Raises:
        WeightsError: naming what is missing, or a setting of another architecture.

    >>> sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
    >>> dit_config_from_diffusers(sizes | {"in_channels": 4, "out_channels": 8}) == DiTConfig.preset("XL/2")
    True
    """
    fixed = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero"}
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise WeightsError(f"{name} is {settings[name]!r}, expected {value!r}: this is another architecture")
    needed = ("num_attention_heads", "attention_head_dim", "num_layers", "sample_size")
    missing = [name for name in needed if settings.get(name) is None]
    if missing:
        raise WeightsError(f"the configuration lacks {listed(missing)}")
    channels = settings.get("in_channels") or 4
    out = settings.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise WeightsError(f"out_channels is {out}, expected {channels}, or {2 * channels} with variances")
    try:
        return DiTConfig(
            width=settings["num_attention_heads"] * settings["attention_head_dim"],
            depth=settings["num_layers"],
            heads=settings["num_attention_heads"],
            patch=settings.get("patch_size") or 2,
            image_size=settings["sample_size"],
            channels=channels,
            num_classes=settings.get("num_embeds_ada_norm") or 1000,
            learn_sigma=out != channels,
        )
    except (ValueError, TypeError) as error:
        raise WeightsError(f"the configuration does not fit together: {error}") from error


def dit_config_from_names(mapping: Mapping[str, Any], *, heads: int | None = None) -> DiTConfig:
    """The numbers that a file of the published code's names has by its shapes.

    Args:
        mapping: tensors by name, ``pos_embed`` among them.
        heads: of attention, which shapes do not say; known for the published widths and depths.

    Returns:
        The configuration.

    Raises:
        WeightsError: naming what is missing, or asking for ``heads``.
    """
    names = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    missing = [name for name in (*names, "blocks.0.mlp.fc1.weight") if name not in mapping]
    if missing:
        raise WeightsError(f"no DiT by the names of the published code; missing: {listed(missing)}")
    positions, convolution, labels, final = (np.shape(mapping[name]) for name in names)
    depth = 1 + max(int(found[1]) for name in mapping if (found := re.match(r"blocks\.(\d+)\.", name)))
    width, channels, patch = convolution[:3]
    if heads is None:
        heads = {(w, d): h for w, d, h in SIZES.values()}.get((width, depth))
        if heads is None:
            raise WeightsError(f"shapes do not say how many heads {depth} blocks of width {width} have; pass heads")
    try:
        return DiTConfig(
            width=width, depth=depth, heads=heads, patch=patch, image_size=round(positions[-2] ** 0.5) * patch,
            channels=channels, num_classes=labels[0] - 1,
            mlp_ratio=np.shape(mapping["blocks.0.mlp.fc1.weight"])[0] // width,
            learn_sigma=final[0] == 2 * channels * patch**2,
        )  # fmt: skip
    except ValueError as error:
        raise WeightsError(f"shapes do not fit together: {error}") from error


def _open(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    index = path / f"diffusion_pytorch_{INDEX}"
    return open_safetensors(index if index.is_file() else path)


def dit_from_safetensors(
    path: str | os.PathLike[str],
    *,
    config: DiTConfig | None = None,
    heads: int | None = None,
    dtype: Any = np.float32,
) -> PretrainedDiT:
    """Load a diffusion transformer from files on this machine.

    Args:
        path: a ``.safetensors`` file; a folder with one and, by diffusers' names, a ``config.json``; or a folder of a
            whole pipeline, whose ``transformer`` is read.
        config: use these numbers instead of the file's.
        heads: of attention, for files of the published code's names in another than a published size.
        dtype: floating dtype of the parameters.

    Returns:
        Parameters, configuration, and where they came from.

    Raises:
        WeightsError: for files that are missing, corrupt, pickled or of another model, tensors that do not fit.

    >>> dit_from_safetensors("DiT-XL-2-256").config.depth  # doctest: +SKIP
    28
    """
    where = pathlib.Path(path).expanduser()
    if where.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise WeightsError(
            f"{where}: files of pickled tensors can run code and are not read; convert it to safetensors, "
            "or give a dict of arrays to dit_params_from_names"
        )
    if not where.exists():
        raise WeightsError(f"{where}: no such file or folder")
    if (where / "transformer").is_dir():
        where = where / "transformer"
    tensors = _open(where)
    try:
        if config is None and _family(tensors) == "diffusers":
            config = dit_config_from_diffusers(read_json((where if where.is_dir() else where.parent) / "config.json"))
        elif config is None:
            config = dit_config_from_names(tensors, heads=heads)
        return PretrainedDiT(dit_params_from_names(tensors, config, dtype=dtype), config, where)
    except WeightsError as error:
        if str(where) in str(error):
            raise
        raise WeightsError(f"{where}: {error}") from error


def load_dit(
    name_or_path: str | os.PathLike[str],
    *,
    config: DiTConfig | None = None,
    heads: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
) -> PretrainedDiT:
    """Load a diffusion transformer by name, hub id or path.

    Args:
        name_or_path: a path, as for `dit_from_safetensors`; a short name of `KNOWN_DITS`; or a hub id ``"owner/name"``
            of a pipeline of diffusers. Of the pipeline only the transformer is fetched.
        config: use these numbers instead of the file's.
        heads: as for `dit_from_safetensors`.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; default ``$JAXACCEL_CACHE``, else ``~/.cache/jaxaccel``.
        dtype: floating dtype of the parameters.
        progress: called with name, bytes done and bytes in total while fetching.

    Returns:
        Parameters, configuration, and where they came from.

    Raises:
        WeightsError: as `dit_from_safetensors`, for an unknown name, or if the hub cannot be reached or has no
            safetensors of the model.
        ImportError: without the package ``huggingface_hub``, where the hub is asked.

    >>> load_dit("facebook/DiT-XL-2-256").config.num_parameters  # doctest: +SKIP
    675129632
    """
    text = os.fspath(name_or_path)
    if pathlib.Path(text).expanduser().exists():
        return dit_from_safetensors(text, config=config, heads=heads, dtype=dtype)
    repository = KNOWN_DITS.get(text, text)
    if not isinstance(name_or_path, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise WeightsError(f"{text}: no such file or folder, hub id (owner/name) or one of {', '.join(KNOWN_DITS)}")
    folder = hub_snapshot(
        repository, revision=revision, cache=cache_folder(cache_dir) / "hub", progress=progress, subfolder="transformer"
    )
    assert folder is not None
    return dit_from_safetensors(folder, config=config, heads=heads, dtype=dtype)
