"""Memory of the distillation loss and its gradient, from the compiler, against all logits at once.

python -m experiments.bench_loss [--out=docs/results/loss_memory.md]

Compiles only: sizes are those of real models, and no array of theirs is made. The dense
form is the definition with JAX's own log_softmax, differentiated by JAX. Set
XLA_FLAGS=--xla_force_host_platform_device_count=8 for the table of a mesh.
"""

import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import artefacts, console, evaluation
from hybridlm.distill import loss
from hybridlm.train import mesh as meshes

VOCABULARIES, LENGTHS = (4096, 32768, 131072), (1024, 8192)
ROWS, WIDTHS = 4, (512, 768)
# The pair of published models, a device's share of 768 rows on 64 devices.
REAL_ROWS, REAL_WIDTHS = 12, (3072, 4096)
KINDS = {
  "forward_kl": {}, "with cross-entropy": {"ce": 0.5}, "temperature 2": {"temperature": 2.0},
  "reverse_kl": {"divergence": "reverse_kl"}, "jensen_shannon": {"divergence": "jensen_shannon"},
  "skewed_kl": {"divergence": "skewed_kl"}, "top 100 and a bucket": {"top_k": 100},
  "stored, 100 tokens": {"stored": 100},
}
MESH = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
MIB = 2**20


def main(argv: Sequence[str]) -> None:
  """Prints the tables, and writes them to `--out`.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  command = " ".join(["python -m experiments.bench_loss", *argv[1:]])
  head = ["# Memory of the loss", "", f"`{command}` on {evaluation.machine()}; the compiler's "
          "report of temporaries, in MiB.", ""]
  text = "\n".join([*head, *sizes(), "", *kinds(), "", *_mesh(), ""])
  print(text)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())


def sizes() -> Iterator[str]:
  """Yields the table over V and L, and the row of the published pair."""
  yield "Loss and gradient, forward KL. Formula: three float32 arrays of all logits (both models'"
  yield "and the gradient), which the dense form at least needs. Published widths: the last row."
  yield ""
  yield "| rows | D, teacher's D | V | L | formula | dense | chunked | of the formula | of dense |"
  yield "|---|---|---|---|---|---|---|---|---|"
  cases = [(ROWS, WIDTHS, "float32", V, L) for V in VOCABULARIES for L in LENGTHS]
  cases.append((REAL_ROWS, REAL_WIDTHS, "bfloat16", VOCABULARIES[-1], LENGTHS[-1]))
  for rows, widths, dtype, V, L in cases:
    shapes = arrays(rows, widths, V, L, dtype)
    formula = 3 * 4 * rows * L * V
    dense, chunked = (temporaries(form, shapes) for form in (_dense, _chunked))
    yield (
      f"| {rows} | {widths[0]}, {widths[1]} {dtype} | {V} | {L} | {formula / MIB:,.0f} | "
      f"{dense / MIB:,.0f} | {chunked / MIB:,.1f} | 1/{formula / chunked:.0f} | "
      f"1/{dense / chunked:.0f} |"
    )


def kinds() -> Iterator[str]:
  """Yields the table over losses, at the largest size."""
  V, L = VOCABULARIES[-1], LENGTHS[-1]
  yield f"Every loss at V={V}, L={L}, {ROWS} rows, D={WIDTHS[0]}, float32."
  yield ""
  yield "| loss | temporaries | of the formula |"
  yield "|---|---|---|"
  for name, settings in KINDS.items():
    found = temporaries(functools.partial(_chunked, **settings), arrays(ROWS, WIDTHS, V, L))
    yield f"| {name} | {found / MIB:,.1f} | 1/{3 * 4 * ROWS * L * V / found:.0f} |"


def _mesh() -> Iterator[str]:
  """Yields what one device of a mesh needs, where so many are here."""
  if jax.device_count() < 8:
    yield "The mesh is left out: fewer than eight devices are here."
    return
  V, L = VOCABULARIES[-1], LENGTHS[-1]
  along = " ".join(f"{name} {size}" for name, size in MESH.items() if size > 1)
  grid = meshes.make(MESH)
  with jax.set_mesh(grid):
    found = temporaries(_chunked, arrays(ROWS, WIDTHS, V, L))
  share = 3 * 4 * ROWS * L * V / 8
  yield f"One device of {along}, V={V}, L={L}, {ROWS} rows, forward KL, everything else as above:"
  yield f"{found / MIB:,.1f} MiB, 1/{share / found:.0f} of its share of the formula."


def arrays(
  rows: int, widths: tuple[int, int], V: int, L: int, dtype: str = "float32"
) -> list[jax.ShapeDtypeStruct]:
  """Returns shapes of states and heads, of the student and the teacher."""
  shapes = [shape for D in widths for shape in ((rows, L, D), (D, V))]
  return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def temporaries(form: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]) -> int:
  """Returns the compiler's temporaries, in bytes, of a loss and its gradient."""
  step = jax.jit(jax.value_and_grad(form, (0, 1)))
  return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def _labels(student_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.zeros(student_BLD.shape[:2], jnp.int32), jnp.ones(student_BLD.shape[:2])


def _chunked(student_BLD, head_DV, teacher_BLD, teacher_head_DV, *, stored=None, **settings):
  """Returns the library's loss; a stored teacher is one whose tokens are equally likely."""
  teacher = {"teacher_BLD": teacher_BLD, "teacher_head_DV": teacher_head_DV}
  if stored:
    id_BLT = jnp.broadcast_to(jnp.arange(stored), (*student_BLD.shape[:2], stored))
    log_BLT = jnp.full(id_BLT.shape, -jnp.log(2.0 * stored))
    teacher = {"top_id_BLT": id_BLT, "top_log_BLT": log_BLT,
               "tail_log_BL": jnp.full(id_BLT.shape[:2], -jnp.log(2.0))}
  return loss.sums(student_BLD, head_DV, *_labels(student_BLD), **teacher, **settings)["loss"]


def _dense(student_BLD, head_DV, teacher_BLD, teacher_head_DV):
  """Returns the definition of the forward KL."""
  def logs(x_BLD, matrix_DV):
    logits = jnp.einsum("BLD,DV->BLV", x_BLD, matrix_DV, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits)

  log_p_BLV = logs(teacher_BLD, teacher_head_DV)
  kl_BL = (jnp.exp(log_p_BLV) * (log_p_BLV - logs(student_BLD, head_DV))).sum(-1)
  return (_labels(student_BLD)[1] * kl_BL).sum()


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
