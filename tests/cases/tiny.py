"""A language model of one MLP in plain jnp, under the house's leaf names: it trains in no time."""

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.distill import loss

V, D, F = 31, 16, 24
BATCH, LENGTH = 4, 37


def init(seed=0, *, width=D, rows=V, dtype=jnp.float32):
  """Returns random parameters, gains and biases included."""
  keys = iter(jax.random.split(jax.random.key(seed), 6))

  def normal(*shape, scale=1.0):
    return scale * jax.random.normal(next(keys), shape, dtype)

  return {
    "embed": {"w_embed_VD": normal(rows, width)},
    "blocks": {
      "00": {
        "norm_gain_D": 1 + normal(width, scale=0.3),
        "w_up_DF": normal(width, F, scale=width**-0.5),
        "w_down_FD": normal(F, width, scale=F**-0.5),
        "b_down_D": normal(width, scale=0.1),
      }
    },
    "head": {"w_head_DV": normal(width, rows, scale=2 * width**-0.5)},
  }


def hidden(params, batch):
  """Returns final hidden states [B, L, D] and the head [D, V]."""
  x_BLD = params["embed"]["w_embed_VD"][batch["token_BL"]]
  block = params["blocks"]["00"]
  up_BLF = jax.nn.relu((x_BLD * block["norm_gain_D"]) @ block["w_up_DF"])
  return x_BLD + up_BLF @ block["w_down_FD"] + block["b_down_D"], params["head"]["w_head_DV"]


def distillation(params, frozen, batch):
  """Returns the sums of a KL towards `frozen` mixed with cross-entropy."""
  student_BLD, head_DV = hidden(params, batch)
  teacher_BLD, teacher_head_DV = hidden(frozen, batch)
  return loss.sums(
    student_BLD, head_DV, batch["target_BL"], batch["weight_BL"], ce=0.1, chunk=8,
    teacher_BLD=teacher_BLD, teacher_head_DV=teacher_head_DV,
  )


def batch(number, *, rows=BATCH, seed=0):
  """Returns batch `number`: random tokens and targets, about a tenth of them padding."""
  rng = np.random.default_rng([seed, number])
  shape = (rows, LENGTH)
  return {
    "token_BL": rng.integers(0, V, shape).astype(np.int32),
    "target_BL": rng.integers(0, V, shape).astype(np.int32),
    "weight_BL": (rng.random(shape) > 0.1).astype(np.float32),
  }


class Data:
  """Batches 0, 1, 2, .. with a position; those in `poisoned` are changed by its function."""

  def __init__(self, poisoned=None, end=None):
    self._next, self._poisoned, self._end = 0, poisoned or {}, end

  def __next__(self):
    number = self._next
    if number == self._end:
      raise StopIteration
    self._next += 1
    return self._poisoned.get(number, lambda value: value)(batch(number))

  def get_state(self):
    """Returns the position, for JSON."""
    return {"next": self._next}

  def set_state(self, position):
    """Moves to a position that `get_state` gave."""
    self._next = position["next"]


def same(left, right):
  """Returns whether two trees hold the same bits."""
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return jax.tree.structure(left) == jax.tree.structure(right) and all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
  )
