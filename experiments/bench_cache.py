"""Bytes that decoding Hymba remembers, by kind, computed and measured, beside the paper's.

python -m experiments.bench_cache [--context=8192] [--out=docs/results/hymba_cache.md]

Computed: `hybridlm.cost`, from sizes alone. Measured: the arrays that `nn.serve` holds after a
prompt of that length, of one row; tracing tells their shapes without weights, then they are made.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import hybridlm
from experiments import artefacts, console, evaluation
from experiments.scan_report import table
from hybridlm import presets
from hybridlm.config import PRESETS, ModelConfig, attention_of
from hybridlm.nn import flow, serve
from hybridlm.prune import cost as costs

KINDS = (
  "keys and values, global", "keys and values, windows", "convolutions", "SSM states",
  "meta tokens: keys and values", "meta tokens: convolutions and SSM states",
)
LARGE, SMALL = "hymba_1p5b", "hymba_350m"
# Llama-3.2-3B as published: 28 layers, 8 key-value heads of width 128.
LLAMA = ModelConfig.from_pattern(
  "*-" * 28, V=128256, D=3072, F=8192, K=8, J=3, E=128, activation="swiglu", tied=True,
  dtype="bfloat16",
)
UNITS = (10**6, 1024 * 1000)
# MB of arXiv 2411.13676 at 8192 tokens in 16 bits: its roadmap (78.6, and the steps of its models
# of 300M) and its table 2 (79 and 918).
PAPER = {"hymba": 78.6, "llama": 918.0, "times": 11.67}
STEPS: Mapping[str, tuple[Mapping[str, Any], float]] = {
  "parallel heads, all global": (
    {"global_layers": (), "window": None, "kv_groups": (), "meta": 0}, 148.2),
  "+ windows but in three layers": ({"kv_groups": (), "meta": 0}, 41.2),
  "+ shared keys and values": ({"meta": 0}, 39.4),
  "+ meta tokens": ({}, 40.0),
}


def main(argv: Sequence[str]) -> None:
  """Prints the tables, and writes them to `--out`.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_integer("context", 8192, "Tokens of the one row.", flag_values=values)
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  if values.context < 1:
    raise ValueError(f"--context={values.context} must be at least 1")
  command = " ".join(["python -m experiments.bench_cache", *argv[1:]])
  text = "\n".join(["# The cache of Hymba", "", f"`{command}` on {evaluation.machine()}.", "",
                    *page(values.context), ""])
  print(text)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())


def computed(cfg: ModelConfig, context: int, ssm_dtype: str) -> dict[str, int]:
  """Returns the bytes of each kind, from sizes alone."""
  numbers = dict.fromkeys(KINDS, 0)
  for block, count in costs.distinct(cfg):
    part, attention = costs.part(cfg, block, context=context), attention_of(block)
    near = attention is not None and attention.window is not None
    for kind, held in zip((KINDS[near], *KINDS[2:5]), (*part[3:6], part.meta), strict=True):
      numbers[kind] += count * held
  found = {
    kind: costs.nbytes(held, ssm_dtype if kind == KINDS[3] else cfg.dtype)
    for kind, held in numbers.items()}
  return found | {KINDS[5]: found[KINDS[2]] + found[KINDS[3]] if cfg.meta else 0}


def measured(cfg: ModelConfig, context: int) -> dict[str, int]:
  """Returns the bytes of each kind, of the arrays of one row."""
  found = dict.fromkeys(KINDS, 0)
  states, prefixes = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), held(cfg, context))
  for block, state in zip(cfg.blocks, states, strict=True):
    attention = attention_of(block)
    near = attention is not None and attention.window is not None
    for path, array in jax.tree_util.tree_leaves_with_path(state):
      name = path[-1].name
      kind = 2 if name.startswith("conv") else 3 if name.startswith("ssm") else int(near)
      found[KINDS[kind]] += array.nbytes
  for prefix in jax.tree.leaves(prefixes, is_leaf=lambda v: isinstance(v, PREFIXES)):
    kind = KINDS[4 if isinstance(prefix, flow.AttentionPrefix) else 5]
    found[kind] += sum(array.nbytes for array in jax.tree.leaves(prefix))
  return found


PREFIXES = (flow.AttentionPrefix, flow.SsmPrefix)


