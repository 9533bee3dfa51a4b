"""Runs a command that ends when the process that started it does, however that ended.

python -m experiments.watched PIPE MODULE ARGUMENTS

PIPE is the reading end of a pipe whose writing end the other process holds: when it is gone, the
system closes the pipe, and this process ends itself and all that it started.
"""

import os
import runpy
import signal
import sys
import threading


def watch(pipe: int) -> None:
  """Waits until nobody holds the other end of a pipe, and kills this process's group."""
  while os.read(pipe, 1):
    pass
  os.killpg(0, signal.SIGKILL)


def main(argv: list[str]) -> None:
  """Starts to watch, then runs the module as the command it is.

  Raises:
    SystemExit: with the command's exit code.
  """
  os.setpgid(0, 0)  # so that the group is this process and its own children
  threading.Thread(target=watch, args=(int(argv[1]),), daemon=True).start()
  sys.argv = argv[2:]
  runpy.run_module(argv[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main(sys.argv)
