"""Trained Medusa heads as one file: their arrays, and the tree of guesses that was chosen for them.

Heads without a tree are half of what was trained: the tree is picked by the heads' accuracies (`build_tree`), and the
guess costs what its nodes cost. So a file holds both. It is a safetensors file, which is numbers and a table of names,
and never runs code:

    weight  [heads, layers, D, D]
    bias    [heads, layers, D]
    vocab   [heads, V, D]              only where heads do not share the model's output matrix
    token_ids  int32 [V]               only where heads guess among V tokens instead of the whole vocabulary
    metadata: format, version, model, hidden_size, top_k, tree_paths (JSON: a list of lists of ranks)

A file appears under its name complete, or not at all.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxaccel.decoding.arrays_file import FLOATS, array_of, check_floating, read_arrays, write_arrays
from jaxaccel.decoding.medusa import MedusaParams
from jaxaccel.decoding.tree import TreeBuffers, make_tree

FORMAT = "jaxaccel.medusa"
VERSION = 1


@dataclass(frozen=True)
class HeadsInfo:
    """What a file says about its heads besides numbers.

    Attributes:
        model_name: the model that they were trained on.
        hidden_size: D of that model.
        version: of the file's format.
        token_ids: the tokens that the heads guess among; ``None`` for the whole vocabulary.
    """

    model_name: str
    hidden_size: int
    version: int = VERSION
    token_ids: Int[np.ndarray, "V"] | None = field(default=None, compare=False, repr=False)  # int32


def _check(heads: Mapping[str, Any], hidden: int, tree: TreeBuffers) -> None:
    """Raise unless arrays fit together, and the tree fits the heads."""
    weight, bias, vocab = (heads.get(name) for name in MedusaParams._fields)
    if weight is None or bias is None:
        raise ValueError(f"heads must have weight and bias, got {', '.join(sorted(heads)) or 'nothing'}")
    if weight.ndim != 4 or weight.shape[2:] != (hidden, hidden) or 0 in weight.shape:
        raise ValueError(f"weight must have shape (heads, layers, {hidden}, {hidden}), got {weight.shape}")
    if bias.shape != weight.shape[:3]:
        raise ValueError(f"bias must have shape {weight.shape[:3]} like the weight, got {bias.shape}")
    if vocab is not None and (vocab.ndim != 3 or vocab.shape[::2] != (weight.shape[0], hidden) or 0 in vocab.shape):
        raise ValueError(f"vocab must have shape ({weight.shape[0]}, V, {hidden}), got {vocab.shape}")
    ids = heads.get("token_ids")
    if ids is not None:
        if ids.ndim != 1 or not ids.size or ids.min() < 0:
            raise ValueError(f"token_ids must be a list of ids >= 0, got shape {ids.shape} and {ids.ravel()[:5]}")
        if vocab is not None and vocab.shape[1] != ids.size:
            raise ValueError(f"token_ids must have a token for each of vocab's {vocab.shape[1]} rows, got {ids.size}")
        if tree.top_k > ids.size:
            raise ValueError(f"token_ids must hold at least the tree's top_k = {tree.top_k} tokens, got {ids.size}")
    if tree.max_depth > weight.shape[0]:
        raise ValueError(f"the tree guesses {tree.max_depth} tokens ahead, but there are only {weight.shape[0]} heads")


def save_heads(
    path: str | os.PathLike[str],
    heads: MedusaParams,
    tree_paths: Sequence[Sequence[int]],
    *,
    model_name: str,
    top_k: int = 10,
    token_ids: Sequence[int] | Int[np.ndarray, "V"] | Int[jax.Array, "V"] | None = None,
) -> None:
    """Write heads and their tree to a file; what stood there is replaced only once the new file is complete.

    Args:
        path: the file, by custom ``.safetensors``. Its folder is made.
        heads: trained parameters, in any floating dtype.
        tree_paths: of `build_tree`.
        model_name: the model that they were trained on.
        top_k: as for `make_tree`; ranks must be below it.
        token_ids: the tokens that the heads guess among; the whole vocabulary if ``None``.

    Raises:
        ValueError: if the arrays do not fit together, the paths are no tree, or it is deeper than there are heads.
        TypeError: if an array is not of float16, bfloat16, float32 or float64, or ids are not whole numbers.
        OSError: if the file cannot be written.
        ImportError: without the package ``safetensors``.

    >>> import jax, tempfile
    >>> from jaxaccel.decoding import init_medusa_heads
    >>> heads = init_medusa_heads(jax.random.key(0), 8, 32, share_vocab=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_heads(f"{folder}/heads.safetensors", heads, [(0,), (0, 0)], model_name="tiny")
    ...     again, tree, info = load_heads(f"{folder}/heads.safetensors")
    >>> again.weight.shape, again.vocab, tree.num_nodes, info.model_name
    ((3, 1, 8, 8), None, 3, 'tiny')
    """
    tree = make_tree(tree_paths, top_k)
    arrays = {name: np.ascontiguousarray(array) for name, array in heads._asdict().items() if array is not None}
    check_floating(arrays)
    if token_ids is not None:
        ids = np.asarray(token_ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"token_ids must be whole numbers, got {ids.dtype}")
        arrays["token_ids"] = np.ascontiguousarray(ids, np.int32)
    hidden = arrays["weight"].shape[-1] if arrays["weight"].ndim else 0
    _check(arrays, hidden, tree)
    said = {
        "model": model_name,
        "hidden_size": str(hidden),
        "top_k": str(tree.top_k),
        "tree_paths": json.dumps(tree.paths),
    }
    write_arrays(path, arrays, said, kind=FORMAT, version=VERSION)


def load_heads(path: str | os.PathLike[str]) -> tuple[MedusaParams, TreeBuffers, HeadsInfo]:
    """Read what `save_heads` wrote.

    Args:
        path: the file.

    Returns:
        The heads, in the dtypes they were saved in; their tree; and what is known about them.

    Raises:
        ValueError: naming the file, if it is cut off, corrupt, something else, or of a newer format.
        OSError: if it cannot be read.
        ImportError: without the package ``safetensors``.

    >>> heads, tree, info = load_heads("smollm2-135m-heads.safetensors")  # doctest: +SKIP
    >>> info.model_name, tree.num_nodes  # doctest: +SKIP
    ('smollm2-135m', 9)
    """
    path = pathlib.Path(path)
    entries, said = read_arrays(path, kind=FORMAT, version=VERSION, what="Medusa heads")
    try:
        tree = make_tree(_paths(said["tree_paths"]), int(said["top_k"]))
        arrays = {
            name: array_of(name, entry, {"I32": np.int32} if name == "token_ids" else FLOATS)
            for name, entry in entries.items()
        }
        unknown = sorted(set(arrays) - {*MedusaParams._fields, "token_ids"})
        if unknown:
            raise ValueError(f"unknown arrays {', '.join(unknown)}")
        hidden = int(said["hidden_size"])
        _check(arrays, hidden, tree)
        info = HeadsInfo(said["model"], hidden, token_ids=arrays.get("token_ids"))
    except KeyError as error:
        raise ValueError(f"{path}: corrupt: its metadata lack {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: corrupt: {error}") from error
    heads = (jnp.asarray(arrays[name]) if name in arrays else None for name in MedusaParams._fields)
    return MedusaParams(*heads), tree, info  # type: ignore[arg-type]  # only vocab may be None: _check


def _paths(text: str) -> list[list[int]]:
    paths = json.loads(text)
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise ValueError(f"tree_paths must be a list of lists, got {text[:100]}")
    if not all(type(rank) is int for path in paths for rank in path):
        raise ValueError(f"tree_paths must hold whole numbers, got {text[:100]}")
    return paths
