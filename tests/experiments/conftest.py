"""A finished toy job, made once for all tests and all workers."""

import fcntl
import json
import os
import pathlib
import shutil

import pytest

from cases import commands


@pytest.fixture(name="finished", scope="session")
def _finished(tmp_path_factory) -> pathlib.Path:
  """The folder of a finished toy job, made once for all workers: `job`, `cache` and `out.json`."""
  base = tmp_path_factory.getbasetemp()
  # A worker's folder lies in that of the whole run.
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "toy_job"
  folder.mkdir(exist_ok=True)
  with (folder / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "out.json").is_file():
      done = commands.drive([("distill", [commands.TOY, "--workdir=job"])], cwd=folder)
      (folder / "out.json").write_text(json.dumps(done))
  return folder


@pytest.fixture(name="place")
def _place(finished, tmp_path) -> pathlib.Path:
  """A copy of the finished job that a test may change."""
  for name in ("job", "cache"):
    shutil.copytree(finished / name, tmp_path / name)
  return tmp_path
