"""The scan's benchmark: checks, times and compares contenders, and compiles what cannot run."""

import functools
import math
import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import ahead, apart, contenders, mistakes, roofline
from experiments.contenders import Case, Contender
from experiments.roofline import PASSES, Peaks
from hybridlm.ops.ssd import api

Row = dict[str, Any]
MODEL_CHUNKS = ("128", "256")  # what published models set


def run(config: ConfigDict) -> dict[str, Any]:
  """Returns `peaks`, and the tables `times`, `ratios`, `memory` and `ahead` as lists of rows.

  Prints a line a case, so that one sees where it is.

  Raises:
    ValueError: a value of the config is not one of those it may take; before anything is measured.
  """
  section = config[jax.default_backend()]
  cases = check_config(config)
  peaks = {dtype: roofline.measure(dtype, section.turns) for dtype in section.dtypes if cases}
  times = []
  with apart.hosts((*section.implementations, *section.peers) if cases else ()) as hosts:
    for case in cases:
      rows = list(measure(case, section, config, peaks[case.dtype], hosts))
      times += rows
      ready = sum(row["status"] == "ok" for row in rows)
      print(f"{case.shape} L={case.L} {case.dtype}: {ready} of {len(rows)} timed", flush=True)
      for row in rows:
        if row["status"].startswith(("wrong", "failed")):
          print(f"  {row['contender']} {row['status']}", flush=True)
  return {
    "peaks": {dtype: found._asdict() for dtype, found in peaks.items()},
    "times": times,
    "ratios": ratios(times),
    "memory": list(memory(config.memory)),
    "ahead": [row for part in ("tpu", "gpu") for row in compile_ahead(config.ahead[part])],
  }


def check_config(config: ConfigDict) -> list[Case]:
  """Returns the cases of this platform.

  Raises:
    ValueError: names the config's key and the value that it may not take.
  """
  platform = jax.default_backend()
  section = config[platform]
  parts = {platform: section, "memory": config.memory, "ahead.tpu": config.ahead.tpu,
           "ahead.gpu": config.ahead.gpu}
  for key, part in parts.items():
    with mistakes.about(key):
      for label in (*part.implementations, *(part.peers if "peers" in part else ())):
        contenders.split(label)
      lengths = part.lengths if "lengths" in part else (part.length,)
      contenders.cases(part.shapes, lengths, part.dtypes, part.more if "more" in part else ())
  for part in ("tpu", "gpu"):
    with mistakes.about(f"ahead.{part}.targets"):
      for target in config.ahead[part].targets:
        ahead.missing(target)
  for key in ("turns", "queued"):
    if section[key] < 1:
      raise ValueError(f"{platform}.{key} {section[key]} is below 1: nothing would be measured")
  return contenders.cases(section.shapes, section.lengths, section.dtypes, section.more)


def measure(
  case: Case, section: ConfigDict, config: ConfigDict, peaks: Peaks,
  hosts: Mapping[str, apart.Host | apart.Apart],
) -> Iterator[Row]:
  """Yields a row for each contender and pass of a case: checked, then timed in turns."""
  with tempfile.TemporaryDirectory() as folder:
    want = str(pathlib.Path(folder, "want.npz"))
    np.savez(want, **contenders.expected(contenders.inputs(case, seed=config.seed)))
    problem = apart.Problem(
      case, config.seed, want, config.tolerance[case.dtype], config.peers_path,
      jax.default_backend(),
    )
    found = [host.ready(label, problem) for label, host in hosts.items()]
  calls = {
    (contender.label, passes): functools.partial(
      hosts[contender.label].turn, contender.label, passes, section.queued
    )
    for contender in found if not contender.reason for passes in PASSES
  }
  seconds = roofline.take_turns(calls, section.turns)
  for contender in found:
    for passes, temporary in zip(PASSES, contender.temporary, strict=True):
      taken = seconds.get((contender.label, passes))
      yield row(case, contender, passes, taken, temporary, peaks)


def row(
  case: Case, contender: Contender, passes: str, seconds: Sequence[float] | None,
  temporary: int | None, peaks: Peaks,
) -> Row:
  """Returns one line of the table of times; rates and shares only where something was timed."""
  made = {
    "shape": case.shape, "L": case.L, "dtype": case.dtype, "pass": passes,
    "contender": contender.label, "chunk": contender.chunk, "error": contender.error,
    "temporary": temporary, "status": contender.reason or "ok",
  }
  if seconds is None:
    return made
  median = statistics.median(seconds)
  flops = roofline.flops(case.sizes, case.L, contender.chunk, passes=passes)
  itemsize = jnp.dtype(case.dtype).itemsize
  traffic = roofline.traffic(case.sizes, case.L, itemsize, passes=passes)
  return made | {
    "seconds": median,
    "fastest": min(seconds),
    "tokens_a_second": case.sizes.B * case.L / median,
    "flops_a_second": flops / median,
    "of_matmul": flops / median / peaks.matmul,
    "of_batched": flops / median / peaks.batched,
    "of_memory": traffic / median / peaks.memory,
    "of_roofline": max(flops / peaks.matmul, traffic / peaks.memory) / median,
  }


