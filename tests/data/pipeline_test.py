"""The stream of batches: complete, reproducible, resumable anywhere, the same in any sharding."""

import collections
import dataclasses
import itertools
import json
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hybridlm.data import pipeline, sources, tokenizers

L, B = 37, 6
# Two sources told apart by their letters; every 10th document each is for test and valid.
TEXTS = {
  "low": ["".join(f"{chr(97 + i)}{j}," for j in range(3 + 4 * i)) for i in range(23)],
  "high": ["".join(f"{chr(65 + i)}{j}\n" for j in range(60 - 2 * i)) for i in range(21)],
}
PHASES = ((0, (("low", 1.0),)), (4, (("high", 3.0), ("low", 1.0))))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
  root = tmp_path_factory.mktemp("corpus")
  for name, texts in TEXTS.items():
    (root / name).mkdir()
    for i, text in enumerate(texts):
      (root / name / f"{i:03d}.txt").write_text(text)
  return pipeline.DataSpec(
    tuple(sources.Source(name, "text", str(root / name)) for name in TEXTS), phases=PHASES)


@pytest.fixture(scope="module")
def corpus(spec):
  return pipeline.Corpus(spec)


@pytest.fixture(scope="module")
def whole(corpus):
  return take(train(corpus), 34)


@pytest.fixture(scope="module")
def low(spec):
  return pipeline.Corpus(dataclasses.replace(spec, sources=spec.sources[:1], phases=()))


def train(corpus, **changes):
  return pipeline.train_batches(corpus, **{"batch": B, "length": L, "seed": 3, **changes})


def take(batches, number):
  return list(itertools.islice(batches, number))


def same(one, other):
  return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def joined(shares):
  return {k: np.concatenate([share[k] for share in shares]) for k in shares[0]}


def targets(batches):
  """Returns how often each id is a target that counts."""
  found = collections.Counter()
  for batch in batches:
    found.update(batch["target_BL"][batch["weight_BL"] > 0].tolist())
  return found


def expected(corpus, source, split):
  ids = [corpus.tokenizer.encode(d.text) for d in corpus.documents(source, split)]
  return collections.Counter(int(i) for one in ids for i in (*one, corpus.tokenizer.eot))


def rows_of(batches):
  return [tuple(row) for batch in batches for row in batch["token_BL"].tolist()]


def test_batches_have_the_shapes_and_types_of_the_contract(corpus):
  for batch in (next(train(corpus)), pipeline.eval_batches(
      corpus, source="low", split="test", batch=B, length=L)[0]):
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
      "token_BL": ((B, L), "int32"), "target_BL": ((B, L), "int32"),
      "segment_BL": ((B, L), "int32"), "weight_BL": ((B, L), "float32")}


