"""The embedding of tokens, of which every device holds a part."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import ModelConfig


def lookup(
  cfg: ModelConfig, embed_VD: Float[Array, "V D"], token_BL: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
  """Returns the tokens' vectors in the compute dtype.

  Under a mesh (`jax.set_mesh`) no device is given more of the table than it holds: a device looks
  up the rows of all devices that share its part of the vocabulary, in its part of each vector,
  and then hands every device its own rows. The table's cotangent is added up the same way back.

  Raises:
    ValueError: a size that the mesh does not divide.
  """
  along, table = layout.free(), layout.LAYOUTS[cfg.layout]
  if not along:
    return embed_VD[token_BL].astype(cfg.dtype)
  table_spec = layout.spec("w_embed_VD", "VD", embed_VD.shape, table.parameters, along)
  token_spec = layout.activation(cfg.layout, "token_BL", "BL", token_BL.shape, along)
  rows, columns = (layout.names(mesh_axes) for mesh_axes in table_spec)
  shared = tuple(name for name in columns if name in layout.names(token_spec[0]))

  def local(embed_VD, token_BL):
    if shared != columns:
      left = tuple(name for name in columns if name not in shared)
      embed_VD = jax.lax.all_gather(embed_VD, left, axis=1, tiled=True)
    if shared:
      token_BL = jax.lax.all_gather(token_BL, shared, axis=0, tiled=True)
    x_BLD = _own_rows(embed_VD, token_BL, rows).astype(cfg.dtype)
    x_BLD = jax.lax.psum(x_BLD, rows) if rows else x_BLD  # one device had it, the others zeros
    return jax.lax.all_to_all(x_BLD, shared, 0, 2, tiled=True) if shared else x_BLD

  return jax.shard_map(
    local, in_specs=(table_spec, token_spec), out_specs=jax.P(*token_spec, None),
    axis_names=set(_manual()), check_vma=False,
  )(embed_VD, token_BL)


def _own_rows(embed_VD, token_BL, rows):
  """Returns vectors of tokens in this device's part of the vocabulary, zeros for the others."""
  if not rows:
    return embed_VD[token_BL]
  own_BL = token_BL - jax.lax.axis_index(rows) * embed_VD.shape[0]
  held_BL = (own_BL >= 0) & (own_BL < embed_VD.shape[0])
  x_BLD = embed_VD[jnp.clip(own_BL, 0, embed_VD.shape[0] - 1)]
  return jnp.where(held_BL[..., None], x_BLD, 0)


def _manual() -> Mapping[str, int]:
  """Returns the axes of the mesh in force that no `shard_map` has taken yet."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name: mesh.shape[name] for name, kind in kinds if kind != jax.sharding.AxisType.Manual}
