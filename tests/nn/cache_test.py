"""Laws of the decode state: its sizes, and which position a slot holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm.nn import cache
from hybridlm.ops import attention_step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [7, 29])
def test_bytes_are_those_that_the_cost_says(size, dtype):
  for variant in ("untied", "layernorm"):  # the second has a window of 9
    cfg = models.make(variant, pattern="MC*-M*", dtype=dtype)
    cost = hybridlm.cost(cfg, context=size, batch=3)
    want = cost.kv_bytes + cost.conv_bytes + cost.ssm_bytes
    made = cache.empty(cfg, 3, size)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(made.blocks)) == want
    assert cache.nbytes(cfg, 3, size) == want


def test_blocks_without_a_state_have_none():
  made = cache.empty(models.make(pattern="M-C*-"), 2, 11)
  kinds = [type(state).__name__ for state in made.blocks]
  assert kinds == ["MambaState", "NoneType", "ConvState", "AttentionState", "NoneType"]
  np.testing.assert_array_equal(made.length_B, [0, 0])


@pytest.mark.parametrize("batch, size", [(0, 5), (2, 0)])
def test_a_cache_without_rows_or_room_is_refused(batch, size):
  with pytest.raises(ValueError, match=f"batch={batch} and size={size}"):
    cache.empty(models.make(), batch, size)


def test_a_slot_holds_the_newest_position_of_its_remainder():
  S = 5
  position_B = jnp.arange(13)
  held_BS = attention_step.held(position_B, S)
  for position, held_S in zip(position_B, np.asarray(held_BS), strict=True):
    for slot, held in enumerate(held_S):
      stored = [p for p in range(position + 1) if p % S == slot]
      assert held == stored[-1] if stored else held < 0


def test_a_stored_row_changes_its_slot_alone():
  rng = np.random.default_rng(0)
  for B in (1, 3):  # one row is written in another way
    cache_BKSE = rng.normal(size=(B, 2, 5, 4)).astype(np.float32)
    new_BKE = rng.normal(size=(B, 2, 4)).astype(np.float32)
    position_B = np.array([7, 5, 14], np.int32)[:B]
    want_BKSE = cache_BKSE.copy()
    for row, position in enumerate(position_B):
      want_BKSE[row, :, position % 5] = new_BKE[row]
    got_BKSE = jax.jit(attention_step.put)(cache_BKSE, new_BKE, position_B)
    np.testing.assert_array_equal(got_BKSE, want_BKSE)
