"""The code that README and guide show is run as it stands, and the commands they show exist."""

import importlib
import inspect
import pathlib
import re

import pytest

from experiments import registry

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "guide.md",
    *(path for path in sorted((ROOT / "docs" / "methods").glob("*.md")) if path.stem != "index"),
]


def blocks(path, language):
    """The code blocks of a page, each with the line that it starts on."""
    text = path.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)), match.group(1)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_run_from_top_to_bottom(path):
    names: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(path, "python"):
        exec(compile("\n" * line + source, str(path), "exec"), names)  # a traceback then names the page's line


def test_the_readme_has_code():
    assert len(list(blocks(ROOT / "README.md", "python"))) >= 3


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_name_experiments_that_exist(path):
    for _, source in blocks(path, "bash"):
        for name in re.findall(r"-m experiments run ([a-z]\w*)", source):
            assert name in registry.names()


def test_commands_name_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"):
        used = set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert used <= targets, path


@pytest.mark.parametrize("family", ["optim", "robustness", "models"])
def test_the_api_pages_show_every_public_function(family):
    # A page shows the modules that its directives name. Naming the family would not do: where a module and a function
    # have the same name, the documentation tool takes the module and loses the function.
    package = importlib.import_module(f"jaxaccel.{family}")
    page = (ROOT / "docs" / "api" / f"{family}.md").read_text()
    shown = set(re.findall(r"^::: (\S+)", page, re.MULTILINE))
    for name in package.__all__:
        member = getattr(package, name)
        module = member.__name__ if inspect.ismodule(member) else getattr(member, "__module__", package.__name__)
        assert module in shown, name
