"""Cost is arithmetic over names and sizes."""

import jax
import pytest

import hybridlm
from cases import models
from hybridlm.config import PRESETS


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_the_cost_of_a_config_equals_the_elements_in_its_tree(variant):
  cfg = models.make(variant)
  elements = sum(leaf.size for leaf in jax.tree.leaves(hybridlm.init(cfg)))
  assert hybridlm.cost(cfg).parameters == elements


def test_bytes_of_the_published_8b_by_kind():
  cost = hybridlm.cost(PRESETS["nemotron_h_8b"], context=8192, batch=2)
  assert cost.weight_bytes == 2 * 8_100_852_736
  assert cost.kv_bytes == 2 * 4 * 2 * 8 * 128 * 8192 * 2
  assert cost.conv_bytes == 2 * 24 * 3 * (8192 + 2 * 8 * 128) * 2
  assert cost.ssm_bytes == 2 * 24 * 128 * 64 * 128 * 4
  assert cost.total_bytes == (cost.weight_bytes + cost.kv_bytes + cost.conv_bytes + cost.ssm_bytes)


def test_a_windows_cache_and_work_stop_growing_with_the_context():
  near, far = (
    hybridlm.cost(models.make(pattern="*", window=100), context=context)
    for context in (100, 100_000)
  )
  assert near.kv_bytes == far.kv_bytes and near.decode_flops == far.decode_flops
  full = hybridlm.cost(models.make(pattern="*"), context=100_000)
  assert full.kv_bytes == 1000 * far.kv_bytes


def test_flops_of_a_feed_forward_model_are_two_a_weight():
  cfg = models.make(pattern="-")
  assert hybridlm.cost(cfg).prefill_flops == 2 * (2 * 16 * 24 + 16 * 31)


def test_a_context_below_one_is_refused():
  with pytest.raises(ValueError, match="context=0"):
    hybridlm.cost(models.make(), context=0)
