"""Every notebook runs from top to bottom and is committed with its outputs."""

import pathlib

import jax
import nbformat
import pytest
from nbclient import NotebookClient

from tests.compiler import xla_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# These train more than they compile.
TRAINING = {"act_faster", "sample_faster"}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of the messaging libraries between here and the kernel
def test_notebook_runs(path, monkeypatch):
    # As in the suite itself: notebooks wait for compilation most of the time. Theirs is one device.
    monkeypatch.setenv("XLA_FLAGS", xla_flags("3" if path.stem in TRAINING else "0"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in committed), "commit notebooks with their outputs"
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert not any(output.output_type == "error" for cell in committed for output in cell.outputs)
