"""GBNN: given the reference's inner networks everything else is determined; the inner fit; what may be switched off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaccel.boosting import (
    GBNNParams,
    Loss,
    encode_targets,
    gbnn_apply,
    gbnn_fit,
    gbnn_staged,
    gbnn_to_mlp,
    mean_loss,
    mlp_apply,
    newton_step,
)
from jaxaccel.boosting.gbnn import Unit, fit_unit, inner_objective, subsample_weights
from jaxaccel.boosting.losses import get_loss
from jaxaccel.models.gbnn import SwitchableNetwork

CASES = {"reg": ("squared", 0.5), "bin": ("logistic", 1.0), "multi": ("softmax", 0.5)}


def reference(v, case):
    f0 = jnp.asarray(v[f"{case}_intercept"])
    return GBNNParams(f0, *(jnp.asarray(v[f"{case}_{k}"]) for k in ("W1", "b1", "W2", "b2", "rho")))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
class TestReference:
    """float64 throughout: 1e-10 leaves room for sums in another order, and for divisions by small curvatures."""

    def test_outputs_and_merged_network(self, vectors, case):
        v = vectors("gbnn")
        params, x = reference(v, case), jnp.asarray(v[f"{case}_X"])
        expected = v[f"{case}_F"].reshape(80, -1)
        np.testing.assert_allclose(gbnn_apply(params, x), expected, rtol=1e-10, atol=1e-10)
        mlp = gbnn_to_mlp(params, loss=CASES[case][0])
        for ours, theirs in (("w1", "W1"), ("b1", "b1"), ("w2", "W2"), ("b2", "b2")):
            np.testing.assert_allclose(mlp[ours], v[f"{case}_nn_{theirs}"], rtol=1e-10, atol=1e-12)

    def test_scores_of_each_stage(self, vectors, case):
        v = vectors("gbnn")
        staged = np.asarray(gbnn_staged(reference(v, case), jnp.asarray(v[f"{case}_X"])))
        y = v[f"{case}_y"]
        if case == "reg":
            scores = ((staged[..., 0] - y) ** 2).mean(1)
        else:
            labels = staged[..., 0] > 0 if case == "bin" else staged.argmax(-1)
            scores = (labels == y).mean(1)
        np.testing.assert_allclose(scores, v[f"{case}_staged"], rtol=1e-10)

    def test_probabilities(self, vectors, case):
        v = vectors("gbnn")
        if case == "reg":
            assert "reg_proba" not in v  # only classes have them
            return
        f = gbnn_apply(reference(v, case), jnp.asarray(v[f"{case}_X"]))
        p = jax.nn.softmax(f) if case == "multi" else jax.nn.sigmoid(jnp.concatenate([-2 * f, 2 * f], 1))
        np.testing.assert_allclose(p, v[f"{case}_proba"], rtol=1e-9, atol=1e-12)

    def test_steps_and_losses(self, vectors, case):
        v = vectors("gbnn")
        name, rate = CASES[case]
        params, x, loss = reference(v, case), jnp.asarray(v[f"{case}_X"]), get_loss(name)
        y = encode_targets(v[f"{case}_y"], name, dtype=jnp.float64)
        weight = jnp.ones(80)
        np.testing.assert_allclose(loss.initial(y, weight), params.f0, rtol=1e-10, atol=1e-12)
        f = jnp.broadcast_to(params.f0, (80, len(params.f0)))
        for t in range(params.num_steps):
            h = Unit(*(p[t] for p in params[1:5]))(x, jax.nn.sigmoid)
            rho = rate * newton_step(loss, f, y, h)
            np.testing.assert_allclose(rho, params.rho[t], rtol=1e-9)
            f = f + rho * h
            # The reference reports squares without the half, and the softmax loss summed over rows.
            scale = {"reg": 2, "bin": 1, "multi": 80}[case]
            np.testing.assert_allclose(scale * mean_loss(loss, f, y, weight), v[f"{case}_losses"][t], rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", ["sub1", "sub3"])
class TestInnerFit:
    def start(self, vectors, case):
        v = vectors("gbnn")
        unit = Unit(*(jnp.asarray(v[f"{case}_{k}_init"]) for k in ("W1", "b1", "W2", "b2")))
        return v, unit, jnp.asarray(v[f"{case}_X"]), jnp.asarray(v[f"{case}_r"])

    def test_objective_and_gradient(self, vectors, case):
        v, unit, x, r = self.start(vectors, case)
        value, g = jax.value_and_grad(inner_objective)(unit, x, r, jnp.ones(60), l2=1e-4)
        np.testing.assert_allclose(value, v[f"{case}_f0"], rtol=1e-12)
        ordered = jnp.concatenate([g.w1.ravel(), g.w2.ravel(), g.b1, g.b2])
        np.testing.assert_allclose(ordered, v[f"{case}_g0"], rtol=1e-10, atol=1e-14)

    def test_lbfgs_ends_where_scipy_does(self, vectors, case):
        v, unit, x, r = self.start(vectors, case)
        fitted = fit_unit(unit, x, r, jnp.ones(60), l2=1e-4, steps=200)
        # A non-convex problem cut at 200 iterations: the brief's bar is 10 %.
        assert inner_objective(fitted, x, r, jnp.ones(60), l2=1e-4) <= 1.1 * v[f"{case}_f200"]


@functools.cache
def data():
    keys = jax.random.split(jax.random.key(3), 2)
    x = jax.random.normal(keys[0], (96, 4))
    return x, jnp.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * jax.random.normal(keys[1], (96,))


SMALL = {"key": jax.random.key(7), "n_steps": 6, "units_per_step": 2, "inner_steps": 20}
# Twenty steps of Adam compile faster than L-BFGS, and do not spread a difference in rounding as its line search does.
SMALL["optimizer"] = optax.adam(0.1)
SAME = {"rtol": 1e-3, "atol": 1e-4}  # float32 through 20 steps of Adam, sums in another order


@functools.cache
def fitted():
    x, y = data()
    return gbnn_fit(x, y, **SMALL, learning_rate=0.5)


def test_training_loss_is_that_of_the_stages():
    x, y = data()
    fit = fitted()
    losses = 0.5 * ((gbnn_staged(fit.params, x)[..., 0] - y) ** 2).mean(1)
    np.testing.assert_allclose(fit.train_loss, losses, rtol=1e-5)  # float32 sums of 96 and of 12 terms
    assert fit.train_loss[-1] < 0.85 * fit.train_loss[0]


@pytest.mark.parametrize("m", [0, 1, 4, 6])
def test_switching_off_takes_the_bias_of_the_steps_that_stay(m):
    x, _ = data()
    params = fitted().params
    whole = gbnn_staged(params, x)
    expected = jnp.broadcast_to(params.f0, whole[0].shape) if m == 0 else whole[m - 1]
    static, traced = gbnn_apply(params, x, n_active=m), jax.jit(gbnn_apply)(params, x, n_active=m)
    np.testing.assert_allclose(static, expected, atol=1e-5)
    np.testing.assert_allclose(traced, expected, atol=1e-5)
    mlp = gbnn_to_mlp(params, n_active=m)
    assert mlp["w1"].shape == (4, 2 * m)
    np.testing.assert_allclose(mlp_apply(mlp, x), expected, atol=1e-5)


def test_blocks_and_continuing_change_nothing():
    x, y = data()
    heard = []
    blocks = gbnn_fit(x, y, **SMALL, learning_rate=0.5, block=4, callback=lambda t, loss: heard.append((t, len(loss))))
    assert heard == [(4, 4), (6, 2)]
    np.testing.assert_allclose(blocks.train_loss, fitted().train_loss, **SAME)
    first = gbnn_fit(x, y, **SMALL, learning_rate=0.5, block=4, callback=lambda t, loss: True)
    assert first.params.num_steps == 4
    whole = gbnn_fit(x, y, **(SMALL | {"n_steps": 2}), learning_rate=0.5, initial=first.params)
    assert whole.params.num_steps == 6
    np.testing.assert_array_equal(whole.params.w1[:4], first.params.w1)
    np.testing.assert_allclose(whole.train_loss, blocks.train_loss[4:], **SAME)


def test_a_traced_share_draws_the_same_rows():
    key = jax.random.key(5)
    weights = subsample_weights(key, 96, 0.25, jnp.float32)
    assert set(np.flatnonzero(weights)) == set(np.asarray(jax.random.permutation(key, 96)[:24]))
    x, y = data()
    small = SMALL | {"n_steps": 1}
    rows, mask = (gbnn_fit(x, y, **small, subsample=share) for share in (0.25, jnp.float32(0.25)))
    np.testing.assert_allclose(mask.params.w1, rows.params.w1, **SAME)


def test_a_grid_under_vmap():
    x, y = data()
    fit = jax.jit(
        jax.vmap(
            lambda rate, key: gbnn_fit(x, y, **(SMALL | {"key": key, "n_steps": 3}), learning_rate=rate).train_loss
        )
    )
    keys = jax.random.split(jax.random.key(1), 2)
    losses = fit(jnp.array([0.1, 0.5]), keys)
    assert losses.shape == (2, 3)
    alone = gbnn_fit(x, y, **(SMALL | {"key": keys[1], "n_steps": 3}), learning_rate=0.5).train_loss
    np.testing.assert_allclose(losses[1], alone, **SAME)


def test_a_large_step_diverges_on_noise_where_a_small_one_does_not():
    keys = jax.random.split(jax.random.key(11), 2)
    x, y = jax.random.normal(keys[0], (60, 8)), jax.random.normal(keys[1], (60,))
    small = {"key": jax.random.key(0), "n_steps": 60, "units_per_step": 2, "inner_steps": 60}
    ends = {rate: float(gbnn_fit(x, y, **small, learning_rate=rate).train_loss[-1]) for rate in (1.0, 0.1)}
    assert ends[0.1] < 0.5 < 2 < ends[1.0]  # 0.5 is the loss of predicting 0


@pytest.mark.parametrize(("loss", "outputs"), [("logistic", 1), ("softmax", 3)])
def test_classes_are_learnt(loss, outputs):  # by L-BFGS
    x, target = data()
    y = (target > 0).astype(int) if loss == "logistic" else jnp.digitize(target, jnp.array([-0.5, 0.5]))
    fit = gbnn_fit(
        x, y, **(SMALL | {"optimizer": None, "n_steps": 12, "inner_steps": 100}), loss=loss, learning_rate=0.5
    )
    f = gbnn_apply(fit.params, x)
    assert f.shape == (96, outputs)
    found = f[:, 0] > 0 if loss == "logistic" else f.argmax(-1)
    assert (found == y).mean() > (0.8 if loss == "logistic" else 0.6)  # the largest class holds .5 or .45
    assert (jnp.diff(fit.train_loss) < 0).mean() > 0.7


def test_several_outputs_and_a_loss_of_your_own():
    x, y = data()
    both = jnp.stack([y, -y], 1)

    def value(f, y):
        return jnp.sum(jnp.logaddexp(f - y, y - f), -1)  # log-cosh, up to a constant

    own = Loss(value, lambda y, w: jnp.zeros(y.shape[1]))
    fit = gbnn_fit(x, both, **SMALL, loss=own, learning_rate=0.5)
    assert gbnn_apply(fit.params, x).shape == (96, 2)
    assert fit.train_loss[-1] < fit.train_loss[0]


def test_rows_of_no_weight_are_not_learnt_from():
    x, y = data()
    weight = jnp.arange(96) < 64
    spoiled = jnp.where(weight, y, 1e3)
    a, b = (
        gbnn_fit(x, t, **SMALL, subsample=1.0, sample_weight=weight.astype(jnp.float32)).params for t in (y, spoiled)
    )
    np.testing.assert_allclose(a.f0, b.f0, rtol=1e-5)
    np.testing.assert_allclose(gbnn_apply(a, x), gbnn_apply(b, x), rtol=1e-3, atol=1e-3)


def test_rows_sharded_over_devices():
    x, y = data()
    sharding = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    fit = gbnn_fit(jax.device_put(x, sharding), jax.device_put(y, sharding), **SMALL, learning_rate=0.5)
    np.testing.assert_allclose(fit.train_loss, fitted().train_loss, **SAME)


def test_half_precision_inputs_train_in_single():
    x, y = data()
    fit = gbnn_fit(x.astype(jnp.bfloat16), y, **SMALL)
    assert fit.params.w1.dtype == jnp.float32


def test_one_row_and_constant_inputs():
    fit = gbnn_fit(jnp.ones((1, 2)), jnp.ones(1), **SMALL)
    np.testing.assert_allclose(gbnn_apply(fit.params, jnp.ones((1, 2))), [[1.0]], atol=0.1)
    assert np.isfinite(fit.train_loss).all()


X, Y = np.ones((4, 2), np.float32), np.array([0.0, 1, 0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"subsample": 0.0}, "subsample"),
        ({"subsample": 1.5}, "subsample"),
        ({"n_steps": 0}, "n_steps"),
        ({"units_per_step": 0}, "units_per_step"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"block": 0}, "block"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"x": X * np.nan}, "x must be finite"),
        ({"x": X[0]}, r"x must be \[rows, inputs\]"),
        ({"x": X[:3]}, "3 rows and y 4"),
        ({"y": Y * np.nan}, "y must be finite"),
        ({"loss": "logistic", "y": np.ones(4, int)}, "at least two classes"),
        ({"sample_weight": np.array([1.0, -1, 1, 1])}, ">= 0"),
        ({"sample_weight": np.zeros(4)}, "not zero for all"),
        ({"sample_weight": np.ones(3)}, r"shape \(4,\)"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": X, "y": Y, "key": jax.random.key(0), "n_steps": 1} | change
    with pytest.raises(ValueError, match=message):
        gbnn_fit(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize("m", [-1, 7])
def test_more_steps_than_there_are(m):
    with pytest.raises(ValueError, match="n_active must be 0 to 6"):
        gbnn_apply(fitted().params, data()[0], n_active=m)
    with pytest.raises(ValueError, match="n_active must be 0 to 6"):
        gbnn_to_mlp(fitted().params, n_active=m)


def test_continuing_another_shape_is_refused():
    x, y = data()
    with pytest.raises(ValueError, match=r"initial.w1 must be \[T, 4, 1\]"):
        gbnn_fit(x, y, **(SMALL | {"units_per_step": 1}), initial=fitted().params)


def test_as_a_module():
    x, y = data()
    network = SwitchableNetwork(fitted().params)
    np.testing.assert_array_equal(network(x, n_active=2), gbnn_apply(fitted().params, x, n_active=2))
    graph, state = nnx.split(network)

    def loss(state):
        return jnp.mean((nnx.merge(graph, state)(x)[:, 0] - y) ** 2)

    slopes = jax.grad(loss)(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert float(jnp.abs(slopes["w1"][...]).max()) > 0
