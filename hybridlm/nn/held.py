"""Weights that are held in fewer bits, as a teacher's may be, and restored a block at a time."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from hybridlm import axes, config
from hybridlm.config import ModelConfig
from hybridlm.ops.quantize import Scaled, restored, scaled

DTYPES = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def hold(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the canonical tree of a config from float parameters, its weights as `cfg.held` says.

  "int8" and "fp8" (E4M3) are for the projections of blocks, with a float32 scale for every output
  channel in a leaf beside them; embedding and head are bfloat16 then. Gains, biases, taps and the
  recurrence stay as they are. "float32" changes nothing. What is in the host's memory stays there.

  Raises:
    ValueError: the parameters are not the canonical tree of the same config in floats.
  """
  config.check(cfg.replace(held="float32"), params)
  if cfg.held == "float32":
    return dict(params)
  wide = {folder: _cast(leaves) for folder, leaves in params.items() if folder != "blocks"}
  small = _cast if cfg.held == "bfloat16" else lambda leaves: _scaled(leaves, DTYPES[cfg.held])
  return wide | {"blocks": {name: small(leaves) for name, leaves in params["blocks"].items()}}


def restore(
  leaves: Mapping[str, jax.Array], x_BLD: Float[Array, "B L D"]
) -> tuple[Mapping[str, jax.Array], Float[Array, "B L D"]]:
  """Returns a block's leaves with weights in the dtype of its input, and that input.

  Held weights wait for the input, so that only one block's are there in full at a time. Leaves
  without scales come back as they are.
  """
  if not any(name.startswith("scale_") for name in leaves):
    return leaves, x_BLD
  leaves, x_BLD = jax.lax.optimization_barrier((dict(leaves), x_BLD))
  return full(leaves, x_BLD.dtype), x_BLD


def full(leaves: Mapping[str, jax.Array], dtype: DTypeLike) -> dict[str, jax.Array]:
  """Returns leaves with the weights that have scales in a float dtype, and no scales."""
  made = {}
  for name, leaf in leaves.items():
    if name.startswith("w_") and config.scale_name(name) in leaves:
      small = Scaled(leaf, leaves[config.scale_name(name)])
      leaf = restored(small, dtype, over=_inputs(name))
    if not name.startswith("scale_"):
      made[name] = leaf
  return made


def _cast(leaves):
  return {
    name: leaf.astype(jnp.bfloat16) if name.startswith("w_") else leaf
    for name, leaf in leaves.items()
  }


def _scaled(leaves, dtype):
  made = dict(leaves)
  for name, leaf in leaves.items():
    if name.startswith("w_"):
      small = scaled(jnp.asarray(leaf), dtype, over=_inputs(name))
      small = jax.device_get(small) if isinstance(leaf, np.ndarray) else small
      made[name], made[config.scale_name(name)] = small
  return made


def _inputs(name: str) -> tuple[int, ...]:
  """Returns the axes that a projection sums over: those its scales have not."""
  outputs = axes.of(config.scale_name(name))
  return tuple(i for i, letter in enumerate(axes.of(name)) if letter not in outputs)
