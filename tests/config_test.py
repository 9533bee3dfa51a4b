"""Configs are frozen lists of typed blocks; counts come from names and sizes alone."""

import copy
import dataclasses
import json
import math
import pickle

import pytest

from cases import models
from hybridlm import config
from hybridlm.config import Fusion, Llama3Scaling, Mamba, Mlp, ModelConfig, Rope
from hybridlm.ops import attention
from hybridlm.ops.ssd import api as scans

PUBLISHED = {
  "nemotron_h_8b": 8_100_852_736,
  "nemotron_h_4b": 4_489_223_040,
  "nemotron_h_47b": 46_791_554_816,
  "nemotron_h_56b": 56_324_350_464,
  "nemotron_nano_2_12b": 12_310_001_152,
  "nemotron_nano_2_9b": 8_888_227_328,
  "nemotron_3_nano_4b": 3_973_556_832,
  "nemotron_4_15b": 15_628_775_424,
  "minitron_8b": 8_271_699_968,
  "minitron_4b": 4_190_509_056,
  "mamba2_1p3b": 1_343_757_312,
  "mamba2_780m": 780_161_280,
  "falcon_h1_0p5b": 521_411_104,
  "llama_3p1_8b": 8_030_261_248,
}


# Rounded as they were published: arXiv 2411.13676 and the name of the checkpoint.
HYMBA = {"hymba_125m": 125e6, "hymba_350m": 350e6, "hymba_1p5b": 1.52e9}


@pytest.mark.parametrize("name", HYMBA)
def test_presets_of_hymba_have_their_size(name):
  assert config.parameters(config.PRESETS[name]) == pytest.approx(HYMBA[name], rel=0.04)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
  assert config.parameters(config.PRESETS[name]) == PUBLISHED[name]


def test_presets_are_exactly_the_published_family():
  assert set(config.PRESETS) == {*PUBLISHED, *HYMBA}
  assert config.PRESETS["mamba2_1p3b"].real_vocabulary == 50277
  depth = {name: len(cfg.blocks) for name, cfg in config.PRESETS.items()}
  assert depth["nemotron_h_8b"] == 52 and depth["nemotron_nano_2_9b"] == 56
  assert config.PRESETS["nemotron_h_47b"].pattern.count("*") == 5


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_a_config_survives_json(variant):
  cfg = models.make(variant, dt_limits=(0.001, math.inf), context=99)
  assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_a_config_survives_a_copy_and_another_process():
  cfg = models.hymba()
  assert copy.deepcopy(cfg) == copy.copy(cfg) == pickle.loads(pickle.dumps(cfg)) == cfg


def test_a_pattern_prints_itself():
  assert models.make(pattern="M-M*-").pattern == "M-M*-"


def test_sizes_that_agree_are_attributes_and_others_raise():
  cfg = models.make()
  assert (cfg.F, cfg.H, cfg.J) == (24, 4, 3)
  blocks = (*cfg.blocks[:-1], Mlp(F=7))
  with pytest.raises(AttributeError, match=r"blocks disagree: \[7, 24\]"):
    _ = cfg.replace(blocks=blocks).F
  with pytest.raises(AttributeError, match="no block has this axis"):
    _ = models.make().R


@pytest.mark.parametrize(
  "change, message",
  [
    ({"pattern": "M-Q"}, "'Q' is not one of"),
    ({"G": 0}, "G=0 must be a whole number"),
    ({"F": True}, "F=True must be a whole number"),
    ({"rotary": 3}, "nothing in it uses 'rotary'"),
    ({"norm": "batchnorm"}, "'batchnorm' is not one of"),
    ({"dtype": "float16"}, "'float16' is not one of"),
    ({"activation": "gelu"}, "'gelu' is not one of"),
    ({"dt_limits": (0.1, 0.1)}, "must satisfy 0 <= low < high"),
    ({"vocabulary": 32}, "vocabulary=32 must lie in 1..V=31"),
    ({"rope": Rope(rotary=12)}, "12 rotary channels do not fit"),
    ({"window": 0}, "window=0 must be"),
    ({"eps": 0.0}, "must be positive"),
    ({"chunk": 0}, "chunk=0 must be a whole number"),
    ({"ssd": "triton"}, "ssd='triton' is not one of reference, chunked"),
    ({"attention": "flash"}, "attention='flash' is not one of xla"),
  ],
)
def test_a_config_that_cannot_be_says_value_and_rule(change, message):
  with pytest.raises(ValueError, match=message):
    models.make(**change)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"kv_groups": (1, 2)}, r"kv_groups=\(1, 2\) must be a tuple of tuples of layers"),
    ({"kv_groups": ((1, 2, 3),)}, "layer 3 is global, others of the group have a window"),
    ({"kv_groups": ((0, 2),)}, "two or more layers in a row"),
    ({"kv_groups": ((1, 2), (2, 1))}, "two or more layers in a row"),
    ({"kv_groups": ((1, 2), (1, 2))}, "layer 1 is in two groups"),
    ({"global_layers": 3}, "global_layers=3 must be a tuple of layers"),
    ({"meta": 64, "context": 64}, "meta=64 tokens leave no place for text in a context of 64"),
    ({"P": 5}, "ssm has G·H·P=40 channels, its part of the fusion's Y=48 is 48"),
    ({**models.SIDES["mamba1"], "gate": "none"}, "nothing in it uses 'gate'"),
    ({"attention": "splash"}, "attention='splash' cannot express meta=9 tokens"),
    ({"attention": "cudnn", "meta": 0}, "attention='cudnn' cannot express values wider"),
  ],
)
def test_a_hymba_that_cannot_be_says_value_and_rule(change, message):
  with pytest.raises(ValueError, match=message):
    models.hymba(**change)


