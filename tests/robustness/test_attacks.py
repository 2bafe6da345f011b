"""Attacks against reference vectors, Foolbox, closed forms for linear models, and what training needs of them."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccel.robustness import deepfool_linf, fgsm, pgd_linf, robust_accuracy

ATTACKS = {
    "fgsm": fgsm,
    "pgd": functools.partial(pgd_linf, steps=5, rel_step=0.5, key=jax.random.key(0)),
    "deepfool": functools.partial(deepfool_linf, steps=5),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def network(parameters):
    w1, b1, w2, b2 = parameters
    return lambda x: jnp.tanh(x.reshape(x.shape[0], -1) @ w1 + b1) @ w2 + b2


def parameters(seed=0, features=12, classes=5):
    keys = jax.random.split(jax.random.key(seed), 2)
    w1, w2 = jax.random.normal(keys[0], (features, 16)), jax.random.normal(keys[1], (16, classes))
    return w1, jnp.zeros(16), w2, jnp.zeros(classes)


def batch(rows=16, seed=1):
    x = jax.random.uniform(jax.random.key(seed), (rows, 12), minval=0.2, maxval=0.8)
    return x, jnp.argmax(network(parameters())(x), -1)


def case(vectors, name):
    data = {k.split("/")[1]: v for k, v in vectors("accelat").items() if k.startswith(f"{name}/")}
    logits = network([jnp.asarray(data[k]) for k in ("W1", "b1", "W2", "b2")])
    # The reference attacks a model that returns probabilities and treats them as logits.
    fn = (lambda x: jax.nn.softmax(logits(x))) if data["softmax_output"] else logits
    return data, fn, jnp.asarray(data["x"]), jnp.asarray(data["y"], jnp.int32), float(data["eps"])


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ["attack", "attack_softmax"])
def test_equal_the_reference(name, jit, vectors):
    data, fn, x, y, eps = case(vectors, name)
    compile_ = jax.jit if jit else lambda f: f
    attacks = {
        "fgsm": lambda x, y: fgsm(fn, x, y, epsilon=eps),
        "pgd40_nostart": lambda x, y: pgd_linf(fn, x, y, epsilon=eps, random_start=False),
        "pgd7_nostart": lambda x, y: pgd_linf(fn, x, y, epsilon=eps, steps=7, step_size=eps / 4, random_start=False),
        "deepfool_raw": lambda x, y: deepfool_linf(fn, x, y, epsilon=None),
        "deepfool_clipped": lambda x, y: deepfool_linf(fn, x, y, epsilon=eps),
    }
    for key, attack in attacks.items():
        attacked = compile_(attack)(x, y)
        # float32 pixels in [0, 1]; no gradient is near zero, so that all signs agree.
        np.testing.assert_allclose(attacked, data[key], atol=1e-6, err_msg=key)
        if f"{key}_acc" in data:
            assert float(jnp.mean(jnp.argmax(fn(attacked), -1) == y)) == float(data[f"{key}_acc"])
    fooled = jnp.argmax(fn(compile_(attacks["deepfool_clipped"])(x, y)), -1) != y
    np.testing.assert_array_equal(fooled, data["deepfool_success"])


def test_equal_foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Foolbox imports a name that SciPy has moved
        import foolbox
    fn, (x, y), eps = network(parameters()), batch(), 0.15
    model = foolbox.JAXModel(fn, bounds=(0, 1))
    pairs = {
        "fgsm": (foolbox.attacks.LinfFastGradientAttack(random_start=False), fgsm(fn, x, y, epsilon=eps)),
        "pgd": (
            foolbox.attacks.LinfPGD(random_start=False, steps=5),
            pgd_linf(fn, x, y, epsilon=eps, steps=5, random_start=False),
        ),
        "deepfool": (
            foolbox.attacks.LinfDeepFoolAttack(steps=5, candidates=4),
            deepfool_linf(fn, x, y, epsilon=eps, steps=5, candidates=4),
        ),
    }
    for name, (attack, ours) in pairs.items():
        _, (theirs,), _ = attack(model, x, y, epsilons=[eps])
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)  # float32 pixels in [0, 1]


@every_attack
def test_stays_in_the_ball_and_within_bounds(attack):
    x, y = batch()
    bounds = (0.1, 0.9)
    attacked = attack(network(parameters()), x, y, epsilon=0.25, bounds=bounds)
    assert float(jnp.abs(attacked - x).max()) <= 0.25 * (1 + 1e-6)  # float32
    assert float(jnp.abs(attacked - x).max()) > 0.01
    assert bounds[0] <= float(attacked.min()) <= float(attacked.max()) <= bounds[1]


@every_attack
def test_radius_zero_returns_x(attack):
    x, y = batch()
    np.testing.assert_array_equal(attack(network(parameters()), x, y, epsilon=0.0), x)


def test_one_step_of_pgd_is_fgsm():
    x, y = batch()
    fn = network(parameters())
    one = pgd_linf(fn, x, y, epsilon=0.1, steps=1, step_size=0.1, random_start=False)
    np.testing.assert_allclose(one, fgsm(fn, x, y, epsilon=0.1), atol=1e-7)  # x + (x' - x) in float32


def losses(fn, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(fn(x), y)


def test_pgd_raises_the_loss():
    x, y = batch(64)
    fn = network(parameters())
    clean = losses(fn, x, y)
    attacked = losses(fn, pgd_linf(fn, x, y, epsilon=0.05, steps=10, rel_step=0.25, key=jax.random.key(1)), y)
    assert (attacked >= clean).all()
    single = losses(fn, fgsm(fn, x, y, epsilon=0.05), y)
    assert float(attacked.mean()) >= float(single.mean()) > float(clean.mean())


def test_linear_model_has_closed_forms():
    weights = jax.random.normal(jax.random.key(3), (12, 2))
    x = jax.random.uniform(jax.random.key(4), (8, 12), minval=0.4, maxval=0.6)

    def fn(x):
        return (x - 0.5) @ weights

    y = jnp.argmax(fn(x), -1)
    slope = jnp.abs(weights[:, 0] - weights[:, 1]).sum()

    def margin(x):
        scores = fn(x)
        rows = jnp.arange(8)
        return scores[rows, y] - scores[rows, 1 - y]

    # FGSM moves every pixel the right way: the margin falls by exactly ε·‖w_y − w_j‖₁ while nothing is clipped.
    for attacked in (
        fgsm(fn, x, y, epsilon=0.1),
        pgd_linf(fn, x, y, epsilon=0.1, steps=4, rel_step=0.5, random_start=False),
    ):
        np.testing.assert_allclose(margin(x) - margin(attacked), 0.1 * slope, rtol=1e-5)  # float32 dot products
    # DeepFool crosses the boundary in one step, by the overshoot and the 1e-4 and no more.
    found = deepfool_linf(fn, x, y, epsilon=None, steps=1, bounds=(-9.0, 9.0))
    assert (jnp.argmax(fn(found), -1) != y).all()
    expected = 1.02 * (margin(x) / slope + 1e-4)
    np.testing.assert_allclose(jnp.abs(found - x).max(1), expected, rtol=1e-4, atol=1e-6)  # differences of pixels


def test_deepfool_leaves_what_is_already_wrong():
    x, y = batch()
    wrong = (y + 1) % 5
    fn = network(parameters())
    np.testing.assert_array_equal(deepfool_linf(fn, x, wrong, epsilon=None), x)
    # More candidates than classes is all classes; a row's path does not depend on the others.
    some = deepfool_linf(fn, x, y, epsilon=None, candidates=99)
    np.testing.assert_allclose(some[:4], deepfool_linf(fn, x[:4], y[:4], epsilon=None, candidates=5), atol=1e-6)


def test_dead_pixels_do_not_move():
    x, y = batch()
    w1, *rest = parameters()
    fn = network((w1.at[3].set(0.0), *rest))
    for attack in (fgsm, functools.partial(pgd_linf, random_start=False, steps=3)):
        np.testing.assert_array_equal(attack(fn, x, y, epsilon=0.1)[:, 3], x[:, 3])


def test_images_of_any_shape():
    x, y = batch()
    fn = network(parameters())
    for attack in (fgsm, functools.partial(pgd_linf, steps=3, random_start=False), deepfool_linf):
        image = attack(fn, x.reshape(16, 2, 3, 2), y, epsilon=0.1)
        np.testing.assert_allclose(image.reshape(16, 12), attack(fn, x, y, epsilon=0.1), atol=1e-6)  # float32


def test_the_key_decides_the_start():
    x, y = batch()
    attack = functools.partial(pgd_linf, network(parameters()), x, y, epsilon=0.1, steps=1)
    first, again, other = (attack(key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 0.01


@every_attack
def test_jit_vmap_and_traced_radius(attack):
    x, y = batch()
    fn = network(parameters())
    radii = jnp.array([0.02, 0.1])
    together = jax.jit(jax.vmap(lambda eps: attack(fn, x, y, epsilon=eps)))(radii)
    for got, eps in zip(together, radii, strict=True):
        np.testing.assert_allclose(got, attack(fn, x, y, epsilon=float(eps)), atol=1e-6)  # float32


@every_attack
def test_eight_devices_equal_one(attack):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x, y = batch()
    step = jax.jit(lambda x, y: attack(network(parameters()), x, y, epsilon=0.1))
    got = step(jax.device_put(x, sharding), jax.device_put(y, sharding))
    np.testing.assert_allclose(got, step(x, y), atol=1e-6)  # float32


@every_attack
def test_bfloat16_is_kept(attack):
    x, y = batch()
    x = x.astype(jnp.bfloat16)
    fn = network(jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters()))
    attacked = attack(fn, x, y, epsilon=0.1)
    assert attacked.dtype == jnp.bfloat16
    moved = jnp.abs(attacked.astype(jnp.float32) - x.astype(jnp.float32))
    assert float(moved.max()) <= 0.1 + 2**-8  # half a unit in the last place of bfloat16 pixels below 1, twice


def test_small_steps_do_not_vanish_in_bfloat16():
    """40 steps of ε/30 reach the edge of the ball although each is less than half a bfloat16 unit at 0.75."""
    x = jnp.full((2, 4), 0.75, jnp.bfloat16)
    attacked = pgd_linf(lambda x: x[:, :2], x, jnp.array([0, 1]), epsilon=0.03, random_start=False)
    moved = jnp.abs(attacked[:, :2].astype(jnp.float32) - 0.75)
    np.testing.assert_allclose(moved, 0.03, atol=2**-9 + 1e-6)  # half a unit at 0.75


@every_attack
def test_parameters_are_constants_of_the_attack(attack):
    """Differentiating the loss at attacked inputs does not differentiate the attack."""
    x, y = batch()

    def loss(p, attacked=None):
        fn = network(p)
        attacked = attack(fn, x, y, epsilon=0.1) if attacked is None else attacked
        return losses(fn, attacked, y).mean()

    p = parameters()
    through = jax.jit(jax.grad(loss))(p)
    constant = jax.grad(loss)(p, attack(network(p), x, y, epsilon=0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), through, constant)  # float32


def test_robust_accuracy():
    x, y = batch(64)
    fn = network(parameters())
    attack = functools.partial(pgd_linf, epsilon=0.05, steps=5, rel_step=0.5)
    accuracy = jax.jit(lambda key: robust_accuracy(fn, x, y, attack, key))(jax.random.key(0))
    attacked = attack(fn, x, y, key=jax.random.key(0))
    assert float(accuracy) == float(jnp.mean(jnp.argmax(fn(attacked), -1) == y))
    assert 0.0 < float(accuracy) < 1.0
    assert float(robust_accuracy(fn, x, y, functools.partial(fgsm, epsilon=0.0))) == 1.0
    for other in (fgsm, deepfool_linf):  # all attacks can be called alike, with a key
        assert float(robust_accuracy(fn, x, y, functools.partial(other, epsilon=0.05), jax.random.key(0))) < 1.0


@pytest.mark.parametrize(
    ("attack", "change", "message"),
    [
        (fgsm, {"epsilon": -0.1}, "epsilon must be .*>= 0, got epsilon=-0.1"),
        (fgsm, {"bounds": (1.0, 0.0)}, "bounds"),
        (fgsm, {"bounds": (0.5, 1.0)}, "x must lie"),
        (fgsm, {"y": jnp.full(16, 5)}, r"y must lie in \[0, 5\)"),
        (fgsm, {"y": jnp.full(16, -1)}, "y must lie"),
        (pgd_linf, {"steps": 0}, "steps must be .*, got steps=0"),
        (pgd_linf, {"key": None}, "key"),
        (deepfool_linf, {"steps": 0}, "steps"),
        (deepfool_linf, {"candidates": 1}, "candidates must be .*, got candidates=1"),
    ],
)
def test_wrong_arguments_are_named(attack, change, message):
    x, y = batch()
    given = {"x": x, "y": y, "epsilon": 0.1} | ({"key": jax.random.key(0)} if attack is pgd_linf else {}) | change
    with pytest.raises(ValueError, match=message):
        attack(network(parameters()), **given)


def test_wrong_shapes_and_dtypes_are_named():
    x, y = batch()
    plain = inspect.unwrap(fgsm)  # without the shape checks that only the tests install
    fn = network(parameters())
    with pytest.raises(ValueError, match="y must have one label per row"):
        plain(fn, x, y[:3], epsilon=0.1)
    with pytest.raises(ValueError, match="logits_fn must return logits of shape"):
        plain(lambda x: fn(x).sum(-1), x, y, epsilon=0.1)
    with pytest.raises(TypeError, match="y must hold integer labels"):
        plain(fn, x, y.astype(float), epsilon=0.1)
    with pytest.raises(TypeError, match="x must be real floating point"):
        plain(fn, jnp.ones((16, 12), jnp.int32), y, epsilon=0.1)


def test_values_are_not_checked_under_jit():
    x, y = batch()
    attacked = jax.jit(lambda x, y: fgsm(network(parameters()), x, y, epsilon=0.1))(x + 5.0, y)
    assert float(attacked.max()) <= 1.0
