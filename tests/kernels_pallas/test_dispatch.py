"""The choice of an implementation."""

import jax
import pytest

from kernels_pallas.dispatch import IMPLEMENTATIONS, resolve_implementation

EVERYWHERE = ("cpu", "gpu", "tpu")
FULL = {"xla": EVERYWHERE, "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}


@pytest.mark.parametrize(("platform", "best"), [("cpu", "xla"), ("tpu", "pallas_tpu"), ("gpu", "pallas_gpu")])
def test_none_takes_the_kernel_of_the_platform(platform, best):
    assert resolve_implementation(None, FULL, platform) == best
    assert resolve_implementation(None, {"xla": EVERYWHERE}, platform) == "xla"


def test_the_platform_is_that_of_jax_by_default():
    assert jax.default_backend() == "cpu"
    assert resolve_implementation(None, FULL) == "xla"
    with pytest.raises(ValueError, match="cannot run on platform 'cpu'"):
        resolve_implementation("pallas_tpu", FULL)


def test_a_name_is_taken_at_its_word_or_refused():
    for platform in EVERYWHERE:
        for name in IMPLEMENTATIONS:
            if platform in FULL[name]:
                assert resolve_implementation(name, FULL, platform) == name
            else:
                with pytest.raises(
                    ValueError, match=rf"implementation is '{name}'.*platform '{platform}'.*xla \(on cpu"
                ):
                    resolve_implementation(name, FULL, platform)


def test_refusals_say_what_there_is():
    with pytest.raises(
        ValueError, match="implementation is 'triton', expected one of xla, pallas_tpu, pallas_gpu or None"
    ):
        resolve_implementation("triton", FULL)
    with pytest.raises(ValueError, match=r"which this op does not have: it has xla \(on cpu\)"):
        resolve_implementation("pallas_gpu", {"xla": ("cpu",)}, "gpu")
    with pytest.raises(ValueError, match=r"platform is 'tpu', and no implementation of this op runs there"):
        resolve_implementation(None, {"xla": ("cpu",)}, "tpu")


def test_a_kernel_may_refuse_a_call():
    refusals = {"pallas_tpu": "mask is given", "pallas_gpu": None}
    assert resolve_implementation(None, FULL, "tpu", refusals) == "xla"
    assert resolve_implementation(None, FULL, "gpu", refusals) == "pallas_gpu"
    with pytest.raises(ValueError, match="'pallas_tpu', which cannot take this call: mask is given"):
        resolve_implementation("pallas_tpu", FULL, "tpu", refusals)
    with pytest.raises(ValueError, match=r"no implementation of this op runs there.*pallas_tpu refuses: mask is given"):
        resolve_implementation(None, {"pallas_tpu": ("tpu",)}, "tpu", refusals)
