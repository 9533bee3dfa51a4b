"""Time and memory of converting and pruning a large folder, beside a plain copy of its files.

python -m experiments.bench_convert --folder=FOLDER [--preset=nemotron_h_8b]
    [--targets=nemotron_h_4b] [--result=docs/results/convert.md]

Needs room for two and a half times the folder (8B: 41 GB), and deletes what it wrote, except the
random source. Source files leave the page cache before every measurement.
"""

import multiprocessing
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments import artefacts, console, conversion, random_checkpoint
from hybridlm import config
from hybridlm.interop import dispatch
from hybridlm.prune.plan import Plan

RESULT = """# Converting and pruning without loading

A random folder of the preset {preset} (bfloat16, {source:.1f} GB in {files} files) on two shared
cores:

| | seconds | of a copy | peak resident memory |
|---|---|---|---|
| copying its files, synced to disk | {copy:.0f} | 1.00 | |
{rows}
Made by `python -m experiments.bench_convert --folder=FOLDER --preset={preset}
--targets={targets} --result=docs/results/convert.md`.
Every run starts with the source out of the page cache, and ends with its files synced to disk.
*Reading and writing* is all that makes the target; with a plan it includes hashing the source,
which tells that the plan was made for these very parameters. *With verification* adds opening
the target again and comparing every leaf by value with the (cut) source; where blocks are cut, the
outputs of each one of the masked source and the target, too, on random input in float32.
"""


def forget(folder: pathlib.Path) -> None:
  """Drops a folder's files from the page cache, written to disk first."""
  for path in folder.iterdir():
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
  """Returns the seconds that copying a folder's files takes, until they are on the disk."""
  forget(source)
  target.mkdir()
  begin = time.monotonic()
  for path in source.iterdir():
    shutil.copyfile(path, target / path.name)
    handle = os.open(target / path.name, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
  seconds = time.monotonic() - begin
  shutil.rmtree(target)
  return seconds


def _convert(job: conversion.Job) -> tuple[conversion.Report, float]:
  report = conversion.convert(job, say=lambda line: print(line, flush=True))
  return report, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(job: conversion.Job) -> tuple[conversion.Report, float]:
  """Returns what a conversion in a process of its own took, and its peak memory in GB."""
  forget(pathlib.Path(job.source))
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    found = pool.apply(_convert, (job,))
  shutil.rmtree(job.target)
  return found


def check_source(folder: pathlib.Path, preset: str, targets: str) -> None:
  """Raises unless a folder that is there was made for these presets.

  Raises:
    ValueError: its source or its plan is of another model.
  """
  found = dispatch.open(folder / "source")[0]
  plan = Plan.load(folder / "plan.json")
  for name, each, wanted in (
    ("source", found, preset), ("plan", plan.config, preset), ("plan", plan.small_config(), targets)
  ):
    sizes = [(cfg.real_vocabulary, cfg.D, cfg.blocks) for cfg in (each, config.PRESETS[wanted])]
    if sizes[0] != sizes[1]:
      raise ValueError(f"--folder={folder}: its {name} is not of {wanted}; give another folder")


def _row(name: str, seconds: float, copied: float, memory: float) -> str:
  return f"| {name} | {seconds:.0f} | {seconds / copied:.2f} | {memory:.1f} GB |\n"


def main(argv: Sequence[str]) -> None:
  """Makes the source where it is not there, measures, prints the table and writes it.

  Raises:
    ValueError: a flag is wrong, or the folder holds a source of another preset.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("folder", None, "Where source and targets go.", flag_values=values)
  flags.DEFINE_string("result", None, "Markdown file to write.", flag_values=values)
  flags.DEFINE_enum("preset", "nemotron_h_8b", list(config.PRESETS), "Source.", flag_values=values)
  flags.DEFINE_enum("targets", "nemotron_h_4b", list(config.PRESETS), "Cut.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  if not values.folder:
    raise ValueError("give --folder=PATH")
  folder = pathlib.Path(values.folder)
  source, plan = folder / "source", folder / "plan.json"
  if not plan.is_file():
    random_checkpoint.main([
      "", f"--preset={values.preset}", f"--target={source}", f"--plan={plan}",
      f"--targets={values.targets}",
    ])
  check_source(folder, values.preset, values.targets)
  copied = copy(source, folder / "copy")
  print(f"copied in {copied:.1f} s", flush=True)
  rows = ""
  for name, job in {
    "converted to a folder of ours": conversion.Job(str(source), str(folder / "ours"), "hybridlm"),
    f"pruned to {values.targets}": conversion.Job(
      str(source), str(folder / "small"), plan=str(plan)
    ),
  }.items():
    report, memory = measure(job)
    made = report.hash_s + report.write_s
    if report.hash_s:
      rows += _row(f"hashing alone, before it is {name}", report.hash_s, copied, memory)
    rows += _row(f"{name}: reading and writing", made, copied, memory)
    rows += _row(f"{name}: with verification", made + report.verify_s, copied, memory)
  size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
  text = RESULT.format(
    source=size, files=len(list(source.glob("*.safetensors"))), copy=copied,
    rows=rows, preset=values.preset, targets=values.targets,
  )
  print(text)
  if values.result:
    artefacts.write_bytes(pathlib.Path(values.result), text.encode())


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
