"""What a run does about a step that went wrong: stop, leave its update out, or go back and past it.

A step is bad if its loss, gradient or update is not finite, or if its loss is a spike: more than
`spike` times the median of the losses before it. The median of a step counts good steps up to the
second before it, whatever was logged or saved when, so that a run that was killed decides as one
that was not.

Going back is what PaLM's training did by hand (arXiv 2204.02311, section 5.1): from a checkpoint
before the spike, past the batches between.
"""

import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from hybridlm.train import sealed

ACTIONS = ("stop", "skip", "rollback")
WINDOW = 64  # losses that the median is of
LEAST = 8  # .. and fewer than that say nothing
LAG = 2  # steps back from which losses are known while the device is at work
LEDGER = "guard.json"
Record = dict[str, Any]


class Bad(ValueError):
  """A step went wrong; the message names step and batch.

  Attributes:
    step: its number.
    position: where the data stood before its batch, as JSON; None: no batch is to blame.
  """

  def __init__(self, text: str, *, step: int = 0, position: str | None = None):
    super().__init__(text)
    self.step, self.position = step, position


class NotFinite(Bad, FloatingPointError):
  """Training met NaN or infinity; the message names the step, the batch and the leaf."""


class Spike(Bad):
  """A loss is far above those before it."""


class Guard(NamedTuple):
  """What to call bad, and what to do about it.

  Attributes:
    action: "stop", "skip" (the update is left out, the optimiser's state with it) or "rollback"
      (on from a checkpoint before, and in the data from after the bad batch).
    spike: times the running median from which on a loss is bad; 0: only NaN and infinity are.
    limit: bad steps that one run may meet; with one more it stops.
    back: for "rollback", how many checkpoints it goes back.
  """

  action: str = "stop"
  spike: float = 0.0
  limit: int = 10
  back: int = 1


STOP = Guard()


class Memory(NamedTuple):
  """What the guard remembers of the steps so far: numbers and losses of the last good ones, the
  number of the last it heard of, and how many were skipped."""

  losses: tuple[tuple[int, float], ...] = ()
  heard: int = 0
  skipped: int = 0


class Ledger(NamedTuple):
  """How often a run went back, kept beside its checkpoints.

  Attributes:
    records: one for each time.
    jumps: step -> where the data stands after it instead.
  """

  records: tuple[Record, ...] = ()
  jumps: Mapping[int, Any] = {}


def check(guard: Guard, *, keep: int) -> None:
  """Raises unless the guard's values make sense in a run that keeps so many checkpoints.

  Raises:
    ValueError: names the value and the rule.
  """
  if guard.action not in ACTIONS:
    raise ValueError(f"guard.action={guard.action!r} is not one of {', '.join(ACTIONS)}")
  if guard.spike and not 1 < guard.spike < math.inf:
    raise ValueError(f"guard.spike={guard.spike} must be a factor above 1, or 0 for none")
  for name in ("limit", "back"):
    if getattr(guard, name) < 1:
      raise ValueError(f"guard.{name}={getattr(guard, name)} must be at least 1")
  if guard.action == "rollback" and guard.back > keep:
    raise ValueError(f"guard.back={guard.back} goes back beyond the keep={keep} checkpoints that "
                     "stay")


def bound(guard: Guard, memory: Memory, number: int) -> float:
  """Returns the loss above which step `number` is a spike; infinity while too few are known."""
  known = [loss for step, loss in memory.losses if step <= number - LAG][-WINDOW:]
  median = statistics.median(known) if len(known) >= LEAST else 0.0
  return guard.spike * median if guard.spike and median > 0 else math.inf


def heard(memory: Memory, number: int, loss: float, *, skipped: bool = False) -> Memory:
  """Returns what is remembered after the result of step `number` as well."""
  if number <= memory.heard:
    return memory
  if skipped:
    return memory._replace(heard=number, skipped=memory.skipped + 1)
  return memory._replace(
    losses=(*memory.losses, (number, loss))[-WINDOW - LAG :], heard=number
  )


def notes(memory: Memory) -> dict[str, Any]:
  """Returns what a checkpoint holds of the memory, for JSON."""
  return {"guard": memory._asdict()}


def recalled(notes: Mapping[str, Any]) -> Memory:
  """Returns the memory that `notes` gave; an older checkpoint without is one of nothing."""
  if "guard" not in notes:
    return Memory()
  was = notes["guard"]
  losses = tuple((step, loss) for step, loss in was["losses"])
  return Memory(losses, was["heard"], was["skipped"])


def read(folder: pathlib.Path) -> Ledger:
  """Returns the ledger beside the checkpoints of a run; an empty one if it never went back."""
  path = folder / LEDGER
  if not path.is_file():
    return Ledger()
  was = sealed.read_json(path)
  return Ledger(tuple(was["records"]), {int(step): at for step, at in was["jumps"].items()})


def write(folder: pathlib.Path, ledger: Ledger) -> None:
  """Replaces the ledger beside the checkpoints."""
  jumps = {str(step): at for step, at in ledger.jumps.items()}
  sealed.write_json(folder / LEDGER, {"records": ledger.records, "jumps": jumps})


def gone_back(ledger: Ledger, bad: Bad, *, step: int, position: Any) -> Ledger:
  """Returns the ledger after going back to `step`, from where the data goes on at `position`.

  Jumps of the steps that are made anew are forgotten: they lie before that position.
  """
  record = {"step": step, "split": "guard", "action": "rollback", "from_step": bad.step,
            "reason": str(bad)}
  jumps = {at: where for at, where in ledger.jumps.items() if at < step}
  return Ledger((*ledger.records, record), jumps | {step: position})


def exhausted(guard: Guard, bad: Bad) -> Bad:
  """Returns the error of one bad step too many."""
  text = f"{bad}; the {guard.limit} bad steps of guard.limit were met before it"
  return type(bad)(text, step=bad.step)
