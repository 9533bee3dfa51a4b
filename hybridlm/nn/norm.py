"""The residual norm a config asks for."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from hybridlm import layout
from hybridlm.config import ModelConfig
from hybridlm.ops import norm


def residual(
  cfg: ModelConfig,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  count: Float[Array, ""] | None,
) -> Float[Array, "B L D"]:
  """Returns the normed residual stream; `count` surviving channels are averaged over if given."""
  leaves = layout.used(
    cfg.layout, {name: v for name, v in leaves.items() if name.startswith("norm_")}, None
  )
  if cfg.norm == "rmsnorm":
    return norm.rms_norm(x_BLD, leaves["norm_gain_D"], eps=cfg.eps, count=count)
  return norm.layer_norm(
    x_BLD, leaves["norm_gain_D"], leaves["norm_bias_D"], eps=cfg.eps, count=count
  )
