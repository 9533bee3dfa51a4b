"""Attention and SSM heads side by side (Hymba, arXiv 2411.13676; Falcon-H1, arXiv 2507.22448)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import GatedConv, Mamba, Mamba1, ModelConfig, Parallel
from hybridlm.nn import attention, flow, gated_conv, mamba, mamba1
from hybridlm.nn.cache import ParallelState, Slots
from hybridlm.ops import norm
from hybridlm.ops.project import project

MIXERS = {Mamba: mamba, Mamba1: mamba1, GatedConv: gated_conv}
INNER = {kind: mixer.inner for kind, mixer in MIXERS.items()}
MIX = {kind: mixer.mix for kind, mixer in MIXERS.items()}
GAINS = ("attention_gain_", "ssm_gain_")
Inputs = Mapping[str, jax.Array]


def mix(
  cfg: ModelConfig,
  block: Parallel,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> tuple[Float[Array, "B L D"], dict[str, Any]]:
  """Returns what both branches make of one normed input, and what can be tapped in them.

  In a mean the taps `head_BLKJU` (or E) and `y_BLGHP` are as they enter it: normed, times their
  gain. `count` holds those of the branches and, of a mean, the channels that each norm averages
  over, `count_attention` and `count_ssm`, and `stay_KJ`: heads that are masked are no zeros, for a
  query of zeros sees the mean of all values.
  """
  fused = block.fusion.kind == "mean"
  heads = attention.inner if fused else attention.mix
  mixers = INNER if fused else MIX
  parts = {"attention": (block.attention, heads), "ssm": (block.ssm, mixers.get(type(block.ssm)))}
  made, seen, prefixes = {}, {}, {}
  for branch, (part, run) in parts.items():
    if part is None:
      continue
    own = {name: leaves[name] for name in part.leaves if name in leaves}
    prefix = None if place.prefix is None else getattr(place.prefix, branch)
    found = run(cfg, part, own, x_BLD, segment_BL=segment_BL, count=count,
                place=place._replace(prefix=prefix))
    made[branch], taps = (None, found) if fused else found
    prefixes[branch], seen = taps.pop("prefix", None), seen | taps
  y_BLD, normed = _mean(cfg, block, leaves, seen, count or {}) if fused else (_sum(made), {})
  if place.keep:
    seen["prefix"] = flow.ParallelPrefix(prefixes.get("attention"), prefixes.get("ssm"))
  return y_BLD, seen | normed


def _sum(made: Inputs) -> jax.Array:
  """Returns the sum of the branches' own outputs."""
  return functools.reduce(jnp.add, made.values())


def _mean(cfg, block, leaves, seen, count):
  """Returns the projection of the mean of normed branches, and their channels as they enter it."""
  names = {"attention": "" if block.attention is None else f"head_BLKJ{block.attention.value}",
           "ssm": "y_BLGHP"}
  normed = {}
  for branch, name in names.items():
    if getattr(block, branch) is not None:
      stay = count.get("stay_KJ") if branch == "attention" else None
      gain = leaves[f"{branch}_gain_{name.removeprefix('head_BL').removeprefix('y_BL')}"]
      heads = seen[name] if stay is None else seen[name] * stay[..., None].astype(seen[name].dtype)
      normed[name] = _normed(cfg, heads, gain, count.get(f"count_{branch}"))
  dtype = next(iter(normed.values())).dtype
  w_out_YD = layout.used(cfg.layout, {"w_out_YD": leaves["w_out_YD"]}, dtype)["w_out_YD"]
  return fuse(cfg, block, w_out_YD, **{
    branch: normed.get(name) for branch, name in names.items()}), normed


def _normed(cfg, heads, gain, count):
  """Returns RMSNorm over the channels of all heads of a branch, times their gain."""
  flat = heads.reshape(*heads.shape[:2], -1)
  return norm.rms_norm(flat, gain.reshape(-1), eps=cfg.eps, count=count).reshape(heads.shape)


