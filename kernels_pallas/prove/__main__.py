"""The command line of the prover: ``python -m kernels_pallas.prove --help``."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from kernels_pallas.prove import compilers
from kernels_pallas.prove.cases import Case, find_cases, find_ops
from kernels_pallas.prove.measuring import Measured, measure
from kernels_pallas.prove.proving import Job, Proof, jobs_of, prove
from kernels_pallas.prove.table import duration, render, render_measured
from kernels_pallas.prove.targets import TARGETS


def parse_shape(text: str) -> dict[str, Any]:
    """Sizes from the command line.

    Raises:
        ValueError: if an item is not ``name=value``.

    >>> parse_shape("S=8192,dtype=bfloat16")
    {'S': 8192, 'dtype': 'bfloat16'}
    """
    shape: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise ValueError(f"shape has {item!r}, expected name=value, such as S=8192")
        shape[name.strip()] = int(value) if value.strip().lstrip("-").isdigit() else value.strip()
    return shape


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = argparse.ArgumentParser(
        prog="python -m kernels_pallas.prove",
        description="Compile Pallas kernels with the real TPU and GPU compilers, without the chips, and print what they"
        " need and would cost. Exit code: 0 if all were accepted, 1 if one was refused, 2 for a wrong call.",
    )
    made.add_argument(
        "op",
        nargs="*",
        help="ops of this package (all if none is given), or package.module:attribute of your own cases",
    )
    made.add_argument("--list", action="store_true", help="list ops, kernels, shapes and targets, and stop")
    made.add_argument("--target", action="append", metavar="CHIP", help=f"one of {', '.join(TARGETS)}; may be repeated")
    made.add_argument("--kernel", action="append", help="only kernels with this name, such as forward or decode")
    made.add_argument("--shape", action="append", metavar="S=8192,H=128", help="change sizes of a case's first shape")
    made.add_argument("--compare", action="append", metavar="PEER", help="a peer's kernel beside it, or 'all'")
    made.add_argument("--loops", action="store_true", help="show every loop of TPU kernels, not only the hottest")
    made.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    made.add_argument("--timeout", type=float, default=300.0, help="seconds that one compilation may take")
    made.add_argument(
        "--measure",
        action="store_true",
        help="instead of compiling for chips that are not here, run the programs on the TPU or GPU that is, and compare"
        " their results with the equations",
    )
    made.add_argument("--install", action="store_true", help="install the compilers (about 1.1 GB) into a cache folder")
    return made


def _select(options: argparse.Namespace) -> list[Case]:
    cases = [case for op in options.op or find_ops() for case in find_cases(op)]
    chosen = [case for case in cases if not options.kernel or case.kernel in options.kernel]
    if not chosen:
        raise ValueError(f"kernel is {options.kernel}, expected one of {sorted({case.kernel for case in cases})}")
    known = sorted({peer for case in cases for peer in case.peers})
    for peer in options.compare or ():
        if peer != "all" and peer not in known:
            raise ValueError(f"compare is {peer!r}, expected all or one of {', '.join(known)}")
    return chosen


def _measure(jobs: Sequence[Job], markdown: bool) -> int:
    def report(result: Measured) -> None:
        verdict = duration(result.median) if result.seconds else "FAILED"
        print(f"{result.job.name}: {verdict}", file=sys.stderr, flush=True)

    print(f"compiling {len(jobs)} programs for {jax.devices()[0].device_kind}", file=sys.stderr, flush=True)
    results = measure(jobs, on_done=report)
    print(render_measured(results, markdown=markdown))
    return 0 if all(result.seconds for result in results) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.install:
            print(f"the compilers are in {compilers.install()}")
            return 0
        cases = _select(options)
        if options.list:
            for case in cases:
                print(f"{case.name}  chips {', '.join(case.targets)}  peers {', '.join(case.peers) or 'none'}")
                for shape in case.shapes:
                    print("    " + " ".join(f"{name}={value}" for name, value in shape.items()))
            return 0
        if options.measure and (family := jax.default_backend()) not in ("tpu", "gpu"):
            raise ValueError(f"measure needs a TPU or GPU, and JAX's first device is a {family}")
        peers = None if options.compare and "all" in options.compare else options.compare or ()
        shapes = [parse_shape(text) for text in options.shape] if options.shape else None
        targets = options.target
        if options.measure:  # any target of the family will do: programs run on what is here
            cases = [case for case in cases if case.family == family]
            targets = [next(name for name, target in TARGETS.items() if target.family == family)]
        jobs = jobs_of(cases, targets=targets, shapes=shapes, peers=peers)
        if not jobs:
            raise ValueError(f"target is {options.target}, and no kernel chosen is made for that family of chips")
        if options.measure:
            return _measure(jobs, options.markdown)
        done = 0

        def report(proof: Proof) -> None:
            nonlocal done
            done += 1
            verdict = f"accepted in {proof.seconds:.1f} s" if proof.accepted else "REFUSED"
            print(
                f"[{done}/{len(jobs)}] {proof.job.name} on {proof.job.target}: {verdict}", file=sys.stderr, flush=True
            )

        proofs = prove(jobs, timeout=options.timeout, on_done=report)
    except (ValueError, compilers.CompilerMissingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: pip could not install the compilers (exit code {error.returncode})", file=sys.stderr)
        return 2
    print(render(proofs, markdown=options.markdown, loops=options.loops))
    return 0 if all(proof.accepted for proof in proofs) else 1


if __name__ == "__main__":
    sys.exit(main())
