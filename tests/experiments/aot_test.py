"""What a compiled step is said to need and to send, and what cannot be compiled at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments import ahead, aot, aot_hlo, aot_plan, cli, distill, prune
from hybridlm.prune import devices

CONFIG = "--config=configs/nemotron_h_8b_to_4b.py"
SMALL = (
  "--config=configs/quickstart.py", "--config.model.pattern=M-M-M*",
  "--config.model.D=256", "--config.model.stack=units", "--config.targets.D=128",
  "--config.data.length=256", "--config.distil.batch=16", "--config.distil.accumulate=2",
)

# As compilers print it: a loop of 4 turns around a gather in two pieces, the second one in a loop
# of 5 turns, by its condition, around a sum that leaves each device its part; a sum of two arrays
# among pairs; two starts of one channel, as copies of a loop have them, with their operands.
HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (p: f32[64,32]) -> f32[8,32] {
  %r = f32[64,32]{1,0:T(8,128)} all-reduce(%p), channel_id=4, replica_groups=[1,8]<=[8], \
to_apply=%add
  ROOT %slice = f32[8,32]{1,0} dynamic-slice(%r, %i, %j)
}

%first (p: f32[64,32]) -> bf16[64,32] {
  ROOT %g = bf16[64,32]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}

%second (p: f32[64,32]) -> bf16[64,32] {
  ROOT %g = bf16[64,32]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
}

%inner_body (t: (f32[64,32])) -> (f32[64,32]) {
  %g.2 = bf16[64,32]{1,0} fusion(%t), kind=kCustom, calls=%second
  %f = f32[8,32]{1,0} fusion(%t), kind=kCustom, calls=%all-reduce-scatter.3
}

%outer_body (t: (f32[8,32])) -> (f32[8,32]) {
  %g = bf16[64,32]{1,0} fusion(%t), kind=kCustom, calls=%first
  %w = (f32[64,32]) while(%t), condition=%turns, body=%inner_body, metadata={op_name="while"}
}

%turns (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,32]) -> f32[8,32] {
  %w = (f32[8,32]) while(%a), condition=%c, body=%outer_body, backend_config={\
"known_trip_count":{"n":"4"},"x":1}
  %two = (f32[16]{0}, s32[4]{0}) all-reduce(%x, %y), replica_groups=mesh['a'=4,'b'=2] {'b'}
  %s = (bf16[100]{0}, bf16[100]{0}) collective-permute-start(%z), channel_id=9, \
source_target_pairs={{0,1},{1,0}}
  %s.2 = (bf16[9]{0}, bf16[9]{0}) collective-permute-start(%z), channel_id=9, \
source_target_pairs={{0,1},{1,0}}
  %d = bf16[100]{0} collective-permute-done(%s)
}
"""


def test_what_is_sent_counts_each_loop_as_often_as_it_turns():
  assert aot_hlo.collectives(HLO, 8) == {
    "all-gather": 4 * 64 * 32 * 2 * 7 / 8,
    "all-reduce": (16 + 4) * 4 * 2 * 1 / 2,
    "collective-permute": 200.0 + 18.0,
    "reduce-scatter": 4 * 5 * 64 * 32 * 4 * 7 / 8,
  }
  with pytest.raises(ValueError, match="no entry"):
    aot_hlo.collectives("HloModule m", 8)


def test_memory_is_read_from_a_compilers_report_before_there_is_machine_code():
  text = "Memory Space: default (color=0)\nTotal bytes: 39864736 (38.02MiB)\n  x;\n\n"
  text += "Memory Space: cmem (color=5)\nTotal bytes: 12 (12B)\n"
  assert aot_hlo.memories(text) == {"default": 39864736, "host": 12}
  with pytest.raises(ValueError, match="default memory"):
    aot_hlo.memories("")


def test_flops_count_loops_and_every_device_of_a_mesh():
  grid = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

  def program(x):
    def turn(x, _):
      return jax.checkpoint(jnp.sin)(x @ x), None

    rows = PartitionSpec("data")
    x = jax.lax.scan(turn, x, length=3)[0]
    return jax.shard_map(
      lambda part: part @ part.T, in_specs=rows, out_specs=rows, axis_names={"data"},
      check_vma=False,
    )(x)

  with jax.set_mesh(grid):
    traced = jax.make_jaxpr(jax.jit(program))(np.ones((8, 8), np.float32))
  assert aot_hlo.flops(traced.jaxpr) == 3 * 2 * 8**3 + 4 * 2 * (2 * 8 * 2)


def order(*argv, name="v5p:2x2x1"):
  """Returns the order of a command line."""
  return aot_plan.order(cli.parse(["distill", *argv]).config, name)


def test_the_published_pair_is_what_is_compiled_for_the_8b_config():
  given = order(CONFIG, name="v5p:4x4x4")
  assert len(given["student"]["blocks"]) == len(given["teacher"]["blocks"]) == 52
  assert (given["student"]["D"], given["teacher"]["D"]) == (3072, 4096)
  assert {block["F"] for block in given["student"]["blocks"] if block["kind"] == "-"} == {12288}
  assert given["teacher_dtype"] == "bfloat16" and aot.tokens(given) == 768 * 8192
  # 6 FLOPs a parameter and token in training, 2 in the teacher, and attention and scans.
  assert 0 < aot.useful(given) / (aot.tokens(given) * (6 * 4.1e9 + 2 * 7.6e9)) - 1 < 0.15
  json.dumps(given)