@pytest.mark.parametrize(
  "index, change, message",
  [
    (4, {"K": 3, "J": 2}, "block 4 shares .* with block 2, but has K=3 where that has K=2"),
    (4, {"rope": None}, "block 4 shares .* with block 2, but has rope=None where that has rope="),
    (4, {"window": None}, "has window=None where that has window=11"),
    (0, {"shared": True}, "block 0 shares keys and values, but no attention stands before it"),
  ],
)
def test_blocks_that_cannot_share_keys_say_why(index, change, message):
  blocks = list(models.hymba().blocks)
  attention = dataclasses.replace(blocks[index].attention, **change)
  blocks[index] = dataclasses.replace(blocks[index], attention=attention)
  with pytest.raises(ValueError, match=message):
    models.hymba().replace(blocks=tuple(blocks))


@pytest.mark.parametrize("runs", [((0, 9),), ((4, 2),), (), ((0, 2), (2, 4))])
def test_places_in_a_fusion_that_cannot_be_are_refused(runs):
  with pytest.raises(ValueError, match="must be ascending runs"):
    Fusion("mean", 8, runs)


def test_a_missing_size_and_an_empty_model_are_refused():
  with pytest.raises(ValueError, match="'M' needs the size G"):
    ModelConfig.from_pattern("M", V=3, D=4)
  with pytest.raises(ValueError, match="must be a tuple of at least one block"):
    ModelConfig(V=3, D=4, blocks=())
  with pytest.raises(ValueError, match="kind 'Z'"):
    ModelConfig.from_dict({"V": 3, "D": 4, "blocks": [{"kind": "Z"}]})
  with pytest.raises(ValueError, match="unexpected keyword"):
    ModelConfig.from_dict({**models.make().to_dict(), "colour": 1})


def test_names_of_implementations_are_those_that_ops_knows():
  assert config.SCANS == scans.IMPLEMENTATIONS
  assert config.ATTENTIONS == attention.IMPLEMENTATIONS
  assert config.CHUNK == scans.ACCELERATOR_CHUNK


def test_check_names_the_leaf_that_is_wrong():
  cfg = models.make()
  shapes = config.shapes(cfg)
  assert shapes["blocks"]["00"]["w_x_DGHP"] == (16, 2, 4, 6)
  params = models.params(cfg)
  config.check(cfg, params)
  wider = cfg.replace(blocks=(Mamba(2, 4, 6, 7), *cfg.blocks[1:]))
  with pytest.raises(ValueError, match="blocks/00/conv_b_WGN"):
    config.check(wider, params)
  with pytest.raises(ValueError, match="lack the leaf 'head/w_head_DV'"):
    config.check(cfg, {key: value for key, value in params.items() if key != "head"})
  with pytest.raises(ValueError, match="hold 'extra/w_up_DF'"):
    config.check(cfg, {**params, "extra": {"w_up_DF": params["head"]["w_head_DV"]}})


def test_a_stretched_rope_survives_json_and_slows_the_slow_pairs_only():
  rope = Rope(base=500.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, context=64))
  cfg = models.make(rope=rope)
  assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
  plain, slowed = Rope(base=500.0).frequencies(10), rope.frequencies(10)
  assert slowed[0] == plain[0] and slowed[-1] == plain[-1] / 8  # 10 and 0.07 turns in 64 positions
  turns = 64 * plain[1] / (2 * math.pi)  # 2.9: between
  share = (turns - 1) / 3
  assert 1 < turns < 4
  assert slowed[1] == pytest.approx(plain[1] * (share + (1 - share) / 8))
