"""Greedy generation against transformers, token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import checkpoints
from hybridlm import lazy
from hybridlm.decode import loop
from hybridlm.interop import huggingface
from hybridlm.nn import serve

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS = 64
LENGTHS = (9, 1, 31, 17)
# Their decoding does not limit dt as their prefill does: here dt stays above any limit.
CASES = {
  "nemotron_h_g1": {"time_step_min": 1e-9},
  "nemotron_h_g2": {"time_step_min": 1e-9},
  "mamba2_g2": {"time_step_limit": [0.0, float("inf")]},
  "llama": {"max_position_embeddings": 128},
  "llama3": {"max_position_embeddings": 128},
  "nemotron_bias": {"max_position_embeddings": 128},
  "bamba_g1": {"max_position_embeddings": 128},
}
# As they are drawn, these repeat one token for ever.
DENSE = ("llama", "llama3", "nemotron_bias")
fuse = jax.jit(serve.fuse, static_argnames="cfg")


def theirs(model, prompts):
  """Returns transformers' greedy tokens of a batch, padded on the left as it wants it."""
  import torch

  longest = max(map(len, prompts))
  token_BL = np.zeros((len(prompts), longest), np.int64)
  mask_BL = np.zeros_like(token_BL)
  for row, prompt in enumerate(prompts):
    token_BL[row, longest - len(prompt) :] = prompt
    mask_BL[row, longest - len(prompt) :] = 1
  out_BL = model.generate(
    torch.from_numpy(token_BL), attention_mask=torch.from_numpy(mask_BL), do_sample=False,
    max_new_tokens=STEPS, min_new_tokens=STEPS, eos_token_id=None, pad_token_id=0,
  )
  return out_BL[:, longest:].numpy()


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(name, tmp_path):
  import torch

  model = checkpoints.make(name, **CASES[name])
  if name in DENSE:
    with torch.no_grad():
      for path, weight in model.named_parameters():
        if path.endswith("proj.weight"):
          weight.mul_(20)
  model.generation_config.eos_token_id = None
  model.save_pretrained(tmp_path)
  cfg, leaves = huggingface.open(tmp_path)
  params = lazy.tree({path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()})
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, cfg.V, length) for length in LENGTHS]
  prompt_BL = np.zeros((len(prompts), max(LENGTHS)), np.int32)
  for row, prompt in enumerate(prompts):
    prompt_BL[row, : len(prompt)] = prompt
  got_BL = loop.generate(
    serve.prefill, serve.step, cfg, fuse(cfg, params), prompt_BL, length_B=np.array(LENGTHS),
    steps=STEPS,
  )
  np.testing.assert_array_equal(got_BL, theirs(model, prompts))
  # Rows that repeat one token would agree too easily.
  assert np.mean([len(set(row)) for row in got_BL.tolist()]) > 4
