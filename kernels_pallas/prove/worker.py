"""The process that compiles: takes jobs from a file, appends one JSON line per job to another.

It is a process of its own because the compilers read their dump settings once, when they are loaded, and because a
compiler that crashes must not take its caller along. `kernels_pallas.prove.proving` starts it.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from kernels_pallas.prove import gpu_binary, llo
from kernels_pallas.prove.targets import GpuTarget, Target, TpuTarget, get_target


def _device(target: Target) -> Any:
    if isinstance(target, TpuTarget):
        return topologies.get_topology_desc(topology_name=target.topology, platform="tpu").devices[0]
    jax.devices()  # registers the CUDA plugin; it finds no GPU and only its compiler is used
    topology = topologies.get_topology_desc(
        topology_name="1x1x1", platform="cuda", target_config=target.config, topology="1x1x1"
    )
    return topology.devices[0]


def compile_job(job: dict[str, Any], dump: pathlib.Path) -> dict[str, Any]:
    """Compile one exported program and read the compiler's dumps."""
    target = get_target(job["target"])
    exported = export.deserialize(bytearray(pathlib.Path(job["program"]).read_bytes()))
    device = _device(target)
    sharding = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in exported.in_avals]
    started = time.perf_counter()
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        compiled = jax.jit(exported.call).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    text = compiled.as_text() or ""
    memory = compiled.memory_analysis()
    temp_bytes = int(memory.temp_size_in_bytes) if memory is not None else 0
    result = {"id": job["id"], "accepted": True, "seconds": seconds, "temp_bytes": temp_bytes}
    if isinstance(target, GpuTarget):
        kernels: Any = gpu_binary.read_binaries(dump, text, target.arch, job["ptxas"], job["nvdisasm"])
    else:
        kernels = _schedules(dump, text, job)
    return {**result, "kernels": [dataclasses.asdict(kernel) for kernel in kernels]}


def _vmem(line: str, key: str) -> int | None:
    """The bytes of VMEM (memory space 1) that a kernel's line in the compiled program states under ``key``."""
    match = re.search(rf'"{key}":\[[^\]]*?"memory_space":"1"[^}}]*?"size":"(\d+)"', line)
    return int(match[1]) if match else None


def _schedules(dump: pathlib.Path, text: str, job: dict[str, Any]) -> list[llo.Schedule]:
    calls = {
        match[1]: match[0]
        for match in re.finditer(r'%([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"[^\n]*', text)
    }
    schedules = []
    for name, files in llo.read_dump(dump, list(calls)).items():
        kernel = re.sub(r"\.\d+$", "", name)
        schedules.append(
            llo.read_schedule(
                kernel,
                files["original"],
                files["final_bundles"],
                files["final_hlo-static-per-bundle-utilization"],
                vmem=_vmem(calls[name], "used_scoped_memory_configs"),
                limit=_vmem(calls[name], "scoped_memory_configs"),
                trips=[None if t is None else float(t) for t in job["trips"].get(kernel, ())],
                busy=job["busy"],
            )
        )
    return schedules


def main(jobs: pathlib.Path, results: pathlib.Path, dump: pathlib.Path) -> None:
    """Run every job; what a compiler says when it refuses is a result, not an error."""
    for job in json.loads(jobs.read_text()):
        shutil.rmtree(dump, ignore_errors=True)
        dump.mkdir(parents=True)
        try:
            result = compile_job(job, dump)
        except Exception as error:  # every failure of a compiler is what the caller wants to read
            result = {"id": job["id"], "accepted": False, "message": f"{type(error).__name__}: {error}"}
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*(pathlib.Path(argument) for argument in sys.argv[1:4]))
