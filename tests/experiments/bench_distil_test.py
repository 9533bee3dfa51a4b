"""A step of distillation is compared with its parts, and its costs are put where they come from."""

import jax
import jax.numpy as jnp
import pytest

from configs import quickstart_toy
from experiments import bench_distil, costs
from hybridlm.ops import norm
from hybridlm.prune import devices

# As XLA prints a program: three files, frames that point at places in them, and what they made.
HLO = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/hybridlm/bind.py"
2 "/somewhere/hybridlm/hybridlm/ops/ssd/chunked.py"
3 "/somewhere/site-packages/optax/_src/transform.py"

FunctionNames
1 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=27 end_line=27 column=9 end_column=90}
2 {file_name_id=2 function_name_id=1 line=3}
3 {file_name_id=3 function_name_id=1 line=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}

%body (x: f32[2]) -> f32[2] {
  ROOT %dot.1 = f32[2]{0} dot(%x, %x), metadata={op_name="jit(step)/transpose(jvp(f))/dot_general" \
stack_frame_id=2}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %while.7 = (s32[], /*index=1*/f32[2]{0}) while(%x), condition=%c, body=%body, metadata={\
op_name="jit(step)/while" stack_frame_id=2}
  %exp_fusion = f32[2]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/jvp(f)/exp" \
stack_frame_id=2}
  %add.2 = f32[2]{0} add(%x, %x), metadata={op_name="jit(step)/add" stack_frame_id=3}
  %copy.3 = f32[2]{0:T(128)S(1)} copy(%x)
  ROOT %mul = f32[2]{0} multiply(%x, %x), metadata={op_name="jit(step)/mul" stack_frame_id=1}
}
"""


def test_operations_are_named_by_their_file_and_pass():
  assert costs.sources(HLO) == {
    "dot.1": ("dot", "ops/ssd/chunked.py, backward"),
    "while.7": ("while", "ops/ssd/chunked.py"),
    "exp_fusion": ("fusion", "ops/ssd/chunked.py, forward"),
    "add.2": ("add", "optax"),
    "copy.3": ("copy", costs.ELSEWHERE),
    "mul": ("multiply", "bind.py"),
  }


def test_a_trace_says_which_file_the_device_spent_its_time_in(tmp_path):
  x_BLD, gain_D = jnp.ones((8, 64, 256)), jnp.ones(256)

  def turn(y_BLD, _):
    return norm.rms_norm(y_BLD, gain_D, eps=1e-5), None

  many = jax.jit(lambda x: jax.lax.scan(turn, x, length=20)[0]).lower(x_BLD).compile()
  other = jax.jit(lambda x: jnp.sin(x)).lower(x_BLD).compile()
  with jax.profiler.trace(str(tmp_path)):
    jax.block_until_ready((many(x_BLD), other(x_BLD)))
  (path,) = tmp_path.rglob("*.xplane.pb")
  ((place, share), *rest) = costs.largest(path, many.as_text(), 5)
  assert place == "ops/norm.py" and share > 0.5
  assert share + sum(part for _, part in rest) == pytest.approx(1.0)
  with pytest.raises(ValueError, match="has no operation of the program"):
    costs.largest(path, HLO, 3)


@pytest.mark.parametrize("step, wait, words", [
  (16.0, 0.1, "0.914 of its parts' sum. Both bounds are kept."),
  (19.3, 0.1, "1.103 of its parts' sum. Over its bound: step."),
  (20.0, 0.4, "Over its bound: step and wait."),
])
def test_the_verdict_follows_the_numbers(step, wait, words):
  found = {"student": 0.010, "teacher": 0.0075, "distillation": 1e-3 * step}
  text = "\n".join(bench_distil.verdict(found, {"data": wait, "stepping": 10.0}))
  assert words in text and "1.10 × (1 + teacher / student) = 1.925" in text
  assert f"| distillation / student's step | {step / 10:.3f} |" in text
  assert f"| {10 * wait:.2f}% | 2% |" in text


def small():
  """Returns the toy quickstart with MLPs alone, whose programs compile at once."""
  c = quickstart_toy.get_config()
  c.model.update(pattern="--", W=None, K=None, J=None, E=None, G=None, H=None, P=None, N=None)
  c.targets.update(D=12, F=16, H=None, P=None, J=None)
  return c


def test_the_bench_runs_to_a_report(tmp_path, monkeypatch, capsys):
  class Config:
    """Stands for the module of the toy's config."""

    get_config = staticmethod(small)

  monkeypatch.setattr(bench_distil, "quickstart_toy", Config)
  out = tmp_path / "report.md"
  bench_distil.main(["bench_distil", "--shape=toy", "--turns=1", "--steps=2", f"--out={out}"])
  text = out.read_text()
  assert text in capsys.readouterr().out
  assert "* student: `--` V=257 D=12 F=16" in text and "* 2 rows of 32 tokens" in text
  assert "data wait of a step in the loop" in text and "not measured on a GPU" in text
  table = text.partition("| where | share |")[2].strip().splitlines()[1:]
  assert len(table) == 3 and all(line.endswith("% |") for line in table)


def test_a_published_shape_is_the_preset_s_first_blocks_and_the_published_sizes():
  teacher, student = bench_distil.published(8)
  assert (teacher.pattern, teacher.dtype, student.dtype) == ("M-M-M-M*", "bfloat16", "bfloat16")
  assert (student.D, student.F, student.V) == (3072, 12288, teacher.V)
  assert {block.G * block.H for block in student.blocks if hasattr(block, "H")} == {112}
  with pytest.raises(ValueError, match="blocks=53: the preset has 52"):
    bench_distil.published(53)


def test_a_device_with_a_peak_shows_both_shares_of_it(monkeypatch):
  made = bench_distil.Pair(*bench_distil.published(4), None)
  monkeypatch.setattr(devices, "of_kind", lambda kind: devices.DEVICES["h200"])
  batch = {"token_BL": jnp.zeros((2, 32), jnp.int32)}
  slow, fast = ("\n".join(bench_distil.speed(made, batch, seconds)) for seconds in (2.0, 1.0))
  assert slow.startswith("32 tokens a second; MFU ") and fast.startswith("64 tokens a second")
  assert "% for the teacher's forward" in slow and slow != fast
