"""Compile kernels for chips that are not here, and put what the compilers say beside what the chip could do."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas.prove import compilers
from kernels_pallas.prove.cases import Case, Program, Shape
from kernels_pallas.prove.gpu_binary import Binary
from kernels_pallas.prove.llo import Loop, Schedule
from kernels_pallas.prove.targets import GpuTarget, Target, TpuTarget, get_target

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """One program for one chip.

    Attributes:
        name: what tables call it.
        target: name of a target.
        shape: the sizes that ``build`` gets.
        build: makes the program.
    """

    name: str
    target: str
    shape: Shape
    build: Callable[[Shape], Program]


@dataclasses.dataclass(frozen=True)
class Proof:
    """What came out of a job.

    Attributes:
        job: what was asked.
        accepted: whether the real compiler made a binary.
        message: why not: the compiler's own words, or those of the lowering to it.
        seconds: time that the compiler took.
        kernels: the kernels in the program.
        temp_bytes: memory outside the chip that the program needs for temporaries.
        flops: the author's count for the roofline.
        bytes: the author's count of traffic for the roofline.
        note: the author's.
    """

    job: Job
    accepted: bool
    message: str = ""
    seconds: float = 0.0
    kernels: tuple[Schedule | Binary, ...] = ()
    temp_bytes: int = 0
    flops: int | float = 0.0
    bytes: int | float = 0.0
    note: str = ""

    @property
    def chip(self) -> Target:
        """The target."""
        return get_target(self.job.target)

    @property
    def roofline(self) -> float:
        """Seconds that the chip's peaks allow: the longer one of arithmetic (bf16 peak) and traffic. An estimate."""
        return max(self.flops / self.chip.flops, self.bytes / self.chip.bandwidth)

    @property
    def bound(self) -> str:
        """Which of the two the roofline is made of."""
        return "FLOPs" if self.flops / self.chip.flops >= self.bytes / self.chip.bandwidth else "bytes"

    @property
    def static_seconds(self) -> float | None:
        """Scheduled cycles over the clock, TPU only: an estimate that knows no stalls.

        ``None`` if a loop's trip count is unknown.
        """
        schedules = [kernel for kernel in self.kernels if isinstance(kernel, Schedule)]
        cycles = [schedule.cycles for schedule in schedules]
        if not schedules or not isinstance(self.chip, TpuTarget) or any(c is None for c in cycles):
            return None
        return sum(c for c in cycles if c is not None) / self.chip.clock

    @property
    def spills(self) -> int:
        """Spills of all kernels: stores in the program's text on TPUs, bytes a thread on GPUs."""
        return sum(kernel.spills for kernel in self.kernels)


def jobs_of(
    cases: Iterable[Case],
    *,
    targets: Sequence[str] | None = None,
    shapes: Sequence[Shape] | None = None,
    peers: Sequence[str] | None = (),
) -> list[Job]:
    """The jobs that prove ``cases``.

    Args:
        cases: what to prove.
        targets: names of chips; the cases' own if ``None``. Chips of another family are passed over.
        shapes: changes to each case's first shape, one job each; the cases' own shapes if ``None``.
        peers: which peers to compile beside each case; ``None`` for all that it has.
    """
    jobs = []
    for case in cases:
        chips = [t for t in (case.targets if targets is None else targets) if get_target(t).family == case.family]
        chosen = case.shapes if shapes is None else tuple(case.shape(changes) for changes in shapes)
        others = {name: build for name, build in case.peers.items() if peers is None or name in peers}
        for shape in chosen:
            for chip in chips:
                jobs.append(Job(case.name, chip, shape, case.build))
                jobs.extend(Job(f"peer {name}", chip, shape, build) for name, build in others.items())
    return jobs


