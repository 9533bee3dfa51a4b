"""What families share: tables of the three kinds of blocks, and their keys in a config.json."""

from typing import Any, NamedTuple

from hybridlm.config import Attention, Mamba, Mlp, ModelConfig, Rope
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.families.table import Scales, Table
from hybridlm.interop.layout import Piece

# Extra tensors that hold no parameter: older checkpoints keep the rotary frequencies.
FREQUENCIES = r".*\.rotary_emb\.inv_freq"


def outer(embed: str, final: str, *, norm: Table | None = None) -> Table:
  """Returns the tensors outside the blocks; `norm` replaces the final norm's plain gain."""
  return {
    embed: (Piece("embed/w_embed_VD", "V D"),),
    **(norm or {final: (Piece("final/norm_gain_D", "D"),)}),
    "lm_head.weight": (Piece("head/w_head_DV", "V D"),),
  }


def outer_scales(cfg: ModelConfig, embedding: float, logits: float) -> Scales:
  """Returns what the leaves outside the blocks are to be multiplied by.

  A tied head is the embedding, which is multiplied by `embedding` already: the final norm's gain
  takes the rest of what the logits are multiplied by.
  """
  ends = {"final/norm_gain_D": logits / embedding} if cfg.tied else {"head/w_head_DV": logits}
  return {"embed/w_embed_VD": embedding, **ends}


def rms_norm(name: str) -> Table:
  """Returns the norm in front of a block."""
  return {name: (Piece("norm_gain_D", "D"),)}


def mamba(inner: str) -> Table:
  """Returns a Mamba-2 mixer: in_proj is z, x, B, C, dt by rows, conv1d is x, B, C."""
  return {
    f"{inner}in_proj.weight": (
      Piece("w_z_DGHP", "GHP D"),
      Piece("w_x_DGHP", "GHP D"),
      Piece("w_b_DGN", "GN D"),
      Piece("w_c_DGN", "GN D"),
      Piece("w_dt_DGH", "GH D"),
    ),
    f"{inner}conv1d.weight": (
      Piece("conv_x_WGHP", "GHP 1 W"),
      Piece("conv_b_WGN", "GN 1 W"),
      Piece("conv_c_WGN", "GN 1 W"),
    ),
    f"{inner}conv1d.bias": (
      Piece("conv_bias_x_GHP", "GHP"),
      Piece("conv_bias_b_GN", "GN"),
      Piece("conv_bias_c_GN", "GN"),
    ),
    f"{inner}dt_bias": (Piece("dt_bias_GH", "GH"),),
    f"{inner}A_log": (Piece("a_log_GH", "GH"),),
    f"{inner}D": (Piece("skip_GH", "GH"),),
    f"{inner}norm.weight": (Piece("gate_gain_GHP", "GHP"),),
    f"{inner}out_proj.weight": (Piece("w_out_GHPD", "D GHP"),),
  }


def attention(inner: str) -> Table:
  """Returns an attention mixer; biases are there where the block has some."""
  return {
    f"{inner}q_proj.weight": (Piece("w_q_DKJE", "KJE D"),),
    f"{inner}k_proj.weight": (Piece("w_k_DKE", "KE D"),),
    f"{inner}v_proj.weight": (Piece("w_v_DKE", "KE D"),),
    f"{inner}o_proj.weight": (Piece("w_o_KJED", "D KJE"),),
    f"{inner}q_proj.bias": (Piece("b_q_KJE", "KJE"),),
    f"{inner}k_proj.bias": (Piece("b_k_KE", "KE"),),
    f"{inner}v_proj.bias": (Piece("b_v_KE", "KE"),),
    f"{inner}o_proj.bias": (Piece("b_o_D", "D"),),
  }


def mlp(inner: str) -> Table:
  """Returns a feed-forward layer; the gate and biases are there where the block has some."""
  return {
    f"{inner}gate_proj.weight": (Piece("w_gate_DF", "F D"),),
    f"{inner}up_proj.weight": (Piece("w_up_DF", "F D"),),
    f"{inner}down_proj.weight": (Piece("w_down_FD", "D F"),),
    f"{inner}gate_proj.bias": (Piece("b_gate_F", "F"),),
    f"{inner}up_proj.bias": (Piece("b_up_F", "F"),),
    f"{inner}down_proj.bias": (Piece("b_down_D", "D"),),
  }


