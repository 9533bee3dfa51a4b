"""Granite hybrid without experts: Bamba's layers with a fused SwiGLU, with or without positions.

Its multipliers become part of the weights; written back, they are one, and attention's 1/sqrt(E).
"""

import math
from typing import Any

from hybridlm.config import Attention, Mlp, ModelConfig, Rope
from hybridlm.interop.families import bamba, parts, rotary
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family, Scales, block, whole_expansion
from hybridlm.interop.layout import Piece

WORDS = {"linear_attention": "M", "full_attention": "*", "mamba": "M", "attention": "*"}
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  fields.only("hidden_act", "silu")
  fields.only("mamba_proj_bias", False)
  if fields.plain.get("num_local_experts", 8) != 0:
    raise fields.error("num_local_experts", "a mixture of experts is not known here, only 0")
  whole = parts.read_outer(fields, eps="rms_norm_eps", tied=False)
  layers = fields.layers()
  words = fields.words("layer_types" if fields.has("layer_types") else "layers_block_type")
  if len(words) != layers or not set(words) <= set(WORDS):
    raise fields.error("layer_types", f"must be {layers} of {', '.join(WORDS)}")
  letters = [WORDS[word] for word in words]
  mixers: dict[str, Any] = {}
  if "M" in letters:
    mixers["M"] = bamba.read_mixer(fields, whole["D"])
  if "*" in letters:
    mixers["*"] = _attention(fields, whole["D"])
  mlp = Mlp(F=fields.integer("shared_intermediate_size"), activation="swiglu")
  blocks = [each for letter in letters for each in (mixers[letter], mlp)]
  return ModelConfig(blocks=tuple(blocks), **whole)


def _attention(fields: Fields, width: int) -> Attention:
  channels = parts.head_width(fields, width)
  rope = None
  if fields.only("position_embedding_type", None, "rope", "nope") == "rope":
    rope = rotary.read(fields, channels, partial=1.0)
    if rope.rotary is not None:
      raise fields.error(rotary.PARTIAL, "the class turns every channel of a head")
  return parts.read_attention(fields, width, rope, fields.flag("attention_bias", False))


def scales(fields: Fields, cfg: ModelConfig) -> Scales:
  """Returns what leaves are multiplied by: the class scales activations where we scale weights."""
  embedding, logits, residual = map(fields.multiplier, MULTIPLIERS)
  found = dict.fromkeys(("w_out_GHPD", "w_o_KJED", "b_o_D", "w_down_FD"), residual)
  mixer = block(cfg, "*", None)
  if mixer is not None:
    # The class multiplies queries by it instead of by 1/sqrt(E), which is ours.
    query = fields.multiplier("attention_multiplier") * math.sqrt(mixer.E)
    query = 1.0 if math.isclose(query, 1.0, rel_tol=1e-6) else query
    found |= {"w_q_DKJE": query, "b_q_KJE": query}
  return found | parts.outer_scales(cfg, embedding, 1 / logits)


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mixer = block(cfg, "*", Attention(K=1, J=1, E=2 * cfg.D))
  turning = rotary.describe(mixer.rope or Rope(), mixer.E, partial=False)
  words = {"M": "linear_attention", "*": "full_attention"}
  return {
    **parts.describe_outer(cfg, eps="rms_norm_eps", context=2048),
    **bamba.describe_mixers(cfg),
    **dict.fromkeys(MULTIPLIERS, 1.0),
    "attention_multiplier": mixer.E**-0.5,
    "layer_types": [words[letter] for letter in cfg.pattern[::2]],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": cfg.blocks[1].F,
    "intermediate_size": cfg.blocks[1].F,
    "position_embedding_type": "rope" if mixer.rope else None,
    "rope_parameters": turning,
  }


def _limits(cfg: ModelConfig) -> list[str]:
  turned = rotary.reasons(cfg) + rotary.whole_reasons(cfg, "all or none")
  return whole_expansion(cfg) + turned


MLP = {
  "shared_mlp.input_linear.weight": (Piece("w_gate_DF", "F D"), Piece("w_up_DF", "F D")),
  "shared_mlp.output_linear.weight": (Piece("w_down_FD", "D F"),),
}
FAMILY = Family(
  name="granitemoehybrid",
  architecture="GraniteMoeHybridForCausalLM",
  outer=parts.outer("model.embed_tokens.weight", "model.norm.weight"),
  blocks={
    "M": parts.rms_norm("input_layernorm.weight") | parts.mamba("mamba."),
    "*": parts.rms_norm("input_layernorm.weight") | parts.attention("self_attn."),
    "-": parts.rms_norm("post_attention_layernorm.weight") | MLP,
  },
  folder="model.layers.{}.",
  per_layer=2,
  read=read,
  scales=scales,
  describe=describe,
  pattern=bamba.PATTERN,
  fixed={
    MODEL: {"norm": ("rmsnorm",)},
    "*": {"window": (None,)},
    "-": {"activation": ("swiglu",), "bias": (False,)},
  },
  limits=_limits,
  ignored=parts.FREQUENCIES,
)
