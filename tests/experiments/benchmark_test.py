"""The scan's benchmark: what it counts, whom it refuses to time, what it prints and writes."""

import csv
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import benchmark_ssd
from experiments import (
  apart,
  benchmark,
  console,
  contenders,
  peers,
  roofline,
  scan_bench,
  scan_report,
)
from experiments.contenders import Case
from experiments.roofline import PASSES, Shape
from hybridlm.ops.ssd import api

CONFIG = "--config=configs/benchmark_ssd.py"
CASE = Case("toy", 23, "float32")
TOLERANCE = 1e-4


@pytest.fixture(name="problem", scope="module")
def _problem():
  arrays = contenders.inputs(CASE, seed=0)
  return arrays, contenders.expected(arrays)


def ready(label, problem):
  arrays, want = problem
  return contenders.prepare(label, CASE, arrays, peers_path="", platform="cpu"), want


def test_flops_are_those_of_the_products_of_a_chunk():
  shape = Shape(G=2, H=3, P=5, N=7, B=11)
  Q, L = 4, 12  # three chunks
  scores, inside = 2 * Q * Q * 7, 2 * Q * Q * 5
  states = 2 * (2 * Q * 7 * 5)  # into the state, and out of it
  want = 11 * 3 * 2 * (scores + 3 * (inside + states))
  assert roofline.flops(shape, L, Q, passes=PASSES[0]) == want
  assert roofline.flops(shape, L, Q, passes=PASSES[1]) == 3 * want


def test_the_bytes_that_must_move_are_those_of_the_arrays():
  case = Case("toy", 23, "bfloat16")
  arrays = {name: v.nbytes for name, v in contenders.inputs(case, seed=0).items()}
  x, dt = arrays["x_BLGHP"], arrays["dt_BLGH"]
  bc = arrays["b_BLGN"] + arrays["c_BLGN"]
  args = x + dt + bc
  assert roofline.traffic(case.sizes, 23, 2, passes=PASSES[0]) == args + x
  # Backward: the arguments and y's cotangent in, the arguments' out.
  assert roofline.traffic(case.sizes, 23, 2, passes=PASSES[1]) == (args + x) + (args + x) + args


def test_the_slow_path_of_8b_takes_the_64_gib_that_users_report():
  assert roofline.slow_path_bytes(roofline.SHAPES["8b"], 8192, 128) == 64 * 2**30


def test_shapes_have_the_heads_and_widths_of_the_published_models():
  inner = {name: s.G * s.H * s.P for name, s in roofline.SHAPES.items()}
  assert (inner["8b"], inner["56b"], inner["nano"]) == (8192, 16384, 10240)
  assert (inner["4b"], inner["nano_pruned"], inner["small"]) == (7168, 7680, 1024)
  assert inner["small_groups"] == inner["small"]


def test_all_calls_take_turns_after_one_that_is_not_counted():
  seen = []
  calls = {name: lambda name=name: seen.append(name) or len(seen) for name in "ab"}
  seconds = roofline.take_turns(calls, 2)
  assert seen == ["a", "b"] * 3 and seconds == {"a": [3, 5], "b": [4, 6]}


def test_queued_calls_are_started_together_waited_for_once_and_counted_singly(monkeypatch):
  seen, clock = [], iter([2.0, 14.0])
  monkeypatch.setattr(contenders.time, "perf_counter", lambda: next(clock))
  calls = iter("abc")
  assert contenders.seconds(lambda: next(calls), seen.append, 3) == 4.0 and seen == ["c"]


@pytest.mark.parametrize("label", ["chunked", "chunked@7", "reference", "listing@4", "listing@9"])
def test_a_right_contender_passes_with_its_error(label, problem):
  contender, want = ready(label, problem)
  checked = contenders.check(contender, want, tolerance=TOLERANCE)
  assert checked.reason == "" and 0 < checked.error < 1e-5


