"""Llama models in GGUF files, one tensor at a time.

GGUF holds a matrix as [out, in], names a layer's tensors `blk.N.*`, and turns neighbouring channels
of a head together (pairs 2i and 2i + 1) where our attention turns channel i with i + E/2.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm import axes, config
from hybridlm.config import Attention, Mlp, ModelConfig, Rope, block_name
from hybridlm.data import gguf as metadata
from hybridlm.lazy import Leaf

ARCHITECTURE = "llama"
# Published tensor -> (leaf, letters of the published axes, outermost first).
OUTSIDE = {
  "token_embd": ("embed/w_embed_VD", "VD"),
  "output_norm": ("final/norm_gain_D", "D"),
  "output": ("head/w_head_DV", "VD"),
}
LAYER = (  # of each of a layer's two blocks
  {
    "attn_norm": ("norm_gain_D", "D"), "attn_q": ("w_q_DKJE", "KJED"),
    "attn_k": ("w_k_DKE", "KED"), "attn_v": ("w_v_DKE", "KED"),
    "attn_output": ("w_o_KJED", "DKJE"),
  },
  {
    "ffn_norm": ("norm_gain_D", "D"), "ffn_gate": ("w_gate_DF", "FD"), "ffn_up": ("w_up_DF", "FD"),
    "ffn_down": ("w_down_FD", "DF"),
  },
)
TURNED = ("attn_q", "attn_k")  # tensors whose E is stored in pairs
# Keys of the metadata that are read, or say what others say; any other may change the model.
READ = (
  "block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size",
  "attention.head_count", "attention.head_count_kv", "attention.key_length",
  "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
  "rope.dimension_count",
)
HARMLESS = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}


def open(path: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Leaf]]:
  """Returns the config and the leaves of a llama model; a leaf is dequantised when it is read.

  Leaves are float32, whatever the file's types.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the package gguf is missing, the file is damaged, or it holds another architecture,
      a scaled RoPE, tensors that a llama has not, or tensors of other shapes.
  """
  read = metadata.reader(path)
  tensors = {tensor.name: tensor for tensor in read.tensors}
  try:
    cfg = _config(read, path, tensors)
  except ValueError as error:
    place = "" if str(error).startswith(str(path)) else f"{path}: "
    raise ValueError(f"{place}{error}") from error
  names = _names(cfg)
  for name in sorted(names.keys() ^ tensors.keys()):
    if name in names:
      raise ValueError(f"{path}: the tensor {name!r} is missing")
    raise ValueError(f"{path}: a llama has no tensor {name!r}; this model cannot be read")
  shapes = dict(axes.leaves(config.shapes(cfg)))
  return cfg, {
    leaf: Leaf(shapes[leaf], np.dtype(np.float32), _read(path, tensors[name], sizes, leaf, letters))
    for name, (leaf, letters, sizes) in names.items()
  }


def tokenizer(path: str | pathlib.Path) -> str:
  """Returns the text of a `tokenizer.json` with the file's byte-level BPE.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a GGUF file, no tokenizer in it, or one of another kind.
  """
  return metadata.tokenizer(path)


def files(path: str | pathlib.Path) -> dict[str, str]:
  """Returns tokenizer, its config and the special ids as a published folder has them, by file name.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: as `tokenizer` does.
  """
  return metadata.files(path)


def _config(read: Any, path: str | pathlib.Path, tensors: Mapping[str, Any]) -> ModelConfig:
  """Returns what the metadata say."""
  name = metadata.value(read, path, "general.architecture", str)
  if name != ARCHITECTURE:
    raise ValueError(f"{path}: architecture {name!r} cannot be read, known: {ARCHITECTURE!r}")
  _check_keys(read, path)

  def get(key: str, kind: type = int, default: Any = None) -> Any:
    return metadata.value(read, path, f"{ARCHITECTURE}.{key}", kind, default)

  D, heads = get("embedding_length"), get("attention.head_count")
  K = get("attention.head_count_kv", default=heads)
  sizes = {"embedding_length": D, "head_count": heads, "head_count_kv": K}
  for key, size in sizes.items():
    if size < 1:
      raise ValueError(f"{path}: {key}={size} must be at least 1")
  if heads % K or ("llama.attention.key_length" not in read.fields and D % heads):
    raise ValueError(f"{path}: {heads} heads do not share {K} key-value heads and {D} channels")
  E = get("attention.key_length", default=D // heads)
  for key in ("attention.value_length", "rope.dimension_count"):
    if get(key, default=E) != E:
      raise ValueError(f"{path}: {key}={get(key)} is not the head width {E}; it must be")
  if "token_embd.weight" not in tensors:
    raise ValueError(f"{path}: the tensor 'token_embd.weight' is missing")
  V, tokens = int(tensors["token_embd.weight"].shape[-1]), _tokens(read)
  if tokens > V:
    raise ValueError(f"{path}: its tokenizer has {tokens} ids, more than the embedding's {V} rows")
  attention = Attention(K, heads // K, E, rope=Rope(base=_short(get("rope.freq_base", float, 1e4))))
  layer, count = (attention, Mlp(get("feed_forward_length"), "swiglu")), get("block_count")
  if not 1 <= count <= len(tensors):
    raise ValueError(f"{path}: block_count={count}, but the file holds {len(tensors)} tensors")
  return ModelConfig(
    V, D, layer * count, eps=_short(get("attention.layer_norm_rms_epsilon", float)),
    tied="output.weight" not in tensors, context=get("context_length"),
    vocabulary=tokens if 0 < tokens < V else None,
  )


def _check_keys(read: Any, path: str | pathlib.Path) -> None:
  for full in read.fields:
    key = full.removeprefix(f"{ARCHITECTURE}.")
    if key == full or key in READ:
      continue
    found = metadata.value(read, path, full, object)
    if key not in HARMLESS or found != HARMLESS[key]:
      raise ValueError(f"{path}: {full}={str(found)[:40]} is not supported; the model would differ")


def _tokens(read: Any) -> int:
  """Returns how many tokens the file's tokenizer has; 0 where it has none."""
  field = read.fields.get("tokenizer.ggml.tokens")
  return 0 if field is None else len(field.data)


