"""The benchmark of blocks compares what it times: values and gradients of both sides."""

import numpy as np
import pytest

from experiments import bench_blocks

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TINY = {
  "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 6,
  "num_key_value_heads": 2, "head_dim": 10, "mamba_num_heads": 8, "mamba_head_dim": 6,
  "ssm_state_size": 5,
}


def test_both_sides_of_every_pair_give_the_same_values():
  block = {**TINY, "hybrid_override_pattern": "M"}
  model = {**TINY, "hybrid_override_pattern": "M-*", "n_groups": 2}
  pairs = [*bench_blocks.blocks(block, [37]), *bench_blocks.models(model, [(3, 21)])]
  assert len(pairs) == 2 * len(bench_blocks.GROUPS) + 2
  for pair in pairs:
    bench_blocks.compare(pair, (4, 16))


def test_sides_that_differ_are_not_timed():
  theirs = bench_blocks.Side(lambda chunk: [np.ones(3)])
  ours = bench_blocks.Side(lambda: [np.array([1, 1, 1.01])])
  pair = bench_blocks.Pair("x", theirs, ours)
  with pytest.raises(RuntimeError, match="x, chunk 7: 1.0e-02 of the largest value apart"):
    bench_blocks.table([pair], (7,), 1)
