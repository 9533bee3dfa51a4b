"""Teachers from elsewhere bring their tokenizer, and what is exported comes back the same."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library

import hybridlm
from cases import commands, models
from experiments import artefacts, exchange
from hybridlm import axes, config, lazy
from hybridlm.config import Rope
from hybridlm.data import tokenizers
from hybridlm.interop import huggingface, native

TEXT = ["the cat sat on the mat, the cat 12 ran\n"] * 3
IDS = {"bos_token_id": 268, "eos_token_id": 268}


def llama(pattern="*-*-", **changes):
  """Returns a small llama that pads no row of its vocabulary."""
  sizes = {"V": 269, "D": 18, "F": 24, "K": 3, "J": 2, "E": 4}
  return models.make(
    "tied", pattern, activation="swiglu", rope=Rope(), context=64, **sizes | changes)


def published(folder, cfg, params):
  """Writes a Hugging Face folder with a tokenizer that ends texts with the last id."""
  inner = library.Tokenizer.from_str(tokenizers.train(TEXT, V=269).text)
  inner.add_special_tokens(["<|end|>"])
  like = folder.with_name("like")
  like.mkdir()
  inner.save(str(like / "tokenizer.json"))
  (like / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
  (like / "config.json").write_text(json.dumps(IDS))
  huggingface.write(folder, cfg, lazy.of(params), family="llama", like=like)
  return folder


def test_a_path_may_lie_in_an_installed_package(tmp_path):
  found = exchange.located("teacher.path", "package:hybridlm/data/assets/sotu_1024.json")
  assert found == pathlib.Path(hybridlm.__file__).parent / "data" / "assets" / "sotu_1024.json"
  assert exchange.located("k", str(tmp_path)) == tmp_path
  for path, message in {
    "package:hybridlm/gone": "k=package:hybridlm/gone: no such file",
    "package:no_such_package/x": "the package 'no_such_package' is not installed",
    "package:../x": "is not installed", "gone": "k=gone: no such file",
  }.items():
    with pytest.raises(FileNotFoundError, match=message):
      exchange.located("k", path)


def test_a_published_teacher_comes_in_bit_for_bit_with_its_tokenizer_and_ids(tmp_path):
  cfg = llama()
  params = models.params(cfg)
  half = {path: leaf.astype(jnp.bfloat16) for path, leaf in axes.leaves(params)}
  source = published(tmp_path / "source", cfg.replace(dtype="bfloat16"), lazy.tree(half))
  stage = tmp_path / "stage"
  stage.mkdir()
  exchange.bring(stage, source, cfg)
  found, again = artefacts.load_model(stage)
  assert found == cfg
  for path, leaf in axes.leaves(again):
    assert leaf.dtype == jnp.bfloat16 and np.array_equal(leaf, half[path])
  assert artefacts.read_json(stage / "like" / "config.json") == {"model_type": "llama"} | IDS
  assert tokenizers.load(str(stage / "model")).eot == 268
  assert exchange.fingerprints(source).keys() >= {"config.json", "tokenizer.json"}


def test_weights_that_are_not_finite_are_refused_by_name_and_leave_no_model(tmp_path):
  cfg = llama()
  params = models.params(cfg)
  gain_D = params["final"]["norm_gain_D"].at[7].set(jnp.nan)
  native.write(tmp_path / "bad", cfg, lazy.of({**params, "final": {"norm_gain_D": gain_D}}))
  stage = tmp_path / "stage"
  stage.mkdir()
  with pytest.raises(ValueError, match=r"bad: leaf 'final/norm_gain_D' holds nan at \(7,\)"):
    exchange.bring(stage, tmp_path / "bad", cfg)
  assert not list(stage.glob("model*"))


def test_what_cannot_be_published_is_refused_before_it_is_computed():
  hybrid = models.make()
  exchange.check(hybrid, "none", "llama")
  exchange.check(llama(), "hf", None)
  with pytest.raises(ValueError, match="llama cannot express"):
    exchange.check(hybrid, "hf", "llama")


def test_an_export_that_does_not_come_back_the_same_fails(tmp_path, monkeypatch):
  cfg = llama()
  params = models.params(cfg)
  honest = huggingface.open

  def other(folder):
    cfg, leaves = honest(folder)
    leaf = leaves["final/norm_gain_D"]
    return cfg, leaves | {"final/norm_gain_D": leaf._replace(read=lambda: leaf.read() * 1.001)}

  monkeypatch.setattr(huggingface, "open", other)
  with pytest.raises(RuntimeError, match="leaf 'final/norm_gain_D' of the target differs by"):
    exchange.export(tmp_path, cfg, params, family=None, like=tmp_path / "gone")
  assert not (tmp_path / "export.json").exists()


@pytest.mark.slow
def test_a_published_llama_is_pruned_by_layers_and_exported_with_its_tokenizer(tmp_path):
  cfg = llama()
  source = published(tmp_path / "source", cfg, models.params(cfg, scale=3.0))
  argv = [
    commands.TOY, "--workdir=job", f"--config.teacher.path={source}",
    "--config.data.tokenizer=teacher", "--config.calibrate.axes=F", "--config.export.format=hf",
    "--config.calibrate.depth=influence", "--config.targets.layers=1", "--config.targets.F=16",
    *(f"--config.targets.{name}=None" for name in "DHPJ"), "--config.scratch.run=none",
    "--config.evaluate.ngram=0", "--config.evaluate.speed_repeats=1", "--config.findings.heads=()",
  ]
  (code, out, err), = commands.drive([("distill", argv)], cwd=tmp_path)
  assert (code, err) == (0, ""), out
  job = tmp_path / "job"
  small, params = artefacts.load_model(job / "distil")
  assert small.pattern == "*-" and small.F == 16 and small.D == cfg.D
  folder = job / "export" / "hf"
  again_cfg, again = hybridlm.load(folder)
  assert again_cfg.replace(dtype=small.dtype) == small
  for path, leaf in axes.leaves(again):
    assert np.array_equal(leaf, dict(axes.leaves(params))[path]), path
  plain = artefacts.read_json(folder / "config.json")
  assert {key: plain[key] for key in IDS} == IDS and plain["model_type"] == "llama"
  assert tokenizers.load(str(folder)).eot == 268
  made = artefacts.read_json(job / "export" / "export.json")
  assert made["parameters"] == config.parameters(small) and made["difference"] <= 1e-6
  text = (job / "report" / "report.md").read_text()
  assert "* Exported: a Hugging Face folder of family `llama`" in text