def _short(number: float) -> float:
  """Returns the shortest decimal that is the same float32: 9.99999975e-06 was written as 1e-05."""
  return float(str(np.float32(number)))


def _names(cfg: ModelConfig) -> dict[str, tuple[str, str, Mapping[str, int]]]:
  """Returns tensor -> (leaf's path, published letters, sizes) for every tensor of a llama."""
  found = {
    f"{name}.weight": (leaf, letters, {"V": cfg.V, "D": cfg.D})
    for name, (leaf, letters) in OUTSIDE.items() if not (cfg.tied and name == "output")
  }
  for index in range(len(cfg.blocks)):
    for name, (leaf, letters) in LAYER[index % 2].items():
      path = f"blocks/{block_name(index)}/{leaf}"
      found[f"blk.{index // 2}.{name}.weight"] = (path, letters, cfg.sizes(index))
  return found


def _read(path, tensor: Any, sizes: Mapping[str, int], leaf: str, letters: str):
  """Returns the function that fetches a tensor as its leaf; raises where the shape is another."""
  import gguf

  inner = 1 if len(letters) == 1 else _inner(letters)
  shape = [sizes[letter] for letter in letters]
  want = tuple(int(np.prod(part)) for part in (shape[:inner], shape[inner:]) if part)
  found = tuple(int(size) for size in reversed(tensor.shape))
  if found != want:
    raise ValueError(f"{path}: tensor {tensor.name!r} has shape {found}, the metadata say {want}")
  try:
    gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
  except NotImplementedError as error:
    kind = tensor.tensor_type.name
    raise ValueError(f"{path}: tensor {tensor.name!r} is stored as {kind}, which the package gguf "
                     "cannot read back") from error
  order = [letters.index(letter) for letter in axes.of(leaf)]
  turned = tensor.name.split(".")[-2] in TURNED

  def fetch() -> np.ndarray:
    flat = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    return (_halves(flat, sizes["E"]) if turned else flat).reshape(shape).transpose(order)

  return fetch


def _inner(letters: str) -> int:
  """Returns where the letters of a matrix's rows end: at D on either side."""
  return 1 if letters[0] == "D" else letters.index("D")


def _halves(rows: np.ndarray, width: int) -> np.ndarray:
  """Returns rows of heads of a width with pairs (2i, 2i + 1) laid out as (i, i + width / 2)."""
  pairs = rows.reshape(-1, width // 2, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)
