"""Llama: attention with rotary positions and a SwiGLU layer in every published layer."""

from typing import Any

from hybridlm.config import Attention, ModelConfig, attention_of
from hybridlm.interop.families import parts, rotary
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family

PATTERN = (r"(\*-)+", "pairs of * and -")


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  fields.only("hidden_act", "silu")
  whole = parts.read_outer(fields, eps="rms_norm_eps", tied=False)
  width = parts.head_width(fields, whole["D"])
  rope = rotary.read(fields, width, partial=1.0)
  if rope.rotary is not None:
    raise fields.error(rotary.PARTIAL, "the class turns every channel of a head")
  bias = fields.flag("attention_bias", False)
  mixer = parts.read_attention(fields, whole["D"], rope, bias)
  mlp = parts.read_mlp(fields, "swiglu")
  return ModelConfig(blocks=(mixer, mlp) * fields.layers(), **whole)


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mixer, mlp = cfg.blocks[:2]
  return {
    **parts.describe_outer(cfg, eps="rms_norm_eps", context=2048),
    **parts.describe_attention(mixer),
    "num_hidden_layers": len(cfg.blocks) // 2,
    "intermediate_size": mlp.F,
    "hidden_act": "silu",
    "attention_bias": mixer.bias,
    "mlp_bias": mlp.bias,
    "rope_parameters": rotary.describe(mixer.rope, mixer.E, partial=False),
  }


def limits(cfg: ModelConfig) -> list[str]:
  """Returns the reasons that no table says: rotary positions, and heads that divide D."""
  found = rotary_reasons(cfg) + rotary.whole_reasons(cfg)
  heads = {mixer.K * mixer.J for mixer in cfg.blocks if isinstance(mixer, Attention)}
  found += [
    f"D={cfg.D} is not a multiple of its {count} attention heads"
    for count in heads
    if cfg.D % count
  ]
  return sorted(set(found))


def rotary_reasons(cfg: ModelConfig) -> list[str]:
  """Returns a reason for every attention block without rotary positions, or with odd ones."""
  mixers = [attention_of(block) for block in cfg.blocks]
  return [
    f"block {index} has no rotary positions, the class always turns heads"
    for index, mixer in enumerate(mixers)
    if mixer is not None and mixer.rope is None
  ] + rotary.reasons(cfg)


FAMILY = Family(
  name="llama",
  architecture="LlamaForCausalLM",
  outer=parts.outer("model.embed_tokens.weight", "model.norm.weight"),
  blocks={
    "*": parts.rms_norm("input_layernorm.weight") | parts.attention("self_attn."),
    "-": parts.rms_norm("post_attention_layernorm.weight") | parts.mlp("mlp."),
  },
  folder="model.layers.{}.",
  per_layer=2,
  read=read,
  describe=describe,
  pattern=PATTERN,
  fixed={
    MODEL: {"norm": ("rmsnorm",)},
    "*": {"window": (None,)},
    "-": {"activation": ("swiglu",)},
  },
  limits=limits,
  ignored=parts.FREQUENCIES,
)
