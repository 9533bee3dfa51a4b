"""What a config costs, from names and sizes alone: parameters, bytes by kind, FLOPs a token.

Everything is a sum over blocks, and equal blocks cost the same: a model costs as much time to
judge as it has distinct blocks.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from hybridlm import axes, config
from hybridlm.config import (
  Attention,
  Block,
  Mamba,
  Mamba1,
  ModelConfig,
  Parallel,
  attention_of,
  ssm_of,
)

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
    kv_bytes: keys and values of the attention blocks; those that blocks share count once.
    conv_bytes: the last W - 1 inputs of the convolutions.
    ssm_bytes: SSM states.
    meta_bytes: what meta tokens leave in keys, values, convolutions and SSM states: held once,
      whatever the batch.
    prefill_flops: a token of text, forward, averaged over the context; the meta tokens' own work
      is done once, before all text.
    decode_flops: a token, forward, at the end of the context.
  """

  parameters: int
  weight_bytes: int
  kv_bytes: int
  conv_bytes: int
  ssm_bytes: int
  meta_bytes: int
  prefill_flops: int
  decode_flops: int

  @property
  def state_bytes(self) -> int:
    """What decoding remembers: keys and values, convolutions, SSM states, and meta tokens'."""
    return self.kv_bytes + self.conv_bytes + self.ssm_bytes + self.meta_bytes

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
    meta: numbers that keys and values of meta tokens hold, for all sequences together.
  """

  parameters: int
  prefill_flops: float
  decode_flops: float
  kv: int
  conv: int
  ssm: int
  meta: int = 0


def _seen(block: Attention, context: int) -> tuple[int, float]:
  """Positions of text a query sees at the end of the context, and on average over it."""
  if block.window is None or block.window >= context:
    return context, (context + 1) / 2
  window = block.window
  return window, (window * (window + 1) / 2 + (context - window) * window) / context


def _block_flops(block: Block, context: int, chunk: int, meta: int) -> tuple[float, float]:
  """FLOPs a token beyond the projections: (prefill, decode)."""
  if isinstance(block, Parallel):
    parts = [_block_flops(p, context, chunk, meta) for p in (block.attention, block.ssm) if p]
    return sum(ahead for ahead, _ in parts), sum(step for _, step in parts)
  if isinstance(block, Attention):
    last, mean = _seen(block, context)
    width = 2.0 * block.K * block.J * (block.E + (block.U or block.E))
    return width * (meta + mean), width * (meta + last)
  conv = 2.0 * getattr(block, "W", 0) * channels(block)
  if isinstance(block, Mamba):
    inner = block.G * block.H * block.P
    step = 6.0 * inner * block.N
    within = 2.0 * chunk * (block.G * block.N + inner) + 4.0 * inner * block.N
    return conv + within, conv + step
  if isinstance(block, Mamba1):
    # Every state has a decay of its own: one more product than where a head shares it.
    step = 7.0 * block.H * block.N
    return conv + step, conv + step
  return conv, conv


def channels(block: Block) -> int:
  """Returns the channels that a block's convolution runs over; 0: it has none."""
  ssm = ssm_of(block)
  if ssm is None:
    return 0
  states = 2 * ssm.G * ssm.N if isinstance(ssm, Mamba) else 0
  return ssm.G * ssm.H * ssm.P + states


def _held(block: Block, context: int, meta: int) -> tuple[int, int, int, int]:
  """Numbers remembered of a sequence (keys and values, convolution, SSM), and once for all."""
  kv = conv = ssm = once = 0
  own, mixer = attention_of(block), ssm_of(block)
  if own is not None and not own.shared:
    width = own.K * (own.E + (own.U or own.E))
    kv, once = width * _seen(own, context)[0], width * meta
  if mixer is not None:
    conv = (mixer.W - 1) * channels(mixer)
    ssm = mixer.G * mixer.H * mixer.P * getattr(mixer, "N", 0)
  return kv, conv, ssm, once


@functools.lru_cache(maxsize=1 << 12)
def _outside(V: int, D: int, norm: str, tied: bool, meta: int) -> dict[str, int]:
  """Elements of each folder outside the blocks."""
  alone = ModelConfig(V=V, D=D, blocks=(config.Mlp(F=1),), norm=norm, tied=tied, meta=meta)
  tree = config.shapes(alone) | {"blocks": {}}
  return {name: sum(map(math.prod, leaves.values())) for name, leaves in tree.items()}


def outside(cfg: ModelConfig) -> int:
  """Returns the parameters of embedding, meta tokens, final norm and head (a tied head is one)."""
  return sum(_outside(cfg.V, cfg.D, cfg.norm, cfg.tied, cfg.meta).values())


@functools.lru_cache(maxsize=1 << 16)
def _part(block: Block, D: int, norm: str, context: int, chunk: int, meta: int) -> Part:
  sizes = {"D": D} | {letter: getattr(block, letter) for letter in block.axes}
  elements = {name: math.prod(axes.shape(name, sizes)) for name in block.leaves}
  products = (size for name, size in elements.items() if name.startswith(("w_", "in_")))
  matmul = 2.0 * sum(products)
  ahead, step = _block_flops(block, context, chunk, meta)
  kv, conv, ssm, once = _held(block, context, meta)
  parameters = sum(elements.values()) + _outside(1, D, norm, True, 0)["final"]
  return Part(parameters, matmul + ahead, matmul + step, kv, conv, ssm, once)


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
  return _part(block, cfg.D, cfg.norm, context, chunk, cfg.meta)


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
  parameters, kv, conv, ssm, meta = outside(cfg), 0, 0, 0, 0
  prefill = decode = 2.0 * cfg.D * cfg.V
  for block, count in distinct(cfg):
    each = part(cfg, block, context=context)
    parameters += count * each.parameters
    prefill, decode = prefill + count * each.prefill_flops, decode + count * each.decode_flops
    kv, conv, ssm = kv + count * each.kv, conv + count * each.conv, ssm + count * each.ssm
    meta += count * each.meta
  kinds = (kv_dtype or cfg.dtype, conv_dtype or cfg.dtype, ssm_dtype)
  once = (meta, conv, ssm) if cfg.meta else (0, 0, 0)
  return Cost(
    parameters=parameters,
    weight_bytes=nbytes(parameters, weight_dtype or cfg.dtype),
    kv_bytes=nbytes(kv * batch, kinds[0]),
    conv_bytes=nbytes(conv * batch, kinds[1]),
    ssm_bytes=nbytes(ssm * batch, kinds[2]),
    meta_bytes=sum(nbytes(*each) for each in zip(once, kinds, strict=True)),
    prefill_flops=int(prefill),
    decode_flops=int(decode),
  )