@pytest.mark.parametrize("name, line", [
  ("v5p", "give CHIP:SHAPE"), ("v9:2x2", "chip of v5e, v5p, v6e, h200"),
  ("v5e:2x2x2", "has 2 dimensions"), ("h200:0", "1 or more"),
])
def test_a_slice_that_cannot_be_is_refused_by_its_name(name, line):
  with pytest.raises(ValueError, match=line):
    aot_plan.slice_of(name)


@pytest.mark.parametrize("values, line", [
  (("--config.mesh.fsdp=3",), "mesh.fsdp=3.*not 4 devices"),
  (("--config.distil.batch=12", "--config.mesh.fsdp=4"), "distil.batch=12 .*fsdp=4"),
  (("--config.mesh.tensor=2", "--config.distil.batch=12", "--config.mesh.teacher_layout=rows"),
   "distil.batch=12 .* times mesh.data × mesh.fsdp × mesh.tensor=4"),
  (("--config.mesh.sequence=4", "--config.data.length=254"), "data.length=254 .*mesh.sequence=4"),
  (("--config.mesh.tensor=4",), "the student: leaf .*w_o_KJED: neither K=2 nor J=3 is"),
  (("--config.distil.store=kept",), "distil.store='kept'"),
  (("--config.plan.path=search",), "search.winner"),
])
def test_a_step_that_cannot_be_is_refused_before_anything_compiles(values, line):
  with pytest.raises(ValueError, match=line):
    order(*SMALL, *values)


def test_the_flag_belongs_to_distillation_and_a_mistake_is_one_line(capsys, tmp_path):
  argv = ["x", *SMALL, f"--workdir={tmp_path / 'run'}"]
  assert cli.call(prune.main, [*argv, "--aot=v5p:2x2x1"]) == 2
  assert "--aot=v5p:2x2x1 is for experiments.distill" in capsys.readouterr().err
  assert cli.call(distill.main, [*argv, "--aot=v5p:2x2"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
  assert not (tmp_path / "run").exists()


def report(given, **changes):
  """Returns a report of a small step on 4 devices."""
  parts = {"parameters": 10, "moments": 20, "teacher": 10, "batch": 1}
  return {"devices": 4, "parts": parts, "flops": 4e15, "arguments": 41, "outputs": 0, "host": 0,
          "temporaries": 100, "sent": {"all-gather": 3e9}, "compile_seconds": 1.0,
          "compile_cpu": 1.0, "trace_seconds": 1.0} | changes


def test_the_bound_is_that_of_the_slowest_limit():
  given = order(*SMALL, "--config.mesh.fsdp=4")
  found = aot.seconds(given, report(given))
  assert found["products"] == 1e15 / devices.device("v5p").peak("float32")
  assert found["links"] == 3e9 / 600e9
  assert found["memory"] == (2 * 10 + 2 * 20 + 2 * (2 * 10 + 10)) / 2765e9
  at_most = 16 * 256 / found["products"]
  assert f"at most {at_most:,.0f} tokens/s" in aot.text(given, report(given))


HELP = [
  ({}, 200, "distil.accumulate=4 takes one row"),
  ({"--config.distil.accumulate": 4}, 200, "model.remat='block'"),
  ({"--config.distil.accumulate": 4, "--config.model.remat": "block"}, 200, "model.remat='unit'"),
  ({"--config.distil.accumulate": 4, "--config.model.remat": "unit"}, 200, "mesh.sequence=2"),
  ({}, 60, "larger slice"),
  ({"--config.mesh.fsdp": 2}, 60, "mesh.fsdp=4"),
]


@pytest.mark.parametrize("values, needed, line", HELP)
def test_what_does_not_fit_is_said_with_what_helps(values, needed, line):
  values = {"--config.mesh.fsdp": 4} | values
  given = order(*SMALL, *(f"{key}={value}" for key, value in values.items()))
  gib = 2**30
  parts = {name: size * gib for name, size in report(given)["parts"].items()}
  refused = {"devices": 4, "parts": parts, "flops": 1.0, "needs": needed * gib}
  said = aot.fits(given, refused)
  assert line in said
  if needed > 95:
    assert said.startswith(f"does not fit: {needed - 95:.2f} GiB over; ")


@pytest.mark.ahead
@pytest.mark.parametrize(
  "name, along", [("v5e:2x2", "fsdp=4"), ("v5e:2x2@memory", "sequence=2"), ("h200:4", "tensor=2")])
def test_a_step_compiles_for_a_slice_and_its_parts_are_divided(name, along):
  line = ahead.missing(name.partition(":")[0])
  if line is not None:
    pytest.skip(line)
  given = order(*SMALL, f"--config.mesh.{along}", name=name)
  found = aot.compiled(given)
  text = aot.text(given, found)
  assert "fits, with" in text and "of one core" in text, text
  assert found["parts"]["moments"] // found["parts"]["parameters"] == 2
  assert found["sent"] and found["temporaries"] > 0
  assert found["arguments"] >= sum(found["parts"].values())
