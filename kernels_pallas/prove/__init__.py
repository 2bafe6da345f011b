"""Prove that a Pallas kernel compiles for TPUs and GPUs that you do not have, and see what it would cost there.

Interpret mode checks a kernel's arithmetic and nothing else: blocks that overflow VMEM, layouts that the hardware has
not, or a floor division of traced integers pass it and are refused by the real compiler. The real compilers run on any
Linux machine: libtpu compiles for every TPU, the CUDA plugin and ptxas for every GPU, without the chip, driver or
toolkit. This package feeds them, and reads what they dump: memory used against the limit, spills, the scheduled cycles
of every loop (TPU), registers and instructions (GPU), beside the chip's roofline and a peer's kernel.

From a shell::

    python -m kernels_pallas.prove --install                # the compilers, once
    python -m kernels_pallas.prove local_linear_attention --target v5e --compare flash_attention

In Python, for a kernel of your own (`double_rows` stands for any function with a ``pallas_call`` in it)::

    jobs = [Job("double_rows", target, {"rows": 1024}, build_double_rows) for target in ("v5e", "h100")]
    print(render(prove(jobs)))

What is proven: that the compiler accepts the kernel at that shape, with that much memory and that many spills. What is
estimated: every time. A schedule knows no waiting for memory, a roofline no latency; tables mark estimates by a star.
"""

from kernels_pallas.prove.cases import Case, Program, find_cases, find_ops
from kernels_pallas.prove.compilers import CompilerMissingError
from kernels_pallas.prove.proving import Job, Proof, jobs_of, prove
from kernels_pallas.prove.table import render
from kernels_pallas.prove.targets import TARGETS, GpuTarget, TpuTarget, get_target
from kernels_pallas.prove.testing import assert_proven

__all__ = [
    "TARGETS",
    "Case",
    "CompilerMissingError",
    "GpuTarget",
    "Job",
    "Program",
    "Proof",
    "TpuTarget",
    "assert_proven",
    "find_cases",
    "find_ops",
    "get_target",
    "jobs_of",
    "prove",
    "render",
]
