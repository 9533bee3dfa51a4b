"""What every command shares: flags, the config and its overrides, one line for a user's mistake."""

import difflib
import functools
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from experiments import console, memory, observing, processes, stages

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Job(NamedTuple):
  """What the command line asks for.

  config: every value, overrides applied.  file: where they come from, as given.  workdir: where
  artefacts go.  cache: what workdirs share (teachers, token ids, compiled programs).  dry_run: say
  what would be done, and do nothing.  profile: steps to trace, see `observing.traced`.
  place: where this process stands among several; None: it is alone.  team: all of them, once they
  have found each other.  aot: the slice to compile for instead, see `experiments.aot`.
  """

  config: ConfigDict
  file: str
  workdir: pathlib.Path
  cache: pathlib.Path
  dry_run: bool
  profile: tuple[int, int] | None = None
  place: processes.Place | None = None
  team: processes.Team = processes.ALONE
  aot: str | None = None


def start(main: Callable[[Job], None]) -> None:
  """Runs a command with this process's arguments and ends the process with its exit code."""
  memory.keep_freed()
  sys.exit(call(main, sys.argv))


def call(main: Callable[[Job], None], argv: Sequence[str]) -> int:
  """Returns the exit code of a command with a config, as `console.call` does.

  Of several processes each ends where another one fails, and none returns then.
  """

  def run(argv: Sequence[str]) -> None:
    job = parse(argv)
    if job is not None:
      _keep_programs(job.cache / "programs")
      with processes.join(job.place) as team:
        main(job._replace(team=team))

  return console.call(run, argv)


def parse(argv: Sequence[str]) -> Job | None:
  """Returns the job of an argument list, or None after printing the help it asks for.

  Raises:
    FileNotFoundError: there is no such config.
    ValueError: an unknown flag or config key, or a value of another type.
  """
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir", None, "Where artefacts and the report go; default workdir/NAME.", flag_values=values
  )
  flags.DEFINE_string(
    "cache_dir", None, "What workdirs share: teachers, token ids, compiled programs; default: "
    "the folder cache beside the workdir.", flag_values=values,
  )
  flags.DEFINE_bool(
    "dry_run", False, "Print stages, sizes and memory; compute nothing.", flag_values=values
  )
  flags.DEFINE_string(
    "profile", None, "START:STOP: the steps of the distillation after START up to STOP leave a "
    "trace for XProf in the stage's folder `trace`.", flag_values=values,
  )
  flags.DEFINE_string(
    "aot", None, "CHIP:SHAPE, such as v5p:4x4x4 or h200:8: compile a step of the distillation for "
    "this slice, say if it fits and how fast it may be, and run nothing; a TPU's with @memory "
    "behind it up to where memory is laid out.", flag_values=values,
  )
  processes.define(values)
  flags.DEFINE_bool("help", False, "Print this.", short_name="h", flag_values=values)
  file = read(values, argv, like=base.get_config())
  if file is None:
    return None
  workdir = pathlib.Path(values.workdir or pathlib.Path("workdir", values.config.name))
  cache = pathlib.Path(values.cache_dir or workdir.parent / "cache")
  profile = None if values.profile is None else observing.steps_of(values.profile)
  return Job(values.config, file, workdir, cache, values.dry_run, profile, processes.place(values),
             aot=values.aot)


def read(values: flags.FlagValues, argv: Sequence[str], *, like: ConfigDict) -> str | None:
  """Reads an argument list into flags and `values.config`; returns the config's file as given.

  None after printing the help that it asks for. `like` has the parts that the command reads.

  Raises:
    FileNotFoundError: there is no such config.
    ValueError: an unknown flag or config key, a value of another type, or another command's config.
  """
  if {"--help", "-h"} & set(argv):
    print(f"--config=FILE: one of {', '.join(installed())}, or your own; --config.KEY=VALUE")
    print(values.get_help())
    return None
  given = [arg for arg in argv if arg.partition("=")[0] == "--config"]
  if len(given) != 1 or not given[0].partition("=")[2]:
    raise ValueError(f"give one --config=FILE; installed: {', '.join(installed())}")
  file = given[0].partition("=")[2]
  config = runpy.run_path(str(find(file)))["get_config"]()
  absent = set(like) - set(config)
  if absent:
    raise ValueError(f"config {file} is another command's: it has no part {min(absent)!r}")
  _check_keys(argv, config)
  others = _unset([arg for arg in argv if arg != given[0]], config)
  config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=others)
  try:
    rest = values(others)[1:]
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest:
    raise ValueError(f"argument {rest[0]!r} is not a flag; values are given as --name=value")
  return file


def find(name: str) -> pathlib.Path:
  """Returns a config's file: relative to the working directory, or else an installed one.

  Raises:
    FileNotFoundError: it is in neither place.
  """
  for path in (pathlib.Path(name), ROOT / name):
    if path.is_file():
      return path
  raise FileNotFoundError(f"config {name}: no such file; installed: {', '.join(installed())}")


def origin(name: str) -> str:
  """Returns where a config comes from, as workdirs remember it.

  That is its path from the last folder `configs` on, so that checkouts and installations agree, and
  the whole path for a file that lies in no such folder.
  """
  path = find(name).resolve()
  at = [index for index, part in enumerate(path.parts[:-1]) if part == "configs"]
  return path.as_posix() if not at else pathlib.Path(*path.parts[at[-1] :]).as_posix()


def installed() -> list[str]:
  """Returns the configs that come with the package, as `--config` takes them."""
  files = sorted((ROOT / "configs").rglob("*.py"), key=lambda path: (len(path.parts), path))
  names = (path.relative_to(ROOT).as_posix() for path in files)
  return [name for name in names if not name.endswith(("__init__.py", "base.py"))]


def _check_keys(argv: Sequence[str], config: ConfigDict) -> None:
  known = list(stages.flat(config.to_dict()))
  for arg in argv:
    flag = arg.partition("=")[0].lstrip("-")
    key = flag.removeprefix("config.")
    if flag.startswith("config.") and key not in known:
      inside = [name for name in known if name.startswith(f"{key}.")]
      near = inside or difflib.get_close_matches(key, known, n=3, cutoff=0.0)
      raise ValueError(f"config key {key!r} is unknown; nearest: {', '.join(near)}")


def _unset(argv: Sequence[str], config: ConfigDict) -> list[str]:
  """Returns the arguments without those that unset a value, `KEY=None` or `KEY=`; unsets it.

  Only what `configs.base` leaves unset can be. Of several arguments for a key the last counts.
  """
  free = {key for key, value in stages.flat(base.get_config().to_dict()).items() if value is None}
  rest: list[str] = []
  for arg in argv:
    flag, _, value = arg.partition("=")
    key = flag.lstrip("-").removeprefix("config.")
    if "=" in arg and value in ("", "None") and key in free:
      *folders, name = key.split(".")
      functools.reduce(lambda tree, folder: tree[folder], folders, config)[name] = None
      rest = [other for other in rest if other.partition("=")[0].lstrip("-") != flag.lstrip("-")]
    else:
      rest.append(arg)
  return rest


def _keep_programs(folder: pathlib.Path) -> None:
  """Makes JAX keep compiled programs between runs, unless the caller's environment decides."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
