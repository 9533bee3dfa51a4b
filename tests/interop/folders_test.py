"""A folder is replaced as a whole, and nothing that is not ours is lost or read."""

import os
import pathlib

import pytest

from hybridlm.interop import folders


def fill(folder, **files):
  with folders.replacing(folder) as part:
    for name, text in files.items():
      (part / name).write_text(text, "utf-8")


def texts(folder):
  return {p.name: p.read_text("utf-8") for p in folder.iterdir() if p.name != folders.MARK}


def test_the_target_appears_with_all_its_files_and_nothing_stays_beside_it(tmp_path):
  with folders.replacing(tmp_path / "deep" / "target") as part:
    (part / "a").write_text("1", "utf-8")
    assert not (tmp_path / "deep" / "target").exists()
  assert texts(tmp_path / "deep" / "target") == {"a": "1"}
  assert [p.name for p in (tmp_path / "deep").iterdir()] == ["target"]


def test_what_we_wrote_is_replaced_and_what_was_in_it_is_gone(tmp_path):
  fill(tmp_path / "t", a="1", b="2")
  fill(tmp_path / "t", c="3")
  assert texts(tmp_path / "t") == {"c": "3"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_where_the_block_raises_nothing_changes(tmp_path, error):
  fill(tmp_path / "t", a="1")
  with pytest.raises(error), folders.replacing(tmp_path / "t") as part:
    (part / "b").write_text("2", "utf-8")
    raise error("probe")
  assert texts(tmp_path / "t") == {"a": "1"} and len(list(tmp_path.iterdir())) == 1


def test_files_of_somebody_else_are_never_replaced(tmp_path):
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "notes").write_text("mine", "utf-8")
  fill(tmp_path / "ours", a="1")
  (tmp_path / "ours" / "notes").write_text("mine", "utf-8")
  for name in ("theirs", "ours"):
    with pytest.raises(ValueError, match="holds files that hybridlm did not write"):
      fill(tmp_path / name, b="2")
    assert texts(tmp_path / name)["notes"] == "mine"
  (tmp_path / "file").write_text("mine", "utf-8")
  (tmp_path / "link").symlink_to(tmp_path / "theirs")
  for name in ("file", "link"):
    with pytest.raises(ValueError, match="exists and is not a folder"):
      fill(tmp_path / name, b="2")


def test_an_empty_folder_is_filled(tmp_path):
  (tmp_path / "t").mkdir()
  fill(tmp_path / "t", a="1")
  assert texts(tmp_path / "t") == {"a": "1"}


def test_what_a_killed_run_left_is_cleared_and_somebody_elses_is_not(tmp_path):
  part = tmp_path / "t.partial"
  part.mkdir()
  (part / folders.MARK).touch()
  (part / "half").write_text("x", "utf-8")
  fill(tmp_path / "t", a="1")
  assert texts(tmp_path / "t") == {"a": "1"} and not part.exists()
  part.mkdir()
  (part / "notes").write_text("mine", "utf-8")
  with pytest.raises(ValueError, match="t.partial: exists and holds files"):
    fill(tmp_path / "t", a="2")


def test_two_runs_cannot_write_one_target(tmp_path):
  with folders.replacing(tmp_path / "t"):
    with pytest.raises(ValueError, match="t.partial is being written by another run"):
      fill(tmp_path / "t", a="1")


def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
  fill(tmp_path / "t", a="1")
  rename = pathlib.Path.rename

  def dying(path, target):
    if path.name.endswith(".partial"):
      os.rename(path, path.with_name("survivor.partial"))
      raise SystemExit
    return rename(path, target)

  monkeypatch.setattr(pathlib.Path, "rename", dying)
  with pytest.raises(SystemExit):
    fill(tmp_path / "t", a="2")
  monkeypatch.undo()
  assert texts(tmp_path / ".t.hybridlm-old") == {"a": "1"}
  assert texts(tmp_path / "survivor.partial") == {"a": "2"}
  fill(tmp_path / "t", a="3")
  assert texts(tmp_path / "t") == {"a": "3"} and not (tmp_path / ".t.hybridlm-old").exists()


