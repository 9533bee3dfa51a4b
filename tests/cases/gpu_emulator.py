"""Runs a Mosaic GPU kernel's body on the CPU: warpgroups are threads, memory is numpy.

Everything asynchronous happens as late as it may: a copy into shared memory destroys what was
there at once and arrives when its barrier is waited for; a copy out of it reads when its thread
waits for that; a pipeline's buffer is destroyed when its step is over. What was never written is
NaN. So a missing wait gives wrong values, a missing
`commit_smem`, a barrier that is waited for out of turn, and a deadlock raise.
What it cannot see: layouts, swizzles, register limits; those are the compiler's to check.
"""

import collections
import contextlib
import itertools
import math
import threading
from concurrent import futures
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PATIENCE = 60.0  # seconds at a barrier before it counts as a deadlock
HERE = threading.local()


class Ref:
  """A view of memory with the indexing of a Pallas reference.

  `writer` is shaped alike: 0, or the number from 1 of the thread that wrote and did not commit.
  None for global memory.
  """

  def __init__(self, array, writer=None):
    self.array, self.writer = array, writer
    self.shape, self.dtype = array.shape, array.dtype

  @property
  def at(self):
    """Returns what makes a smaller reference by indexing."""
    return _At(lambda index: self._view(lambda v: _cut(v, _plain(index))))

  def transpose(self, order):
    """Returns the reference with its axes in another order."""
    return self._view(lambda v: v.transpose(order))

  def _view(self, see):
    return Ref(see(self.array), None if self.writer is None else see(self.writer))

  def __getitem__(self, index):
    return np.array(self.array[_plain(index)])

  def __setitem__(self, index, value):
    target = self.at[index]
    assert target.shape == value.shape and target.dtype == value.dtype
    target.array[...] = np.asarray(value)
    if target.writer is not None:
      target.writer[...] = HERE.thread + 1

  def committed(self):
    """Returns the values as TMA and tensor cores see them; raises before `commit_smem`."""
    assert not self.writer.any(), "read before commit_smem"
    return np.array(self.array)


class Barriers:
  """A ring of barriers, each with a count of arrivals and of turns that are over."""

  def __init__(self, count, arrivals):
    self.ring = [Barrier(arrivals) for _ in range(count)]
    self.arrive, self.wait = self.ring[0].arrive, self.ring[0].wait

  @property
  def at(self):
    """Returns what picks one barrier by indexing."""
    return _At(lambda index: self.ring[int(index)])


class Barrier:
  """One barrier; every thread that waits for it waits for every one of its turns."""

  def __init__(self, arrivals):
    self.arrivals, self.arrived, self.turns = arrivals, 0, 0
    self.waited, self.landing = collections.Counter(), []
    self.changed = threading.Condition()

  def arrive(self, landing=None):
    """Counts an arrival, that of a copy which lands when its turn is waited for."""
    with self.changed:
      self.landing += [landing] if landing else []
      self.arrived += 1
      if self.arrived == self.arrivals:
        self.arrived, self.turns = 0, self.turns + 1
        self.changed.notify_all()

  def wait(self):
    """Waits for the next turn of this thread."""
    thread = threading.get_ident()
    with self.changed:
      self.waited[thread] += 1
      over = self.changed.wait_for(lambda: self.turns >= self.waited[thread], PATIENCE)
      assert over, "deadlock"
      assert self.turns == self.waited[thread], "a turn passed that nobody waited for"
      while self.landing:
        self.landing.pop()()


class Cell:
  """An accumulator."""

  def __init__(self, value):
    self.value, self.shape = value, value.shape

  def __getitem__(self, index):
    return self.value


class Accumulator:
  """Stands in for `plgpu.ACC`."""

  def __new__(cls, shape, dtype):
    return Cell(jnp.zeros(shape, dtype))

  init = Cell


class Block:
  """One block's shared memory and barriers."""

  def __init__(self, scratch):
    self.memory = []
    self.arguments = {
      name: make(self) if callable(make) else make for name, make in scratch.items()
    }

  def allocate(self, shape, dtype):
    """Returns memory that nobody wrote yet."""
    self.memory.append(Ref(_unwritten(shape, dtype), np.zeros(shape, np.int32)))
    return self.memory[-1]


class _At:
  def __init__(self, get):
    self.get = get

  def __getitem__(self, index):
    return self.get(index)


