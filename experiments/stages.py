"""The stage engine: what is done, what must be redone and why, and running it.

An artefact is a folder. `inputs.json` says what it is made from and is written first; `done.json`
holds the SHA-256 of every file and is written last, in a `.partial` folder that then takes the
place of the old artefact in one rename. A killed stage leaves its `.partial` folder, which the next
run continues if it is made from the same inputs.
"""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments import artefacts

FORMAT = "hybridlm-workdir-1"
USER_ERRORS = (ValueError, FileNotFoundError)
Inputs = Mapping[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a pipeline.

  Attributes:
    name: its folder in the workdir.
    config: the values that decide its result, as plain data.
    run: `(folder, inputs)` fills `folder`; `inputs` are the folders of `needs` by name. It may find
      there what an earlier, killed run with the same inputs left.
    needs: names of the stages it reads, all earlier in the list.
    version: of the code: raise it when the same inputs give another artefact.
    home: where artefacts are shared between workdirs, one folder a fingerprint; None: the workdir.
  """

  name: str
  config: Mapping[str, Any]
  run: Callable[[pathlib.Path, Inputs], None]
  needs: tuple[str, ...] = ()
  version: int = 1
  home: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Status:
  """Where a stage stands: `state` is "done", "redo", "resume" or "new", `why` says it in words."""

  stage: Stage
  folder: pathlib.Path
  inputs: Mapping[str, Any]
  state: str
  why: str

  @property
  def fingerprint(self) -> str:
    """SHA-256 of everything the artefact is made from."""
    return artefacts.digest(self.inputs)

  @property
  def partial(self) -> pathlib.Path:
    """Where the artefact is built."""
    return self.folder.with_name(self.folder.name + ".partial")


def survey(stages: Sequence[Stage], workdir: pathlib.Path) -> list[Status]:
  """Returns the status of every stage, in order; reads, computes and writes nothing else.

  Raises:
    ValueError: a stage twice, a stage that needs a later or unknown one, or a damaged record.
  """
  found: dict[str, Status] = {}
  for stage in stages:
    missing = [name for name in stage.needs if name not in found]
    if stage.name in found or missing:
      raise ValueError(f"stage {stage.name!r}: listed twice, or before what it needs: {missing}")
    inputs = {
      "stage": stage.name,
      "version": stage.version,
      "config": dict(stage.config),
      "needs": {name: found[name].fingerprint for name in stage.needs},
    }
    folder = workdir / stage.name
    if stage.home is not None:
      folder = stage.home / f"{stage.name}-{artefacts.digest(inputs)[:12]}"
    found[stage.name] = _status(stage, folder, inputs)
  return list(found.values())


def _status(stage: Stage, folder: pathlib.Path, inputs: Mapping[str, Any]) -> Status:
  new = Status(stage, folder, inputs, "new", "nothing there yet")
  if (folder / "done.json").is_file():
    made_from = artefacts.read_json(folder / "inputs.json")
    if artefacts.digest(made_from) == new.fingerprint:
      return dataclasses.replace(new, state="done", why="made from the same inputs")
    new = dataclasses.replace(new, state="redo", why=_difference(made_from, inputs))
  if _continues(new):
    return dataclasses.replace(new, state="resume", why="an earlier run left it unfinished")
  return new


def _continues(status: Status) -> bool:
  """Whether the partial folder was started from these inputs."""
  record = status.partial / "inputs.json"
  return record.is_file() and artefacts.digest(artefacts.read_json(record)) == status.fingerprint


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """Says in words what changed between two records of inputs."""
  changes = []
  before, after = flat(old["config"]), flat(new["config"])
  for key in sorted(before.keys() | after.keys()):
    if before.get(key) != after.get(key):
      changes.append(f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}")
  needs = sorted(
    name for name in old["needs"].keys() | new["needs"].keys()
    if old["needs"].get(name) != new["needs"].get(name)
  )
  changes += [f"{name} changed" for name in needs]
  if old["version"] != new["version"]:
    changes.append(f"code version: {old['version']} -> {new['version']}")
  return ", ".join(changes)


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 40 else text[:37] + "..."


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested mappings as one, keys joined by dots."""
  found: dict[str, Any] = {}
  for key, value in tree.items():
    inner = isinstance(value, Mapping)
    found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
  return found


def claim(workdir: pathlib.Path, name: str) -> None:
  """Raises unless a run of config `name` may use the workdir.

  Values may change between runs (the stages that depend on them are redone); the config may not.

  Raises:
    ValueError: the folder is of another config, or holds other things than a workdir.
  """
  record = workdir / "workdir.json"
  if record.is_file():
    held = artefacts.read_json(record)
    if held.get("format") != FORMAT:
      raise ValueError(f"workdir {workdir}: its format is {held.get('format')!r}, not {FORMAT!r}")
    if held.get("config") != name:
      raise ValueError(
        f"workdir {workdir} belongs to config {held.get('config')!r}, not {name!r}: give another "
        "--workdir"
      )
  elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise ValueError(f"workdir {workdir} is neither empty nor one of ours: give another --workdir")


def run(
  stages: Sequence[Stage],
  workdir: pathlib.Path,
  *,
  name: str,
  say: Callable[[str], None],
) -> dict[str, pathlib.Path]:
  """Runs what is not done, in order; returns the folder of every artefact.

  Args:
    stages: the pipeline.
    workdir: where its artefacts go; made where it does not exist.
    name: of the config, which owns the workdir.
    say: takes one line a stage.

  Raises:
    ValueError: the workdir is not this config's, is in use, or an artefact is damaged. A user's
      mistake found by a stage leaves the workdir as it was.
  """
  claim(workdir, name)
  statuses = survey(stages, workdir)
  before = set(workdir.iterdir()) if workdir.exists() else None
  workdir.mkdir(parents=True, exist_ok=True)
  folders: dict[str, pathlib.Path] = {}
  with artefacts.locked(workdir):
    record = workdir / "workdir.json"
    if not record.is_file():
      artefacts.write_json(record, {"format": FORMAT, "config": name})
    try:
      for status in statuses:
        _run_one(status, {need: folders[need] for need in status.stage.needs}, say)
        folders[status.stage.name] = status.folder
    except USER_ERRORS:
      _forget(workdir, before)
      raise
  return folders


def _forget(workdir: pathlib.Path, before: set[pathlib.Path] | None) -> None:
  """Takes back a claim under which nothing was made: the record, and the folder if it is new."""
  record = workdir / "workdir.json"
  if record not in (before or ()) and set(workdir.iterdir()) == {record}:
    record.unlink()
    if before is None:
      workdir.rmdir()


def _run_one(status: Status, inputs: Inputs, say: Callable[[str], None]) -> None:
  label = status.stage.name
  if status.state == "done":
    check(status.folder)
    say(f"{label}: done already ({status.why})")
    return
  say(f"{label}: {status.state} ({status.why})")
  start = time.monotonic()
  partial = status.partial
  continued = _continues(status)
  if not continued:
    shutil.rmtree(partial, ignore_errors=True)
    artefacts.write_json(partial / "inputs.json", status.inputs)
  with artefacts.locked(partial):
    if not (partial / "done.json").is_file():
      try:
        status.stage.run(partial, inputs)
      except USER_ERRORS:
        if not continued:
          shutil.rmtree(partial)
        raise
      artefacts.write_json(partial / "done.json", {"files": artefacts.hashes(partial)})
    _replace(partial, status.folder)
  say(f"{label}: {time.monotonic() - start:.1f} s")


def _replace(new: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts a finished folder in the place of an older one."""
  old = folder.with_name(folder.name + ".old")
  shutil.rmtree(old, ignore_errors=True)
  if folder.exists():
    os.replace(folder, old)
  os.replace(new, folder)
  shutil.rmtree(old, ignore_errors=True)


def check(folder: pathlib.Path) -> None:
  """Raises unless an artefact is complete and its files are what was written.

  Raises:
    FileNotFoundError: the stage never finished.
    ValueError: a file is missing or damaged.
  """
  artefacts.check_hashes(folder, artefacts.read_json(folder / "done.json")["files"])


def describe(statuses: Iterable[Status]) -> list[str]:
  """Returns one line a stage: name, state and reason."""
  return [f"{s.stage.name:<12} {s.state:<7} {s.why}" for s in statuses]
