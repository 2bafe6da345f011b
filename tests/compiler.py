"""How XLA compiles in the suite: most of its time is compilation of small programs, so these settings make that cheap.

Machine code is not optimised, loops are emitted by XLA's older and faster emitters, and a program is not split to be
compiled by several threads, as both cores are busy with tests. XLA's own passes over the program, fusion and layouts,
stay as they are. ``JAXACCEL_TEST_OPTIMIZE=3`` gives what users run.
"""

import os


def xla_flags(level: str = "0") -> str:
    """Flags of XLA; ``level`` is that of machine code where the environment names none."""
    level = os.environ.get("JAXACCEL_TEST_OPTIMIZE", level)
    flags = [f"--xla_backend_optimization_level={level}"]
    if level == "0":
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    return " ".join(flags)
