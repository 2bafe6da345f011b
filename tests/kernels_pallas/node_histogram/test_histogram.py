"""Every implementation sums what a loop over rows sums, at odd sizes, with rows and bins that do not exist."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.node_histogram import AVAILABLE, RUN, SLOWER, _op, node_histogram, xla
from kernels_pallas.node_histogram.reference import naive

NAMES = (*RUN, "at_once", "several_at_once")


def run(name, bins, node, stats, n_nodes, n_bins):
    if name == "at_once":  # what XLA runs on GPUs
        return xla.at_once(bins, node, stats.astype(jnp.float32), n_nodes, n_bins)
    if name == "several_at_once":  # blocks of two features
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xla, "MOST", 2 * max(bins.shape[1], max(1, xla.NODES // n_nodes) * n_nodes * n_bins))
            return xla.several_at_once(bins, node, stats.astype(jnp.float32), n_nodes, n_bins)
    return _op(name, n_nodes, n_bins, name != "xla")(bins, node, stats)


@functools.cache
def random(features, rows, n_nodes, n_bins, k, dtype=jnp.uint8):
    rng = np.random.default_rng(rows)
    bins = jnp.asarray(rng.integers(0, n_bins, (features, rows)), dtype)
    node = jnp.asarray(rng.integers(-1, n_nodes + 1, rows), jnp.int32)  # some rows are in no node
    return bins, node, jnp.asarray(rng.normal(size=(rows, k)), jnp.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("features", "rows", "n_nodes", "n_bins", "k", "dtype"),
    [
        (1, 1, 1, 1, 1, jnp.uint8),
        (3, 257, 1, 9, 2, jnp.uint8),
        (2, 700, 5, 17, 3, jnp.int16),
        (1, 300, 8, 256, 2, jnp.uint8),
        (9, 130, 3, 33, 4, jnp.int32),
    ],
)
def test_equal_to_the_loop(name, features, rows, n_nodes, n_bins, k, dtype):
    bins, node, stats = random(features, rows, n_nodes, n_bins, k, dtype)
    found = run(name, bins, node, stats, n_nodes, n_bins)
    assert found.dtype == jnp.float32
    expected = naive(*map(np.asarray, (bins, node, stats)), n_nodes, n_bins)
    # Cells sum at most a few hundred numbers of order 1 in float32.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_exact(name):
    """Integers below 2**24 are sums without rounding, whatever the order: what subtraction of siblings rests on."""
    bins, node, _ = random(3, 5000, 2, 5, 1)
    found = run(name, bins, node, jnp.full((5000, 1), 3.0), 2, 5)
    np.testing.assert_array_equal(found, naive(*map(np.asarray, (bins, node)), np.full((5000, 1), 3.0), 2, 5))


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_statistics_are_summed_in_float32(name):
    bins, node = jnp.zeros((1, 1000), jnp.uint8), jnp.zeros(1000, jnp.int32)
    found = run(name, bins, node, jnp.ones((1000, 2), jnp.bfloat16), 1, 2)
    np.testing.assert_array_equal(found[0, 0], [[1000, 1000], [0, 0]])  # bfloat16 stops counting at 256


@pytest.mark.parametrize("name", NAMES)
def test_bins_that_do_not_exist_count_nowhere(name):
    bins, node = jnp.array([[0, 1, 2, 3]], jnp.int32), jnp.array([0, 0, 0, 1], jnp.int32)
    found = run(name, bins, node, jnp.ones((4, 1)), 2, 2)
    np.testing.assert_array_equal(found[0, :, :, 0], [[1, 1], [0, 0]])


def test_float64_stays(x64):
    found = node_histogram(jnp.zeros((1, 2), int), jnp.zeros(2, int), jnp.full((2, 1), 0.1), n_nodes=1, n_bins=1)
    assert found.dtype == jnp.float64
    assert found[0, 0, 0, 0] == 0.2


def test_jit_vmap_and_rows_sharded_over_devices():
    bins, node, stats = random(3, 320, 2, 9, 2)
    call = functools.partial(node_histogram, n_nodes=2, n_bins=9)
    whole = call(bins, node, stats)
    several = jax.jit(jax.vmap(call, (None, None, 0)))(bins, node, jnp.stack([stats, 2 * stats]))
    np.testing.assert_allclose(several, jnp.stack([whole, 2 * whole]), rtol=1e-6, atol=1e-6)
    mesh = Mesh(jax.devices(), ("rows",))
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
             for x, axes in ((bins, (None, "rows")), (node, ("rows",)), (stats, ("rows", None)))]  # fmt: skip
    # Eight partial sums are added in another order.
    np.testing.assert_allclose(jax.jit(call)(*split), whole, rtol=1e-5, atol=1e-5)


def test_gpus_take_additions_unless_the_kernel_is_named():
    assert resolve_implementation(None, AVAILABLE, "gpu", slower=SLOWER) == "xla"
    assert resolve_implementation("pallas_gpu", AVAILABLE, "gpu", slower=SLOWER) == "pallas_gpu"
    assert resolve_implementation(None, AVAILABLE, "tpu", slower=SLOWER) == "pallas_tpu"


def test_no_gradient():
    bins, node, stats = random(3, 257, 1, 9, 2)
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda s: node_histogram(bins, node, s, n_nodes=1, n_bins=9).sum())(stats)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bins": jnp.zeros((1, 4))}, TypeError, "bins has dtype float32"),
        ({"node": jnp.zeros(4)}, TypeError, "node has dtype float32"),
        ({"stats": jnp.ones((4, 1), int)}, TypeError, "stats has dtype int32"),
        ({"bins": jnp.zeros(4, int)}, ValueError, r"expected \[features, rows\]"),
        ({"bins": jnp.zeros((0, 4), int)}, ValueError, "at least one feature"),
        ({"node": jnp.zeros(3, int)}, ValueError, r"node has shape \(3,\), expected \(4,\)"),
        ({"stats": jnp.ones((3, 1))}, ValueError, r"expected \[4, K\]"),
        ({"n_nodes": 0}, ValueError, "n_nodes is 0, expected at least 1"),
        ({"n_bins": 0}, ValueError, "n_bins is 0"),
        ({"n_bins": 2.0}, TypeError, "n_bins is 2.0, expected an integer"),
        ({"n_nodes": 2**16, "n_bins": 2**15}, ValueError, "less than"),
        ({"implementation": "cuda"}, ValueError, "expected one of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"bins": jnp.zeros((1, 4), int), "node": jnp.zeros(4, int), "stats": jnp.ones((4, 1)), "n_nodes": 1,
                 "n_bins": 2} | change  # fmt: skip
    with pytest.raises(error, match=message):
        node_histogram(arguments.pop("bins"), arguments.pop("node"), arguments.pop("stats"), **arguments)
