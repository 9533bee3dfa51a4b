"""The hybrid language model: embedding, a typed list of blocks, final norm, head."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config, layout
from hybridlm.config import Attention, Block, GatedConv, Mamba, Mlp, ModelConfig
from hybridlm.nn import attention, embed, gated_conv, held, mamba, mlp, norm, remat, stack
from hybridlm.nn.leaves import Folder, Leaves

MIX = {Mamba: mamba.mix, GatedConv: gated_conv.mix, Attention: attention.mix, Mlp: mlp.mix}
COMMON_TAPS = ("norm_BLD", "in_BLD", "mix_BLD", "out_BLD")
TAPS: Mapping[type, tuple[str, ...]] = {
  Mamba: (
    "x_BLGHP", "z_BLGHP", "u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH", "y_BLGHP", "state_BGHPN",
    *COMMON_TAPS,
  ),
  GatedConv: ("x_BLGHP", "z_BLGHP", "u_BLGHP", "y_BLGHP", *COMMON_TAPS),
  Attention: ("q_BLKJE", "k_BLKE", "v_BLKE", "head_BLKJE", *COMMON_TAPS),
  Mlp: ("up_BLF", "act_BLF", *COMMON_TAPS),
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
  norms average over (see `prune.cut.mask`); None averages over all.
  """
  leaves, x_BLD = held.restore(leaves, x_BLD)
  norm_BLD = layout.constrain(cfg.layout, norm.residual(cfg, leaves, x_BLD, count), "BLD")
  y_BLD, seen = MIX[type(block)](cfg, block, leaves, norm_BLD, segment_BL=segment_BL, count=inner)
  y_BLD = layout.constrain(cfg.layout, y_BLD, "BLD")
  out_BLD = x_BLD + y_BLD
  seen = seen | {"norm_BLD": norm_BLD, "in_BLD": x_BLD, "mix_BLD": y_BLD, "out_BLD": out_BLD}
  return out_BLD, {name: seen[name] for name in taps if name in seen}


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
  x_BLD = embed.lookup(cfg, embed_VD, token_BL)
  x_BLD, seen = _run(cfg, params["blocks"], x_BLD, segment_BL, kept, taps)
  hidden_BLD = norm.residual(cfg, params["final"], x_BLD, kept.get("count"))
  hidden_BLD = layout.constrain(cfg.layout, hidden_BLD, "BLD")
  if output == "hidden":
    return (hidden_BLD, head_DV.astype(hidden_BLD.dtype)), seen
  if output != "logits":
    raise ValueError(f"output {output!r} is not one of logits, hidden")
  return logits(cfg, hidden_BLD, head_DV, kept.get("stay_V")), seen


def _run(cfg, blocks, x_BLD, segment_BL, kept, taps):
  """Returns the residual stream after all blocks, and their taps by folder."""
  scanned, inner = len(blocks) < len(cfg.blocks), kept.get("blocks", {})
  inner = stack.counted(cfg, inner) if scanned else inner
  trees = {int(name): (stack.bare(leaves) if scanned else leaves, inner.get(name))
           for name, leaves in blocks.items()}
  count = kept.get("count")

  def step(index, x_BLD, tree):
    def block(x_BLD, leaves, segment_BL, count, inner):
      return apply_block(
        cfg.at(index), cfg.blocks[index], leaves, x_BLD, segment_BL=segment_BL, count=count,
        inner=inner, taps=taps,
      )

    run = remat.around_block(cfg.remat, block, scanned=scanned)
    return run(x_BLD, tree[0], segment_BL, count, tree[1])

  around = functools.partial(remat.around_unit, cfg.remat, scanned=scanned)
  x_BLD, seen = stack.run(cfg, x_BLD, trees, step, around)
  return x_BLD, {config.block_name(index): seen[index] for index in sorted(seen)}


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
