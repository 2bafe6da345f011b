"""Every benchmark in its smallest form: it runs, and its goals are read rightly. Speeds are not asserted here."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys
import types

import gguf
import jax
import numpy as np
import pytest

from experiments import benchmarks, learn2pd
from experiments.benchmarks import (
    BenchOptions,
    Measurement,
    attention,
    block_ffn_decoding,
    diffusion,
    diffusion_cache,
    discovery,
    expert_ffn,
    fixed_point,
    gbrl,
    generation,
    lm_head_confidence,
    one_core,
    optimizers,
    policy,
    runner,
    trees,
)
from jaxaccel.caching import EfficientVLAConfig
from jaxaccel.models import BlockFFNConfig, DecoderConfig, VLAConfig, init_params


@pytest.fixture(autouse=True)
def small(monkeypatch, task):
    monkeypatch.setattr(optimizers, "PARAMETERS", 400)
    monkeypatch.setattr(optimizers, "LEAVES", (2, 4))
    monkeypatch.setattr(optimizers, "TINY_LEAVES", (4, 400))
    monkeypatch.setattr(runner, "tasks", lambda: (task(), task(steps_per_dispatch=1)))
    monkeypatch.setattr(
        discovery, "LionSearchConfig", lambda config=discovery.LionSearchConfig: config(steps=5, width=4)
    )
    for name, value in {"LENGTHS": (16, 64), "NAIVE_UP_TO": 16, "HEADS": 2, "SIZE": 8}.items():
        monkeypatch.setattr(attention, name, value)
    for name, value in {"CACHES": (2048, 4096), "COLD_BYTES": 2**20}.items():
        monkeypatch.setattr(attention, name, value)
    for name, value in {"CASES": ((1, 8), (2, 8)), "LONGER": 160, "CAPACITY": 96, "NEW": 4}.items():
        monkeypatch.setattr(generation, name, value)
    monkeypatch.setattr(fixed_point, "SIZES", ((1, 8, 6), (9, 8, 6)))
    monkeypatch.setattr(fixed_point, "STEPS", ((4, 6, 8),))
    monkeypatch.setattr(expert_ffn, "SIZES", ((32, 6, 8),))
    monkeypatch.setattr(expert_ffn, "ACTIVE", ((1, 2), (3, 4)))
    few_trees = dataclasses.replace(trees.BOOSTING, n_trees=2, depth=2, bins=8)
    tiny_trees = tuple((model, 60, 5, few_trees, "<= 1") for model in ("boosting", "random forest"))
    monkeypatch.setattr(trees, "CASES", tiny_trees)
    monkeypatch.setattr(trees, "TEST_ROWS", 20)
    monkeypatch.setattr(one_core, "can_pin", lambda: False)
    for name, value in {
        "UPDATES": ((16, 3, 2),),
        "PREDICTIONS": (2,),
        "TREES": 3,
        "TOGETHER": 2,
        "ROLLOUTS": 1,
    }.items():
        monkeypatch.setattr(gbrl, name, value)
    pole = gbrl.TASKS["cartpole"]
    few_steps = dataclasses.replace(pole.agent, envs=2, steps=4, batch_size=4, epochs=1)
    monkeypatch.setattr(gbrl, "TASKS", {"cartpole": dataclasses.replace(pole, agent=few_steps)})
    monkeypatch.delenv("JAXACCEL_PEERS_PYTHON", raising=False)
    for name, value in {"STEPS": 3, "BATCH": 1, "SLOTS": 2, "EPOCHS": 1, "SHARES": (0.5,)}.items():
        monkeypatch.setattr(diffusion_cache, name, value)
    monkeypatch.setattr(generation, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(generation, "transformers_model", lambda params, config: None)
    monkeypatch.setattr(generation, "load_pretrained", tiny_model)
    monkeypatch.setattr(lm_head_confidence, "CASES", ((2, 20, 4),))
    tiny_policy = {"num_visual": 6, "visual_size": 5, "sample_steps": 2}
    monkeypatch.setattr(policy, "policy_config", lambda: VLAConfig.tiny(**tiny_policy))
    for name, value in {"TOKENS": 6, "WORDS": 2, "LAYERS": 3}.items():
        monkeypatch.setattr(policy, name, value)
    cuts = EfficientVLAConfig(num_drop_layers=1, num_keep_tokens=4, cache_interval=2)
    monkeypatch.setattr(policy, "CUTS", {"all": cuts})
    experts = BlockFFNConfig(num_experts=8, expert_dim=4)
    monkeypatch.setattr(block_ffn_decoding, "CONFIG", DecoderConfig.tiny(num_layers=1, block_ffn=experts))
    for name, value in {"ACTIVE": 2, "PROMPT": 8, "NEW": 4, "BATCHES": (1,)}.items():
        monkeypatch.setattr(block_ffn_decoding, name, value)
    tiny = {"layers": 1, "width": 8, "heads": 2, "stages": (2,), "batch_size": 2, "gen_length": 32, "block_length": 8}
    few = {"prompts": 2, "filter_prompts": 2, "filter_steps": 2, "decode_batch": 2, "timed": 3}
    monkeypatch.setattr(diffusion, "CONFIG", learn2pd.Learn2pdConfig(**tiny, **few))


def tiny_model(name):
    """What `load_pretrained` gives, of a random model that reads letters."""
    assert name == "smollm2-135m"
    config = DecoderConfig.tiny(num_layers=1, tie_embeddings=True, max_positions=256)
    params = jax.tree.map(np.asarray, init_params(jax.random.key(0), config))
    letters = types.SimpleNamespace(encode=lambda text: [ord(letter) % 61 for letter in text[:400]])
    return types.SimpleNamespace(params=params, config=config, tokenizer=letters, origin=pathlib.Path("tiny"))


@pytest.mark.parametrize("name", benchmarks.MODULES)
def test_benchmark_gives_ratios_and_writes_them(name, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert benchmarks.run([name], BenchOptions(repeats=3, out=out)) == 0
    found = json.loads(out.read_text())
    assert found
    for measurement in found:
        assert measurement["ratio"] > 0
        if any(word in measurement["name"] for word in ("scratch", "MB of", "counted")):  # counted, not timed
            assert measurement["interval"] is None
        else:
            low, high = measurement["interval"]
            assert 0 < low <= high
    assert "ratios of medians" in capsys.readouterr().out


def test_goals_of_attention_stand_at_the_sizes_that_they_are_stated_for(monkeypatch):
    """The list of comparisons alone: the lengths are those of the issue's goals, nothing is timed."""
    timing = attention.cost.Timing((1.0, 1.0, 1.0))
    monkeypatch.setattr(attention, "LENGTHS", (512, 2048, 8192))
    monkeypatch.setattr(attention, "NAIVE_UP_TO", 2048)
    monkeypatch.setattr(attention, "CACHES", (4096, 32_768))
    monkeypatch.setattr(attention, "inputs", lambda length: (length, length, length))
    monkeypatch.setattr(attention, "scratch", lambda function, length, *rest: 1000 * length)
    monkeypatch.setattr(attention, "iterations", lambda *data: np.array([3, 5]))
    monkeypatch.setattr(attention, "torch_naive", lambda data: None)
    monkeypatch.setattr(attention.cost, "time_in_turn", lambda calls, **options: dict.fromkeys(calls, timing))
    names = (attention.LIBRARY, attention.DENSE, attention.SPARSE)
    monkeypatch.setattr(attention, "measure_decoding", lambda config, length: dict.fromkeys(names, timing))
    found = list(attention.measure(BenchOptions(repeats=3)))
    goals = {m.name: m.goal for m in found if m.goal}
    for start, length, goal in (
        ("naive LLA / LLA, forward,", 2048, ">= 3"),
        ("LLA forward + backward / forward", 512, "<= 4.5"),
        ("LLA forward + backward / forward", 8192, "<= 4.5"),
        ("LLA scratch [MB], forward", 2048, "<= 100"),
        ("LLA scratch over", 8192, "<= 4.5"),
    ):
        assert [g for n, g in goals.items() if n.startswith(start) and f"T={length}," in n] == [goal]
    assert [g for n, g in goals.items() if n.startswith("jax.nn") and "32768" in n] == [">= 8"]
    assert not any(m.name.startswith("naive") and "T=8192" in m.name for m in found)  # would need gigabytes
    (grown,) = [m for m in found if m.name == "block top-k, 32768 cached tokens / 4096"]
    assert grown.goal == f"<= {(2 * 1024 + 32_768 / 16) / (2 * 1024 + 4096 / 16):.2f}"
    assert sum("4 iterations" in m.detail or "4.0 iterations (at most 5)" in m.detail for m in found) == 5