def test_each_epoch_of_training_predicts_every_token_once_in_an_order_of_its_own(low):
  tokens = expected(low, "low", "train")
  rows = -(-tokens.total() // L)
  stream = take(train(low, batch=1), 3 * rows)
  epochs = [stream[e * rows : (e + 1) * rows] for e in range(3)]
  for epoch in epochs:
    assert targets(epoch) == tokens
  assert len({tuple(rows_of(epoch)) for epoch in epochs}) == 3


def test_a_source_is_complete_across_a_change_of_phase(corpus):
  stream = rows_of(take(train(corpus), 40))
  alone = rows_of(take(train(pipeline.Corpus(
    dataclasses.replace(corpus.spec, phases=((0, (("low", 1.0),)),)))), 40))
  lower = [row for row in stream if any(97 <= t <= 122 for t in row)]
  assert lower == alone[: len(lower)]


def test_the_mixture_changes_at_its_step_and_keeps_its_weights(corpus):
  stream = take(train(corpus), 44)
  upper = [sum(any(65 <= t <= 90 for t in row) for row in b["token_BL"]) for b in stream]
  assert upper[:4] == [0, 0, 0, 0]
  assert sum(upper[4:]) == 40 * B * 3 // 4


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(before=st.integers(0, 30))
def test_resuming_at_any_batch_continues_the_uninterrupted_stream(corpus, whole, before):
  stream = train(corpus)
  take(stream, before)
  state = json.loads(json.dumps(stream.get_state()))
  resumed = train(pipeline.Corpus(corpus.spec))
  next(resumed)
  resumed.set_state(state)
  for one, other in zip(take(resumed, 4), whole[before : before + 4], strict=True):
    assert same(one, other)
  assert same(next(stream), whole[before])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_shares_of_all_processes_are_the_batch_of_one(corpus, whole, count):
  shares = [take(train(corpus, process_index=p, process_count=count), 9) for p in range(count)]
  for step, batch in enumerate(whole[:9]):
    assert same(joined([share[step] for share in shares]), batch)


def test_a_run_resumes_with_another_number_of_processes(corpus):
  stream = train(corpus)
  take(stream, 5)
  shares = [train(corpus, process_index=p, process_count=2) for p in range(2)]
  for share in shares:
    share.set_state(stream.get_state())
  assert same(joined([next(share) for share in shares]), next(stream))


def test_a_seed_gives_its_stream_again_and_another_seed_another(low):
  streams = [rows_of(take(train(low, seed=seed), 30)) for seed in range(5)]
  assert rows_of(take(train(low, seed=3), 30)) == streams[3]
  for one, other in itertools.combinations(streams, 2):
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 30


def test_epochs_of_neighbouring_seeds_are_not_the_same_even_with_one_document(tmp_path):
  (tmp_path / "book.txt").write_text(TEXTS["low"][22] * 3)
  book = pipeline.Corpus(pipeline.DataSpec((sources.Source("book", "text", str(tmp_path)),)))
  length, rows = 7, -(-(3 * len(TEXTS["low"][22]) + 1) // 7)
  epochs = []
  for seed in range(3):
    stream = rows_of(take(
      train(book, batch=1, length=length, seed=seed, split="all"), 3 * rows))
    epochs += [tuple(stream[e * rows : (e + 1) * rows]) for e in range(3)]
  # grain itself seeds epoch e of seed s by s + e.
  assert len(set(epochs)) == 9
  assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


@pytest.mark.parametrize("split", ["train", "valid", "test", "all"])
def test_evaluation_predicts_every_token_of_its_split_once_in_order(corpus, split):
  batches = pipeline.eval_batches(corpus, source="high", split=split, batch=B, length=L)
  assert targets(batches) == expected(corpus, "high", split)
  assert {b["token_BL"].shape for b in batches} == {(B, L)}
  text = corpus.tokenizer.decode(t for b in batches for t in b["target_BL"][b["weight_BL"] > 0])
  assert text == "".join(d.text for d in corpus.documents("high", split))


def test_evaluation_in_bytes_counts_the_bytes_of_the_text(corpus):
  batches = pipeline.eval_batches(corpus, source="low", split="test", batch=B, length=L)
  size = sum((corpus.tokenizer.byte_lengths_V[b["target_BL"]] * b["weight_BL"]).sum()
             for b in batches)
  assert size == sum(len(d.text) for d in corpus.documents("low", "test"))


def test_a_limited_evaluation_takes_rows_from_all_of_the_split(corpus):
  def batches(limit):
    return pipeline.eval_batches(
      corpus, source="low", split="train", batch=2, length=11, limit=limit)

  every = rows_of(batches(None))
  few = rows_of(batches(3))
  assert len(few) == 6
  assert len(set(every)) == len(every)
  places = [every.index(row) for row in few]
  assert places[0] == 0 and len(every) - places[-1] <= len(every) / 6 + 2
  assert np.ptp(np.diff(places)) <= 1
  assert rows_of(batches(10_000)) == every


@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_shares_make_the_whole_and_have_one_shape(corpus, count):
  def batches(**process):
    return pipeline.eval_batches(
      corpus, source="low", split="test", batch=B, length=L, **process)

  shares = [batches(process_index=p, process_count=count) for p in range(count)]
  for step, batch in enumerate(batches()):
    assert same(joined([share[step] for share in shares]), batch)


def test_a_bpe_corpus_packs_the_same_text(spec):
  name = tokenizers.packaged()[0]
  corpus = pipeline.Corpus(dataclasses.replace(spec, tokenizer=name))
  batches = pipeline.eval_batches(corpus, source="low", split="all", batch=B, length=L)
  text = corpus.tokenizer.decode(t for b in batches for t in b["target_BL"][b["weight_BL"] > 0])
  assert text == "".join(TEXTS["low"])


def test_the_fingerprint_sees_whatever_decides_the_batches_and_nothing_else(corpus, spec, tmp_path):
  base = {"batch": B, "length": L, "seed": 3}
  prints = [train(corpus).fingerprint]
  for change in ({"batch": 2 * B}, {"length": L + 1}, {"seed": 4}, {"split": "all"}):
    prints.append(pipeline.train_fingerprint(corpus, **{**base, **change}))
  for change in ({"tokenizer": tokenizers.packaged()[0]},
                 {"phases": PHASES[:1]},
                 {"phases": ((0, {"low": 1}), (5, dict(PHASES[1][1])))},
                 {"sources": (spec.sources[0], dataclasses.replace(spec.sources[1], rule="hash"))}):
    changed = pipeline.Corpus(dataclasses.replace(spec, **change))
    prints.append(pipeline.train_fingerprint(changed, **base))
  assert len(set(prints)) == 9
  again = pipeline.Corpus(dataclasses.replace(spec, sources=spec.sources[::-1]), folder=tmp_path)
  assert train(again).fingerprint == prints[0]
  assert train(corpus, process_index=1, process_count=2).fingerprint == prints[0]


def test_kept_ids_of_an_older_way_to_make_them_are_not_used(spec, tmp_path, monkeypatch):
  found = [pipeline.Corpus(spec, folder=tmp_path).tokens(spec.sources[0].name, "train")]
  kept = set(tmp_path.iterdir())
  monkeypatch.setattr(pipeline, "_TOKENS_VERSION", 0)
  found.append(pipeline.Corpus(spec, folder=tmp_path).tokens(spec.sources[0].name, "train"))
  assert len(set(tmp_path.iterdir()) - kept) == 1
  np.testing.assert_array_equal(found[0].flat, found[1].flat)


def test_the_fingerprint_sees_one_changed_character(tmp_path):
  prints = set()
  for i in range(2):
    (tmp_path / f"{i}.txt").write_text("a" * 50)
  for text in ("a" * 50, "a" * 49 + "b"):
    (tmp_path / "1.txt").write_text(text)
    corpus = pipeline.Corpus(pipeline.DataSpec((sources.Source("x", "text", str(tmp_path)),)))
    prints.add(pipeline.train_fingerprint(corpus, batch=1, length=4, seed=0))
    prints.add(pipeline.eval_fingerprint(corpus, source="x", split="all", batch=1, length=4))
  assert len(prints) == 4


def test_evaluation_fingerprints_see_source_split_and_size(corpus):
  base = {"source": "low", "split": "test", "batch": B, "length": L}
  changes = ({}, {"source": "high"}, {"split": "valid"}, {"batch": 1}, {"length": 9}, {"limit": 2})
  assert len({pipeline.eval_fingerprint(corpus, **{**base, **c}) for c in changes}) == 6


def test_a_position_of_other_data_is_refused(corpus, low):
  state = train(corpus).get_state()
  for other in (train(low), train(corpus, seed=4), train(corpus, batch=2 * B)):
    with pytest.raises(ValueError, match="the saved position belongs to data") as caught:
      other.set_state(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch": 0}, "batch 0 is below 1"),
    ({"length": 0}, "sequence length 0 is below 1"),
    ({"seed": -1}, "seed -1 is negative"),
    ({"process_count": 4}, "batch 6 is not a multiple of the 4 processes"),
    ({"process_index": 2, "process_count": 2}, "process 2 is not one of 2"),
    ({"process_index": -1}, "process -1 is not one of 1"),
    ({"process_count": 0}, "process 0 is not one of 0"),
    ({"split": "dev"}, "split 'dev' is unknown"),
    ({"length": 10**6}, "split 'train' of source '.*' has .* tokens, fewer than one sequence of"),
  ],
)
def test_bad_arguments_of_training_are_named(corpus, changes, message):
  with pytest.raises(ValueError, match=message):
    train(corpus, **changes)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"source": "mid"}, "source 'mid' is not in the data spec; it has low, high"),
    ({"split": "dev"}, "split 'dev' is unknown"),
    ({"limit": 0}, "limit 0 of evaluation batches is below 1"),
    ({"batch": -1}, "batch -1 is below 1"),
    ({"process_count": 5}, "batch 6 is not a multiple of the 5 processes"),
    ({"length": 5000}, "split 'test' of source 'low' has .* tokens, fewer than one sequence"),
  ],
)
def test_bad_arguments_of_evaluation_are_named(corpus, changes, message):
  arguments = {"source": "low", "split": "test", "batch": B, "length": L, **changes}
  with pytest.raises(ValueError, match=message):
    pipeline.eval_batches(corpus, **arguments)


