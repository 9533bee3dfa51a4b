"""Studies of one teacher before any distillation: how heads are chosen, and how many can go.

Every candidate is the masked teacher, so a study of dozens of them compiles one program.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hybridlm
from hybridlm import api, axes
from hybridlm.config import Mamba, ModelConfig, block_name
from hybridlm.distill import loss
from hybridlm.prune import select
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

Batches = Sequence[Mapping[str, Any]]
# Where the heads of a layer are scored (arXiv 2504.11409, Table 2).
PROJECTIONS = {"W_x": "activation", "W_z": "activation_z", "W_O": "activation_out"}


@functools.partial(jax.jit, static_argnames="cfg")
def _masked_sums(cfg: ModelConfig, params, kept, batch) -> dict[str, jax.Array]:
  arrays = (batch["token_BL"], batch["segment_BL"], kept)
  hidden_BLD, head_DV = api.apply(cfg, params, *arrays, output="hidden")[0]
  weights = (batch["target_BL"], batch["weight_BL"])
  real = cfg.real_vocabulary
  return loss.sums(hidden_BLD, head_DV, *weights, kl=0.0, ce=1.0, vocabulary=real)


def masked_loss(cfg: ModelConfig, params, plan: Plan, batches: Batches) -> float:
  """Returns the cross-entropy, in nats a token, of what a plan leaves of a model."""
  masked, kept = hybridlm.mask(cfg, params, plan)
  found = [_masked_sums(cfg, masked, kept, jax.tree.map(jnp.asarray, dict(b))) for b in batches]
  return float(sum(s["ce"] for s in found) / sum(s["weight"] for s in found))


def whole_plan(cfg: ModelConfig, params) -> Plan:
  """Returns the plan that keeps everything."""
  return Plan(cfg, tree_hash(params), {})


def regroup(cfg: ModelConfig, params, order: Mapping[int, np.ndarray]) -> dict[str, Any]:
  """Returns the parameters with the heads of some blocks in another order, groups ignored.

  `order[index]` numbers all heads of a block, G * H of them, in their new order. A head that
  lands in another group meets another group's B and C: that is the point of the comparison.
  """
  blocks = dict(params["blocks"])
  for index, order_H in order.items():
    folder = {}
    for name, leaf in blocks[block_name(index)].items():
      letters = axes.of(name)
      if "H" in letters:
        at = letters.index("H")
        flat = leaf.reshape(*leaf.shape[: at - 1], -1, *leaf.shape[at + 1 :])
        leaf = jnp.take(flat, order_H, axis=at - 1).reshape(leaf.shape)
      folder[name] = leaf
    blocks[block_name(index)] = folder
  return {**params, "blocks": blocks}


def packed(cfg: ModelConfig, params, scores, heads: int) -> tuple[dict[str, Any], Plan]:
  """Returns parameters and plan of the naive cut: the best heads of each layer, packed in order.

  Groups are ignored when heads are ranked; the survivors fill the groups from the left.
  """
  order, keep = {}, {}
  for index, block in enumerate(cfg.blocks):
    if isinstance(block, Mamba):
      score_H = np.linalg.norm(scores.get(f"{block_name(index)}/score_GHP"), axis=-1).ravel()
      best = select.top(score_H, block.G * heads).reshape(block.G, heads)
      rest = np.setdiff1d(np.arange(block.G * block.H), best).reshape(block.G, -1)
      order[index] = np.concatenate([best, rest], axis=1).ravel()
      keep[block_name(index)] = {"keep_GH": np.tile(np.arange(heads), (block.G, 1))}
  moved = regroup(cfg, params, order)
  return moved, Plan(cfg, tree_hash(moved), keep)


def _rows(cfg: ModelConfig, params, choice: str, scores, batches: Batches, heads):
  """Returns one row a size: the losses of the cuts that each seed's scores choose."""
  plans = {kept: [hybridlm.plan(cfg, each, {"H": kept}) for each in scores] for kept in heads}
  return [
    {
      "heads": kept,
      "choice": choice,
      "loss": [masked_loss(cfg, params, plan, batches) for plan in plans[kept]],
    }
    for kept in heads
  ]


def compare_choices(
  cfg: ModelConfig, params, calibration: Sequence[Batches], batches: Batches, heads: Sequence[int]
) -> list[dict[str, Any]]:
  """Returns one row a way of choosing heads and size: zero-shot losses over calibration seeds.

  The ways: group-aware activation scores, the same scores over the whole layer packed in order,
  random within the group, and weight magnitude within the group (which reads no data, so that
  its seeds agree).
  """
  score = functools.partial(hybridlm.calibrate, cfg, params, axes="H")
  seeds = range(len(calibration))
  ours = [score(sample) for sample in calibration]
  chance = [score([], estimator="random", seed=seed) for seed in seeds]
  weights = [score([], estimator="magnitude") for _ in seeds]
  rows = _rows(cfg, params, "group-aware", ours, batches, heads)
  for kept in heads:
    naive = [packed(cfg, params, each, kept) for each in ours]
    losses = [masked_loss(cfg, moved, plan, batches) for moved, plan in naive]
    rows.append({"heads": kept, "choice": "top-k of the layer, packed in order", "loss": losses})
  rows += _rows(cfg, params, "random within group", chance, batches, heads)
  return rows + _rows(cfg, params, "magnitude within group", weights, batches, heads)


def compare_projections(
  cfg: ModelConfig, params, calibration: Sequence[Batches], batches: Batches, heads: Sequence[int]
) -> list[dict[str, Any]]:
  """Returns one row a projection that heads are scored on and size: zero-shot losses by seed."""
  rows = []
  for name, estimator in PROJECTIONS.items():
    score = functools.partial(hybridlm.calibrate, cfg, params, estimator=estimator, axes="H")
    rows += _rows(cfg, params, name, [score(sample) for sample in calibration], batches, heads)
  return rows


def spread(losses: Sequence[float]) -> tuple[float, float]:
  """Returns mean and sample standard deviation (0 for one value)."""
  mean = math.fsum(losses) / len(losses)
  square = math.fsum((x - mean) ** 2 for x in losses)
  return mean, math.sqrt(square / max(len(losses) - 1, 1))
