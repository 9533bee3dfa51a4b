"""The conversion engine: where each number of a published tensor goes, and that it comes back."""

import itertools

import numpy as np
import pytest

from hybridlm import axes
from hybridlm.interop import layout
from hybridlm.interop.families import FAMILIES
from hybridlm.interop.layout import Piece

SIZES = {"V": 31, "D": 16, "F": 24, "K": 2, "J": 3, "E": 10, "G": 2, "H": 4, "P": 6, "N": 5, "W": 7}
PIECES = {
  piece.layout + piece.leaf: piece
  for family in FAMILIES.values()
  for table in (family.outer, *family.blocks.values())
  for pieces in table.values()
  for piece in pieces
}


def published(piece, seed=0):
  return np.random.default_rng(seed).normal(size=piece.shape(SIZES)).astype(np.float32)


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_what_is_read_is_written_back(piece):
  there = published(piece)
  leaf = layout.to_leaf(piece, there, SIZES)
  assert leaf.shape == axes.shape(piece.name, SIZES)
  back = layout.to_published(piece, leaf, SIZES)
  assert back.shape == there.shape
  np.testing.assert_allclose(back, there, atol=2e-7 if piece.change else 0)


def test_rows_of_a_projection_are_group_head_channel_in_that_order():
  there = np.arange(48 * 16).reshape(48, 16)
  leaf = layout.to_leaf(Piece("w_x_DGHP", "GHP D"), there, SIZES)
  for g, h, p, d in itertools.product(range(2), range(4), range(6), (0, 5, 15)):
    assert leaf[d, g, h, p] == there[(g * 4 + h) * 6 + p, d]


def test_columns_of_an_output_projection_are_its_heads():
  there = np.arange(16 * 60).reshape(16, 60)
  leaf = layout.to_leaf(Piece("w_o_KJED", "D KJE"), there, SIZES)
  assert leaf[1, 2, 7, 9] == there[9, (1 * 3 + 2) * 10 + 7]


def test_taps_lose_the_dimension_of_size_one_and_come_first():
  piece = Piece("conv_b_WGN", "GN 1 W")
  there = np.arange(10 * 7).reshape(10, 1, 7)
  assert piece.shape(SIZES) == (10, 1, 7)
  assert layout.to_leaf(piece, there, SIZES)[6, 1, 3] == there[1 * 5 + 3, 0, 6]


def test_reading_makes_no_copy():
  for piece in PIECES.values():
    there = published(piece)
    assert np.shares_memory(layout.to_leaf(piece, there, SIZES), there) == (piece.change is None)


def test_a_gain_beside_one_is_stored_as_the_whole_factor_in_float32():
  piece = Piece("norm_gain_D", "D", "one_plus")
  there = np.linspace(-0.5, 0.5, 16).astype(np.float16)
  leaf = layout.to_leaf(piece, there, SIZES)
  assert leaf.dtype == np.float32 == piece.dtype(there.dtype)
  np.testing.assert_array_equal(leaf, there.astype(np.float32) + 1)


def test_pieces_are_joined_by_rows():
  pieces = (Piece("w_z_DGHP", "GHP D"), Piece("w_b_DGN", "GN D"), Piece("w_dt_DGH", "GH D"))
  assert layout.shape(pieces, SIZES) == (48 + 10 + 8, 16)
  assert layout.rows(pieces, SIZES) == [(0, 48), (48, 58), (58, 66)]
  with pytest.raises(ValueError, match="cannot be joined"):
    layout.shape((*pieces, Piece("conv_b_WGN", "GN 1 W")), SIZES)


@pytest.mark.parametrize("text", ["GH D", "GHPP D", "GHP D N", "GHP"])
def test_a_layout_holds_each_axis_of_its_leaf_once(text):
  with pytest.raises(ValueError, match="does not hold each axis of 'w_x_DGHP' once"):
    Piece("w_x_DGHP", text)


def test_what_has_another_shape_or_an_unknown_change_is_refused():
  piece = Piece("w_up_DF", "F D")
  with pytest.raises(ValueError, match=r"w_up_DF.*\(16, 24\), layout 'F D' says \(24, 16\)"):
    layout.to_leaf(piece, np.zeros((16, 24)), SIZES)
  with pytest.raises(ValueError, match=r"w_up_DF.*\(24, 16\), its letters say \(16, 24\)"):
    layout.to_published(piece, np.zeros((24, 16)), SIZES)
  with pytest.raises(ValueError, match="change 'squared' is not one of one_plus"):
    Piece("norm_gain_D", "D", "squared")
