"""The rules of the house that a reader of the source can check: imports only go down, nothing executes data."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("experiments", "jaxaccel", "kernels_pallas")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# What each package may not import.
ABOVE = {"experiments": (), "jaxaccel": ("experiments",), "kernels_pallas": ("experiments", "jaxaccel")}

# Modules and calls that can turn a file into running code.
EXECUTING_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
EXECUTING_CALLS = {"eval", "exec"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(source, package):
    """Every broken rule in ``source``, which belongs to ``package``."""
    tree = ast.parse(source)
    found = []
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] in ABOVE[package]:
            found.append(f"imports {name}, which lies above")
        if parts[:2] == ["jax", "_src"]:
            found.append(f"imports {name}, which is private to JAX")
        if parts[0] in EXECUTING_MODULES:
            found.append(f"imports {name}, which executes data")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "_src":
            found.append(f"line {node.lineno} reaches into a private module")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EXECUTING_CALLS:
            found.append(f"line {node.lineno} calls {node.func.id}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno} allows pickles")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path):
    assert violations(path.read_text(), path.relative_to(ROOT).parts[0]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import jaxaccel.optim",
        "from experiments import runner",
        "import jax._src.core",
        "from jax._src import core",
        "from jax import _src",
        "import jax\njax._src.core",
        "import pickle",
        "eval('1')",
        "exec('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
    ],
)
def test_each_rule_can_fail(source):
    assert violations(source, "kernels_pallas")


def test_files_hold_one_idea_each():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}
