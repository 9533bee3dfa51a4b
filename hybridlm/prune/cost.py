"""What a config costs, from names and sizes alone: parameters, bytes by kind, FLOPs a token.

Everything is a sum over blocks, and equal blocks cost the same: a model costs as much time to
judge as it has distinct blocks.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from hybridlm import axes, config
from hybridlm.config import Attention, Block, GatedConv, Mamba, ModelConfig

# Bits a number takes; scales of quantised blocks of numbers are not counted.
BITS = {
  "float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8, "int8": 8,
  "float4_e2m1fn": 4, "int4": 4,
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one model at one context and batch; a FLOP is one multiplication or one addition.

  Attributes:
    parameters: elements of the parameter tree.
    weight_bytes: of the weights.
    kv_bytes: keys and values of the attention blocks.
    conv_bytes: the last W - 1 inputs of the convolutions.
    ssm_bytes: SSM states.
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
  def state_bytes(self) -> int:
    """What decoding remembers: keys and values, convolutions and SSM states."""
    return self.kv_bytes + self.conv_bytes + self.ssm_bytes

  @property
  def total_bytes(self) -> int:
    """Weights and decode state together."""
    return self.weight_bytes + self.state_bytes


class Part(NamedTuple):
  """One block's share of a model.

  Attributes:
    parameters: elements, its norm included.
    prefill_flops: a token, averaged over the context.
    decode_flops: a token, at the end of the context.
    kv: numbers that keys and values hold, a sequence.
    conv: numbers that the convolution holds, a sequence.
    ssm: numbers that the SSM state holds, a sequence.
  """

  parameters: int
  prefill_flops: float
  decode_flops: float
  kv: int
  conv: int
  ssm: int


def _seen(block: Attention, context: int) -> tuple[int, float]:
  """Positions a query sees at the end of the context, and on average over it."""
  if block.window is None or block.window >= context:
    return context, (context + 1) / 2
  window = block.window
  return window, (window * (window + 1) / 2 + (context - window) * window) / context


def _block_flops(block: Block, context: int, chunk: int) -> tuple[float, float]:
  """FLOPs a token beyond the projections: (prefill, decode)."""
  if isinstance(block, Attention):
    last, mean = _seen(block, context)
    width = 4.0 * block.K * block.J * block.E
    return width * mean, width * last
  conv = 2.0 * getattr(block, "W", 0) * channels(block)
  if isinstance(block, Mamba):
    inner = block.G * block.H * block.P
    step = 6.0 * inner * block.N
    within = 2.0 * chunk * (block.G * block.N + inner) + 4.0 * inner * block.N
    return conv + within, conv + step
  return conv, conv


def channels(block: Block) -> int:
  """Returns the channels that a block's convolution runs over; 0: it has none."""
  if not isinstance(block, (Mamba, GatedConv)):
    return 0
  states = 2 * block.G * block.N if isinstance(block, Mamba) else 0
  return block.G * block.H * block.P + states


@functools.lru_cache(maxsize=1 << 12)
def _outside(V: int, D: int, norm: str, tied: bool) -> int:
  alone = ModelConfig(V=V, D=D, blocks=(config.Mlp(F=1),), norm=norm, tied=tied)
  tree = config.shapes(alone) | {"blocks": {}}
  return sum(math.prod(shape) for _, shape in axes.leaves(tree))


def outside(cfg: ModelConfig) -> int:
  """Returns the parameters of embedding, final norm and head (a tied head counts once)."""
  return _outside(cfg.V, cfg.D, cfg.norm, cfg.tied)


@functools.lru_cache(maxsize=1 << 16)
def _part(block: Block, D: int, norm: str, context: int, chunk: int) -> Part:
  alone = ModelConfig(V=1, D=D, blocks=(block,), norm=norm)
  sizes = alone.sizes(0)
  shapes = (axes.shape(name, sizes) for name in block.leaves if name.startswith("w_"))
  matmul = 2.0 * sum(math.prod(shape) for shape in shapes)
  ahead, step = _block_flops(block, context, chunk)
  kv = conv = ssm = 0
  if isinstance(block, Attention):
    kv = 2 * block.K * block.E * _seen(block, context)[0]
  if isinstance(block, (Mamba, GatedConv)):
    conv = (block.W - 1) * channels(block)
  if isinstance(block, Mamba):
    ssm = block.G * block.H * block.P * block.N
  elements = config.parameters(alone) - _outside(1, D, norm, False)
  return Part(elements, matmul + ahead, matmul + step, kv, conv, ssm)


def distinct(cfg: ModelConfig) -> list[tuple[Block, int]]:
  """Returns each distinct block of a model, in order, and how often it is there."""
  by_id: dict[int, list] = {}
  for block in cfg.blocks:  # equal blocks are mostly one object: cheaper to tell than equality
    by_id.setdefault(id(block), [block, 0])[1] += 1
  found: dict[Block, int] = {}
  for block, count in by_id.values():
    found[block] = found.get(block, 0) + count
  return list(found.items())


def part(cfg: ModelConfig, block: Block, *, context: int) -> Part:
  """Returns what one block of a model costs at a context."""
  chunk = min(cfg.chunk or config.CHUNK, context)
  return _part(block, cfg.D, cfg.norm, context, chunk)


def nbytes(numbers: int, dtype: str) -> int:
  """Returns the bytes that numbers of a dtype take.

  Raises:
    ValueError: a dtype that is not known here.
  """
  if dtype not in BITS:
    raise ValueError(f"cost: dtype {dtype!r} is not one of {', '.join(BITS)}")
  return -(-numbers * BITS[dtype] // 8)


def cost(
  cfg: ModelConfig,
  *,
  context: int = 8192,
  batch: int = 1,
  weight_dtype: str | None = None,
  kv_dtype: str | None = None,
  conv_dtype: str | None = None,
  ssm_dtype: str = "float32",
) -> Cost:
  """Returns the cost of a model with `batch` sequences of `context` tokens each.

  Args:
    cfg: the model.
    context: tokens a sequence.
    batch: sequences whose decode state is held.
    weight_dtype: of all weights; None: the compute dtype, as for the next two.
    kv_dtype: of keys and values.
    conv_dtype: of the convolutions' last inputs.
    ssm_dtype: of the SSM states; this library keeps them in float32, and so does transformers.

  Raises:
    ValueError: `context` or `batch` below 1, or an unknown dtype.

  >>> hybridlm.cost(hybridlm.config.PRESETS["nemotron_h_8b"]).parameters
  8100852736
  """
  if context < 1 or batch < 1:
    raise ValueError(f"cost: context={context} and batch={batch} must be at least 1")
  parameters, kv, conv, ssm = outside(cfg), 0, 0, 0
  prefill = decode = 2.0 * cfg.D * cfg.V
  for block, count in distinct(cfg):
    each = part(cfg, block, context=context)
    parameters += count * each.parameters
    prefill, decode = prefill + count * each.prefill_flops, decode + count * each.decode_flops
    kv, conv, ssm = kv + count * each.kv, conv + count * each.conv, ssm + count * each.ssm
  return Cost(
    parameters=parameters,
    weight_bytes=nbytes(parameters, weight_dtype or cfg.dtype),
    kv_bytes=nbytes(kv * batch, kv_dtype or cfg.dtype),
    conv_bytes=nbytes(conv * batch, conv_dtype or cfg.dtype),
    ssm_bytes=nbytes(ssm * batch, ssm_dtype),
    prefill_flops=int(prefill),
    decode_flops=int(decode),
  )