def ratios(times: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Returns how many times faster each of ours is than each peer.

  A peer stands there at each chunk, at the chunks of published models together, and at whichever
  chunk is best in a case. Geometric means over all cases where both were timed, by dtype and pass,
  and the smallest ratio with its case.
  """
  timed = [row for row in times if row["status"] == "ok"]
  by: dict[tuple, dict[str, float]] = {}
  for row in timed:
    key = (row["dtype"], row["pass"], row["shape"], row["L"])
    by.setdefault(key, {})[row["contender"]] = row["seconds"]
  labels = list(dict.fromkeys(row["contender"] for row in timed))
  ours = [label for label in labels if contenders.split(label)[0] in api.IMPLEMENTATIONS]
  made = []
  for mine in ours:
    for side, choices in sides([label for label in labels if label not in ours]).items():
      for group in dict.fromkeys(key[:2] for key in by):
        found = {
          f"{key[2]} L={key[3]} against {'/'.join(labels)}":
            min(seconds[label] for label in labels) / seconds[mine]
          for key, seconds in by.items() for labels in choices
          if key[:2] == group and {mine, *labels} <= set(seconds)
        }
        if found:
          worst = min(found, key=found.get)
          mean = math.exp(statistics.fmean(map(math.log, found.values())))
          made.append({
            "ours": mine, "peer": side, "dtype": group[0], "pass": group[1],
            "cases": len(found), "mean": mean, "smallest": found[worst],
            "where": worst.partition(" against ")[0],
          })
  return made


def sides(labels: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
  """Returns whom to compare with: name -> sets of labels, of each of which the fastest counts."""
  names = dict.fromkeys(label.partition("@")[0] for label in labels)
  found = {label: [(label,)] for label in labels}
  for name in names:
    mine = [label for label in labels if label.partition("@")[0] == name]
    models = [label for label in mine if label.partition("@")[2] in MODEL_CHUNKS]
    if len(models) > 1:
      found[f"{name} at {' and '.join(label.partition('@')[2] for label in models)}"] = [
        (label,) for label in models
      ]
    if len(mine) > 1:
      found[f"{name} at its best"] = [tuple(mine)]
  return found


def memory(part: ConfigDict) -> Iterator[Row]:
  """Yields peak temporary bytes of programs compiled for this device, beside the slow path's."""
  for label in part.implementations:
    name, chunk = contenders.split(label)
    for case in contenders.cases(part.shapes, (part.length,), part.dtypes):
      formula = roofline.slow_path_bytes(case.sizes, case.L, part.chunk)
      for passes in PASSES:
        fn, arguments = contenders.program(
          name=name, chunk=chunk, passes=passes, **case._asdict()
        )
        found = jax.jit(fn).lower(*arguments).compile().memory_analysis()
        temporary = found.temp_size_in_bytes
        yield {
          "contender": label, **case._asdict(), "pass": passes, "temporary": temporary,
          "formula": formula, "times": formula / max(temporary, 1),
        }


def compile_ahead(part: ConfigDict) -> Iterator[Row]:
  """Yields a report of every program compiled for every target, or one row that says why not."""
  programs = [
    {"name": name, "chunk": chunk, "passes": passes, **case._asdict()}
    for name, chunk in map(contenders.split, part.implementations)
    for case in contenders.cases(part.shapes, part.lengths, part.dtypes)
    for passes in PASSES
  ]
  for target in part.targets:
    line = ahead.missing(target)
    if line is not None or not programs:
      yield {"target": target, "missing": line or "nothing was asked for"}
      continue
    jobs = [ahead.Job("experiments.contenders:program", options) for options in programs]
    reports = ahead.compile_jobs(target, jobs)
    failed = sum("error" in report for report in reports)
    print(f"{target}: {len(reports) - failed} of {len(reports)} programs compile", flush=True)
    for options, report in zip(programs, reports, strict=True):
      case = Case(options["shape"], options["L"], options["dtype"])
      itemsize = jnp.dtype(case.dtype).itemsize
      traffic = roofline.traffic(case.sizes, case.L, itemsize, passes=options["passes"])
      yield {"target": target, **options, "algorithm": traffic, **report}
