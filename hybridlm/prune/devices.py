"""What accelerators can do at most, one chip each: published peaks, not measurements.

Dense rates without structured sparsity. Float32 means whole products: of a GPU's plain cores; no
page gives them for a TPU, where one takes six bfloat16 passes, and so that is what stands here.
JAX's default precision rounds the factors on these chips, and may run faster. Sources, by name:
"TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" (Google Cloud TPU documentation); "NVIDIA A100 Tensor Core
GPU", "NVIDIA H100 Tensor Core GPU", "NVIDIA H200 Tensor Core GPU", "NVIDIA A10G", "NVIDIA L4 Tensor
Core GPU" and "NVIDIA L40S" data sheets; "NVIDIA Ada GPU Architecture" and "NVIDIA RTX Blackwell GPU
Architecture" white papers (bfloat16 with float32 accumulation).
"""

from collections.abc import Mapping
from typing import NamedTuple

Rate = int | float
PASSES = 6  # bfloat16 products that make a float32 one on a TPU


class Device(NamedTuple):
  """One chip.

  Attributes:
    flops: compute dtype -> FLOP/s of dense products.
    bandwidth: bytes/s of its memory.
    memory: bytes.
  """

  flops: Mapping[str, float]
  bandwidth: float
  memory: float

  def peak(self, dtype: str) -> float:
    """Returns the FLOP/s of products in a compute dtype.

    Raises:
      ValueError: no figure for that dtype.
    """
    if dtype not in self.flops:
      raise ValueError(f"device: no peak for dtype {dtype!r}, known: {', '.join(self.flops)}")
    return self.flops[dtype]


def _gpu(bfloat16: Rate, float32: Rate, bandwidth: Rate, memory: Rate) -> Device:
  """A GPU: TFLOP/s, GB/s and GB."""
  flops = {"bfloat16": bfloat16 * 1e12, "float16": bfloat16 * 1e12, "float32": float32 * 1e12}
  return Device(flops, bandwidth * 1e9, memory * 1e9)


def _tpu(bfloat16: Rate, bandwidth: Rate, memory: Rate) -> Device:
  """A TPU chip: TFLOP/s, GB/s and bytes."""
  flops = {"bfloat16": bfloat16 * 1e12, "float32": bfloat16 * 1e12 / PASSES}
  return Device(flops, bandwidth * 1e9, memory)


DEVICES: Mapping[str, Device] = {
  "v4": _tpu(275, 1228, 32 * 2**30),
  "v5e": _tpu(197, 819, 16e9),
  "v5p": _tpu(459, 2765, 95 * 2**30),
  "v6e": _tpu(918, 1640, 32e9),
  "a100": _gpu(312, 19.5, 2039, 80),  # SXM, 80 GB
  "h100": _gpu(989.4, 67, 3350, 80),  # SXM
  "h200": _gpu(989.4, 67, 4800, 141),  # SXM
  "a10g": _gpu(70, 35, 600, 24),
  "l4": _gpu(121, 30.3, 300, 24),
  "l40s": _gpu(362, 91.6, 864, 48),
  "rtx4090": _gpu(165.2, 82.6, 1008, 24),
  "rtx5090": _gpu(209.5, 104.8, 1792, 32),
}

# What JAX calls them; other models of a family (PCIe, NVL, MIG slices) have other peaks.
KINDS: Mapping[str, str] = {
  "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
  "TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A10G": "a10g", "NVIDIA L4": "l4",
  "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "rtx4090",
  "NVIDIA GeForce RTX 5090": "rtx5090",
}


def of_kind(kind: str) -> Device | None:
  """Returns the chip that JAX's `device_kind` names; None: one that is not in the table."""
  return DEVICES[KINDS[kind]] if kind in KINDS else None


def device(name: str) -> Device:
  """Returns a chip by name.

  Raises:
    ValueError: a name that is not in the table.
  """
  if name not in DEVICES:
    raise ValueError(f"device {name!r} is not one of {', '.join(DEVICES)}")
  return DEVICES[name]
