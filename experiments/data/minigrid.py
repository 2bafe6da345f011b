"""MiniGrid's environments as tables of categories; the packages minigrid and gymnasium are needed, and are optional."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.data.hub import DataError

OBJECTS, COLOURS, STATES, VIEW, MISSIONS = 11, 6, 4, 7, 64
CATEGORIES = (*[OBJECTS * COLOURS * STATES] * (VIEW * VIEW), 4, MISSIONS)
"""Codes of each column: cells, direction, mission."""


def make(name: str, count: int) -> Any:
    """``count`` environments side by side.

    Raises:
        DataError: if the packages are missing or know no such environment.
    """
    missing = [package for package in ("gymnasium", "minigrid") if importlib.util.find_spec(package) is None]
    if missing:
        raise DataError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    importlib.import_module("minigrid")
    gymnasium: Any = importlib.import_module("gymnasium")
    try:
        return gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        raise DataError(f"{name}: {error}") from None


def encoder() -> Callable[[Any], np.ndarray]:
    """A function from observations to codes ``[N, 51]``: each cell's object, colour and state as one category.

    Missions are strings; each new one gets the next number.
    """
    numbers: dict[str, int] = {}

    def encode(observed: Any) -> np.ndarray:
        if isinstance(observed, np.ndarray) and observed.dtype == object:  # last observations of finished episodes
            parts = list(observed)
            observed = {name: [part[name] for part in parts] for name in ("image", "direction", "mission")}
        missing = [name for name in ("image", "direction", "mission") if name not in observed]
        if missing:
            raise DataError(f"an observation lacks {', '.join(missing)}, expected image, direction and mission")
        image = np.asarray(observed["image"])
        if image.ndim != 4 or image.shape[1:] != (VIEW, VIEW, 3):
            raise DataError(f"images have shape {image.shape}, expected [N, {VIEW}, {VIEW}, 3]")
        cells = (image[..., 0].astype(int) * COLOURS + image[..., 1]) * STATES + image[..., 2]
        missions = [numbers.setdefault(str(mission), len(numbers)) for mission in observed["mission"]]
        if len(numbers) > MISSIONS:
            raise DataError(f"there are more than {MISSIONS} missions, the last is {list(numbers)[-1]!r}")
        rest = np.stack([np.asarray(observed["direction"]), missions], 1)
        return np.concatenate([cells.reshape(len(image), -1), rest], 1).astype(np.float32)

    return encode
