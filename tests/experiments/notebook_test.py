"""The notebook runs at toy size and knows the face of the library only."""

import ast
import pathlib

import nbclient
import nbformat
import pytest

import hybridlm
from cases import commands

PATHS = sorted((commands.ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def read(path: pathlib.Path):
  return nbformat.read(path, as_version=4)


def code(path: pathlib.Path) -> str:
  """Returns the code of a notebook as one module."""
  return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")


def test_there_is_a_quickstart():
  assert "quickstart.ipynb" in {path.name for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_face_only(path):
  tree = ast.parse(code(path))
  imported = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      imported.add(node.module)
    elif isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
  ours = ("hybridlm", "experiments", "configs")
  assert {name for name in imported if name.split(".")[0] in ours} == {"hybridlm"}
  used = {
    node.attr for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    and node.value.id == "hybridlm"
  }
  assert used and used <= set(hybridlm.__all__)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
  cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
  assert all(not cell.outputs and cell.execution_count is None for cell in cells)


# What a notebook prints at toy size, by its name.
SAYS = {
  "quickstart": ("teacher: ", "pruned: ", "distilled: ", "from scratch: ", "The Congress"),
  "tpu_vm": ("stages:", "waiting for data", "data wait: ", "\nteacher_flops_per_second: ",
             "'.pb'", "distilled: M-*", "it says ["),
}


def executed(path, folder, monkeypatch) -> str:
  """Returns what a notebook prints when it runs in a folder, at toy size."""
  monkeypatch.setenv("HYBRIDLM_TOY", "1")
  monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
  monkeypatch.setenv("XLA_FLAGS", "")
  notebook = read(path)
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
  )
  client.execute()
  return "".join(
    output.get("text", "") for cell in notebook.cells if cell.cell_type == "code"
    for output in cell.outputs
  )


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, tmp_path, monkeypatch):
  text = executed(path, tmp_path, monkeypatch)
  assert [words for words in SAYS[path.stem] if words not in text] == []


@pytest.mark.ahead
def test_the_plan_of_the_tpu_notebook_is_made_by_the_chip_s_compiler(tmp_path, monkeypatch):
  pytest.importorskip("libtpu")
  (path,) = (path for path in PATHS if path.stem == "tpu_vm")
  text = executed(path, tmp_path, monkeypatch)
  assert "v5e:1x1: 1 devices" in text and "fits, with " in text and "compiled in " in text
