"""Reads what compilers print: VMEM of TPU kernels in HLO text, registers and spills from ptxas."""

import re
from typing import Any

VMEM = "1"  # XLA's number of the memory space
CALL = re.compile(
  r'%(?P<name>[\w.\-]+?)(?:\.\d+)? = .*custom_call_target="tpu_custom_call"(?P<rest>.*)'
)
SCOPED = re.compile(r'"used_scoped_memory_configs":\[(?P<configs>[^\]]*)\]')
SPACE = re.compile(r'"memory_space":"(?P<space>\d+)","offset":"\d+","size":"(?P<size>\d+)"')
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+?)(?:_mosaic_gpu_kernel)?' for '(\w+)'")
SPILL = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers")
LAUNCH = re.compile(
  r"define void @(?P<name>\w+?)(?:_mosaic_gpu)?\("
  r"|call void @mosaic_gpu_launch_kernel\((?P<numbers>[^)]*)\)"
)
OP_NAME = re.compile(r'op_name="(?:[^"]*/)?(?P<name>\w+)/\w+"')
HASH = re.compile(r'kernel_hash = "(?P<hash>(?:[^"\\]|\\.)*)"')


def tpu_kernels(hlo: str) -> list[dict[str, Any]]:
  """Returns the Pallas kernels of a compiled TPU program: `name` and `vmem`, the scoped bytes.

  VMEM holds a kernel's blocks, their second buffers, its scratch and the compiler's own values.

  Raises:
    ValueError: a kernel whose VMEM the compiler did not print.
  """
  kernels = []
  for line in hlo.splitlines():
    call = CALL.search(line)
    if call is None:
      continue
    scoped = SCOPED.search(call["rest"])
    if scoped is None:
      raise ValueError(f"the TPU compiler printed no scoped memory of the kernel {call['name']}")
    sizes = (int(m["size"]) for m in SPACE.finditer(scoped["configs"]) if m["space"] == VMEM)
    kernels.append({"name": call["name"], "vmem": sum(sizes)})
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


def gpu_kernels(printed: str) -> dict[str, dict[str, Any]]:
  """Returns name -> record of the Mosaic GPU kernels compiled, as ptxas and the launch code tell.

  Each has `name`, `registers` a thread, `spills` (bytes stored and loaded), `shared` (bytes a
  block) and `threads` a block. A process compiles equal kernels once and prints them once.

  Raises:
    ValueError: a kernel of which one of these was not printed, or two kernels of one name.
  """
  found: dict[str, dict[str, Any]] = {}
  current: dict[str, Any] = {}
  for line in printed.splitlines():
    if match := ENTRY.search(line):
      if match["name"] in found:
        raise ValueError(f"two GPU kernels of one program have the name {match['name']}")
      current = found[match["name"]] = {"name": match["name"]}
    elif (match := SPILL.search(line)) and "warning" not in line:
      current["spills"] = int(match["stores"]) + int(match["loads"])
    elif match := USED.search(line):
      current["registers"] = int(match["registers"])
    elif match := LAUNCH.search(line):
      if match["name"]:
        current = found.get(match["name"], {})
      else:
        # The stream; then grid, cluster and block by axes; then shared memory.
        numbers = [int(n) for n in re.findall(r"i32 (\d+)", match["numbers"])]
        x, y, z, shared = numbers[6:10]
        current |= {"threads": x * y * z, "shared": shared}
  for kernel in found.values():
    for key in ("registers", "spills", "threads", "shared"):
      if key not in kernel:
        raise ValueError(f"the GPU compiler printed no {key} of the kernel {kernel['name']}")
  return found
