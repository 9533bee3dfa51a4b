"""Where a kernel may run: on the platform it was written for."""

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

_only_on = core.Primitive("only_on")
_only_on.def_abstract_eval(lambda x, *, platform, name: x)
batching.defvectorized(_only_on)


def _lower(context, x, *, platform, name):
  platforms = context.platforms or context.module_context.platforms
  others = sorted(set(platforms) - {platform})
  if others:
    raise ValueError(f"ssd implementation {name!r} runs on {platform}, not on {others[0]}")
  return [x]


mlir.register_lowering(_only_on, _lower)


def only_on(x: jax.Array, *, platform: str, name: str) -> jax.Array:
  """Returns `x`; a program that holds this refuses to be lowered for another platform.

  So a program for a platform that is not here can be compiled ahead of time, and one for this
  machine is refused before it runs. `name` is the implementation that the error names.
  """
  return jax.jit(lambda x: _only_on.bind(x, platform=platform, name=name))(x)
