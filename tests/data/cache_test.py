"""Ids kept between runs are the ids that were made, or an error."""

import numpy as np
import pytest

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


@pytest.mark.parametrize("part", ["ids", "end"])
def test_a_damaged_file_is_named(tmp_path, part):
  cache.get(tmp_path, "key", lambda: TOKENS)
  path = tmp_path / "tokens-key.npz"
  data = bytearray(path.read_bytes())
  if part == "ids":
    data[data.index(TOKENS.flat.tobytes()) + 2] ^= 1
  else:
    del data[-9:]
  path.write_bytes(data)
  with pytest.raises(ValueError, match="tokens-key.npz is damaged: remove it") as caught:
    cache.get(tmp_path, "key", never)
  assert "\n" not in str(caught.value)
