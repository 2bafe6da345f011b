"""Programs that run: what is timed really runs every turn, and differences from the equation are seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.prove import TARGETS, Job, Program, find_cases, find_ops
from kernels_pallas.prove.__main__ import main
from kernels_pallas.prove.cases import normals
from kernels_pallas.prove.measuring import differences, find_target, measure, repeated
from kernels_pallas.prove.table import render_measured

X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def program(function, equation=None, **more):
    return lambda shape: Program(function, (X,), flops=0, bytes=0, equation=equation, **more)


def test_every_turn_runs():
    """A compiler that saw that turns are the same would run the callback once."""
    count = []

    def observed(x):
        jax.debug.callback(lambda: count.append(1), ordered=True)
        return 2 * x

    np.testing.assert_array_equal(jax.jit(repeated(observed, 5))(jnp.ones(3)), 2 * jnp.ones(3))
    jax.effects_barrier()
    assert len(count) == 5


def test_turns_are_in_the_compiled_loop():
    """The product stands in the loop's body, and its result is not thrown away."""
    text = jax.jit(repeated(lambda x: x @ x, 7)).lower(X).compile().as_text()
    body = next(part for part in text.split("\n\n") if "dot(" in part or "custom-call" in part)
    assert "ENTRY" not in body


def test_right_and_wrong_programs_are_told_apart():
    right, wrong, broken = measure(
        [
            Job("right", "h100", {}, program(jnp.sin, lambda x: jnp.sin(x))),
            Job("wrong", "h100", {}, program(lambda x: jnp.sin(x) + 0.5, jnp.sin)),
            Job("broken", "h100", {}, program(lambda x: x @ jnp.ones(3), jnp.sin)),
        ],
        repeats=2,
    )
    assert right.error == 0
    assert len(right.seconds) == 2
    assert wrong.error == pytest.approx(0.5, rel=1e-3)  # the largest sine of so many normals is 1 to 3 digits
    assert not broken.seconds
    assert "TypeError" in broken.message
    text = render_measured([right, wrong, broken])
    assert all(words in text for words in ("0.0e+00", "5.0e-01", "FAILED broken"))


@pytest.mark.parametrize(
    ("found", "expected", "answer"),
    [
        ([1.0, jnp.inf], [1.0, jnp.inf], 0),
        ([1.0, jnp.nan], [1.0, 2.0], jnp.inf),
        ([1.0, 2.0], [1.0, jnp.nan], jnp.inf),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([-jnp.inf, 1.0], [jnp.inf, 1.0], jnp.inf),
    ],
)
def test_numbers_that_are_not_finite(found, expected, answer):
    assert differences(jnp.array(found), jnp.array(expected))[0] == answer


def test_results_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        differences(jnp.ones(3), jnp.ones(2))


def test_whole_numbers_must_be_drawn_by_the_case():
    with pytest.raises(ValueError, match="argument 1 has dtype int32"):
        normals(jax.random.key(0), (X, jax.ShapeDtypeStruct((2,), jnp.int32)))


SMALL = {
    "modulated_residual": {"B": 4, "N": 16, "D": 64},
    "node_histogram": {"n": 500, "F": 3, "N": 4, "B": 16},
    "fixed_point_matmul": {"M": 16, "K": 64, "N": 64},
    "lm_head_confidence": {"R": 4, "V": 512, "D": 64},
    "expert_ffn": {"n": 4, "D": 128, "Ne": 8, "de": 32, "active": 3},
    "block_topk_attention": {"B": 2, "S": 512, "N": 4, "K": 2, "H": 128, "blocks": 8},
    "local_linear_attention": {"B": 1, "T": 256, "S": 256, "N": 2, "K": 2, "H": 16},
}


@pytest.mark.parametrize("op", find_ops())
def test_every_case_can_be_drawn_and_has_an_equation(op):
    key = jax.random.key(0)
    for case in find_cases(op):
        if case.family != "gpu":  # draws and equations are the same functions for TPUs
            continue
        shape = case.shape(SMALL[op] | ({"T": 1} if "decode" in case.kernel else {}))
        made = case.build(shape)
        drawn = (made.draw or (lambda key, made=made: normals(key, made.arguments)))(key)
        assert [(a.shape, a.dtype) for a in drawn] == [(a.shape, a.dtype) for a in made.arguments], case.name
        results = jax.tree.leaves(jax.eval_shape(made.equation, *made.arguments))
        own = jax.tree.leaves(jax.eval_shape(made.function, *made.arguments))
        assert [a.shape for a in results] == [a.shape for a in own][: len(results)], case.name


def test_the_equation_of_decoding_is_attention_to_what_is_kept():
    """An equation that reads blocks as the kernel does could share its mistake: once, against a mask."""
    from kernels_pallas.block_topk_attention.reference import masked_attention

    case = next(c for c in find_cases("block_topk_attention") if c.family == "gpu")
    shape = case.shape(SMALL["block_topk_attention"] | {"dtype": "float32"})
    made = case.build(shape)
    q, blocks, length, k, v = made.draw(jax.random.key(1))
    position, size = np.arange(512), shape["block"]
    kept = np.asarray([[np.isin(position // size, row) for row in batch] for batch in np.asarray(blocks)])
    kept |= (position < size) | (position >= 512)  # the sink's page; the tail is empty
    keep = jnp.asarray(np.repeat(kept, 2, 1)[:, :, None])
    np.testing.assert_allclose(made.equation(q, blocks, length, k, v), masked_attention(q, k, v, keep), atol=1e-5)


def test_what_a_device_is():
    assert find_target("NVIDIA H200") is TARGETS["h200"]
    assert find_target("TPU v5 lite") is TARGETS["v5e"]
    assert find_target("cpu") is None


def test_a_machine_without_a_chip_is_refused(capsys):
    assert main(["--measure", "node_histogram"]) == 2
    assert "JAX's first device is a cpu" in capsys.readouterr().err
