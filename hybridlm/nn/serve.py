"""Decoding: a prompt at once by the chunked scan, then one token a call from constant-size states.

Pure functions over the canonical tree, or over what `fuse` has made of it. FP8 is for training:
here every projection is in the compute dtype. Meta tokens run when weights are fused, once for all
rows: what they leave behind lies beside the weights.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.config import (
  Attention,
  GatedConv,
  Mamba,
  Mamba1,
  Mlp,
  ModelConfig,
  Parallel,
  block_name,
)
from hybridlm.nn import attention, gated_conv, held, lm, mamba, mamba1, mlp, norm, parallel
from hybridlm.nn.cache import Cache

JOIN = {
  Mamba: mamba.join, Mamba1: mamba1.join, GatedConv: gated_conv.join, Attention: attention.join,
  Mlp: mlp.join,
}
# Blocks that read keys and values, and say which they have read: the one after may share them.
PREFILL = {Attention: attention.prefill, Parallel: parallel.prefill}
STEP = {Attention: attention.step, Parallel: parallel.step}
NORMS = ("norm_gain_D", "norm_bias_D")


def fuse(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the weights as decoding reads them fastest: projections joined, in the compute dtype.

  What meta tokens leave behind is among them. What is fused already comes back as it is. Worth its
  copy where many tokens follow.
  """
  if "weights" in params:
    return dict(params)
  blocks = []
  for index, block in enumerate(cfg.blocks):
    leaves = held.full(params["blocks"][block_name(index)], cfg.dtype)
    norms = {name: leaves[name] for name in NORMS if name in leaves}
    join = JOIN.get(type(block), functools.partial(parallel.join, block))
    blocks.append(norms | join(leaves, cfg.dtype))
  embed_VD = params["embed"]["w_embed_VD"].astype(cfg.dtype)
  head_DV = embed_VD.T if cfg.tied else params["head"]["w_head_DV"].astype(cfg.dtype)
  fused = {"weights": blocks, "embed_VD": embed_VD, "head_DV": head_DV, "final": params["final"]}
  return fused | ({"prefixes": lm.prefixes(cfg, params)} if cfg.meta else {})


def _blocks(cfg, weights):
  """Yields every block with its weights and with what its text continues from, if anything."""
  prefixes = weights.get("prefixes", {})
  for index, block in enumerate(cfg.blocks):
    yield block, weights["weights"][index], prefixes.get(block_name(index))


def prefill(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  token_BL: Int[Array, "B L"],
  length_B: Int[Array, "B"],
  *,
  size: int,
) -> tuple[Float[Array, "B V"], Cache]:
  """Returns float32 logits after each row's last real token, and the state there.

  Args:
    cfg: the model.
    params: its canonical tree, or what `fuse` returned.
    token_BL: prompts on the left, any ids below V on the right.
    length_B: real tokens of each row, from 1 to L.
    size: tokens a row can have in all, prompt included; bounds what attention remembers.
  """
  cfg, weights = cfg.replace(quantize="none"), fuse(cfg, params)
  x_BLD = weights["embed_VD"][token_BL]
  states, keys = [], None
  for block, leaves, prefix in _blocks(cfg, weights):
    norm_BLD = _normed(cfg, leaves, x_BLD)
    if isinstance(block, Mlp):
      y_BLD, state = mlp.serve(block, leaves, norm_BLD), None
    elif type(block) in PREFILL:
      y_BLD, state, keys = PREFILL[type(block)](
        cfg, block, leaves, norm_BLD, length_B, size=size, prefix=prefix, keys=keys)
    else:
      run = parallel.MIXERS[type(block)].prefill_heads
      heads_BLGHP, state = run(cfg, block, leaves, norm_BLD, length_B, prefix=prefix)
      y_BLD = mamba.write(cfg, leaves, heads_BLGHP)
    x_BLD = x_BLD + y_BLD
    states.append(state)
  last_BLD = jnp.take_along_axis(x_BLD, (length_B - 1)[:, None, None], axis=1)
  return _logits(cfg, weights, last_BLD), Cache(tuple(states), length_B.astype(jnp.int32))


def step(
  cfg: ModelConfig, params: Mapping[str, Any], cache: Cache, token_B: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Cache]:
  """Returns float32 logits after one more token a row, and the state there.

  `params` are those of `prefill`. A row that goes on beyond the cache's size forgets its oldest
  positions, in attention without a window too: the caller keeps within `size`.
  """
  cfg, weights = cfg.replace(quantize="none"), fuse(cfg, params)
  x_BLD = weights["embed_VD"][token_B][:, None]
  states, slots = [], None
  for state, (block, leaves, prefix) in zip(cache.blocks, _blocks(cfg, weights), strict=True):
    norm_BLD = _normed(cfg, leaves, x_BLD)
    if isinstance(block, Mlp):
      y_BLD = mlp.serve(block, leaves, norm_BLD)
    elif type(block) in STEP:
      y_BLD, state, slots = STEP[type(block)](
        cfg, block, leaves, norm_BLD, state, cache.length_B, prefix=prefix, slots=slots)
    else:
      run = parallel.MIXERS[type(block)].step_heads
      heads_BLGHP, state = run(cfg, block, leaves, norm_BLD, state)
      y_BLD = mamba.write(cfg, leaves, heads_BLGHP)
    x_BLD = x_BLD + y_BLD
    states.append(state)
  return _logits(cfg, weights, x_BLD), Cache(tuple(states), cache.length_B + 1)


def _normed(cfg, leaves, x_BLD):
  """Returns the normed residual stream; a block's other leaves may lie in folders of branches."""
  own = {name: leaves[name] for name in NORMS if name in leaves}
  return norm.residual(cfg, own, x_BLD, None)


def _logits(cfg, weights, x_BLD):
  """Returns the logits of rows with one position."""
  hidden_BLD = norm.residual(cfg, weights["final"], x_BLD, None)
  return lm.logits(cfg, hidden_BLD, weights["head_DV"])[:, 0]
