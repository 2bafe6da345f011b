"""Agents: their losses by hand and by other libraries, rollouts, both kinds of environments, and what they refuse."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxaccel.boosting import gbrl_losses as losses
from jaxaccel.boosting.gbrl_actor_critic import TreeActorCritic
from jaxaccel.boosting.gbrl_agents import A2C, AWR, PPO, agent_init, train_step
from jaxaccel.boosting.gbrl_gymnasium import CategoryEncoder, gbrl_gymnasium
from jaxaccel.boosting.gbrl_losses import Batch, Categorical, Gaussian, UnsupportedActionSpaceError, gae, row_gradients

RNG = np.random.default_rng(0)
N = 12


def batch_of(policy):
    action = RNG.integers(0, 3, N) if isinstance(policy, Categorical) else RNG.normal(size=(N, 2)).astype(np.float32)
    floats = RNG.normal(size=(3, N)).astype(np.float32)
    return Batch(jnp.asarray(action), jnp.asarray(floats[0] * 0.1 - 1), jnp.asarray(floats[1]), jnp.asarray(floats[2]))


@pytest.mark.parametrize("loss", [losses.ppo_loss, losses.a2c_loss, losses.awr_loss])
@pytest.mark.parametrize("policy", [Categorical(3), Gaussian(2)])
def test_gradients_of_rows(loss, policy):
    batch, log_std = batch_of(policy), jnp.array([-0.3, 0.2]) if isinstance(policy, Gaussian) else None
    outputs = jnp.asarray(RNG.normal(size=(N, policy.outputs + 1)), jnp.float32)
    settings = {"policy": policy, "entropy_coefficient": 0.1}
    gradients, slope, _ = row_gradients(loss, outputs, batch, log_std=log_std, **settings)
    assert gradients.shape == outputs.shape

    def whole(outputs):
        return loss(outputs[:, :-1], outputs[:, -1], batch, log_std=log_std, **settings)

    np.testing.assert_allclose(gradients, N * jax.grad(whole)(outputs), rtol=1e-6)
    check_grads(whole, (outputs,), 1, modes=["rev"], rtol=2e-2, atol=2e-2)  # differences in float32
    assert (slope is None) == isinstance(policy, Categorical)
    value_error = outputs[:, -1] - batch.target
    factor = {losses.ppo_loss: 0.5, losses.a2c_loss: 1.0, losses.awr_loss: 2 * 0.872}[loss]
    np.testing.assert_allclose(gradients[:, -1], factor * value_error, rtol=1e-5, atol=1e-6)


def test_policy_gradients_in_closed_form():
    policy = Categorical(3)
    batch = batch_of(policy)
    outputs = jnp.asarray(RNG.normal(size=(N, 4)), jnp.float32)
    chance, chosen = jax.nn.softmax(outputs[:, :3]), jax.nn.one_hot(batch.action, 3)
    logs = jax.nn.log_softmax(outputs[:, :3])[jnp.arange(N), batch.action]
    a2c, _, value = row_gradients(losses.a2c_loss, outputs, batch, policy=policy)
    np.testing.assert_allclose(a2c[:, :3], (chance - chosen) * batch.advantage[:, None], rtol=1e-5, atol=1e-6)
    by_optax = optax.softmax_cross_entropy_with_integer_labels(outputs[:, :3], batch.action) * batch.advantage
    squares = (outputs[:, 3] - batch.target) ** 2
    np.testing.assert_allclose(value, jnp.mean(by_optax + 0.5 * squares), rtol=1e-5)
    weight = jnp.minimum(jnp.exp(batch.advantage / 0.05), 20)
    awr, _, _ = row_gradients(losses.awr_loss, outputs, batch, policy=policy)
    np.testing.assert_allclose(awr[:, :3], (chance - chosen) * weight[:, None], rtol=1e-4, atol=1e-5)
    ratio, advantage = jnp.exp(logs - batch.log_prob), batch.advantage
    inside = jnp.where(advantage > 0, ratio < 1.2, ratio > 0.8)
    ppo, _, _ = row_gradients(losses.ppo_loss, outputs, batch, policy=policy, normalise=False)
    expected = jnp.where(inside, ratio * advantage, 0)[:, None] * (chance - chosen)
    np.testing.assert_allclose(ppo[:, :3], expected, rtol=1e-4, atol=1e-5)
    assert 0 < int(inside.sum()) < N  # both cases are seen


def test_distributions():
    theta, log_std = jnp.array([[0.5, -1.0]]), jnp.array([-0.3, 0.2])
    action = jnp.array([[0.1, 0.3]])
    normal = jax.scipy.stats.norm.logpdf(action, theta, jnp.exp(log_std)).sum(1)
    np.testing.assert_allclose(Gaussian(2).log_prob(theta, action, log_std), normal, rtol=1e-6)
    many = jnp.broadcast_to(theta, (4000, 2))
    drawn = Gaussian(2).sample(jax.random.key(0), many, log_std)
    np.testing.assert_allclose(drawn.mean(0), theta[0], atol=0.1)  # five deviations of the mean
    minus = -Gaussian(2).log_prob(many, drawn, log_std).mean()
    np.testing.assert_allclose(minus, Gaussian(2).entropy(theta, log_std)[0], atol=0.1)
    flat = Categorical(4)
    np.testing.assert_allclose(flat.entropy(jnp.zeros((1, 4)), None), np.log(4), rtol=1e-6)
    assert flat.best(jnp.eye(4)).tolist() == [0, 1, 2, 3]
    counts = np.bincount(flat.sample(jax.random.key(1), jnp.zeros((4000, 4)), None))
    np.testing.assert_allclose(counts / 4000, 0.25, atol=0.04)


def test_gae_by_its_definition_and_limits():
    t, gamma, lam = 9, 0.9, 0.7
    reward, value, following = (jnp.asarray(a, jnp.float32) for a in RNG.normal(size=(3, t, 2)))
    terminated = jnp.zeros((t, 2), bool).at[3, 0].set(True)
    done = terminated.at[5, 1].set(True)
    advantage, target = gae(reward, value, following, terminated, done, gamma=gamma, lam=lam)
    expected = np.zeros((t, 2))
    for n in range(2):
        for i in range(t):
            factor = 1.0
            for j in range(i, t):
                future = 0 if terminated[j, n] else gamma * following[j, n]
                expected[i, n] += factor * (reward[j, n] + future - value[j, n])
                if done[j, n]:
                    break
                factor *= gamma * lam
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, expected + value, rtol=1e-4, atol=1e-5)
    one_step, _ = gae(reward, value, following, terminated, done, gamma=gamma, lam=0.0)
    np.testing.assert_allclose(one_step, reward + gamma * following * ~terminated - value, rtol=1e-5, atol=1e-6)


# Environments ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bandit:
    """A state of two numbers for four steps; the right action has its first number's sign."""

    policy: object = Categorical(2)
    n_features: int = 2
    categorical: tuple[int, ...] = ()

    def reset(self, key):
        obs = jax.random.uniform(key, (2,), minval=-1.0)
        return (obs, jnp.zeros((), jnp.int32)), obs

    def step(self, key, state, action):
        obs, time = state
        if isinstance(self.policy, Categorical):
            reward = jnp.where((action == 1) == (obs[0] > 0), 1.0, 0.0)
        else:
            reward = -((action[0] - obs[0]) ** 2)
        new = jax.random.uniform(key, (2,), minval=-1.0)
        return (new, time + 1), new, reward, time >= 3, jnp.zeros((), bool)


