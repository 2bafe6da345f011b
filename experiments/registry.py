"""The experiments by name. Modules are imported only when they are asked for, so that the command line starts fast."""

import difflib
import importlib

from experiments.runner.api import Experiment
from jaxaccel.catalogue import METHODS


class UnknownExperimentError(ValueError):
    """No experiment has this name."""


def names() -> tuple[str, ...]:
    """Names of all experiments, in the order of the catalogue."""
    return tuple(name for method in METHODS if method.status == "done" for name in method.experiments)


def get(name: str) -> Experiment:
    """The experiment called ``name``, which lives in the module ``experiments.<name>``.

    Raises:
        UnknownExperimentError: naming the nearest existing one.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise UnknownExperimentError(f"unknown experiment {name!r}; {hint}")
    experiment: Experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    return experiment
