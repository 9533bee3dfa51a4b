"""Bamba: a Mamba-2 or attention mixer with rotary positions, then SwiGLU, in every layer."""

from typing import Any

from hybridlm.config import Attention, Mamba, ModelConfig, Rope
from hybridlm.interop.families import llama, parts, rotary
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family, block, expansion, whole_expansion

PATTERN = (r"([M*]-)+", "pairs of M or * and -")
# Half of a head turns; the class does not look at a share stated outside rope_parameters.
PARTIAL = 0.5


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  fields.only("hidden_act", "silu")
  fields.only("mamba_proj_bias", False)
  whole = parts.read_outer(fields, eps="rms_norm_eps", tied=False)
  mixers: dict[bool, Any] = {False: read_mixer(fields, whole["D"])}
  layers, attended = fields.layers(), fields.plain.get("attn_layer_indices") or []
  if not isinstance(attended, list) or not all(type(i) is int and i >= 0 for i in attended):
    raise fields.error("attn_layer_indices", "must be a list of layer numbers")
  if attended:
    width = parts.head_width(fields, whole["D"])
    rope = rotary.read(fields, width, partial=PARTIAL, fixed=True)
    bias = fields.flag("attention_bias", False)
    mixers[True] = parts.read_attention(fields, whole["D"], rope, bias)
  mlp = parts.read_mlp(fields, "swiglu")
  blocks = [each for layer in range(layers) for each in (mixers[layer in attended], mlp)]
  return ModelConfig(blocks=tuple(blocks), **whole)


def read_mixer(fields: Fields, width: int) -> Mamba:
  """Returns the Mamba-2 block; its channels a head may be "auto": what is left of D."""
  heads, expand = fields.integer(parts.LONG.heads), fields.integer("mamba_expand", 2)
  if fields.plain.get(parts.LONG.channels, "auto") == "auto":
    channels = max(expand * width // heads, 1)
    fields = Fields(fields.plain | {parts.LONG.channels: channels}, fields.place, fields.names)
  mamba = parts.read_mamba(fields, parts.LONG, fields.limits("time_step_limit"))
  parts.check_width(fields, mamba, "mamba_expand", width)
  return mamba


def describe_mixers(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the keys of both mixers; a model without one of them states sizes that fit D."""
  mamba = block(cfg, "M", Mamba(G=1, H=1, P=cfg.D, N=256))
  mixer = block(cfg, "*", Attention(K=1, J=1, E=2 * cfg.D, rope=Rope()))
  return {
    **parts.describe_mamba(mamba, parts.LONG),
    **parts.describe_attention(mixer),
    "num_hidden_layers": len(cfg.blocks) // 2,
    "mamba_expand": expansion(cfg, mamba),
    "mamba_proj_bias": False,
    "mamba_chunk_size": cfg.chunk or 256,
    "time_step_limit": list(mamba.dt_limits),
    "hidden_act": "silu",
    "attention_bias": mixer.bias,
  }


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mixer = block(cfg, "*", Attention(K=1, J=1, E=2 * cfg.D, rope=Rope()))
  mlp = cfg.blocks[1]
  return {
    **parts.describe_outer(cfg, eps="rms_norm_eps", context=262144),
    **describe_mixers(cfg),
    "intermediate_size": mlp.F,
    "mlp_bias": mlp.bias,
    "attn_layer_indices": [i // 2 for i, each in enumerate(cfg.pattern) if each == "*"],
    "rope_parameters": rotary.describe(mixer.rope, mixer.E, partial=True),
  }


def _limits(cfg: ModelConfig) -> list[str]:
  return whole_expansion(cfg) + llama.rotary_reasons(cfg)


FAMILY = Family(
  name="bamba",
  architecture="BambaForCausalLM",
  outer=parts.outer("model.embed_tokens.weight", "model.final_layernorm.weight"),
  blocks={
    "M": parts.rms_norm("input_layernorm.weight") | parts.mamba("mamba."),
    "*": parts.rms_norm("input_layernorm.weight") | parts.attention("self_attn."),
    "-": parts.rms_norm("pre_ff_layernorm.weight") | parts.mlp("feed_forward."),
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
  limits=_limits,
  ignored=parts.FREQUENCIES,
)
