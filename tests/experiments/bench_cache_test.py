"""Laws of the report on the cache: what is computed is what decoding holds, kind by kind."""

import pytest

from cases import models
from experiments import bench_cache
from hybridlm.config import PRESETS


@pytest.mark.parametrize("ssm", models.SIDES)
def test_bytes_of_every_kind_are_those_of_the_arrays_that_decoding_holds(ssm):
  cfg = models.hymba(
    ssm, pattern="===", dtype="bfloat16", global_layers=(0,), kv_groups=((1, 2),))
  found = bench_cache.measured(cfg, 29)  # beyond the window
  assert found == bench_cache.computed(cfg, 29, "float32")
  assert all(found.values())


def test_the_published_cache_is_that_of_the_preset_without_meta_tokens():
  found = bench_cache.computed(PRESETS["hymba_1p5b"], 8192, "bfloat16")
  width, inner = 2 * 5 * (64 + 128), 2 * 1600  # bytes of a token's keys and values; channels
  want = (3 * 8192 * width, 14 * 1024 * width, 32 * 3 * inner * 2, 32 * inner * 16 * 2)
  assert tuple(found[kind] for kind in bench_cache.KINDS[:4]) == want
  assert round(sum(want) / 1e6, 1) == bench_cache.PAPER["hymba"]
  llama = 28 * 2 * 8 * 128 * 8192 * 2
  assert round(llama / 1.024e6) == bench_cache.PAPER["llama"]
  assert round(llama / 1.024 / sum(want), 2) == bench_cache.PAPER["times"]
