"""What each published class can express, why not, and what serving asks of a shape."""

import dataclasses

import pytest

from cases import models
from hybridlm.config import PRESETS, GatedConv, Rope
from hybridlm.interop import huggingface
from hybridlm.interop.families import FAMILIES

LLAMA = {"activation": "swiglu", "rope": Rope(), "pattern": "*-*-", "D": 18}


def falcon(**changes):
  """Returns a small Falcon-H1: branches of different widths, their outputs added."""
  sizes = {"activation": "swiglu", "rope": Rope(), "fusion": "sum", "pattern": "=-=-", **changes}
  return models.make(**sizes)


def changed(cfg, index, **parts):
  """Returns a model with parts of one block replaced."""
  blocks = list(cfg.blocks)
  blocks[index] = dataclasses.replace(blocks[index], **parts)
  return cfg.replace(blocks=tuple(blocks))


def unequal(cfg, index, **sizes):
  """Returns a model with sizes of the SSM branch of one block replaced."""
  return changed(cfg, index, ssm=dataclasses.replace(cfg.blocks[index].ssm, **sizes))


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
  "side window": ("falcon_h1", falcon(window=5), r"block 0 has attention.window=5, the class only"),
  "turned": ("falcon_h1", falcon(rope=Rope(rotary=4)), "block 0 turns 4 of 10 channels, the class"),
  "pairs": (
    "falcon_h1", falcon(E=6, rope=Rope(rotary=6, frequency=(1.0, 0.5, 0.1))), "block 0 keeps 3 p",
  ),
  "unturned": ("falcon_h1", falcon(rope=None), "block 2 has no rotary positions"),
  "no MLP": ("falcon_h1", falcon(pattern="=-=", rope=Rope()), "'=-=' is not pairs of = and -"),
  "side heads": ("falcon_h1", unequal(falcon(), 2, H=3), "blocks 0 and 2 differ in ssm.H: 4 ag"),
  "gate": ("nemotron_h", models.make(gate="before"), "block 0 has gate='before', the class only"),
  "no norm": ("mamba2", models.make(pattern="M", gate="none"), "block 0 has gate='none'"),
  "mlp bias": ("granitemoehybrid", models.make(**LLAMA, bias=True), "block 1 has bias=True"),
  "read only": ("state_spaces", models.make(pattern="M"), "this layout is only read"),
}
# What no published class has, and the one reason that is given.
NOWHERE = {
  "mean": (models.hymba(), "block 0 joins attention and SSM heads by the mean of their normed"),
  "mamba1": (models.make(pattern="S-", R=7), "block 0 is a Mamba-1 mixer"),
  "shared": (models.make(pattern="**", kv_groups=((0, 1),)), "block 1 reads the keys and values"),
  "values": (models.make(pattern="*-", U=8), "block 0 has values of another width than keys, U=8"),
  "meta": (models.make(meta=3), "3 meta tokens stand before every document"),
  "off": (changed(falcon(), 2, attention=None), "block 2 has its attention branch off"),
  "no state": (
    changed(falcon(), 0, ssm=GatedConv(G=2, H=4, P=6)), "block 0 is a Mamba mixer without its",
  ),
}
CHOSEN = {
  "nemotron_h": models.make(),
  "mamba2": models.make(pattern="MM"),
  "llama": models.make(**LLAMA),
  "nemotron": models.make("layernorm", pattern="*-", window=None),
  "bamba": models.make("swiglu", pattern="M-*-", bias=False, rope=Rope()),
  "granitemoehybrid": models.make("swiglu", pattern="M-*-", bias=False),
  "falcon_h1": falcon(gate="none"),
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


@pytest.mark.parametrize("case", NOWHERE)
def test_what_no_class_has_is_one_clear_line(case):
  cfg, reason = NOWHERE[case]
  for family in (None, "falcon_h1"):
    with pytest.raises(ValueError, match="express this model: ") as caught:
      huggingface.describe(cfg, family)
    assert str(caught.value).count(reason) == 1 and len(str(caught.value)) < 200


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


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("hymba")])
def test_every_preset_is_of_its_family_and_eight_devices_can_serve_it(preset):
  dense = {"nemotron_4_15b": "nemotron", "minitron_8b": "nemotron", "minitron_4b": "nemotron",
           "mamba2_1p3b": "mamba2", "mamba2_780m": "mamba2", "llama_3p1_8b": "llama",
           "falcon_h1_0p5b": "falcon_h1"}
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
  assert sizes(pattern="=-", fusion="sum", K=3, J=4, G=1, H=6, P=4, N=4) == "1, 3, 6"


def test_convolution_channels_that_cuda_kernels_refuse_are_named():
  notes = huggingface.serving_notes(models.make())
  assert notes[1].startswith("block 0 has 68 convolution channels")
  assert len(huggingface.serving_notes(models.make(N=8))) == 1
