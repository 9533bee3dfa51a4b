"""The two readings of a plan: `cut` slices the parameters, `mask` writes zeros instead."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes, config
from hybridlm.config import Mamba, ModelConfig, block_name
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash


def keep_axis(w: Any, w_axes: str, keep: Any, keep_axes: str) -> jax.Array:
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
  if len(keep_axes) == 1:
    return jnp.take(w, keep, axis=axis)
  return jnp.take_along_axis(jnp.asarray(w), _spread(keep, keep_axes, w_axes), axis=axis)


def zero_axis(w: Any, w_axes: str, keep: Any, keep_axes: str) -> jax.Array:
  """Returns `w` of the same shape with zeros where `keep_axis` would drop entries."""
  w, keep = jnp.asarray(w), np.asarray(keep)
  size = w.shape[w_axes.index(keep_axes[-1])]
  stays = np.zeros((*keep.shape[:-1], size), bool)
  np.put_along_axis(stays, keep, True, axis=-1)
  return jnp.where(_spread(stays, keep_axes, w_axes), w, jnp.zeros((), w.dtype))


def _spread(array: np.ndarray, letters: str, w_axes: str) -> np.ndarray:
  """Returns an array laid out by `w_axes`, with size 1 for the letters it does not have."""
  order = sorted(range(len(letters)), key=lambda i: w_axes.index(letters[i]))
  sizes = {letters[i]: array.shape[i] for i in range(len(letters))}
  return array.transpose(order).reshape([sizes.get(letter, 1) for letter in w_axes])


def _each(leaves: Mapping[str, Any], keeps: Mapping[str, np.ndarray], change) -> dict[str, Any]:
  """Returns a folder with `change` applied to every leaf once for each index array it has."""
  done = {}
  for name, leaf in leaves.items():
    letters = axes.of(name)
    for keep_name, keep in keeps.items():
      if set(axes.of(keep_name)) <= set(letters):
        leaf = change(leaf, letters, keep, axes.of(keep_name))
    done[name] = leaf
  return done


def _check_source(cfg: ModelConfig, params: Mapping[str, Any], plan: Plan) -> None:
  if cfg.blocks != plan.config.blocks or (cfg.V, cfg.D) != (plan.config.V, plan.config.D):
    raise ValueError("plan: made for a model of other sizes than the one given")
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

  Raises:
    ValueError: the plan was made for another model, or `params` is not the config's tree.
  """
  _check_source(cfg, params, plan)
  whole = {
    key: _each(folder, plan.outside(), keep_axis)
    for key, folder in params.items()
    if key != "blocks"
  }
  whole["blocks"] = {
    block_name(new): _each(params["blocks"][block_name(old)], plan.inside(old), keep_axis)
    for new, old in enumerate(plan.blocks)
  }
  small = cfg.replace(D=plan.small_config().D, blocks=plan.small_config().blocks)
  return small, jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), whole)


def mask(
  cfg: ModelConfig, params: Mapping[str, Any], plan: Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `(masked, kept)`: parameters of the parent's shapes with zeros where the plan drops.

  `kept` holds the number of surviving entries each norm averages over, in float32: `count` for
  the residual norms, `blocks/07/count_G` for a gated norm. With it the masked model gives the
  logits of the cut one; a block that goes is all zeros and adds nothing.

  Raises:
    ValueError: the plan was made for another model, or `params` is not the config's tree.
  """
  _check_source(cfg, params, plan)
  masked = {
    key: _each(folder, plan.outside(), zero_axis)
    for key, folder in params.items()
    if key != "blocks"
  }
  masked["blocks"] = {}
  for index in range(len(cfg.blocks)):
    folder = _each(params["blocks"][block_name(index)], plan.inside(index), zero_axis)
    gone = index not in plan.blocks
    masked["blocks"][block_name(index)] = jax.tree.map(jnp.zeros_like, folder) if gone else folder
  small = plan.small_config()
  left = dict(zip(plan.blocks, small.blocks, strict=True))
  counts = {}
  for index, parent in enumerate(cfg.blocks):
    if isinstance(parent, Mamba):
      # A block that goes is listed too: the tree, and so the compiled program, is every plan's.
      block = left.get(index, parent)
      counts[block_name(index)] = {"count_G": jnp.full(block.G, block.H * block.P, jnp.float32)}
  return masked, {"count": jnp.float32(small.D), "blocks": counts}
