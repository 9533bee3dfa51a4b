"""Runs a Mosaic GPU kernel's body on the CPU: warpgroups are threads, memory is numpy.

Everything asynchronous happens as late as it may: a copy into shared memory destroys what was
there at once and arrives when its barrier is waited for; a copy out of it reads when its thread
waits for that. What was never written is NaN. So a missing wait gives wrong values, a missing
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
  """A view of memory with the indexing of a Pallas reference."""

  def __init__(self, array, block=None):
    self.array, self.block = array, block
    self.shape, self.dtype = array.shape, array.dtype

  @property
  def at(self):
    """Returns what makes a smaller reference by indexing."""
    return _At(lambda index: Ref(self.array[_plain(index)], self.block))

  def transpose(self, order):
    """Returns the reference with its axes in another order."""
    return Ref(self.array.transpose(order), self.block)

  def __getitem__(self, index):
    return np.array(self.array[_plain(index)])

  def __setitem__(self, index, value):
    target = self.array[_plain(index)]
    assert target.shape == value.shape and target.dtype == value.dtype
    target[...] = np.asarray(value)
    if self.block is not None:
      with self.block.lock:
        self.block.uncommitted[_address(target)] = HERE.axes[self.block.thread_name]

  def committed(self):
    """Returns the values as TMA and tensor cores see them; raises before `commit_smem`."""
    assert _address(self.array) not in self.block.uncommitted, "read before commit_smem"
    return np.array(self.array)


class Barriers:
  """A ring of barriers, each with a count of arrivals and of turns that are over."""

  def __init__(self, count, arrivals):
    self.ring = [Barrier(arrivals) for _ in range(count)]

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
  """One block's shared memory, of which some was written but not committed."""

  def __init__(self, scratch, thread_name):
    self.uncommitted, self.lock, self.thread_name = {}, threading.Lock(), thread_name
    self.arguments = {
      name: make(self) if callable(make) else make for name, make in scratch.items()
    }


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
      "set_max_registers": lambda count, action: None,
    },
    pl: {
      "when": lambda condition: lambda body: body() if condition else None,
      "loop": lambda low, high: lambda body: [body(i) for i in range(int(low), int(high))],
      "run_scoped": lambda body, *cells: body(*cells), "run_state": _run_state,
    },
    jax.lax: {"fori_loop": _fori_loop, "axis_index": lambda name: HERE.axes[name]},
  }
  with contextlib.ExitStack() as stack:
    for module, names in stand_ins.items():
      for name, stand_in in names.items():
        stack.enter_context(mock.patch.object(module, name, stand_in))
    yield


def kernel(
  body, *, out_type, scratch_types, grid, grid_names, num_threads, thread_name, compiler_params
):
  """Stands in for `plgpu.kernel`: blocks run one after the other, their warpgroups together."""
  def run(*arrays):
    outputs = [_unwritten(v.shape, v.dtype) for v in out_type]
    refs = [Ref(np.array(v)) for v in (*arrays, *outputs)]
    outputs = refs[len(arrays):]
    for at in itertools.product(*(range(n) for n in grid)):
      block = Block(scratch_types, thread_name)

      def thread(i, at=at, block=block):
        HERE.axes, HERE.copies, HERE.block = dict(zip(grid_names, at, strict=True)), [], block
        HERE.axes[thread_name] = i
        body(*refs, **block.arguments)
        assert not HERE.copies, "the block ended with copies under way"

      with futures.ThreadPoolExecutor(num_threads) as pool:
        for result in [pool.submit(thread, i) for i in range(num_threads)]:
          result.result()
    return [jnp.asarray(ref.array) for ref in outputs]

  return run


def _unwritten(shape, dtype):
  return np.full(shape, np.nan, dtype)


def _smem(shape, dtype, transforms=()):
  return lambda block: Ref(_unwritten(shape, dtype), block)


def _barriers(num_arrivals, num_barriers):
  return lambda block: Barriers(num_barriers, num_arrivals)


def _plain(index):
  index = index if isinstance(index, tuple) else (index,)
  return tuple(
    slice(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice)
    else i if i is Ellipsis else int(i)
    for i in index
  )


def _address(array):
  return array.__array_interface__["data"][0]


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
  block, thread = HERE.block, HERE.axes[HERE.block.thread_name]
  with block.lock:
    for address in [k for k, owner in block.uncommitted.items() if owner == thread]:
      del block.uncommitted[address]


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
