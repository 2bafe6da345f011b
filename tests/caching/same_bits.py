"""Three ways to execute a schedule, compared bit for bit; a script, as XLA's flags are read when JAX starts."""

import pathlib
import sys

import jax
import numpy as np


def main() -> None:
    """Print what was equal, or fail."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    from tests.caching import test_dit_sampling, test_harmonica

    jax.config.update("jax_platforms", "cpu")
    for module in (test_harmonica, test_dit_sampling):
        for schedule in (module.MIXED, module.EVERYTHING):
            static, *others = (np.asarray(module.draw(schedule, how)) for how in ("static", "cond", "reference"))
            for other in others:
                np.testing.assert_array_equal(static, other)
        np.testing.assert_array_equal(static, module.plain(*module.problem()))
        print("equal:", static.dtype)


if __name__ == "__main__":
    main()
