"""Parameters of the model: one Flax module declares a folder of leaves from their names alone."""

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridlm import axes
from hybridlm.config import ModelConfig

DT_RANGE = (1e-3, 0.1)
A_RANGE = (1.0, 16.0)
Init = Callable[[jax.Array, tuple[int, ...], ModelConfig], jax.Array]


def _projection(key, shape, cfg):
  return cfg.init_std * jax.random.normal(key, shape)


def _output(key, shape, cfg):
  """Projections into the residual stream shrink with the number of blocks that add to it."""
  return cfg.init_std / math.sqrt(len(cfg.blocks)) * jax.random.normal(key, shape)


def _taps(key, shape, cfg):
  """Convolution taps, W on the left: uniform within 1/sqrt(W)."""
  bound = 1.0 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _dt_bias(key, shape, cfg):
  """Inverse softplus of a step size drawn log-uniformly from DT_RANGE (Mamba-2)."""
  low, high = (math.log(limit) for limit in DT_RANGE)
  dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  return dt + jnp.log(-jnp.expm1(-dt))


def _a_log(key, shape, cfg):
  """Logarithm of -A, with -A uniform in A_RANGE (Mamba-2)."""
  return jnp.log(jax.random.uniform(key, shape, minval=A_RANGE[0], maxval=A_RANGE[1]))


def _a_log_by_state(key, shape, cfg):
  """Logarithm of -A, with -A = 1, 2, ... N for the numbers of a channel's state (Mamba-1)."""
  return jnp.log(jnp.broadcast_to(jnp.arange(1.0, shape[-1] + 1), shape))


def _ones(key, shape, cfg):
  return jnp.ones(shape)


def _zeros(key, shape, cfg):
  return jnp.zeros(shape)


INITS: Mapping[str, Init] = {
  **dict.fromkeys(
    "w_embed w_head w_z w_x w_b w_c w_dt w_q w_k w_v w_up w_gate meta in_rank in_b in_c in_dt"
    .split(), _projection
  ),
  **dict.fromkeys("w_out w_o w_down".split(), _output),
  **dict.fromkeys("conv_x conv_b conv_c".split(), _taps),
  **dict.fromkeys(
    "norm_gain gate_gain skip attention_gain ssm_gain rank_gain b_gain c_gain".split(), _ones
  ),
  **{f"scale_{stem}": _ones for stem in "z x b c dt out q k v o up gate down".split()},
  **dict.fromkeys(
    "norm_bias conv_bias_x conv_bias_b conv_bias_c b_q b_k b_v b_o b_up b_gate b_down".split(),
    _zeros,
  ),
  "dt_bias": _dt_bias,
  "a_log": _a_log,
  "a_log_GHN": _a_log_by_state,  # names with axes stand before stems
}


class Leaves(nn.Module):
  """A folder of float32 leaves; name -> shape, where each name says its axes."""

  cfg: ModelConfig
  shapes: tuple[tuple[str, tuple[int, ...]], ...]

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    return {
      name: self.param(name, INITS.get(name, INITS[axes.stem(name)]), shape, self.cfg)
      for name, shape in self.shapes
    }


class Folder(nn.Module):
  """Nested folders of leaves, so that modules and the canonical tree have the same paths."""

  cfg: ModelConfig
  folders: tuple[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], ...]

  @nn.compact
  def __call__(self) -> dict[str, dict[str, jax.Array]]:
    return {name: Leaves(self.cfg, shapes, name=name)() for name, shapes in self.folders}
