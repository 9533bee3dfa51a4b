"""The store of a teacher's top tokens: what is written comes back by row, or says what is wrong."""

import dataclasses
import itertools
import pathlib
import re
import resource

import numpy as np
import pytest

from hybridlm.data import pipeline, sources, store

L, B, K, V = 11, 4, 3, 200_000
ROWS = 12
KEY = store.Key("t" * 64, "bytes", "bytes", "a" * 64, "b" * 64, L, V, K, 2.0, "")


def top(number: int) -> store.Top:
  """Returns the made-up top tokens of a row; they sum to 1 with what is left."""
  draw = np.random.default_rng(number)
  mass_LV = -np.sort(-draw.dirichlet(np.ones(K + 1), L))
  ids = draw.integers(0, V, (L, K)).astype(np.int32)
  return ids, np.log(mass_LV[:, :K]).astype(np.float32), np.log(mass_LV[:, K]).astype(np.float32)


@pytest.fixture(name="corpus", scope="module")
def _corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(30):
    (folder / f"{i:02d}.txt").write_text("abcdefgh"[: 3 + i % 5] * 3)
  return pipeline.Corpus(pipeline.DataSpec((sources.Source("main", "text", str(folder)),)))


def stream(corpus, **changes):
  return pipeline.train_batches(corpus, **{"batch": B, "length": L, "seed": 3, **changes})


def held_out(corpus):
  return pipeline.eval_batches(corpus, source="main", split="valid", batch=2, length=L)