def test_the_recurrence_in_blocks_is_the_recurrence(problem, monkeypatch):
  # 23 is prime: one block is the whole, blocks of one token are the other extreme.
  arrays, want = problem
  monkeypatch.setattr(contenders, "BLOCK", 5)
  found = contenders.expected(arrays)
  for name, v in want.items():
    np.testing.assert_allclose(found[name], v, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("place", range(7))
def test_a_wrong_value_or_gradient_is_named_and_not_timed(place, problem):
  contender, want = ready("listing@4", problem)
  names = ("y (forward)", *contenders.RESULTS)

  def spoilt(call, at):
    def run():
      out = list(call())
      out[at] = out[at] * (1 + 3 * TOLERANCE)
      return out
    return run

  forward, both = contender.calls
  calls = (spoilt(forward, 0), both) if place == 0 else (forward, spoilt(both, place - 1))
  checked = contenders.check(contender._replace(calls=calls), want, tolerance=TOLERANCE)
  assert checked.calls is None
  assert checked.reason.startswith(f"wrong: {names[place]} is off by 3.0e-04 of its norm")


def test_a_result_that_is_no_number_is_wrong(problem):
  contender, want = ready("listing@4", problem)
  forward, both = contender.calls
  broken = contender._replace(calls=(lambda: [forward()[0] * jnp.nan], both))
  checked = contenders.check(broken, want, tolerance=TOLERANCE)
  assert checked.calls is None and "y (forward) is off by nan" in checked.reason


@pytest.mark.parametrize("error, words", [
  (RuntimeError("RESOURCE_EXHAUSTED: 7 bytes"), "out of memory: RESOURCE_EXHAUSTED: 7 bytes"),
  (KeyError("a\nb"), "failed with KeyError: 'a\\nb'"),
])
def test_a_contender_that_fails_stands_there_with_its_error_and_costs_no_other(
  error, words, problem
):
  contender, want = ready("listing@4", problem)

  def fail():
    raise error

  checked = contenders.check(
    contender._replace(calls=(fail, fail)), want, tolerance=TOLERANCE
  )
  assert checked.calls is None and checked.reason == words


def test_a_process_that_ends_or_does_not_answer_is_its_contenders_failure(monkeypatch):
  case = apart.Problem(CASE, 0, "no such file", TOLERANCE, "", "cpu")
  with apart.hosts(("chunked", "listing@4")) as hosts:
    assert "FileNotFoundError" in hosts["listing@4"].ready("listing@4", case).reason
    hosts["chunked"]._process.kill()
    found = hosts["chunked"].ready("chunked", case)
    assert found.reason == "failed: its process ended with -9"
    monkeypatch.setattr(apart, "PATIENCE", 0)
    late = hosts["listing@4"].ready("listing@4", case)
    assert late.reason == "failed: no answer within 0 seconds"
    assert hosts["listing@4"].ready("listing@4", case).reason == late.reason


def test_a_kernel_of_another_platform_and_a_peer_that_is_not_installed_say_why(problem):
  tpu, _ = ready("pallas_tpu", problem)
  gone, _ = ready("axlearn@1", problem)
  assert tpu.calls is None and "'pallas_tpu' runs on tpu, not on cpu" in tpu.reason
  assert gone.reason == "axlearn: the package axlearn is not installed"


@pytest.mark.parity
def test_the_scan_of_transformers_is_right_too(problem):
  contender, want = ready("transformers@8", problem)
  assert contenders.check(contender, want, tolerance=TOLERANCE).reason == ""


@pytest.mark.parity
def test_a_folder_without_the_peer_is_a_mistake_and_one_with_it_is_read_as_it_lies(
  tmp_path, monkeypatch
):
  monkeypatch.setattr("torch.cuda.is_available", lambda: True)
  monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name != "mamba_ssm" or None)
  with pytest.raises(ValueError, match="no mamba_ssm/ops/triton/ssd_combined.py below it"):
    peers.load("mamba_ssm", str(tmp_path), 8)
  folder = tmp_path / "mamba_ssm" / "ops" / "triton"
  folder.mkdir(parents=True)
  (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
  (folder / "ssd_combined.py").write_text(
    "def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size):\n  return x, C, chunk_size\n"
  )
  for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton",
               "mamba_ssm.ops.triton.ssd_combined"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  scan = peers.load("mamba_ssm", str(tmp_path), 8)
  assert scan("x", "dt", "A", "B", "C") == ("x", "C", 8)
  for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
    del sys.modules[name]


def test_a_page_names_the_compilers_and_the_peers_that_its_numbers_depend_on(tmp_path):
  results = {
    "times": [{"contender": "mamba_ssm@64", "seconds": 1.0}, {"contender": "axlearn@1"}],
    "ahead": [{"target": "v5e", "seconds": 1.0}, {"target": "h200", "missing": "a package"}],
  }
  names = benchmark.packages(results)
  assert names == ["mamba_ssm", "torch", "triton", "einops", "packaging", "libtpu"]
  (tmp_path / "mamba_ssm").mkdir()
  (tmp_path / "mamba_ssm" / "__init__.py").write_text('__version__ = "7.5"\nimport compiled\n')
  assert peers.versions(["mamba_ssm", "no_such"], str(tmp_path)) == ["mamba_ssm 7.5"]
  assert peers.versions(["jax"]) == [f"jax {jax.__version__}"]


def test_heads_of_peers_are_ours_group_by_group(problem):
  arrays, _ = problem
  merged = peers.merge(arrays)
  assert merged["x"].shape == (1, 23, 6, 5) and merged["a"].shape == (6,)
  np.testing.assert_array_equal(merged["x"][:, :, 4], arrays["x_BLGHP"][:, :, 1, 1])
  assert merged["b"].shape == arrays["b_BLGN"].shape


def timed(contender, seconds, L=5, status="ok"):
  return {"shape": "toy", "L": L, "dtype": "float32", "pass": PASSES[0], "contender": contender,
          "seconds": seconds, "status": status}


def test_ratios_are_geometric_means_over_cases_at_each_chunk_at_the_models_and_at_the_best():
  rows = [
    timed("chunked", 1.0), timed("listing@64", 2.0), timed("listing@128", 3.0),
    timed("listing@256", 12.0),
    timed("chunked", 1.0, 7), timed("listing@64", 8.0, 7), timed("listing@128", 3.0, 7),
    timed("listing@256", 3.0, 7), timed("transformers@128", 0.1, 7, "wrong"),
  ]
  found = {row["peer"]: row for row in scan_bench.ratios(rows)}
  assert found["listing@64"]["mean"] == pytest.approx(4)  # sqrt(2 * 8)
  assert found["listing at 128 and 256"]["mean"] == pytest.approx((3 * 12 * 3 * 3) ** 0.25)
  assert found["listing at 128 and 256"]["cases"] == 4
  best = found["listing at its best"]
  assert best["mean"] == pytest.approx((2 * 3) ** 0.5)
  assert (best["smallest"], best["where"]) == (2.0, "toy L=5")
  assert not any("transformers" in peer for peer in found)


@pytest.mark.parametrize("override, words", [
  ("cpu.shapes=('9b',)", "cpu: shape '9b' is not one of 8b, 4b"),
  ("cpu.lengths=(0,)", "cpu: length 0 of shape 'small' is not a number of tokens"),
  ("cpu.more=(('toy',-1),)", "cpu: length -1 of shape 'toy'"),
  ("cpu.dtypes=('float16',)", "cpu: dtype 'float16' is not one of float32, bfloat16"),
  ("cpu.implementations=('chunk',)", "cpu: contender 'chunk': 'chunk' is not one of reference"),
  ("cpu.peers=('listing',)", "cpu: contender 'listing': a peer takes a chunk"),
  ("cpu.peers=('listing@x',)", "cpu: contender 'listing@x': the chunk 'x' is not a number"),
  ("cpu.turns=0", "cpu.turns 0 is below 1"),
  ("cpu.queued=0", "cpu.queued 0 is below 1"),
  ("memory.shapes=('x',)", "memory: shape 'x'"),
  ("ahead.tpu.targets=('v4',)", "ahead.tpu.targets: ahead-of-time target 'v4'"),
])
def test_a_value_that_is_wrong_is_one_line_before_anything_is_measured(override, words, capsys):
  assert console.call(benchmark.main, ["benchmark", CONFIG, f"--config.{override}"]) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(words) and captured.err.count("\n") == 1 and not captured.out


def test_the_config_of_another_command_is_refused(capsys):
  argv = ["benchmark", "--config=configs/quickstart.py"]
  assert console.call(benchmark.main, argv) == 2
  assert "quickstart.py is another command's: it has no part 'ahead'" in capsys.readouterr().err


def test_every_value_of_the_config_may_be_what_it_is():
  c = benchmark_ssd.get_config()
  assert len(scan_bench.check_config(c)) == 9
  for platform in ("gpu", "tpu"):
    part = c[platform]
    labels = (*part.implementations, *part.peers)
    assert all(contenders.split(label)[0] for label in labels)
    assert contenders.cases(part.shapes, part.lengths, part.dtypes, part.more)


def test_what_compilers_report_is_one_line_for_all_lengths_with_the_most_that_each_kernel_takes():
  row = {"target": "h200", "name": "pallas_gpu", "shape": "8b", "dtype": "bfloat16", "chunk": None,
         "passes": PASSES[0], "seconds": 1.0, "algorithm": 2**20}
  kernel = {"name": "k", "registers": 90, "spills": 0, "shared": 1024, "threads": 128}
  rows = [
    row | {"L": L, "arguments": L * 2**20, "outputs": 0, "temporaries": 0, "kernels": [kernel | {
      "registers": registers}]}
    for L, registers in ((512, 168), (2048, 90))
  ] + [row | {"L": 4096, "error": "too large"}, {"target": "v5e", "missing": "needs libtpu"}]
  page = "\n".join(scan_report.ahead(rows))
  sizes, kernel = "| 512, 2048 | 2048 | 0 | 0 | 1 |", "k 168 registers, 0 spilled, 1 KiB"
  assert f"{sizes} {kernel} | 1.0 | not measured |" in page
  assert "* h200 `pallas_gpu` 8b L=4096 bfloat16 forward does not compile: too large" in page
  assert "* v5e: needs libtpu" in page and page.count("pallas_gpu") == 2


def test_a_kernel_is_itself_wherever_it_stands_in_the_program():
  small = {"name": "k", "registers": 72, "spills": 0, "shared": 2048, "threads": 128}
  large = {"name": "k", "registers": 90, "spills": 4, "shared": 4096, "threads": 128}
  first = {"kernels": [small, large]}
  second = {"kernels": [large | {"registers": 100}, small, small]}
  assert scan_report.kernels([first, second]).split("; ") == [
    "k 72 registers, 0 spilled, 2 KiB", "k 100 registers, 4 spilled, 4 KiB",
    "k 72 registers, 0 spilled, 2 KiB",
  ]
  rows = [{"kernels": [{"name": "v", "vmem": n * 2**20}]} for n in (3, 5)]
  assert scan_report.kernels(rows) == "v 5.00 MiB"


def test_the_command_checks_times_and_writes_what_it_prints(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(roofline.PROBES, "cpu", (32, (2, 8, 8, 8), 64))
  # A peer that is there, and wrong, for processes that know nothing of this test but the path.
  package = tmp_path / "packages" / "mamba2_jax"
  package.mkdir(parents=True)
  (package / "__init__.py").write_text("")
  (package / "modeling.py").write_text("def ssd_forward(x, *rest):\n  return (x,)\n")
  monkeypatch.syspath_prepend(str(package.parent))
  values = {
    "cpu.shapes": "('toy',)", "cpu.lengths": "(23,)", "cpu.more": "()", "cpu.turns": "1",
    "cpu.implementations": "('chunked','pallas_tpu')",
    "cpu.peers": "('listing@16','mamba2_jax@16')", "memory.shapes": "('toy',)",
    "memory.dtypes": "('float32',)", "memory.length": "23", "ahead.tpu.targets": "('v5e',)",
    "ahead.tpu.shapes": "()", "ahead.gpu.targets": "()", "peers_path": str(tmp_path),
  }
  argv = ["benchmark", CONFIG, *(f"--config.{k}={v}" for k, v in values.items())]
  assert console.call(benchmark.main, [*argv, f"--out={tmp_path}"]) == 0
  out = capsys.readouterr().out
  page = (tmp_path / "report.md").read_text()
  assert page.removesuffix("\n![times](times.png)\n") in out
  assert str(tmp_path) not in page.replace(f"--out={tmp_path}", "")
  assert "* `mamba2_jax@16`, everywhere: wrong: " in page
  assert "* `pallas_tpu`, everywhere: ssd implementation 'pallas_tpu' runs on tpu" in page
  results = json.loads((tmp_path / "results.json").read_text())
  done = {row["contender"] for row in results["times"] if "seconds" in row}
  assert done == {"chunked", "listing@16"}
  assert len(results["memory"]) == 2 and (tmp_path / "times.png").stat().st_size > 1000
  with (tmp_path / "times.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 8 and float(rows[0]["tokens_a_second"]) == pytest.approx(
    23 / float(rows[0]["seconds"])
  )


def test_programs_for_compilers_have_the_arguments_of_the_case():
  options = {"name": "chunked", "chunk": 8, **CASE._asdict()}
  arrays = contenders.inputs(CASE, seed=0)
  fn, arguments = contenders.program(**options, passes=PASSES[1])
  assert [(v.shape, v.dtype) for v in arguments] == [(v.shape, v.dtype) for v in arrays.values()]
  found = jax.eval_shape(fn, *arguments)
  assert [v.shape for v in found] == [arguments[0].shape, *(v.shape for v in arguments[:-1])]
  assert contenders.own_chunk("chunked", CASE, "gpu") == api.ACCELERATOR_CHUNK
