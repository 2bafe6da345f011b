"""The chips that kernels are compiled for, with the peaks that their rooflines are made of.

FLOP/s are those of dense bf16 matrix products with float32 sums, bytes/s those of the memory outside the chip, both as
the makers publish them, for what JAX calls one device (on TPU v4 and v5p: two tensor cores working as one).
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class TpuTarget:
    """A TPU that libtpu compiles for.

    Attributes:
        name: how the command line calls it.
        topology: smallest topology that libtpu knows, as ``get_topology_desc`` takes it.
        device_kind: what JAX calls the chip.
        cores: tensor cores that work as one device.
        clock: cycles per second; turns scheduled bundles into time.
        flops: peak FLOP/s of one device in bf16.
        bandwidth: HBM bytes/s of one device.
        vmem: bytes of vector memory of one core.
        scoped_vmem: bytes that a kernel gets when it does not ask for more (``vmem_limit_bytes``): libtpu's default,
            as its message says when a kernel overflows it.
    """

    name: str
    topology: str
    device_kind: str
    cores: int
    clock: float
    flops: float
    bandwidth: float
    vmem: int
    scoped_vmem: int
    family: str = "tpu"


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """An NVIDIA GPU that XLA's GPU compiler compiles for.

    Attributes:
        name: how the command line calls it.
        device: what the driver calls it.
        capability: compute capability, (major, minor).
        cores: streaming multiprocessors.
        clock: boost clock in cycles per second.
        flops: peak FLOP/s of dense bf16.
        bandwidth: HBM bytes/s.
        memory: bytes of device memory.
        l2: bytes of level 2 cache.
        shared_memory: bytes of shared memory of a multiprocessor.
        shared_memory_block: bytes of it that one block may ask for.
        fp32_lanes: float32 lanes of a multiprocessor.
    """

    name: str
    device: str
    capability: tuple[int, int]
    cores: int
    clock: float
    flops: float
    bandwidth: float
    memory: int
    l2: int
    shared_memory: int
    shared_memory_block: int
    fp32_lanes: int = 128
    threads: int = 2048
    family: str = "gpu"

    @property
    def arch(self) -> str:
        """Architecture as ptxas takes it; capability 9.0 and later have instructions of their own, marked ``a``."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def config(self) -> str:
        """The description of the chip that XLA compiles for, as a text proto."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory} threads_per_core_limit: {self.threads} core_count: {self.cores}
  fpus_per_core: {self.fp32_lanes} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock / 1e9}
  device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared_memory_block}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.device}"
"""


Target = TpuTarget | GpuTarget

MIB = 2**20
KIB = 2**10

# The clocks follow from the published peaks: FLOP/s = 2 · 128² · (matrix units of all cores) · clock, with 4 units a
# core on v4, v5e and v5p. For v6e, four units' worth of 256² a cycle give 1.75 GHz; that one is our inference.
_TARGETS: tuple[Target, ...] = (
    TpuTarget("v4", "v4:2x2x1", "TPU v4", 2, 1.05e9, 275e12, 1.228e12, 16 * MIB, 16 * MIB),
    TpuTarget("v5e", "v5e:2x2", "TPU v5 lite", 1, 1.5e9, 197e12, 0.819e12, 128 * MIB, 16 * MIB),
    TpuTarget("v5p", "v5p:2x2x1", "TPU v5", 2, 1.75e9, 459e12, 2.765e12, 64 * MIB, 16 * MIB),
    TpuTarget("v6e", "v6e:2x2", "TPU v6 lite", 1, 1.75e9, 918e12, 1.64e12, 128 * MIB, 32 * MIB),
    GpuTarget(
        "a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41e9, 312e12, 2.039e12, 85_899_345_920, 40 * MIB,
        164 * KIB, 163 * KIB, fp32_lanes=64,
    ),
    GpuTarget(
        "h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98e9, 989e12, 3.352e12, 84_942_979_072, 50 * MIB,
        228 * KIB, 227 * KIB,
    ),
    GpuTarget(
        "h200", "NVIDIA H200", (9, 0), 132, 1.98e9, 989e12, 4.8e12, 150_754_820_096, 50 * MIB, 228 * KIB, 227 * KIB,
    ),
    GpuTarget(
        "l40s", "NVIDIA L40S", (8, 9), 142, 2.52e9, 362e12, 0.864e12, 51_539_607_552, 96 * MIB,
        100 * KIB, 99 * KIB, threads=1536,
    ),
)  # fmt: skip

TARGETS: dict[str, Target] = {target.name: target for target in _TARGETS}
"""Every target by name."""


def get_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ValueError: if there is none, with the nearest name.

    >>> get_target("v5e").family, get_target("h100").arch
    ('tpu', 'sm_90a')
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"target is {name!r}, expected one of {', '.join(TARGETS)}{hint}")
