"""Copies into another memory order change no value, and say which bytes come next."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import strides

SHAPES = [(), (0,), (3, 0, 2), (7,), (300, 517), (2, 3, 5), (4, 1, 6, 3), (5, 2, 3, 4)]


def views():
  """Every order of axes in memory, of arrays with and without gaps."""
  for shape in SHAPES:
    for order in itertools.permutations(range(len(shape))):
      base = np.arange(np.prod(shape, dtype=int)).reshape([shape[i] for i in order])
      view = base.transpose(np.argsort(order))
      yield view
      yield np.repeat(view, 2, axis=-1)[..., ::2] if shape else view


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.float16, jnp.bfloat16, np.float64])
def test_a_copy_in_c_order_holds_the_same_values_in_every_order_of_memory(dtype):
  for view in views():
    view = np.asarray(view % 127).astype(dtype, order="K")
    got = strides.contiguous(view)
    assert got.flags.c_contiguous and got.dtype == view.dtype and got.shape == view.shape
    assert got.tobytes() == view.tobytes()
    assert bytes(strides.raw(view)) == view.tobytes()


@pytest.mark.parametrize("size", [100, 999, 1 << 20])
def test_pieces_one_after_the_other_are_the_array(size):
  for view in views():
    got = list(strides.pieces(view, size))
    assert b"".join(bytes(strides.raw(piece)) for piece in got) == view.tobytes()
    assert all(np.shares_memory(piece, view) for piece in got if piece.size)


def test_an_array_that_is_one_run_of_memory_is_split_anywhere():
  assert [len(piece) for piece in strides.pieces(np.zeros((1, 2, 5)), 24)] == [3, 3, 3, 1]


def test_what_is_in_order_already_is_not_copied():
  array = np.arange(12).reshape(3, 4)
  assert strides.contiguous(array) is array
  assert strides.contiguous(array.T) is not array


def test_the_axes_are_named_from_slow_to_fast():
  array = np.empty((2, 3, 4)).transpose(2, 0, 1)
  assert strides.memory_order(array) == (1, 2, 0)