@functools.cache
def held(cfg: ModelConfig, context: int) -> tuple[Any, Any]:
  """Returns the shapes of the states after a prompt of one row, and of what meta tokens leave."""
  def run(params, token_BL, length_B):
    weights = serve.fuse(cfg, params)
    _, cache = serve.prefill(cfg, weights, token_BL, length_B, size=context)
    return cache.blocks, weights.get("prefixes", {})

  params = jax.eval_shape(lambda: hybridlm.init(cfg))
  shape = jax.ShapeDtypeStruct
  return jax.eval_shape(run, params, shape((1, context), jnp.int32), shape((1,), jnp.int32))


def page(context: int) -> list[str]:
  """Returns the lines of the report."""
  cfg = PRESETS[LARGE]
  narrow, wide = (computed(cfg, context, dtype) for dtype in ("bfloat16", "float32"))
  real = measured(cfg, context)
  rows = [[kind, *(f"{found[kind]:,}" for found in (narrow, wide, real))] for kind in KINDS]
  rows.append(["all", *(f"{sum(found.values()):,}" for found in (narrow, wide, real))])
  header = ["bytes", "computed, SSM in 16 bits", "computed, SSM in 32 bits", "measured"]
  about = (
    f"`{LARGE}`, one row of {context} tokens; keys, values and convolutions in 16 bits. Measured: "
    "arrays of the states that a prompt leaves, whose SSM states this library holds in 32 bits. "
    "What meta tokens leave is held once for all rows; its convolutions and SSM states are read "
    "where a prompt begins."
  )
  llama = hybridlm.cost(LLAMA, context=context).kv_bytes
  return [about, "", *table(header, rows), "", *_beside(narrow, real, llama), "", *_said(), "",
          *_roadmap(context)]


def _beside(narrow: Mapping[str, int], real: Mapping[str, int], llama: int) -> list[str]:
  """Returns the table beside Llama's bytes."""
  cases = {
    "16-bit SSM, without meta tokens": sum(narrow[kind] for kind in KINDS[:4]),
    "16-bit SSM, with keys and values of meta tokens": sum(narrow[kind] for kind in KINDS[:5]),
    "16-bit SSM, all": sum(narrow.values()),
    "32-bit SSM, all, as measured": sum(real.values()),
  }
  rows = [["Llama-3.2-3B, computed", f"{llama:,}", *_units(llama), ""]]
  rows += [[f"`{LARGE}`: {name}", f"{size:,}", *_units(size), f"{llama / size:.2f}"]
           for name, size in cases.items()]
  return table(["", "bytes", *(f"/ {unit:,}" for unit in UNITS), "times smaller"], rows)


def _said() -> list[str]:
  """Returns which definition gives the published figures: those of 8192 tokens in 16 bits."""
  llama = hybridlm.cost(LLAMA, context=8192).kv_bytes
  own = sum(computed(PRESETS[LARGE], 8192, "bfloat16")[kind] for kind in KINDS[:4])
  return [
    f"The paper (arXiv 2411.13676, 8192 tokens, 16 bits) has {PAPER['hymba']} MB for Hymba-1.5B "
    f"(79 in its table 2), {PAPER['llama']:.0f} MB for Llama-3.2-3B and {PAPER['times']} times. "
    f"918 is Llama's bytes / 1,024,000 ({llama / UNITS[1]:.1f}); 78.6 is ours / 1,000,000 without "
    f"meta tokens ({own / UNITS[0]:.1f}); one over the other is "
    f"{llama / UNITS[1] / own * UNITS[0]:.2f}. In one unit, whichever, the ratio is that of the "
    f"bytes: {llama / own:.2f} without meta tokens.",
  ]


def _units(size: int) -> list[str]:
  return [f"{size / unit:.1f}" for unit in UNITS]


def _roadmap(context: int) -> list[str]:
  """Returns the table of the paper's steps."""
  rows, first = [], None
  for name, (changes, published) in STEPS.items():
    cfg = ModelConfig.from_pattern(**{**presets.SIZES[SMALL], **changes})
    size = sum(computed(cfg, context, "bfloat16").values())
    first = first or (size, published)
    rows.append([name, f"{size:,}", f"{size / first[0]:.1%}", f"{published:.1f}",
                 f"{published / first[1]:.1%}"])
  header = [f"`{SMALL}`, 16-bit SSM", "bytes", "of the first", "paper, MB", "of the first"]
  return [
    "The steps of the paper, computed. The paper's models of 300M have sizes that it does not say: "
    "compare shares.", "", *table(header, rows),
  ]


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
