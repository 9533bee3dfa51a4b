"""Published models as plain sizes: what `ModelConfig.from_pattern` takes, by name."""

import math
from collections.abc import Mapping
from typing import Any

from hybridlm.rotary import Llama3Scaling, Rope


def _nemotron_h(pattern: str, *, D: int, F: int, J: int, H: int, P: int = 64, N: int = 128):
  """Nemotron-H and its successors: 8 SSM groups, 8 key-value heads of width 128, no RoPE."""
  return {
    "pattern": pattern, "V": 131072, "D": D, "F": F, "K": 8, "J": J, "E": 128, "G": 8, "H": H,
    "P": P, "N": N, "dt_limits": (0.001, math.inf), "dtype": "bfloat16", "remat": "block",
  }


def _nemotron_4(*, D: int, F: int, J: int):
  """Nemotron-4 and what Minitron made of it: squared ReLU, LayerNorm1P, half of a head turned."""
  return {
    "pattern": "*-" * 32, "V": 256000, "D": D, "F": F, "K": 8, "J": J, "E": 128,
    "rope": Rope(base=10000.0, rotary=64), "activation": "relu2", "norm": "layernorm1p",
    "context": 4096, "dtype": "bfloat16", "remat": "block",
  }


def _mamba2(*, D: int):
  """Mamba-2 of state-spaces: one group of 2 D / 64 heads, a multiple of 16 rows to embed."""
  return {
    "pattern": "M" * 48, "V": 50288, "vocabulary": 50277, "D": D, "G": 1, "H": D // 32, "P": 64,
    "N": 128, "tied": True, "dtype": "bfloat16", "remat": "block",
  }


def _hymba(*, layers: int, D: int, F: int, K: int, J: int):
  """Hymba: attention and Mamba-1 in every layer, values twice as wide as keys; 128 meta tokens.

  The first, the middle and the last layer see everything; layers between share keys and values by
  two, and by three where they are an odd number.
  """
  far = (0, layers // 2 - 1, layers - 1)
  groups: list[tuple[int, ...]] = []
  for after, before in zip(far, far[1:], strict=False):
    inner = list(range(after + 1, before))
    first = len(inner) % 2 + 2
    groups += [tuple(inner[:first]), *zip(inner[first::2], inner[first + 1 :: 2], strict=True)]
  return {
    "pattern": "=-" * layers, "V": 32001, "D": D, "F": F, "K": K, "J": J, "E": 64, "U": 128,
    "window": 1024, "rope": Rope(base=10000.0), "global_layers": far, "kv_groups": tuple(groups),
    "ssm": "mamba1", "H": 2 * D, "N": 16, "R": D // 16, "W": 4, "meta": 128, "tied": True,
    "activation": "swiglu", "eps": 1e-6, "context": 8192, "dtype": "bfloat16", "remat": "block",
  }


_LAYERS_52 = "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-"
_LAYERS_118 = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
_LAYERS_98 = (
  "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-"
  "M-M-M-M-M-"
)
_LAYERS_62 = "M-M-M-M*-" * 6 + "M-M-M-M-"
_LAYERS_56 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_LAYERS_42 = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"

# Patterns and sizes: arXiv 2504.03624, 2504.11409, 2508.14444, 2402.16819, 2407.14679, 2405.21060,
# 2407.21783, 2411.13676, 2507.22448 and the published configurations.
SIZES: Mapping[str, Mapping[str, Any]] = {
  "nemotron_h_8b": _nemotron_h(_LAYERS_52, D=4096, F=21504, J=4, H=16),
  "nemotron_h_4b": _nemotron_h(_LAYERS_52, D=3072, F=12288, J=4, H=14),
  "nemotron_h_47b": _nemotron_h(_LAYERS_98, D=8192, F=30720, J=8, H=32, N=256),
  "nemotron_h_56b": _nemotron_h(_LAYERS_118, D=8192, F=32768, J=8, H=32, N=256),
  "nemotron_nano_2_12b": _nemotron_h(_LAYERS_62, D=5120, F=20480, J=5, H=16, P=80),
  "nemotron_nano_2_9b": _nemotron_h(_LAYERS_56, D=4480, F=15680, J=5, H=16, P=80),
  "nemotron_3_nano_4b": _nemotron_h(_LAYERS_42, D=3136, F=12544, J=5, H=12, P=80),
  "nemotron_4_15b": _nemotron_4(D=6144, F=24576, J=6),
  "minitron_8b": _nemotron_4(D=4096, F=16384, J=6),
  "minitron_4b": _nemotron_4(D=3072, F=9216, J=3),
  "mamba2_1p3b": _mamba2(D=2048),
  "mamba2_780m": _mamba2(D=1536),
  "hymba_125m": _hymba(layers=24, D=512, F=1664, K=4, J=2),
  "hymba_350m": _hymba(layers=32, D=768, F=2432, K=4, J=3),
  "hymba_1p5b": _hymba(layers=32, D=1600, F=5504, K=5, J=5),
  "falcon_h1_0p5b": {
    "pattern": "=-" * 36, "V": 32784, "D": 1024, "F": 2048, "K": 2, "J": 4, "E": 64, "G": 1,
    "H": 24, "P": 64, "N": 128, "gate": "none", "fusion": "sum", "rope": Rope(base=1e11),
    "activation": "swiglu", "context": 16384, "dtype": "bfloat16", "remat": "block",
  },
  "llama_3p1_8b": {
    "pattern": "*-" * 32, "V": 128256, "D": 4096, "F": 14336, "K": 8, "J": 4, "E": 128,
    "rope": Rope(500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, context=8192)),
    "activation": "swiglu", "context": 131072, "dtype": "bfloat16", "remat": "block",
  },
}
