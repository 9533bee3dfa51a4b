"""Damaged folders: each one is a clear error of ours, or a load that changed nothing else."""

import json
import random
import struct
import tracemalloc

import numpy as np
import pytest

from cases import models
from experiments import mistakes, random_checkpoint
from hybridlm.interop import huggingface, native, safetensors

ODD = (
  None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**40, 0.5, -1.5, 1e308, float("nan"),
  float("inf"), "", "x", "16", "../x", "F32", "BF16", "M" * 3000, [], {}, [1], [[[]]], {"a": 1},
  [0, 4], [2**70, 2**71], ["M"] * 500, [None] * 40,
)
MOST_BYTES = 64 << 20
FORMATS = {"hf": huggingface, "native": native}
# Byte ranges of headers, and whole text files, are damaged; tensors' own bytes are not.
CASES = {"hf": 200, "native": 80}


def write(kind, folder):
  cfg = models.make("untied", "M-*")
  leaves = random_checkpoint.leaves(cfg)
  FORMATS[kind].write(folder, cfg, leaves)
  if kind == "hf":  # sharded, as published folders are
    items = [tuple(each) for each in huggingface.tensors(cfg, leaves, "nemotron_h")]
    (folder / "model.safetensors").unlink()
    safetensors.write_folder(folder, items, shard_bytes=4500, metadata={"format": "pt"})


def places(value, at=()):
  """Every path into a JSON value."""
  if at:
    yield at
  inner = value.items() if isinstance(value, dict) else enumerate(value)
  for key, each in inner if isinstance(value, (dict, list)) else ():
    if isinstance(each, (dict, list)):
      yield from places(each, (*at, key))
    else:
      yield (*at, key)


def change_json(rng, data):
  """Removes, replaces, renames or swaps values of a JSON text, or writes it in another order."""
  value = json.loads(data)
  if rng.random() < 0.25:
    keys = rng.sample(sorted(value), len(value))
    return json.dumps({key: value[key] for key in keys}, indent=rng.choice((None, 1))).encode()
  found = list(places(value))
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    one, two = rng.choice(found), rng.choice(found)
    kind = rng.choice(("remove", "replace", "replace", "rename", "swap"))
    try:
      holder, other = value, value
      for key in one[:-1]:
        holder = holder[key]
      for key in two[:-1]:
        other = other[key]
      if kind == "remove":
        del holder[one[-1]]
      elif kind == "replace":
        holder[one[-1]] = rng.choice(ODD)
      elif kind == "rename":
        holder[str(rng.choice(ODD))[:50]] = holder.pop(one[-1])
      else:
        holder[one[-1]], other[two[-1]] = other[two[-1]], holder[one[-1]]
    except (KeyError, IndexError, TypeError):
      continue  # an earlier change took the place away
  return json.dumps(value).encode()


def change_bytes(rng, data):
  """Flips, drops, doubles or cuts bytes anywhere."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8))):
    at = rng.randrange(max(1, len(data) - 1))
    kind = rng.choice(("flip", "flip", "drop", "insert", "cut")) if len(data) > 1 else "flip"
    if kind == "flip":
      data[at] ^= 1 << rng.randrange(8)
    elif kind == "drop":
      del data[at]
    elif kind == "insert":
      data[at:at] = bytes(rng.choices(b'0{}[]",:\\\xff9', k=rng.choice((1, 40))))
    else:
      del data[max(1, at):]
  return bytes(data)


def change_text(rng, data):
  return rng.choice((change_json, change_json, change_bytes))(rng, data)


def change_weights(rng, data):
  """Damages the length, the header or the end of a safetensors file."""
  length = struct.unpack("<Q", data[:8])[0]
  header, rest = data[8 : 8 + length], data[8 + length :]
  kind = rng.choice(("length", "header", "header", "json", "json", "cut", "append"))
  if kind == "length":
    odd = (0, 1, length - 1, length + 1, length + len(rest), len(data), 1 << 20, 1 << 40, 2**64 - 1)
    return struct.pack("<Q", rng.choice(odd)) + header + rest
  if kind == "cut":
    return data[: rng.choice((0, 7, 8, 9, rng.randrange(len(data)), len(data) - 1))]
  if kind == "append":
    return data + bytes(rng.choice((1, 8, 1000)))
  header = (change_json if kind == "json" else change_bytes)(rng, header)
  return struct.pack("<Q", len(header)) + header + rest


def outcome(kind, folder):
  """Opens and reads everything; returns the error, or every leaf's value."""
  try:
    leaves = FORMATS[kind].open(folder)[1]
    values = {path: leaf.read() for path, leaf in leaves.items()}
  except mistakes.TYPES as error:
    assert mistakes.is_mistake(error), repr(error)
    assert "\n" not in str(error) and len(str(error)) < 1500 and str(error)
    return error
  for path, value in values.items():
    assert value.shape == leaves[path].shape and value.dtype == leaves[path].dtype
  return values


def unchanged(before, after):
  """Names of tensors whose entries no damage has touched."""
  return {name for name, entry in before.tensors.items() if after.tensors.get(name) == entry}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_damaged_folder_is_a_clear_error_or_loads_what_was_not_damaged(tmp_path, kind):
  folder = tmp_path / "m"
  write(kind, folder)
  files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix}
  files = {name: data for name, data in files.items() if not name.startswith(".")}
  headers = {name: safetensors.read_header(folder / name) for name in files if "json" not in name}
  original = outcome(kind, folder)
  assert (len(headers), len(files)) == {"hf": (5, 7), "native": (1, 2)}[kind]
  seen = {"error": 0, "loaded": 0}
  tracemalloc.start()
  for number in range(CASES[kind]):
    rng = random.Random(f"{kind} {number}")
    texts = sorted(files.keys() - headers.keys())
    name = rng.choice((*texts, rng.choice(sorted(headers))))
    change = change_weights if name in headers else change_text
    (folder / name).write_bytes(change(rng, files[name]))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = outcome(kind, folder)
    assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES, (number, name)
    if isinstance(found, Exception):
      seen["error"] += 1
    else:
      seen["loaded"] += 1
      whole = name not in headers or unchanged(
        headers[name], safetensors.read_header(folder / name)
      ) == headers[name].tensors.keys()
      for path, value in found.items():
        if whole and path in original and value.shape == original[path].shape:
          np.testing.assert_array_equal(value, original[path], err_msg=f"{number} {name} {path}")
    (folder / name).write_bytes(files[name])
  tracemalloc.stop()
  assert seen["error"] > CASES[kind] // 2 and seen["loaded"] > CASES[kind] // 20, seen


def test_tensors_that_damage_did_not_touch_are_read_unchanged(tmp_path):
  made = {name: np.full((3, 5), i, np.float32) for i, name in enumerate("abcdefgh")}
  items = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in made.items()]
  safetensors.write_folder(tmp_path, items, metadata={})
  path = tmp_path / "model.safetensors"
  data, header = path.read_bytes(), safetensors.read_header(path)
  loaded = 0
  for number in range(200):
    path.write_bytes(change_weights(random.Random(number), data))
    try:
      found = safetensors.open_folder(tmp_path)
      same = unchanged(header, safetensors.read_header(path))
    except ValueError as error:
      assert mistakes.is_mistake(error) and "\n" not in str(error) and str(path) in str(error)
      continue
    loaded += 1
    assert all((found[name].read() == made[name]).all() for name in same)
  assert 10 < loaded < 150
