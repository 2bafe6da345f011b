"""Shared set-up of the suite: eight CPU devices, a persistent compilation cache, run-time shape checks."""

import gc
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.compiler import xla_flags  # noqa: E402

# Before JAX starts: eight virtual devices, so that sharding tests run in the same process as all others.
os.environ["XLA_FLAGS"] = " ".join(
    [*filter(None, [os.environ.get("XLA_FLAGS")]), "--xla_force_host_platform_device_count=8", xla_flags()]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Every operation carries the lines that called it, which a quarter of tracing's time is spent on.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The TPU and GPU compilers that kernels are proven with: `make compilers` puts them there.
os.environ.setdefault("KERNELS_PALLAS_COMPILERS", str(ROOT / ".compilers"))

from jaxtyping import install_import_hook  # noqa: E402

# jaxtyping's annotations are promises; here they are checked on every call.
install_import_hook(["jaxaccel", "kernels_pallas"], "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAXACCEL_TEST_CACHE", str(ROOT / ".cache" / "jax-tests"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def x64():
    """Run the test with 64-bit floats."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def vectors():
    """Load reference inputs and outputs copied into ``tests/data``: ``vectors("exadam")`` is a mapping of arrays."""

    def load(name: str):
        path = ROOT / "tests" / "data" / f"{name}.npz"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: reference vectors are part of the repository")
        return np.load(path, allow_pickle=False)

    return load


MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_let_go():
    """Forget compiled programs before there are too many of them.

    Each one takes a few mappings of memory. Linux allows a process 65,530, and LLVM crashes where there are no more.
    """
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


# Files whose tests are long and share little: they go to whichever worker is free, and start first.
SPREAD = ("tests/test_notebooks.py", "tests/kernels_pallas/prove/test_ops.py", "tests/experiments/test_experiments.py")
FIRST = (*SPREAD, "tests/experiments/test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest; `--no-loadscope-reorder` keeps them there."""
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests on one worker, which has compiled their programs already."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if file in SPREAD else file

    return ByFile(config, log)
