"""The cost model against the paper's repository, brute force and its own limits; coverage against enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxaccel import forecasting as fc
from jaxaccel.forecasting import B200, QWEN3, BlockTopK, TopK

# float32 keeps 24 bits; a cost is about ten operations, each rounded once.
FLOAT32 = 1e-6
# float64 sums of ten terms of equal sign.
FLOAT64 = 1e-14
MODEL = QWEN3["Qwen3-8B"]


def reference_costs(row):
    """Dense, block and top-k costs of one row of the vectors, as the repository orders them."""
    params, layers, heads, kv_heads, size, intensity, prompt, gen, trials, block, blocks, local = row.tolist()
    model = fc.ModelSpec(params, int(layers), int(heads), int(kv_heads), int(size))
    hardware = fc.HardwareSpec(intensity * 1e12, 1e12)
    found = []
    for attention in ("dense", BlockTopK(int(block), int(blocks), int(local), 0), TopK(local + block * blocks)):
        cost = fc.eflops(
            model,
            hardware,
            prompt_len=prompt,
            gen_len=gen,
            num_trials=trials,
            attention=attention,
            reference_compat=True,
        )
        found += [float(cost.compute), float(cost.memory)]
    return found


@pytest.mark.parametrize(("wide", "tolerance"), [(False, FLOAT32), (True, FLOAT64)])
def test_reproduces_the_repository(vectors, wide, tolerance):
    data = vectors("kinetics")
    with jax.enable_x64(wide):
        got = np.array([reference_costs(row) for row in data["cost_in"]])
    np.testing.assert_allclose(got, data["cost_out"], rtol=tolerance)


def test_dense_cost_is_the_repositorys_without_compatibility_too(vectors):
    data = vectors("kinetics")
    for row, out in zip(data["cost_in"], data["cost_out"], strict=True):
        params, layers, heads, kv_heads, size, intensity, prompt, gen, trials = row[:9].tolist()
        model = fc.ModelSpec(params, int(layers), int(heads), int(kv_heads), int(size))
        hardware = fc.HardwareSpec(intensity * 1e12, 1e12)
        cost = fc.eflops(model, hardware, prompt_len=prompt, gen_len=gen, num_trials=trials)
        np.testing.assert_allclose([cost.compute, cost.memory], out[:2], rtol=FLOAT32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_tokens_read_is_the_sum_over_steps(budget, prompt, gen):
    brute = np.minimum(budget, prompt + np.arange(gen) + 0.5).sum()
    # A step in which the budget is reached half-way cannot occur: budget and prompt are whole numbers.
    np.testing.assert_allclose(fc.tokens_read(budget, prompt, gen), brute, rtol=FLOAT32)


def test_the_repositorys_errors_are_errors():
    """The brief's two cases: the square's sign, and an answer that ends before the budget is full."""
    assert round(float(fc.tokens_read(1024, 256, 8192))) == 8_093_696
    assert round(float(fc.tokens_read(1024, 256, 500))) == 253_000
    options = {"prompt_len": 256, "num_trials": 1, "attention": TopK(1024)}
    for gen, wrong in ((8192, 8_683_520), (500, 512_000 + 294_912)):
        cost = fc.eflops(MODEL, B200, gen_len=gen, reference_compat=True, **options)
        read = cost.memory * 1e12 / (B200.intensity * MODEL.kv_bytes_per_token)
        np.testing.assert_allclose(read, wrong, rtol=FLOAT32)


def test_block_search_is_the_sum_over_steps():
    """Each step in which not everything fits scores (c + t)/block centroids once per KV head."""
    attention = BlockTopK(16, 8, num_local=32, num_sink=4)
    prompt, gen, trials = 100, 700, 3
    cost = fc.eflops(MODEL, B200, prompt_len=prompt, gen_len=gen, num_trials=trials, attention=attention)
    top = fc.eflops(MODEL, B200, prompt_len=prompt, gen_len=gen, num_trials=trials, attention=TopK(attention.budget))
    steps = prompt + np.arange(gen) + 0.5
    searched = steps > attention.budget
    keys = MODEL.kv_elements_per_token / 2
    compute = trials * 2 * keys * (steps[searched] / 16).sum()
    shared = (searched * prompt / 16).sum() + trials * (searched * (steps - prompt) / 16).sum()
    memory = B200.intensity * MODEL.kv_bytes * keys * shared
    # A difference of two float32 numbers loses the digits they share: the search is 2 % of the compute.
    np.testing.assert_allclose((cost.compute - top.compute) * 1e12, compute, rtol=1e-4)
    np.testing.assert_allclose((cost.memory - top.memory) * 1e12, memory, rtol=1e-4)


def test_one_trial_shares_nothing():
    for attention in ("dense", TopK(512), BlockTopK(16, 32)):
        options = {"prompt_len": 700, "gen_len": 3000, "attention": attention}
        shared = fc.eflops(MODEL, B200, **options)
        alone = fc.eflops(MODEL, B200, prefix_sharing=False, **options)
        assert float(shared.total) == float(alone.total)
        several = fc.eflops(MODEL, B200, prefix_sharing=False, num_trials=4, **options)
        np.testing.assert_allclose(several.total, 4 * alone.total, rtol=FLOAT32)


@pytest.mark.parametrize("attention", [TopK(3700), BlockTopK(16, 231, num_local=0, num_sink=4)])
def test_a_budget_that_holds_everything_is_dense(attention):
    options = {"prompt_len": 700, "gen_len": 3000, "num_trials": 4, "prefix_sharing": False}
    sparse = fc.eflops(MODEL, B200, attention=attention, **options)
    for found, expected in zip(sparse, fc.eflops(MODEL, B200, **options), strict=True):
        np.testing.assert_allclose(found, expected, rtol=FLOAT32)


def test_published_numbers():
    specs = list(QWEN3.values())
    ratios = {
        gen: [round(float(fc.attention_ratio(m, B200, prompt_len=128, gen_len=gen))) for m in specs]
        for gen in (4096, 16384)
    }
    assert ratios[16384] == [358, 133, 86, 42, 26, 19]
    assert (ratios[4096][0], ratios[4096][-1]) == (94, 5)
    caches = [float(fc.kv_cache_bytes(m, 32768)) / 2**30 for m in specs]
    assert caches == [3.5, 3.5, 4.5, 4.5, 5.0, 8.0]
    assert round(float(B200.seconds(1e5)), 1) == 22.2


def test_named_intensities():
    named = (fc.B200, fc.H100, fc.H200, fc.TPU_V5E, fc.TPU_V5P, fc.TPU_V6E)
    assert [round(h.intensity, 1) for h in named] == [562.5, 295.2, 206.0, 240.5, 166.0, 559.8]


def test_parameters_and_combination():
    options = {"prompt_len": 100, "gen_len": 2000, "num_trials": 3}
    plain = fc.eflops(MODEL, B200, **options)
    charged = fc.eflops(MODEL, B200, include_params=True, **options)
    expected = B200.intensity * 2 * MODEL.num_params * 2000 / 1e12  # once per step, whatever the trials
    np.testing.assert_allclose(charged.memory - plain.memory, expected, rtol=1e-5)  # a difference of float32
    larger = fc.eflops(MODEL, B200, combine="max", **options)
    assert float(larger.total) == max(float(larger.compute), float(larger.memory))


@pytest.mark.parametrize("wide", [False, True])
def test_vectorised_jitted_and_safe_for_huge_values(wide):
    lengths, trials = np.array([[1000], [2_000_000]]), np.array([1, 1024, 1_000_000])
    with jax.enable_x64(wide):

        @jax.jit
        def total(gen, n):
            return fc.eflops(QWEN3["Qwen3-32B"], B200, prompt_len=5, gen_len=gen, num_trials=n).total

        got = total(jnp.asarray(lengths, jnp.int32), jnp.asarray(trials, jnp.int32))  # G²·D overflows 32 bits
        assert got.dtype == (jnp.float64 if wide else jnp.float32)
    spec = QWEN3["Qwen3-32B"]
    elements = spec.kv_elements_per_token
    g, n = lengths.astype(object), trials.astype(object)  # exact integers
    exact = n * (2 * int(spec.num_params) * g + 8 * elements * (10 + g) * g) * 2 + 1125 * elements * (10 + n * g) * g
    np.testing.assert_allclose(got, (exact / 2 / 1e12).astype(float), rtol=FLOAT64 if wide else FLOAT32)
    assert float(got[1, 2]) * 1e12 > 1e18


@pytest.mark.parametrize("attention", ["dense", TopK(512), BlockTopK(16, 32)])
def test_slopes_are_those_of_finite_differences(x64, attention):
    def total(prompt, gen, trials):
        return fc.eflops(
            MODEL, B200, prompt_len=prompt, gen_len=gen, num_trials=trials, attention=attention, include_params=True
        ).total

    check_grads(total, (150.0, 9000.0, 4.0), order=1, modes=("fwd", "rev"), rtol=1e-5)


def test_dense_grows_with_the_square_and_sparse_with_the_length():
    def growth(attention):
        cost = fc.eflops(MODEL, B200, prompt_len=0, gen_len=np.array([1e6, 2e6]), attention=attention).total
        return float(cost[1] / cost[0])

    assert growth("dense") == pytest.approx(4, rel=0.01)  # what is left is the linear layers' share
    assert growth(TopK(1024)) == pytest.approx(2, rel=0.01)


def test_vmap_equals_broadcasting():
    gens = jnp.arange(1.0, 5.0) * 1000

    def cost(gen):
        return fc.eflops(MODEL, B200, prompt_len=100, gen_len=gen, attention=BlockTopK(16, 8)).total

    np.testing.assert_allclose(jax.vmap(cost)(gens), cost(gens), rtol=FLOAT32)


# Coverage and frontiers --------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_repositorys(vectors):
    data = vectors("kinetics")
    correct = data["cov_scores"].sum(-1)
    for i, k in enumerate(data["cov_n"].tolist()):
        np.testing.assert_allclose(fc.pass_at_k(correct, 32, k), data["cov_out"][:, i], atol=FLOAT32)


@pytest.mark.parametrize(("correct", "trials"), [(0, 6), (1, 6), (3, 6), (6, 6)])
def test_pass_at_k_counts_subsets(correct, trials):
    outcomes = [i < correct for i in range(trials)]
    for k in range(1, trials + 1):
        subsets = list(itertools.combinations(outcomes, k))
        assert float(fc.pass_at_k(correct, trials, k)) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-6)


def test_pass_at_k_keeps_small_probabilities():
    exact = 1 - math.comb(999_999, 3) / math.comb(1_000_000, 3)  # 3e-6, where 1 − Π would be off by 1 %
    assert float(fc.pass_at_k(1, 1_000_000, 3)) == pytest.approx(exact, rel=1e-5)


def test_coverage_under_transformations():
    correct = jnp.array([0.0, 3.0, 16.0])
    plain = fc.pass_at_k(correct, 16, 4)
    np.testing.assert_allclose(jax.jit(fc.pass_at_k, static_argnums=2)(correct, 16, 4), plain, rtol=FLOAT32)
    np.testing.assert_allclose(jax.vmap(lambda c: fc.pass_at_k(c, 16, 4))(correct), plain, rtol=FLOAT32)
    slopes = jax.vmap(jax.grad(lambda c: fc.pass_at_k(c, 16, 4)))(correct)
    assert np.isfinite(slopes).all()  # also where the product is over, at c = n
    assert (np.asarray(slopes) >= 0).all()
    more = jax.grad(lambda n: fc.beta_coverage(0.4, n))(3.0)
    assert 0 < float(more) < 0.2


def test_beta_coverage_is_the_mean_over_difficulties():
    draws = np.random.default_rng(0).beta(0.4, 0.6, 200_000)
    for n in (1, 2, 8, 32):
        # standard error of a mean of 200,000 numbers in [0, 1]: 0.001
        assert float(fc.beta_coverage(0.4, n)) == pytest.approx((1 - (1 - draws) ** n).mean(), abs=0.004)
    assert float(fc.beta_coverage(0.4, 3, 1e5)) == pytest.approx(1 - 0.6**3, abs=0.01)  # lgamma of 1e5 in float32


@pytest.mark.parametrize("trials", [0, 1, 32, 1000, 10**6])
@pytest.mark.parametrize("spread", [0.3, 1.0, 30.0])
def test_beta_coverage_in_float32_is_that_of_float64(trials, spread):
    from scipy.special import betaln

    for rate in (1e-3, 0.4, 0.99):
        right, wrong = spread * rate, spread * (1 - rate)
        exact = -np.expm1(betaln(wrong + trials, right) - betaln(wrong, right))
        # Logarithms of up to 10, each with a few roundings of 6e-8.
        assert float(fc.beta_coverage(rate, trials, spread)) == pytest.approx(exact, abs=3e-6)


def test_frontier_by_hand():
    cost = np.array([[1.0, 2.0, 4.0], [1.0, 3.0, 4.0]])
    score = np.array([[0.2, 0.9, 0.5], [0.0, 0.0, 1.0]])
    budgets = np.array([0.5, 1.0, 2.0, 2.6, 4.0])
    oracle = fc.cost_frontier(cost, score, budgets)
    np.testing.assert_allclose(oracle.best_score, [0, 0.1, 0.45, 0.45, 0.95], rtol=FLOAT32)
    np.testing.assert_array_equal(oracle.choice, [[-1, -1], [0, 0], [1, 0], [1, 0], [1, 2]])
    honest = fc.cost_frontier(cost, score, budgets, per_question=False)
    np.testing.assert_allclose(honest.best_score, [0, 0.1, 0.1, 0.45, 0.75], rtol=FLOAT32)
    np.testing.assert_array_equal(honest.choice, [-1, 0, 0, 1, 2])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_frontier_properties(seed):
    rng = np.random.default_rng(seed)
    cost, score = rng.random((5, 7)), rng.random((5, 7))
    budgets = np.linspace(0, 1, 6)
    oracle = fc.cost_frontier(cost, score, budgets)
    honest = fc.cost_frontier(np.broadcast_to(cost.mean(0), (5, 7)), score, budgets, per_question=False)
    bound = fc.cost_frontier(np.broadcast_to(cost.mean(0), (5, 7)), score, budgets)
    assert (np.diff(oracle.best_score) >= -1e-6).all()
    assert (np.diff(honest.best_score) >= -1e-6).all()
    assert (bound.best_score >= honest.best_score - 1e-6).all()  # an oracle is never worse at equal costs


def test_ties_go_to_the_cheapest():
    front = fc.cost_frontier(np.array([3.0, 1.0, 2.0]), np.ones((2, 3)), np.array([5.0]))
    np.testing.assert_array_equal(front.choice, [[1, 1]])


def test_smoothing_is_scipys_uniform_filter():
    from scipy.ndimage import uniform_filter1d

    rng = np.random.default_rng(0)
    cost, score, budgets = rng.random((9, 8)), rng.random((9, 8)), np.linspace(0, 1, 20)
    raw = fc.cost_frontier(cost, score, budgets)
    smooth = fc.cost_frontier(cost, score, budgets, smooth=3)
    np.testing.assert_allclose(smooth.best_score, uniform_filter1d(np.asarray(raw.best_score), 3), atol=FLOAT32)


def test_frontier_under_jit():
    cost, score, budgets = np.array([1.0, 2.0]), np.array([[0.1, 0.3]]), np.array([1.5, 2.5])
    got = jax.jit(fc.cost_frontier)(cost, score, budgets)
    np.testing.assert_allclose(got.best_score, [0.1, 0.3], rtol=FLOAT32)


def test_allocate_by_enumeration():
    rng = np.random.default_rng(1)
    tables = {
        name: fc.ConfigTable(rng.random((6, 4)), rng.random((6, 4)), tuple(f"{name}{i}" for i in range(4)))
        for name in "ab"
    }
    for budget in (0.3, 0.5, 0.7):
        affordable = [
            (float(table.score.mean(0)[i]), setting, float(table.cost.mean(0)[i]))
            for table in tables.values()
            for i, setting in enumerate(table.settings)
            if table.cost.mean(0)[i] <= budget
        ]
        found = fc.allocate(tables, budget)
        if affordable:
            score, setting, cost = max(affordable)
            assert (found.model, found.setting) == (setting[0], setting)
            assert found.score == pytest.approx(score, rel=FLOAT32)
            assert found.cost == pytest.approx(cost, rel=FLOAT32)
            assert fc.allocate(tables, budget, per_question=True).score >= 0
        else:
            assert found.model is None
    nothing = fc.allocate(tables, 0.0)
    assert nothing == fc.Allocation(None, None, 0.0, 0.0)
    each = fc.allocate(tables, 10.0, per_question=True)
    assert each.score == pytest.approx(max(t.score.max(1).mean() for t in tables.values()), rel=FLOAT32)
    assert len(each.setting) == 6


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopK(0), "budget must be finite and at least 1, got 0"),
        (lambda: TopK(float("nan")), "budget must be finite"),
        (lambda: BlockTopK(16, 0), "num_blocks must be finite and at least 1, got 0"),
        (lambda: BlockTopK(0, 4), "block_size must be finite and at least 1"),
        (lambda: BlockTopK(16, 4, num_local=-1), "num_local must be finite and at least 0"),
        (lambda: BlockTopK(16, 4, num_sink=-1), "num_sink must be finite and at least 0"),
        (lambda: fc.ModelSpec(1e9, 2, 6, 4, 64), r"num_kv_heads \(4\) must divide num_heads \(6\)"),
        (lambda: fc.ModelSpec(float("inf"), 2, 4, 4, 64), "num_params must be positive and finite, got inf"),
        (lambda: fc.ModelSpec(1e9, 0, 4, 4, 64), "num_layers must be positive"),
        (lambda: fc.HardwareSpec(0, 1e12), "peak_flops must be finite and at least 1"),
        (lambda: fc.HardwareSpec(1e12, float("nan")), "bandwidth must be finite"),
        (lambda: fc.eflops(MODEL, B200, prompt_len=-1, gen_len=1), "prompt_len must be finite and at least 0, got -1"),
        (lambda: fc.eflops(MODEL, B200, prompt_len=np.array([1, -2]), gen_len=1), "prompt_len .* got -2"),
        (lambda: fc.eflops(MODEL, B200, prompt_len=1, gen_len=float("inf")), "gen_len must be finite"),
        (lambda: fc.eflops(MODEL, B200, prompt_len=1, gen_len=1, num_trials=0), "num_trials .* at least 1, got 0"),
        (lambda: fc.tokens_read(0, 1, 1), "budget must be finite and at least 1"),
        (lambda: fc.kv_cache_bytes(MODEL, -1), "tokens must be finite and at least 0"),
        (lambda: fc.attention_ratio(MODEL, B200, prompt_len=1, gen_len=0), "gen_len must be finite and at least 1"),
        (lambda: fc.pass_at_k(1, 4, 5), "k must be at most num_trials, got k = 5 of 4"),
        (lambda: fc.pass_at_k(1, 4, 0), "k must be finite and at least 1"),
        (lambda: fc.pass_at_k(5, 4, 1), "num_correct must be at most num_trials, got 5 of 4"),
        (lambda: fc.pass_at_k(-1, 4, 1), "num_correct must be finite and at least 0"),
        (lambda: fc.pass_at_k(float("nan"), 4, 1), "num_correct must be finite"),
        (lambda: fc.beta_coverage(0.0, 1), "pass_rate must be finite and between"),
        (lambda: fc.beta_coverage(0.5, -1), "num_trials must be finite"),
        (lambda: fc.beta_coverage(0.5, 1, 0.0), "concentration must be finite"),
        (lambda: fc.cost_frontier(np.ones(2), np.ones((1, 3)), np.ones(1)), r"cost must be \[Q, C\] or \[C\]"),
        (lambda: fc.cost_frontier(np.ones(3), np.ones(3), np.ones(1)), r"cost must be \[Q, C\] or \[C\]"),
        (lambda: fc.cost_frontier(np.ones(3), np.ones((1, 3)), 1.0), r"budgets must be \[K\]"),
        (lambda: fc.cost_frontier(np.ones(3), np.ones((1, 3)), np.array([np.nan])), "budgets must be finite"),
        (lambda: fc.cost_frontier(np.array([np.inf]), np.ones((1, 1)), np.ones(1)), "cost must be finite"),
        (lambda: fc.cost_frontier(np.ones(1), np.full((1, 1), np.nan), np.ones(1)), "score must be finite"),
        (lambda: fc.cost_frontier(np.ones(3), np.ones((1, 3)), np.ones(1), smooth=2), "smooth must be odd"),
        (lambda: fc.allocate({}, 1.0), "tables is empty"),
        (lambda: fc.allocate({"a": fc.ConfigTable(np.ones(2), np.ones((1, 2)), ("x",))}, 1.0), "a: 1 settings"),
        (lambda: fc.allocate({"a": fc.ConfigTable(np.ones(1), np.ones((1, 1)), ("x",))}, -1.0), "budget must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_options_are_refused():
    # The suite's run-time checker of annotations stands before our own check of a wrong literal.
    from jaxaccel.forecasting.kinetics import eflops

    plain = getattr(eflops, "__wrapped__", eflops)
    for _ in range(3):
        plain = getattr(plain, "__wrapped__", plain)
    with pytest.raises(ValueError, match="attention must be 'dense', TopK"):
        plain(MODEL, B200, prompt_len=1, gen_len=1, attention="sparse")
    with pytest.raises(ValueError, match="combine must be 'sum' or 'max', got 'min'"):
        plain(MODEL, B200, prompt_len=1, gen_len=1, combine="min")
