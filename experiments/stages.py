"""The stage engine: what is done, what must be redone and why, and running it.

An artefact is a folder. `inputs.json` says what it is made from and is written first; `done.json`
holds the SHA-256 of every file and is written last, in a `.partial` folder that then takes the
place of the old artefact in one rename. A killed stage leaves its `.partial` folder, which the next
run continues if it is made from the same inputs. What a run replaces waits as `.old` until it ends,
so that a user's mistake, however late a stage finds it, leaves the workdir as it was.

Of several processes the first runs the engine. The others come along where a stage runs on all of
them, read what it says is there, and write only what that stage has each of them write.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments import artefacts, mistakes, processes
from experiments.journal import Journal, aside, remove
from hybridlm.train import guard

FORMAT = "hybridlm-workdir-2"
SHOWN = 120.0  # seconds until what one process wrote must be seen by all
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
    together: every process of the job runs it, in the same folder; else the first one alone does.
  """

  name: str
  config: Mapping[str, Any]
  run: Callable[[pathlib.Path, Inputs], None]
  needs: tuple[str, ...] = ()
  version: int = 1
  home: pathlib.Path | None = None
  together: bool = False


def rewired(stage: Stage | None, names: Mapping[str, str]) -> Stage | None:
  """Returns a stage of another name and with other needs, which it reads under the plain names.

  Args:
    stage: the stage; None stays None.
    names: plain name -> the one in this pipeline, of the stage and of its needs; what is not among
      them keeps its name.
  """
  if stage is None or not {stage.name, *stage.needs} & {k for k, v in names.items() if k != v}:
    return stage
  seen = {need: names.get(need, need) for need in stage.needs}

  def run(folder: pathlib.Path, inputs: Inputs) -> None:
    stage.run(folder, {plain: inputs[name] for plain, name in seen.items()})

  name = names.get(stage.name, stage.name)
  return dataclasses.replace(stage, name=name, needs=tuple(seen.values()), run=run)


@dataclasses.dataclass(frozen=True)
class Status:
  """Where a stage stands: `state` is "done", "redo", "resume" or "new", `why` says it in words.

  `inputs` say how the artefact comes about, `made` (need -> SHA-256 of its artefact, or None where
  that is still to be made) what lay there when it did.
  """

  stage: Stage
  folder: pathlib.Path
  inputs: Mapping[str, Any]
  made: Mapping[str, str | None]
  state: str
  why: str

  @property
  def fingerprint(self) -> str:
    """SHA-256 of everything that decides how the artefact is made."""
    return artefacts.digest(self.inputs)

  @property
  def record(self) -> dict[str, Any]:
    """What `inputs.json` holds."""
    return dict(self.inputs) | ({"made": dict(self.made)} if self.made else {})

  @property
  def partial(self) -> pathlib.Path:
    """Where the artefact is built."""
    return self.folder.with_name(self.folder.name + ".partial")


def survey(stages: Sequence[Stage], workdir: pathlib.Path) -> list[Status]:
  """Returns the status of every stage, in order; reads, computes and writes nothing else.

  A stage whose need is still to be made counts as one to redo; a run looks again when it is there.

  Raises:
    ValueError: a stage twice, a stage that needs a later or unknown one, or a damaged record.
  """
  found: dict[str, Status] = {}
  for blank in _blank(stages, workdir):
    made = {
      name: _content(found[name].folder) if found[name].state == "done" else None
      for name in blank.stage.needs
    }
    found[blank.stage.name] = _status(blank.stage, blank.folder, blank.inputs, made)
  return list(found.values())


def _blank(stages: Sequence[Stage], workdir: pathlib.Path) -> list[Status]:
  """Returns how every stage's artefact comes about and where it goes; nothing is read."""
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
    found[stage.name] = Status(stage, folder, inputs, {}, "new", "nothing there yet")
  return list(found.values())


def _status(stage: Stage, folder: pathlib.Path, inputs, made) -> Status:
  new = Status(stage, folder, inputs, made, "new", "nothing there yet")
  if (folder / "done.json").is_file():
    record = _record(folder)
    if artefacts.digest(record) == artefacts.digest(new.record):
      return dataclasses.replace(new, state="done", why="made from the same inputs")
    new = dataclasses.replace(new, state="redo", why=_difference(record, new.record))
  if _continues(new):
    return dataclasses.replace(new, state="resume", why="an earlier run left it unfinished")
  return new


