"""Three ways to execute a schedule, compared bit for bit; a script, as XLA's flags are read when JAX starts."""

import pathlib
import sys

import jax
import numpy as np


def main() -> None:
    """Print what was equal, or fail."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    from tests.caching.test_harmonica import EVERYTHING, MIXED, draw, plain, problem

    jax.config.update("jax_platforms", "cpu")
    for schedule in (MIXED, EVERYTHING):
        static, *others = (np.asarray(draw(schedule, how)) for how in ("static", "cond", "reference"))
        for other in others:
            np.testing.assert_array_equal(static, other)
    np.testing.assert_array_equal(static, plain(*problem()))
    print("equal:", static.dtype)


if __name__ == "__main__":
    main()
