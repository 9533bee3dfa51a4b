"""Seconds are sums over blocks: bounds by published peaks, or what was measured and a fit of it."""

import json
import math

import pytest

from cases import models
from hybridlm.config import PRESETS
from hybridlm.prune import cost, devices, latency
from hybridlm.prune.devices import Device
from hybridlm.prune.latency import Entry, Table

FAST = Device({"float32": 1e30}, 1e3, 1e9)  # only bytes take time
WIDE = Device({"float32": 1e3}, 1e30, 1e9)  # only FLOPs do


def entries(cfg, phase, places, law):
  """Returns timings of all blocks of a model and its head by a law of FLOPs and bytes."""
  made = []
  for block in (*(block for block, _ in cost.distinct(cfg)), None):
    for context, batch in places:
      work = latency.work(cfg, block, phase, context, batch)
      kind = latency.HEAD if block is None else block.symbol
      made.append(Entry(kind, latency.sizes(cfg, block), phase, context, batch, law(*work), *work))
  return made


def test_a_bound_by_flops_is_the_cost_models_and_one_by_bytes_reads_weights_and_state():
  cfg, place = models.make(pattern="M-*"), {"context": 50, "batch": 3}
  whole = cost.cost(cfg, **place)
  head = 2 * cfg.D * cfg.V
  prefill = latency.estimate(cfg, WIDE, phase="prefill", **place)
  assert prefill == pytest.approx(1e-3 * ((whole.prefill_flops - head) * 150 + head * 3), rel=1e-6)
  decode = latency.estimate(cfg, WIDE, phase="decode", **place)
  assert decode == pytest.approx(1e-3 * whole.decode_flops * 3)
  stream = 2 * 3 * 16 * 4 * 4  # in and out of three blocks and the head
  weights = 4 * (whole.parameters - 16 * 31 - 16)  # one row of the embedding is read, not all
  state = whole.kv_bytes + 2 * (whole.conv_bytes + whole.ssm_bytes)
  step = latency.estimate(cfg, FAST, phase="decode", **place)
  assert step == pytest.approx(1e-3 * (weights + state + stream + 3 * 31 * 4))


def test_each_block_is_bound_by_what_binds_it():
  cfg, place = models.make(pattern="M-*"), {"phase": "decode", "context": 50, "batch": 3}
  both = Device({"float32": 7e3}, 5e3, 1e9)
  blocks = (*cfg.blocks, None)
  want = sum(max(w.flops / 7e3, w.bytes / 5e3)
             for w in (latency.work(cfg, b, "decode", 50, 3) for b in blocks))
  assert latency.estimate(cfg, both, **place) == pytest.approx(want)


def test_what_was_measured_is_what_is_said():
  cfg = models.make(pattern="M-M*-")
  made = entries(cfg, "decode", [(64, 2)], lambda flops, moved: 1.0)
  own = [entry._replace(seconds=10.0 ** -i) for i, entry in enumerate(made)]
  timed = Table({"dtype": "float32"}, tuple(own))
  other = entries(models.make(pattern="M-*", D=8, F=10), "decode", [(64, 2)], lambda *work: 7.0)
  timed = timed.add(other)  # no line goes through both
  found = latency.estimate(cfg, timed, phase="decode", context=64, batch=2)
  assert found == pytest.approx(2 * 1.0 + 2 * 0.1 + 0.01 + 0.001)  # M twice, - twice, *, head


def test_sizes_between_those_measured_follow_flops_and_bytes():
  cfg = models.make(pattern="M-*")
  small = models.make(pattern="M-*", D=8, F=12, H=2)

  def law(flops, moved):
    return 3e-6 + 2e-9 * flops + 5e-9 * moved

  places = [(c, b) for c in (16, 64, 128) for b in (1, 4)]
  timed = Table({"dtype": "float32"}).add(entries(cfg, "decode", places, law))
  timed = timed.add(entries(small, "decode", places, law))
  middle = models.make(pattern="M-*", D=12, F=17, H=3)
  for context, batch in ((16, 1), (100, 3)):
    want = sum(law(*latency.work(middle, block, "decode", context, batch))
               for block in (*middle.blocks, None))
    found = latency.estimate(middle, timed, phase="decode", context=context, batch=batch)
    assert found == pytest.approx(want, rel=1e-3)