def describing(target: Target) -> AbstractContextManager[Any]:
    """A context in which kernels that ask for their chip, such as for the size of its memories, are told ``target``."""
    kind, name = (target.device_kind, "tpu") if isinstance(target, TpuTarget) else (target.device, "cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, target.cores, name))
    return jax.sharding.use_abstract_mesh(mesh)


def export_program(program: Program, target: Target) -> bytes:
    """Trace and lower a program for a chip, here, without its compiler.

    Raises:
        Exception: what Pallas raises where a kernel cannot be lowered.
    """
    platform = "tpu" if isinstance(target, TpuTarget) else "cuda"
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")]
    with describing(target):
        exported = jax.export.export(jax.jit(program.function), platforms=[platform], disabled_checks=allowed)(
            *program.arguments
        )
    return bytes(exported.serialize())


def _environment(family: str, dump: pathlib.Path) -> dict[str, str]:
    folder = compilers.find(family)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(folder), *filter(None, sys.path)])
    # Only the passes that are read: dumping all of them takes twice as long as compiling.
    passes = "original|final_bundles|final_hlo-static-per-bundle-utilization"
    environment["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={passes}"
    )
    environment["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text" if family == "gpu" else ""
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cached program leaves no dump
    return environment


def _answers(text: str) -> list[dict[str, Any]]:
    r"""What the worker has written so far; a line that it is still writing comes the next time.

    >>> _answers('{"id": "a"}\n{"id": "b"}\n{"id": "c')
    [{'id': 'a'}, {'id': 'b'}]
    """
    *complete, _ = text.split("\n")
    return [json.loads(line) for line in complete]


def _compile(
    family: str, tasks: dict[str, dict[str, Any]], folder: pathlib.Path, timeout: float,
    on_result: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Run tasks in worker processes until every one has an answer; one that kills its worker is answered for it."""
    waiting = dict(tasks)
    results, log, dump = folder / "results.jsonl", folder / "log", folder / "dump"
    while waiting:
        results.write_text("")
        (folder / "jobs.json").write_text(json.dumps(list(waiting.values())))
        command = [
            sys.executable,
            "-m",
            "kernels_pallas.prove.worker",
            str(folder / "jobs.json"),
            str(results),
            str(dump),
        ]
        answered, limit = 0, time.monotonic() + timeout
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env=_environment(family, dump), stdout=stream, stderr=subprocess.STDOUT, cwd=folder
            )
            while True:
                ended = process.poll() is not None
                for answer in _answers(results.read_text())[answered:]:
                    on_result(answer)
                    waiting.pop(answer["id"])
                    answered, limit = answered + 1, time.monotonic() + timeout
                if ended or time.monotonic() > limit:
                    break
                time.sleep(0.05)
            process.kill()
            process.wait()
        if waiting:
            first = next(iter(waiting))
            waiting.pop(first)
            words = log.read_text()[-2000:].strip()
            reason = (
                f"no answer within {timeout:.0f} s" if not ended else f"crashed with exit code {process.returncode}"
            )
            on_result({"id": first, "accepted": False, "message": f"the compiler {reason}: {words}"})


def _kernel(family: str, fields: Mapping[str, Any]) -> Schedule | Binary:
    if family == "gpu":
        return Binary(**{**fields, "grid": tuple(fields["grid"])})
    return Schedule(**{**fields, "loops": tuple(Loop(**loop) for loop in fields["loops"])})


def prove(
    jobs: Sequence[Job],
    *,
    timeout: int | float = 300.0,
    on_done: Callable[[Proof], None] = lambda proof: None,
) -> list[Proof]:
    """Compile every job with the real compiler of its chip.

    Args:
        jobs: what to compile, see `jobs_of`.
        timeout: seconds that one compilation may take.
        on_done: called with each proof as it is there.

    Returns:
        The proofs in the order of the jobs. A kernel that is refused is a proof that says so, with the message.

    Raises:
        CompilerMissingError: if a compiler that is needed is not installed.
        ValueError: if a target is unknown.
    """
    for family in {get_target(job.target).family for job in jobs}:
        compilers.find(family)
    if importlib.util.find_spec("flatbuffers") is None:
        raise compilers.CompilerMissingError(
            "programs travel to the compilers as flatbuffers: `pip install flatbuffers`"
        )
    proofs: dict[int, Proof] = {}
    tools = {name: compilers.find_tool(name) for name in ("ptxas", "nvdisasm")}

    def finish(index: int, proof: Proof) -> None:
        proofs[index] = proof
        on_done(proof)

    with tempfile.TemporaryDirectory(prefix="prove-") as name:
        folder = pathlib.Path(name)
        tasks: dict[str, dict[str, dict[str, Any]]] = {"tpu": {}, "gpu": {}}
        programs: dict[int, Program] = {}
        for index, job in enumerate(jobs):
            target = get_target(job.target)
            if isinstance(target, GpuTarget) and tools["ptxas"] is None:
                raise compilers.CompilerMissingError("ptxas is not installed: `pip install nvidia-cuda-nvcc-cu12`")
            try:
                with describing(target):  # authors count what their kernel does on that chip
                    program = programs[index] = job.build(job.shape)
                exported = export_program(program, target)
            except Exception as error:  # a kernel that cannot even be lowered is refused, in Pallas' words
                finish(index, Proof(job, False, f"not lowered: {type(error).__name__}: {error}"))
                continue
            path = folder / f"{index}.bin"
            path.write_bytes(exported)
            tasks[target.family][str(index)] = {
                "id": str(index), "program": str(path), "target": job.target, "busy": program.busy,
                "trips": {kernel: list(trips) for kernel, trips in program.trips.items()}, **tools,
            }  # fmt: skip

        for family, waiting in tasks.items():

            def collect(result: dict[str, Any], family: str = family) -> None:
                index = int(result["id"])
                job, program = jobs[index], programs[index]
                work: dict[str, Any] = {"flops": program.flops, "bytes": program.bytes, "note": program.note}
                if result["accepted"]:
                    kernels = tuple(_kernel(family, fields) for fields in result["kernels"])
                    proof = Proof(job, True, "", result["seconds"], kernels, result["temp_bytes"], **work)
                else:
                    proof = Proof(job, False, result["message"], **work)
                finish(index, proof)

            if waiting:
                _compile(family, waiting, folder, timeout, collect)
    return [proofs[index] for index in range(len(jobs))]
