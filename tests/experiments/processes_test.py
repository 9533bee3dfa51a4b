"""Several processes of one job: where they stand, what they tell each other, how they end."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
from absl import flags

from cases import commands
from experiments import artefacts, cli, pretrain, processes, stages
from experiments.stages import Stage

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
AUTO = processes.Place(None, None, None)
# The toy job with the two blocks that compile fastest.
CONFIG = """
from configs import quickstart_toy

def get_config():
  c = quickstart_toy.get_config()
  c.name = "pair"
  c.model.pattern = "*-"
  for name in "GHPNW":
    c.model[name] = None
  c.targets.update(H=None, P=None)
  c.calibrate.axes, c.findings.heads = "FDJ", ()
  for run in (c.teacher, c.distil, c.calibrate, c.evaluate, c.findings):
    run.batch = 8
  c.teacher.update(steps=12, validate_every=0, save_every=1)
  return c
"""


def stands(argv=(), **variables):
  """Returns where a process with these flags and variables stands."""
  values = flags.FlagValues()
  processes.define(values)
  values(["command", *argv])
  return processes.place(values, variables)


@pytest.mark.parametrize("argv, variables, expected", [
  ([], {}, None),
  (["--processes=1"], {}, None),
  (["--coordinator=h:1", "--processes=1", "--process=0"], {}, None),
  (["--coordinator=h:1", "--processes=4", "--process=3"], {}, processes.Place("h:1", 4, 3)),
  (["--coordinator=h:1", "--processes=4", "--process=3", "--heartbeat=9"], {},
   processes.Place("h:1", 4, 3, 9.0)),
  (["--coordinator=auto"], {}, AUTO),
  ([], SLURM, AUTO),
  ([], SLURM | {"SLURM_NTASKS": "1"}, None),
  ([], {"SLURM_NTASKS": "8"}, None),  # an allocation without a step
  (["--coordinator=h:1"], SLURM, processes.Place("h:1", 2, 1)),
  ([], OMPI | {"OMPI_MCA_orte_hnp_uri": "1;tcp://10.0.0.1:5"}, AUTO),
  (["--coordinator=h:1"], OMPI, processes.Place("h:1", 4, 3)),
  ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, AUTO),
  ([], {"TPU_WORKER_HOSTNAMES": "a"}, None),
  ([], {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
   processes.Place("h:1", 2, 0)),
])
def test_a_process_stands_where_flags_say_and_then_the_environment(argv, variables, expected):
  assert stands(argv, **variables) == expected


@pytest.mark.parametrize("argv, variables, said", [
  (["--processes=2", "--process=0"], {}, "--coordinator=HOST:PORT"),
  (["--coordinator=h:1"], {}, "--processes is missing"),
  (["--coordinator=h:1", "--processes=2"], {}, "--process is missing"),
  (["--coordinator=h:1", "--processes=2", "--process=2"], {}, "--process=2 is not one of"),
  (["--coordinator=h", "--processes=2", "--process=0"], {}, "--coordinator=h: give HOST:PORT"),
  (["--coordinator=auto", "--processes=2"], {}, "leave --processes=2"),
  (["--heartbeat=0"], {}, "--heartbeat=0 must be at least 1 second"),
  ([], OMPI, "Open MPI started 4 processes"),
  (["--coordinator=h:1"], SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is not a whole number"),
])
def test_a_place_that_cannot_be_is_refused_in_words(argv, variables, said):
  with pytest.raises(ValueError, match=said):
    stands(argv, **variables)


class Store:
  """The key-value store of a job whose processes are threads of this one."""

  def __init__(self, count):
    self._held, self._news, self._count = {}, threading.Condition(), count
    self._barriers = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    with self._news:
      if key in self._held and not allow_overwrite:
        raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
      self._held[key] = value
      self._news.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    with self._news:
      if not self._news.wait_for(lambda: key in self._held, milliseconds / 1000):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
      return self._held[key]

  def key_value_dir_get(self, folder):
    with self._news:
      return [pair for pair in self._held.items() if pair[0].startswith(folder)]

  def wait_at_barrier(self, key, milliseconds):
    with self._news:
      barrier = self._barriers.setdefault(key, threading.Barrier(self._count))
    barrier.wait(milliseconds / 1000)


def on_all(work, count=2):
  """Returns what `work(team)` returns, or the error it raises, on every process of a job."""
  store, found = Store(count), [None] * count

  def run(index):
    try:
      found[index] = work(processes.Team(store, index, count))
    except ValueError as error:
      found[index] = error

  threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return found


def test_what_process_0_shares_all_have():
  given = {"a": [1, None]}
  def work(team):
    first = team.share(given if team.leads else None)
    team.meet()
    return first, team.share(team.index)
  assert on_all(work, 3) == [(given, 0)] * 3


def engine(workdir, ran, *, wrong=None):
  """Returns what a process does that runs three stages, of which the middle one is for all."""
  def job(team):
    def stage(name, needs=(), **how):
      def run(folder, inputs):
        time.sleep(0.1 * (name == "three"))
        ran.append((name, team.index, folder, dict(inputs)))
        if name == wrong:
          raise ValueError("this cannot be")
        if team.leads:
          (folder / "made").write_text(name)
      return Stage(name, {"name": name}, run, needs, **how)

    made = [stage("one"), stage("two", ("one",), together=True), stage("three", ("two",))]
    where = workdir if isinstance(workdir, pathlib.Path) else workdir[team.index]
    owner = {"config": "c", "file": "f"}
    folders = stages.run(made, where, owner=owner, say=ran.append, team=team)
    ran.append(f"process {team.index} is through")
    return folders
  return job


def test_all_run_a_stage_that_is_for_all_and_process_0_alone_the_others(tmp_path):
  ran = []
  first, second = on_all(engine(tmp_path / "job", ran))
  assert set(first) == {"one", "two", "three"} and second == {}
  calls = [each if isinstance(each, str) else each[:2] for each in ran]
  assert sorted(each for each in calls if isinstance(each, tuple)) == [
    ("one", 0), ("three", 0), ("two", 0), ("two", 1)]
  mine, theirs = ((folder, inputs) for name, _, folder, inputs in
                  (each for each in ran if type(each) is tuple) if name == "two")
  assert mine == theirs == (tmp_path / "job" / "two.partial", {"one": tmp_path / "job" / "one"})
  assert calls.index(("three", 0)) < calls.index("process 1 is through")
  ran.clear()
  on_all(engine(tmp_path / "job", ran))  # all is done already
  assert [each for each in ran if type(each) is tuple] == []


def test_a_process_that_sees_another_workdir_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(stages, "SHOWN", 0.1)
  store, found = Store(2), []
  teams = [processes.Team(store, index, 2) for index in range(2)]
  run = engine([tmp_path / "mine", tmp_path / "theirs"], [])
  leader = threading.Thread(target=lambda: found.append(run(teams[0])), daemon=True)
  leader.start()
  with pytest.raises(ValueError, match="inputs.json is not what process 0 wrote there"):
    run(teams[1])
  store.wait_at_barrier("job/met/2", 30_000)  # lets the first one go on
  leader.join(30)


@pytest.fixture(name="ends")
def _ends():
  """What processes that end at once would have said, and their exit codes."""
  found = []

  class Ended(BaseException):
    pass

  # A team of its own kind: its threads may come to their end after the test has.
  class Team(processes.Team):
    def _end(self, line, code):
      found.append((self.index, line, code))
      raise Ended

    def _watch(self):
      with contextlib.suppress(Ended):
        super()._watch()

  return found, Ended, Team


def wait_for(found, expected):
  """Returns whether these processes have ended so: pairs of a number and a code."""
  until = time.monotonic() + 20
  while {(index, code) for index, _, code in found} != expected and time.monotonic() < until:
    time.sleep(0.01)
  return {(index, code) for index, _, code in found} == expected


def test_a_mistake_of_one_process_ends_all_with_its_line(ends):
  found, ended, team_of = ends
  store = Store(3)
  teams = [team_of(store, index, 3, heartbeat=5) for index in range(3)]
  for index in (0, 1):
    threading.Thread(target=teams[index]._watch, daemon=True).start()
  with pytest.raises(ended):
    with teams[2]:
      stages.claim(pathlib.Path(__file__).parent, {"config": "c", "file": "f"})
  assert wait_for(found, {(index, 2) for index in range(3)})
  (line,) = {line for _, line, _ in found}
  assert "neither empty nor one of ours" in line


def test_process_0_ends_when_the_others_have_heard_why(ends):
  found, ended, team_of = ends
  store = Store(3)
  teams = [team_of(store, index, 3, heartbeat=5) for index in range(3)]
  for team in teams[1:]:
    threading.Thread(target=team._watch, daemon=True).start()
  with pytest.raises(ended):
    with teams[0]:  # its service goes with it, and whoever has not heard calls it lost
      stages.claim(pathlib.Path(__file__).parent, {"config": "c", "file": "f"})
  assert {pair[0] for pair in store.key_value_dir_get("job/heard/")} == {
    f"job/heard/{index}" for index in range(3)}
  assert wait_for(found, {(index, 2) for index in range(3)})


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_what_fails_because_another_process_died_is_no_mistake(monkeypatch, kind):
  monkeypatch.setattr(processes, "GRACE", 0.0)
  team = processes.Team(Store(2), 1, 2, heartbeat=0.01)
  with pytest.raises(ValueError) as caught:
    stages.claim(pathlib.Path(__file__).parent, {"config": "c", "file": "f"})
  assert team._verdict(caught.value)[1] == processes.MISTAKE
  # As of a checkpoint that could not be written.
  caught.value.__cause__ = kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
  line, code = team._verdict(caught.value)
  assert code == processes.LOST and line.startswith("process 1 of 2 failed")


def test_a_process_without_a_sign_of_life_ends_all(ends, monkeypatch):
  monkeypatch.setattr(processes, "GRACE", 0.2)
  found, _, team_of = ends
  store = Store(3)
  for index in (0, 1):  # the third one never comes
    team = team_of(store, index, 3, heartbeat=0.5)
    threading.Thread(target=team._watch, daemon=True).start()
  assert wait_for(found, {(0, processes.LOST), (1, processes.LOST)})
  (line,) = {line for _, line, _ in found}
  assert line.startswith("process 2 of 3 gave no sign of life for 0.5 s")


@pytest.mark.parametrize("error, code", [
  (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), processes.LOST),
  (RuntimeError("UNAVAILABLE: the coordination service cannot be reached"), processes.LOST),
  (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), processes.FAILED),
])
def test_what_another_left_alone_is_to_be_tried_again_and_a_bug_is_not(ends, monkeypatch, error,
                                                                       code):
  found, ended, team_of = ends
  monkeypatch.setattr(processes, "GRACE", 0.0)
  with pytest.raises(ended):
    team_of(Store(2), 1, 2, heartbeat=0.01).__exit__(type(error), error, None)
  (_, line, ended_with), = found
  assert ended_with == code and line.startswith(f"process 1 of 2 failed: {type(error).__name__}")


def start(place, count, *argv):
  """Starts the teacher's pretraining on so many processes of one device each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  (place / "pair.py").write_text(CONFIG)
  flag = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", "--heartbeat=10"]
  command = commands.command("pretrain", "--config=pair.py", "--workdir=job", *flag)
  return [
    subprocess.Popen(
      [*command, f"--process={index}", *(argv if index else ())], cwd=place, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=commands.environment(),
    ) for index in range(count)
  ]


