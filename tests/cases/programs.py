"""What a traced program holds: the shapes of every array in it."""

import jax


def shapes(fn, *args, of=None, **kwargs) -> set:
  """Returns the shapes of all values in the program of `fn`, loops and calls included.

  of: the primitive whose values alone are meant, such as "scan".
  """
  found = set()

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      if of in (None, equation.primitive.name):
        found.update(tuple(v.aval.shape) for v in equation.outvars)
      for inner in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
      ):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          visit(inner)

  visit(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)
  return found
