"""The gbrl package in an interpreter that has it: ``python gbrl_peer.py``, a line of JSON for each question and answer.

It imports nothing of this repository. A question has a ``job`` (``version``, ``update``, ``predict``, ``play`` or
``solved``) and its sizes; the answer has ``seconds``. Models are made once and kept for the next question of their
sizes.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from typing import Any

import numpy as np

MODELS: dict[str, Any] = {}


def tree_settings(job: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tree; threads are never worth it, as the process has one core."""
    return {"max_depth": job["depth"], "grow_policy": "oblivious", "n_bins": job["bins"], "min_data_in_leaf": 0,
            "par_th": 1_000_000_000}  # fmt: skip


SCORE = {"split_score_func": "Cosine", "generator_type": "Quantile", "control_variates": False}


def data(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Observations and gradients that any interpreter draws alike."""
    rng = np.random.default_rng(job["rows"])
    obs = rng.normal(size=(job["rows"], job["columns"])).astype(np.float32)
    return obs, rng.normal(size=(job["rows"], job["outputs"])).astype(np.float32)


def model_of(job: dict[str, Any], trees: int) -> Any:
    """A model with so many trees, grown on `data`."""
    key = json.dumps({n: job[n] for n in ("rows", "columns", "outputs", "depth", "bins")} | {"trees": trees})
    if key not in MODELS:
        gbt = importlib.import_module("gbrl.models.gbt")
        rate = {"algo": "SGD", "lr": job["rate"], "start_idx": 0, "stop_idx": job["outputs"]}
        MODELS[key] = gbt.GBTModel(
            tree_struct=tree_settings(job), input_dim=job["columns"], output_dim=job["outputs"], optimizers=[rate],
            params=dict(SCORE), device="cpu",
        )  # fmt: skip
        obs, gradients = data(job)
        for _ in range(trees):
            MODELS[key].step(X=obs, grads=gradients)
    return MODELS[key]


def update(job: dict[str, Any]) -> float:
    """Seconds of a step."""
    model, (obs, gradients) = model_of(job, 0), data(job)
    began = time.perf_counter()
    for _ in range(job["calls"]):
        model.step(X=obs, grads=gradients)
    return (time.perf_counter() - began) / job["calls"]


def predict(job: dict[str, Any]) -> float:
    """Seconds of a prediction of the first ``some`` rows."""
    model, (obs, _) = model_of(job, job["trees"]), data(job)
    obs = obs[: job["some"]]
    began = time.perf_counter()
    for _ in range(job["calls"]):
        model(obs, requires_grad=False, tensor=False)
    return (time.perf_counter() - began) / job["calls"]


def play(job: dict[str, Any]) -> float:
    """Seconds of a whole run of PPO on CartPole."""
    gymnasium: Any = importlib.import_module("gymnasium")
    torch: Any = importlib.import_module("torch")
    gbrl: Any = importlib.import_module("gbrl.models.actor_critic")
    torch.manual_seed(0)
    count, length = job["envs"], job["steps"]
    envs = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="sync")
    rates = [{"algo": "SGD", "lr": job[name], "start_idx": first, "stop_idx": last}
             for name, first, last in (("policy_rate", 0, 2), ("value_rate", 2, 3))]  # fmt: skip
    model = gbrl.ActorCritic(
        tree_struct=tree_settings(job), input_dim=4, output_dim=3, policy_optimizer=rates[0], value_optimizer=rates[1],
        shared_tree_struct=True, params=dict(SCORE), device="cpu",
    )  # fmt: skip
    began = time.perf_counter()
    obs, _ = envs.reset(seed=0)
    finished, running = [], np.zeros(count)
    for _ in range(job["rollouts"]):
        kept: dict[str, list[Any]] = {name: [] for name in ("obs", "action", "log_prob", "value", "reward", "done")}
        for _ in range(length):
            theta, value = model(np.asarray(obs, np.float32), requires_grad=False, tensor=True)
            law = torch.distributions.Categorical(logits=theta)
            action = law.sample()
            seen, reward, terminated, truncated, _ = envs.step(action.numpy())
            done = terminated | truncated
            running += reward
            finished += [float(r) for r in running[done]]
            running[done] = 0
            values = (obs, action, law.log_prob(action), value.reshape(-1), reward, done)
            for name, each in zip(kept, values, strict=True):
                kept[name].append(torch.as_tensor(np.asarray(each), dtype=torch.float32))
            obs = seen
        rows = {name: torch.stack(each) for name, each in kept.items()}
        _, last = model(np.asarray(obs, np.float32), requires_grad=False, tensor=True)
        advantage, following, carried = torch.zeros(length, count), last.reshape(-1), torch.zeros(count)
        for t in reversed(range(length)):
            open_ = 1 - rows["done"][t]
            surprise = rows["reward"][t] + job["gamma"] * following * open_ - rows["value"][t]
            carried = surprise + job["gamma"] * job["lam"] * open_ * carried
            advantage[t], following = carried, rows["value"][t]
        rows |= {"advantage": advantage, "return": advantage + rows["value"]}
        flat = {name: each.reshape(length * count, *each.shape[2:]) for name, each in rows.items()}
        for _ in range(job["epochs"]):
            for batch in torch.randperm(length * count).split(job["batch"]):
                own = {name: each[batch] for name, each in flat.items()}
                theta, value = model(own["obs"], requires_grad=True, tensor=True)
                law = torch.distributions.Categorical(logits=theta)
                ratio = torch.exp(law.log_prob(own["action"]) - own["log_prob"])
                gain = (own["advantage"] - own["advantage"].mean()) / (own["advantage"].std() + 1e-8)
                clipped = torch.clamp(ratio, 1 - job["clip"], 1 + job["clip"])
                loss = -torch.minimum(ratio * gain, clipped * gain).mean()
                loss = loss + job["value_coefficient"] * ((value.reshape(-1) - own["return"]) ** 2).mean()
                loss.backward()
                model.step(own["obs"], policy_grad_clip=100.0, value_grad_clip=10.0)
    seconds = time.perf_counter() - began
    MODELS["return"] = float(np.mean(finished[-20:])) if finished else 0.0
    return seconds


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What a question gets."""
    if job["job"] == "version":
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(1)
        importlib.import_module("gbrl")
        return {"version": importlib.metadata.version("gbrl")}
    if job["job"] == "solved":
        return {"return": MODELS["return"]}
    return {"seconds": {"update": update, "predict": predict, "play": play}[job["job"]](job)}


if __name__ == "__main__":
    for line in sys.stdin:
        print("answer " + json.dumps(answer(json.loads(line))), flush=True)
