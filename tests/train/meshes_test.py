"""One device and eight train the same student, under every kind of mesh and layout."""

import functools

import jax
import numpy as np
import pytest

import hybridlm
from experiments import bench_meshes as bench
from hybridlm import axes, layout

PATTERNS, STEPS = ("M*", "-"), 3
# AdamW hides a gradient that is counted twice, plain SGD does not.
KINDS = {"adamw": bench.KINDS["float64 AdamW"], "sgd": bench.Kind("float64", "sgd", 1e-9, 1e-9)}
# An embedding that is the head too has two gradients, and a norm a mean, over divided channels.
STUDENT = {"tied": True, "norm": "layernorm1p"}


@functools.cache
def alone():
  with jax.enable_x64(True):
    cfg = bench.models(PATTERNS)[0].replace(**STUDENT)
    first = jax.device_get(hybridlm.init(cfg, seed=0))
    return first, bench.train(None, KINDS, patterns=PATTERNS, steps=STEPS, **STUDENT)


def holds(case, share=1e-9):
  """Asserts that losses agree, and every leaf's movement up to a share; returns collectives."""
  with jax.enable_x64(True):
    many = bench.train(case, KINDS, patterns=PATTERNS, steps=STEPS, **STUDENT)
  first, ones = alone()
  for name, one in ones.items():
    np.testing.assert_allclose(many[name].losses, one.losses, rtol=share)
    got, start = dict(axes.leaves(many[name].params)), dict(axes.leaves(first))
    for path, leaf in axes.leaves(one.params):
      moved = np.abs(leaf - start[path]).max()
      assert moved > 0, path
      np.testing.assert_allclose(got[path], leaf, rtol=0, atol=share * moved, err_msg=path)
  return many["sgd"].collectives


def test_eight_devices_train_as_one_does_when_every_axis_is_divided():
  case = bench.Case({"fsdp": 2, "tensor": 2, "sequence": 2}, "sharded", "copied")
  used = holds(case)
  # Of the scan's states and the convolution's last inputs; of keys and values; of tokens.
  assert {"collective-permute", "all-gather", "all-to-all"} <= set(used)


@pytest.mark.slow
@pytest.mark.parametrize("case", [
  bench.Case({"tensor": 8}),
  bench.Case({"data": 2, "fsdp": 2, "tensor": 2}, "rows", "sharded"),
])
def test_heads_of_few_groups_and_other_layouts_train_as_one_device_does(case):
  used = holds(case)
  if case.student == layout.DEFAULT:
    # G=2 and K=2: heads are divided, groups are whole, and their norm's statistic is a sum.
    assert set(used) == {"all-reduce"}