@contextlib.contextmanager
def emulated():
  """Makes kernels that are called inside, outside of `jax.jit`, run here."""
  stand_ins = {
    plgpu: {
      "kernel": kernel, "SMEM": _smem, "Barrier": _barriers, "ACC": Accumulator, "wgmma": _wgmma,
      "wgmma_accumulator_load": lambda cell, wait_n=0: cell.value,
      "layout_cast": lambda value, layout: value,
      "broadcasted_iota": lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(
        dtype, shape, axis
      ),
      "load": lambda ref, idx=(), layout=None, optimized=True: jnp.asarray(ref[...]),
      "barrier_arrive": lambda barrier: barrier.arrive(), "barrier_wait": lambda b: b.wait(),
      "copy_gmem_to_smem": _copy_in, "copy_smem_to_gmem": _copy_out,
      "wait_smem_to_gmem": _await_copies_out, "commit_smem": _commit,
      "set_max_registers": lambda count, action: None, "emit_pipeline": _pipeline,
    },
    pl: {
      "when": lambda condition: lambda body: body() if condition else None,
      "loop": lambda low, high: lambda body: [body(i) for i in range(int(low), int(high))],
      "run_scoped": lambda body, *cells: body(*cells), "run_state": _run_state,
    },
    jax.lax: {
      "fori_loop": _fori_loop, "axis_index": lambda name: HERE.axes[name],
      "switch": lambda index, branches: branches[index](),
    },
  }
  with contextlib.ExitStack() as stack:
    for module, names in stand_ins.items():
      for name, stand_in in names.items():
        stack.enter_context(mock.patch.object(module, name, stand_in))
    yield


def kernel(
  body, *, out_type, scratch_types, grid, grid_names, compiler_params, kernel_name, num_threads=1,
  thread_name=None,
):
  """Stands in for `plgpu.kernel`: blocks run one after the other, their warpgroups together."""
  def run(*arrays):
    outputs = [_unwritten(v.shape, v.dtype) for v in out_type]
    refs = [Ref(np.array(v)) for v in (*arrays, *outputs)]
    outputs = refs[len(arrays):]
    for at in itertools.product(*(range(n) for n in grid)):
      block = Block(scratch_types)

      def thread(i, at=at, block=block):
        HERE.axes, HERE.copies, HERE.block = dict(zip(grid_names, at, strict=True)), [], block
        HERE.axes[thread_name] = HERE.thread = i
        body(*refs, **block.arguments)
        assert not HERE.copies, "the block ended with copies under way"

      with futures.ThreadPoolExecutor(num_threads) as pool:
        # As they end: who waits in vain for a warpgroup that raised is not to blame.
        for result in futures.as_completed([pool.submit(thread, i) for i in range(num_threads)]):
          result.result()
    return [jnp.asarray(ref.array) for ref in outputs]

  return run


def _unwritten(shape, dtype):
  return np.full(shape, np.nan, dtype)


def _smem(shape, dtype, transforms=()):
  return lambda block: block.allocate(shape, dtype)


def _barriers(num_arrivals=1, num_barriers=1):
  return lambda block: Barriers(num_barriers, num_arrivals)


def _plain(index):
  index = index if isinstance(index, tuple) else (index,)
  return tuple(
    slice(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice)
    else i if isinstance(i, slice) else int(i)
    for i in index if i is not Ellipsis
  )


def _cut(array, index):
  for i, size in zip(index, array.shape, strict=False):
    assert not isinstance(i, slice) or i.stop is None or i.stop <= size, "out of bounds"
  return array[(*index, ...)]


def _copy_in(source, target, barrier):
  assert math.prod(source.shape) == math.prod(target.shape) and source.dtype == target.dtype
  target.array[...] = np.nan
  barrier.arrive(lambda: np.copyto(target.array, source.array))


def _copy_out(source, target):
  source.committed()
  HERE.copies.append(lambda: np.copyto(target.array, source.array))


def _await_copies_out(count, wait_read_only=False):
  while len(HERE.copies) > count:
    HERE.copies.pop(0)()


def _commit():
  for ref in HERE.block.memory:
    ref.writer[ref.writer == HERE.thread + 1] = 0


def _wgmma(cell, left, right):
  wide = [
    jnp.asarray(v.committed() if isinstance(v, Ref) else v).astype(jnp.float32)
    for v in (left, right)
  ]
  cell.value = cell.value + jnp.dot(*wide, precision="highest")


def _run_state(body):
  def run(cells):
    body(cells)
    return jax.tree.map(lambda cell: cell.value, cells, is_leaf=lambda v: isinstance(v, Cell))

  return run


def _fori_loop(low, high, body, carry):
  for i in range(low, high):
    carry = body(i, carry)
  return carry


def _pipeline(body, *, grid, in_specs, max_concurrent_steps, init_carry):
  """Stands in for `plgpu.emit_pipeline` along one axis, of inputs alone."""
  (steps,) = grid

  def run(*sources):
    def part(source, spec, k):
      index = zip(spec.index_map(k), spec.block_shape, strict=True)
      return source.at[tuple(i if size is None else pl.ds(i * size, size) for i, size in index)]

    rings = [
      HERE.block.allocate((max_concurrent_steps, *part(source, spec, 0).shape), source.dtype)
      for source, spec in zip(sources, in_specs, strict=True)
    ]
    carry = init_carry
    for k in range(steps):
      buffers = [ring.at[k % max_concurrent_steps] for ring in rings]
      for buffer, source, spec in zip(buffers, sources, in_specs, strict=True):
        buffer.array[...] = part(source, spec, k).array
      carry = body((k,), *buffers, carry)
      for buffer in buffers:
        buffer.array[...] = np.nan
    return carry

  return run
