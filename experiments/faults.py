"""What a distillation loses when things go wrong, tried out: a table.

python -m experiments.faults [--out=docs/results/faults.md] [--kills=20] [--jobs=4]
    [--only=kill,sigterm]

The toy quickstart's distillation is killed, ended, filled up, poisoned and moved to other devices,
in processes of their own; what comes out is compared with a run that nothing happened to.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from experiments import artefacts, console, evaluation, faults_runs
from experiments.faults_runs import SAVE_EVERY, STEPS, Injury, Place
from hybridlm.train import guard, sealed, stop

HEADER = """# Faults

`{command}` on {machine}, {seconds:.0f} s.

The distillation of `{config}` ({steps} steps, a checkpoint every {save_every}), each fault in a
place of its own. "Lost" is what was made again. The same bits: of the model at the end, against a
run that nothing happened to.

| fault | what happened | lost | at the end |
|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Bench:
  """A calm run to compare with, and where to work.

  Attributes:
    root: folder of all places.
    calm: the place of a run that nothing happened to.
    kills: how many kills "kill" tries.
  """

  root: pathlib.Path
  calm: Place
  kills: int

  def place(self, name: str, **changes) -> Place:
    """Returns a place of its own, with the calm run's teacher and cut."""
    folder = self.root / name
    folder.mkdir()
    shutil.copytree(self.calm.folder / "cache", folder / "cache")
    shutil.copytree(self.calm.folder / "job", folder / "job",
                    ignore=shutil.ignore_patterns(f"{faults_runs.DISTIL}*"))
    return Place(folder, **changes)

  def compared(self, place: Place, other: Place | None = None) -> str:
    """Returns whether a place has the bits of the calm run, in words."""
    return "same bits" if place.result() == (other or self.calm).result() else "OTHER BITS"


def kill(bench: Bench) -> tuple[str, str, str]:
  """Kill -9 at random moments."""
  place, rng, made = bench.place("kill"), random.Random(5), 0
  saves, most, runs, same = 0, 0, 1, True
  while made < bench.kills:
    before, process = place.unfinished(), faults_runs.start(place)
    if made % 3 == 2:
      alive = faults_runs.until(process, _saving(place, before))
    else:
      alive = faults_runs.until(process, _beyond(place, place.step()))
      time.sleep(rng.uniform(0, 0.4))
    if alive and process.exitcode is None:
      faults_runs.end(process, signal.SIGKILL)
      whole = [int(path.name) for path in place.checkpoints()]
      saves, made = saves + _saving(place, before)(), made + 1
      most = max(most, place.step() - max(whole, default=0))
    else:  # it came to its end first
      process.join()
      same, runs = same and bench.compared(place) == "same bits", runs + 1
      shutil.rmtree(place.stage())
  code = faults_runs.finish(place)
  same = same and bench.compared(place) == "same bits"
  what = f"{made} kills over {runs} runs, {saves} of them with a checkpoint half written"
  return what, f"at most {most} steps", _ended(code, "same bits" if same else "OTHER BITS")


def _beyond(place: Place, step: int) -> Callable[[], bool]:
  return lambda: place.step() > step


def _saving(place: Place, before: set[str]) -> Callable[[], bool]:
  return lambda: bool(place.unfinished() - before)


def _ended(code: int, text: str) -> str:
  return text if code == 0 else f"EXIT CODE {code}"


def sigterm(bench: Bench) -> tuple[str, str, str]:
  """SIGTERM."""
  place = bench.place("sigterm")
  process = faults_runs.start(place)
  faults_runs.until(process, lambda: place.step() >= SAVE_EVERY + 2)
  code = faults_runs.end(process, signal.SIGTERM)
  saved, seen = int(place.checkpoints()[-1].name), place.step()
  done = faults_runs.finish(place)
  what = f"step {saved} saved, exit code {code}"
  return what, f"{seen - saved} steps", _ended(done, bench.compared(place))


def _stopped(place: Place, count: int = 2) -> None:
  """Leaves a run killed after so many checkpoints."""
  process = faults_runs.start(place)
  faults_runs.until(process, lambda: len(place.checkpoints()) >= count)
  faults_runs.end(process, signal.SIGKILL)


