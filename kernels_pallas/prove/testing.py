"""For test suites: kernels that a compiler refuses, or that spill, fail the test with the prover's table."""

from collections.abc import Sequence

from kernels_pallas.prove.proving import Proof
from kernels_pallas.prove.table import render


def assert_proven(proofs: Sequence[Proof], *, max_spills: int | None = None) -> None:
    """Fail unless every proof was accepted, holds a kernel, and stays within ``max_spills``.

    Args:
        proofs: from `kernels_pallas.prove.prove`.
        max_spills: most spills of a program, stores in the text on TPUs, bytes a thread on GPUs; ``None`` for any.

    Raises:
        AssertionError: with the compiler's message, or the table of what was found.
    """
    if not proofs:
        raise AssertionError("nothing was proven: there are no jobs")
    refused = [proof for proof in proofs if not proof.accepted]
    if refused:
        raise AssertionError(f"{len(refused)} of {len(proofs)} programs were refused\n" + render(refused))
    empty = [proof for proof in proofs if not proof.kernels]
    if empty:
        raise AssertionError("no kernel was found in the compiled program of\n" + render(empty))
    spilling = [proof for proof in proofs if max_spills is not None and proof.spills > max_spills]
    if spilling:
        raise AssertionError(f"expected at most {max_spills} spills\n" + render(spilling))
