"""The two readings of a plan: `cut` slices the parameters, `mask` writes zeros instead."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes, config
from hybridlm.config import (
  Attention,
  Block,
  GatedConv,
  Mamba,
  Mamba1,
  Mlp,
  ModelConfig,
  Parallel,
  attention_of,
  block_name,
  ssm_of,
)
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

# The masks a block of each kind has, one for each index array that a plan may hold of it; a
# parallel block has those of its branches.
STAYS: Mapping[type, tuple[str, ...]] = {
  Mamba: ("stay_GH", "stay_G", "stay_P", "stay_GN"),
  Mamba1: ("stay_GH", "stay_G", "stay_GN", "stay_R"),
  GatedConv: ("stay_GH", "stay_G", "stay_P"),
  Attention: ("stay_KJ", "stay_K", "stay_E"),
  Mlp: ("stay_F",),
}
QUERIES = ("w_q_DKJE", "b_q_KJE")


def keep_axis(w: Any, w_axes: str, keep: Any, keep_axes: str) -> Any:
  """Returns `w` with only the entries `keep` of axis `keep_axes[-1]`.

  The entries may vary along the other letters of `keep_axes`: `keep_GH` is one choice of H for
  each G.

  Args:
    w: array whose axes are `w_axes`.
    w_axes: letters of `w`, all of `keep_axes` among them.
    keep: whole numbers, shape by `keep_axes` with the last size that of the result.
    keep_axes: letters of `keep`.
  """
  axis, keep = w_axes.index(keep_axes[-1]), np.asarray(keep)
  where = np if isinstance(w, np.ndarray) else jnp  # what is in the host's memory stays there
  if len(keep_axes) == 1:
    return where.take(w, keep, axis=axis)
  return where.take_along_axis(w, _spread(keep, keep_axes, w_axes), axis=axis)


def _spread(array: Any, letters: str, w_axes: str) -> Any:
  """Returns an array laid out by `w_axes`, with size 1 for the letters it does not have."""
  order = sorted(range(len(letters)), key=lambda i: w_axes.index(letters[i]))
  sizes = {letters[i]: array.shape[i] for i in range(len(letters))}
  return array.transpose(order).reshape([sizes.get(letter, 1) for letter in w_axes])


def of_leaf(name: str, arrays: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """Returns `(letters, array)` of the index arrays or masks that concern a leaf.

  Choices inside a group stand before the choice of groups: `keep_GH` has a row for every G.
  """
  letters = set(axes.of(name))
  found = [(axes.of(each), array) for each, array in arrays.items()]
  return sorted((item for item in found if set(item[0]) <= letters), key=lambda item: -len(item[0]))


def query_scale(name: str, parent: Block, small: Block) -> np.float32:
  """Returns what a leaf of an attention block is multiplied by where its heads are narrowed.

  sqrt(E' / E) for the projection of the queries, whose products are divided by the sqrt(E') of
  the narrower head and not by sqrt(E); 1 for everything else.
  """
  wide, left = attention_of(parent), attention_of(small)
  narrow = name in QUERIES and wide is not None and left is not None
  return np.float32(math.sqrt(left.E / wide.E) if narrow else 1)


def _keep(
  folder: Mapping[str, Any], names: Iterable[str], keeps: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the leaves of these names with the kept entries alone."""
  done = {}
  for name in names:
    done[name] = folder[name]
    for letters, keep in of_leaf(name, keeps):
      done[name] = keep_axis(done[name], axes.of(name), keep, letters)
  return done


def _keep_block(cfg: ModelConfig, small: ModelConfig, folder, plan: Plan, new: int):
  """Returns the leaves of block `new` of the cut model."""
  old = plan.blocks[new]
  names = config.leaf_names(small)["blocks"][block_name(new)]
  done = _keep(folder, names, plan.inside(old))
  for name in QUERIES:
    scale = query_scale(name, cfg.blocks[old], small.blocks[new])
    if name in done and scale != 1:
      done[name] = _scaled(done[name], scale)
  return done