def test_nothing_that_is_fitted_falls_with_work():
  cfg = models.make(pattern="-")
  made = entries(cfg, "decode", [(8, 1), (8, 2), (8, 4)], lambda flops, moved: 1.0)
  falling = [entry._replace(seconds=1.0 / (1 + i)) for i, entry in enumerate(made)]
  fits = Table({"dtype": "float32"}, tuple(falling)).fits
  assert all(term >= 0 for fit in fits.values() for term in fit)


def test_a_table_comes_back_from_its_file_and_newer_timings_replace_older(tmp_path):
  cfg = models.make()
  made = entries(cfg, "prefill", [(8, 1)], lambda flops, moved: 0.1)
  timed = Table({"device": "x", "dtype": "float32"}).add(made)
  assert len(timed.entries) == 4  # M, -, * and the head
  newer = timed.add([made[0]._replace(seconds=0.3)])
  assert len(newer.entries) == 4 and newer.measured[made[0][:5]] == 0.3
  newer.save(tmp_path / "t.json")
  assert Table.load(tmp_path / "t.json") == newer
  assert newer.has(cfg, cfg.blocks[0], phase="prefill", context=8, batch=1)
  assert not newer.has(cfg, cfg.blocks[0], phase="decode", context=8, batch=1)
  assert not newer.has(models.make(D=8), cfg.blocks[0], phase="prefill", context=8, batch=1)


def test_a_file_that_is_no_table_is_refused(tmp_path):
  path = tmp_path / "t.json"
  with pytest.raises(FileNotFoundError, match="no such file"):
    Table.load(path)
  good = {"format": latency.FORMAT, "meta": {}, "entries": []}
  entry = Entry("M", "{}", "decode", 8, 1, 0.0, 1.0, 1.0)._asdict()
  for wrong in ({**good, "format": "x"}, {**good, "entries": [{"kind": "M"}]}, [1],
                {**good, "entries": [entry]}):
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="timings .*t.json"):
      Table.load(path)


def test_throughput_counts_new_tokens_of_all_sequences():
  cfg, place = models.make(), {"context": 40, "batch": 3}
  step = latency.estimate(cfg, FAST, phase="decode", **place)
  assert latency.tokens_per_second(cfg, FAST, **place) == pytest.approx(3 / step)
  prompt = latency.estimate(cfg, FAST, phase="prefill", context=30, batch=3)
  middle = latency.estimate(cfg, FAST, phase="decode", context=35, batch=3)
  found = latency.tokens_per_second(cfg, FAST, **place, prompt=30)
  assert found == pytest.approx(3 * 10 / (prompt + 10 * middle))


def test_the_published_4b_is_faster_than_its_parent_on_every_device():
  for device in devices.DEVICES.values():
    small, parent = (
      latency.tokens_per_second(PRESETS[name], device, context=65536 + 1024, batch=4, prompt=65536)
      for name in ("nemotron_h_4b", "nemotron_h_8b")
    )
    assert 1.3 < small / parent < 1.9  # published: 1.35 (arXiv 2504.11409, figure 8)
    assert device.memory > 1e10 and math.isfinite(device.peak("float32"))


@pytest.mark.parametrize("call, message", [
  (lambda cfg: latency.estimate(cfg, FAST, phase="train", context=8, batch=1), "phase 'train'"),
  (lambda cfg: latency.estimate(cfg, FAST, phase="decode", context=0, batch=1), "context=0"),
  (lambda cfg: latency.estimate(cfg, Table({"device": "x"}), phase="decode", context=8, batch=1),
   "no decode of a block of kind 'head' was measured on x"),
  (lambda cfg: latency.estimate(cfg, Table({"dtype": "bfloat16"}), phase="decode", context=8,
                                batch=1), "timings are of bfloat16, the model computes in float32"),
  (lambda cfg: latency.estimate(cfg.replace(dtype="bfloat16"), FAST, phase="decode", context=8,
                                batch=1), "no peak for dtype 'bfloat16', known: float32"),
  (lambda cfg: latency.tokens_per_second(cfg, FAST, context=8, batch=1, prompt=8), "prompt=8"),
  (lambda cfg: devices.device("abacus"), "device 'abacus' is not one of"),
])
def test_what_no_source_can_say_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(models.make())