def test_goals_of_the_union_kernel_are_those_of_its_bound(monkeypatch):
    timing = expert_ffn.cost.Timing((1.0, 1.0, 1.0))
    monkeypatch.setattr(expert_ffn, "SIZES", ((32, 48, 8),))
    monkeypatch.setattr(expert_ffn, "ACTIVE", ((1, 9), (8, 14)))
    monkeypatch.setattr(expert_ffn.cost, "time_in_turn", lambda calls, **options: dict.fromkeys(calls, timing))
    found = list(expert_ffn.measure(BenchOptions(repeats=3)))
    assert [m.goal for m in found] == [">= 3.56", "<= 1.10", "", ">= 2.29", "<= 1.10", ""]


def test_naive_attention_in_torch_is_local_linear_attention():
    data = attention.inputs(24)
    call = attention.torch_naive(data)
    if importlib.util.find_spec("torch") is None:  # no dependency: it is compared with where a user has it
        assert call is None
        return
    expected = attention.local_linear_attention(*data, ridge=attention.RIDGE, solver="cholesky")
    np.testing.assert_allclose(call().swapaxes(1, 2), expected, atol=1e-4)  # float32 solves


def test_goals():
    assert Measurement("a", 1.1, None, "<= 1.10").met is True
    assert Measurement("a", 1.11, None, "<= 1.10").met is False
    assert Measurement("a", 3.0, None, ">= 2").met is True
    assert Measurement("a", 3.0, None).met is None