def as_rounded(
  cfg: ModelConfig, params: Mapping[str, Any], plan: Plan
) -> dict[str, Any]:
  """Returns the parent's parameters with queries as if scaled, rounded as `cut` does, and back.

  In parameters of few bits the scaled queries are others by their rounding, and no error of a cut.
  """
  small, blocks = plan.small_config(cfg), dict(params["blocks"])
  for new, old in enumerate(plan.blocks):
    folder = dict(blocks[block_name(old)])
    for name in QUERIES:
      scale = query_scale(name, cfg.blocks[old], small.blocks[new])
      if name in folder and scale != 1:
        folder[name] = _scaled(folder[name], scale).astype(jnp.float32) / scale
    blocks[block_name(old)] = folder
  return {**params, "blocks": blocks}


def _scaled(leaf: Any, scale: np.float32) -> Any:
  return (leaf.astype(jnp.float32) * scale).astype(leaf.dtype)


def check_sizes(cfg: ModelConfig, plan: Plan) -> None:
  """Raises ValueError unless a plan was made for a model of these sizes."""
  mine, theirs = ((each.blocks, each.V, each.D, each.meta) for each in (cfg, plan.config))
  if mine != theirs:
    raise ValueError("plan: made for a model of other sizes than the one given")


def _check_source(cfg: ModelConfig, params: Mapping[str, Any], plan: Plan) -> None:
  check_sizes(cfg, plan)
  config.check(cfg, params)
  found = tree_hash(params)
  if found != plan.source:
    raise ValueError(
      f"plan: made for parameters {plan.source[:12]}, the ones given are {found[:12]}"
    )


def cut(
  cfg: ModelConfig, params: Mapping[str, Any], plan: Plan
) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the smaller config and its parameters, in buffers of their own.

  Beside slicing, queries of narrower heads are scaled (`query_scale`).

  Raises:
    ValueError: the plan was made for another model, or `params` is not the config's tree.
  """
  _check_source(cfg, params, plan)
  small = plan.small_config(cfg)
  names = config.leaf_names(small)
  whole = {
    key: _keep(folder, names[key], plan.outside())
    for key, folder in params.items() if key != "blocks"
  }
  whole["blocks"] = {
    block_name(new): _keep_block(cfg, small, params["blocks"][block_name(old)], plan, new)
    for new, old in enumerate(plan.blocks)
  }
  return small, jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), whole)


def names(block: Block) -> tuple[str, ...]:
  """Returns the masks that a block has, one for each axis that can be cut or follows from a cut."""
  if isinstance(block, Parallel):
    parts = [name for part in (block.attention, block.ssm) if part for name in names(part)]
    return (*parts, *(("stay_Y",) if block.fusion.kind == "mean" else ()))
  wide = isinstance(block, Attention) and block.U is not None
  return (*STAYS[type(block)], *(("stay_U",) if wide else ()))


def stays(plan: Plan) -> dict[str, Any]:
  """Returns the plan as 0/1 float32 arrays, whose structure and shapes the config alone decides.

  `stay_D`, `stay_V`, `stay_M` of a model with meta tokens, and under "blocks" for each block `stay`
  (1: the block stays) and the masks of its `names`. Trees of different plans of one config can be
  stacked.
  """
  cfg = plan.config
  blocks = {}
  for index, block in enumerate(cfg.blocks):
    keeps, sizes = plan.inside(index), cfg.sizes(index)
    masks = {name: _ones_at(name, sizes, keeps) for name in names(block)}
    blocks[block_name(index)] = {"stay": np.float32(index in plan.blocks), **masks}
  sizes, outer = {"D": cfg.D, "V": cfg.V, "M": cfg.meta}, plan.outside()
  return {name: _ones_at(name, sizes, outer) for name in _outer(cfg)} | {"blocks": blocks}


def _outer(cfg: ModelConfig) -> tuple[str, ...]:
  """Returns the masks of leaves outside the blocks."""
  return ("stay_D", "stay_V", *(("stay_M",) if cfg.meta else ()))


def _ones_at(name: str, sizes: Mapping[str, int], keeps: Mapping[str, np.ndarray]) -> np.ndarray:
  keep = keeps.get(f"keep_{axes.of(name)}")
  mask = np.full(axes.shape(name, sizes), keep is None, np.float32)
  if keep is not None:
    np.put_along_axis(mask, keep, 1, axis=-1)
  return mask


def zero_folder(folder: Mapping[str, Any], stays: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns a folder of leaves with zeros where a mask that concerns the leaf is 0.

  `stays` holds masks by name; "stay" is a scalar that concerns every leaf. The bias of what heads
  give goes where all of them do.
  """
  inner = {name: mask for name, mask in stays.items() if name != "stay"}
  done = {}
  for name, leaf in folder.items():
    stay = jnp.asarray(stays.get("stay", 1)) > 0
    for letters, mask in of_leaf(name, inner):
      stay = stay & (_spread(jnp.asarray(mask), letters, axes.of(name)) > 0)
    if name == "b_o_D" and "stay_K" in inner:
      stay = stay & (jnp.max(jnp.asarray(inner["stay_K"])) > 0)
    done[name] = jnp.where(stay, leaf, jnp.zeros((), jnp.asarray(leaf).dtype))
  return done


