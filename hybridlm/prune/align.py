"""Index alignment: which activation of a teacher one of the student's stands for, and its channels.

What a plan keeps of a leaf it keeps of an activation too, because both are named by their axes:
nothing has to be learnt to compare them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm import axes
from hybridlm.config import Block, Mamba1, ModelConfig, block_name, ssm_of
from hybridlm.prune import cut
from hybridlm.prune.plan import Plan

# What can be compared: the residual stream after a block, what the block adds to it, and the state
# of an SSM after the last position; name -> tap, and the axes that make one vector.
TAPS: Mapping[str, tuple[str, str]] = {
  "out": ("out_BLD", "D"), "mix": ("mix_BLD", "D"), "state": ("state_BGHPN", "PN"),
}
# The same of a Mamba-1 mixer, whose heads have one channel each.
MAMBA1: Mapping[str, tuple[str, str]] = {**TAPS, "state": ("state_BGHN", "N")}


class Pair(NamedTuple):
  """One tap of a block of the student and of one of the teacher.

  kind: of `TAPS`.  student, teacher: the blocks' folders.  keeps: the index arrays of each cut
  between the two, in order.  tap: its name.  vector: the axes that make one vector.
  """

  kind: str
  student: str
  teacher: str
  keeps: tuple[Mapping[str, np.ndarray], ...]
  tap: str
  vector: str

  def of_teacher(self, array: jax.Array) -> jax.Array:
    """Returns the teacher's activation with the channels that the student has, in its order."""
    letters = axes.of(self.tap)
    for keeps in self.keeps:
      for keep_letters, keep in cut.of_leaf(self.tap, keeps):
        array = cut.keep_axis(array, letters, keep, keep_letters)
    return array


def pairs(
  cfg: ModelConfig, teacher: ModelConfig, plans: Plan | Sequence[Plan] | None, kinds: Sequence[str]
) -> tuple[Pair, ...]:
  """Returns what is to be compared of a student and its teacher.

  Args:
    cfg: the student.
    teacher: the teacher.
    plans: the cut that made the student of the teacher, or several one after the other; None where
      nothing was cut.
    kinds: names of `TAPS`.

  Raises:
    ValueError: an unknown kind, plans that do not lead from the one model to the other, a kind that
      no block has.
  """
  for kind in kinds:
    if kind not in TAPS:
      raise ValueError(f"intermediate: {kind!r} is not one of {', '.join(TAPS)}")
  plans = (plans,) if isinstance(plans, Plan) else tuple(plans or ())
  _check(cfg, teacher, plans)
  found = []
  for index in range(len(cfg.blocks)):
    old, keeps = index, []
    for plan in reversed(plans):
      old = plan.blocks[old]
      keeps.insert(0, plan.inside(old))
    taps = _taps(cfg.blocks[index])
    found += [Pair(kind, block_name(index), block_name(old), tuple(keeps), *taps[kind])
              for kind in kinds if kind in taps]
  missing = set(kinds) - {pair.kind for pair in found}
  if missing:
    raise ValueError(f"intermediate: {min(missing)!r}: no block of {cfg.pattern!r} has one")
  return tuple(found)


def _taps(block: Block) -> dict[str, tuple[str, str]]:
  """Returns what can be compared of a block: a state of those that have one alone."""
  taps = MAMBA1 if isinstance(ssm_of(block), Mamba1) else TAPS
  return {kind: tap for kind, tap in taps.items() if kind != "state" or "N" in block.axes}


def _check(cfg: ModelConfig, teacher: ModelConfig, plans: Sequence[Plan]) -> None:
  """Raises unless each plan cuts what the one before left, and the last leaves the student."""
  left = teacher
  for number, plan in enumerate(plans, 1):
    if _sizes(plan.config) != _sizes(left):
      raise ValueError(f"intermediate: plan {number} of {len(plans)} cuts a model of other sizes "
                       f"than {'the teacher' if number == 1 else 'the plan before it left'}")
    left = plan.small_config(left)
  if _sizes(left) != _sizes(cfg):
    raise ValueError(
      f"intermediate: {len(plans)} plans leave {left.pattern!r} with D={left.D} of the teacher; "
      f"the student is {cfg.pattern!r} with D={cfg.D} and sizes of its own"
    )


def _sizes(cfg: ModelConfig) -> tuple[Any, ...]:
  return cfg.D, cfg.blocks
