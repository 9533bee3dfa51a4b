"""Many runs of one config with values changed from run to run, and one table of what came out.

python -m experiments.sweep --config=configs/quickstart.py --command=distill
    --sweep="distil.peak=1e-3,2e-3;seed=0,1,2" [--jobs=2] [--columns=...] [--config.KEY=VALUE]

A sweep is a product; `zip:KEY=A,B;KEY=C,D` goes along all keys at once, `list:NAME:KEY=A,KEY=B;...`
names members one by one, and several --sweep multiply. Results: table.md and table.json.
"""

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import artefacts, cli, console, members, memory, settings, sweep_table, sweeping
from experiments.members import Outcome, Task
from experiments.sweeping import Member

FORMAT = "hybridlm-sweep-1"
RECORD, TABLE, PLAIN = "sweep.json", "table.md", "table.json"
PLACES = ("--workdir", "--cache_dir", "--dry_run")


class Sweep(NamedTuple):
  """What the command line asks for: its members, their tasks by name, and where all goes.

  owner: whose the workdir is.  line: the command line.
  """

  members: Sequence[Member]
  tasks: Mapping[str, Task]
  base: cli.Job
  workdir: pathlib.Path
  owner: Mapping[str, str]
  columns: Sequence[str]
  line: str


def main(argv: Sequence[str]) -> None:
  """Runs the members that are not finished and writes the table, anew whenever one ends.

  Raises:
    ValueError: a sweep, a key or a flag that is wrong, before anything starts; or, at the end,
      members that failed.
    FileNotFoundError: there is no such config.
  """
  values = _flags()
  if {"--help", "-h"} & set(argv):
    print(f"{__doc__}\n{values.get_help()}")
  sweep = _read(values, argv)
  if sweep is None:
    return
  states = {name: members.standing(task) for name, task in sweep.tasks.items()}
  for name, (outcome, why) in states.items():
    print(f"{name}: {'to run' if outcome is None else 'done'} ({why})", flush=True)
  if not sweep.base.dry_run:
    done = {name: outcome for name, (outcome, _) in states.items() if outcome is not None}
    _claim(sweep)
    with artefacts.locked(sweep.workdir):
      _run(sweep, done, jobs=values.jobs, retries=values.retries)


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_multi_string(
    "sweep", [], "What changes: KEY=A,B;KEY=C,D or zip:... or list:...; several multiply.",
    flag_values=values,
  )
  flags.DEFINE_enum("command", "distill", sorted(sweep_table.COLUMNS), "What each member runs.",
                    flag_values=values)
  flags.DEFINE_integer("jobs", 1, "Members at a time.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("retries", 1, "Times that a member that crashed is started again.",
                       lower_bound=0, flag_values=values)
  flags.DEFINE_list("columns", None, "Of the table, as STAGE.KEY; default: the command's.",
                    flag_values=values)
  return values


def _read(values: flags.FlagValues, argv: Sequence[str]) -> Sweep | None:
  """Returns the sweep of an argument list, every member's values read; None after help.

  Raises:
    ValueError: a sweep, a key, a value or a flag that is wrong.
  """
  ours = [arg for arg in argv[1:] if arg.partition("=")[0].lstrip("-") in values]
  rest = [arg for arg in argv[1:] if arg not in ours]
  base = cli.parse([argv[0], *rest])
  if base is None:
    return None
  console.parse(values, [argv[0], *ours], "")
  found = sweeping.members(values.sweep)
  _check_free(found, rest)
  given = any(arg.partition("=")[0] == "--workdir" for arg in rest)
  workdir = base.workdir if given else base.workdir.with_name(f"{base.workdir.name}_sweep")
  shared = [arg for arg in rest if arg.partition("=")[0] not in PLACES]
  owner = {
    "config": base.config.name, "file": cli.origin(base.file), "command": values.command,
  }
  tasks = {}
  for member in found:
    folder = workdir / member.name
    own = [f"--config.{key}={value}" for key, value in member.settings]
    line = [f"experiments.{values.command}", *shared, *own, f"--workdir={folder / members.JOB}",
            f"--cache_dir={base.cache}"]
    asked = {"owner": owner, "config": settings.plain(cli.parse(line).config)}
    tasks[member.name] = Task(member.name, folder, tuple(line), asked)
  line = shlex.join(["python", "-m", "experiments.sweep", *argv[1:]])
  columns = tuple(values.columns or sweep_table.COLUMNS[values.command])
  return Sweep(found, tasks, base, workdir, owner, columns, line)


