"""The Pareto front against brute force, the search against enumeration, timing in turn."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel.forecasting.pareto import Student, median_seconds, pareto_front, search_student_shapes

SPACE = {"layers": (1, 2, 3, 4, 6, 8), "width": (32, 64, 128, 256, 512), "heads": (1, 2, 4, 8)}


def evaluate(shape):
    """A front that is known: heads cost nothing and give the most at 4; width and depth cost and give."""
    quality = np.log(shape["layers"]) + np.log(shape["width"]) - 0.3 * abs(np.log2(shape["heads"]) - 2)
    return quality, shape["layers"] * shape["width"] ** 1.5


def dominates(one, other):
    return one[0] >= other[0] and one[1] <= other[1] and (one[0] > other[0] or one[1] < other[1])


def brute_force(points):
    return [not any(dominates(other, point) for other in points) for point in points]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [4, 10**6], ids=["many ties", "no ties"])
def test_front_equals_brute_force(seed, levels):
    points = np.random.default_rng(seed).integers(0, levels, (60, 2)).astype(float)
    assert pareto_front(points, (True, False)).tolist() == brute_force(points.tolist())


def test_directions_and_more_objectives():
    points = np.random.default_rng(0).normal(size=(50, 3))
    front = pareto_front(points, (True, False, True))
    np.testing.assert_array_equal(front, pareto_front(points * [1, -1, 1], (True,) * 3))
    np.testing.assert_array_equal(front, pareto_front(np.exp(points), (True, False, True)))  # order alone counts
    assert 3 <= front.sum() < 50
    assert front[points[:, 0].argmax()]
    assert pareto_front(points[:, :1], (False,)).tolist() == (points[:, 0] == points[:, 0].min()).tolist()


def test_equal_points_stay_together_and_infinity_is_a_value():
    assert pareto_front([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]], (True, False)).tolist() == [True, True, False]
    assert pareto_front([[1.0, np.inf], [0.5, 1.0], [-np.inf, 1.0]], (True, False)).tolist() == [True, True, False]
    assert pareto_front(np.zeros((0, 2)), (True, False)).shape == (0,)


def test_the_whole_space_is_enumerated_once():
    seen = []
    found = search_student_shapes(SPACE, lambda shape: seen.append(shape) or evaluate(shape))
    assert len(found.points) == len(seen) == 6 * 5 * 4
    assert len({tuple(shape.values()) for shape in seen}) == len(seen)
    assert all(point == Student(point.shape, *evaluate(point.shape)) for point in found.points)
    values = [(point.quality, point.latency) for point in found.points]
    best = [point for point, is_best in zip(found.points, brute_force(values), strict=True) if is_best]
    assert found.front == sorted(best, key=lambda point: point.latency)
    assert {point.shape["heads"] for point in found.front} == {4}
    assert search_student_shapes(SPACE, evaluate, num_evaluations=120).points == found.points


def test_a_search_finds_more_than_chance():
    truth = search_student_shapes(SPACE, evaluate)
    shapes = [point.shape for point in truth.front]

    def share(random_fraction):
        """Share of the front that half of the space's evaluations find, over eight seeds."""
        hits = 0
        for seed in range(8):
            found = search_student_shapes(
                SPACE, evaluate, num_evaluations=60, random_fraction=random_fraction, seed=seed
            )
            assert len({tuple(point.shape.values()) for point in found.points}) == len(found.points) == 60
            hits += sum(point.shape in shapes for point in found.points)
        return hits / (8 * len(shapes))

    # By chance each of 17 points is found in half of the searches: 0.5 ± 0.03 over 8 of them.
    assert abs(share(1.0) - 0.5) < 0.12
    assert share(0.2) > 0.7


def test_the_same_seed_gives_the_same_search():
    def run(seed):
        return search_student_shapes(SPACE, evaluate, num_evaluations=20, seed=seed).points

    assert run(3) == run(3) == run(np.random.default_rng(3))
    assert run(3) != run(4)


def test_forbidden_shapes_are_not_evaluated():
    def is_allowed(shape):
        return shape["heads"] * shape["layers"] <= 8

    for count in (None, 30):
        found = search_student_shapes(SPACE, evaluate, num_evaluations=count, is_allowed=is_allowed)
        assert all(is_allowed(point.shape) for point in found.points)
        assert len(found.points) == (count or 5 * sum(h * d <= 8 for h in SPACE["heads"] for d in SPACE["layers"]))


