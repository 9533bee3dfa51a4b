"""Times the SSD scan on this device, beside its peers, and compiles it for chips that are not here.

python -m experiments.benchmark --config=configs/benchmark_ssd.py [--out=FOLDER]
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from configs import benchmark_ssd
from experiments import cli, console, evaluation, peers, scan_bench, scan_report


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
  results = scan_bench.run(values.config)
  timed = {row["contender"].partition("@")[0] for row in results["times"] if "seconds" in row}
  machine = [evaluation.machine(), *peers.versions(name for name in peers.PEERS if name in timed)]
  page = scan_report.markdown(results, command=command(argv), machine=", ".join(machine))
  print(page)
  if values.out:
    scan_report.write(pathlib.Path(values.out), results, page)


def command(argv: Sequence[str]) -> str:
  """Returns the command line, without the folder that a peer lies in on this machine."""
  path = "--config.peers_path="
  told = [f"{path}FOLDER" if arg.startswith(path) else arg for arg in argv[1:]]
  quoted = [f'"{arg}"' if set(arg) & set("()' ") else arg for arg in told]
  return " ".join(["python -m experiments.benchmark", *quoted])


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
