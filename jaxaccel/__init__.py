"""jaxaccel: published ways to make training and inference cheaper, as JAX functions that compose.

Each family of methods is a subpackage, loaded when it is first used:

- `jaxaccel.optim`: optimizers and schedules as optax transforms.
- `jaxaccel.attention`: attention that costs less per token, or learns more from the same context.
- `jaxaccel.moe`: mixtures of experts that decoding reads little of.
- `jaxaccel.boosting`: models that grow by steps, each fitted to what the last ones left.
- `jaxaccel.decoding`: text as one compiled loop, and more than one token from each forward pass.
- `jaxaccel.caching`: keep less of what a model remembers between steps.
- `jaxaccel.compression`: weights and models that take less.
- `jaxaccel.posttraining`: losses and adapters of what comes after pretraining.
- `jaxaccel.forecasting`: what a computation will cost, and what it will give, before it is paid for.
- `jaxaccel.robustness`: attacks, and training against them.
- `jaxaccel.diffusion`: noise schedules, DDIM and guidance, which methods on diffusion models share.
- `jaxaccel.models`: reference networks that the methods are shown on.
- `jaxaccel.catalogue`: the list of methods, their papers and their state.
- `jaxaccel.records`: the store of measured comparisons.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "attention",
    "boosting",
    "caching",
    "catalogue",
    "compression",
    "decoding",
    "diffusion",
    "forecasting",
    "models",
    "moe",
    "optim",
    "posttraining",
    "records",
    "robustness",
]


def __getattr__(name: str) -> ModuleType:
    """Load a subpackage when it is first used, so that importing the library stays cheap."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
