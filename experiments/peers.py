"""Other people's scans behind one form, to be timed beside ours: `(x, dt, A, B, C) -> y`.

Heads are one axis there, as peers have them: head h reads group h // (heads a group).
"""

import importlib.metadata
import importlib.util
import math
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("x", "dt", "a", "b", "c")


class Peer(NamedTuple):
  """One peer: the packages it needs, its framework, and `load(path, chunk) -> scan`."""

  packages: tuple[str, ...]
  framework: str
  load: Callable[[str, int], Callable]


class Missing(Exception):
  """A peer that is not installed, or does not run on this device; the message is one line."""


def listing(x, dt, A, B, C, *, chunk: int):
  """Returns y of the Mamba-2 paper's listing 1, written in JAX the straightforward way.

  B and C repeated to heads, a segsum mask for every head, chunks beside each other and einsums.
  Source: Mamba-2 (arXiv 2405.21060), listing 1.
  """
  batch, length, heads, _ = x.shape
  wide = jnp.float32
  B, C = (jnp.repeat(v.astype(wide), heads // v.shape[2], axis=2) for v in (B, C))
  pad = -length % chunk

  def split(v):
    v = jnp.pad(v, [(0, 0), (0, pad)] + [(0, 0)] * (v.ndim - 2))
    return v.reshape(batch, -1, chunk, *v.shape[2:])

  X, A, B, C = (split(v) for v in (x.astype(wide) * dt[..., None], A * dt, B, C))
  A = jnp.moveaxis(A, 3, 1)
  A_sum = jnp.cumsum(A, axis=-1)
  decay = jnp.exp(_segsum(A))
  Y = jnp.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, decay, X)
  states = jnp.einsum("bclhn,bhcl,bclhp->bchpn", B, jnp.exp(A_sum[..., -1:] - A_sum), X)
  states = jnp.concatenate([jnp.zeros_like(states[:, :1]), states], axis=1)
  ends = jnp.exp(_segsum(jnp.pad(A_sum[..., -1], ((0, 0), (0, 0), (1, 0)))))
  states = jnp.einsum("bhzc,bchpn->bzhpn", ends, states)[:, :-1]
  Y += jnp.einsum("bclhn,bchpn,bhcl->bclhp", C, states, jnp.exp(A_sum))
  return Y.reshape(batch, length + pad, heads, -1)[:, :length].astype(x.dtype)


def _segsum(A):
  """Returns the sums of A over (s, l] for s <= l, and -inf above."""
  total = jnp.cumsum(A, axis=-1)
  mask = jnp.tril(jnp.ones((A.shape[-1], A.shape[-1]), bool))
  return jnp.where(mask, total[..., :, None] - total[..., None, :], -jnp.inf)


def _load_listing(path, chunk):
  return lambda x, dt, A, B, C: listing(x, dt, A, B, C, chunk=chunk)


def _load_transformers(path, chunk):
  import transformers
  from transformers.models.mamba2 import modeling_mamba2

  transformers.logging.set_verbosity_error()

  def scan(x, dt, A, B, C):
    return modeling_mamba2.mamba2_chunk_scan(x, dt, A, B, C, chunk).to(x.dtype)

  return scan


def _load_mamba_ssm(path, chunk):
  """Returns mamba-ssm's Triton scan, installed or from an unpacked source distribution.

  Its package imports a compiled extension that the Triton files do not need, so of a folder the
  outermost `__init__.py` is left out.
  """
  import torch

  if not torch.cuda.is_available():
    raise Missing("mamba_ssm: its Triton kernels need a CUDA device that torch can use")
  folder = pathlib.Path(path, "mamba_ssm")
  if path and "mamba_ssm" not in sys.modules:
    if not (folder / "ops" / "triton" / "ssd_combined.py").is_file():
      raise ValueError(f"peers_path {path}: no mamba_ssm/ops/triton/ssd_combined.py below it")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(folder)]
    sys.modules["mamba_ssm"] = package
  from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

  return lambda x, dt, A, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, chunk)


