"""What each published class can express, why not, and what serving asks of a shape."""

import dataclasses

import pytest

from cases import models
from hybridlm.config import PRESETS, Rope
from hybridlm.interop import huggingface
from hybridlm.interop.families import FAMILIES

LLAMA = {"activation": "swiglu", "rope": Rope(), "pattern": "*-*-", "D": 18}
# Family, config, a reason that must be among those given.
REASONS = {
  "pattern": ("bamba", models.make(), r"pattern 'M-M\*-' is not pairs of M or \* and -"),
  "attention": ("mamba2", models.make(), r"pattern 'M-M\*-' is not made of M alone"),
  "norm": ("nemotron_h", models.make("layernorm"), "has norm='layernorm1p'"),
  "rope": ("nemotron_h", models.make("layernorm"), "block 3 has rope=Rope"),
  "window": ("nemotron_h", models.make(window=5), "block 3 has window=5"),
  "bias": ("nemotron_h", models.make("swiglu"), "block 3 has bias=True"),
  "activation": ("nemotron_h", models.make("swiglu"), "block 1 has activation='swiglu'"),
  "dt": ("nemotron_h", models.make(dt_limits=(0.0, 0.1)), "block 0 clamps dt at 0.1"),
  "expand": ("mamba2", models.make(pattern="M", D=20), "48 Mamba channels .* multiple of D=20"),
  "heads": ("llama", models.make(**{**LLAMA, "D": 16}), "D=16 is not a multiple of its 6 att"),
  "no rope": ("llama", models.make(**{**LLAMA, "rope": None}), "block 0 has no rotary positions"),
  "part": ("llama", models.make(**{**LLAMA, "rope": Rope(rotary=4)}), "block 0 turns 4 of 10"),
  "relu2": ("llama", models.make(**{**LLAMA, "activation": "relu2"}), "activation='relu2', the"),
  "rmsnorm": ("nemotron", models.make(**LLAMA), "has norm='rmsnorm'"),
  "mlp bias": ("granitemoehybrid", models.make(**LLAMA, bias=True), "block 1 has bias=True"),
  "read only": ("state_spaces", models.make(pattern="M"), "this layout is only read"),
}
CHOSEN = {
  "nemotron_h": models.make(),
  "mamba2": models.make(pattern="MM"),
  "llama": models.make(**LLAMA),
  "nemotron": models.make("layernorm", pattern="*-", window=None),
  "bamba": models.make("swiglu", pattern="M-*-", bias=False, rope=Rope()),
  "granitemoehybrid": models.make("swiglu", pattern="M-*-", bias=False),
}


def mixed():
  cfg = models.make()
  blocks = list(cfg.blocks)
  blocks[2] = dataclasses.replace(blocks[2], H=3, P=7)
  blocks[4] = dataclasses.replace(blocks[4], F=11)
  return cfg.replace(blocks=tuple(blocks))


@pytest.mark.parametrize("case", REASONS)
def test_a_family_says_why_it_cannot_express_a_model(case):
  family, cfg, reason = REASONS[case]
  with pytest.raises(ValueError, match=f"family {family} cannot express this model: .*{reason}"):
    huggingface.describe(cfg, family)


def test_every_difference_between_blocks_is_named():
  with pytest.raises(ValueError) as caught:
    huggingface.describe(mixed(), "nemotron_h")
  for text in (
    "blocks 0 and 2 differ in H: 4 against 3",
    "blocks 0 and 2 differ in P: 6 against 7",
    "blocks 1 and 4 differ in F: 24 against 11",
  ):
    assert text in str(caught.value)


@pytest.mark.parametrize("family", CHOSEN)
def test_the_first_family_that_can_express_a_model_is_chosen(family):
  name, plain = huggingface.describe(CHOSEN[family])
  assert name == family == plain["model_type"]
  assert plain["architectures"] == [FAMILIES[family].architecture]


def test_where_none_can_every_family_gives_reasons():
  with pytest.raises(ValueError, match="no family can express this model") as caught:
    huggingface.describe(mixed().replace(norm="layernorm1p"))
  for name, family in FAMILIES.items():
    assert (f"{name}: " in str(caught.value)) == (family.describe is not None)


def test_an_unknown_family_is_named_with_those_there_are():
  with pytest.raises(ValueError, match="family 'gpt2' is not one of mamba2, nemotron_h"):
    huggingface.describe(models.make(), "gpt2")


def test_a_published_vocabulary_has_no_padded_rows():
  assert huggingface.describe(models.make(vocabulary=29))[1]["vocab_size"] == 29


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_of_its_family_and_eight_devices_can_serve_it(preset):
  dense = {"nemotron_4_15b": "nemotron", "minitron_8b": "nemotron", "minitron_4b": "nemotron",
           "mamba2_1p3b": "mamba2", "mamba2_780m": "mamba2", "llama_3p1_8b": "llama"}
  assert huggingface.describe(PRESETS[preset])[0] == dense.get(preset, "nemotron_h")
  note, = huggingface.serving_notes(PRESETS[preset])
  sizes = note.removeprefix("tensor parallel sizes this shape allows: ").split(", ")
  assert {"1", "2", "4", "8"} <= set(sizes)


def test_shards_divide_groups_unless_there_is_one_and_heads_always():
  def sizes(**changes):
    notes = huggingface.serving_notes(models.make(F=96, **changes))
    return notes[0].partition(": ")[2]

  mamba = {"pattern": "M-", "H": 6, "P": 4, "N": 4}
  assert sizes(**mamba, G=4) == "1, 2, 4"
  assert sizes(**mamba, G=1) == "1, 2, 3, 6"
  assert sizes(pattern="*-", K=2, J=6) == "1, 2, 4, 6, 12"
  assert sizes(pattern="*-", K=3, J=4) == "1, 3, 6, 12"


def test_convolution_channels_that_cuda_kernels_refuse_are_named():
  notes = huggingface.serving_notes(models.make())
  assert notes[1].startswith("block 0 has 68 convolution channels")
  assert len(huggingface.serving_notes(models.make(N=8))) == 1
