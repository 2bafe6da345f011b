"""The catalogue, and what must agree with it: modules, tests, pages, experiments and published tables."""

import importlib
import importlib.util
import pathlib
import re

import pytest

from experiments import publish, registry
from experiments.runner.files import OutputError
from jaxaccel import catalogue

ROOT = pathlib.Path(__file__).resolve().parent.parent
DONE = [method for method in catalogue.METHODS if method.status == "done"]
SLUGS = {
    "accelat", "acret", "atlas", "blockffn", "continual", "covid_ultrasound", "dynosaur", "efficient_vla", "exadam",
    "fscl", "gain_rl", "gbnn", "gbrl", "geb", "gpicl", "harmonica", "infinity_instruct", "kinetics", "lcia",
    "learn2pd", "lion", "llm_acceleration", "local_linear_attention", "metainf", "performance_prediction", "qfx",
    "reconresnet", "scalerl", "scf_density", "sft_guide", "superconductors", "unlearnable", "wysiwygan",
}  # fmt: skip


def done(function):
    return pytest.mark.parametrize("method", DONE, ids=lambda method: method.slug)(function)


def test_the_33_methods_are_there_once():
    assert len(catalogue.METHODS) == 33
    assert {method.slug for method in catalogue.METHODS} == SLUGS
    for field in ("slug", "name", "paper", "arxiv", "module"):
        values = [getattr(method, field) for method in catalogue.METHODS]
        assert len(set(values)) == 33, field


@pytest.mark.parametrize("method", catalogue.METHODS, ids=lambda method: method.slug)
def test_an_entry_is_complete(method):
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert 2017 <= method.year <= 2026
    assert method.family in catalogue.FAMILIES
    assert method.module.startswith(f"jaxaccel.{method.family}")
    assert method.cheaper
    assert "\n" not in method.cheaper
    assert len(method.cheaper) <= 120  # one line of a table
    assert all(name.strip() == name and name for name in method.authors.split(", "))
    assert method.status in ("done", "planned")
    assert bool(method.experiments) == (method.status == "done")


def test_families_hold_all_methods_and_none_is_empty():
    groups = catalogue.by_family()
    assert tuple(groups) == catalogue.FAMILIES
    assert all(groups.values())
    assert sum(map(len, groups.values())) == 33


def test_the_methods_that_are_done():
    assert {method.slug: method.experiments for method in DONE} == {
        "exadam": ("exadam",),
        "lion": ("lion", "lion_search"),
        "accelat": ("accelat",),
        "local_linear_attention": ("local_linear_regression", "local_linear_in_context"),
        "kinetics": ("kinetics", "block_topk_recall", "block_topk_latency"),
        "harmonica": ("harmonica",),
        "efficient_vla": ("efficient_vla",),
        "llm_acceleration": ("medusa", "snapkv_recall"),
        "geb": ("geb",),
        "blockffn": ("blockffn",),
        "learn2pd": ("learn2pd",),
        "qfx": ("qfx",),
        "gbrl": ("gbrl", "trees"),
        "gbnn": ("gbnn",),
    }
    assert registry.names() == tuple(name for method in DONE for name in method.experiments)


def test_an_unknown_slug_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'exadm': did you mean 'exadam'"):
        catalogue.get("exadm")
    with pytest.raises(ValueError, match="expected one of accelat, acret"):
        catalogue.get("")


def test_bibtex_names_paper_authors_and_eprint():
    entry = catalogue.bibtex(catalogue.get("accelat"))
    assert "{{AccelAT: A Framework for" in entry
    assert "F. Nikfam and A. Marchisio and M. Martina and M. Shafique" in entry
    assert "{2022}" in entry
    for method in catalogue.METHODS:
        entry = catalogue.bibtex(method)
        assert entry.count("{") == entry.count("}")


@done
def test_a_done_method_has_a_module(method):
    assert importlib.import_module(method.module).__doc__


@done
def test_a_done_method_has_a_test(method):
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "tests"]
    short = method.module.removeprefix("jaxaccel.")
    assert any(method.slug in path.name or short in path.read_text() for path in tests)


