"""Programs as data: text, checks, hashes, liveness; against the reference's programs and as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaccel.optim import symbolic
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, LION_PROGRAM, Program, ProgramError, Statement


def text(*lines, returned="u, m, v"):
    return "\n".join(["def train(w, g, m, v, lr):", *lines, f"return {returned}"])


def names(vectors):
    return [str(name) for name in vectors("lion")["program/names"]]


def test_outputs_counts_and_validity_of_the_reference(vectors):
    data = vectors("lion")
    inputs = [jnp.asarray(data[f"program/{k}"]) for k in ("w", "g", "m", "v", "lr")]
    for name in names(vectors):
        source = str(data[f"program/{name}/text"])
        if not data[f"program/{name}/valid"]:
            with pytest.raises(ProgramError, match="unknown variable 'nope'"):
                symbolic.parse(source)
            continue
        program = symbolic.parse(source)
        symbolic.validate(program, inputs[0])
        assert len(program) == data[f"program/{name}/n_statements"]
        live = symbolic.live_statements(program)
        assert len(live) == data[f"program/{name}/n_live"] == len(symbolic.simplify(program))
        for i, out in enumerate(symbolic.execute(program, *inputs)):
            want = data[f"program/{name}/out{i}"]
            np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)  # float32, a few roundings of numbers below 1
            np.testing.assert_array_equal(np.sign(out), np.sign(want))


def test_hashes_split_programs_as_the_reference_does(vectors):
    data = vectors("lion")
    classes = {}
    for name, number in zip(names(vectors), data["program/equiv_class"], strict=True):
        if number >= 0:
            program = symbolic.parse(str(data[f"program/{name}/text"]))
            classes.setdefault(int(number), set()).add(symbolic.program_hash(program))
    assert all(len(hashes) == 1 for hashes in classes.values())
    assert len(set.union(*classes.values())) == len(classes)


def test_the_two_programs_are_the_references(vectors):
    data = vectors("lion")
    for program, name in ((ADAMW_PROGRAM, "adamw_no_bc"), (LION_PROGRAM, "lion")):
        assert symbolic.program_hash(program) == symbolic.program_hash(
            symbolic.parse(str(data[f"program/{name}/text"]))
        )


def test_there_are_45_functions():
    assert len(symbolic.FUNCTIONS) == 45


X = np.array([-2.5, -0.5, 0.3, 1.7])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cbrt", np.cbrt(X)),
        ("log", np.log(np.abs(X))),
        ("log10", np.log10(np.abs(X))),
        ("log2", np.log2(np.abs(X))),
        ("log1p", np.log(np.abs(1 + X))),
        ("sqrt", np.sqrt(np.abs(X))),
        ("cube", X**3),
        ("exp10", 10.0**X),
        ("reciprocal", 1 / X),
        ("negative", -X),
        ("arctan", np.arctan(X)),
        ("norm", np.sqrt(np.sum(X**2))),
        ("global_norm", np.sqrt(np.sum(X**2))),
    ],
)
def test_unary_functions(name, expected):
    got = symbolic.FUNCTIONS[name](jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # float32 library functions


def test_division_adds_an_epsilon_and_reductions_see_the_whole_tree():
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    f = symbolic.FUNCTIONS
    assert f["/"](1.0, 0.0) == pytest.approx(1e8, rel=1e-6)
    assert f["global_norm"](tree) == 5.0
    assert jax.tree.map(float, f["norm"](tree)) == {"a": 3.0, "b": 4.0}
    assert f["dot"](tree, tree) == 25.0
    assert f["cosine_sim"](tree, f["*"](tree, -2.0)) == -1.0
    np.testing.assert_allclose(f["clip_by_global_norm"](tree, 1.0)["a"], [0.6, 0.0], rtol=1e-6)
    assert f["clip_by_global_norm"](tree, 9.0)["b"] == 4.0
    assert f["interpolate"](tree, 1.0, 0.25)["a"].tolist() == [2.5, 0.25]
    # a number per leaf meets the leaves
    assert f["*"](f["norm"](tree), tree)["a"].tolist() == [9.0, 0.0]
    assert f["get_pi"]() == np.pi


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "first line must be"),
        ("def train(a, b): \n return a, b, b", "first line must be"),
        ("def train(w, g, m, v, lr):\n u = g * lr", "last line must be"),
        (text("u = g * lr", returned="u, m"), "three variables"),
        (text("u = g * lr", returned="u, m, 1"), "three variables"),
        (text("u = nosuch(g)"), "unknown function 'nosuch'"),
        (text("u = g * q"), "unknown variable 'q'"),
        (text("u = g * lr", returned="x, m, v"), "return: unknown variable 'x'"),
        (text("u = sign(g, m)"), "'sign' takes 1 argument.s., got 2"),
        (text("u = interpolate(g, m)"), "takes 3"),
        (text("u = g"), "one operation per statement"),
        (text("u = g * m * w"), "one operation per statement"),
        (text("u = sign(g * m)"), "one operation per statement"),
        (text("u = sign(sign(g))"), "line 2"),
        (text("u = sign(g"), "line 2"),
        (text("u = g ** 2"), "line 2"),
        (text("u = -g"), "line 2"),
        (text("u = g * 1e11"), "at most 1e"),
        (text("u = g * 1e999"), "finite"),
        (text("u = g[0] * m"), r"line 2: cannot read '\[0\]"),
        (text("u = __import__('os')"), "line 2: cannot read"),
        (text("(" * 5000), "line 2"),
        (text("u, t = g * m"), "line 2: expected 'name = function"),
    ],
)
def test_text_that_is_no_program(source, message):
    with pytest.raises(ProgramError, match=message):
        symbolic.parse(source)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (Statement("u", "global_norm", ("g",)), r"return: update is 'u' with shapes \(\(\),\)"),
        (Statement("u", "interpolate", ("g", "m", "v")), "argument 3 of 'interpolate' must be a scalar"),
        (Statement("u", "clip_by_global_norm", ("g", "m")), "argument 2 of 'clip_by_global_norm' must be a scalar"),
        (Statement("u", "invert", ("g",)), "'invert' does not accept"),
        (Statement("u", "*", ("g", float("nan"))), "finite"),
        (Statement("u", "*", ("g", True)), "variable or a number"),
        (Statement("not a name", "*", ("g", "g")), "target must be a name"),
        (Statement("u", "eval", ("g",)), "unknown function 'eval'"),
    ],
)
def test_statements_that_do_not_fit(statement, message):
    with pytest.raises(ValueError, match=message):
        symbolic.validate(Program((statement,)))


def test_shapes_are_inferred_for_the_users_tree():
    program = symbolic.parse(text("n = norm(g)", "u = g / n"))
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    assert [shapes for _, shapes in symbolic.infer(program, tree)] == [((), ()), ((2, 3), (4,))]
    symbolic.validate(program, jax.eval_shape(lambda: tree))
    with pytest.raises(ProgramError, match="return: m is 'n'"):
        symbolic.validate(Program(program.statements, ("u", "n", "v")), tree)


def test_text_round_trip_keeps_numbers():
    program = Program((Statement("u", "*", ("g", -0.1 - 1e-17)), Statement("u", "interpolate", ("u", 1e-10, 1 / 3))))
    assert symbolic.parse(symbolic.to_text(program)) == program


def test_what_the_hash_sees():
    def h(*lines, **k):
        return symbolic.program_hash(symbolic.parse(text(*lines)), **k)

    plain = h("u = g * lr")
    assert h("junk = cosh(w)", "x = g * lr", "u = g * m", "u = g * lr") == plain
    assert h("u = lr * g") != plain  # no algebra
    assert h("u = g * lr", "m = g + m") != plain
    assert h("u = g * lr", "m = g + m", cross_iteration=True) == h("u = g * lr", cross_iteration=True)
    assert h("u = g * 0.1") == h("u = g * 0.1000000000001") != h("u = g * 0.1000001")


def test_cross_iteration_liveness():
    # m feeds v and v feeds m, but no update reads either
    program = symbolic.parse(text("m = m + v", "v = v * g", "u = g * lr"))
    assert symbolic.live_outputs(program) == (True, False, False)
    assert symbolic.simplify(program, cross_iteration=True) == symbolic.parse(text("u = g * lr"))
    # v matters through m, which the update reads
    program = symbolic.parse(text("u = m * lr", "m = m + v", "v = v + g"))
    assert symbolic.live_outputs(program) == (True, True, True)
    # the name of a dead state is used as a temporary and must not be returned in its place
    program = symbolic.parse(text("v = g * lr", "u = v + w"))
    short = symbolic.simplify(program, cross_iteration=True)
    assert short.outputs[2] == "v"
    assert all(s.target != "v" for s in short.statements)
    a, b = (symbolic.execute(p, 1.0, 2.0, 3.0, 4.0, 0.5) for p in (program, short))
    assert (a[0], b[0], b[2]) == (2.0, 2.0, 4.0)


def test_the_papers_derivations():
    # m = interp(g, v, .9), then v' = interp(g, m, 1.1): v' = .01·g + .99·v
    program = symbolic.parse(text("m = interpolate(g, v, 0.9)", "v = interpolate(g, m, 1.1)", "u = g * lr"))
    with jax.enable_x64(True):
        g, v = jnp.asarray(X), jnp.asarray(X[::-1].copy())
        _, _, new = symbolic.execute(program, g, g, v, v, 1.0)
        np.testing.assert_allclose(new, 0.01 * g + 0.99 * v, rtol=0, atol=1e-15)  # float64
        # m / √(m·m) = sign(m), but for the 1e-8 in the division
        signed = symbolic.parse(text("p = m * m", "p = sqrt(p)", "u = m / p"))
        np.testing.assert_allclose(symbolic.execute(signed, g, g, v, v, 1.0)[0], np.sign(v), rtol=0, atol=1e-7)


def mutant(seed, edits):
    """A program some random edits away from AdamW."""
    program = ADAMW_PROGRAM
    for i in range(edits):
        program = symbolic.mutate(jax.random.fold_in(jax.random.key(seed), i), program)
    return program


def train(program, steps=2):
    """Outputs on random inputs of two leaves, and the updates of a short training from zero state."""
    rng = np.random.default_rng(0)

    def draw():
        return {"a": jnp.asarray(rng.standard_normal((2, 3))), "b": jnp.asarray(rng.standard_normal(4))}

    outputs = jax.tree.leaves(symbolic.execute(program, draw(), draw(), draw(), draw(), 0.3))
    w = draw()
    m = v = jax.tree.map(jnp.zeros_like, w)
    updates = []
    for _ in range(steps):
        u, m, v = symbolic.execute(program, w, draw(), m, v, 0.3)
        updates += jax.tree.leaves(u)
    return outputs, updates


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), edits=st.integers(1, 12))
def test_simplification_keeps_hash_and_outputs(seed, edits):
    program = mutant(seed, edits)
    short = symbolic.simplify(program)
    assert symbolic.program_hash(short) == symbolic.program_hash(program)
    assert symbolic.parse(symbolic.to_text(program)) == program
    assert symbolic.live_statements(short) == tuple(range(len(short)))
    outputs, updates = train(program)
    assert same(train(short)[0], outputs)
    shorter = symbolic.simplify(program, cross_iteration=True)
    assert len(shorter) <= len(short)
    hashes = {symbolic.program_hash(p, cross_iteration=True) for p in (program, short, shorter)}
    assert len(hashes) == 1
    assert same(train(shorter)[1], updates)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), edits=st.integers(0, 8))
def test_equal_hashes_have_equal_outputs(seed, edits):
    """Disguise a program: rename all variables, interleave dead statements; then compare hash and outputs."""
    program = mutant(seed, edits)
    rename, statements = {}, []
    for i, s in enumerate(program.statements):
        args = tuple(rename.get(a, a) for a in s.args)
        statements += [Statement(f"dead{i}", "cos", ("w",)), Statement(f"x{i}", s.op, args)]
        rename[s.target] = f"x{i}"
    disguised = Program(tuple(statements), tuple(rename.get(n, n) for n in program.outputs))
    assert symbolic.program_hash(disguised) == symbolic.program_hash(program)
    assert same(train(disguised)[0], train(program)[0])
    # and programs of a family with equal hashes compute the same
    known = {}
    for k in range(4):
        relative = symbolic.mutate(jax.random.fold_in(jax.random.key(seed), 100 + k), program)
        outputs = train(relative)[0]
        assert same(known.setdefault(symbolic.program_hash(relative), outputs), outputs)
