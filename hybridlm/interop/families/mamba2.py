"""Mamba-2 without attention: the class of transformers, and the original state-spaces layout."""

import math
from typing import Any

from hybridlm.config import ModelConfig
from hybridlm.interop.families import parts
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family, expansion, whole_expansion

KEYS = parts.MambaKeys(
  "num_heads", "head_dim", "n_groups", "state_size", "conv_kernel", "use_conv_bias"
)
PATTERN = (r"M+", "made of M alone")


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  fields.only("use_bias", False)
  fields.only("hidden_act", "silu")
  whole = parts.read_outer(fields, eps="layer_norm_epsilon", tied=False)
  mamba = parts.read_mamba(fields, KEYS, fields.limits("time_step_limit"))
  parts.check_width(fields, mamba, "expand", whole["D"])
  return ModelConfig(blocks=(mamba,) * fields.layers(), **whole)


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mamba = cfg.blocks[0]
  return {
    **parts.describe_outer(cfg, eps="layer_norm_epsilon", context=None),
    **parts.describe_mamba(mamba, KEYS),
    "num_hidden_layers": len(cfg.blocks),
    "expand": expansion(cfg, mamba),
    "hidden_act": "silu",
    "use_bias": False,
    "residual_in_fp32": False,
    "chunk_size": cfg.chunk or 256,
    "time_step_limit": list(mamba.dt_limits),
  }


def read_original(fields: Fields) -> ModelConfig:
  """Returns the model that a config.json of the state-spaces code describes.

  The embedding has its rows rounded up; those past `vocab_size` are padding.

  Raises:
    ValueError: a Mamba-1 layer, attention or feed-forward layers, or a key that is wrong.
  """
  inner = fields.table("ssm_cfg")
  if inner.plain.get("layer", "Mamba1") != "Mamba2":
    raise inner.error("layer", "only 'Mamba2' can be read")
  for key, value in (("attn_layer_idx", []), ("d_intermediate", 0), ("rms_norm", True)):
    fields.only(key, value)
  switches = {"bias": False, "norm_before_gate": False, "rmsnorm": True, "D_has_hdim": False}
  for key, value in (switches | {"d_ssm": None}).items():
    inner.only(key, value)
  width, channels = fields.integer("d_model"), inner.integer("headdim", 64)
  if inner.integer("expand", 2) * width % channels:
    raise inner.error("headdim", f"must divide expand times d_model={width}")
  sizes = {
    "heads": inner.integer("expand", 2) * width // channels,
    "channels": channels,
    "groups": inner.integer("ngroups", 1),
    "state": inner.integer("d_state", 128),
    "taps": inner.integer("d_conv", 4),
    "bias": inner.flag("conv_bias", True),
  }
  stated = Fields(sizes, fields.place, fields.names)
  keys = parts.MambaKeys(*sizes)
  mamba = parts.read_mamba(stated, keys, inner.limits("dt_limit"))
  real, multiple = fields.integer("vocab_size"), fields.integer("pad_vocab_size_multiple", 8)
  rows = math.ceil(real / multiple) * multiple
  return ModelConfig(
    V=rows,
    D=width,
    blocks=(mamba,) * fields.layers("n_layer"),
    eps=fields.number("norm_epsilon", 1e-5),
    tied=fields.flag("tie_embeddings", True),
    vocabulary=None if rows == real else real,
  )


FIXED = {MODEL: {"norm": ("rmsnorm",)}}
BLOCKS = {"M": parts.rms_norm("norm.weight") | parts.mamba("mixer.")}

FAMILY = Family(
  name="mamba2",
  architecture="Mamba2ForCausalLM",
  outer=parts.outer("backbone.embeddings.weight", "backbone.norm_f.weight"),
  blocks=BLOCKS,
  folder="backbone.layers.{}.",
  read=read,
  describe=describe,
  pattern=PATTERN,
  fixed=FIXED,
  limits=whole_expansion,
)
ORIGINAL = Family(
  name="state_spaces",
  architecture="",
  outer=parts.outer("backbone.embedding.weight", "backbone.norm_f.weight"),
  blocks=BLOCKS,
  folder="backbone.layers.{}.",
  read=read_original,
  describe=None,
  pattern=PATTERN,
  fixed=FIXED,
)