@done
def test_a_done_method_has_a_page_in_the_navigation(method):
    page = ROOT / "docs" / "methods" / f"{method.slug}.md"
    assert page.exists()
    assert f"methods/{method.slug}.md" in (ROOT / "mkdocs.yml").read_text()
    assert method.arxiv in page.read_text()
    for name in method.experiments:
        guide = publish.GUIDES.get(name)
        if guide is not None:
            assert f"(../{guide})" in page.read_text()
        shown = page if guide is None else ROOT / "docs" / guide
        assert f"docs/results/{name}.md" in shown.read_text(), "the page shows what was measured"


@done
def test_a_done_method_has_its_experiments(method):
    for name in method.experiments:
        experiment = registry.get(name)
        assert experiment.name == name
        assert experiment.method == method.slug
        assert set(experiment.presets) == {"quick", "full"}


@done
def test_a_done_method_has_published_results(method):
    assert len(publish.headlines(method)) == len(method.experiments)


def test_the_readme_and_the_docs_are_up_to_date():
    again = "run `python -m experiments publish`"
    assert publish.check_readme(), again
    assert publish.check_index(), again
    assert publish.check_results() == [], again


# Publishing


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "docs" / "results").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "methods" / "index.md"):
        path.write_text(f"before\n{publish.START}\nold\n{publish.END}\nafter\n")
    return tmp_path


def test_the_table_shows_what_was_measured_and_nothing_else(checkout):
    results = checkout / "docs" / "results"
    (results / "exadam.json").write_text('{"headline": "1.1x | fewer\\nsteps"}')
    table = publish.readme_table(results)
    lines = table.splitlines()
    assert len(lines) == 33 + 2
    (line,) = [line for line in lines if "2412.20302" in line]
    assert line.endswith("| done | 1.1x \\| fewer steps |")
    (planned,) = [line for line in lines if "2407.02880" in line]
    assert planned.endswith("| planned | — |")


def test_only_the_text_between_the_markers_changes(checkout):
    readme, results = checkout / "README.md", checkout / "docs" / "results"
    assert not publish.check_readme(readme, results)
    publish.update_readme(readme, results)
    assert publish.check_readme(readme, results)
    text = readme.read_text()
    assert text.startswith(f"before\n{publish.START}\n| method |")
    assert text.endswith(f"|\n{publish.END}\nafter\n")
    publish.update_readme(readme, results)
    assert readme.read_text() == text


def test_a_file_without_markers_is_refused_and_kept(checkout):
    readme = checkout / "README.md"
    readme.write_text("no table here\n")
    with pytest.raises(ValueError, match=r"README\.md: expected a line <!-- methods:start -->"):
        publish.update_readme(readme)
    assert readme.read_text() == "no table here\n"


def test_a_result_without_a_headline_is_refused(checkout):
    results = checkout / "docs" / "results"
    for content in ("{}", "[]", '{"headline": 3}'):
        (results / "exadam.json").write_text(content)
        with pytest.raises(OutputError, match=r"exadam\.json has no headline"):
            publish.readme_table(results)


def test_publish_copies_the_newest_results(checkout):
    from experiments.runner import files
    from experiments.runner.api import Comparison, Table, to_json

    table = Table("Losses", ("arm", "loss"), (("adam", 0.5), ("exadam", None)), note="lower is better")
    comparison = Comparison("no difference", tables=(table,), notes=("three seeds",))
    run = checkout / "out" / "runs" / "exadam-1"
    info = {"experiment": "exadam", "status": "finished", "preset": "quick", "platform": "cpu", "device": "cpu"}
    files.write_json(run / "run.json", info)
    files.write_json(run / "result.json", to_json(comparison))
    results = checkout / "docs" / "results"
    written = list(publish.publish(checkout / "out", checkout))
    assert len(written) == 3
    text = (results / "exadam.md").read_text()
    for part in ("**no difference**", "| adam | 0.5 |", "| exadam | — |", "lower is better", "- three seeds", "on cpu"):
        assert part in text
    assert publish.headlines(catalogue.get("exadam"), results) == ["no difference"]
    assert publish.check_readme(checkout / "README.md", results)
    assert publish.check_index(checkout / "docs" / "methods" / "index.md", results)
    assert publish.check_results(results) == []
    (results / "exadam.md").write_text("edited")
    assert publish.check_results(results) == ["exadam"]
