"""Nemotron-H: Mamba-2, attention without positions and squared-ReLU layers, in any order.

transformers 5.23 clamps dt to (time_step_min, infinity) in prefill, never reads time_step_limit,
and does not tie the head whatever tie_word_embeddings says: a tied model of ours gets a head.
"""

import math
from typing import Any

from hybridlm.config import Attention, Mamba, Mlp, ModelConfig
from hybridlm.interop.families import parts
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import MODEL, Family, block, expansion

KEYS = parts.MambaKeys(
  "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "use_conv_bias",
)
WORDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
OLD_WORDS = {"mamba": "M", "attention": "*"}
EXPERTS = ("E", "moe")
# What a model without blocks of a kind states for them, so that the class can be made.
MAMBA = Mamba(G=8, H=16, P=64, N=128)
ATTENTION = Attention(K=8, J=4, E=128)
MLP = Mlp(F=21504)
LEGACY = {
  "mamba_n_groups": "n_groups",
  "mamba_d_conv": "conv_kernel",
  "mamba_conv_bias": "use_conv_bias",
  "mamba_dt_min": "time_step_min",
}


def _letters(fields: Fields) -> str:
  """Returns the block letters of `hybrid_override_pattern` or of a list of layer words."""
  lists = [key for key in ("layers_block_type", "layer_types") if fields.has(key)]
  if lists:
    key, words = lists[0], fields.words(lists[0])
    known = {word: letter for letter, word in WORDS.items()} | OLD_WORDS
  else:
    key = "hybrid_override_pattern"
    known = {letter: letter for letter in WORDS}
    words = fields.plain.get(key)
    if not isinstance(words, str) or not words:
      raise fields.error(key, "must be a pattern of M, * and -, or layers_block_type a list")
  for number, word in enumerate(words):
    if word in EXPERTS:
      raise fields.error(key, f"layer {number} is a mixture of experts ({word!r}), not known here")
    if word not in known:
      raise fields.error(key, f"layer {number} is {word!r}, known: {', '.join(known)}")
  if not 1 <= len(words) <= len(fields.names):
    raise fields.error(key, f"{len(words)} layers, the folder holds {len(fields.names)} tensors")
  return "".join(known[word] for word in words)


def read(fields: Fields) -> ModelConfig:
  """Returns the model a config.json describes.

  Raises:
    ValueError: a key that is missing, wrong, or asks for what our blocks cannot do.
  """
  renamed = {LEGACY.get(key, key): value for key, value in fields.plain.items()}
  fields = Fields(renamed, fields.place, fields.names)
  letters = _letters(fields)
  for key in ("use_bias", "mamba_proj_bias", "attention_bias"):
    fields.only(key, False, None)
  fields.only("sliding_window", None)
  fields.only("mamba_hidden_act", "silu")
  fields.only("mlp_hidden_act", "relu2")
  whole = parts.read_outer(fields, eps="layer_norm_epsilon", tied=False)
  made: dict[str, Any] = {}
  if "M" in letters:
    made["M"] = parts.read_mamba(fields, KEYS, _limits(fields))
  if "*" in letters:
    # The class has 128 channels a head where the config does not say, whatever D is.
    width = "head_dim" if fields.has("head_dim") else "attention_head_dim"
    stated = Fields(renamed | {"head_dim": fields.integer(width, 128)}, fields.place, fields.names)
    made["*"] = parts.read_attention(stated, whole["D"], None, bias=False)
  if "-" in letters:
    made["-"] = parts.read_mlp(fields, "relu2")
  # The class never ties: a head on disk is the head.
  whole["tied"] = whole["tied"] and "lm_head.weight" not in fields.names
  return ModelConfig(blocks=tuple(made[letter] for letter in letters), **whole)


def _limits(fields: Fields) -> tuple[float, float]:
  low = fields.number("time_step_min", 0.001)
  if low < 0:
    raise fields.error("time_step_min", "must not be negative")
  return low, math.inf


def describe(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that the class can express."""
  mamba, mlp = block(cfg, "M", MAMBA), block(cfg, "-", MLP)
  low = mamba.dt_limits[0]
  return {
    **parts.describe_outer(cfg, eps="layer_norm_epsilon", context=4096),
    **parts.describe_mamba(mamba, KEYS),
    **parts.describe_attention(block(cfg, "*", ATTENTION)),
    "tie_word_embeddings": False,
    # transformers 5 reads both forms of the list of layers, vLLM and the published code this one.
    "hybrid_override_pattern": cfg.pattern,
    "num_hidden_layers": len(cfg.blocks),
    "intermediate_size": mlp.F,
    "mlp_hidden_act": mlp.activation,
    "mlp_bias": mlp.bias,
    "mamba_hidden_act": "silu",
    "attention_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "sliding_window": None,
    "residual_in_fp32": False,
    "expand": expansion(cfg, MAMBA),
    "chunk_size": cfg.chunk or 128,
    # The first is what the class clamps by, the second what older code does.
    "time_step_min": low,
    "time_step_limit": [low, math.inf],
  }


def _limitations(cfg: ModelConfig) -> list[str]:
  return [
    f"block {index} clamps dt at {mamba.dt_limits[1]}, the class has no upper limit"
    for index, mamba in enumerate(cfg.blocks)
    if isinstance(mamba, Mamba) and mamba.dt_limits[1] != math.inf
  ]


FAMILY = Family(
  name="nemotron_h",
  architecture="NemotronHForCausalLM",
  outer=parts.outer("backbone.embeddings.weight", "backbone.norm_f.weight"),
  blocks={
    "M": parts.rms_norm("norm.weight") | parts.mamba("mixer."),
    "*": parts.rms_norm("norm.weight") | parts.attention("mixer."),
    "-": parts.rms_norm("norm.weight") | parts.mlp("mixer."),
  },
  folder="backbone.layers.{}.",
  read=read,
  describe=describe,
  pattern=(r"[M*-]+", "made of M, * and -"),
  fixed={
    MODEL: {"norm": ("rmsnorm",)},
    "*": {"rope": (None,), "window": (None,), "bias": (False,)},
    "-": {"activation": ("relu2",)},
  },
  ties=False,
  limits=_limitations,
  renamed=(("model.", "backbone."),),
  ignored=r"mtp\..*",
)
