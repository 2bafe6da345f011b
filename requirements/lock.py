"""Pins what pyproject.toml asks for: writes requirements/dev.txt (with hashes) and constraints.txt (without).

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

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEV, CONSTRAINTS = ROOT / "requirements" / "dev.txt", ROOT / "constraints.txt"
EXTRAS = ("experiments", "tests", "docs", "lint")

DEV_HEADER = f"""\
# Everything that building, testing and documenting jaxaccel needs, pinned with hashes; `make` installs exactly this.
# Made from pyproject.toml (extras {", ".join(EXTRAS)}) and the build backend by `make lock`.
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


def main() -> None:
    """Pin, and write both files."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        backend = pathlib.Path(folder) / "build.in"
        backend.write_text("\n".join(build))
        extras = [f"--extra={extra}" for extra in EXTRAS]
        inputs = [str(ROOT / "pyproject.toml"), str(backend)]
        command = [
            sys.executable,
            "-m",
            "piptools",
            "compile",
            *OPTIONS,
            *extras,
            *sys.argv[1:],
            "-o",
            str(DEV),
            *inputs,
        ]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = [line for line in DEV.read_text().splitlines() if line.strip() and not line.startswith("#")]
    DEV.write_text(DEV_HEADER + "\n".join(lines) + "\n")
    CONSTRAINTS.write_text(constraints(DEV.read_text()))


if __name__ == "__main__":
    main()