def fuse(
  cfg: ModelConfig,
  block: Parallel,
  w_out_YD: Float[Array, "Y D"],
  *,
  attention: Float[Array, "B L K J width"] | None,
  ssm: Float[Array, "B L G H P"] | None,
) -> Float[Array, "B L D"]:
  """Returns the projection of the mean of two normed branches; one that is off counts as zeros."""
  found = []
  for branch, heads in (("attention", attention), ("ssm", ssm)):
    if heads is not None:
      flat = heads.reshape(*heads.shape[:2], -1)
      places = block.fusion.places(branch)
      found.append(flat if len(places) == block.fusion.Y else _placed(places, block.fusion.Y, flat))
  mean_BLY = functools.reduce(jnp.add, found) * 0.5
  return project(mean_BLY, w_out_YD.astype(mean_BLY.dtype), quantize=cfg.quantize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _placed(places, Y, flat):
  """Returns Y channels with those of a branch in their places, and zeros elsewhere.

  Both ways are reads: XLA on CPU is slow in writing to scattered places.
  """
  held = np.isin(np.arange(Y), places)
  source = np.where(held, np.cumsum(held) - 1, 0)
  return jnp.where(held, jnp.take(flat, source, axis=2), 0)


def _placed_forward(places, Y, flat):
  return _placed(places, Y, flat), None


def _placed_backward(places, Y, _, bar_BLY):
  """Returns the cotangents of the branch's channels."""
  return (jnp.take(bar_BLY, np.asarray(places), axis=2),)


_placed.defvjp(_placed_forward, _placed_backward)


def join(block: Parallel, leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, Any]:
  """Returns the leaves as `prefill` and `step` read them: each branch's, and those of the mean."""
  made: dict[str, Any] = {name: leaf for name, leaf in leaves.items() if name.startswith(GAINS)}
  if block.attention is not None:
    made["attention"] = attention.join(leaves, dtype)
  if block.ssm is not None:
    made["ssm"] = MIXERS[type(block.ssm)].join(leaves, dtype)
  if block.fusion.kind == "mean":
    made["w_out_YD"] = leaves["w_out_YD"].astype(dtype)
  return made


def prefill(
  cfg: ModelConfig,
  block: Parallel,
  leaves: Mapping[str, Any],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  size: int,
  prefix: flow.ParallelPrefix | None = None,
  keys: flow.Keys | None = None,
) -> tuple[Float[Array, "B L D"], ParallelState, flow.Keys | None]:
  """Returns the output, the branches' states after each row's tokens, and the keys that were read.

  `leaves` are `join`ed; the rest is as of `attention.prefill` and `mamba.prefill_heads`.
  """
  prefix = flow.ParallelPrefix(None, None) if prefix is None else prefix
  heads = channels = held = state = None
  if block.attention is not None:
    heads, held, keys = attention.prefill_heads(
      cfg, block.attention, leaves["attention"], x_BLD, length_B, size=size,
      prefix=prefix.attention, keys=keys,
    )
  if block.ssm is not None:
    run = MIXERS[type(block.ssm)].prefill_heads
    channels, state = run(cfg, block.ssm, leaves["ssm"], x_BLD, length_B, prefix=prefix.ssm)
  return _met(cfg, block, leaves, heads, channels), ParallelState(held, state), keys


def step(
  cfg: ModelConfig,
  block: Parallel,
  leaves: Mapping[str, Any],
  x_BLD: Float[Array, "B 1 D"],
  state: ParallelState,
  position_B: Int[Array, "B"],
  *,
  prefix: flow.ParallelPrefix | None = None,
  slots: Slots | None = None,
) -> tuple[Float[Array, "B 1 D"], ParallelState, Slots | None]:
  """Returns the output for one more token a row, the states after it, and the slots that were read.

  `leaves` are `join`ed; the rest is as of `attention.step`.
  """
  heads = channels = None
  held, own = state
  if block.attention is not None:
    heads, held, slots = attention.step_heads(
      cfg, block.attention, leaves["attention"], x_BLD, held, position_B,
      prefix=None if prefix is None else prefix.attention, slots=slots,
    )
  if block.ssm is not None:
    channels, own = MIXERS[type(block.ssm)].step_heads(cfg, block.ssm, leaves["ssm"], x_BLD, own)
  return _met(cfg, block, leaves, heads, channels), ParallelState(held, own), slots


def _met(cfg, block, leaves, heads, channels):
  """Returns the block's output from what both branches make, of `join`ed leaves."""
  if block.fusion.kind == "sum":
    made = {}
    if heads is not None:
      made["attention"] = attention.output(cfg, block.attention, leaves["attention"], heads)
    if channels is not None:
      made["ssm"] = mamba.write(cfg, leaves["ssm"], channels)
    return _sum(made)
  if heads is not None:
    heads = _normed(cfg, heads, leaves[f"attention_gain_KJ{block.attention.value}"], None)
  if channels is not None:
    channels = _normed(cfg, channels, leaves["ssm_gain_GHP"], None)
  return fuse(cfg, block, leaves["w_out_YD"], attention=heads, ssm=channels)