def ended(running):
  """Returns exit code and output of every process."""
  outs = [process.communicate(timeout=400)[0] for process in running]
  return [(process.returncode, out) for process, out in zip(running, outs, strict=True)]


def last_step(place) -> int:
  """Returns the last step that is saved."""
  found = [int(path.parent.name) for path in place.glob("cache/*/checkpoints/*/manifest.json")]
  return max(found, default=0)


def test_a_mistake_on_one_end_is_told_on_every_end(tmp_path):
  (first, out), (second, other) = ended(start(tmp_path, 2, "--config.teacher.peak=-1"))
  assert (first, second) == (2, 2)
  assert out.splitlines()[-1] == other.splitlines()[-1] and "peak" in out.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_give_what_one_process_gives(tmp_path, capsys):
  running = start(tmp_path, 2)
  while last_step(tmp_path) < 2:
    assert all(process.poll() is None for process in running), ended(running)
    time.sleep(0.02)
  running[1].send_signal(signal.SIGKILL)
  (code, out), _ = ended(running)
  assert code == processes.LOST, out
  assert "process 1 of 2 gave no sign of life" in out.splitlines()[-1]
  saved = last_step(tmp_path)
  assert saved < 12
  (code, out), (other, quiet) = ended(start(tmp_path, 2))
  assert (code, other) == (0, 0), out + quiet
  assert "teacher: resume" in out and "[hybridlm]" not in quiet
  (folder,) = tmp_path.glob("cache/teacher-*")
  records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  steps = [record["step"] for record in records if record["split"] == "train"]
  assert steps == sorted(set(steps)) and steps[-1] == 12
  assert cli.call(pretrain.main, ["pretrain", f"--config={tmp_path / 'pair.py'}",
                                  f"--workdir={tmp_path / 'alone' / 'job'}"]) == 0
  (alone,) = (tmp_path / "alone").glob("cache/teacher-*")
  two, one = (artefacts.load_model(path)[1] for path in (folder, alone))
  for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  capsys.readouterr()
