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


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, tmp_path, monkeypatch):
  monkeypatch.setenv("HYBRIDLM_TOY", "1")
  monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
  monkeypatch.setenv("XLA_FLAGS", "")
  notebook = read(path)
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute()
  text = "".join(
    output.get("text", "") for cell in notebook.cells if cell.cell_type == "code"
    for output in cell.outputs
  )
  for name in ("teacher", "pruned", "distilled", "from scratch"):
    assert f"{name}: " in text
  assert "The Congress" in text
