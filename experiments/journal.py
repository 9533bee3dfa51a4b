"""What a run has made and moved, so that all of it can be undone."""

import os
import pathlib
import shutil
from collections.abc import Iterable


def aside(path: pathlib.Path) -> pathlib.Path:
  """Returns where something waits that is being replaced."""
  return path.with_name(path.name + ".old")


def remove(path: pathlib.Path) -> None:
  """Removes a file or a folder, its `inputs.json` first: half removed, nobody goes on with it."""
  if path.is_dir():
    (path / "inputs.json").unlink(missing_ok=True)
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


class Journal:
  """Moves and new things in order; either `undo` takes them back or `settle` makes them final.

  parents: folders that do not exist yet; `undo` removes those that are there and empty.
  """

  def __init__(self, parents: Iterable[pathlib.Path]):
    self._parents = sorted(set(parents), key=lambda path: len(path.parts), reverse=True)
    self._steps: list[tuple[pathlib.Path | None, pathlib.Path]] = []

  def make(self, path: pathlib.Path) -> None:
    """Notes a file or a folder that is about to be made."""
    self._steps.append((None, path))

  def move(self, source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames."""
    os.replace(source, target)
    self._steps.append((source, target))

  def replace(self, path: pathlib.Path) -> None:
    """Makes room at a path: what lies there waits beside it."""
    if path.exists():
      remove(aside(path))
      self.move(path, aside(path))

  def mark(self) -> int:
    """Returns where the journal stands, for `settle`."""
    return len(self._steps)

  def undo(self) -> None:
    """Takes everything back, last things first."""
    while self._steps:
      source, target = self._steps.pop()
      if source is None:
        remove(target)
      else:
        os.replace(target, source)
    for path in self._parents:
      if path.is_dir() and not any(path.iterdir()):
        path.rmdir()

  def settle(self, mark: int = 0) -> None:
    """Makes what was done since a mark final: nothing waits any longer."""
    for source, target in self._steps[mark:]:
      if source is not None and target == aside(source):
        remove(target)
    del self._steps[mark:]