def trees(**settings):
    return TreeActorCritic(
        **({"capacity": 400, "max_depth": 2, "n_bins": 8, "policy_rate": 0.3, "value_rate": 0.1} | settings)
    )


def follow(env, model, agent, steps):
    state, found = agent_init(env, model, agent, jax.random.key(0)), []
    for _ in range(steps):
        state, metrics = train_step(state, env, model, agent)
        found.append(float(metrics.returns) / float(metrics.episodes))
    return state, found


def test_ppo_learns_inside_jit_and_what_it_keeps_up_to_date_is_what_trees_say():
    env, model, agent = Bandit(), trees(), PPO(envs=8, steps=8, batch_size=16, epochs=2)
    state, returns = follow(env, model, agent, 12)
    assert returns[0] < 2.6 < 3 < np.mean(returns[-4:]) <= 4  # chance gives 2; of 64 episodes
    assert int(state.params[0].n_trees) == 12 * agent.updates_per_step
    obs = jnp.asarray(RNG.uniform(-1, 1, (64, 2)), jnp.float32)
    gradients = jnp.asarray(RNG.normal(size=(64, 3)), jnp.float32)
    before, after = model.apply(state.params, obs), model.update(state.params, obs, gradients)
    np.testing.assert_allclose(model.advance(after, obs, before), model.apply(after, obs), atol=1e-5)
    # the same key gives the same run
    again, repeated = follow(env, model, agent, 1)
    assert repeated == returns[:1]
    with pytest.raises(ValueError, match="batch sizes must not change in a run"):
        train_step(again, env, model, dataclasses.replace(agent, batch_size=32))
    with pytest.raises(ValueError, match="capacity is 4, and 0 trees are grown: expected room for 8 more"):
        follow(env, trees(capacity=4), agent, 1)


