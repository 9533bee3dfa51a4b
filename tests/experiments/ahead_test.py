"""What compilers print is read right, and the kernels compile for chips that are not here."""

import pytest

from experiments import ahead, ahead_reports
from experiments.roofline import PASSES

# As libtpu prints a program with two kernels: one called twice has two numbers.
HLO = """HloModule jit_f, is_scheduled=true
  %fusion.2 = bf16[8,128]{1,0} fusion(%a), kind=kLoop, backend_config={"used_scoped_memory_\
configs":[{"memory_space":"1","offset":"0","size":"777"}]}
  %ssd_forward.1 = (f32[8,128]{1,0:T(8,128)}, f32[8]{0}) custom-call(%a, %b), custom_call_target=\
"tpu_custom_call", metadata={op_name="jit(f)/jvp(ssd_forward)/pallas_call"}, \
backend_config={"flag_configs":[],\
"custom_call_config":{"body":"TUzvUgFNTElS"},"used_scoped_memory_configs":[{"memory_space":"1",\
"offset":"0","size":"4096"},{"memory_space":"5","offset":"0","size":"100"},{"memory_space":"1",\
"offset":"4096","size":"1000"}],"retry_config":{"retry_count":"0"}}
  ROOT %ssd_backward = f32[8,128]{1,0} custom-call(%c), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/transpose(jvp(ssd_backward))/pallas_call" stack_frame_id=3}, \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"321"}]}
"""
# As ptxas and the launch code are printed of two kernels, the first with spills.
PRINTED = """\
ptxas warning : Registers are spilled to local memory in function 'first_mosaic_gpu_kernel', 64 \
bytes spill stores, 68 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for first_mosaic_gpu_kernel
    64 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 64 bytes cumulative stack size, 1 bytes smem
define void @first_mosaic_gpu_init(ptr %0, ptr %1) {
  %4 = call ptr @mosaic_gpu_get_function(ptr %3, ptr @first_name, i32 131072, i32 1)
declare void @mosaic_gpu_launch_kernel(ptr, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, ptr)
define void @first_mosaic_gpu(ptr %0, ptr %1, ptr %2) {
  call void @mosaic_gpu_launch_kernel(ptr %0, i32 7, i32 8, i32 9, i32 0, i32 0, i32 0, i32 128, \
i32 3, i32 1, i32 131072, ptr %1, ptr %8)
ptxas info    : Compiling entry function 'second_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for second_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 5 barriers, 1 bytes smem
define void @second_mosaic_gpu(ptr %0, ptr %1, ptr %2) {
  call void @mosaic_gpu_launch_kernel(ptr %0, i32 1, i32 1, i32 1, i32 0, i32 0, i32 0, i32 256, \
i32 1, i32 1, i32 65536, ptr %1, ptr %8)
"""
GPU_HLO = (
  '  %call.1 = bf16[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name='
  '"jit(f)/transpose(jvp(g))/first/mpmd_map"}, backend_config={kernel_hash = "\\"\\BC]a", module ='
  ' "ML\\EFR"}\n  %fusion = f32[8]{0} fusion(%call.1), metadata={op_name="jit(f)/not/this"}\n'
)


def test_the_vmem_of_a_tpu_kernel_is_its_scoped_memory_and_not_that_of_fusions_or_other_spaces():
  assert ahead_reports.tpu_kernels(HLO) == [
    {"name": "ssd_forward", "vmem": 5096}, {"name": "ssd_backward", "vmem": 321}
  ]


def test_a_tpu_kernel_whose_vmem_was_not_printed_is_an_error_and_not_zero():
  with pytest.raises(ValueError, match="without a name and scoped memory"):
    ahead_reports.tpu_kernels(HLO.replace('backend_config={"used_scoped', 'backend_config={"other'))


def test_registers_spills_threads_and_shared_memory_are_those_of_their_own_kernel():
  assert ahead_reports.gpu_kernels(PRINTED) == [
    {"name": "first", "registers": 255, "spills": 132, "threads": 384, "shared": 131072},
    {"name": "second", "registers": 90, "spills": 0, "threads": 256, "shared": 65536},
  ]


@pytest.mark.parametrize("line, what", [
  ("Used 90 registers", "registers"), ("    0 bytes stack frame", "spills"), ("i32 65536", "shared")
])
def test_a_gpu_kernel_of_which_something_was_not_printed_is_an_error(line, what):
  kept = [text for text in PRINTED.splitlines() if line not in text]
  if what == "shared":
    what = "threads"
  with pytest.raises(ValueError, match=f"printed no {what} of the kernel second"):
    ahead_reports.gpu_kernels("\n".join(kept))


