"""Every benchmark in its smallest form: it runs, and its goals are read rightly. Speeds are not asserted here."""

import json

import pytest

from experiments import benchmarks
from experiments.benchmarks import BenchOptions, Measurement, discovery, optimizers, runner


@pytest.fixture(autouse=True)
def small(monkeypatch, task):
    monkeypatch.setattr(optimizers, "PARAMETERS", 400)
    monkeypatch.setattr(optimizers, "LEAVES", (2, 4))
    monkeypatch.setattr(optimizers, "TINY_LEAVES", (4, 400))
    monkeypatch.setattr(runner, "tasks", lambda: (task(), task(steps_per_dispatch=1)))
    monkeypatch.setattr(
        discovery, "LionSearchConfig", lambda config=discovery.LionSearchConfig: config(steps=5, width=4)
    )


@pytest.mark.parametrize("name", benchmarks.MODULES)
def test_benchmark_gives_ratios_and_writes_them(name, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert benchmarks.run([name], BenchOptions(repeats=3, out=out)) == 0
    found = json.loads(out.read_text())
    assert found
    for measurement in found:
        assert measurement["ratio"] > 0
        low, high = measurement["interval"]
        assert 0 < low <= high
    assert "ratios of medians" in capsys.readouterr().out


def test_goals():
    assert Measurement("a", 1.1, None, "<= 1.10").met is True
    assert Measurement("a", 1.11, None, "<= 1.10").met is False
    assert Measurement("a", 3.0, None, ">= 2").met is True
    assert Measurement("a", 3.0, None).met is None
