"""Shared set-up of the suite: eight CPU devices, a persistent compilation cache, run-time shape checks."""

import gc
import os
import pathlib
import sys

# Before JAX starts: eight virtual devices, so that sharding tests run in the same process as all others; and machine
# code that is not optimised, as most of the suite's time is compilation of small programs, which that halves. XLA's own
# passes over the program, fusion and layouts, stay as they are. JAXACCEL_TEST_OPTIMIZE=3 gives what users run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *filter(None, [os.environ.get("XLA_FLAGS")]),
        "--xla_force_host_platform_device_count=8",
        f"--xla_backend_optimization_level={os.environ.get('JAXACCEL_TEST_OPTIMIZE', '0')}",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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