def _check_free(found: Sequence[Member], rest: Sequence[str]) -> None:
  """Raises where a key that a sweep changes is also given a value of its own."""
  swept = {key for member in found for key, _ in member.settings}
  for arg in rest:
    key = arg.partition("=")[0].removeprefix("--config.")
    if key in swept:
      raise ValueError(f"{key!r} is swept and set by {arg}: leave one of them")


def _claim(sweep: Sweep) -> None:
  """Makes the workdir this sweep's.

  Raises:
    ValueError: it is another's, or holds other things.
  """
  record, wanted = sweep.workdir / RECORD, {"format": FORMAT, **sweep.owner}
  if record.is_file():
    held = artefacts.read_record(record, {})
    changed = [key for key in wanted if held.get(key) != wanted[key]]
    if changed:
      raise ValueError(f"workdir {sweep.workdir} belongs to another sweep: its {changed[0]} is "
                       f"{held.get(changed[0])!r}, not {wanted[changed[0]]!r}")
  elif sweep.workdir.exists() and (not sweep.workdir.is_dir() or any(sweep.workdir.iterdir())):
    raise ValueError(f"workdir {sweep.workdir} is neither empty nor a sweep's: give another")
  else:
    artefacts.write_json(record, wanted)


def _run(sweep: Sweep, done: Mapping[str, Outcome], *, jobs: int, retries: int) -> None:
  """Runs what is not done; writes and prints the table.

  Raises:
    ValueError: names the members that failed.
  """
  others = sorted(path.parent.name for path in sweep.workdir.glob(f"*/{members.LOG}")
                  if path.parent.name not in sweep.tasks)
  if others:
    print(f"not of this sweep, left as they are: {', '.join(others)}")
  outcomes, found = dict(done), {}

  def write() -> str:
    for name, outcome in outcomes.items():
      if outcome.state == "done" and name not in found:
        folder = sweep.tasks[name].folder / members.JOB
        found[name] = sweep_table.numbers(folder, sweep.base.cache)
    return _write(sweep, sweep_table.make(sweep.members, outcomes, found, sweep.columns))

  def ended(name: str, outcome: Outcome) -> None:
    outcomes[name] = outcome
    last = f": {outcome.said[-1]}" if outcome.said else ""
    print(f"{name}: {outcome.state} after {outcome.seconds:.0f} s{last}", flush=True)
    write()

  members.run(
    [task for name, task in sweep.tasks.items() if name not in done], jobs=jobs, retries=retries,
    say=lambda line: print(line, flush=True), ended=ended,
  )
  print(write())
  print(f"table: {sweep.workdir / TABLE}")
  failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
  if failed:
    raise ValueError(f"{len(failed)} of {len(sweep.members)} members failed: {', '.join(failed)}; "
                     f"see their {members.LOG} in {sweep.workdir}")


def _write(sweep: Sweep, table: Mapping[str, Any]) -> str:
  """Writes the table as JSON and as Markdown, which it returns."""
  text = sweep_table.markdown(
    table, title=f"{sweep.owner['command']}, swept: {sweep.owner['config']}", command=sweep.line
  )
  artefacts.write_json(sweep.workdir / PLAIN, {"command": sweep.line, **table})
  artefacts.write_bytes(sweep.workdir / TABLE, text.encode())
  return text


def start(argv: Sequence[str]) -> int:
  """Returns the exit code of the command; one that is stopped says how it goes on."""
  memory.keep_freed()
  try:
    return console.call(main, argv)
  except KeyboardInterrupt:
    print("stopped, its members too; the same command goes on from here", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(start(sys.argv))
