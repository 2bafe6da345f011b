"""Fits xgboost in an interpreter that has it: ``python trees_xgboost.py ROWS.npz FOUND.npz PARAMETERS``.

It imports nothing of this repository, so that any environment can run it. A fit of a few rows warms the library up.
"""

import importlib
import json
import sys
import time
from typing import Any

import numpy as np


def main(source: str, target: str, parameters: str) -> None:
    """Read rows, fit, predict, and write seconds and predictions."""
    xgboost: Any = importlib.import_module("xgboost")
    options = json.loads(parameters)
    with np.load(source) as rows:
        x, y, test_x, stops, repeats = (rows[name] for name in ("x", "y", "test_x", "stops", "repeats"))
    regression = options["objective"].startswith("reg")
    make = xgboost.XGBRegressor if regression else xgboost.XGBClassifier
    classes = 2 if regression else int(y.max()) + 1
    make(**options | {"n_estimators": 2}).fit(x[: 2 * classes], np.arange(2 * classes) % classes)
    began = time.perf_counter()
    model = make(**options).fit(x, y)
    fit_s = time.perf_counter() - began
    predict = model.predict if regression else model.predict_proba
    seconds = []
    for _ in range(int(repeats)):
        began = time.perf_counter()
        prediction = predict(test_x)
        seconds.append(time.perf_counter() - began)
    staged = [predict(test_x, iteration_range=(0, int(stop))) for stop in stops]
    np.savez(target, fit_s=fit_s, predict_s=np.median(seconds), prediction=prediction, staged=np.array(staged))


if __name__ == "__main__":
    main(*sys.argv[1:])
