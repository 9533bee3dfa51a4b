"""Times the SSD scan on this device, beside its peers, and compiles it for chips that are not here.

python -m experiments.benchmark --config=configs/benchmark_ssd.py [--out=FOLDER]
"""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from configs import benchmark_ssd
from experiments import ahead, cli, console, evaluation, peers, scan_bench, scan_report


def main(argv: Sequence[str]) -> None:
  """Checks, measures and compiles, prints the page, and writes it with its tables to `--out`.

  Raises:
    FileNotFoundError: there is no such config.
    ValueError: a flag, or a value of the config, is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "Folder of the page and its tables.", flag_values=values)
  flags.DEFINE_bool("help", False, "Print this.", short_name="h", flag_values=values)
  if cli.read(values, argv, like=benchmark_ssd.get_config()) is None:
    return
  # Several processes share a GPU: none may take most of its memory beforehand.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  results = scan_bench.run(values.config)
  versions = peers.versions(packages(results), values.config.peers_path)
  machine = ", ".join([evaluation.machine(), *versions])
  page = scan_report.markdown(results, command=command(argv), machine=machine)
  print(page)
  if values.out:
    scan_report.write(pathlib.Path(values.out), results, page)


def packages(results: Mapping[str, Any]) -> list[str]:
  """Returns what else the numbers depend on: the packages of peers timed and compilers used."""
  timed = {row["contender"].partition("@")[0] for row in results["times"] if "seconds" in row}
  targets = {row["target"] for row in results["ahead"] if "seconds" in row}
  used = [name for peer in peers.PEERS if peer in timed for name in peers.PEERS[peer].packages]
  used += [name for target in ahead.TARGETS if target in targets
           for name in ahead.TARGETS[target].compilers]
  return [name for name in used if name != "jax"]  # the machine's line has it


def command(argv: Sequence[str]) -> str:
  """Returns the command line, without the folder that a peer lies in on this machine."""
  path = "--config.peers_path="
  told = [f"{path}FOLDER" if arg.startswith(path) else arg for arg in argv[1:]]
  quoted = [f'"{arg}"' if set(arg) & set("()' ") else arg for arg in told]
  return " ".join(["python -m experiments.benchmark", *quoted])


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
