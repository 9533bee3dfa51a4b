"""Freed arrays stay with the process, unless the caller has other wishes."""

import os
import subprocess
import sys

import pytest

# Arrays of 8 MB, freed and made again: what is kept needs no new pages.
PROGRAM = """
import resource
import numpy as np
from experiments import memory

told = {told}
for turn in range(20):
  if turn == 10:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  arrays = [np.ones(1_000_000) for _ in range(4)]
  del arrays
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(told):
  """Returns whether glibc was told, and the page faults of ten turns, of a new process."""
  own = {name: v for name, v in os.environ.items()
         if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(told=told)], capture_output=True, text=True, check=True,
    env=own | {"NUMPY_MADVISE_HUGEPAGE": "0"},
  )
  answer, faults = result.stdout.split()
  return answer == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_kept_memory_is_used_again_without_page_faults():
  told, faults = run("memory.keep_freed({})")
  assert told
  told, others = run("memory.keep_freed({'MALLOC_ARENA_MAX': '4'})")
  assert not told
  # Ten turns of 32 MB are 80,000 pages; fewer where the kernel hands out large ones.
  assert 10 * faults < others


@pytest.mark.parametrize(
  "variables", [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}]
)
def test_settings_of_the_callers_own_are_left_alone(variables):
  told, _ = run(f"memory.keep_freed({variables})")
  assert not told
