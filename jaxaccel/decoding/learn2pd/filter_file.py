"""A trained filter as one safetensors file, with the block length and the threshold that it is meant for.

w1, w2  [b, b]       b1, b2  [b]
metadata: format, version, model, block_length, tau
"""

import os
import pathlib
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxaccel.decoding.arrays_file import array_of, check_floating, read_arrays, write_arrays
from jaxaccel.decoding.learn2pd.filter import FilterParams

FORMAT = "jaxaccel.learn2pd"
VERSION = 1


@dataclass(frozen=True)
class FilterInfo:
    """What a file says about its filter besides numbers.

    Attributes:
        model_name: the model that it was trained on.
        block_length: b, for which alone it serves.
        tau: probability above which a position is final.
    """

    model_name: str
    block_length: int
    tau: float


def _check(params: FilterParams, tau: float) -> None:
    size = params.b1.shape[0] if params.b1.ndim == 1 else 0
    for name, array in params._asdict().items():
        shape = (size, size) if name[0] == "w" else (size,)
        if array.shape != shape or not size:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} for one block length of at least 1")
    if not 0 < tau < 1:
        raise ValueError(f"tau is {tau}, expected a number in (0, 1)")


def save_filter(path: str | os.PathLike[str], params: FilterParams, *, model_name: str, tau: float = 0.96) -> None:
    """Write a filter to a file; what stood there is replaced only once the new file is complete.

    Args:
        path: the file, by custom ``.safetensors``. Its folder is made.
        params: of `train_filter`.
        model_name: the model that it was trained on.
        tau: the threshold to use it with.

    Raises:
        ValueError: if the arrays do not fit together, or ``tau`` is not in (0, 1).
        TypeError: if an array is not floating point.
        OSError: if the file cannot be written.
        ImportError: without the package ``safetensors``.

    >>> import jax, tempfile
    >>> from jaxaccel.decoding.learn2pd import filter_init
    >>> params = filter_init(jax.random.key(0), block_length=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_filter(f"{folder}/filter.safetensors", params, model_name="tiny")
    ...     again, info = load_filter(f"{folder}/filter.safetensors")
    >>> again.w1.shape, info.block_length, info.tau
    ((4, 4), 4, 0.96)
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in params._asdict().items()}
    check_floating(arrays)
    _check(params, tau)
    said = {"model": model_name, "block_length": str(arrays["b1"].size), "tau": repr(float(tau))}
    write_arrays(path, arrays, said, kind=FORMAT, version=VERSION)


def load_filter(path: str | os.PathLike[str]) -> tuple[FilterParams, FilterInfo]:
    """Read what `save_filter` wrote.

    Args:
        path: the file.

    Returns:
        The filter, in the dtype it was saved in, and what is known about it.

    Raises:
        ValueError: naming the file, if it is cut off, corrupt, something else, or of a newer format.
        OSError: if it cannot be read.
        ImportError: without the package ``safetensors``.
    """
    path = pathlib.Path(path)
    entries, said = read_arrays(path, kind=FORMAT, version=VERSION, what="a filter")
    try:
        if set(entries) != set(FilterParams._fields):
            raise ValueError(f"arrays are {', '.join(sorted(entries))}, expected {', '.join(FilterParams._fields)}")
        params = FilterParams(*(jnp.asarray(array_of(name, entries[name])) for name in FilterParams._fields))
        info = FilterInfo(said["model"], int(said["block_length"]), float(said["tau"]))
        _check(params, info.tau)
        if info.block_length != params.b1.size:
            raise ValueError(f"block_length is {info.block_length}, but the arrays are for {params.b1.size}")
    except KeyError as error:
        raise ValueError(f"{path}: corrupt: its metadata lack {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: corrupt: {error}") from error
    return FilterParams(*map(jnp.asarray, params)), info
