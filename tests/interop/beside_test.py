"""Tokenizer files and special ids go with a model, from wherever it is, and fit its vocabulary."""

import json

import pytest

from hybridlm.interop import beside

IDS = {"bos_token_id": 1, "eos_token_id": [2, 3]}


def folder(tmp_path, name="source", **files):
  """Returns a new folder; `a__json` stands for the file `a.json`."""
  made = tmp_path / name
  made.mkdir()
  for key, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (made / key.replace("__", ".")).write_text(text, "utf-8")
  return made


def test_tokenizer_files_are_carried_on_and_weights_are_not(tmp_path):
  kept = {"tokenizer__json": "{}", "merges__txt": "a b", "chat_template__jinja": "{{x}}"}
  source = folder(tmp_path, **kept, model__safetensors="weights", config__json={})
  target = folder(tmp_path, "target")
  beside.write(target, beside.gather(source))
  written = {path.name: path.read_text("utf-8") for path in target.iterdir()}
  assert written == {name.replace("__", "."): text for name, text in kept.items()}


def test_special_ids_of_the_config_come_before_those_of_generation(tmp_path):
  stated = {"eos_token_id": 7, "pad_token_id": 0, "top_k": 5}
  plain = IDS | {"model_type": "llama", "pad_token_id": None}
  source = folder(tmp_path, config__json=plain, generation_config__json=stated)
  found = beside.gather(source)
  assert found.ids == IDS | {"pad_token_id": 0}
  assert found.family == "llama"
  assert json.loads(found.files["generation_config.json"]) == stated


def test_ids_that_only_the_config_states_get_a_file_of_their_own(tmp_path):
  found = beside.gather(folder(tmp_path, config__json=IDS))
  assert json.loads(found.files["generation_config.json"]) == IDS
  assert found.family is None
  assert beside.gather(folder(tmp_path, "empty")) == beside.Beside(
    str(tmp_path / "empty"), {}, {}, None
  )


def test_a_tokenizer_file_that_is_a_link_out_of_its_folder_is_not_carried(tmp_path):
  source = folder(tmp_path)
  (tmp_path / "secret").write_text("s", "utf-8")
  (source / "tokenizer.json").symlink_to(tmp_path / "secret")
  with pytest.raises(ValueError, match="the link leaves the folder"):
    beside.gather(source)


@pytest.mark.parametrize("table", [{"a": 0, "b": 30}, ["x"] * 31])
def test_a_tokenizer_fits_a_vocabulary_that_its_largest_id_is_below(tmp_path, table):
  parts = {"model": {"vocab": table}, "added_tokens": []}
  found = beside.gather(folder(tmp_path, tokenizer__json=parts))
  beside.check(found, 31)
  with pytest.raises(ValueError, match="holds the id 30, the model's vocabulary ends at V=30"):
    beside.check(found, 30)
  parts["added_tokens"] = [{"id": 40}]
  with pytest.raises(ValueError, match="holds the id 40"):
    beside.check(beside.gather(folder(tmp_path, "more", tokenizer__json=parts)), 31)


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, text):
  source = folder(tmp_path, tokenizer__json=text)
  with pytest.raises(ValueError, match="tokenizer.json: (damaged|holds)"):
    beside.check(beside.gather(source), 31)


@pytest.mark.parametrize("value", [31, [2, 31], -2, "2", True])
def test_a_special_id_outside_the_vocabulary_is_refused(tmp_path, value):
  found = beside.gather(folder(tmp_path, config__json={"eos_token_id": value}))
  with pytest.raises(ValueError, match="eos_token_id=.* is outside V=31"):
    beside.check(found, 31)


def test_what_is_not_there_has_nothing_beside_it(tmp_path):
  with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
    beside.gather(tmp_path / "nothing")
