"""Pins what pyproject.toml asks for: writes requirements/dev.txt (with hashes) and constraints.txt (without).

Also pins the compilers that kernels are proven with, in requirements/compilers.txt, for the JAX that was pinned.

Pins that are there and still fit are kept; ``--upgrade`` takes the newest. Needs pip-tools; run it with ``make lock``,
in an environment of the oldest Python that must work (3.11.2, that of Debian 12): some packages require a newer patch
release of 3.11, and pins resolved on one would not install there.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

from kernels_pallas.prove.compilers import requirements

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEV, CONSTRAINTS = ROOT / "requirements" / "dev.txt", ROOT / "constraints.txt"
COMPILERS = ROOT / "requirements" / "compilers.txt"
EXTRAS = ("experiments", "models", "prove", "tests", "docs", "lint")

DEV_HEADER = f"""\
# Everything that building, testing and documenting jaxaccel needs, pinned with hashes; `make` installs exactly this.
# Made from pyproject.toml (extras {", ".join(EXTRAS)}) and the build backend by `make lock`.
"""
COMPILERS_HEADER = """\
# The TPU and GPU compilers that kernels are proven with, pinned with hashes; `make compilers` installs exactly this
# into .compilers, apart from the environment. Made from kernels_pallas/prove/compilers.py by `make lock`.
"""
CONSTRAINTS_HEADER = """\
# Versions that are tested together: pip install -c constraints.txt .
# Made from requirements/dev.txt by `make lock`.
"""
OPTIONS = (
    "--quiet",
    "--generate-hashes",
    "--allow-unsafe",
    "--strip-extras",
    "--no-annotate",
    "--no-header",
    # Where this machine gets its packages from is nobody else's business.
    "--no-emit-index-url",
    "--no-emit-find-links",
    "--no-emit-trusted-host",
    "--no-emit-options",
)


def constraints(locked: str) -> str:
    """The pins of a requirements file without their hashes."""
    pins = sorted(re.findall(r"^[A-Za-z0-9._-]+==[^ \\\n]+", locked, re.MULTILINE))
    return CONSTRAINTS_HEADER + "".join(f"{pin}\n" for pin in pins)


def compile_pins(output: pathlib.Path, header: str, *arguments: str) -> None:
    """Run pip-tools with ``arguments`` and write its pins under a header."""
    command = [sys.executable, "-m", "piptools", "compile", *OPTIONS, *arguments, "-o", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = [line for line in output.read_text().splitlines() if line.strip() and not line.startswith("#")]
    output.write_text(header + "\n".join(lines) + "\n")


def main() -> None:
    """Pin, and write the files."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = [f"--extra={extra}" for extra in EXTRAS]
    with tempfile.TemporaryDirectory() as folder:
        backend = pathlib.Path(folder) / "build.in"
        backend.write_text("\n".join(build))
        compile_pins(DEV, DEV_HEADER, *extras, *sys.argv[1:], str(ROOT / "pyproject.toml"), str(backend))
        wanted = pathlib.Path(folder) / "compilers.in"
        wanted.write_text("\n".join(requirements()))
        compile_pins(COMPILERS, COMPILERS_HEADER, *sys.argv[1:], str(wanted))
    CONSTRAINTS.write_text(constraints(DEV.read_text()))


if __name__ == "__main__":
    main()
