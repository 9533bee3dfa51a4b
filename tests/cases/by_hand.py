"""Hymba token by token in float64, from the formulas alone: no code of the library computes here.

arXiv 2411.13676 (parallel heads, meta tokens, shared keys), 2405.21060 (Mamba-2) and 2312.00752
(Mamba-1, with the norms of 2403.19887). Every token is a step; a block remembers what it has seen.
"""

import numpy as np

from cases import models
from hybridlm.config import Mamba1, Mlp


def silu(x):
  return x / (1 + np.exp(-x))


def softplus(x):
  return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def rms(x, gain, eps):
  return gain * x / np.sqrt(np.mean(x**2) + eps)


def turn(head, place, rope):
  """Returns one head's vector turned to its place: channels i and i + half are a pair."""
  half = len(head) // 2
  angle = place * rope.base ** (-np.arange(half) / half)
  left, right = head[:half], head[half:]
  return np.concatenate([
    left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)])


class Memory:
  """What one block remembers of the tokens before."""

  def __init__(self):
    self.keys, self.values, self.inputs, self.state = [], [], {}, 0.0

  def convolve(self, leaves, stem, x):
    """Returns SiLU of the sum of taps times the newest input and those before it."""
    name = next(name for name in leaves if name.startswith(f"conv_{stem}_W"))
    taps = leaves[name]
    before = self.inputs.setdefault(stem, [np.zeros_like(x)] * (len(taps) - 1))
    total = leaves[name.replace(f"conv_{stem}_W", f"conv_bias_{stem}_")].copy()
    for tap, value in zip(taps, [*before, x], strict=True):
      total += tap * value
    self.inputs[stem] = [*before, x][1:]
    return silu(total)


def attend(cfg, block, leaves, x, mine, owner, place):
  """Returns the outputs of all heads for the token at `place`; the first M are meta tokens."""
  K, J, E, M = block.K, block.J, block.E, cfg.meta
  if not block.shared:
    mine.keys.append([turn(x @ leaves["w_k_DKE"][:, k], place, block.rope) for k in range(K)])
    mine.values.append(np.einsum("d,dku->ku", x, leaves["w_v_DKU"]))
  near = block.window or place + 1
  seen = [s for s in range(place + 1) if s < M or place < M or place - s < near]
  out = np.zeros((K, J, block.U))
  for k in range(K):
    for j in range(J):
      query = turn(x @ leaves["w_q_DKJE"][:, k, j], place, block.rope)
      weight = np.exp([query @ owner.keys[s][k] / np.sqrt(E) for s in seen])
      values = np.array([owner.values[s][k] for s in seen])
      out[k, j] = weight @ values / weight.sum()
  return out


def mamba2(block, leaves, x, memory):
  """Returns the scan's output times silu(z)."""
  z, u, b, c = (
    np.tensordot(x, leaves[name], 1) for name in ("w_z_DGHP", "w_x_DGHP", "w_b_DGN", "w_c_DGN"))
  u, b, c = (memory.convolve(leaves, stem, v) for stem, v in zip("xbc", (u, b, c), strict=True))
  dt = softplus(np.tensordot(x, leaves["w_dt_DGH"], 1) + leaves["dt_bias_GH"])
  decay = np.exp(-dt * np.exp(leaves["a_log_GH"]))
  memory.state = (decay[..., None, None] * memory.state
                  + (dt[..., None] * u)[..., None] * b[:, None, None, :])
  y = (memory.state * c[:, None, None, :]).sum(-1) + leaves["skip_GH"][..., None] * u
  return y * silu(z)


def mamba1(cfg, leaves, x, memory):
  """Returns the scan's output times silu(z); every channel has a step and a state of its own."""
  z, u = x @ leaves["w_z_DGHP"][:, 0, :, 0], np.tensordot(x, leaves["w_x_DGHP"], 1)
  u = memory.convolve(leaves, "x", u)[0, :, 0]
  rank = rms(u @ leaves["in_rank_GHPR"][0, :, 0], leaves["rank_gain_R"], cfg.eps)
  b = rms(u @ leaves["in_b_GHPN"][0, :, 0], leaves["b_gain_GN"][0], cfg.eps)
  c = rms(u @ leaves["in_c_GHPN"][0, :, 0], leaves["c_gain_GN"][0], cfg.eps)
  dt = softplus(rank @ leaves["in_dt_RGH"][:, 0] + leaves["dt_bias_GH"][0])
  decay = np.exp(-dt[:, None] * np.exp(leaves["a_log_GHN"][0]))
  memory.state = decay * memory.state + (dt * u)[:, None] * b
  return (memory.state @ c + leaves["skip_GH"][0] * u) * silu(z)


def walk(cfg, params, token_L):
  """Returns logits of one document and what each block then remembers of the meta tokens alone."""
  params = models.wide(params)
  meta, embed = params["embed"]["meta_MD"], params["embed"]["w_embed_VD"]
  memories, rows, prefixes = [Memory() for _ in cfg.blocks], [], None
  for place, x in enumerate([*meta, *embed[np.asarray(token_L)]]):
    if place == len(meta):
      prefixes = [(list(m.keys), list(m.values), dict(m.inputs), m.state) for m in memories]
    for index, block in enumerate(cfg.blocks):
      leaves, mine = params["blocks"][f"{index:02d}"], memories[index]
      normed = rms(x, leaves["norm_gain_D"], cfg.eps)
      if isinstance(block, Mlp):
        up, gate = normed @ leaves["w_up_DF"], silu(normed @ leaves["w_gate_DF"])
        x = x + (gate * up) @ leaves["w_down_FD"]
        continue
      owner = memories[cfg.owners[index]]
      heads = attend(cfg, block.attention, leaves, normed, mine, owner, place)
      first = isinstance(block.ssm, Mamba1)
      channels = mamba1(cfg, leaves, normed, mine) if first else mamba2(
        block.ssm, leaves, normed, mine)
      heads = rms(heads.ravel(), leaves["attention_gain_KJU"].ravel(), cfg.eps)
      channels = rms(channels.ravel(), leaves["ssm_gain_GHP"].ravel(), cfg.eps)
      x = x + (heads + channels) / 2 @ leaves["w_out_YD"]
    rows.append(rms(x, params["final"]["norm_gain_D"], cfg.eps) @ embed.T)
  return np.array(rows[len(meta):]), prefixes
