"""Reads what compilers print: VMEM of TPU kernels in HLO text, registers and spills from ptxas."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

VMEM = "1"  # XLA's number of the memory space
SCOPED = re.compile(r'"used_scoped_memory_configs":\[(?P<configs>[^\]]*)\]')
SPACE = re.compile(r'"memory_space":"(?P<space>\d+)","offset":"\d+","size":"(?P<size>\d+)"')
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+?)(?:_mosaic_gpu_kernel)?' for '(\w+)'")
SPILL = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers")
LAUNCH = re.compile(
  r"define void @(?P<name>\w+?)(?:_mosaic_gpu)?\("
  r"|call void @mosaic_gpu_launch_kernel\((?P<numbers>[^)]*)\)"
)
# The kernel's own name stands before the primitive's, inside jvp(..) and transpose(..).
OP_NAME = re.compile(r'op_name="(?:[^"]*[/(])?(?P<name>\w+)\)*/\w+"')
HASH = re.compile(r'kernel_hash = "(?P<hash>(?:[^"\\]|\\.)*)"')
# A value of a computation with its dtype; a product with the values it reads.
VALUE = re.compile(r"^\s*(?:ROOT )?(?P<name>%[\w.-]+) = (?P<dtype>\w+)\[")
PRODUCT = re.compile(r" dot\((?P<left>%[\w.-]+), (?P<right>%[\w.-]+)\)")
CUBLAS = re.compile(r'custom_call_target="__cublas\$lt\$matmul\$f8"')


def tpu_kernels(hlo: str) -> list[dict[str, Any]]:
  """Returns the Pallas kernels of a compiled TPU program: `name` and `vmem`, the scoped bytes.

  VMEM holds a kernel's blocks, their second buffers, its scratch and the compiler's own values.

  Raises:
    ValueError: a kernel whose name or VMEM the compiler did not print.
  """
  kernels = []
  for line in hlo.splitlines():
    if 'custom_call_target="tpu_custom_call"' not in line:
      continue
    path, scoped = OP_NAME.search(line), SCOPED.search(line)
    if path is None or scoped is None:
      raise ValueError("the TPU compiler printed a kernel call without a name and scoped memory")
    sizes = (int(m["size"]) for m in SPACE.finditer(scoped["configs"]) if m["space"] == VMEM)
    kernels.append({"name": path["name"], "vmem": sum(sizes)})
  return kernels


def gpu_calls(hlo: str) -> list[tuple[str, str]]:
  """Returns `(name, hash)` of every Mosaic GPU kernel that a compiled GPU program calls.

  Raises:
    ValueError: a call without a name or a hash.
  """
  calls = []
  for line in hlo.splitlines():
    if 'custom_call_target="mosaic_gpu' not in line:
      continue
    path, key = OP_NAME.search(line), HASH.search(line)
    if path is None or key is None:
      raise ValueError("the GPU compiler printed a kernel call without a name and a hash")
    calls.append((path["name"], key["hash"]))
  return calls


def gpu_kernels(printed: str) -> list[dict[str, Any]]:
  """Returns the Mosaic GPU kernels compiled, in order, as ptxas and the launch code tell.

  Each has `name`, `registers` a thread, `spills` (bytes stored and loaded), `shared` (bytes a
  block) and `threads` a block. A process compiles equal kernels once and prints them once.

  Raises:
    ValueError: a kernel of which one of these was not printed.
  """
  found: list[dict[str, Any]] = []
  current: dict[str, Any] = {}
  for line in printed.splitlines():
    if match := ENTRY.search(line):
      current = {"name": match["name"]}
      found.append(current)
    elif (match := SPILL.search(line)) and "warning" not in line:
      current["spills"] = int(match["stores"]) + int(match["loads"])
    elif match := USED.search(line):
      current["registers"] = int(match["registers"])
    elif match := LAUNCH.search(line):
      if match["name"]:
        same = [kernel for kernel in found if kernel["name"] == match["name"]]
        current = same[-1] if same else {}
      else:
        # The stream; then grid, cluster and block by axes; then shared memory.
        numbers = [int(n) for n in re.findall(r"i32 (\d+)", match["numbers"])]
        x, y, z, shared = numbers[6:10]
        current |= {"threads": x * y * z, "shared": shared}
  for kernel in found:
    for key in ("registers", "spills", "threads", "shared"):
      if key not in kernel:
        raise ValueError(f"the GPU compiler printed no {key} of the kernel {kernel['name']}")
  return found


def known_kernels(
  calls: Sequence[tuple[str, str]], printed: Sequence[Mapping[str, Any]],
  known: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
  """Returns `known`, hash -> kernel, with those of `calls` that were printed for the first time.

  Kernels of one name are printed in the order of their calls.

  Raises:
    ValueError: a kernel that is called and was never printed.
  """
  left, found = list(printed), dict(known)
  for name, key in calls:
    if key not in found:
      mine = [kernel for kernel in left if kernel["name"] == name]
      if not mine:
        raise ValueError(f"the GPU compiler printed nothing of the kernel {name}")
      found[key] = mine[0]
      left.remove(mine[0])
  return found


def products(hlo: str) -> dict[str, int]:
  """Returns how often a compiled GPU program multiplies matrices of which dtypes: `f32 × f32`.

  Calls of cuBLAS in FP8 are counted as `f8 × f8 by cuBLAS`; its others are not looked for.
  """
  found: collections.Counter[str] = collections.Counter()
  dtypes: dict[str, str] = {}
  for line in hlo.splitlines():
    if match := VALUE.match(line):  # computations use the same names, each after it says them
      dtypes[match["name"]] = match["dtype"]
    if CUBLAS.search(line):
      found["f8 × f8 by cuBLAS"] += 1
    elif match := PRODUCT.search(line):
      found[" × ".join(dtypes[match[side]] for side in ("left", "right"))] += 1
  return dict(found)