def test_awr_learns_numbers_with_two_ensembles_and_adam():
    env = Bandit(policy=Gaussian(1, -1.0, 1.0))
    model = trees(shared=False, policy_rate=0.05, value_rate=0.05, optimizer="adam")
    agent = AWR(envs=8, steps=8, batch_size=64, updates=4, rollouts=3, log_std=-1.0, beta=0.3)
    state, returns = follow(env, model, agent, 10)
    assert np.mean(returns[-3:]) > np.mean(returns[:3]) + 0.2
    assert [int(s.n_trees) for s in state.params] == [40, 40]
    assert state.memory.obs.shape == (3, 8, 8, 2)
    assert bool(jnp.isfinite(state.log_std).all())
    assert float(state.log_std[0]) != -1.0


class Vector:
    """Three environments of Gymnasium's interface: states are words, episodes of 2, 3 and 4 steps."""

    def __init__(self, mode="NEXT_STEP", space=None, shrink=False):
        self.single_action_space = space or make_space("Discrete", n=2)
        self.metadata, self.shrink = {"autoreset_mode": mode}, shrink
        self.lengths = np.array([2, 3, 4])

    def observe(self):
        words = np.array([["left", "red"], ["right", "red"], ["right", "blue"]])[self.rng.integers(0, 3, 3)]
        return words[:2] if self.shrink and self.calls > 2 else words

    def reset(self, *, seed):
        self.rng, self.calls = np.random.default_rng(seed), 0
        self.time, self.over = np.zeros(3, int), np.zeros(3, bool)
        self.obs = self.observe()
        return self.obs, {}

    def step(self, actions):
        assert actions.shape == (3,)
        self.calls += 1
        reward = ((actions == 1) == (self.obs[:, 0] == "right")).astype(float)
        reward[self.over] = 0
        self.time = np.where(self.over, 0, self.time + 1)
        done, infos = self.time >= self.lengths, {}
        self.obs = self.observe()
        if "SAME" in self.metadata["autoreset_mode"]:
            final = np.empty(3, object)
            final[:] = list(self.obs)
            infos, self.time = {"final_obs": final}, np.where(done, 0, self.time)
        else:
            self.over = done
        return self.obs, reward, done & (self.lengths < 4), done & (self.lengths == 4), infos


