"""The settings of EfficientVLA, and its schedule of full denoising steps."""

import pytest

from jaxaccel.caching import uniform_schedule
from jaxaccel.caching.efficient_vla import EfficientVLAConfig, cache_schedule


def test_nothing_is_left_out_by_default():
    config = EfficientVLAConfig()
    assert (config.num_drop_layers, config.num_keep_tokens, config.cache_interval, config.mlp_keep_ratio) == (
        0,
        None,
        1,
        1.0,
    )
    assert hash(config) == hash(EfficientVLAConfig())


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 10, 20])
def test_full_steps_are_counted_from_the_first(interval):
    """As in uniform schedules of branches, which are stored by noise: the first executed step comes last there."""
    schedule = cache_schedule(10, interval=interval)
    assert schedule[0] is True
    assert sum(schedule) == -(-10 // interval)
    assert schedule == tuple(row[0] for row in uniform_schedule(10, 4, interval=interval).rows)[::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_drop_layers": -1}, "num_drop_layers is -1"),
        ({"num_keep_tokens": 3}, "num_keep_tokens is 3, expected at least num_key = 4"),
        ({"num_key": 0}, "num_key is 0"),
        ({"task_ratio": 1.5}, "task_ratio is 1.5"),
        ({"task_ratio": float("nan")}, "task_ratio is nan"),
        ({"cache_interval": 0}, "cache_interval is 0"),
        ({"mlp_keep_ratio": 0.0}, "mlp_keep_ratio is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EfficientVLAConfig(**change)


@pytest.mark.parametrize(("steps", "interval"), [(0, 1), (10, 0), (10, -2)])
def test_schedules_that_make_no_sense_are_refused(steps, interval):
    with pytest.raises(ValueError, match="at least 1"):
        cache_schedule(steps, interval=interval)
