"""Ids kept between runs are the ids that were made, or an error."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hybridlm.data import cache, packing

TOKENS = packing.join([np.array([1, 2, 3]), np.array([4])], eot=9, V=10)


def equal(one, other):
  return (np.array_equal(one.flat, other.flat) and one.flat.dtype == other.flat.dtype
          and np.array_equal(one.start, other.start) and one.eot == other.eot)


def never():
  raise AssertionError("made again")


def test_kept_tokens_come_back_without_being_made_again(tmp_path):
  folder = tmp_path / "deep" / "cache"
  assert equal(cache.get(folder, "key", lambda: TOKENS), TOKENS)
  assert equal(cache.get(folder, "key", never), TOKENS)
  assert [p.name for p in folder.iterdir()] == ["tokens-key.npz"]


def test_another_key_is_made_anew_and_no_folder_keeps_nothing(tmp_path):
  other = packing.join([np.array([5])], eot=9, V=10)
  cache.get(tmp_path, "key", lambda: TOKENS)
  assert equal(cache.get(tmp_path, "other", lambda: other), other)
  assert equal(cache.get(None, "key", lambda: other), other)


def test_tokens_that_fail_to_be_made_leave_nothing(tmp_path):
  with pytest.raises(AssertionError, match="made again"):
    cache.get(tmp_path, "key", never)
  assert not list(tmp_path.iterdir())


def test_a_file_left_by_an_interrupted_run_is_not_read(tmp_path):
  (tmp_path / "tokens-key.0123.partial").write_bytes(b"half")
  assert equal(cache.get(tmp_path, "key", lambda: TOKENS), TOKENS)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def fail(file, **arrays):
    file.write(b"half")
    raise OSError("no space left")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match="no space left"):
    cache.get(tmp_path, "key", lambda: TOKENS)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  cache.get(folder, "key", lambda: TOKENS)
  path = folder / "tokens-key.npz"
  return path, path.read_bytes()


@hypothesis.settings(deadline=None)
@hypothesis.given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_named_or_harmless(kept, place, bit):
  path, data = kept
  data = bytearray(data)
  data[int(place * len(data))] ^= 1 << bit
  path.write_bytes(data)
  try:
    found = cache.get(path.parent, "key", never)
  except ValueError as error:
    assert "tokens-key.npz is damaged: remove it" in str(error) and "\n" not in str(error)
  else:
    assert equal(found, TOKENS)


@hypothesis.settings(deadline=None)
@hypothesis.given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(kept, share):
  path, data = kept
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(ValueError, match="tokens-key.npz is damaged: remove it"):
    cache.get(path.parent, "key", never)


def test_a_flipped_id_is_named(kept):
  path, data = kept
  data = bytearray(data)
  data[data.index(TOKENS.flat.tobytes()) + 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match="tokens-key.npz is damaged: remove it"):
    cache.get(path.parent, "key", never)