def test_kernels_are_told_apart_by_hash_and_of_one_name_by_order():
  old, one, two = {"name": "k", "registers": 1}, {"name": "k"}, {"name": "k", "registers": 3}
  calls = [("k", "a"), ("other", "d"), ("k", "b"), ("k", "c"), ("k", "b")]
  printed = [one, {"name": "other"}, two]
  found = ahead_reports.known_kernels(calls, printed, {"a": old})
  assert found == {"a": old, "b": one, "c": two, "d": {"name": "other"}}
  with pytest.raises(ValueError, match="printed nothing of the kernel k"):
    ahead_reports.known_kernels(calls, printed[1:], {"a": old})


def test_a_called_gpu_kernel_has_the_name_in_front_of_its_primitive_and_its_hash():
  assert ahead_reports.gpu_calls(GPU_HLO) == [("first", r'\"\BC]a')]
  with pytest.raises(ValueError, match="without a name and a hash"):
    ahead_reports.gpu_calls(GPU_HLO.replace("kernel_hash", "other"))


def test_a_target_that_is_unknown_or_whose_package_is_missing_is_one_line(monkeypatch):
  with pytest.raises(ValueError, match="'v9' is not one of v5e, v5p, v6e, h200"):
    ahead.compile_jobs("v9", [])
  monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
  for target, package, extra in (
    ("v5e", "libtpu", "aheadtpu"), ("h200", "jax_cuda13_plugin", "aheadgpu")
  ):
    with pytest.raises(ValueError) as error:
      ahead.compile_jobs(target, [])
    assert str(error.value) == (
      f"ahead-of-time target '{target}' needs the package {package}: "
      f"pip install 'hybridlm[{extra}]'"
    )


def test_the_description_of_a_gpu_lies_where_its_target_says():
  folder = ahead.pathlib.Path(ahead.__file__).with_name("targets")
  names = {target.description for target in ahead.TARGETS.values()} - {""}
  assert names == {path.name for path in folder.iterdir()}


def compiled(target, jobs):
  """Returns the reports, or skips where the target's package is not installed."""
  line = ahead.missing(target)
  if line is not None:
    pytest.skip(line)
  return ahead.compile_jobs(target, jobs)


def scans(name, dtype):
  """Returns forward, and forward with backward, of a kernel at the 8B's shape."""
  options = {"name": name, "chunk": None, "shape": "8b", "L": 512, "dtype": dtype}
  return [
    ahead.Job("experiments.contenders:program", options | {"passes": passes}) for passes in PASSES
  ]


@pytest.mark.ahead
def test_a_tpu_kernels_vmem_grows_by_its_scratch_until_it_does_not_fit():
  jobs = [ahead.Job("cases.ahead_toys:tpu", {"scratch_rows": rows}) for rows in (64, 1024, 4096)]
  small, large, too_large = compiled("v5e", jobs)
  grown = large["kernels"][0]["vmem"] - small["kernels"][0]["vmem"]
  assert grown == (1024 - 64) * 1024 * 4
  assert small["arguments"] == 128 * 64 * 1024 * 4 and "vmem" in too_large["error"]


@pytest.mark.ahead
def test_a_gpu_kernels_shared_memory_is_its_arrays_also_where_an_equal_one_was_compiled_before():
  jobs = [ahead.Job("cases.ahead_toys:gpu", {"rows": rows}) for rows in (128, 64, 128, 4096)]
  first, other, again, too_large = compiled("h200", jobs)
  assert [first["kernels"][0]["shared"], other["kernels"][0]["shared"]] == [32768, 16384]
  assert again["kernels"] == first["kernels"] and "shared memory" in too_large["error"]


@pytest.mark.ahead
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_the_scan_compiles_for_tpus_forward_and_backward(target, dtype):
  reports = compiled(target, scans("pallas_tpu", dtype))
  assert not [report["error"] for report in reports if "error" in report]
  forward, both = reports
  assert [k["name"] for k in forward["kernels"]] == ["ssd_forward"]
  assert {k["name"] for k in both["kernels"]} == {"ssd_forward", "ssd_backward"}
  assert all(0 < kernel["vmem"] <= 2**27 for kernel in both["kernels"])


@pytest.mark.ahead
def test_the_scan_compiles_for_the_h200_forward_and_backward_without_spills():
  reports = compiled("h200", scans("pallas_gpu", "bfloat16"))
  assert not [report["error"] for report in reports if "error" in report]
  forward, both = reports
  assert len(both["kernels"]) > len(forward["kernels"]) > 0
  assert {kernel["spills"] for kernel in both["kernels"]} == {0}
  assert all(kernel["shared"] <= 232448 for kernel in both["kernels"])


@pytest.mark.ahead
def test_a_process_that_dies_says_how_far_it_came(tmp_path):
  with pytest.raises(RuntimeError, match="after 0 of 1 programs"):
    compiled("v5e", [ahead.Job("cases.ahead_toys:no_such_program", {})])