def test_a_folder_that_its_owner_moved_to_another_name_stays(tmp_path):
  fill(tmp_path / "t", a="1")
  (tmp_path / "t").rename(tmp_path / "t.old")
  for text in "23":
    fill(tmp_path / "t", a=text)
  assert texts(tmp_path / "t.old") == {"a": "1"} and texts(tmp_path / "t") == {"a": "3"}


@pytest.mark.parametrize("sibling", ["t", "t.partial", ".t.hybridlm-old"])
@pytest.mark.parametrize(
  "mark", [b"{", b"\xff", b"{}", b"[1]", b"[" * 10**5, None],
  ids=["no JSON", "no text", "no list", "no names", "deep", "folder"],
)
def test_a_damaged_mark_or_one_that_is_no_file_is_not_ours(tmp_path, sibling, mark):
  place = tmp_path / sibling
  place.mkdir()
  (place / "notes").write_text("mine", "utf-8")
  place.joinpath(folders.MARK).mkdir() if mark is None else (
    place.joinpath(folders.MARK).write_bytes(mark))
  with pytest.raises(ValueError, match=f"{sibling}: exists and holds files that hybridlm did not"):
    folders.check_target(tmp_path / "t")
  with pytest.raises(ValueError, match=f"{sibling}: exists and holds files that hybridlm did not"):
    fill(tmp_path / "t", a="1")
  assert (place / "notes").read_text("utf-8") == "mine"


@pytest.mark.parametrize("sibling", ["t.partial", ".t.hybridlm-old"])
def test_a_deletion_that_was_cut_short_is_finished_later(tmp_path, monkeypatch, sibling):
  fill(tmp_path / "t", a="1", b="2")
  (tmp_path / "t").rename(tmp_path / sibling)
  unlink, left = pathlib.Path.unlink, [1]

  def dying(path, **options):
    if not left:
      raise SystemExit
    left.pop()
    unlink(path, **options)

  every = pathlib.Path.iterdir
  monkeypatch.setattr(pathlib.Path, "iterdir", lambda path: iter(sorted(every(path))))
  monkeypatch.setattr(pathlib.Path, "unlink", dying)
  with pytest.raises(SystemExit):
    folders.remove(tmp_path / sibling)
  monkeypatch.undo()
  assert len(texts(tmp_path / sibling)) == 1
  fill(tmp_path / "t", c="3")
  assert texts(tmp_path / "t") == {"c": "3"} and len(list(tmp_path.iterdir())) == 1


def test_what_the_system_refuses_is_one_line_before_any_work(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("mine", "utf-8")
  for name, message in {
    "file/t": "file is not a folder", "file/deep/t": "file is not a folder",
    "x" * 250: "File name too long", "/": "it has no name",
  }.items():
    with pytest.raises(ValueError, match=f"cannot be written: .*{message}"):
      folders.check_target(tmp_path / name)
  monkeypatch.setattr(os, "access", lambda *args: False)
  with pytest.raises(ValueError, match="cannot be written: no right to write in"):
    folders.check_target(tmp_path / "deep" / "t")
  monkeypatch.undo()
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="cannot be written: File exists"):
    fill(tmp_path / "link" / "t", a="1")


def test_a_hidden_file_comes_back_only_where_all_went_well(tmp_path):
  fill(tmp_path / "t", a="1", b="2")
  with folders.hiding(tmp_path / "t", "a"):
    assert texts(tmp_path / "t") == {"a.unverified": "1", "b": "2"}
  assert texts(tmp_path / "t") == {"a": "1", "b": "2"}
  with pytest.raises(KeyError), folders.hiding(tmp_path / "t", "a"):
    raise KeyError
  assert texts(tmp_path / "t") == {"a.unverified": "1", "b": "2"}
  fill(tmp_path / "t", c="3")
  assert texts(tmp_path / "t") == {"c": "3"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n", 7, "x" * 300])
def test_only_plain_names_name_a_file_of_a_folder(tmp_path, name):
  with pytest.raises(ValueError, match="is not a .*file name"):
    folders.plain_file(tmp_path, name)


def test_json_files_are_refused_by_size_before_they_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(folders, "JSON_LIMIT", 10)
  (tmp_path / "config.json").write_text('{"a": 1234567}', "utf-8")
  with pytest.raises(ValueError, match="14 bytes, more than the limit of 10"):
    folders.read_json(tmp_path, "config.json")
