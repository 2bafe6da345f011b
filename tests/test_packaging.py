"""What is installed is what is declared, pinned and tested."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import jaxaccel

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = ROOT / "requirements"


def pins(text):
    """Name and version of each pin in the text of a requirements file; a package pinned twice is a mistake."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ \\\n]+)", text, re.MULTILINE)
    names = [canonicalize_name(name) for name, _ in found]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    return {name: Version(version) for name, (_, version) in zip(names, found, strict=True)}


def declared(*extras):
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for group in groups for line in group]


def imported(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"jaxaccel", "kernels_pallas", "experiments"}


def guarded(node):
    """Whether a statement tries imports and says what to install where they fail."""
    return isinstance(node, ast.Try) and any(ast.unparse(h.type or h) == "ImportError" for h in node.handlers)


def third_party_imports(package):
    """What the library must have, and what parts of it ask for."""
    needed, optional = set(), set()
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        optional |= set().union(*(imported(node) for node in tree.body if guarded(node)))
        tree.body = [node for node in tree.body if not guarded(node)]
        needed |= imported(tree)
    return needed, optional


def test_runtime_dependencies_are_what_the_library_imports():
    (needed, optional), (needed_too, optional_too) = map(third_party_imports, ("jaxaccel", "kernels_pallas"))
    assert needed | needed_too == {requirement.name for requirement in declared()}
    assert optional | optional_too == {"sklearn"}
    assert {requirement.name for requirement in declared("estimators")} - needed - needed_too == {"scikit-learn"}


def test_every_dependency_is_pinned_within_its_bounds():
    pinned = pins((REQUIREMENTS / "dev.txt").read_text())
    for requirement in declared("experiments", "models", "tests", "docs", "lint"):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_lower_bounds_are_those_that_are_tested():
    direct, _, indirect = (REQUIREMENTS / "lowest.txt").read_text().partition("\n\n")
    assert indirect
    lowest = pins(direct)
    for requirement in declared("experiments", "models", "tests"):
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert lowest.pop(requirement.name) == Version(bound.version), requirement
    assert set(lowest) == {"jaxlib"}  # goes with jax
    assert not set(pins(direct)) & set(pins(indirect))


def test_every_pin_has_hashes_and_names_no_host():
    text = (REQUIREMENTS / "dev.txt").read_text()
    entries = re.split(r"\n(?=[a-zA-Z])", text)[1:]
    assert len(entries) == len(pins((REQUIREMENTS / "dev.txt").read_text())) > 100
    assert all("--hash=sha256:" in entry for entry in entries)
    for path in (REQUIREMENTS / "dev.txt", REQUIREMENTS / "lowest.txt", ROOT / "constraints.txt"):
        assert not re.search(r"://|file:|--index|--find-links|--trusted| @ ", path.read_text()), path
        assert "torch" not in pins(path.read_text())


def test_constraints_are_the_pins_without_hashes():
    spec = importlib.util.spec_from_file_location("lock", REQUIREMENTS / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    assert (ROOT / "constraints.txt").read_text() == lock.constraints((REQUIREMENTS / "dev.txt").read_text())


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    # As a program of its own, in a copy of nothing: the backend reads the checkout and writes only to tmp_path.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"jaxaccel-{jaxaccel.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"jaxaccel-{jaxaccel.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"jaxaccel", "kernels_pallas", info}
    assert {"jaxaccel/py.typed", "kernels_pallas/py.typed", f"{info}/licenses/LICENSE"} <= names
    sources = {str(path.relative_to(ROOT)) for p in ("jaxaccel", "kernels_pallas") for path in (ROOT / p).rglob("*.py")}
    assert sources <= names


def test_make_without_a_target_explains_itself():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("demo", "test", "lint", "docs", "bench"):
        assert re.search(rf"^{target} +\S", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "Python 3.11 or newer is needed"),
        # A stand-in for Debian's python3 without its venv package: it runs, and cannot import what was asked for.
        ('case "$2" in *venv*) exit 1;; *) exit 0;; esac', "apt-get install python3-venv"),
    ],
)
def test_make_says_what_is_missing(tmp_path, script, message):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "make", "cat", "sha256sum", "cut"):
        found = subprocess.run(["bash", "-c", f"command -v {tool}"], capture_output=True, text=True, check=True).stdout
        (tools / tool).symlink_to(found.strip())
    if script is not None:
        (tools / "python3").write_text(f"#!/bin/bash\n{script}\n")
        (tools / "python3").chmod(0o755)
    checkout = tmp_path / "checkout"
    (checkout / "requirements").mkdir(parents=True)
    for name in ("Makefile", "requirements/dev.txt", "requirements/lowest.txt"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    arguments = [str(tools / "make"), "SHELL=" + str(tools / "bash"), "venv"]
    done = subprocess.run(
        arguments, cwd=checkout, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr
