"""Files that the format's own library reads and wrote, and files that break one of its rules."""

import json
import os
import struct
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors import numpy as library

from hybridlm.interop import safetensors as ours

SHAPES = {"a": (3, 5), "b": (), "c": (0, 4), "d": (2, 3, 7), "e.weight": (11,)}


def arrays(seed=0):
  """One array of every dtype and several shapes."""
  rng, made = np.random.default_rng(seed), {}
  for code, dtype in ours.DTYPES.items():
    for name, shape in SHAPES.items():
      made[f"{code}.{name}"] = rng.integers(0, 2 if code == "BOOL" else 100, shape).astype(dtype)
  return made


def items(tensors):
  return [(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()]


def write(path, table, data=b""):
  """Writes a file with a header that is not checked by anybody."""
  text = table if isinstance(table, bytes) else json.dumps(table).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same(got, want):
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
    assert got[name].tobytes() == array.tobytes(), name


def test_what_we_write_the_library_reads(tmp_path):
  made = arrays()
  ours.write_folder(tmp_path, items(made), metadata={"format": "pt"})
  same(library.load_file(tmp_path / "model.safetensors"), made)
  with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_we_read(tmp_path):
  made = arrays()
  library.save_file(made, tmp_path / "model.safetensors", metadata={"kind": "probe"})
  found = ours.open_folder(tmp_path)
  same({name: tensor.read() for name, tensor in found.items()}, made)
  assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
    n: (x.shape, x.dtype) for n, x in made.items()
  }
  header = ours.read_header(tmp_path / "model.safetensors")
  assert header.metadata == {"kind": "probe"} and header.tensors.keys() == made.keys()


def test_every_tensor_lies_at_a_multiple_of_its_width(tmp_path):
  ours.write_folder(tmp_path, items(arrays()), metadata={})
  header = ours.read_header(tmp_path / "model.safetensors")
  assert all(entry.start % entry.dtype.itemsize == 0 for entry in header.tensors.values())


def test_rows_are_those_of_the_whole_tensor(tmp_path):
  made = arrays()
  ours.write_folder(tmp_path, items(made), metadata={})
  tensor = ours.open_folder(tmp_path)["BF16.a"]
  np.testing.assert_array_equal(tensor.read(rows=(1, 3)), made["BF16.a"][1:3])
  assert tensor.read(rows=(2, 2)).shape == (0, 5)
  for rows in ((-1, 2), (0, 4), (2, 1)):
    with pytest.raises(ValueError, match=r"rows .* of a tensor of shape \(3, 5\)"):
      tensor.read(rows=rows)


def test_arrays_of_any_memory_order_are_written_in_c_order(tmp_path, monkeypatch):
  monkeypatch.setattr(ours, "PIECE", 1000)
  base = np.arange(4 * 30 * 50, dtype=np.int16).reshape(4, 30, 50)
  made = {"turned": base.T, "matrix": base[1].T.astype(jnp.bfloat16), "gaps": base[:, ::3, 1::2]}
  ours.write_folder(tmp_path, items(made), metadata={})
  same(library.load_file(tmp_path / "model.safetensors"), made)


@pytest.mark.parametrize("limit", [1, 100, 300])
def test_shards_and_their_index_hold_every_tensor_once(tmp_path, limit):
  made = arrays()
  ours.write_folder(tmp_path, items(made), shard_bytes=limit, metadata={})
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
  shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert sorted(set(index["weight_map"].values())) == shards and len(shards) > 3
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in made.values())
  held = {name: library.load_file(tmp_path / name) for name in shards}
  assert all(sum(x.nbytes for x in each.values()) <= limit or len(each) == 1
             for each in held.values())
  same({name: held[shard][name] for name, shard in index["weight_map"].items()}, made)
  same({name: tensor.read() for name, tensor in ours.open_folder(tmp_path).items()}, made)


def test_no_more_than_two_tensors_are_held_while_writing(tmp_path):
  size = 1 << 22
  streamed = [(f"t{i}", (size,), np.uint8, lambda: np.ones(size, np.uint8)) for i in range(12)]
  tracemalloc.start()
  ours.write_folder(tmp_path, streamed, shard_bytes=3 * size, metadata={})
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2.5 * size


@pytest.mark.parametrize("change", [
  ("dtype", lambda x: x.astype(np.float64)), ("shape", lambda x: x[:1]),
])
def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path, change):
  wrong = [("x", (2, 3), np.float32, lambda: change[1](np.ones((2, 3), np.float32)))]
  with pytest.raises(ValueError, match="tensor x: read as"):
    ours.write_folder(tmp_path, wrong, metadata={})
  assert not list(tmp_path.iterdir())


def test_names_and_dtypes_that_a_file_cannot_hold_are_refused(tmp_path):
  twice = items({"x": np.ones(2)}) * 2
  with pytest.raises(ValueError, match="a name stands twice"):
    ours.write_folder(tmp_path, twice, metadata={})
  with pytest.raises(ValueError, match="'x' has dtype complex64"):
    ours.write_folder(tmp_path, items({"x": np.ones(2, np.complex64)}), metadata={})


BROKEN = {
  "not UTF-8": (b'{"\xff": 1}', "not JSON"),
  "not JSON": (b"{", "not JSON"),
  "not an object": (b"[1]", "not an object"),
  "a nesting bomb": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
  "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "not JSON"),
  "a name twice": (b'{"a": {}, "a": {}}', "the key 'a' stands there twice"),
  "metadata of numbers": ({"__metadata__": {"a": 1}}, "not a table of strings"),
  "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "must have dtype"),
  "an extra field": ({"a": entry() | {"scale": 1}}, "no more"),
  "an unknown dtype": ({"a": entry("F8_E4M3")}, "dtype 'F8_E4M3' is not one of"),
  "a dtype that is a list": ({"a": entry(["F32"])}, "is not one of"),
  "a negative size": ({"a": entry(shape=(-2,))}, "whole numbers"),
  "a fraction": ({"a": entry(shape=(2.0,))}, "whole numbers"),
  "a truth value": ({"a": entry(shape=(True, 2))}, "whole numbers"),
  "a thousand axes": ({"a": entry(shape=(1,) * 1000)}, "at most 16"),
  "a size of 70 bits": ({"a": entry(shape=(1 << 70,))}, "whole numbers"),
  "a product of 90 bits": ({"a": entry(shape=(1 << 30,) * 3)}, "needs"),
  "nothing of a huge size": ({"a": entry(shape=(0, 1 << 62), offsets=(0, 0))}, "needs"),
  "offsets that are three": ({"a": entry(offsets=(0, 8, 8))}, "not two whole numbers"),
  "offsets that run back": ({"a": entry(offsets=(8, 0))}, "hold -8 bytes"),
  "a size that is not its bytes": ({"a": entry(shape=(3,))}, "hold 8 bytes"),
  "an end outside the file": ({"a": entry(shape=(4,), offsets=(0, 16))}, "truncated"),
  "a start far outside": ({"a": entry(offsets=(1 << 50, (1 << 50) + 8))}, "truncated"),
  "bytes that belong to none": ({"a": entry(shape=(1,), offsets=(0, 4))}, "belong to none"),
  "an overlap": (
    {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(offsets=(0, 8))}, "overlaps",
  ),
  "a hole": ({"a": entry(shape=(1,), offsets=(4, 8))}, "leaves a hole"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_header_that_breaks_a_rule_is_one_line_that_names_file_and_rule(tmp_path, case):
  table, message = BROKEN[case]
  path = write(tmp_path / "model.safetensors", table, bytes(8))
  with pytest.raises(ValueError, match=message) as caught:
    ours.open_folder(tmp_path)
  text = str(caught.value)
  assert text.startswith(str(path)) and "\n" not in text and len(text) < len(str(path)) + 300


@pytest.mark.parametrize("length", [3, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path, length):
  path = tmp_path / "model.safetensors"
  path.write_bytes(struct.pack("<Q", length) + b"{}")
  tracemalloc.start()
  with pytest.raises(ValueError, match=f"a header of {length} bytes; the file has 10"):
    ours.read_header(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1 << 20


def test_a_file_is_refused_that_is_shorter_than_a_length_or_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    ours.read_header(tmp_path / "absent")
  (tmp_path / "short").write_bytes(b"1234567")
  with pytest.raises(ValueError, match="7 bytes are too few"):
    ours.read_header(tmp_path / "short")


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
  ours.write_folder(tmp_path, items({"x": np.ones(9)}), metadata={})
  tensor = ours.open_folder(tmp_path)["x"]
  os.truncate(tmp_path / "model.safetensors", 100)
  with pytest.raises(ValueError, match="truncated"):
    tensor.read()


def sharded(folder):
  made = {"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)}
  ours.write_folder(folder, items(made), shard_bytes=1, metadata={})
  return json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEXES = {
  "no map": ({}, "weight_map is None"),
  "a map that is a list": ({"weight_map": ["x"]}, "not a table"),
  "a shard that is a number": ({"weight_map": {"x": 1}}, "not a safetensors file"),
  "a shard of another kind": ({"weight_map": {"x": "pytorch_model.bin"}}, "not a safetensors file"),
  "a path up": ({"weight_map": {"x": "../x.safetensors"}}, "not a plain file name"),
  "an absolute path": ({"weight_map": {"x": "/etc/x.safetensors"}}, "not a plain file name"),
  "a path of another system": ({"weight_map": {"x": "a\\x.safetensors"}}, "not a plain file name"),
  "a name with a zero byte": ({"weight_map": {"x": "\0.safetensors"}}, "not a plain file name"),
  "a shard that is missing": ({"weight_map": {"x": "gone.safetensors"}}, "no such file"),
  "a tensor that is missing": (
    {"weight_map": {"x": FIRST, "y": SECOND, "z": SECOND}}, "'z' of the index is missing",
  ),
  "a tensor in another shard": ({"weight_map": {"x": SECOND, "y": FIRST}}, "says otherwise"),
  "a tensor that is not listed": ({"weight_map": {"x": FIRST, "z": SECOND}}, "'y' is not in model"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_breaks_a_rule_is_one_line(tmp_path, case):
  index, message = INDEXES[case]
  sharded(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
  with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
    ours.open_folder(tmp_path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
  sharded(tmp_path)
  library.save_file({"x": np.ones(2), "y": np.ones(3)}, tmp_path / SECOND)
  with pytest.raises(ValueError, match="'x' is in two shards"):
    ours.open_folder(tmp_path)


def test_links_may_not_leave_the_folder_but_into_the_blobs_of_a_snapshot(tmp_path):
  outside = tmp_path / "elsewhere.safetensors"
  library.save_file({"x": np.ones(2)}, outside)
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "model.safetensors").symlink_to(outside)
  with pytest.raises(ValueError, match="the link leaves the folder"):
    ours.open_folder(folder)
  snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  outside.rename(blobs / "1234")
  (snapshot / "model.safetensors").symlink_to(blobs / "1234")
  np.testing.assert_array_equal(ours.open_folder(snapshot)["x"].read(), np.ones(2))


def test_pickles_are_never_opened(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
  with pytest.raises(FileNotFoundError, match="'pytorch_model.bin': pickles .* are never loaded"):
    ours.open_folder(tmp_path)
  (tmp_path / "pytorch_model.bin").unlink()
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    ours.open_folder(tmp_path)
  with pytest.raises(FileNotFoundError, match="no such folder"):
    ours.open_folder(tmp_path / "absent")
