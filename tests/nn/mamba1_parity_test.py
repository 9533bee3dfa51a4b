"""Models of Mamba-1 blocks against transformers: Mamba without norms inside, Jamba's with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import config
from hybridlm.nn import serve

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

D, H, N, R, F, V = 16, 32, 5, 3, 24, 31
SHAPE = {"V": V, "D": D, "H": H, "N": N, "R": R, "eps": 1e-5, "chunk": 8}


def published(name):
  """Returns a random model of transformers, and our config of it."""
  import torch
  import transformers

  shape = {"vocab_size": V, "hidden_size": D, "pad_token_id": 0}
  if name == "Mamba":
    given = transformers.MambaConfig(
      **shape, num_hidden_layers=3, state_size=N, expand=2, conv_kernel=4, time_step_rank=R,
      layer_norm_epsilon=1e-5, residual_in_fp32=False)
    model = transformers.MambaForCausalLM(given)
    cfg = hybridlm.ModelConfig.from_pattern("SSS", **SHAPE, W=4, norms=False, tied=True)
  else:
    given = transformers.JambaConfig(
      **shape, num_hidden_layers=2, intermediate_size=F, num_experts=1, num_experts_per_tok=1,
      mamba_d_state=N, mamba_d_conv=3, mamba_expand=2, mamba_dt_rank=R, rms_norm_eps=1e-5,
      attn_layer_period=8, attn_layer_offset=7, num_attention_heads=2, num_key_value_heads=1,
      tie_word_embeddings=False)
    model = transformers.JambaForCausalLM(given)
    cfg = hybridlm.ModelConfig.from_pattern("S-S-", **SHAPE, W=3, F=F, activation="swiglu")
  torch.manual_seed(0)
  with torch.no_grad():
    for path, leaf in model.named_parameters():
      if not path.endswith("A_log"):
        leaf.copy_(torch.randn_like(leaf) * 0.3 + (1.0 if "norm" in path else 0.0))
  return model.eval(), cfg


def mixer(leaf):
  """Returns our leaves of a mixer; `leaf(name)` is the published one."""
  x_ID, z_ID = np.split(leaf("in_proj.weight"), 2)
  rank_RI, b_NI, c_NI = np.split(leaf("x_proj.weight"), [R, R + N])
  made = {
    "w_x_DGHP": x_ID.T[:, None, :, None], "w_z_DGHP": z_ID.T[:, None, :, None],
    "conv_x_WGHP": leaf("conv1d.weight")[:, 0].T[:, None, :, None],
    "conv_bias_x_GHP": leaf("conv1d.bias")[None, :, None],
    "in_rank_GHPR": rank_RI.T[None, :, None], "in_b_GHPN": b_NI.T[None, :, None],
    "in_c_GHPN": c_NI.T[None, :, None], "in_dt_RGH": leaf("dt_proj.weight").T[:, None],
    "dt_bias_GH": leaf("dt_proj.bias")[None], "a_log_GHN": leaf("A_log")[None],
    "skip_GH": leaf("D")[None], "w_out_GHPD": leaf("out_proj.weight").T[None, :, None],
  }
  gains = {"rank_gain_R": "dt_layernorm", "b_gain_GN": "b_layernorm", "c_gain_GN": "c_layernorm"}
  found = {ours: leaf(f"{theirs}.weight") for ours, theirs in gains.items()}
  return made | {
    name: v if name == "rank_gain_R" else v[None] for name, v in found.items() if v is not None}


def tree(name, model, cfg):
  """Returns our parameters of a published model."""
  state = {path: np.asarray(leaf.detach()) for path, leaf in model.named_parameters()}
  root = {"Mamba": "backbone", "Jamba": "model"}[name]
  ends = {"Mamba": ("embeddings", "norm_f"), "Jamba": ("embed_tokens", "final_layernorm")}[name]
  blocks = {}
  for layer in range(cfg.pattern.count("S")):
    at = f"{root}.layers.{layer}."
    kind, gain = ("mixer.", "norm") if name == "Mamba" else ("mamba.", "input_layernorm")
    own = mixer(lambda leaf, at=at, kind=kind: state.get(at + kind + leaf))
    blocks[f"{len(blocks):02d}"] = {"norm_gain_D": state[f"{at}{gain}.weight"], **own}
    if name == "Jamba":
      w = {stem: state[f"{at}feed_forward.{stem}_proj.weight"].T for stem in ("gate", "up", "down")}
      blocks[f"{len(blocks):02d}"] = {
        "norm_gain_D": state[f"{at}pre_ff_layernorm.weight"], "w_gate_DF": w["gate"],
        "w_up_DF": w["up"], "w_down_FD": w["down"]}
  made = {"embed": {"w_embed_VD": state[f"{root}.{ends[0]}.weight"]}, "blocks": blocks,
          "final": {"norm_gain_D": state[f"{root}.{ends[1]}.weight"]}}
  return made if cfg.tied else made | {"head": {"w_head_DV": state["lm_head.weight"].T}}


@pytest.mark.parametrize("name", ["Mamba", "Jamba"])
def test_logits_are_those_of_transformers_at_once_and_token_by_token(name):
  import torch

  model, cfg = published(name)
  params = jax.tree.map(jnp.asarray, tree(name, model, cfg))
  config.check(cfg, params)
  token_BL = models.tokens(cfg, (2, 21))
  with torch.no_grad():
    want_BLV = model(torch.tensor(np.array(token_BL)), use_cache=False).logits.numpy()
  assert models.error(hybridlm.forward(cfg, params, token_BL), want_BLV) < 2e-5
  logits_BV, cache = serve.prefill(cfg, params, token_BL[:, :19], jnp.array([19, 19]), size=21)
  assert models.error(logits_BV, want_BLV[:, 18]) < 2e-5
  for position in (19, 20):
    logits_BV, cache = serve.step(cfg, params, cache, token_BL[:, position])
    assert models.error(logits_BV, want_BLV[:, position]) < 2e-5
