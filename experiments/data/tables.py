"""Small real tables that ship with scikit-learn, and larger ones from the hub, split and standardised."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from experiments.data import hub

TaskKind = Literal["regression", "binary", "classes"]


@dataclasses.dataclass(frozen=True)
class HubTable:
    """A table on the Hugging Face hub: numeric columns, one of them the target."""

    path: str
    target: str
    kind: TaskKind
    name: str | None = None  # of the configuration


SHIPPED: dict[str, TaskKind] = {
    "diabetes": "regression",
    "breast_cancer": "binary",
    "wine": "classes",
    "digits": "classes",
    "pixels": "regression",
}
"""442 x 10, 569 x 30, 178 x 13, 1797 x 64, and 17,120 x 24 of `_pixels`."""
HUB: dict[str, HubTable] = {
    "california": HubTable("inria-soda/tabular-benchmark", "MedHouseVal", "regression", "reg_num_houses"),
    "superconductivity": HubTable("inria-soda/tabular-benchmark", "criticaltemp", "regression", "reg_num_superconduct"),
    "magic": HubTable("inria-soda/tabular-benchmark", "class", "binary", "clf_num_MagicTelescope"),
    "covertype": HubTable("inria-soda/tabular-benchmark", "Y", "binary", "clf_num_covertype"),
}
"""Tables of Grinsztajn et al., 2022; needs a network. Names of columns are checked when a table is read."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Standardised rows: features [n, d] f32; targets [n], f32 of unit variance or class numbers i32."""

    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tabular:
    """One random split of a table; means and deviations are those of the training rows."""

    name: str
    kind: TaskKind
    classes: int  # 1 for regression
    train: Split
    validation: Split
    test: Split


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    """Green of every fourth pixel of a photograph each way, and the colours of its eight neighbours."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg").astype(np.float64)
    at = np.stack(np.meshgrid(*(np.arange(1, side - 1, 4) for side in image.shape[:2]), indexing="ij"), -1)
    row, column = at.reshape(-1, 2).T
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return np.concatenate([image[row + i, column + j] for i, j in around], 1), image[row, column, 1]


def read_table(name: str, *, rows: int | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray, TaskKind]:
    """Features, targets and kind of a table; ``options`` go to `hub.load`.

    Raises:
        ValueError: for an unknown name.
        DataError: where the hub's table has no such column.
    """
    if name in SHIPPED:
        from sklearn import datasets

        x, y = _pixels() if name == "pixels" else getattr(datasets, f"load_{name}")(return_X_y=True)
        return x[:rows], y[:rows], SHIPPED[name]
    if name not in HUB:
        raise ValueError(f"unknown table {name!r}, expected one of {', '.join([*SHIPPED, *HUB])}")
    known = HUB[name]

    def example(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if known.target not in row:
            raise hub.DataError(f"table {name!r} has no column {known.target!r}, only {', '.join(row)}")
        features = [float(v) for k, v in row.items() if k != known.target]
        return {"x": np.array(features), "y": np.array(float(row[known.target]))}

    where: dict[str, Any] = {} if known.name is None else {"name": known.name}
    found = hub.take(known.path, "train", example, rows, **(where | options))
    return found["x"], found["y"], known.kind


def split_table(
    name: str,
    seed: int,
    *,
    shares: tuple[float, float] = (0.6, 0.2),
    read: Callable[..., Any] = read_table,
    **options: Any,
) -> Tabular:
    """A random split into training, validation and test rows.

    Raises:
        ValueError: if a part would be empty.
    """
    x, y, kind = read(name, **options)
    order = np.random.default_rng(seed).permutation(len(x))
    cuts = [int(shares[0] * len(x)), int((shares[0] + shares[1]) * len(x))]
    if not 0 < cuts[0] < cuts[1] < len(x):
        raise ValueError(f"shares {shares} leave a part of {len(x)} rows empty")
    parts = np.split(order, cuts)
    train = parts[0]
    deviation = x[train].std(0)
    x = (x - x[train].mean(0)) / np.where(deviation > 0, deviation, 1)  # constant features become 0
    if kind == "regression":
        y, classes = (y - y[train].mean()) / y[train].std(), 1
    else:
        classes = int(y.max()) + 1
    target = np.float32 if kind == "regression" else np.int32
    return Tabular(name, kind, classes, *(Split(x[p].astype(np.float32), y[p].astype(target)) for p in parts))
