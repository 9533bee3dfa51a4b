"""Random checkpoints that transformers saves itself, in which every part of a model matters.

At its default initialisation removing the whole SSM moves the logits of NemotronH by 1e-6, so
`in_proj` and `conv1d` are scaled up, and gains, D, A_log and dt_bias are drawn at random.
Making them needs torch and transformers; the golden folders of tests/interop come from

PYTHONPATH=tests python -m cases.checkpoints
"""

import json
import math
import pathlib
from typing import Any

import numpy as np

from hybridlm.interop import safetensors

GOLDEN = pathlib.Path(__file__).parents[1] / "interop" / "golden"
SCALE = 25.0
CHUNK = 8
LENGTHS = (1, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 7)
LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}
OUTER = {"vocab_size": 43, "hidden_size": 24, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
LAYERED = {"num_hidden_layers": 2, "intermediate_size": 28, "max_position_embeddings": 64}
BAMBA = OUTER | LAYERED | {
  "num_attention_heads": 6, "num_key_value_heads": 3, "mamba_d_state": 5, "mamba_d_conv": 4,
  "mamba_expand": 2, "mamba_chunk_size": CHUNK,
}
GRANITE = BAMBA | {
  "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 28,
  "attention_multiplier": 0.5, "layer_types": ["linear_attention", "full_attention"],
}
FALCON = OUTER | LAYERED | ATTENTION | {
  "mamba_d_state": 7, "mamba_d_conv": 4, "mamba_chunk_size": CHUNK, "pad_token_id": 0,
  "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
MULTIPLIED = {
  "embedding_multiplier": 5.66, "lm_head_multiplier": 0.35, "key_multiplier": 0.39,
  "attention_in_multiplier": 1.7, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.25,
  "ssm_out_multiplier": 0.24, "mlp_multipliers": [0.88, -1.4],
  "ssm_multipliers": [0.35, 2.5, 0.25, 1.4, 0.71],
}


def _nemotron_h(groups, heads, channels, state, **more) -> tuple[str, dict[str, Any]]:
  sizes = {
    "n_groups": groups, "mamba_num_heads": heads, "mamba_head_dim": channels,
    "ssm_state_size": state, "intermediate_size": 28, "chunk_size": CHUNK, "conv_kernel": 4,
    "layers_block_type": [
      "linear_attention", "mlp", "linear_attention", "full_attention", "mlp"
    ],
  }
  return "NemotronH", OUTER | ATTENTION | sizes | more


def _mamba2(groups, heads, channels, state, **more) -> tuple[str, dict[str, Any]]:
  sizes = {
    "n_groups": groups, "num_heads": heads, "head_dim": channels, "state_size": state,
    "expand": 2, "num_hidden_layers": 3, "chunk_size": CHUNK, "initializer_range": 0.02,
  }
  return "Mamba2", OUTER | sizes | more


def _falcon_h1(groups, heads, channels, **more) -> tuple[str, dict[str, Any]]:
  sizes = {
    "mamba_n_groups": groups, "mamba_n_heads": heads, "mamba_d_head": channels,
    "mamba_d_ssm": heads * channels,
  }
  return "FalconH1", FALCON | sizes | more


# Name -> the class's prefix and the arguments of its config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "nemotron_h_g1": _nemotron_h(1, 6, 7, 5),
  "nemotron_h_g2": _nemotron_h(2, 6, 5, 9, use_conv_bias=False, conv_kernel=3),
  "nemotron_h_g8": _nemotron_h(8, 16, 3, 4, time_step_min=0.02, layer_norm_epsilon=1e-3),
  "nemotron_h_bias": _nemotron_h(2, 4, 6, 5, mlp_bias=True, time_step_min=0.004, head_dim=14),
  "mamba2_g1": _mamba2(1, 8, 6, 5, tie_word_embeddings=True),
  "mamba2_g2": _mamba2(2, 6, 8, 7, use_conv_bias=False, time_step_limit=[0.005, 0.05]),
  "mamba2_g8": _mamba2(8, 16, 3, 5, layer_norm_epsilon=1e-3, time_step_limit=[0.0, 0.1]),
  "llama": ("Llama", OUTER | LAYERED | ATTENTION | {"tie_word_embeddings": True}),
  "llama3": (
    "Llama",
    OUTER | LAYERED | ATTENTION | {
      "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3,
    },
  ),
  "nemotron": ("Nemotron", OUTER | LAYERED | ATTENTION | {"head_dim": 12}),
  "nemotron_bias": (
    "Nemotron",
    OUTER | LAYERED | ATTENTION | {
      "head_dim": 16, "attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3,
      "tie_word_embeddings": True,
      "rope_parameters": {
        "rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.25
      },
    },
  ),
  "bamba_g1": (
    "Bamba",
    BAMBA | {
      "mamba_n_groups": 1, "mamba_n_heads": 6, "attn_layer_indices": [1],
      "tie_word_embeddings": True,
    },
  ),
  "bamba_g2": (
    "Bamba",
    BAMBA | {
      "mamba_n_groups": 2, "mamba_n_heads": 16, "attn_layer_indices": [0], "mamba_conv_bias": False,
      "attention_bias": True, "mlp_bias": True, "time_step_limit": [0.01, 0.08],
    },
  ),
  "granite_rope": (
    "GraniteMoeHybrid",
    GRANITE | {
      "mamba_n_groups": 2, "mamba_n_heads": 6, "position_embedding_type": "rope",
      "tie_word_embeddings": True,
    },
  ),
  "granite_plain": (
    "GraniteMoeHybrid",
    GRANITE | {"mamba_n_groups": 1, "mamba_n_heads": 8, "attention_bias": True},
  ),
  "granite_scaled": (
    "GraniteMoeHybrid",
    GRANITE | {
      "mamba_n_groups": 2, "mamba_n_heads": 6, "attention_bias": True, "tie_word_embeddings": True,
      "embedding_multiplier": 12, "attention_multiplier": 0.07, "residual_multiplier": 0.22,
      "logits_scaling": 3.0,
    },
  ),
  "falcon_h1_plain": _falcon_h1(1, 4, 6),
  "falcon_h1_norm": _falcon_h1(
    2, 6, 5, **MULTIPLIED, mamba_rms_norm=True, tie_word_embeddings=True, attention_bias=True
  ),
  "falcon_h1_gated": _falcon_h1(
    2, 6, 3, **MULTIPLIED, mamba_rms_norm=True, mamba_norm_before_gate=False, mlp_bias=True
  ),
  "falcon_h1_none": _falcon_h1(
    1, 8, 3, **MULTIPLIED, mamba_conv_bias=False, attention_bias=True, mlp_bias=True, head_dim=8
  ),
  "falcon_h1_tied": _falcon_h1(
    4, 8, 4, **(MULTIPLIED | {"lm_head_multiplier": -2.0}), tie_word_embeddings=True,
    time_step_limit=[0.01, 0.08], rms_norm_eps=1e-3,
  ),
  "falcon_h1_long": _falcon_h1(
    3, 6, 2, **MULTIPLIED, mamba_rms_norm=True, mamba_d_ssm=None, mamba_expand=3, mamba_n_heads=9,
    mamba_d_head="auto", rope_parameters=LLAMA3, mamba_d_conv=3,
  ),
}
GOLDENS = (
  "nemotron_h_g2", "mamba2_g2", "llama3", "nemotron_bias", "bamba_g1", "granite_rope",
  "falcon_h1_norm",
)


def make(case: str, *, seed: int = 0, **changes: Any):
  """Returns a random torch model of a case; `changes` override its config."""
  prefix, arguments = CASES[case]
  return build(prefix, arguments | changes, seed=seed)


def build(prefix: str, arguments: dict[str, Any], *, seed: int = 0):
  """Returns a random torch model of a class, from the arguments of its config."""
  import torch
  import transformers

  settings = getattr(transformers, f"{prefix}Config")(**arguments)
  torch.manual_seed(seed)
  model = getattr(transformers, f"{prefix}ForCausalLM")(settings).eval().float()
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      values = _drawn(prefix, name, parameter.numpy(), rng)
      parameter.copy_(torch.from_numpy(np.array(values, np.float32)))
  return model


def _drawn(prefix: str, name: str, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  folder, last = name.split(".")[-2:]
  if folder in ("in_proj", "conv1d") and last == "weight":
    return value * SCALE
  if "norm" in folder and last == "weight":
    # Steps of 1/1024, so that 1 + weight (LayerNorm1P) is exact in float32.
    low = -0.5 if prefix == "Nemotron" else 0.5
    return np.round(rng.uniform(low, low + 1, value.shape) * 1024) / 1024
  if last == "bias":
    return rng.normal(0, 0.2, value.shape)
  if last == "A_log":
    return np.log(rng.uniform(1, 16, value.shape))
  if last == "dt_bias":
    dt = np.exp(rng.uniform(math.log(2e-3), math.log(0.2), value.shape))
    return dt + np.log(-np.expm1(-dt))
  if last == "D":
    return rng.uniform(-1, 2, value.shape)
  return value * 3.0


def tokens(V: int, shape: tuple[int, int], seed: int = 3) -> np.ndarray:
  """Returns random token ids."""
  return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def logits(model, token_BL: np.ndarray) -> np.ndarray:
  """Returns a torch model's logits of every position."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(token_BL).long(), use_cache=False).logits.float().numpy()


def load(folder):
  """Returns transformers' model of a folder in float32; raises if a key is missing or unknown."""
  import torch
  import transformers

  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  wrong = {key: found for key, found in info.items() if found}
  if wrong:
    raise ValueError(f"{folder}: {wrong}")
  return model.eval()


def edited(source, target, *, config=None, tensors=None) -> pathlib.Path:
  """Writes a folder like another, with functions applied to its config and its tensors by name.

  Needs neither torch nor transformers. Returns the new folder.
  """
  plain = json.loads((pathlib.Path(source) / "config.json").read_text())
  held = {name: tensor.read() for name, tensor in safetensors.open_folder(source).items()}
  plain, held = (config or (lambda x: x))(plain), (tensors or (lambda x: x))(held)
  target = pathlib.Path(target)
  target.mkdir()
  (target / "config.json").write_text(json.dumps(plain))
  items = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in held.items()]
  safetensors.write_folder(target, items, metadata={})
  return target


def golden() -> None:
  """Writes the golden folders: config.json, model.safetensors, expected.npz."""
  for case in GOLDENS:
    folder, model = GOLDEN / case, make(case)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    token_BL = tokens(OUTER["vocab_size"], (2, LENGTHS[-1]))
    np.savez(folder / "expected.npz", token_BL=token_BL, logits_BLV=logits(model, token_BL))


if __name__ == "__main__":
  golden()