class MambaKeys(NamedTuple):
  """Names a family gives the sizes of its Mamba-2 blocks."""

  heads: str
  channels: str
  groups: str
  state: str
  taps: str
  bias: str


# Bamba and its descendants.
LONG = MambaKeys(
  "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv",
  "mamba_conv_bias",
)


def read_mamba(
  fields: Fields, keys: MambaKeys, limits: tuple[float, float], gate: str = "gated"
) -> Mamba:
  """Returns the Mamba-2 block of a config.json.

  Raises:
    ValueError: a size that is missing or no whole number, or heads that groups cannot share.
  """
  groups = fields.integer(keys.groups)
  return Mamba(
    G=groups,
    H=fields.divided(keys.heads, groups, keys.groups),
    P=fields.integer(keys.channels),
    N=fields.integer(keys.state),
    W=fields.integer(keys.taps, 4),
    conv_bias=fields.flag(keys.bias, True),
    dt_limits=limits,
    gate=gate,
  )


def describe_mamba(block: Mamba, keys: MambaKeys) -> dict[str, Any]:
  """Returns the keys that `read_mamba` reads."""
  values = (block.G * block.H, block.P, block.G, block.N, block.W, block.conv_bias)
  return dict(zip(keys, values, strict=True))


def check_width(fields: Fields, mamba: Mamba, expand: str, width: int) -> None:
  """Raises where a class derives the Mamba channels from D and they are not heads x channels."""
  if fields.integer(expand, 2) * width != mamba.G * mamba.H * mamba.P:
    raise fields.error(expand, f"times hidden_size={width} is not heads times channels of a head")


def read_attention(fields: Fields, width: int, rope: Rope | None, bias: bool) -> Attention:
  """Returns the attention block of a config.json; `width` is D."""
  heads = fields.integer("num_attention_heads")
  groups = fields.integer("num_key_value_heads", heads)
  return Attention(
    K=groups,
    J=fields.divided("num_attention_heads", groups, "num_key_value_heads"),
    E=head_width(fields, width),
    rope=rope,
    bias=bias,
  )


def head_width(fields: Fields, width: int) -> int:
  """Returns the channels of an attention head: stated, or D divided by the heads."""
  heads = fields.integer("num_attention_heads")
  if not fields.has("head_dim") and width % heads:
    raise fields.error("num_attention_heads", f"must divide hidden_size={width} without a head_dim")
  return fields.integer("head_dim", max(width // heads, 1))


def describe_attention(block: Attention) -> dict[str, Any]:
  """Returns the keys that `read_attention` reads."""
  return {
    "num_attention_heads": block.K * block.J,
    "num_key_value_heads": block.K,
    "head_dim": block.E,
  }


def read_outer(fields: Fields, norm: str = "rmsnorm", *, eps: str, tied: bool) -> dict[str, Any]:
  """Returns the fields of a `ModelConfig` that every config.json states alike.

  `tied` holds where the config does not say.
  """
  dtype = fields.plain.get("dtype", fields.plain.get("torch_dtype"))
  context = "max_position_embeddings"
  return {
    "V": fields.integer("vocab_size"),
    "D": fields.integer("hidden_size"),
    "norm": norm,
    "eps": fields.number(eps, 1e-5),
    "tied": fields.flag("tie_word_embeddings", tied),
    "context": fields.integer(context) if fields.has(context) else None,
    "dtype": "bfloat16" if dtype == "bfloat16" else "float32",
  }


def describe_outer(cfg: ModelConfig, *, eps: str, context: int | None) -> dict[str, Any]:
  """Returns the keys that `read_outer` reads; `context` is the family's own default."""
  stated = cfg.context or context
  return {
    "vocab_size": cfg.V,
    "hidden_size": cfg.D,
    eps: cfg.eps,
    "tie_word_embeddings": cfg.tied,
    "dtype": cfg.dtype,
    "initializer_range": cfg.init_std,
    "use_cache": True,
    **({} if stated is None else {"max_position_embeddings": stated}),
  }


def read_mlp(fields: Fields, activation: str, key: str = "intermediate_size") -> Mlp:
  """Returns the feed-forward block of a config.json."""
  return Mlp(F=fields.integer(key), activation=activation, bias=fields.flag("mlp_bias", False))
