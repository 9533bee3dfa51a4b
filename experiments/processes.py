"""Several processes that run one job: how they find each other, wait, and end together.

Process 0 leads: it owns the workdir, and the others do what it says. What they tell each other goes
through the key-value store of JAX's coordination service, which needs no device, so that whoever
waits is not in the middle of a computation. JAX shows the store under no public name.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import flags
from jax._src import distributed

from experiments import mistakes

HEARTBEAT = 60.0  # seconds
MISTAKE, FAILED, LOST = 2, 1, 75  # exit codes; 75 asks to be tried again (sysexits.h)
AUTO = "auto"
# Seconds: for all to come at the start, to leave at the end, and to hear why another has failed.
ARRIVE, LEAVE, GRACE = 300, 60, 5.0
# What is said, in errors of several types, by computations and calls that another process left.
ALONE_AGAIN = re.compile(
  r"gloo|nccl|connection (reset|closed|refused)|UNAVAILABLE|coordination service|heartbeat", re.I)
_DAY = 24 * 60 * 60 * 1000
# Who counts the processes of a job, and what it calls the count and the number of each.
LAUNCHERS: Mapping[str, tuple[str, str]] = {
  "JAX": ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
  "SLURM": ("SLURM_NTASKS", "SLURM_PROCID"),
  "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


class Place(NamedTuple):
  """Where a process stands among those of a job: None is left to JAX, which asks the cluster.

  heartbeat: seconds without a sign of life after which a process is taken for dead.
  """

  coordinator: str | None
  processes: int | None
  process: int | None
  heartbeat: float = HEARTBEAT


def define(values: flags.FlagValues) -> None:
  """Adds the flags that `place` reads."""
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, or `auto`: JAX asks the cluster (Cloud TPU, "
    "SLURM, Open MPI).", flag_values=values,
  )
  flags.DEFINE_integer("processes", None, "How many run this job together.", flag_values=values)
  flags.DEFINE_integer("process", None, "The number of this one, from 0.", flag_values=values)
  flags.DEFINE_float(
    "heartbeat", HEARTBEAT, "Seconds without a sign of life after which a process is taken for "
    "dead, and all end.", flag_values=values,
  )


def place(
  values: flags.FlagValues, variables: Mapping[str, str] = os.environ
) -> Place | None:
  """Returns where this process stands, by flags and then by environment; None: it is alone.

  SLURM, Open MPI and GKE are known by their variables.

  Raises:
    ValueError: flags that cannot go together, or a number that is nowhere.
  """
  if values.heartbeat < 1:
    raise ValueError(f"--heartbeat={values.heartbeat:g} must be at least 1 second")
  found = _found(values.coordinator, values.processes, values.process, variables)
  return found and found._replace(heartbeat=values.heartbeat)


def _found(
  coordinator: str | None, processes: int | None, process: int | None,
  variables: Mapping[str, str],
) -> Place | None:
  if coordinator == AUTO:
    if processes is not None or process is not None:
      raise ValueError(f"--coordinator=auto asks the cluster: leave --processes={processes} and "
                       f"--process={process} out")
    return Place(None, None, None)
  coordinator = coordinator or variables.get("JAX_COORDINATOR_ADDRESS")
  if coordinator is None:
    if processes == 1 and process in (None, 0):
      return None
    if processes is not None or process is not None:
      raise ValueError(f"--processes={processes}, --process={process}: where process 0 listens is "
                       "missing, give --coordinator=HOST:PORT")
    return _cluster(variables)
  _check_address(coordinator)
  found = next((names for names in LAUNCHERS.values() if set(names) <= set(variables)), None)
  if processes is None:
    processes = _number(variables, found and found[0], "--processes", coordinator)
  if process is None:
    process = _number(variables, found and found[1], "--process", coordinator)
  if processes < 1 or not 0 <= process < processes:
    raise ValueError(f"--process={process} is not one of --processes={processes}; they count from "
                     "0")
  return Place(coordinator, processes, process) if processes > 1 else None


def _cluster(variables: Mapping[str, str]) -> Place | None:
  """Returns that JAX is to ask the cluster where the environment names one of several processes."""
  hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES") or ""
  tasks = int(variables.get("SLURM_NTASKS", 1))
  if "," in hosts or (tasks > 1 and {"SLURM_STEP_NODELIST", "SLURM_LOCALID"} <= set(variables)):
    return Place(None, None, None)
  ranks = int(variables.get("OMPI_COMM_WORLD_SIZE", 1))
  if ranks > 1 and "OMPI_MCA_orte_hnp_uri" not in variables:
    raise ValueError(f"Open MPI started {ranks} processes and does not say where: give "
                     "--coordinator=HOST:PORT, of the host of rank 0")
  return Place(None, None, None) if ranks > 1 else None


def _check_address(coordinator: str) -> None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ValueError(f"--coordinator={coordinator}: give HOST:PORT, the port in 1..65535")


def _number(variables: Mapping[str, str], name: str | None, flag: str, coordinator: str) -> int:
  """Returns a number that a flag left out, from the environment."""
  if name is None:
    raise ValueError(f"--coordinator={coordinator}: {flag} is missing, and no launcher says it "
                     f"({', '.join(LAUNCHERS)})")
  if not variables[name].isdigit():
    raise ValueError(f"{name}={variables[name]!r} is not a whole number")
  return int(variables[name])


class Team:
  """The processes of a job, seen from one of them; of one process alone it does nothing.

  As a context it ends all of them as soon as one fails: with the same line on every end, within
  seconds of a mistake and within the heartbeat of a death. The process ends in there, too.

  Args:
    store: the key-value store; None: there is one process.
    index: the number of this process.
    count: of all.
    heartbeat: seconds without a sign of life after which a process is taken for dead.
  """

  def __init__(self, store: Any = None, index: int = 0, count: int = 1, *, heartbeat=HEARTBEAT):
    self.index, self.count = index, count
    self._store, self._heartbeat = store, heartbeat
    self._numbers = itertools.count()
    self._mouth, self._over = threading.Lock(), threading.Event()
    self._muted = contextlib.ExitStack()

  @property
  def leads(self) -> bool:
    """Whether this is process 0."""
    return self.index == 0

  def share(self, value: Any = None) -> Any:
    """Returns process 0's value, a JSON value; the others wait for it, however long."""
    if self.count == 1:
      return value
    key = f"job/shared/{next(self._numbers)}"
    if self.leads:
      self._store.key_value_set(key, json.dumps(value))
      return value
    while (said := self._get(key, 10.0)) is None:
      pass
    return json.loads(said)

  def meet(self) -> None:
    """Returns when every process has come here, however long that takes."""
    if self.count > 1:
      self._store.wait_at_barrier(f"job/met/{next(self._numbers)}", _DAY)

  def __enter__(self) -> "Team":
    if self.count > 1:
      if not self.leads:
        quiet = self._muted.enter_context(open(os.devnull, "w", encoding="utf-8"))
        self._muted.enter_context(contextlib.redirect_stdout(quiet))
      threading.Thread(target=self._watch, name="processes", daemon=True).start()
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    self._muted.close()
    if self.count == 1:
      return
    if error is None:
      self._leave()
      return
    if isinstance(error, SystemExit):  # agreed on by all
      self._leave()
      self._end(str(error), error.code)
    line, code = self._verdict(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set("job/end", json.dumps({"line": line, "code": code}))
    if code == FAILED and self._mouth.acquire(blocking=False):
      traceback.print_exception(error)
      self._mouth.release()
    self._hear()
    self._end(line, code)

  def _hear(self) -> None:
    """Says that why the job ends is known here; process 0, which holds it, waits for the others."""
    until = time.monotonic() + GRACE
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set(f"job/heard/{self.index}", "", allow_overwrite=True)
      for process in range(self.count if self.leads else 0):
        self._get(f"job/heard/{process}", max(0.0, until - time.monotonic()))

  def _get(self, key: str, seconds: float) -> str | None:
    """Returns what lies under a key, waiting for it; None: nothing, so far."""
    try:
      return self._store.blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" in str(error):
        return None
      raise

  def _verdict(self, error: BaseException) -> tuple[str, int]:
    """Returns why the job ends, in a line, and its exit code."""
    text = " ".join(str(error).split())
    left = _left_alone(error)
    if not left and isinstance(error, mistakes.TYPES) and mistakes.is_mistake(error):
      return text, MISTAKE
    line = (f"process {self.index} of {self.count} failed: {type(error).__name__}: {text[:300]}; "
            "the same command goes on from what is saved")
    if not (left or ALONE_AGAIN.search(text)):
      return line, FAILED
    # Another has ended, and its signs of life too: the thread that listens will say so, and end
    # this process.
    time.sleep(1.5 * self._heartbeat + GRACE)
    return line, LOST

  def _end(self, line: str, code: int) -> None:
    """Ends this process at once, whatever it is in the middle of, with one line."""
    self._mouth.acquire()  # whoever comes second says nothing
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()  # nobody else will
    print(line, file=sys.stderr, flush=True)
    os._exit(code)

  def _leave(self) -> None:
    """Waits until all are done, and leaves JAX's service; who does not come is left behind."""
    try:
      self._store.wait_at_barrier("job/done", LEAVE * 1000)
      self._over.set()
      jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
      text = " ".join(str(error).split())
      self._end(f"the job is done; not all processes came to its end: {text[:200]}", 0)

  def _watch(self) -> None:
    """Gives signs of life and looks for an end, until this process leaves."""
    beat, seen = self._heartbeat / 10, {}
    try:
      for number in itertools.count():
        self._store.key_value_set(f"job/alive/{self.index}", str(number), allow_overwrite=True)
        if self.leads:
          self._look(seen)
        said = self._get("job/end", beat)
        if self._over.is_set():
          return
        if said is not None:
          self._hear()
          self._end(**json.loads(said))
    except jax.errors.JaxRuntimeError as error:
      if not self._over.is_set() and "CANCELLED" not in str(error):
        self._end(self._lost(0, "cannot be reached any more"), LOST)

  def _look(self, seen: dict[int, tuple[str, float]]) -> None:
    """Ends the job when a process gave no sign of life for too long."""
    now = time.monotonic()
    signs = {
      int(key.rpartition("/")[2]): value
      for key, value in self._store.key_value_dir_get("job/alive/")
    }
    for process in range(self.count):
      sign, since = seen.get(process, ("", now))
      changed = signs.get(process, "") != sign
      seen[process] = (signs.get(process, ""), now if changed else since)
      if now - seen[process][1] > self._heartbeat:
        line = self._lost(process, f"gave no sign of life for {self._heartbeat:g} s")
        self._store.key_value_set("job/end", json.dumps({"line": line, "code": LOST}))

  def _lost(self, process: int, how: str) -> str:
    return (f"process {process} of {self.count} {how}: all processes end; the same command goes on "
            "from what is saved")


def _left_alone(error: BaseException) -> bool:
  """Whether what lies beneath an error of ours is a computation that another process left."""
  cause = error.__cause__
  if cause is None:
    return False
  # What fails in a library, as an error of either kind; not a mistake that names such a thing.
  beneath = isinstance(cause, (RuntimeError, ValueError)) and not mistakes.is_mistake(cause)
  return beneath and bool(ALONE_AGAIN.search(str(cause))) or _left_alone(cause)


ALONE = Team()


def _late(where: Place) -> None:
  text = f"--coordinator={where.coordinator}: " if where.coordinator else ""
  count = f"the {where.processes}" if where.processes else "all"
  print(f"{text}not {count} processes came within {ARRIVE} s; start all of them, with an address "
        "that every one reaches", file=sys.stderr, flush=True)
  os._exit(LOST)


def join(where: Place | None) -> Team:
  """Returns the team of a job's processes once all have come; alone, that is at once.

  Nothing may have computed before. Where not all come in time, the process ends with a line.

  Raises:
    ValueError: the cluster does not say what is to be known.
  """
  if where is None:
    return ALONE
  # JAX's own timeout ends the process too, in many words.
  late = threading.Timer(ARRIVE, _late, [where])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      where.coordinator, where.processes, where.process, initialization_timeout=2 * ARRIVE,
      heartbeat_timeout_seconds=int(2 * where.heartbeat) + 10, shutdown_timeout_seconds=LEAVE,
    )
  except (RuntimeError, ValueError) as error:
    text = " ".join(str(error).split())
    raise ValueError(f"--coordinator={where.coordinator}, --processes={where.processes}, --process="
                     f"{where.process}: {text}") from error
  finally:
    late.cancel()
  store = distributed.global_state.client
  return Team(store, jax.process_index(), jax.process_count(), heartbeat=where.heartbeat)