def _load_mamba2_jax(path, chunk):
  from mamba2_jax.modeling import ssd_forward

  def scan(x, dt, A, B, C):
    heads = x.shape[2]
    B, C = (jnp.repeat(v, heads // v.shape[2], axis=2) for v in (B, C))
    zeros = jnp.zeros(heads, dt.dtype)
    before_softplus = dt + jnp.log(-jnp.expm1(-dt))
    return ssd_forward(x, before_softplus, A, B, C, chunk, zeros, zeros, 0.0, math.inf)[0]

  return scan


def _load_axlearn(path, chunk):
  """Returns axlearn's token recurrence, `y = C state` over (q, k, v) = (C, B, dt x)."""
  from axlearn.common.ssm_kernels.ssd_kernels import ssd_linear_scan

  def scan(x, dt, A, B, C):
    q, k, v = (jnp.swapaxes(v, 1, 2) for v in (C, B, x * dt[..., None]))
    y, _ = ssd_linear_scan(q, k, v, jnp.swapaxes(dt * A, 1, 2))
    return jnp.swapaxes(y, 1, 2).astype(x.dtype)

  return scan


PEERS: Mapping[str, Peer] = {
  "listing": Peer(("jax",), "jax", _load_listing),
  "transformers": Peer(("transformers", "torch"), "torch", _load_transformers),
  "mamba_ssm": Peer(
    ("mamba_ssm", "torch", "triton", "einops", "packaging"), "torch", _load_mamba_ssm
  ),
  "mamba2_jax": Peer(("mamba2_jax",), "jax", _load_mamba2_jax),
  "axlearn": Peer(("axlearn",), "jax", _load_axlearn),
}


def load(name: str, path: str, chunk: int) -> Callable:
  """Returns the scan of a peer.

  Raises:
    Missing: it is not installed, or does not run on this device.
    ValueError: `path` holds no such peer.
  """
  peer = PEERS[name]
  for package in peer.packages:
    unpacked = package == "mamba_ssm" and path
    if not unpacked and importlib.util.find_spec(package) is None:
      raise Missing(f"{name}: the package {package} is not installed")
  return peer.load(path, chunk)


def versions(packages: Iterable[str], path: str = "") -> list[str]:
  """Returns packages with their versions, installed or as mamba-ssm in the folder `path` says."""
  known = {d.name.replace("-", "_"): d.version for d in importlib.metadata.distributions()}
  source = pathlib.Path(path, "mamba_ssm", "__init__.py")
  if path and source.is_file():
    found = re.search(r'__version__ = "([^"]+)"', source.read_text("utf-8"))
    known["mamba_ssm"] = found[1] if found else "of unknown version"
  return [f"{name} {known[name]}" for name in dict.fromkeys(packages) if name in known]


def merge(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns our arrays with groups and heads as one axis, by the name before the axes."""
  merged = {}
  for name, v in arrays.items():
    label, _, axes = name.rpartition("_")
    at = axes.find("GH")
    shape = v.shape if at < 0 else (*v.shape[:at], -1, *v.shape[at + 2 :])
    merged[label] = v.reshape(shape)
  return merged


def jax_calls(scan: Callable, arrays: Mapping[str, jax.Array]):
  """Returns `(forward, both), wait, bytes`: compiled calls that give y, or y and five cotangents.

  A call may return before it is done; `wait` waits for what it gave. Bytes are the temporary ones.
  """
  args = [jnp.asarray(arrays[name]) for name in NAMES]
  y_bar = jnp.asarray(arrays["y_bar"])

  def both(args, y_bar):
    y, back = jax.vjp(scan, *args)
    return y, *back(y_bar)

  forward = jax.jit(lambda args: (scan(*args),)).lower(args).compile()
  both = jax.jit(both).lower(args, y_bar).compile()
  temporary = tuple(p.memory_analysis().temp_size_in_bytes for p in (forward, both))
  calls = lambda: forward(args), lambda: both(args, y_bar)
  return calls, jax.block_until_ready, temporary


def torch_calls(scan: Callable, arrays: Mapping[str, np.ndarray], platform: str):
  """Returns what `jax_calls` does, of a scan in torch on `platform`; no bytes are reported."""
  import torch

  device = "cuda" if platform == "gpu" else "cpu"

  def tensor(v):
    wide = torch.from_numpy(np.array(v, np.float32))
    return wide.to(device, torch.bfloat16 if v.dtype == jnp.bfloat16 else torch.float32)

  args = [tensor(arrays[name]) for name in NAMES]
  leaves = [v.clone().requires_grad_() for v in args]
  y_bar = tensor(arrays["y_bar"])

  def wait(out):
    if device == "cuda":
      torch.cuda.synchronize()

  def forward():
    with torch.no_grad():
      return (scan(*args),)

  def both():
    y = scan(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, y_bar))

  return (forward, both), wait, (None, None)


def fetch(v) -> np.ndarray:
  """Returns an array of either framework as float32 numpy."""
  if hasattr(v, "detach"):
    v = v.detach().float().cpu().numpy()
  return np.asarray(v).astype(np.float32)
