"""Falcon-H1: attention and Mamba-2 side by side, their outputs added, then SwiGLU, in every layer.

The class multiplies activations by numbers of its config.json, all of them linear in a weight: they
become part of the weights, and are one where we write. The key multiplier scales what turns, which
a rotation does not mind.
"""

from typing import Any

from hybridlm.config import Fusion, Mamba, ModelConfig, Parallel
from hybridlm.interop.families import llama, parts, rotary
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family, Scales

# What the class has where a config.json says nothing.
DEFAULTS = {"mamba_d_ssm": 1024, "num_key_value_heads": 8}
# The order in which `ssm_multipliers` scales the rows of in_proj.
ROWS = ("w_z_DGHP", "w_x_DGHP", "w_b_DGN", "w_c_DGN", "w_dt_DGH")
ONES = (
  "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier",
  "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  fields = Fields(DEFAULTS | dict(fields.plain), fields.place, fields.names)
  fields.only("hidden_act", "silu")
  fields.only("mamba_proj_bias", False)
  fields.only("projectors_bias", False)
  whole = parts.read_outer(fields, eps="rms_norm_eps", tied=False)
  rope = rotary.read(fields, parts.head_width(fields, whole["D"]), partial=1.0)
  if rope.rotary is not None:
    raise fields.error(rotary.PARTIAL, "the class turns every channel of a head")
  bias = fields.flag("attention_bias", False)
  mixer = Parallel(
    attention=parts.read_attention(fields, whole["D"], rope, bias),
    ssm=_mamba(fields, whole["D"]),
    fusion=Fusion("sum"),
  )
  mlp = parts.read_mlp(fields, "swiglu")
  return ModelConfig(blocks=(mixer, mlp) * fields.layers(), **whole)


def _mamba(fields: Fields, width: int) -> Mamba:
  """Returns the Mamba-2 branch; its channels are stated, or a multiple of D."""
  key, heads = "mamba_d_ssm", fields.integer(parts.LONG.heads)
  if fields.has(key):
    inner = fields.integer(key)
  else:
    key, inner = "mamba_expand", fields.integer("mamba_expand", 2) * width
  if fields.plain.get(parts.LONG.channels, "auto") == "auto":
    channels = max(inner // heads, 1)
    fields = Fields(fields.plain | {parts.LONG.channels: channels}, fields.place, fields.names)
  before = "before" if fields.flag("mamba_norm_before_gate", True) else "gated"
  gate = before if fields.flag("mamba_rms_norm", False) else "none"
  mamba = parts.read_mamba(fields, parts.LONG, fields.limits("time_step_limit"), gate)
  if heads * mamba.P != inner:
    raise fields.error(key, f"{inner} channels are not {heads} heads of {mamba.P}")
  return mamba


def scales(fields: Fields, cfg: ModelConfig) -> Scales:
  """Returns what leaves are multiplied by: the class scales activations where we scale weights.

  A bias is scaled with the output of its projection, not with its input.
  """
  embedding, logits, key, into, out, ssm_in, ssm_out = map(fields.multiplier, ONES)
  gate, down = fields.multipliers("mlp_multipliers", 2)
  rows = (ssm_in * each for each in fields.multipliers("ssm_multipliers", len(ROWS)))
  return {
    "w_q_DKJE": into, "w_k_DKE": into * key, "b_k_KE": key, "w_v_DKE": into,
    "w_o_KJED": out, "b_o_D": out,
    **dict(zip(ROWS, rows, strict=True)), "w_out_GHPD": ssm_out,
    "w_gate_DF": gate, "b_gate_F": gate, "w_down_FD": down, "b_down_D": down,
    **parts.outer_scales(cfg, embedding, logits),
  }


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mixer, mlp = cfg.blocks[:2]
  attention, mamba = mixer.attention, mixer.ssm
  turning = rotary.describe(attention.rope, attention.E, partial=False)
  return {
    **parts.describe_outer(cfg, eps="rms_norm_eps", context=8192),
    **parts.describe_attention(attention),
    **parts.describe_mamba(mamba, parts.LONG),
    **dict.fromkeys(ONES, 1.0),
    "mlp_multipliers": [1.0] * 2,
    "ssm_multipliers": [1.0] * len(ROWS),
    "num_hidden_layers": len(cfg.blocks) // 2,
    "intermediate_size": mlp.F,
    "hidden_act": "silu",
    "attention_bias": attention.bias,
    "mlp_bias": mlp.bias,
    "projectors_bias": False,
    "mamba_proj_bias": False,
    "mamba_d_ssm": mamba.G * mamba.H * mamba.P,
    "mamba_expand": 2,
    "mamba_chunk_size": cfg.chunk or 256,
    "mamba_rms_norm": mamba.gate != "none",
    "mamba_norm_before_gate": mamba.gate == "before",
    "time_step_limit": list(mamba.dt_limits),
    "rope_parameters": turning,
    # Where transformers 4 and other readers look.
    "rope_theta": turning["rope_theta"],
  }


def _limits(cfg: ModelConfig) -> list[str]:
  return llama.rotary_reasons(cfg) + rotary.whole_reasons(cfg)


FAMILY = Family(
  name="falcon_h1",
  architecture="FalconH1ForCausalLM",
  outer=parts.outer("model.embed_tokens.weight", "model.final_layernorm.weight"),
  blocks={
    "=": (
      parts.rms_norm("input_layernorm.weight")
      | parts.attention("self_attn.")
      | parts.mamba("mamba.")
    ),
    "-": parts.rms_norm("pre_ff_layernorm.weight") | parts.mlp("feed_forward."),
  },
  folder="model.layers.{}.",
  per_layer=2,
  read=read,
  scales=scales,
  describe=describe,
  pattern=(r"(=-)+", "pairs of = and -"),
  fixed={
    MODEL: {"norm": ("rmsnorm",)},
    "=": {"attention.window": (None,)},
    "-": {"activation": ("swiglu",)},
  },
  limits=_limits,
  ignored=parts.FREQUENCIES,
)
