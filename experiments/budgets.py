"""From a config's numbers to the budget, the rules and the source of seconds of a search."""

import pathlib
from collections.abc import Iterable

from ml_collections import ConfigDict

from experiments import exchange, timings
from experiments.mistakes import about
from hybridlm.config import ModelConfig
from hybridlm.prune import devices
from hybridlm.prune.constraints import TIMED, Budget, Rules, Source

ANY = "any"  # family that can express a model: whichever


def budget(c: ConfigDict) -> Budget:
  """Returns what `budget.*` of a config bounds.

  Raises:
    ValueError: a bound that is not positive, or an unknown dtype or device.
  """
  given = c.budget
  scaled = {
    "memory_bytes": (given.memory_gib, 2**30), "prefill_seconds": (given.prefill_ms, 1e-3),
    "decode_seconds": (given.decode_ms, 1e-3),
  }
  bounds = {name: None if value is None else value * unit for name, (value, unit) in scaled.items()}
  if bounds["memory_bytes"] is not None:
    bounds["memory_bytes"] = int(bounds["memory_bytes"])
  plain = ("parameters", "tokens_per_second", "context", "batch", "weight_dtype", "kv_dtype",
           "conv_dtype", "ssm_dtype")
  with about("budget"):
    if given.device:
      devices.device(given.device)
    return Budget(**bounds, **{name: given[name] for name in plain})


def rules(c: ConfigDict) -> Rules:
  """Returns what `rules.*` of a config asks for.

  Raises:
    ValueError: a value that no rule can have.
  """
  given = c.rules
  divisors = {name: value for name, value in given.divisors.items() if value != 1}
  family = None if given.family == ANY else given.family

  def check(cfg: ModelConfig) -> None:
    exchange.check(cfg, "hf", family)

  with about("rules"):
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given.floors):
      raise ValueError(f"floors={given.floors!r}: not pairs of a block kind and a number")
    return Rules(
      divisors=divisors, floors=dict(given.floors), conv_multiple=given.conv_multiple,
      shards=tuple(given.shards), inner_share=float(given.inner_share),
      check=None if given.family is None else check,
    )


def source(
  c: ConfigDict, cfgs: Iterable[ModelConfig], *, cache: pathlib.Path, needed: bool = False
) -> Source:
  """Returns where seconds come from: a named device, or timings of this one; None: nowhere.

  Args:
    c: the config.
    cfgs: models whose blocks are measured where no device is named and they were not yet: the
      parent, and some of the smallest, so that what lies between can be told from them.
    cache: folder that workdirs share; timings are kept there.
    needed: measure even where no bound is on time.

  Raises:
    ValueError: an unknown device.
  """
  given = c.budget
  if given.device:
    with about("budget"):
      return devices.device(given.device)
  if not needed and not budget(c).bounds.keys() & set(TIMED):
    return None
  return timings.table(
    cache, list(cfgs), contexts=(given.context,), batches=(given.batch,), turns=timings.TURNS
  )