def test_weights_rewritten_in_another_kind_are_the_same_model(tmp_path):
    from experiments.benchmarks.llama_cpp import models, rewrite
    from jaxaccel.models.weights import load_pretrained
    from tests.models.weights.making import GGUF, GGUF_TOP, TINY, gguf_metadata, named, random_params, write_gguf

    tensors = named(random_params(TINY), GGUF_TOP, GGUF, "blk.")
    words = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.chat_template": "{{ x }}"}
    source = write_gguf(tmp_path / "x.Q4_1.gguf", tensors, gguf_metadata(TINY) | words, kind="Q4_1")
    for kind in ("F32", "Q8_0"):
        copy = rewrite(source, kind, tmp_path / f"{kind}.gguf")
        before, after = load_pretrained(source), load_pretrained(copy)
        assert before.config == after.config
        for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
            # Q8_0 has 127 steps up to the largest of 32 numbers, in float16; vectors and F32 are kept to the bit.
            error = np.abs(old).max() * (1 / 254 + 2**-11) if kind == "Q8_0" and old.ndim > 1 else 0
            np.testing.assert_allclose(new, old, rtol=0, atol=error)
        fields = gguf.GGUFReader(copy).fields
        assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
        assert fields["tokenizer.chat_template"].contents() == "{{ x }}"
    assert list(models(tmp_path / "no.safetensors", tmp_path, 8)) == []


PACKAGE = """
import json, sys
if "broken" in sys.argv[0]:
    sys.exit("No module named gbrl")
for line in sys.stdin:
    job = json.loads(line)
    print("a line of the package's own")
    answers = {"version": {"version": "1.2"}, "solved": {"return": 21}}
    print("answer " + json.dumps(answers.get(job["job"], {"seconds": 0.25})), flush=True)
"""


def test_the_package_is_asked_in_a_process_of_its_own(monkeypatch, tmp_path):
    """What it answers is the numerator, and its goals stand beside it."""
    script = tmp_path / "package.py"
    script.write_text(PACKAGE)
    monkeypatch.setattr(gbrl.gbrl_peer, "__file__", str(script))
    monkeypatch.setenv("JAXACCEL_PEERS_PYTHON", sys.executable)
    update, prediction, play = gbrl.here(BenchOptions(repeats=3))
    assert (update.goal, prediction.goal, play.goal) == (">= 30", ">= 2", "")
    for found in (update, prediction, play):
        assert "gbrl / ours" in found.name
        assert "gbrl 250 ms" in found.detail
        mine = float(re.search(r"ours ([\d.e+-]+) ms", found.detail)[1])
        assert found.ratio == pytest.approx(250 / mine, rel=0.01)
    assert "and 21" in play.detail


def test_an_interpreter_without_the_package_is_named(monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(PACKAGE)
    monkeypatch.setattr(gbrl.gbrl_peer, "__file__", str(script))
    monkeypatch.setenv("JAXACCEL_PEERS_PYTHON", sys.executable)
    with pytest.raises(RuntimeError, match=r"JAXACCEL_PEERS_PYTHON failed: No module named gbrl"):
        gbrl.find_peer()


def test_a_process_of_one_core_gives_its_measurements(monkeypatch, tmp_path):
    """Lines of JSON become measurements; a process that fails is an error."""
    monkeypatch.setattr(one_core, "can_pin", lambda: True)
    monkeypatch.setattr(one_core, "ROOT", tmp_path)
    line = json.dumps({"name": "a / b", "ratio": 2.0, "interval": [1.0, 3.0], "goal": "", "detail": ""})
    (tmp_path / "timed.py").write_text(f"import sys\nprint({line!r})\nassert sys.argv[1] == '5'")
    found = list(one_core.on_one_core("timed", lambda options: iter(()), BenchOptions(repeats=5)))
    assert found == [Measurement("a / b", 2.0, (1.0, 3.0), "", "")]
    with pytest.raises(RuntimeError, match="timed 6 failed with exit code 1"):
        list(one_core.on_one_core("timed", lambda options: iter(()), BenchOptions(repeats=6)))
