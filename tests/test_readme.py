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
    ROOT / "docs" / "trees.md",
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


def shown_modules(page):
    """The modules that an API page shows, each with the members that are listed, or ``None`` for all of its own."""
    for block in re.split(r"^::: ", page, flags=re.MULTILINE)[1:]:
        module, options = block.split("\n", 1)
        members = re.search(r"^ +members:(.*(?:\n +- .*)*)", options, re.MULTILINE)
        words = re.findall(r"\w+", members.group(1)) if members else ["true"]
        yield module.strip(), None if words == ["true"] else set(words) - {"false"}


@pytest.mark.parametrize(
    "family",
    [
        "optim",
        "attention",
        "decoding",
        "caching",
        "compression",
        "posttraining",
        "forecasting",
        "robustness",
        "diffusion",
        "models",
    ],
)
def test_the_api_pages_show_every_public_function(family):
    # A page shows the modules that its directives name. Naming the family would not do: where a module and a function
    # have the same name, the documentation tool takes the module and loses the function.
    package = importlib.import_module(f"jaxaccel.{family}")
    shown = dict(shown_modules((ROOT / "docs" / "api" / f"{family}.md").read_text()))
    for name in package.__all__:
        member = getattr(package, name)
        home = member.__name__ if inspect.ismodule(member) else getattr(member, "__module__", None)  # data has none
        listed = any(members is not None and name in members for members in shown.values())
        whole = [module for module, members in shown.items() if members is None]
        assert listed or home in whole or any(vars(importlib.import_module(m)).get(name) is member for m in whole), name
