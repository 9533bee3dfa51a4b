"""Contenders in processes of their own, so that none pays for what another left behind.

After large arrays of torch, say, the C library's allocator returns its pages at every call, and a
scan in JAX in the same process takes up to 1.7 times as long; and a kernel that breaks its device's
context, or never ends, takes only its own process with it.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import contenders, mistakes
from experiments.contenders import Case, Contender
from experiments.roofline import PASSES

PATIENCE = 900  # seconds for one answer: a kernel that waits for itself never gives one


class Problem(NamedTuple):
  """What a contender is prepared for, checked against and told about where it stands.

  want: the `.npz` file of the right values and gradients.
  """

  case: Case
  seed: int
  want: str
  tolerance: float
  peers_path: str
  platform: str


class Host:
  """Prepares, checks and times contenders in the process that it is made in."""

  def __init__(self) -> None:
    self._ready: dict[str, Contender] = {}

  def ready(self, label: str, problem: Problem) -> Contender:
    """Returns the contender, checked, without its calls, which stay here.

    Raises:
      ValueError: a peer's path that holds no peer.
    """
    self._ready.pop(label, None)
    arrays = contenders.inputs(problem.case, seed=problem.seed)
    contender = contenders.prepare(
      label, problem.case, arrays, peers_path=problem.peers_path, platform=problem.platform
    )
    if contender.calls is not None:
      with np.load(problem.want) as want:
        contender = contenders.check(contender, want, tolerance=problem.tolerance)
    if contender.calls is not None:
      self._ready[label] = contender
    return contender._replace(calls=None, wait=None)

  def turn(self, label: str, passes: str, queued: int) -> float:
    """Returns the seconds of one of `queued` calls that are waited for together."""
    contender = self._ready[label]
    return contenders.seconds(contender.calls[PASSES.index(passes)], contender.wait, queued)


class Apart:
  """A host in a process of its own; one that has ended refuses every case with its last words."""

  def __init__(self) -> None:
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()
    self._ended = ""

  def ready(self, label: str, problem: Problem) -> Contender:
    """Does what `Host.ready` does; a process that ends is the contender's failure."""
    try:
      return self._ask("ready", label, problem)
    except RuntimeError as error:
      return Contender(label, contenders.split(label)[1] or 0, reason=f"failed: {error}")

  def turn(self, label: str, passes: str, queued: int) -> float:
    """Does what `Host.turn` does.

    Raises:
      RuntimeError: the process failed, ended, or gave no answer.
    """
    return self._ask("turn", label, passes, queued)

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.join()
    self._pipe.close()

  def _ask(self, method: str, *arguments: Any) -> Any:
    if self._ended:
      raise RuntimeError(self._ended)
    try:
      self._pipe.send((method, arguments))
      if not self._pipe.poll(PATIENCE):
        self._process.kill()
        self._ended = f"no answer within {PATIENCE} seconds"
        raise RuntimeError(self._ended)
      kind, value = self._pipe.recv()
    except (EOFError, OSError):
      self._process.join()
      self._ended = f"its process ended with {self._process.exitcode}"
      raise RuntimeError(self._ended) from None
    if kind == "mistake":
      raise ValueError(value)
    if kind == "error":
      raise RuntimeError(value)
    return value


def _serve(pipe) -> None:
  """Answers requests until the other end is gone."""
  host = Host()
  while True:
    try:
      method, arguments = pipe.recv()
    except EOFError:
      return
    try:
      answer = "value", getattr(host, method)(*arguments)
    except Exception as error:
      if mistakes.is_mistake(error):
        answer = "mistake", str(error)
      else:
        answer = "error", "".join(traceback.format_exception_only(error)).strip()
        traceback.print_exc()
    pipe.send(answer)


@contextlib.contextmanager
def hosts(labels: Sequence[str]) -> Iterator[Mapping[str, Host | Apart]]:
  """Gives a host by label: processes of their own, but on a TPU, which one process holds."""
  if jax.default_backend() == "tpu":
    yield dict.fromkeys(labels, Host())
    return
  with contextlib.ExitStack() as stack:
    found = {}
    for label in labels:
      found[label] = Apart()
      stack.callback(found[label].close)
    yield found
