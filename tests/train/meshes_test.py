"""One device and eight train the same student, under every kind of mesh and layout."""

import functools

import jax
import numpy as np
import pytest

from experiments import bench_meshes as bench
from hybridlm import layout

PATTERNS, STEPS = ("M*", "-"), 3


@functools.cache
def alone(name, patterns):
  with jax.enable_x64(bench.KINDS[name].dtype == "float64"):
    return bench.train(None, {name: bench.KINDS[name]}, patterns=patterns, steps=STEPS)[name]


def holds(case, name, patterns=PATTERNS):
  """Asserts that a case keeps to the bounds of its kind; returns its collectives."""
  kind = bench.KINDS[name]
  with jax.enable_x64(kind.dtype == "float64"):
    many = bench.train(case, {name: kind}, patterns=patterns, steps=STEPS)[name]
  loss, params = bench.apart(alone(name, patterns), many)
  assert loss <= kind.loss
  assert params <= (np.inf if kind.parameters is None else kind.parameters)
  return many.collectives


def test_eight_devices_train_as_one_does_when_every_axis_is_divided():
  case = bench.Case({"fsdp": 2, "tensor": 2, "sequence": 2}, "sharded", "copied")
  used = holds(case, "float64 AdamW")
  # Of the scan's states and the convolution's last inputs; of keys and values; of tokens.
  assert {"collective-permute", "all-gather", "all-to-all"} <= set(used)


@pytest.mark.slow
@pytest.mark.parametrize("case,name", [
  (bench.Case({"tensor": 8}), "float32 SGD"),
  (bench.Case({"data": 2, "fsdp": 2, "tensor": 2}, "rows", "sharded"), "float32 SGD"),
])
def test_heads_of_few_groups_and_other_layouts_train_as_one_device_does(case, name):
  used = holds(case, name)
  if case.student == layout.DEFAULT:
    # G=2 and K=2: heads are divided, groups are whole, and their norm's statistic is a sum.
    assert set(used) == {"all-reduce"}
