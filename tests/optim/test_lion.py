"""Lion: optax against the reference's numbers, and what jaxaccel adds to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxaccel.optim import lion


def leaves_of(data, case, prefix):
    names = sorted(k for k in data.files if k.startswith(f"{case}/{prefix}"))
    return [data[name] for name in names]


def run(tx, params, grads):
    """Parameters, updates and states after each step."""
    state, out = tx.init(params), []
    for i in range(len(jax.tree.leaves(grads)[0])):
        updates, state = tx.update(jax.tree.map(lambda g, i=i: g[i], grads), state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, updates, state))
    return out


def momentum(state):
    return next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))


MAKERS = {
    "optax": lambda lr, b1, b2, wd: optax.lion(lr, b1, b2, weight_decay=wd),
    "lowp": lambda lr, b1, b2, wd: lion.lion_lowp(lr, b1, b2, weight_decay=wd, mu_dtype=None),
    "packed": lambda lr, b1, b2, wd: lion.pack_small_leaves(optax.lion(lr, b1, b2, weight_decay=wd)),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("case", ["torch_f32_wd", "torch_f64_b9598", "torch_f32_sparse"])
def test_equals_the_torch_reference(vectors, case, maker):
    data = vectors("lion")
    double = case == "torch_f64_b9598"
    with jax.enable_x64(double):
        params, grads = [[jnp.asarray(x) for x in leaves_of(data, case, k)] for k in ("p0_", "g_")]
        rates = jnp.asarray(data[f"{case}/lr"])
        b1, b2, wd = (float(data[f"{case}/{k}"]) for k in ("b1", "b2", "wd"))
        steps = run(MAKERS[maker](lambda count: rates[count], b1, b2, wd), params, grads)
        # Twelve steps of a few roundings of numbers up to 2: float32 has 1.2e-7, float64 2.2e-16.
        atol = 1e-14 if double else 1e-6
        for i, (p, _, state) in enumerate(steps):
            for got, want in zip(p, leaves_of(data, case, "p_"), strict=True):
                np.testing.assert_allclose(got, want[i], rtol=0, atol=atol)
            if maker != "packed":
                for got, want in zip(momentum(state), leaves_of(data, case, "m_"), strict=True):
                    np.testing.assert_allclose(got, want[i], rtol=0, atol=atol)


@pytest.mark.parametrize("maker", ["optax", "lowp"])
def test_equals_optax_with_schedule_and_mask(vectors, maker):
    data = vectors("lion")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10, 1e-3)
    make = {"optax": optax.lion, "lowp": lambda *a, **k: lion.lion_lowp(*a, mu_dtype=None, **k)}[maker]
    tx = make(schedule, weight_decay=0.1, mask={"k0": False, "k1": True})
    params = {k: jnp.asarray(data[f"optax_sched/p0_{k}"]) for k in ("k0", "k1")}
    grads = {k: jnp.asarray(data[f"optax_sched/g_{k}"]) for k in params}
    for i, (p, u, state) in enumerate(run(tx, params, grads)):
        for k in params:
            # float32: ten steps
            np.testing.assert_allclose(p[k], data[f"optax_sched/p_{k}"][i], rtol=0, atol=1e-6)
            np.testing.assert_allclose(u[k], data[f"optax_sched/u_{k}"][i], rtol=0, atol=1e-8)
            np.testing.assert_allclose(momentum(state)[k], data[f"optax_sched/m_{k}"][i], rtol=0, atol=1e-6)


def test_bfloat16_momentum_of_optax_and_ours(vectors):
    data = vectors("lion")
    p, g = (jnp.asarray(data[f"optax_bf16mu/{k}_k0"]) for k in ("p0", "g"))
    learning_rate = float(np.abs(data["optax_bf16mu/u_k0"][0]).max())
    theirs = run(optax.lion(learning_rate, mu_dtype=jnp.bfloat16, weight_decay=0.0), p, g)
    ours = run(lion.lion_lowp(learning_rate), p, g)
    for i in range(10):
        np.testing.assert_allclose(theirs[i][0], data["optax_bf16mu/p_k0"][i], rtol=0, atol=1e-6)  # float32
        got = momentum(theirs[i][2]).astype(jnp.float32)
        # bfloat16 has eight bits; products may be rounded in between or not, one unit in the last place apart
        np.testing.assert_allclose(got, data["optax_bf16mu/m_k0"][i], rtol=2**-7, atol=1e-6)
        assert momentum(ours[i][2]).dtype == jnp.bfloat16
    # one rounding per step in ours, up to three in optax: a few units in the last place after ten steps
    got = momentum(ours[9][2]).astype(jnp.float32)
    np.testing.assert_allclose(got, data["optax_bf16mu/m_k0"][9], rtol=2**-5, atol=1e-3)


GRADS = jax.random.normal(jax.random.key(3), (8, 6))
PARAMS = jnp.linspace(-1.0, 1.0, 6)


def test_scale_of_the_gradients_does_not_matter():
    tx = optax.lion(0.1, weight_decay=0.1)
    plain, scaled = run(tx, PARAMS, GRADS), run(tx, PARAMS, 1024.0 * GRADS)
    # a power of two scales every intermediate exactly
    assert all(jnp.array_equal(a[0], b[0]) for a, b in zip(plain, scaled, strict=True))


def test_every_step_has_the_learning_rates_length():
    sparse = GRADS.at[:, 0].set(0.0)
    for _, updates, _ in run(optax.lion(0.125, weight_decay=0.0), PARAMS, sparse):
        assert updates[0] == 0
        np.testing.assert_array_equal(jnp.abs(updates[1:]), 0.125)


def test_equal_rates_are_signum_and_zero_is_sign_descent():
    signum = optax.chain(optax.ema(0.9, debias=False), optax.scale_by_sign(), optax.scale(-0.1))
    for rate, other in ((0.9, signum), (0.0, optax.chain(optax.scale_by_sign(), optax.scale(-0.1)))):
        tx = optax.lion(0.1, rate, rate, weight_decay=0.0)
        for a, b in zip(run(tx, PARAMS, GRADS), run(other, PARAMS, GRADS), strict=True):
            np.testing.assert_array_equal(a[0], b[0])


def test_lowp_in_float32_is_optax():
    ours, theirs = run(lion.scale_by_lion_lowp(mu_dtype=None), PARAMS, GRADS), run(optax.scale_by_lion(), PARAMS, GRADS)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[2].mu, b[2].mu)


def fixed_point(tx, steps=1500, size=512):
    """Mean stored momentum over its limit, under a constant gradient of 0.3."""
    g = jnp.full(size, 0.3)
    state = jax.jit(lambda s: jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s)[1], s))(tx.init(g))
    return float(jnp.mean(state.mu.astype(jnp.float32)) / 0.3)


def test_bfloat16_stalls_when_rounded_to_nearest_and_not_stochastically():
    assert 0.68 < fixed_point(optax.scale_by_lion(mu_dtype=jnp.bfloat16)) < 0.73
    assert 0.80 < fixed_point(lion.scale_by_lion_lowp()) < 0.87
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        tx = lion.scale_by_lion_lowp(mu_dtype=dtype, stochastic_rounding=True, key=jax.random.key(0))
        # the mean of 512 entries that scatter by about one unit in the last place: at most 5 %/√512 = 0.2 %, 3 sigma
        assert fixed_point(tx) == pytest.approx(1.0, abs=7e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_is_unbiased_and_picks_neighbours(dtype):
    for value in (0.3, -1.2345, 3.1e-5, 0.0, 1.0):
        x = jnp.full(20_000, value, jnp.float32)
        got = lion._round_stochastically(jax.random.key(1), x, dtype).astype(jnp.float32)
        ulp = float(jnp.finfo(dtype).eps) * max(abs(value), float(jnp.finfo(dtype).smallest_normal))
        assert float(jnp.max(jnp.abs(got - value))) <= ulp
        # a coin between neighbours: standard deviation at most ulp/2, divided by √20000; five of those
        assert abs(float(np.mean(np.asarray(got, np.float64))) - float(x[0])) <= 5 * ulp / 2 / np.sqrt(20_000)
    odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(lion._round_stochastically(jax.random.key(1), odd, dtype).astype(jnp.float32), odd)


def test_the_key_decides_and_survives_donation():
    g = {"a": jnp.full(64, 0.3), "b": jnp.full(64, 0.3)}
    key = jax.random.key(7)

    def train(key):
        tx = lion.scale_by_lion_lowp(stochastic_rounding=True, key=key)
        step = jax.jit(lambda s: tx.update(g, s)[1], donate_argnums=0)
        state = tx.init(g)
        for _ in range(4):
            state = step(state)
        return state.mu

    first, again = train(key), train(key)
    assert jnp.array_equal(first["a"], again["a"])
    assert not jnp.array_equal(first["a"], first["b"])
    assert not jnp.array_equal(first["a"], train(jax.random.key(8))["a"])
    assert jnp.array_equal(first["a"], train(jax.random.key_data(key))["a"])  # the old kind of key


def test_updates_keep_their_dtypes_and_states_theirs():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)}
    tx = lion.lion_lowp(0.1, weight_decay=0.1)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.bfloat16, jnp.float32]
    assert {m.dtype for m in jax.tree.leaves(momentum(state))} == {jnp.dtype(jnp.bfloat16)}


def test_inject_hyperparams():
    make = optax.inject_hyperparams(lion.lion_lowp, static_args=("mask", "mu_dtype", "stochastic_rounding", "key"))
    tx, plain = make(learning_rate=0.1, b1=0.9, b2=0.99), lion.lion_lowp(0.1)
    for a, b in zip(run(tx, PARAMS, GRADS), run(plain, PARAMS, GRADS), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-6)  # float32; 1 − b is rounded once more when traced


def test_hyper_parameters_from_adamw():
    assert lion.lion_from_adamw(1e-3, 0.1, ratio=4.0) == (1e-3 / 4, 0.4)
    rate, decay = lion.lion_from_adamw(optax.cosine_decay_schedule(1e-3, 10), optax.constant_schedule(0.1))
    for count in (0, 5, 10):
        np.testing.assert_allclose(rate(count), optax.cosine_decay_schedule(1e-3, 10)(count) / 10, rtol=1e-6)
        np.testing.assert_allclose(rate(count) * decay(count), 1e-4 * rate(count) / 1e-4, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lion.scale_by_lion_lowp(b1=1.0), r"b1 must be in \[0, 1\), got b1=1.0"),
        (lambda: lion.scale_by_lion_lowp(b2=-0.1), "b2"),
        (lambda: lion.scale_by_lion_lowp(b2=float("nan")), "b2"),
        (lambda: lion.scale_by_lion_lowp(stochastic_rounding=True), "key"),
        (lambda: lion.lion_lowp(-1.0), "learning_rate"),
        (lambda: lion.lion_lowp(0.1, weight_decay=float("nan")), "weight_decay"),
        (lambda: lion.lion_from_adamw(1e-3, 0.1, ratio=0.0), "ratio"),
        (lambda: lion.lion_from_adamw(-1e-3, 0.1), "learning_rate"),
        (lambda: lion.lion_from_adamw(1e-3, -0.1), "weight_decay"),
        (lambda: lion.pack_small_leaves(optax.sgd(0.1), threshold=0), "threshold must be a whole number >= 1"),
        (lambda: lion.pack_tree({}, threshold=-3), "threshold"),
        (lambda: lion.pack_tree({"a": jnp.arange(3)}), r"\['a'\].*floating"),
        (lambda: lion.scale_by_lion_lowp().init({"a": jnp.arange(3)}), r"\['a'\].*floating"),
        (lambda: lion.pack_small_leaves(optax.sgd(0.1)).init({"a": jnp.arange(3)}), r"\['a'\].*floating"),
        (lambda: lion.scale_by_lion_lowp().update(jnp.ones(2), lion.scale_by_lion_lowp().init(jnp.ones(3))), "shape"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_momentum_of_integers_is_refused():
    with pytest.raises(TypeError, match="mu_dtype must be a real floating dtype, got mu_dtype=int32"):
        lion.scale_by_lion_lowp(mu_dtype=jnp.int32)


TREE = {
    "big": jnp.linspace(-1, 1, 40).reshape(8, 5),
    "small": (jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.float32(0.5), None),
    "half": jnp.linspace(-1, 1, 4, dtype=jnp.bfloat16),
    "empty": jnp.zeros((0, 3)),
}
TREE_GRADS = jax.tree.map(lambda x: jnp.stack([jnp.sin(x * k + k) for k in (1.0, 2.0, 3.0)]).astype(x.dtype), TREE)


def test_pack_tree_round_trip():
    packed, layout = lion.pack_tree(TREE, threshold=7)
    assert {k: b.shape for k, b in packed.buffers.items()} == {"float32": (7,), "bfloat16": (4,)}
    assert [x.shape for x in packed.large] == [(8, 5)]
    back = lion.unpack_tree(packed, layout)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)
    jitted = jax.jit(lambda p, layout: lion.unpack_tree(p, layout))(packed, layout)  # the layout is a static leaf
    assert jax.tree.structure(jitted) == jax.tree.structure(TREE)
    with pytest.raises(ValueError, match="does not fit the layout"):
        lion.unpack_tree(lion.pack_tree(TREE, threshold=1)[0], layout)


def test_gradients_of_a_packed_tree_are_the_packed_gradients():
    def loss(tree):
        return sum(jnp.sum(x.astype(jnp.float32) ** 3) for x in jax.tree.leaves(tree))

    packed, layout = lion.pack_tree(TREE, threshold=7)
    got = jax.grad(lambda p: loss(lion.unpack_tree(p, layout)))(packed)
    want, _ = lion.pack_tree(jax.grad(loss)(TREE), threshold=7)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    tangent = jax.jvp(lambda p: loss(lion.unpack_tree(p, layout)), (packed,), (packed,))[1]
    assert jnp.isfinite(tangent)


@pytest.mark.parametrize(
    "tx",
    [
        optax.lion(0.1, weight_decay=0.1),
        optax.adam(0.1),
        lion.lion_lowp(0.1, mu_dtype=None),
        optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
    ],
    ids=["lion", "adam", "lowp", "clipped"],
)
def test_packing_changes_nothing(tx):
    packed = lion.pack_small_leaves(tx, threshold=7)
    update = jax.jit(packed.update)
    steps = run(optax.GradientTransformation(packed.init, update), TREE, TREE_GRADS)
    for a, b in zip(steps, run(tx, TREE, TREE_GRADS), strict=True):
        assert jax.tree.structure(a[1]) == jax.tree.structure(b[1])
        for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            # the same arithmetic, fused differently: a few units in the last place of float32 or bfloat16
            np.testing.assert_allclose(
                x.astype(jnp.float32), y.astype(jnp.float32), rtol=0, atol=2e-2 if x.dtype == jnp.bfloat16 else 1e-6
            )


def test_the_packed_state_is_one_buffer_per_dtype():
    tx = lion.pack_small_leaves(optax.scale_by_lion(), threshold=7)
    mu = tx.init(TREE).inner_state.mu
    assert sorted(x.shape for x in jax.tree.leaves(mu)) == [(4,), (7,), (8, 5)]


def test_packing_inside_multi_steps_and_inject_hyperparams():
    make = optax.inject_hyperparams(lambda learning_rate: lion.pack_small_leaves(optax.lion(learning_rate)))
    plain = optax.MultiSteps(optax.lion(0.1), 3)
    packed = optax.MultiSteps(make(learning_rate=0.1), 3)
    tree = {"a": TREE["big"], "b": TREE["small"][0]}
    grads = {"a": TREE_GRADS["big"], "b": TREE_GRADS["small"][0]}
    a, b = (run(optax.GradientTransformation(t.init, jax.jit(t.update)), tree, grads)[-1][0] for t in (packed, plain))
    # float32; XLA may fuse the accumulated mean differently
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), a, b)
    assert not np.allclose(a["a"], tree["a"])


def test_extra_arguments_and_parameterless_updates_pass():
    tx = lion.pack_small_leaves(optax.scale_by_lion())
    updates, _ = tx.update(TREE, tx.init(TREE), value=1.0)
    assert jax.tree.structure(updates) == jax.tree.structure(TREE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lion.lion_lowp(0.1, weight_decay=0.1, stochastic_rounding=True, key=jax.random.key(0)),
        lambda: lion.pack_small_leaves(optax.lion(0.1), threshold=20),
    ],
    ids=["lowp", "packed"],
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_over_eight_devices(make, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {"big": jnp.linspace(-1, 1, 32), "small": jnp.ones(3)}
    grads = jax.tree.map(jnp.cos, params)
    tx = make()
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    placed = {"big": jax.device_put(params["big"], sharding), "small": params["small"]}
    placed_grads = {"big": jax.device_put(grads["big"], sharding), "small": grads["small"]}
    state = tx.init(placed)
    big = next(x for x in jax.tree.leaves(state) if x.shape == (32,))
    assert big.sharding.is_equivalent_to(sharding, 1)
    updates, new = jax.jit(tx.update)(placed_grads, state, placed)
    for k in params:
        np.testing.assert_allclose(updates[k], expected[k], rtol=0, atol=1e-7)  # float32, same arithmetic
    assert next(x for x in jax.tree.leaves(new) if x.shape == (32,)).sharding.is_equivalent_to(sharding, 1)