def make_space(name, **fields):
    return type(name, (types.SimpleNamespace,), {})(**fields)


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_vectors_of_gymnasium_environments(mode):
    agent = A2C(envs=3, steps=12, gamma=0.0)
    found = []
    for state, metrics in gbrl_gymnasium(
        Vector(mode), trees(policy_rate=2.0), agent, iterations=8, encode=CategoryEncoder(), categorical=(0, 1)
    ):
        found.append((metrics.episodes, metrics.returns, int(state.params[0].n_trees)))
    assert found[-1][2] == 8
    # A reset takes a step of its own, or none: 12 steps hold 4 + 3 + 2 episodes, or 6 + 4 + 3.
    assert found[0][0] == {"NEXT_STEP": 4 + 3 + 2, "SAME_STEP": 6 + 4 + 3}[mode]
    best = {"NEXT_STEP": 4 * 2 + 3 * 3 + 2 * 4, "SAME_STEP": 36}[mode]
    share = [returns / best for _, returns, _ in found]
    assert share[-1] > 0.9 > share[0]


@pytest.mark.parametrize(
    ("envs", "change", "message"),
    [
        (Vector(shrink=True), {}, r"observations have shape \(2, 2\), expected \(3, 2\) at every step"),
        (Vector(), {"agent": A2C(envs=4)}, r"observations have shape \(3, 2\), expected \(4, columns\)"),
        (Vector("DISABLED"), {}, "autoreset_mode is disabled"),
        (Vector(), {"iterations": 0}, "iterations is 0"),
        (Vector(), {"model": trees(capacity=1), "iterations": 2}, "capacity is 1, and 1 trees are grown"),
        (Vector(), {"encode": lambda t: np.full((3, 2), np.nan)}, "observations must be finite"),
    ],
)
def test_what_a_run_refuses(envs, change, message):
    settings = {"agent": A2C(envs=3, steps=4), "iterations": 1, "model": trees(), "encode": CategoryEncoder()} | change
    agent, model = settings.pop("agent"), settings.pop("model")
    with pytest.raises(ValueError, match=message):
        list(gbrl_gymnasium(envs, model, agent, **settings))


def test_action_spaces():
    box = {"shape": (2,), "dtype": np.float32, "low": np.array([-1, -2]), "high": np.array([1, 2])}
    assert losses.policy_of(make_space("Box", **box)) == Gaussian(2, -2.0, 2.0)
    assert losses.policy_of(make_space("Discrete", n=5)) == Categorical(5)
    for space in (
        make_space("MultiDiscrete", nvec=[2, 3]), make_space("MultiBinary", n=3), make_space("Dict", spaces={}),
        make_space("Discrete", n=3, start=1), make_space("Box", **(box | {"shape": (2, 2)})),
        make_space("Box", **(box | {"dtype": np.uint8})),
    ):  # fmt: skip
        with pytest.raises(UnsupportedActionSpaceError, match="the action space is"):
            losses.policy_of(space)
        with pytest.raises(UnsupportedActionSpaceError, match="the action space is"):
            next(gbrl_gymnasium(Vector(space=space), trees(), A2C(envs=3), iterations=1))
    with pytest.raises(UnsupportedActionSpaceError, match="policy is 'discrete'"):
        agent_init(Bandit(policy="discrete"), trees(), A2C(), jax.random.key(0))
    for make in (lambda: Categorical(1), lambda: Gaussian(0), lambda: Gaussian(2, 1.0, 0.0)):
        with pytest.raises(UnsupportedActionSpaceError):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPO(batch_size=100), "batch_size is 100, expected a divisor of the 1024 rows"),
        (lambda: PPO(epochs=0), "epochs is 0"),
        (lambda: A2C(envs=True), "envs is True"),
        (lambda: AWR(gamma=1.5), "gamma and lam are 1.5"),
        (lambda: CategoryEncoder()(np.zeros(3)), r"the table has shape \(3,\)"),
        (lambda: row_gradients(losses.a2c_loss, jnp.zeros((N, 3)), batch_of(Categorical(3)), policy=Categorical(3)),
         r"outputs have shape \(12, 3\), expected \(12, 4\)"),
        (lambda: row_gradients(losses.a2c_loss, jnp.zeros((N, 3)), batch_of(Gaussian(2)), policy=Gaussian(2)),
         r"log_std is None, expected shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    encode = CategoryEncoder()
    encode(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="the table has 3 columns, expected 2"):
        encode(np.zeros((1, 3)))