def test_bad_specs_are_named(spec, tmp_path):
  twice = (spec.sources[0], spec.sources[0])
  for changes, message in [
    ({"sources": ()}, "has no source"),
    ({"sources": twice}, "source 'low' is named 2 times"),
    ({"phases": ()}, "2 sources and no phases"),
    ({"phases": ((0, {"mid": 1.0}),)}, "mixes source 'mid'"),
  ]:
    with pytest.raises(ValueError, match=message):
      pipeline.Corpus(dataclasses.replace(spec, **changes))
  with pytest.raises(FileNotFoundError, match="tokenizer 'none'"):
    pipeline.Corpus(dataclasses.replace(spec, tokenizer="none"))


def test_a_split_without_documents_is_named(tmp_path):
  (tmp_path / "only.txt").write_text("text")
  corpus = pipeline.Corpus(pipeline.DataSpec((sources.Source("mine", "text", str(tmp_path)),)))
  with pytest.raises(ValueError, match="split 'valid' of source 'mine' is empty: rule 'tenth'"):
    corpus.documents("mine", "valid")


def test_each_split_is_tokenised_once(spec, monkeypatch):
  corpus, calls = pipeline.Corpus(spec), []
  encode_all = corpus.tokenizer.encode_all
  monkeypatch.setattr(corpus.tokenizer, "encode_all",
                      lambda texts: calls.append(len(texts)) or encode_all(texts))
  for seed in range(3):
    next(train(corpus, seed=seed))
  assert sorted(calls) == sorted(len(corpus.documents(name, "train")) for name in TEXTS)


def test_the_next_batches_are_made_ahead_and_the_position_stays_with_what_was_handed_out(corpus):
  asked, enough = [], threading.Event()

  class Rows:
    fingerprint = "rows"

    def join(self, first, batch):
      asked.append(first)
      if len(asked) == 3:
        enough.set()
      return batch

  stream = train(corpus).joined(Rows())
  one = next(stream)
  assert enough.wait(60)  # nobody has asked for the second batch
  assert stream.get_state()["grain"] == {"next_index": 1} and asked == [0, B, 2 * B]
  again = train(corpus).joined(Rows())
  again.set_state(stream.get_state())
  assert same(next(again), next(stream)) and same(one, next(train(corpus)))