def test_a_search_ends_where_all_allowed_shapes_are_known():
    found = search_student_shapes(
        SPACE, evaluate, num_evaluations=50, is_allowed=lambda s: s["heads"] == 1 and s["width"] == 32
    )
    assert len(found.points) == 6
    with pytest.raises(ValueError, match="is_allowed is false for every shape"):
        search_student_shapes(SPACE, evaluate, num_evaluations=5, is_allowed=lambda shape: False)
    with pytest.raises(ValueError, match="is_allowed is false for every shape"):
        search_student_shapes(SPACE, evaluate, is_allowed=lambda shape: False)


def test_axes_without_a_choice_and_any_values():
    space = {"activation": (jnp.tanh, jax.nn.relu), "sizes": ([1], [1, 2], [3]), "only": ("x",)}
    found = search_student_shapes(space, lambda s: (len(s["sizes"]), 1.0), num_evaluations=5, random_fraction=0.2)
    assert len(found.points) == 5
    assert {point.shape["only"] for point in found.points} == {"x"}


def test_evaluate_cannot_change_what_is_recorded():
    def careless(shape):
        result = evaluate(shape)
        shape.clear()
        return result

    assert search_student_shapes(SPACE, careless).points[0].shape == {"layers": 1, "width": 32, "heads": 1}


def test_calls_are_timed_in_turn():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return run

    found = median_seconds({"short": call("s", 0.002), "long": call("l", 0.02)}, repeats=3, min_seconds=0.0)
    assert order == ["s", "s", "l", "l"] + ["s", "l"] * 3
    # sleep lasts at least as long as it is told
    assert 0.002 <= found["short"] < found["long"]
    assert found["long"] >= 0.02


def test_short_calls_are_repeated_within_one_measurement():
    calls = []
    multiply = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    found = median_seconds({"x": lambda: calls.append(0) or multiply(x)}, repeats=2, min_seconds=0.01)
    assert 0 < found["x"] < 0.01
    assert len(calls) > 2 + 2


def test_a_measured_latency_puts_the_larger_model_behind():
    def latency(shape):
        x = jnp.ones((shape["width"], shape["width"]))
        model = jax.jit(lambda x: jax.lax.fori_loop(0, shape["layers"], lambda _, y: jnp.tanh(y @ x), x))
        seconds = median_seconds({"model": lambda: model(x)}, repeats=3, min_seconds=0.0)["model"]
        return 1.0, seconds  # of equal quality

    found = search_student_shapes({"layers": (1, 64), "width": (128,)}, latency)
    assert [point.shape["layers"] for point in found.front] == [1]  # 64 times the work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"layers": (1,), "width": ()}}, "space has no choices for 'width'"),
        ({"num_evaluations": 0}, "num_evaluations is 0"),
        ({"random_fraction": 0.0}, r"random_fraction is 0.0, expected a fraction in \(0, 1\]"),
        ({"evaluate": lambda shape: (float("nan"), 1.0)}, "quality nan and latency 1.0 for {'layers': 1, 'width': 32"),
        ({"evaluate": lambda shape: (1.0, float("nan"))}, "latency nan"),
    ],
)
def test_wrong_calls_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_student_shapes(**{"space": SPACE, "evaluate": evaluate, **arguments})


def test_wrong_points_and_timings_are_explained():
    with pytest.raises(ValueError, match=r"values has shape \(3,\), expected \[N, 2\]"):
        pareto_front(np.arange(3.0), (True, False))
    with pytest.raises(ValueError, match=r"values has shape \(1, 2\), expected \[N, 3\]"):
        pareto_front([[1.0, 2.0]], (True, False, True))
    with pytest.raises(ValueError, match="values has NaN in row 1"):
        pareto_front([[1.0, 2.0], [np.nan, 2.0]], (True, False))
    with pytest.raises(ValueError, match="repeats is 0"):
        median_seconds({}, repeats=0)
    with pytest.raises(ValueError, match="min_seconds is -1"):
        median_seconds({}, min_seconds=-1)