def write(folder, corpus, *, dtype="float32", per_file=5):
  """Writes a store of the first rows of the stream and of all validation rows."""
  folder.mkdir()
  rows = [row for batch in itertools.islice(stream(corpus), ROWS // B) for row in pairs(batch)]
  valid = list(dict.fromkeys(row for batch in held_out(corpus) for row in pairs(batch)))
  for part, found, size in ((store.TRAIN, rows, per_file), (store.VALID, valid, len(valid))):
    for first in range(0, len(found), size):
      store.seal(folder, part, first, [
        store.pack(top(number), row=found[number], number=number, V=V, dtype=dtype)
        for number in range(first, min(first + size, len(found)))])
  plain = store.manifest(folder, KEY, dtype=dtype, rows=ROWS, valid=valid)
  (folder / store.MANIFEST).write_text(store.json.dumps(plain))
  return folder


def pairs(batch):
  return [store.row_hash(*each)
          for each in zip(batch["token_BL"], batch["segment_BL"], strict=True)]


@pytest.fixture(name="made", scope="module")
def _made(corpus, tmp_path_factory):
  return write(tmp_path_factory.mktemp("store") / "s", corpus)


@pytest.mark.parametrize("batch, count", [(4, 1), (2, 1), (6, 3), (12, 2)])
def test_rows_come_back_by_number_at_any_batch_size_and_in_any_sharding(corpus, made, batch, count):
  opened = store.Store(made)
  opened.verify()
  for index in range(count):
    share = stream(corpus, batch=batch, process_index=index, process_count=count).joined(opened)
    for step, found in enumerate(itertools.islice(share, ROWS // batch)):
      first = step * batch + index * (batch // count)
      for b, row in enumerate(zip(*(found[name] for name in (
          "top_id_BLT", "top_log_BLT", "tail_log_BL")), strict=True)):
        assert all(np.array_equal(one, want)
                   for one, want in zip(row, top(first + b), strict=True))
      assert found["top_id_BLT"].dtype == np.int32 and found["top_id_BLT"].max() >= 1 << 16


def test_a_saved_position_goes_on_with_the_same_rows(corpus, made):
  opened = store.Store(made)
  whole = stream(corpus).joined(opened)
  first, second = next(whole), next(whole)
  again = stream(corpus).joined(opened)
  next(again)
  state = again.get_state()
  third = stream(corpus).joined(opened)
  third.set_state(state)
  found = next(third)
  assert all(np.array_equal(found[name], second[name]) for name in second)
  assert not np.array_equal(first["top_log_BLT"], second["top_log_BLT"])
  with pytest.raises(ValueError, match="the saved position belongs to data"):
    stream(corpus).set_state(state)


def test_rounded_log_probabilities_come_back_close_and_sum_to_one(corpus, tmp_path):
  rounded = stream(corpus).joined(store.Store(write(tmp_path / "s", corpus, dtype="float16")))
  found = next(rounded)
  exact = np.stack([top(number)[1] for number in range(B)])
  assert 0 < np.abs(found["top_log_BLT"] - exact).max() < 5e-3
  mass_BL = np.exp(found["top_log_BLT"]).sum(2) + np.exp(found["tail_log_BL"])
  np.testing.assert_allclose(mass_BL, 1, atol=1e-6)


def test_validation_rows_are_found_by_what_they_hold(corpus, made):
  opened = store.Store(made)
  for batch in held_out(corpus):
    turned = {name: value[::-1] for name, value in batch.items()}
    found, other = opened.join_valid(batch), opened.join_valid(turned)
    assert np.array_equal(found["top_id_BLT"], other["top_id_BLT"][::-1])
  with pytest.raises(ValueError, match="another validation data: row 0 of a batch"):
    opened.join_valid(next(stream(corpus)))


def test_rows_beyond_the_last_and_rows_of_other_data_are_refused(corpus, made):
  opened = store.Store(made)
  beyond = stream(corpus).joined(opened)
  beyond.set_state({"fingerprint": beyond.fingerprint, "grain": {"next_index": ROWS // B}})
  with pytest.raises(ValueError, match=f"it has {ROWS} rows of training data; row {ROWS} is beyon"):
    next(beyond)
  with pytest.raises(ValueError, match="row 1 is of other data than this run reads there$"):
    next(stream(corpus, seed=4).joined(opened))


@pytest.mark.parametrize("change, told", [
  ({"teacher": "u" * 64}, "another teacher: it was made with tttttttttttt, this run has uuuuuu"),
  ({"train": "c" * 64}, "another training data or their order: it was made with aaaaaaaaaaaa, th"),
  ({"tokenizer": "sotu", "tokens": "x"}, "another tokenizer: it was made with 'bytes' (bytes), "
   "this run has 'sotu' (x)"),
  ({"k": 7}, "another top_k: it was made with 3, this run has 7"),
  ({"temperature": 1.0}, "another temperature: it was made with 2.0, this run has 1.0"),
  ({"length": 12}, "another sequence length: it was made with 11, this run has 12"),
  ({"precision": "int8"}, "another precision of the teacher: it was made with '', this run has "),
])
def test_a_store_of_something_else_is_refused_with_both_values(change, told):
  wanted = dataclasses.replace(KEY, **change)
  with pytest.raises(ValueError, match=re.escape(f"store s: {told}")):
    store.check_key("s", KEY, wanted)
  store.check_key("s", KEY, dataclasses.replace(KEY))


def test_of_many_files_only_a_few_are_open_at_a_time(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(store, "_THREADS", 2)
  opened = store.Store(write(tmp_path / "s", corpus, per_file=1))
  for found in (opened.verify, lambda: opened.join(0, next(stream(corpus, batch=ROWS)))):
    found()
    links = [link for link in pathlib.Path("/proc/self/fd").iterdir() if link.is_symlink()]
    held = [link for link in links if str(tmp_path) in str(link.resolve())]
    assert 1 <= len(held) <= 4 < ROWS


def test_a_file_that_finds_no_space_is_told_and_leaves_those_before_it(tmp_path):
  store.seal(tmp_path, store.TRAIN, 0, [b"one"])
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
  try:
    with pytest.raises(store.NotWritten, match="train-000000000001.* could not be written: .*lar"):
      store.seal(tmp_path, store.TRAIN, 1, [bytes(60_000)] * 3)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  left, = tmp_path.iterdir()
  assert left == store.sealed(tmp_path, store.TRAIN)[0] and store.count(left) == 1


@pytest.mark.parametrize("place", ["record", "header"])
def test_a_flipped_byte_is_told_by_row_and_file(corpus, tmp_path, place):
  folder = write(tmp_path / "s", corpus)
  path = store.sealed(folder, store.TRAIN)[1]
  data = bytearray(path.read_bytes())
  size = store.record_size(KEY, "float32")
  hashed = pairs(next(itertools.islice(stream(corpus), 1, 2)))[2]  # row 6, the file's second
  at = data.index(hashed) + (size // 2 if place == "record" else -8)
  data[at] ^= 4
  path.write_bytes(bytes(data))
  opened = store.Store(folder)
  share = stream(corpus).joined(opened)
  next(share)
  for read in (lambda: next(share), opened.verify, lambda: opened.verify(1, 2)):
    with pytest.raises(ValueError, match=r"train-000000000005.array_record: .*damaged"):
      read()
  opened.verify(0, 2)  # the other process's share has none


def test_a_record_is_whole_and_that_of_its_row_or_refused():
  row = store.row_hash(np.arange(L), np.ones(L, np.int32))
  record = store.pack(top(3), row=row, number=3, V=V, dtype="float32")
  known = {"key": KEY, "dtype": "float32", "place": "here"}
  found, values = store.unpack(record, number=3, **known)
  assert found == row and all(map(np.array_equal, values, top(3)))
  flipped = bytes([*record[:40], record[40] ^ 1, *record[41:]])
  for each, number in ((record, 4), (flipped, 3), (record[:-1], 3)):
    with pytest.raises(ValueError, match=f"here: the record of row {number} is damaged"):
      store.unpack(each, number=number, **known)


def test_files_cut_off_and_missing_ones_are_told_on_opening(corpus, tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no store.json: it is none, or unfinished"):
    store.Store(tmp_path)
  folder = write(tmp_path / "s", corpus)
  path = store.sealed(folder, store.TRAIN)[0]
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="train-000000000000.array_record is damaged: .* bytes, not"):
    store.Store(folder)
  path.unlink()
  with pytest.raises(ValueError, match="is damaged: missing, not"):
    store.Store(folder)
  (folder / store.MANIFEST).write_text("{")
  with pytest.raises(ValueError, match="store.json is damaged"):
    store.Store(folder)
