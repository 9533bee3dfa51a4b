"""One process of two that train together, are asked to end, and go on: see several_test.py.

usage: several_run.py PORT PROCESS WORKDIR
"""

import json
import os
import pathlib
import signal
import sys
import traceback

import jax
import numpy as np
from jax.sharding import AxisType

from cases import tiny
from hybridlm.train import checkpoint, guard, loop, mesh, optim, state, step, stop

STEPS, PROCESSES = 12, 2
OPTIMIZER = optim.make(peak=0.02, steps=STEPS, warmup=2)


class Data(tiny.Data):
  """The usual batches; one of them is infinite, and at another the process is asked to end."""

  def __init__(self, *, bad=None, ends=None):
    super().__init__()
    self._bad, self._ends = bad, ends

  def __next__(self):
    number = self.get_state()["next"]
    if number == self._ends:
      os.kill(os.getpid(), signal.SIGTERM)
    batch = super().__next__()
    if number == self._bad:
      batch["weight_BL"] = batch["weight_BL"] * np.float32(np.inf)
    return batch


def grid():
  """Returns all devices as rows of data and parameters."""
  return jax.make_mesh((PROCESSES, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def run(workdir, data, *, guarded=guard.STOP):
  """Returns the final state and history of a run, from wherever its workdir stands."""
  now = state.create(tiny.init(rows=32), OPTIMIZER)
  where = mesh.shardings(grid(), now, mesh.RULES)
  with jax.set_mesh(grid()):
    return loop.run(
      step.make_step(tiny.distillation, OPTIMIZER, shardings=where), mesh.place(now, where), data,
      steps=STEPS, frozen=tiny.init(1, rows=32), workdir=workdir, config={"steps": STEPS},
      log_every=3, save_every=4, progress="off", guard=guarded,
    )


def here(tree):
  """Returns the bits of what this process holds of a tree."""
  leaves = jax.tree.leaves(tree)
  return [np.asarray(s.data).tobytes() for leaf in leaves for s in leaf.addressable_shards]


def main(process, workdir):
  """Returns what came out, for JSON."""
  calm, records = run(workdir / "calm", Data())
  out = {"losses": [[r["step"], r["loss"]] for r in records if r["split"] == "train"]}
  _, records = run(workdir / "bad", Data(bad=5), guarded=guard.Guard(action="rollback"))
  out["back"] = [[r["step"], r["from_step"]] for r in records if r["split"] == "guard"]
  # Last, for a process is asked to end once. Process 1 alone is; each names a workdir of its own,
  # and that of process 0 is used.
  ends = 5 if process == 1 else None
  try:
    run(workdir / f"ended{process}", Data(ends=ends))
  except stop.Stopped as stopped:
    out |= {"code": stopped.code, "text": str(stopped)}
  again, _ = run(workdir / f"ended{process}", Data())
  out["same"] = here(again) == here(calm)
  try:
    checkpoint.restore(workdir / "calm" / loop.CHECKPOINTS, again, config={"steps": 13})
  except ValueError as error:
    out["refused"] = str(error)
  return out


if __name__ == "__main__":
  port, process, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
  jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
  try:
    (workdir / f"{process}.json").write_text(json.dumps(main(process, workdir)))
  except BaseException:  # at once: the other one would wait for it at the exit
    traceback.print_exc()
    os._exit(1)
  jax.distributed.shutdown()
