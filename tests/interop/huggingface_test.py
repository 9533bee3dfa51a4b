"""Hugging Face folders: older forms of the same model, and what is refused with one clear line."""

import json
import math
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from cases import checkpoints, models
from cases.checkpoints import GOLDEN, edited
from experiments.mistakes import is_mistake
from hybridlm import config, lazy
from hybridlm.config import Llama3Scaling, Rope
from hybridlm.interop import huggingface, safetensors

HYBRID = GOLDEN / "nemotron_h_g2"
WORDS = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp"}
ODD = (
  None, True, 0, -1, 3, 10**9, 10**400, 1.5, 1e308, math.inf, math.nan, "", "auto", "x" * 5000, [],
  [1], ["mlp"], [math.nan, 1], {}, {"rope_type": "llama3"}, {"__float__": "NaN"}, [[[[]]]],
)
EXTRA = {"rope_scaling", "rope_theta", "layer_types", "partial_rotary_factor", "ssm_cfg"}
# Golden folder, keys to change (None: to remove), what the one line must say.
REFUSED = {
  "no type": ("llama3", {"model_type": None}, "model_type=None is not one of mamba2, nemotron_h"),
  "unknown type": ("llama3", {"model_type": "mixtral"}, "model_type='mixtral' is not one of"),
  "quantized": ("llama3", {"quantization_config": {"bits": 4}}, "quantized weights"),
  "experts": ("nemotron_h_g2", {"layers_block_type": ["moe"]}, "layer 0 is a mixture of experts"),
  "letter": (
    "nemotron_h_g2", {"layers_block_type": None, "hybrid_override_pattern": "M-+"},
    r"layer 2 is '\+', known: M, ",
  ),
  "E": (
    "nemotron_h_g2", {"layers_block_type": None, "hybrid_override_pattern": "ME"},
    "layer 1 is a mixture of experts",
  ),
  "no pattern": ("nemotron_h_g2", {"layers_block_type": None}, "must be a pattern of M, "),
  "endless pattern": (
    "nemotron_h_g2", {"layers_block_type": ["mlp"] * 900}, "900 layers, the folder holds 30",
  ),
  "mixer bias": ("nemotron_h_g2", {"use_bias": True}, "use_bias=True: only False"),
  "mamba bias": ("nemotron_h_g2", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
  "attention bias": ("nemotron_h_g2", {"attention_bias": True}, "attention_bias=True"),
  "window": ("nemotron_h_g2", {"sliding_window": 128}, "sliding_window=128: only None"),
  "activation": ("nemotron_h_g2", {"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu': only 'relu2"),
  "gate": ("llama3", {"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
  "groups": ("nemotron_h_g2", {"n_groups": 4}, "mamba_num_heads=6: must be a multiple of n_groups"),
  "negative": ("nemotron_h_g2", {"ssm_state_size": -9}, "ssm_state_size=-9: must be a whole"),
  "fraction": ("llama3", {"hidden_size": 24.0}, "hidden_size=24.0: must be a whole number"),
  "huge": ("llama3", {"vocab_size": 10**30}, "vocab_size=1000000.*must be a whole number"),
  "missing": ("llama3", {"vocab_size": None}, "lacks the key 'vocab_size'"),
  "layers": ("llama3", {"num_hidden_layers": 10**9}, "the folder holds only 35 tensors"),
  "fewer layers": ("llama3", {"num_hidden_layers": 1}, "layers.1.*is none that config.json asks"),
  "more layers": ("llama3", {"num_hidden_layers": 3}, "lacks the tensor 'model.layers.2.input_"),
  "width": ("llama3", {"intermediate_size": 29}, r"shape \(28, 24\), config.json says \(29, 24\)"),
  "flag": ("llama3", {"mlp_bias": 1}, "mlp_bias=1: must be true or false"),
  "no bias": ("llama3", {"mlp_bias": False}, "proj.bias' is none that config.json asks for"),
  "expand": ("mamba2_g2", {"expand": 3}, "expand=3: times hidden_size=24 is not heads times"),
  "limits": ("mamba2_g2", {"time_step_limit": [0.1, 0.1]}, "must be a range"),
  "rope": ("llama3", {"rope_parameters": {"rope_type": "yarn"}}, "of kind 'yarn' are not known"),
  "rope table": ("llama3", {"rope_parameters": 3}, "rope_parameters=3: must be a table"),
  "theta": ("llama3", {"rope_parameters": {"rope_theta": math.inf}}, "must be a finite number"),
  "eps": ("llama3", {"rms_norm_eps": 0}, "config.json: ModelConfig: eps=0.0 and init_std"),
  "odd share": (
    "nemotron_bias", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "0.2 of 16 channels",
  ),
  "layer numbers": ("bamba_g1", {"attn_layer_indices": ["1"]}, "must be a list of layer numbers"),
  "granite experts": ("granite_rope", {"num_local_experts": 4}, "num_local_experts=4"),
  "multiplier": ("granite_rope", {"embedding_multiplier": 0}, "a multiplier must be a number of a"),
  "scale": ("granite_rope", {"attention_multiplier": "1"}, "attention_multiplier='1': a multipl"),
  "not all": ("falcon_h1_norm", {"ssm_multipliers": [1, 2]}, "must be a list of 5 multipliers"),
  "no number": ("falcon_h1_norm", {"mlp_multipliers": [1, True]}, "mlp_multipliers=.* a multip"),
  "endless": ("falcon_h1_norm", {"lm_head_multiplier": 1e40}, "lm_head_multiplier=1e.40: a multip"),
  "inner": ("falcon_h1_norm", {"mamba_d_ssm": 41}, "41 channels are not 6 heads of 5"),
  "inner default": ("falcon_h1_norm", {"mamba_d_ssm": None}, "1024 channels are not 6 heads of 5"),
  "projector": ("falcon_h1_norm", {"projectors_bias": True}, "projectors_bias=True: only False"),
}


def changed(keys):
  """Returns a function that sets keys of a config.json; None removes one."""
  return lambda plain: {k: v for k, v in (plain | keys).items() if v is not None}


def same(one, other):
  """Whether two opened folders hold the same model."""
  (cfg, leaves), (cfg2, leaves2) = one, other
  assert cfg == cfg2
  assert set(leaves) == set(leaves2)
  return all(np.array_equal(leaves[path].read(), leaves2[path].read()) for path in leaves)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_clear_line(case, tmp_path):
  name, keys, message = REFUSED[case]
  folder = edited(GOLDEN / name, tmp_path / "in", config=changed(keys))
  with pytest.raises(ValueError, match=message) as caught:
    huggingface.open(folder)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("keys", [
  {"layers_block_type": None, "hybrid_override_pattern": "M-M*-"},
  {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"]},
  {"layers_block_type": None, "layer_types": ["mamba", "mlp", "mamba", "full_attention", "mlp"]},
  {"n_groups": None, "mamba_n_groups": 2, "conv_kernel": None, "mamba_d_conv": 3},
  {"head_dim": None, "attention_head_dim": 10},
], ids=["pattern", "old words", "layer_types", "old keys", "attention_head_dim"])
def test_older_words_describe_the_same_hybrid(keys, tmp_path):
  folder = edited(HYBRID, tmp_path / "in", config=changed(keys))
  assert same(huggingface.open(folder), huggingface.open(HYBRID))


def test_names_in_memory_are_read_like_those_on_disk(tmp_path):
  def rename(tensors):
    return {name.replace("backbone.", "model."): value for name, value in tensors.items()}

  folder = edited(HYBRID, tmp_path / "in", tensors=rename)
  assert same(huggingface.open(folder), huggingface.open(HYBRID))
  twice = edited(HYBRID, tmp_path / "twice", tensors=lambda held: held | rename(held))
  with pytest.raises(ValueError, match="is there under two names"):
    huggingface.open(twice)


def test_older_rotary_keys_describe_the_same_model(tmp_path):
  def old(plain):
    scaling = dict(plain.pop("rope_parameters"))
    scaling["type"] = scaling.pop("rope_type")
    return plain | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}

  folder = edited(GOLDEN / "llama3", tmp_path / "in", config=old)
  assert same(huggingface.open(folder), huggingface.open(GOLDEN / "llama3"))
  assert huggingface.open(folder)[0].blocks[0].rope == Rope(
    5000.0, scaling=Llama3Scaling(factor=4.0, low=1.0, high=4.0, context=16)
  )


@pytest.mark.parametrize("name", checkpoints.GOLDENS)
def test_any_value_of_any_key_is_one_clear_line_or_a_model(name, tmp_path):
  rng, refused = random.Random(name), 0
  plain = json.loads((GOLDEN / name / "config.json").read_text())
  shutil.copytree(GOLDEN / name, tmp_path / "in")
  for key in sorted(plain.keys() | EXTRA):
    value = rng.choice(ODD)
    (tmp_path / "in" / "config.json").write_text(json.dumps(plain | {key: value}))
    try:
      cfg, leaves = huggingface.open(tmp_path / "in")
    except (ValueError, FileNotFoundError) as error:
      assert is_mistake(error), (key, value)
      assert "\n" not in str(error) and len(str(error)) < 600
      refused += 1
    else:
      config.check(cfg, lazy.tree(leaves))
  assert refused > 5


def test_the_list_of_layers_is_written_in_the_form_that_every_reader_knows(tmp_path):
  cfg, leaves = huggingface.open(HYBRID)
  huggingface.write(tmp_path / "out", cfg, leaves)
  plain = json.loads((tmp_path / "out" / "config.json").read_text())
  assert plain["hybrid_override_pattern"] == "M-M*-" and plain["num_hidden_layers"] == 5
  assert not {"layers_block_type", "layer_types"} & set(plain)


def test_infinity_is_read_and_written_as_an_object(tmp_path):
  cfg, leaves = huggingface.open(HYBRID)
  assert cfg.blocks[0].dt_limits == (0.001, math.inf)
  huggingface.write(tmp_path / "out", cfg, leaves)
  text = (tmp_path / "out" / "config.json").read_text()
  assert json.loads(text)["time_step_limit"] == [0.001, {"__float__": "Infinity"}]
  wide = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
  folder = edited(GOLDEN / "mamba2_g2", tmp_path / "in", config=changed(wide))
  assert huggingface.open(folder)[0].blocks[0].dt_limits == (0.0, math.inf)


def test_nothing_is_read_before_a_leaf_is(tmp_path, monkeypatch):
  reads = []
  original = safetensors.read

  def counted(*args, **more):
    reads.append(more)
    return original(*args, **more)

  monkeypatch.setattr(safetensors, "read", counted)
  _, leaves = huggingface.open(HYBRID)
  assert reads == []
  leaf = leaves["blocks/00/w_b_DGN"]
  assert leaf.read().shape == leaf.shape == (24, 2, 9)
  assert reads == [{"rows": (60, 78)}]  # B alone out of z, x, B, C, dt


def test_half_precision_is_read_as_float32_and_bfloat16_stays(tmp_path):
  halves = {np.float16: np.float32, np.float64: np.float32, jnp.bfloat16: jnp.bfloat16}
  for number, (stored, wanted) in enumerate(halves.items()):
    folder = edited(
      HYBRID, tmp_path / str(number), config=changed({"dtype": "bfloat16"}),
      tensors=lambda held, stored=stored: {k: v.astype(stored) for k, v in held.items()},
    )
    cfg, leaves = huggingface.open(folder)
    assert cfg.dtype == "bfloat16"
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(wanted)}
    assert {leaf.read().dtype for leaf in leaves.values()} == {np.dtype(wanted)}


def test_whole_numbers_are_no_weights(tmp_path):
  folder = edited(
    HYBRID, tmp_path / "in", tensors=lambda held: {k: v.astype("int8") for k, v in held.items()}
  )
  with pytest.raises(ValueError, match="has dtype int8, weights have a float"):
    huggingface.open(folder)


def test_a_hybrid_that_claims_to_be_tied_is_what_is_on_disk(tmp_path):
  """The class never ties: with a head on disk it is read, without one the embedding serves."""
  with_head = edited(HYBRID, tmp_path / "1", config=changed({"tie_word_embeddings": True}))
  assert same(huggingface.open(with_head), huggingface.open(HYBRID))
  without = edited(
    HYBRID, tmp_path / "2", config=changed({"tie_word_embeddings": True}),
    tensors=lambda held: {k: v for k, v in held.items() if k != "lm_head.weight"},
  )
  cfg, leaves = huggingface.open(without)
  assert cfg.tied and "head/w_head_DV" not in leaves
  assert huggingface.write(tmp_path / "out", cfg, leaves) == "nemotron_h"
  written = safetensors.open_folder(tmp_path / "out")
  head = written["lm_head.weight"].read()
  np.testing.assert_array_equal(head, leaves["embed/w_embed_VD"].read())
  assert not huggingface.open(tmp_path / "out")[0].tied


def test_the_state_spaces_layout_is_read_with_its_padded_rows(tmp_path):
  def plain(_):
    inner = {"layer": "Mamba2", "d_state": 7, "headdim": 8, "ngroups": 2, "conv_bias": False}
    return {
      "d_model": 24, "n_layer": 3, "vocab_size": 43, "pad_vocab_size_multiple": 16,
      "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
      "ssm_cfg": inner | {"dt_limit": [0.005, 0.05]},
    }

  def original(held):
    embedding = held.pop("backbone.embeddings.weight")
    padded = np.concatenate([embedding, np.full((5, 24), 99, np.float32)])
    return held | {"backbone.embedding.weight": padded, "lm_head.weight": padded}

  source = GOLDEN / "mamba2_g2"
  folder = edited(source, tmp_path / "in", config=plain, tensors=original)
  cfg, leaves = huggingface.open(folder)
  assert (cfg.V, cfg.vocabulary, cfg.tied) == (48, 43, True)
  assert huggingface.write(tmp_path / "out", cfg, leaves) == "mamba2"
  want, got = huggingface.open(source), huggingface.open(tmp_path / "out")
  assert got[0] == want[0].replace(tied=True)
  for path, leaf in got[1].items():
    np.testing.assert_array_equal(leaf.read(), want[1][path].read())
  for key, value in (("layer", "Mamba1"), ("rmsnorm", False)):
    wrong = plain(None)
    wrong["ssm_cfg"] |= {key: value}
    place = edited(source, tmp_path / key, config=lambda _, w=wrong: w, tensors=original)
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
      huggingface.open(place)


def test_pickled_weights_are_named_and_never_opened(tmp_path):
  (tmp_path / "in").mkdir()
  shutil.copy(HYBRID / "config.json", tmp_path / "in")
  (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"no pickle")
  with pytest.raises(FileNotFoundError, match="pickles can run code and are never loaded"):
    huggingface.open(tmp_path / "in")


def test_token_ids_and_the_family_of_another_folder_are_carried_on(tmp_path):
  source = edited(
    GOLDEN / "granite_rope", tmp_path / "in", config=changed({"eos_token_id": [2, 5]})
  )
  vocabulary = '{"model": {"vocab": {"a": 42}}}'
  (source / "tokenizer.json").write_text(vocabulary)
  cfg, leaves = huggingface.open(source)
  assert huggingface.write(tmp_path / "alone", cfg, leaves) == "bamba"
  assert huggingface.write(tmp_path / "like", cfg, leaves, like=source) == "granitemoehybrid"
  plain = json.loads((tmp_path / "like" / "config.json").read_text())
  assert (plain["bos_token_id"], plain["eos_token_id"]) == (1, [2, 5])
  assert (tmp_path / "like" / "tokenizer.json").read_text() == vocabulary
  outside = edited(source, tmp_path / "outside", config=changed({"eos_token_id": 43}))
  with pytest.raises(ValueError, match="eos_token_id=43 is outside V=43"):
    huggingface.write(tmp_path / "out", cfg, leaves, like=outside)
  assert not (tmp_path / "out").exists()


def test_a_dtype_that_is_asked_for_is_written_and_stated(tmp_path):
  cfg, leaves = huggingface.open(GOLDEN / "nemotron_bias")
  huggingface.write(tmp_path / "out", cfg, leaves, dtype="bfloat16")
  tensors = safetensors.open_folder(tmp_path / "out")
  assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(jnp.bfloat16)}
  cfg2, leaves2 = huggingface.open(tmp_path / "out")
  assert cfg2 == cfg.replace(dtype="bfloat16")
  assert leaves2["final/norm_gain_D"].dtype == np.float32


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_stored_head_is_the_head_unless_it_is_the_embedding(tmp_path, shift):
  def headed(held):
    head = held["model.embed_tokens.weight"].copy()
    head[-1] += shift
    return held | {"lm_head.weight": head}

  folder = edited(
    GOLDEN / "llama3", tmp_path / "in", config=changed({"tie_word_embeddings": True}),
    tensors=headed,
  )
  cfg, leaves = huggingface.open(folder)
  assert cfg.tied == (shift == 0)
  if shift:
    embed_VD, head_DV = leaves["embed/w_embed_VD"].read(), leaves["head/w_head_DV"].read()
    np.testing.assert_array_equal((head_DV.T - embed_VD)[:-1], 0)
    np.testing.assert_allclose((head_DV.T - embed_VD)[-1], 1, atol=1e-6)


@pytest.mark.parametrize("width", ["float32", "bfloat16"])
def test_the_dtype_that_is_stated_is_the_one_that_is_stored(tmp_path, width):
  cfg, leaves = huggingface.open(GOLDEN / "nemotron_bias")
  wide = {path: leaf.read() for path, leaf in leaves.items()}
  kept = {path: x.astype(width) if "norm_gain" not in path else x for path, x in wide.items()}
  made = {p: lazy.Leaf(x.shape, x.dtype, lambda x=x: x) for p, x in kept.items()}
  other = {"float32": "bfloat16", "bfloat16": "float32"}[width]
  huggingface.write(tmp_path / "out", cfg.replace(dtype=other), made)
  stored = safetensors.open_folder(tmp_path / "out").values()
  assert {str(tensor.dtype) for tensor in stored} == {width}
  assert huggingface.open(tmp_path / "out")[0].dtype == width


def test_whole_numbers_are_not_written_as_weights(tmp_path):
  cfg, leaves = huggingface.open(HYBRID)
  leaf = leaves["final/norm_gain_D"]
  whole = leaf._replace(dtype=np.dtype(np.int32), read=lambda: leaf.read().astype(np.int32))
  with pytest.raises(ValueError, match="'final/norm_gain_D' has dtype int32, weights are float32"):
    huggingface.write(tmp_path / "out", cfg, leaves | {"final/norm_gain_D": whole})
  assert list(tmp_path.iterdir()) == []


def test_leaves_of_another_model_are_refused_and_nothing_is_left(tmp_path):
  _, leaves = huggingface.open(HYBRID)
  with pytest.raises(ValueError, match=r"a_log_GH. has shape \(2, 3\), its letters say \(2, 4"):
    huggingface.write(tmp_path / "out", models.make(), leaves)
  assert list(tmp_path.iterdir()) == []


def test_every_leaf_is_announced_as_it_is_read():
  for name in checkpoints.GOLDENS:
    cfg, leaves = huggingface.open(GOLDEN / name)
    config.check(cfg, lazy.tree(leaves))
    for path, leaf in leaves.items():
      array = leaf.read()
      assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), path


@pytest.mark.parametrize("normed, before, gate", [
  (True, True, "before"), (True, False, "gated"), (False, True, "none"), (False, False, "none"),
])
def test_where_a_falcon_norms_is_read_and_written(normed, before, gate, tmp_path):
  def bare(held):
    return {name: x for name, x in held.items() if normed or not name.endswith("mamba.norm.weight")}

  keys = {"mamba_rms_norm": normed, "mamba_norm_before_gate": before}
  folder = edited(
    GOLDEN / "falcon_h1_norm", tmp_path / "in", config=changed(keys), tensors=bare)
  cfg, leaves = huggingface.open(folder)
  assert {block.ssm.gate for block in cfg.blocks[::2]} == {gate}
  huggingface.write(tmp_path / "out", cfg, leaves)
  assert same(huggingface.open(tmp_path / "out"), (cfg, leaves))
