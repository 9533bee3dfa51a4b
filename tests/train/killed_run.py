"""A small distillation run in a process of its own, to be killed: see kill_test.py.

usage: killed_run.py WORKDIR [SEAL]   (SEAL: dies at that save, between the state and the manifest)
"""

import os
import pathlib
import signal
import sys

from cases import tiny
from hybridlm.train import loop, optim, sealed, state, step

STEPS, SAVE_EVERY = 120, 3
OPTIMIZER = optim.make(peak=0.02, steps=STEPS, warmup=5)


def run(workdir):
  """Returns the final state and history of the run, from wherever its workdir stands."""
  return loop.run(
    step.make_step(tiny.distillation, OPTIMIZER), state.create(tiny.init(), OPTIMIZER), tiny.Data(),
    steps=STEPS, frozen=tiny.init(1, width=20), workdir=workdir, config={"steps": STEPS},
    log_every=2, save_every=SAVE_EVERY, keep=2, progress="off",
  )


def die_at_save(number):
  """Makes the given save of this process kill it when only the manifest is still to be written."""
  saves, seal = [], sealed.seal

  def dying(*arguments):
    saves.append(arguments)
    if len(saves) == number:
      os.kill(os.getpid(), signal.SIGKILL)
    seal(*arguments)

  sealed.seal = dying


if __name__ == "__main__":
  if len(sys.argv) > 2:
    die_at_save(int(sys.argv[2]))
  run(pathlib.Path(sys.argv[1]))
