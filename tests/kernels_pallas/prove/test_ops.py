"""Every kernel of this package is accepted by the real compiler of every chip that it is made for."""

import pytest

from kernels_pallas.prove import assert_proven, find_cases, find_ops, jobs_of, prove
from kernels_pallas.prove.llo import Schedule


@pytest.mark.slow
@pytest.mark.parametrize("op", find_ops())
def test_the_compilers_accept_every_kernel(op):
    proofs = prove(jobs_of(find_cases(op)))
    assert_proven(proofs)
    for proof in proofs:
        unknown = [k.kernel for k in proof.kernels if isinstance(k, Schedule) and k.cycles is None]
        assert not unknown, f"{proof.job.name} on {proof.job.target}: no trip counts for the loops of {unknown}"


def test_every_op_is_proven_for_both_families():
    assert set(find_ops()) == {
        "local_linear_attention",
        "block_topk_attention",
        "expert_ffn",
        "lm_head_confidence",
        "modulated_residual",
        "node_histogram",
        "fixed_point_matmul",
    }
    for op in find_ops():
        assert {case.family for case in find_cases(op)} == {"tpu", "gpu"}