def _record(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what an artefact was made from."""
  return artefacts.read_record(folder / "inputs.json", {"config": dict, "needs": dict})


def _content(folder: pathlib.Path) -> str:
  """Returns the SHA-256 of a finished artefact: of the hashes of its files."""
  return artefacts.digest(_files(folder))


def _files(folder: pathlib.Path) -> dict[str, str]:
  return artefacts.read_record(folder / "done.json", {"files": dict})["files"]


def _continues(status: Status) -> bool:
  """Whether the partial folder was started from these inputs."""
  if not (status.partial / "inputs.json").is_file():
    return False
  return artefacts.digest(_record(status.partial)) == artefacts.digest(status.record)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """Says in words what changed between two records of inputs."""
  changes = []
  before, after = flat(old["config"]), flat(new["config"])
  for key in sorted(before.keys() | after.keys()):
    if before.get(key) != after.get(key):
      changes.append(f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}")
  was, now = (dict(record.get("made") or {}) for record in (old, new))
  for name in sorted(old["needs"].keys() | new["needs"].keys()):
    if old["needs"].get(name) != new["needs"].get(name):
      changes.append(f"{name} changed")
    elif was.get(name) != now.get(name):
      changes.append(f"{name} was made anew" if now.get(name) else f"{name} is made anew")
  if old.get("version") != new["version"]:
    changes.append(f"code version: {old.get('version')} -> {new['version']}")
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


def claim(workdir: pathlib.Path, owner: Mapping[str, str]) -> None:
  """Raises unless a config may use the workdir.

  Values may change between runs (the stages that depend on them are redone); the config may not.

  Args:
    workdir: where artefacts are to go.
    owner: "config": its name; "file": where it comes from, see `cli.origin`.

  Raises:
    ValueError: the folder is of another config, or holds other things than a workdir.
  """
  record = workdir / "workdir.json"
  if record.is_file():
    held = artefacts.read_record(record, {})
    if held.get("format") != FORMAT:
      raise ValueError(f"workdir {workdir}: its format is {held.get('format')!r}, not {FORMAT!r}")
    theirs, ours = (
      f"config {one.get('config')!r} of {one.get('file')}" for one in (held, owner)
    )
    if theirs != ours:
      raise ValueError(f"workdir {workdir} belongs to {theirs}, not {ours}: give another --workdir")
  elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise ValueError(f"workdir {workdir} is neither empty nor one of ours: give another --workdir")


def run(
  stages: Sequence[Stage],
  workdir: pathlib.Path,
  *,
  owner: Mapping[str, str],
  say: Callable[[str], None],
  team: processes.Team = processes.ALONE,
) -> dict[str, pathlib.Path]:
  """Runs what is not done, in order; returns the folder of every artefact.

  Of several processes all call it, and all but the first return nothing. A user's mistake that a
  stage finds is undone: the workdir is as it was. What lies in a stage's `home` stays. Bad steps
  and a full disk are no mistakes: what was done before stays.

  Args:
    stages: the pipeline.
    workdir: where its artefacts go; made where it does not exist.
    owner: the config that owns the workdir, see `claim`.
    say: takes one line a stage.
    team: the processes of the job.

  Raises:
    ValueError: the workdir is not this config's, is in use, or an artefact is damaged; or a process
      does not see what another wrote.
  """
  if not team.leads:
    _follow(_blank(stages, workdir), team)
    return {}
  claim(workdir, owner)
  statuses = survey(stages, workdir)
  homes = {status.folder.parent for status in statuses}
  journal = Journal(folder for home in homes | {workdir} for folder in _missing(home))
  workdir.mkdir(parents=True, exist_ok=True)
  folders: dict[str, pathlib.Path] = {}
  with artefacts.locked(workdir):
    try:
      record = workdir / "workdir.json"
      if not record.is_file():
        journal.make(record)
        artefacts.write_json(record, {"format": FORMAT, **owner})
      for status in statuses:
        _recover(status)
        needs = {need: folders[need] for need in status.stage.needs}
        _run_one(status, needs, journal, say, team)
        folders[status.stage.name] = status.folder
      team.share()  # until here the others have waited
    except mistakes.TYPES as error:
      if mistakes.is_mistake(error) and not _lasting(error):
        journal.undo()
      raise
    finally:
      journal.settle()
  return folders


def _lasting(error: BaseException) -> bool:
  """Whether what is there is good all the same: numbers went wrong, or the disk."""
  disk = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
  return disk or isinstance(error, (FloatingPointError, guard.Bad))


def _missing(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders that would have to be made for one to be there."""
  return [path for path in (folder, *folder.parents) if not path.exists()]


def _recover(status: Status) -> None:
  """Puts right what a run that was killed while it replaced something left aside."""
  for path in (status.folder, status.partial) if status.stage.home is None else ():
    old = aside(path)
    if old.exists() and not path.exists() and (old / "inputs.json").is_file():
      os.replace(old, path)
    remove(old)


def _run_one(
  status: Status, inputs: Inputs, journal: Journal, say: Callable[[str], None],
  team: processes.Team,
) -> None:
  label, mark = status.stage.name, journal.mark()
  made = {need: _content(folder) for need, folder in inputs.items()}
  status = _status(status.stage, status.folder, status.inputs, made)
  if status.state == "done":
    check(status.folder)
    team.share()
    say(f"{label}: done already ({status.why})")
    return
  say(f"{label}: {status.state} ({status.why})")
  start = time.monotonic()
  partial = status.partial
  if status.state != "resume":
    journal.replace(partial)
    journal.make(partial)
    artefacts.write_json(partial / "inputs.json", status.record)
  with artefacts.locked(partial):
    if (partial / "done.json").is_file():
      team.share()
    else:
      _run_stage(status, inputs, team)
      artefacts.write_json(partial / "done.json", {"files": artefacts.hashes(partial)})
    journal.replace(status.folder)
    journal.move(partial, status.folder)
  if status.stage.home is not None:
    journal.settle(mark)  # other workdirs may use it from now on
  say(f"{label}: {time.monotonic() - start:.1f} s")


def _run_stage(status: Status, inputs: Inputs, team: processes.Team) -> None:
  """Runs a stage, and has the other processes run it too where it is for all."""
  team.share(status.record if status.stage.together else None)
  status.stage.run(status.partial, inputs)
  if status.stage.together:
    team.meet()


def _follow(blanks: Sequence[Status], team: processes.Team) -> None:
  """Runs, stage by stage, what process 0 says is for all; the rest is waited for."""
  folders = {blank.stage.name: blank.folder for blank in blanks}
  for blank in blanks:
    record = team.share()
    if record is None:
      continue
    inputs = {need: folders[need] for need in blank.stage.needs}
    _see(blank.partial / "inputs.json", lambda path: _record(path.parent), record)
    for need, folder in inputs.items():
      _see(folder / "done.json", lambda path: _content(path.parent), record["made"][need])
    blank.stage.run(blank.partial, inputs)
    team.meet()
  team.share()


def _see(path: pathlib.Path, read: Callable[[pathlib.Path], Any], wanted: Any) -> None:
  """Waits until a file that another process wrote is seen here as it was written.

  Raises:
    ValueError: it is not, however long one looks.
  """
  until = time.monotonic() + SHOWN
  while True:
    with contextlib.suppress(FileNotFoundError, ValueError):
      if read(path) == wanted:
        return
    if time.monotonic() > until:
      raise ValueError(f"{path} is not what process 0 wrote there: all processes must see the same "
                       "workdir and cache, on a file system that they share")
    time.sleep(0.2)


def check(folder: pathlib.Path) -> None:
  """Raises unless an artefact is complete and its files are what was written.

  Raises:
    FileNotFoundError: the stage never finished.
    ValueError: a file is missing or damaged.
  """
  artefacts.check_hashes(folder, _files(folder))


def describe(statuses: Iterable[Status]) -> list[str]:
  """Returns one line a stage: name, state and reason."""
  return [f"{s.stage.name:<12} {s.state:<7} {s.why}" for s in statuses]
