"""What a config costs, from names and sizes alone: parameters, bytes by kind, FLOPs a token."""

import dataclasses
import math

from hybridlm import axes, config
from hybridlm.config import Attention, Mamba, ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one model at one context and batch; a FLOP is one multiplication or one addition.

  Attributes:
    parameters: elements of the parameter tree.
    weight_bytes: of the weights in the compute dtype.
    kv_bytes: keys and values of the attention blocks, compute dtype.
    conv_bytes: the last W - 1 inputs of the convolutions, compute dtype.
    ssm_bytes: SSM states, float32.
    prefill_flops: a token, forward, averaged over the context.
    decode_flops: a token, forward, at the end of the context.
  """

  parameters: int
  weight_bytes: int
  kv_bytes: int
  conv_bytes: int
  ssm_bytes: int
  prefill_flops: int
  decode_flops: int

  @property
  def total_bytes(self) -> int:
    """Weights and decode state together."""
    return self.weight_bytes + self.kv_bytes + self.conv_bytes + self.ssm_bytes


def _seen(block: Attention, context: int) -> tuple[int, float]:
  """Positions a query sees at the end of the context, and on average over it."""
  if block.window is None or block.window >= context:
    return context, (context + 1) / 2
  window = block.window
  return window, (window * (window + 1) / 2 + (context - window) * window) / context


def _block_flops(block: config.Block, context: int, chunk: int) -> tuple[float, float]:
  """FLOPs a token beyond the projections: (prefill, decode)."""
  if isinstance(block, Attention):
    last, mean = _seen(block, context)
    width = 4.0 * block.K * block.J * block.E
    return width * mean, width * last
  if isinstance(block, Mamba):
    inner = block.G * block.H * block.P
    conv = 2.0 * block.W * (inner + 2 * block.G * block.N)
    step = 6.0 * inner * block.N
    within = 2.0 * chunk * (block.G * block.N + inner) + 4.0 * inner * block.N
    return conv + within, conv + step
  return 0.0, 0.0


def cost(cfg: ModelConfig, *, context: int = 8192, batch: int = 1) -> Cost:
  """Returns the cost of a model with `batch` sequences of `context` tokens each.

  Raises:
    ValueError: `context` or `batch` below 1.

  >>> hybridlm.cost(hybridlm.config.PRESETS["nemotron_h_8b"]).parameters
  8100852736
  """
  if context < 1 or batch < 1:
    raise ValueError(f"cost: context={context} and batch={batch} must be at least 1")
  width = BYTES[cfg.dtype]
  kv = conv = ssm = 0
  chunk = min(cfg.chunk or config.CHUNK, context)
  prefill = decode = 2.0 * cfg.D * cfg.V
  for index, block in enumerate(cfg.blocks):
    shapes = (axes.shape(name, cfg.sizes(index)) for name in block.leaves if name.startswith("w_"))
    matmul = 2 * sum(math.prod(shape) for shape in shapes)
    ahead, step = _block_flops(block, context, chunk)
    prefill, decode = prefill + matmul + ahead, decode + matmul + step
    if isinstance(block, Attention):
      kv += 2 * block.K * block.E * _seen(block, context)[0] * width
    if isinstance(block, Mamba):
      inner = block.G * block.H * block.P
      conv += (block.W - 1) * (inner + 2 * block.G * block.N) * width
      ssm += inner * block.N * 4
  parameters = config.parameters(cfg)
  return Cost(
    parameters=parameters,
    weight_bytes=parameters * width,
    kv_bytes=kv * batch,
    conv_bytes=conv * batch,
    ssm_bytes=ssm * batch,
    prefill_flops=int(prefill),
    decode_flops=int(decode),
  )
