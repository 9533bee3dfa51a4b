"""The hybrid language model: embedding, a typed list of blocks, final norm, head."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config, layout
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
)
from hybridlm.nn import (
  attention,
  embed,
  flow,
  gated_conv,
  held,
  mamba,
  mamba1,
  mlp,
  norm,
  parallel,
  remat,
  stack,
)
from hybridlm.nn.leaves import Folder, Leaves

MIX = {
  Mamba: mamba.mix, GatedConv: gated_conv.mix, Attention: attention.mix, Mlp: mlp.mix,
  Mamba1: mamba1.mix, Parallel: parallel.mix,
}
COMMON_TAPS = ("norm_BLD", "in_BLD", "mix_BLD", "out_BLD")
OWN_TAPS: Mapping[type, tuple[str, ...]] = {
  Mamba: (
    "x_BLGHP", "z_BLGHP", "u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH", "y_BLGHP", "state_BGHPN",
  ),
  GatedConv: ("x_BLGHP", "z_BLGHP", "u_BLGHP", "y_BLGHP"),
  Attention: ("q_BLKJE", "k_BLKE", "v_BLKE", "head_BLKJE", "v_BLKU", "head_BLKJU"),
  Mlp: ("up_BLF", "act_BLF"),
  Mamba1: (
    "x_BLGHP", "z_BLGHP", "u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH", "rank_BLR", "y_BLGHP",
    "state_BGHN",
  ),
}
# What a kind of block can have tapped; of a value width of its own U stands for E.
TAPS: Mapping[type, tuple[str, ...]] = {
  **{kind: (*names, *COMMON_TAPS) for kind, names in OWN_TAPS.items()},
  Parallel: (*dict.fromkeys(
    name for kind, names in OWN_TAPS.items() if kind is not Mlp for name in names), *COMMON_TAPS),
}
Kept = Mapping[str, Any]


def apply_block(
  cfg: ModelConfig,
  block: Block,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Float[Array, ""] | None = None,
  inner: Mapping[str, jax.Array] | None = None,
  taps: tuple[str, ...] = (),
) -> tuple[Float[Array, "B L D"], dict[str, jax.Array]]:
  """Returns the residual stream after one block, and the taps asked for that this kind has.

  A pure function of the block's own leaves. `count` and `inner` are the surviving entries its
  norms average over (see `prune.cut.mask`); None averages over all. Of models with meta tokens this
  is the block without them.

  Raises:
    ValueError: the block shares the keys of another.
  """
  leaves, x_BLD = held.restore(leaves, x_BLD)
  out_BLD, seen = _residual(
    cfg, block, leaves, x_BLD, segment_BL=segment_BL, count=count, inner=inner, place=flow.ALONE)
  return out_BLD, {name: seen[name] for name in taps if name in seen}


def _apply(cfg, block, keep, taps, streams, leaves, shared, segments, count, inner):
  """Returns both streams after one block with the keys it has for others, and the text's taps.

  Meta tokens go first: the text continues from what they leave. `keep`: others read its keys.
  """
  leaves, x_BLD = held.restore(leaves, streams.x_BLD)
  run, meta_BMD, found = functools.partial(_residual, cfg), streams.meta_BMD, {}
  if meta_BMD is not None:
    meta_BMD, found = run(
      flow.everywhere(block), leaves, meta_BMD, segment_BL=segments.meta_BM, count=count,
      inner=inner, place=flow.Place(keys=shared.meta, keep=True))
  place = flow.Place(segments.position_BL, cfg.meta, found.get("prefix"), shared.text, keep)
  x_BLD, seen = run(
    block, leaves, x_BLD, segment_BL=segments.text_BL, count=count, inner=inner, place=place)
  shared = flow.Shared(seen["keys"], found.get("keys")) if keep else None
  streams = flow.Streams(x_BLD, meta_BMD)
  return (streams, shared), {name: seen[name] for name in taps if name in seen}


def _residual(cfg, block, leaves, x_BLD, *, segment_BL, count, inner, place):
  """Returns the residual stream after one block, and all that the block has seen."""
  norm_BLD = layout.constrain(cfg.layout, norm.residual(cfg, leaves, x_BLD, count), "BLD")
  y_BLD, seen = MIX[type(block)](
    cfg, block, leaves, norm_BLD, segment_BL=segment_BL, count=inner, place=place)
  y_BLD = layout.constrain(cfg.layout, y_BLD, "BLD")
  out_BLD = x_BLD + y_BLD
  return out_BLD, seen | {
    "norm_BLD": norm_BLD, "in_BLD": x_BLD, "mix_BLD": y_BLD, "out_BLD": out_BLD}


class HybridLM(nn.Module):
  """A hybrid Mamba-2 / attention / MLP language model over the canonical parameter tree.

  It declares that tree, and applies the running one of `stack.stacked` too.
  """

  cfg: ModelConfig

  def _folder(self, name: str) -> dict[str, jax.Array]:
    shapes = config.shapes(self.cfg)[name]
    return Leaves(self.cfg, tuple(shapes.items()), name=name)()

  def _blocks(self) -> dict[str, dict[str, jax.Array]]:
    shapes = config.shapes(self.cfg)["blocks"]
    folders = tuple((name, tuple(leaves.items())) for name, leaves in shapes.items())
    return Folder(self.cfg, folders, name="blocks")()

  @nn.compact
  def __call__(
    self,
    token_BL: Int[Array, "B L"],
    segment_BL: Int[Array, "B L"] | None = None,
    kept: Kept | None = None,
    taps: tuple[str, ...] = (),
    output: str = "logits",
  ) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
    """Returns `(logits_BLV, taps)`; taps are keyed by block folder, then by tap name.

    Args:
      token_BL: token ids below V; larger ids are the caller's to refuse.
      segment_BL: documents of a packed row; positions of other documents are never seen.
      kept: surviving entries that each norm averages over and tokens that stay, as
        `prune.cut.mask` returns them.
      taps: names from `TAPS`; what is not asked for costs nothing.
      output: "logits", float32 with padded vocabulary rows at minus infinity, or "hidden": the
        pair `(hidden_BLD, head_DV)`, both in the compute dtype, from which a loss computes them
        chunk by chunk.

    Raises:
      ValueError: a tap or an output of another name.
    """
    if not self.is_initializing():
      given = self.variables["params"]
      if stack.is_stacked(self.cfg, given):
        return forward(
          self.cfg, given, token_BL, segment_BL=segment_BL, kept=kept, taps=taps, output=output
        )
    params = {"embed": self._folder("embed"), "blocks": self._blocks()}
    params["final"] = self._folder("final")
    params |= {} if self.cfg.tied else {"head": self._folder("head")}
    return forward(
      self.cfg, params, token_BL, segment_BL=segment_BL, kept=kept, taps=taps, output=output
    )


def forward(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  token_BL: Int[Array, "B L"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  kept: Kept | None = None,
  taps: tuple[str, ...] = (),
  output: str = "logits",
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
  """Returns what `HybridLM` does, of the canonical tree or of `stack.stacked`'s, which it scans.

  Raises:
    ValueError: a tap or an output of another name.
  """
  known = {name for names in TAPS.values() for name in names}
  if not set(taps) <= known:
    raise ValueError(f"tap {min(set(taps) - known)!r} is not one of {', '.join(sorted(known))}")
  embed_VD, kept = params["embed"]["w_embed_VD"], kept or {}
  head_DV = embed_VD.T if cfg.tied else params["head"]["w_head_DV"]
  meta_BMD, meta_BM = _meta(cfg, params["embed"], kept.get("stay_M"))
  position_BL = flow.positions(segment_BL) if cfg.meta and segment_BL is not None else None
  segments = flow.Segments(segment_BL, position_BL, meta_BM)
  streams = flow.Streams(embed.lookup(cfg, embed_VD, token_BL), meta_BMD)
  x_BLD, seen = _run(cfg, params["blocks"], streams, segments, kept, taps)
  hidden_BLD = norm.residual(cfg, params["final"], x_BLD, kept.get("count"))
  hidden_BLD = layout.constrain(cfg.layout, hidden_BLD, "BLD")
  if output == "hidden":
    return (hidden_BLD, head_DV.astype(hidden_BLD.dtype)), seen
  if output != "logits":
    raise ValueError(f"output {output!r} is not one of logits, hidden")
  return logits(cfg, hidden_BLD, head_DV, kept.get("stay_V")), seen


def prefixes(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, flow.Prefix]:
  """Returns what the text of every block continues from after the meta tokens, by block folder.

  Of the canonical tree, and as decoding computes: not in FP8. Blocks without attention and SSM, and
  attention that reads another block's keys, have none. Without meta tokens nothing has.
  """
  cfg = cfg.replace(quantize="none")
  x_BMD, _ = _meta(cfg, params["embed"], None)
  keys, made = None, {}
  for index, block in enumerate(cfg.blocks) if cfg.meta else ():
    leaves, x_BMD = held.restore(params["blocks"][config.block_name(index)], x_BMD)
    x_BMD, seen = _residual(
      cfg, flow.everywhere(block), leaves, x_BMD, segment_BL=None, count=None, inner=None,
      place=flow.Place(keys=keys, keep=True))
    keys = seen.get("keys", keys)
    if seen.get("prefix") is not None:
      made[config.block_name(index)] = seen["prefix"]
  return made


def _meta(cfg, embed, stay_M):
  """Returns the meta tokens as one row, and of masked ones which stay: those stand last.

  There they are as near to the text as in a model that never had the others.
  """
  if not cfg.meta:
    return None, None
  along = layout.free()
  for name in layout.names(layout.LAYOUTS[cfg.layout].activations.get("L")):
    if name in along:
      raise ValueError(f"meta={cfg.meta} tokens stand before every part of a row: positions cannot "
                       f"be divided over mesh axis {name}={along[name]}")
  meta_MD, order_M = embed["meta_MD"].astype(cfg.dtype), None
  if stay_M is not None:
    order_M = jnp.argsort(stay_M, stable=True)
    meta_MD, stay_M = meta_MD[order_M], stay_M[order_M].astype(jnp.int32)[None]
  return layout.constrain(cfg.layout, meta_MD[None], "BLD"), stay_M


def _run(cfg, blocks, streams, segments, kept, taps):
  """Returns the residual stream after all blocks, and their taps by folder."""
  scanned, inner = len(blocks) < len(cfg.blocks), kept.get("blocks", {})
  inner = stack.counted(cfg, inner) if scanned else inner
  trees = {int(name): (stack.bare(leaves) if scanned else leaves, inner.get(name))
           for name, leaves in blocks.items()}
  count, last = kept.get("count"), {group[0]: group[-1] for group in cfg.kv_groups}

  def step(index, flowing, tree):
    block, (streams, shared) = cfg.blocks[index], flowing
    attention, owner = attention_of(block), cfg.owners[index]
    reads = attention is not None and attention.shared
    run = remat.around_block(
      cfg.remat, functools.partial(_apply, cfg.at(index), block, index in last, taps),
      scanned=scanned)
    given = shared if reads else flow.Shared()
    (streams, own), seen = run(streams, tree[0], given, segments, count, tree[1])
    shared = shared if own is None else own
    return (streams, flow.Shared() if reads and last[owner] == index else shared), seen

  around = functools.partial(remat.around_unit, cfg.remat, scanned=scanned)
  (streams, _), seen = stack.run(cfg, (streams, flow.Shared()), trees, step, around)
  return streams.x_BLD, {config.block_name(index): seen[index] for index in sorted(seen)}


def logits(
  cfg: ModelConfig,
  hidden_BLD: Float[Array, "B L D"],
  head_DV: Float[Array, "D V"],
  stay_V: Bool[Array, "V"] | None = None,
) -> Float[Array, "B L V"]:
  """Returns logits in float32 or wider; minus infinity for padded rows and tokens that go."""
  head_DV = layout.used(cfg.layout, {"w_head_DV": head_DV}, hidden_BLD.dtype)["w_head_DV"]
  wide = jnp.promote_types(hidden_BLD.dtype, jnp.float32)
  logits_BLV = jnp.einsum("BLD,DV->BLV", hidden_BLD, head_DV, preferred_element_type=wide)
  logits_BLV = layout.constrain(cfg.layout, logits_BLV, "BLV")
  if cfg.real_vocabulary < cfg.V:
    real_V = jnp.arange(cfg.V) < cfg.real_vocabulary
    stay_V = real_V if stay_V is None else stay_V & real_V
  return logits_BLV if stay_V is None else jnp.where(stay_V, logits_BLV, -jnp.inf)
