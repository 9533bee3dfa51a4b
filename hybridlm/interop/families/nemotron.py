"""Nemotron and Minitron, dense: attention with partly rotary heads, squared ReLU, LayerNorm1P.

The class multiplies by 1 + weight after the norm; our gain is that whole factor, in float32.
"""

from typing import Any

from hybridlm.config import ModelConfig
from hybridlm.interop.families import llama, parts, rotary
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family, Table
from hybridlm.interop.layout import Piece


def _norm(name: str, folder: str = "") -> Table:
  return {
    f"{name}.weight": (Piece(f"{folder}norm_gain_D", "D", "one_plus"),),
    f"{name}.bias": (Piece(f"{folder}norm_bias_D", "D"),),
  }


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  fields.only("hidden_act", "relu2")
  whole = parts.read_outer(fields, "layernorm1p", eps="norm_eps", tied=False)
  rope = rotary.read(fields, parts.head_width(fields, whole["D"]), partial=0.5)
  bias = fields.flag("attention_bias", False)
  mixer = parts.read_attention(fields, whole["D"], rope, bias)
  mlp = parts.read_mlp(fields, "relu2")
  return ModelConfig(blocks=(mixer, mlp) * fields.layers(), **whole)


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mixer, mlp = cfg.blocks[:2]
  turning = rotary.describe(mixer.rope, mixer.E, partial=True)
  return {
    **parts.describe_outer(cfg, eps="norm_eps", context=4096),
    **parts.describe_attention(mixer),
    "num_hidden_layers": len(cfg.blocks) // 2,
    "intermediate_size": mlp.F,
    "hidden_act": "relu2",
    "attention_bias": mixer.bias,
    "mlp_bias": mlp.bias,
    "rope_parameters": turning,
    # Where transformers 4 and other readers look.
    "rope_theta": turning["rope_theta"],
    rotary.PARTIAL: turning[rotary.PARTIAL],
  }


FAMILY = Family(
  name="nemotron",
  architecture="NemotronForCausalLM",
  outer=parts.outer("model.embed_tokens.weight", "", norm=_norm("model.norm", "final/")),
  blocks={
    "*": _norm("input_layernorm") | parts.attention("self_attn."),
    "-": _norm("post_attention_layernorm") | parts.mlp("mlp."),
  },
  folder="model.layers.{}.",
  per_layer=2,
  read=read,
  describe=describe,
  pattern=llama.PATTERN,
  fixed={
    MODEL: {"norm": ("layernorm1p",)},
    "*": {"window": (None,)},
    "-": {"activation": ("relu2",)},
  },
  limits=llama.rotary_reasons,
  ignored=parts.FREQUENCIES,
)