def corrupt(bench: Bench) -> tuple[str, str, str]:
  """One bit of the newest checkpoint flipped."""
  place = bench.place("corrupt")
  _stopped(place)
  newest = place.checkpoints()[-1]
  path = max((p for p in (newest / "state").rglob("*") if p.is_file()),
             key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  place.log.unlink()
  code = faults_runs.finish(place)
  told = "falling back to the one before" in place.log.read_text("utf-8")
  what = f"step {int(newest.name)} damaged; " + (
    "it says so and goes on from the one before" if told else "NOTHING SAID")
  return what, f"{SAVE_EVERY} steps", _ended(code, bench.compared(place))


def truncated(bench: Bench) -> tuple[str, str, str]:
  """The file of token ids cut off."""
  place = bench.place("truncated")
  _stopped(place)
  path = max((place.folder / "cache" / "tokens").iterdir(), key=lambda p: p.stat().st_size)
  os.truncate(path, path.stat().st_size // 2)
  code = faults_runs.finish(place)
  said = place.last_line().replace(str(place.folder), "..")
  path.unlink()
  done = faults_runs.finish(place)
  return f"exit code {code}: “{said}”", "nothing", _ended(done, bench.compared(place))


def full(bench: Bench) -> tuple[str, str, str]:
  """The disk full in the middle of a run."""
  place = bench.place("full")
  place, code, how = _filled(place)
  before = [int(p.name) for p in place.checkpoints()]
  whole = all(sealed.damage(p) is None for p in place.checkpoints())
  said = place.last_line().replace(str(place.stage()), "..")
  _emptied(place)
  done = faults_runs.finish(place)
  same = bench.compared(place)
  _unmounted(place)
  state = "whole" if whole and before else "DAMAGED"
  what = f"{how}: exit code {code}: “{said}”; step {max(before, default=0)} is {state}"
  return what, f"at most {SAVE_EVERY} steps", _ended(done, same)


def _filled(place: Place) -> tuple[Place, int, str]:
  """Returns where and how a run ended whose disk was full: a small one, where it can be mounted."""
  disk = place.folder / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
  mounted = subprocess.run(mount, capture_output=True, check=False)
  if mounted.returncode:
    return place, faults_runs.finish(place, injury=Injury(limit=9000, after=2)), "files of 9 kB"
  small = place._replace(folder=disk)
  for name in ("job", "cache"):
    shutil.copytree(place.folder / name, disk / name)
  process = faults_runs.start(small)
  faults_runs.until(process, lambda: len(small.checkpoints()) >= 2)
  with (disk / "filler").open("wb", buffering=0) as file:
    try:
      while True:
        file.write(bytes(2**12))
    except OSError:
      pass
  process.join()
  return small, process.exitcode, "a disk of 64 MiB"


def _emptied(place: Place) -> None:
  (place.folder / "filler").unlink(missing_ok=True)


def _unmounted(place: Place) -> None:
  if place.folder.name == "disk":
    subprocess.run(["umount", str(place.folder)], check=True)


def worker(bench: Bench) -> tuple[str, str, str]:
  """One of 4 processes killed."""
  calm, place = bench.place("four"), bench.place("worker")
  for process in faults_runs.together(calm, 4):
    process.join()
  started = faults_runs.together(place, 4)
  faults_runs.until(started[0], lambda: len(place.checkpoints()) >= 2)
  since = time.monotonic()
  faults_runs.end(started[2], signal.SIGKILL)
  for process in started:
    process.join()
  took, codes = time.monotonic() - since, [process.exitcode for process in started]
  saved, seen = int(place.checkpoints()[-1].name), place.step()
  again = faults_runs.together(place, 4)
  for process in again:
    process.join()
  what = (f"process 2 killed: the others end after {took:.0f} s with codes "
          f"{', '.join(str(code) for n, code in enumerate(codes) if n != 2)}")
  done = max(process.exitcode for process in again)
  return what, f"{seen - saved} steps", _ended(done, bench.compared(place, calm))


def poison(bench: Bench, action: str) -> tuple[str, str, str]:
  """A batch whose loss is not finite, under one of the guard's actions."""
  place = bench.place(f"nan_{action}", arguments=(f"--config.guard.action={action}",))
  bad = Injury(nan=10)
  code = faults_runs.finish(place, injury=bad)
  told = place.records("guard")
  if action == "stop":
    said = place.last_line()
    done = faults_runs.finish(place)
    return f"exit code {code}: “{said[:160]}”", "2 steps", _ended(done, bench.compared(place))
  again = bench.place(f"nan_{action}_killed", arguments=place.arguments)
  process = faults_runs.start(again, injury=bad)
  faults_runs.until(process, lambda: len(again.checkpoints()) >= 2 and again.step() > 10)
  faults_runs.end(process, signal.SIGKILL)
  done = max(code, faults_runs.finish(again, injury=bad))
  first = told[0]
  what = f"step {first['step']} left out" if action == "skip" else (
    f"back from step {first['from_step']} to {first['step']}, past the batch")
  same = bench.compared(again, place)
  return f"{what}; {len(told)} record", "the batch", _ended(
    done, f"{same} as one that was killed after it")


def moved(bench: Bench) -> tuple[str, str, str]:
  """8 devices, then 4, then 1."""
  stayed, place = bench.place("eight", devices=8), bench.place("moved", devices=8)
  codes = [faults_runs.finish(stayed)]
  for number, devices in enumerate((8, 4), 1):
    here = place._replace(devices=devices)
    process = faults_runs.start(here)
    faults_runs.until(process, _beyond(here, number * STEPS // 3))
    codes.append(faults_runs.end(process, signal.SIGTERM) - stop.CODE)
  codes.append(faults_runs.finish(place._replace(devices=1)))
  most = max(apart(stayed, place))
  verdict = "within" if most <= 1e-4 else "BEYOND"
  return ("ended by SIGTERM twice, resumed on fewer devices", "nothing",
          _ended(max(map(abs, codes)), f"losses apart by at most {most:.1e}, {verdict} 1e-4"))


def apart(left: Place, right: Place) -> list[float]:
  """Returns how far apart the losses of two runs are at the steps that both logged, relatively.

  Records of other steps are means over other steps.
  """
  one, two = ({r["step"]: r for r in place.records()} for place in (left, right))
  spans = [_spans(records) for records in (one, two)]
  same = [step for step in one if spans[0].get(step) == spans[1].get(step)]
  return [abs(one[step]["loss"] / two[step]["loss"] - 1) for step in same]


def _spans(records: Mapping[int, Mapping]) -> dict[int, int]:
  """Returns where the steps begin that a record is the mean of: by its last step."""
  steps = sorted(records)
  return dict(zip(steps, [0, *steps], strict=False))


FAULTS: Mapping[str, tuple[str, Callable[[Bench], tuple[str, str, str]]]] = {
  "kill": ("kill -9 at random moments", kill),
  "sigterm": ("SIGTERM", sigterm),
  "corrupt": ("newest checkpoint corrupted", corrupt),
  "truncated": ("data file truncated", truncated),
  "full": ("disk full", full),
  "worker": ("one of 4 processes killed", worker),
  **{f"nan_{action}": (f"injected NaN, guard.action={action}", lambda b, a=action: poison(b, a))
     for action in guard.ACTIONS},
  "moved": ("8 devices, then 4, then 1", moved),
}


def _row(bench: Bench, name: str) -> tuple[str, ...]:
  """Returns the row of a fault, tried out now."""
  title, try_out = FAULTS[name]
  row = (title, *try_out(bench))
  print(" | ".join(row), flush=True)
  return row


def main(argv: Sequence[str]) -> None:
  """Tries every fault and writes the table."""
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "Where the table goes; default: the screen.", flag_values=values)
  flags.DEFINE_integer("kills", 20, "Kills of the first fault.", 1, flag_values=values)
  flags.DEFINE_integer("jobs", 4, "Faults tried at once.", 1, flag_values=values)
  flags.DEFINE_list("only", list(FAULTS), "Which faults.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  unknown = set(values.only) - set(FAULTS)
  if unknown:
    raise ValueError(f"--only={min(unknown)!r} is not one of {', '.join(FAULTS)}")
  since = time.monotonic()
  # Most of a process's time is compilation, and no fault depends on how well that is done.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  with tempfile.TemporaryDirectory() as folder:
    calm = Place(pathlib.Path(folder) / "calm")
    # What is distilled is made by another process: one that has computed before compiles anew.
    if faults_runs.finish(calm, stage="cut") or faults_runs.finish(calm):
      raise ValueError(f"the calm run failed: {calm.last_line()}")
    bench = Bench(pathlib.Path(folder), calm, values.kills)
    with concurrent.futures.ThreadPoolExecutor(values.jobs) as pool:
      rows = list(pool.map(functools.partial(_row, bench), values.only))
  text = HEADER.format(
    command=" ".join(["python -m experiments.faults", *argv[1:]]), machine=evaluation.machine(),
    seconds=time.monotonic() - since, config=faults_runs.CONFIG, steps=STEPS,
    save_every=SAVE_EVERY,
  ) + "".join(f"| {' | '.join(row)} |\n" for row in rows)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())
  else:
    print(text)


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
