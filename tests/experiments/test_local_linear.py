"""Experiments of local linear attention: streams and tables are as described, estimators equal independent forms."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from experiments import local_linear_in_context as in_context
from experiments import local_linear_methods as methods
from experiments import local_linear_regression as regression
from experiments.runner.cost import Timing
from experiments.runner.train import Arm
from tests.experiments.test_sweep import trial

# float32 keeps 24 bits; these are sums of some ten products and solves of 4 x 4 systems.
FLOAT32 = 2e-4


@pytest.fixture(scope="module")
def stream():
    keys, values = methods.piecewise_streams(3, 2, segments=2, length=16, size=4)
    return keys, values


# Streams --------------------------------------------------------------------------------------------------------------


def test_streams_have_the_stated_pieces_noise_and_keys():
    segments, size = 3, 4
    keys, values = methods.piecewise_streams(0, 20, segments=segments, length=600, size=size)
    assert keys.shape == values.shape == (20, 600, size)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, atol=1e-6)
    pieces = list(zip(*(x.reshape(-1, 600 // segments, size) for x in (keys, values)), strict=True))
    maps, left = [], []
    for k, v in pieces:
        fit, residual, *_ = np.linalg.lstsq(k.astype(np.float64), v.astype(np.float64), rcond=None)
        maps.append(fit)
        left.append(residual.sum() / (v.size - fit.size))  # unbiased estimate of the noise's variance
    assert np.mean(left) == pytest.approx(methods.NOISE**2, rel=0.02)  # 47,000 degrees of freedom: 0.7 % deviation
    assert np.var(maps) == pytest.approx(
        1 / size, rel=0.25
    )  # 960 entries: 5 % deviation, and keys are not spread evenly
    assert min(np.abs(maps[i] - maps[i + 1]).max() for i in range(len(maps) - 1)) > 0.1  # every piece has its own map
    centres = np.array([k.mean(0) for k, _ in pieces])
    within = np.mean([np.linalg.norm(k - c, axis=1).mean() for (k, _), c in zip(pieces, centres, strict=True)])
    across = np.linalg.norm(centres[:-1] - centres[1:], axis=1).mean()
    assert across > 1.3 * within  # keys move from place to place
    with pytest.raises(ValueError, match=r"segments \(5\) must divide length \(16\)"):
        methods.piecewise_streams(0, 1, segments=5, length=16, size=2)


def test_tuning_streams_are_not_the_scored_ones():
    config = regression.LocalLinearRegressionConfig(
        seeds=3, segments=(1,), length=32, size=2, streams=2, tuning_streams=2
    )
    tuned, scored = set(), set()

    def errors(keys, values):
        tuned.add(np.asarray(keys).tobytes())
        return jnp.stack([jnp.arange(32.0), jnp.zeros(32)])

    def predict(keys, values, setting):
        scored.add(np.asarray(keys).tobytes())
        return values + setting[0]

    contender = types.SimpleNamespace(name="any", errors=errors, grid=((1.0,), (3.0,)))
    parts = [regression.stream_errors(config, [contender], {"any": predict}, 1, seed) for seed in range(3)]
    assert len(tuned) == len(scored) == 3
    assert not tuned & scored
    assert all(part["any"]["setting"] == 1 for part in parts)  # the smaller error
    np.testing.assert_allclose(parts[0]["any"]["errors"], [9.0] * 32, rtol=1e-5)  # of that setting


def test_a_setting_that_fails_is_not_picked():
    config = regression.LocalLinearRegressionConfig(seeds=1, length=4, size=2, segments=(1,))
    contender = types.SimpleNamespace(
        name="any",
        errors=lambda keys, values: jnp.array([[0, 1, jnp.nan, 1], [0, 2.0, 2, 2]]),
        grid=((0.0,), (1.0,)),
    )
    part = regression.stream_errors(config, [contender], {"any": lambda k, v, setting: v}, 1, 0)
    assert part["any"]["setting"] == 1


# Estimators on streams ------------------------------------------------------------------------------------------------


def predictions(name, stream, setting):
    (found,) = [e for e in methods.estimators() if e.name == name]
    return np.asarray(found.predict(*map(jnp.asarray, stream), jnp.asarray(setting, jnp.float32)), np.float64)


def by_position(stream, answer):
    """``answer(keys before, values before, query)`` at every position but the first."""
    return np.stack(
        [
            [
                answer(k[:i].astype(np.float64), v[:i].astype(np.float64), k[i].astype(np.float64))
                for i in range(1, len(k))
            ]
            for k, v in zip(*stream, strict=True)
        ]
    )


def test_softmax_is_nadaraya_watson(stream):
    def answer(keys, values, query):
        weights = np.exp(5 * keys @ query)
        return weights @ values / weights.sum()

    np.testing.assert_allclose(predictions("softmax", stream, (5,))[:, 1:], by_position(stream, answer), atol=FLOAT32)


@pytest.mark.parametrize("forgetting", [1.0, 0.8])
def test_ridge_is_scikit_learns(stream, forgetting):
    name = "ridge" if forgetting == 1 else "forgetting ridge"

    def answer(keys, values, query):
        model = Ridge(alpha=0.3, fit_intercept=False)
        age = np.arange(len(keys))[::-1]  # the latest pair counts whole
        return model.fit(keys, values, sample_weight=forgetting**age).predict(query[None])[0]

    got = predictions(name, stream, (0.3, forgetting))
    np.testing.assert_allclose(got[:, 1:], by_position(stream, answer), atol=FLOAT32)


def test_linear_attention_is_a_mean_of_outer_products(stream):
    def answer(keys, values, query):
        return 3 * np.mean([v * (k @ query) for k, v in zip(keys, values, strict=True)], 0)

    got = predictions("linear attention", stream, (3,))
    np.testing.assert_allclose(got[:, 1:], by_position(stream, answer), atol=FLOAT32)


def test_delta_rule_with_rate_one_recalls_the_last_value(stream):
    """Keys have length 1, so that a full step makes W k = v; without decay and with orthogonal keys it stays so."""
    keys, values = np.tile(np.eye(4, dtype=np.float32), (1, 4, 1)), stream[1][:1]
    got = predictions("delta rule", (keys, values), (1.0, 1.0))
    np.testing.assert_allclose(got[:, 4:], values[:, :-4], atol=FLOAT32)
    decayed = predictions("delta rule", (keys, values), (1.0, 0.9))
    np.testing.assert_allclose(decayed[:, 4:], 0.9**3 * values[:, :-4], atol=FLOAT32)  # three steps lie between


def test_local_linear_is_scikit_learns_weighted_ridge(stream):
    """An intercept, and the ridge times the sum of the weights."""

    def answer(keys, values, query):
        weights = np.exp(5 * keys @ query)
        model = Ridge(alpha=0.3 * weights.sum()).fit(keys, values, sample_weight=weights)
        return model.predict(query[None])[0]

    np.testing.assert_allclose(predictions("LLA", stream, (5, 0.3))[:, 1:], by_position(stream, answer), atol=FLOAT32)


def test_no_estimator_sees_the_value_it_is_asked_for(stream):
    keys, values = stream
    changed = values.copy()
    changed[:, 9] += 100
    for estimator in methods.estimators():
        setting = estimator.grid[len(estimator.grid) // 2]
        one, two = (predictions(estimator.name, (keys, v), setting) for v in (values, changed))
        np.testing.assert_array_equal(one[:, :10], two[:, :10], err_msg=estimator.name)
        assert np.abs(one - two)[:, 10:].max() > 0.01, estimator.name


def test_every_estimator_has_as_many_settings_to_pick_from():
    found = methods.estimators()
    assert {len(set(e.grid)) for e in found} == {24}
    assert len({e.name for e in found}) == len(found)
    assert found[-1].words(0).startswith("scale 0.25, ridge ")


def test_errors_are_means_over_streams_and_channels(stream):
    estimator = methods.Estimator("zero", ("x",), ((0.0,), (2.0,)), lambda k, v, setting: jnp.zeros_like(v) + setting)
    errors = np.asarray(estimator.errors(*map(jnp.asarray, stream)))
    np.testing.assert_allclose(errors[0], (stream[1] ** 2).mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(errors[1], ((stream[1] - 2) ** 2).mean((0, 2)), rtol=1e-5)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_methods_for_tables_are_scikit_learns():
    rows = methods.load_rows("friedman1", 0)
    train, test = np.arange(40), np.arange(40, 60)
    found = methods.table_errors(rows, train, test)
    x = (rows.features - rows.features[train].mean(0)) / rows.features[train].std(0)
    y = (rows.targets - rows.targets[train].mean()) / rows.targets[train].std()

    def error(predicted):
        return np.mean((predicted - y[test]) ** 2)

    i = 20  # ridge of attention is per row: a mean of squares in place of their sum
    linear = Ridge(alpha=methods.FINE[i] * len(train)).fit(x[train], y[train])
    assert found["ridge"][i] == pytest.approx(error(linear.predict(x[test])), rel=FLOAT32)
    kernel = KernelRidge(alpha=methods.KERNEL_RIDGES[1], kernel="rbf", gamma=methods.KERNEL_WIDTHS[2])
    flat = 2 * len(methods.KERNEL_RIDGES) + 1
    assert found["kernel ridge"][flat] == pytest.approx(error(kernel.fit(x[train], y[train]).predict(x[test])))
    sphere = methods.on_sphere(x)
    weights = np.exp(methods.FINE[i] * sphere[test] @ sphere[train].T)
    mean = weights @ y[train] / weights.sum(1)
    assert found["softmax"][i] == pytest.approx(error(mean), rel=FLOAT32)
    scale, ridge = methods.SCALES[3], methods.RIDGES[2]
    answers = []
    for query in sphere[test]:
        w = np.exp(scale * sphere[train] @ query)
        local = Ridge(alpha=ridge * w.sum()).fit(sphere[train], y[train], sample_weight=w)
        answers.append(local.predict(query[None])[0])
    assert found["LLA"][3 * len(methods.RIDGES) + 2] == pytest.approx(error(np.array(answers)), rel=1e-3)


def test_rows_on_the_sphere_have_one_length():
    x = np.random.default_rng(0).normal(size=(9, 4))
    np.testing.assert_allclose(np.linalg.norm(methods.on_sphere(x), axis=1), np.sqrt(8), rtol=1e-12)


def test_every_method_for_tables_has_as_many_settings():
    count = len(methods.SCALES) * len(methods.RIDGES)
    assert len(methods.FINE) == count
    assert len(methods.KERNEL_WIDTHS) * len(methods.KERNEL_RIDGES) == count


def test_settings_of_tables_are_picked_without_the_test_rows(monkeypatch):
    calls = []

    def errors(rows, train, test):
        calls.append((set(train.tolist()), set(test.tolist())))
        first = len(calls) == 1
        return {name: np.array([2.0, 1.0] if first else [10.0, 20.0]) for name in methods.TABLE_METHODS}

    monkeypatch.setattr(methods, "table_errors", errors)
    found = methods.split_errors("diabetes", 5)
    assert set(found.values()) == {20.0}  # the setting that was best inside, although it is worse outside
    (fit, check), (train, test) = calls
    assert fit | check == train
    assert not fit & check
    assert not train & test
    assert (len(train), len(test)) == (331, 111)


def test_unknown_tables_are_refused():
    with pytest.raises(ValueError, match="unknown table 'wine', expected diabetes"):
        methods.load_rows("wine", 0)


# The solver -----------------------------------------------------------------------------------------------------------


def test_solver_errors_are_those_of_the_formats():
    found = methods.solver_errors(1.0, length=48, size=8)
    assert 1 <= found["iterations"] <= found["most iterations"] <= 48
    for name in ("float32, converged", "float32, Cholesky"):
        assert 1e-8 < found[name] < 1e-4  # 24 bits, and residuals of 1e-6
    assert 1e-3 < found["rounding"] < 3e-2  # 8 bits
    assert found["bfloat16, converged"] < 2 * found["rounding"]


# Its analysis ---------------------------------------------------------------------------------------------------------


def known_comparison():
    config = regression.LocalLinearRegressionConfig(seeds=2, segments=(1, 2), length=4, streams=1, ridges=(1.0,))
    contenders = methods.estimators()

    def part(seed, segments):
        error = {"LLA": 0.1, "softmax": 0.2 * segments, "ridge": 0.3}
        return {
            e.name: {"setting": seed, "errors": [99.0] + [error.get(e.name, 0.5) + 0.02 * seed] * 3} for e in contenders
        }

    found = {count: [part(seed, count) for seed in range(2)] for count in config.segments}
    tables = {"diabetes": [{"softmax": 0.6, "ridge": 0.4, "kernel ridge": 0.3, "LLA": 0.5}] * 3}
    # LLA takes twice as long as the others with one piece, and three times as long with two.
    timings = {n: {e.name: Timing((1.0 + n if e.name == "LLA" else 1.0,) * 3) for e in contenders} for n in (1, 2)}
    return regression.compare(config, contenders, found, tables, {1.0: {"iterations": 3.0}}, timings)


def test_regression_on_known_numbers():
    comparison = known_comparison()
    streams, ratios, tables, settings, solver = comparison.tables
    (one,) = [row for row in streams.rows if row[0] == 1]
    assert dict(zip(streams.columns, one, strict=True))["softmax"] == "0.2100 ± 0.0141"  # 0.2 and 0.22
    assert dict(zip(streams.columns, one, strict=True))["LLA"] == "0.1100 ± 0.0141"
    (row,) = tables.rows
    assert row[-1] == "3 / 0 / 0"
    (lla,) = [row for row in settings.rows if row[0] == "LLA"]
    assert lla[2:] == (3000.0, 3.0)
    assert solver.rows == ((1.0, 3.0),)
    rows = {(r["baseline"], r["method_config"]["segments"]): r for r in comparison.rows}
    assert rows["softmax", 1]["speedup"] == 0.5  # LLA is dearer, and the record says so
    assert rows["softmax", 2]["quality"] == pytest.approx(0.11)
    assert rows["softmax", 2]["quality_baseline"] == pytest.approx(0.41)
    columns = ratios.columns.index("softmax"), ratios.columns.index("ridge")
    (two,) = [row for row in ratios.rows if row[0] == 2]
    assert two[columns[0]] == "0.268 ± 0.025"  # 0.1 of 0.4, 0.12 of 0.42
    assert (
        "0.52 / 0.27 / 0.27 times tuned softmax's" in comparison.headline or "0.52 / 0.27 times" in comparison.headline
    )
    assert "diabetes: LLA 0.500, softmax 0.600, ridge 0.400, kernel ridge 0.300" in comparison.headline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": (3,)}, "segments must be positive and divide length 512"),
        ({"segments": ()}, "segments must be positive"),
        ({"segments": (2, 2)}, "segments must differ"),
        ({"ridges": (0.0,)}, "ridges must be positive"),
        ({"streams": 0}, "streams must be at least 1, got 0"),
        ({"tuning_streams": 0}, "tuning_streams must be at least 1"),
        ({"splits": 0}, "splits must be at least 1"),
    ],
)
def test_bad_settings_of_regression(changes, message):
    with pytest.raises(ValueError, match=message):
        regression.LocalLinearRegressionConfig(**changes)


# In context -----------------------------------------------------------------------------------------------------------

SMALL = in_context.LocalLinearInContextConfig(
    seeds=2, tasks=("linear",), size=3, points=5, width=8, layers=1, steps=10, learning_rates=(0.01,), batch_size=4
)


@pytest.mark.parametrize("kind", ["linear", "piecewise"])
def test_functions_have_the_stated_noise_and_shape(kind):
    config = dataclasses.replace(SMALL, points=40, noise=0.2)
    data = in_context.Functions(config, kind).sequences(np.random.default_rng(0), 300)
    left = []
    for x, y in zip(data["x"].astype(np.float64), data["y"].astype(np.float64), strict=True):
        _, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
        left.append(residual.item() / (len(y) - x.shape[1]))
    if kind == "linear":
        assert np.mean(left) == pytest.approx(0.2**2, rel=0.05)  # 11,100 degrees of freedom: 1.3 % deviation
    else:
        assert np.mean(left) > 0.2  # one line does not fit two
    assert data["y"].var() == pytest.approx(1 + 0.2**2, rel=0.1)


def test_functions_can_be_entered_at_any_step():
    data = in_context.Functions(SMALL, "linear")
    both, second = data.chunk(0, 3, 2), data.chunk(0, 4, 1)
    np.testing.assert_array_equal(both["y"][1], second["y"][0])
    assert not np.array_equal(both["y"][0], both["y"][1])


def test_least_squares_is_ridge_regression_on_the_pairs_before():
    data = in_context.Functions(SMALL, "linear").sequences(np.random.default_rng(1), 4)
    got = in_context.least_squares(SMALL, data)
    assert got[0] == pytest.approx(np.mean(data["y"][:, 0] ** 2))
    for i in range(1, SMALL.points):
        errors = []
        for x, y in zip(data["x"].astype(np.float64), data["y"].astype(np.float64), strict=True):
            model = Ridge(alpha=SMALL.noise**2 * SMALL.size, fit_intercept=False).fit(x[:i], y[:i])
            errors.append((model.predict(x[i : i + 1]).item() - y[i]) ** 2)
        assert got[i] == pytest.approx(np.mean(errors))


def test_inputs_hide_the_answer_until_it_is_known():
    data = {"x": jnp.ones((1, 2, 3)), "y": jnp.array([[5.0, 7.0]])}
    tokens = in_context._inputs(data)
    np.testing.assert_array_equal(tokens[0, :, 3:], [[0, 0], [5, 1], [0, 0], [7, 1]])


@pytest.mark.parametrize("kind", list(in_context.ATTENTION))
def test_models_do_not_look_ahead_and_start_alike(kind):
    model = in_context.Transformer(kind, 5, 1, SMALL, rngs=nnx.Rngs(0))
    other = in_context.Transformer("LLA", 5, 1, SMALL, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, other)))
    x = jax.random.normal(jax.random.key(0), (1, 6, 5))
    changed = x.at[:, 4].add(1.0)
    apply = nnx.jit(lambda model, x: model(x))
    one, two = apply(model, x), apply(model, changed)
    np.testing.assert_allclose(one[:, :4], two[:, :4], atol=1e-5)  # iterations of a tile are shared by its rows
    assert np.abs(one - two)[:, 4:].max() > 1e-4


def test_baselines_are_what_they_are_called():
    q, k, v = np.random.default_rng(1).normal(size=(3, 1, 4, 2, 4)).astype(np.float32)
    linear, softmax = (in_context.ATTENTION[n](8, 2, rngs=nnx.Rngs(0)) for n in ("linear attention", "softmax"))
    got = np.asarray(linear.attend(*map(jnp.asarray, (q, k, v)), None))
    for i in range(4):
        mean = sum(v[0, j] * (q[0, i] * k[0, j]).sum(-1, keepdims=True) / 2 for j in range(i + 1)) / (i + 1)
        np.testing.assert_allclose(got[0, i], mean, atol=1e-5)
    expected = jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v)), is_causal=True)
    np.testing.assert_allclose(softmax.attend(*map(jnp.asarray, (q, k, v)), None), expected, atol=1e-6)


def test_recall_in_context_asks_for_scored_values_only():
    config = dataclasses.replace(SMALL, tasks=("recall",), pairs=4, questions=2)
    task = in_context.recall_task(config, "softmax")
    params, state = task.init(jax.random.key(0))
    data = jax.tree.map(lambda leaf: leaf[:32], task.test)
    entropy = jax.jit(lambda data: task.evaluate(params, state, data, jax.random.key(0))["val_loss"])
    assert 0.7 * np.log(97) < float(entropy(data)) < 1.5 * np.log(97)  # untrained: near chance over the vocabulary
    tokens = data["tokens"].copy()
    tokens[:, -1] = 32 + (tokens[:, -1] - 31) % 32  # another answer to the last question, which nothing follows
    assert float(entropy({**data, "tokens": tokens})) != float(entropy(data))
    scored = data["scored"].copy()
    scored[:, -2] = False
    one, two = (float(entropy({"tokens": t, "scored": scored})) for t in (tokens, data["tokens"]))
    assert one == two


def test_in_context_on_known_numbers():
    """At equal time the dearer model is read at an earlier step."""
    sweeps, losses = {}, {"softmax": [0.9, 0.5], "linear attention": [0.9, 0.8], "LLA": [0.6, 0.3]}
    for name, values in losses.items():
        arm = Arm(name, optax.adam, (0.01,), method="local_linear_attention")
        trials = [trial(name, 0.01, seed, values) for seed in range(2)]
        for made in trials:
            made.curves["eval_step"] = np.array([5, 10])
            made.cost["step_s"] = 0.002 if name == "LLA" else 0.001
            made.final.update({f"test_after {i}": values[-1] for i in range(SMALL.points)})
        task = in_context.regression_task(SMALL, "linear", name)
        sweeps["linear", name] = in_context.Sweep(task, (arm,), tuple(trials))
    comparison = in_context.compare(SMALL, sweeps)
    _, equal, _ = comparison.tables
    assert ("linear", "softmax", "0.500 ± 0.000", "50%", "0.600 ± 0.000") in equal.rows
    rows = {row["baseline"]: row for row in comparison.rows}
    assert rows["softmax"]["speedup"] == 0.5
    assert rows["softmax"]["quality"] == pytest.approx(0.3)
    assert rows["softmax"]["quality_baseline"] == pytest.approx(0.5)
    assert "LLA 0.300 ± 0.000, linear attention 0.800 ± 0.000, softmax 0.500" in comparison.headline
    assert "a step takes 2.0 times softmax's" in comparison.headline
    assert "in softmax's time LLA's validation loss is 0.600 ± 0.000, softmax's 0.500 ± 0.000" in comparison.headline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, r"width \(32\) must be a multiple of heads \(3\)"),
        ({"tasks": ()}, "tasks must be one or more different ones"),
        ({"tasks": ("linear", "linear")}, "tasks must be one or more different ones"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"noise": float("nan")}, "noise must be at least 0"),
        ({"pairs": 40}, "<= pairs"),
        ({"learning_rates": ()}, "no learning rates to try"),
        ({"points": 0}, "points must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_in_context(changes, message):
    with pytest.raises(ValueError, match=message):
        in_context.LocalLinearInContextConfig(**changes)