def counts(block: Block, stays: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns what norms inside a block average over; nothing of a block without such a norm.

  `count_G`: of each group's gated norm. `count_N` and `count_R`: of the norms on B, C and the rank
  of a Mamba-1 mixer. `count_attention` and `count_ssm`: of the norms of branches that meet in a
  mean, with `stay_KJ`, 1 for heads that stay: those that go must not enter their norm. At least
  1, so that what goes has no 0 / 0.
  """
  found, mixer = {}, ssm_of(block)
  if mixer is not None:
    heads_G = jnp.sum(stays["stay_GH"], axis=1)
    channels = jnp.sum(stays["stay_P"]) if "stay_P" in stays else 1.0
    if getattr(mixer, "gate", "none") != "none":
      found["count_G"] = heads_G * channels
    if isinstance(mixer, Mamba1):
      found |= {"count_N": jnp.sum(stays["stay_GN"]), "count_R": jnp.sum(stays["stay_R"])}
  if isinstance(block, Parallel) and block.fusion.kind == "mean":
    if mixer is not None:
      found["count_ssm"] = jnp.sum(heads_G * stays["stay_G"]) * channels
    if block.attention is not None:
      stay_KJ = stays["stay_KJ"] * stays["stay_K"][:, None]
      wide = jnp.sum(stays[f"stay_{block.attention.value}"])
      found |= {"count_attention": jnp.sum(stay_KJ) * wide}
  found = {name: jnp.maximum(count, 1.0) for name, count in found.items()}
  return found | ({"stay_KJ": stay_KJ} if "count_attention" in found else {})


def mask_by(
  cfg: ModelConfig, params: Mapping[str, Any], stays: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `(masked, kept)` for masks as `stays` gives them; pure, and traceable in all of them.

  One compiled program serves every plan of a config, and `jax.vmap` over `stays` several at once.
  See `mask` for what comes back.
  """
  masked, inner = {}, {}
  for key, folder in params.items():
    if key != "blocks":
      masked[key] = zero_folder(folder, {name: stays[name] for name in _outer(cfg)})
  masked["blocks"] = {}
  for index, block in enumerate(cfg.blocks):
    name = block_name(index)
    own = {**stays["blocks"][name], "stay_D": stays["stay_D"]}
    masked["blocks"][name] = zero_folder(params["blocks"][name], own)
    count = counts(block, own)
    inner |= {name: count} if count else {}
  kept = {
    "count": jnp.sum(stays["stay_D"]),
    "stay_V": jnp.asarray(stays["stay_V"]) > 0,
    "blocks": inner,
  }
  return masked, kept | ({"stay_M": jnp.asarray(stays["stay_M"]) > 0} if cfg.meta else {})


def mask(
  cfg: ModelConfig, params: Mapping[str, Any], plan: Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `(masked, kept)`: parameters of the parent's shapes with zeros where the plan drops.

  `kept` holds the number of surviving entries each norm averages over, in float32 (`count` for
  the residual norms, `blocks/07/count_G` and its like for norms inside a block: see `counts`), the
  tokens that stay, `stay_V`: logits of the others are minus infinity, and the meta tokens that
  stay, `stay_M`, of a model that has any. With it the masked model gives the logits of the cut
  one; a block that goes is all zeros and adds nothing, and a state of zeros is none.

  Raises:
    ValueError: the plan was made for another model, or `params` is not the config's tree.
  """
  _check_source(cfg, params, plan)
  return _mask_by(cfg, params, stays(plan))


_mask_by = jax.jit(mask_by, static_argnums=0)
