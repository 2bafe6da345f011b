"""MiniGrid's interface without its package: what is read, how a run goes, and what is refused."""

import dataclasses
import importlib.util
import itertools
import sys
import types

import numpy as np
import pytest

from experiments import gbrl
from experiments.data import minigrid
from experiments.data.hub import DataError
from jaxaccel.boosting.gbrl_agents import PPO


def observed(count, seed=0, mission="open the door"):
    """Views as MiniGrid gives them: object, colour and state of each cell."""
    rng = np.random.default_rng(seed)
    limits = (minigrid.OBJECTS, minigrid.COLOURS, minigrid.STATES)
    image = np.stack([rng.integers(0, n, (count, minigrid.VIEW, minigrid.VIEW)) for n in limits], -1)
    return {"image": image.astype(np.uint8), "direction": rng.integers(0, 4, count), "mission": (mission,) * count}


def test_every_view_has_a_code_of_its_own():
    """Cells that differ in anything differ in their code, and codes are below the number of categories."""
    kinds = list(itertools.product(*map(range, (minigrid.OBJECTS, minigrid.COLOURS, minigrid.STATES))))
    views = observed(len(kinds))
    views["image"][:] = np.array(kinds)[:, None, None]
    codes = minigrid.encoder()(views)
    assert codes.shape == (len(kinds), len(minigrid.CATEGORIES))
    assert len(set(codes[:, 0])) == len(kinds)
    assert (codes.max(0) < np.array(minigrid.CATEGORIES)).all()
    assert (codes >= 0).all()


def test_missions_are_numbered_as_they_come_and_views_of_ended_episodes_are_read():
    encode = minigrid.encoder()
    assert encode(observed(2))[:, -1].tolist() == [0, 0]
    assert encode(observed(2, mission="fetch the key"))[:, -1].tolist() == [1, 1]
    many = observed(2, seed=3)
    ended = np.empty(2, object)
    ended[:] = [{name: values[i] for name, values in many.items()} for i in range(2)]
    np.testing.assert_array_equal(encode(ended), encode(many))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mission": None}, "lacks mission"),
        ({"image": np.zeros((2, 7, 7), int)}, r"images have shape \(2, 7, 7\), expected \[N, 7, 7, 3\]"),
        ({"image": np.zeros((2, 5, 5, 3), int)}, r"shape \(2, 5, 5, 3\)"),
    ],
)
def test_other_observations_are_refused(change, message):
    views = observed(2) | change
    views = {name: value for name, value in views.items() if value is not None}
    with pytest.raises(DataError, match=message):
        minigrid.encoder()(views)


def test_too_many_missions_are_refused():
    views = observed(minigrid.MISSIONS + 1)
    views["mission"] = tuple(f"mission {i}" for i in range(minigrid.MISSIONS + 1))
    with pytest.raises(DataError, match=r"more than 64 missions, the last is 'mission 64'"):
        minigrid.encoder()(views)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="MiniGrid-X needs gymnasium and minigrid: pip install gymnasium minigrid"):
        minigrid.make("MiniGrid-X", 2)


class Views:
    """Environments side by side, whose first cell says which of two actions is rewarded; episodes of 4 steps."""

    metadata = types.MappingProxyType({"autoreset_mode": "NEXT_STEP"})
    single_action_space = type("Discrete", (types.SimpleNamespace,), {})(n=2)

    def __init__(self, count):
        self.count = count

    def reset(self, *, seed):
        self.rng, self.time, self.over = (
            np.random.default_rng(seed),
            np.zeros(self.count, int),
            np.zeros(self.count, bool),
        )
        return self.look(), {}

    def look(self):
        views = observed(self.count, seed=int(self.rng.integers(1 << 30)))
        views["image"][:] = 1
        self.right = self.rng.integers(0, 2, self.count)
        views["image"][:, 0, 0, 0] = self.right
        return views

    def step(self, actions):
        reward = (actions == self.right) * 1.0
        reward[self.over] = 0
        self.time = np.where(self.over, 0, self.time + 1)
        self.over = self.time >= 4
        return self.look(), reward, self.over.copy(), np.zeros(self.count, bool), {}


@pytest.fixture
def package(monkeypatch):
    """Gymnasium and MiniGrid as far as they are used."""

    class Error(Exception):
        pass

    def make_vec(name, *, num_envs, vectorization_mode):
        assert vectorization_mode == "sync"
        if name != "MiniGrid-Two-v0":
            raise Error("no such environment")
        return Views(num_envs)

    fakes = {"gymnasium": types.SimpleNamespace(make_vec=make_vec, error=types.SimpleNamespace(Error=Error)),
             "minigrid": types.SimpleNamespace()}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_an_environment_that_does_not_exist(package):
    with pytest.raises(DataError, match="MiniGrid-None: no such environment"):
        minigrid.make("MiniGrid-None", 2)


@pytest.mark.parametrize("arm", gbrl.ARMS)
def test_both_arms_learn_from_views(package, monkeypatch, arm):
    agent = PPO(envs=4, steps=16, batch_size=32, epochs=2)
    trees = dataclasses.replace(gbrl.MINIGRID.trees, max_depth=2, n_bins=4)
    monkeypatch.setattr(gbrl, "MINIGRID", gbrl.Task(agent, trees))
    steps = 20 * agent.rows
    found = gbrl.in_minigrid(arm, "MiniGrid-Two-v0", steps)({"GBRL": 2.0, "network": 1e-2}[arm], 0)
    assert len(found["curve"]) == gbrl.POINTS
    assert found["final"] > 3  # of 4; chance gives 2
    assert found["curve"][0] < found["final"]
