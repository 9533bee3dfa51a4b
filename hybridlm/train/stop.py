"""SIGTERM: a run that is asked to end saves where it stands and ends with code 143."""

import itertools
import pathlib
import signal
import threading
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

CODE = 128 + signal.SIGTERM


class Stopped(SystemExit):
  """The run was asked to end; its state is saved, and the same call goes on from there."""

  def __init__(self, text: str):
    super().__init__(CODE)
    self.text = text

  def __str__(self) -> str:
    return self.text


def saved(step: int, folder: pathlib.Path) -> Stopped:
  """Returns how a run ends that has saved a step; logs it, for an exit code says nothing."""
  text = f"SIGTERM: step {step} is saved in {folder}; the same command goes on from there"
  if jax.process_count() == 1:
    logging.warning(text)
  return Stopped(text)


class Stop:
  """Notes, while the context lasts, that the process was asked to end.

  Of several processes each may be asked at another moment: they agree on a step that none has
  passed, through the service that JAX starts with `jax.distributed`; that watches the signal then,
  from its start on, and a signal between two runs ends the next one at its first step.
  Only a main thread can note signals: in another one nothing is noted and the signal ends the
  process as ever.
  """

  # The service counts for the whole life of a process, in which steps may be made again.
  _calls = itertools.count(1)

  def __init__(self, wanted: bool = True):
    main = threading.current_thread() is threading.main_thread()
    self._alone = jax.process_count() == 1
    self._handles = wanted and main and self._alone
    self._wanted, self._asked, self._before = wanted, False, None

  def __enter__(self) -> "Stop":
    if self._handles:
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._handles:
      signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

  def _note(self, *_: Any) -> None:
    self._asked = True

  def asked(self) -> bool:
    """Returns whether the step just made is the last one; called after every step."""
    if not self._wanted:
      return False
    if self._alone:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(next(Stop._calls))
