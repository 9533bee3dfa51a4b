"""The scan as Pallas Mosaic GPU kernels for Hopper: forward, backward, and what they can run."""

from jaxtyping import Array, Float

from hybridlm.ops.ssd.pallas_gpu import table
from hybridlm.ops.ssd.pallas_gpu.backward import backward
from hybridlm.ops.ssd.pallas_gpu.backward import refusal as refusal_of_the_way_back
from hybridlm.ops.ssd.pallas_gpu.forward import forward
from hybridlm.ops.ssd.pallas_gpu.table import default_chunk

__all__ = ["backward", "default_chunk", "forward", "refusal"]


def refusal(
  x_BLGHP: Float[Array, "B L G H P"], b_BLGN: Float[Array, "B L G N"], *, chunk: int
) -> str | None:
  """Returns in one line why the kernels cannot run these sizes and dtypes, or None."""
  arrays = x_BLGHP, b_BLGN
  return table.refusal(*arrays, chunk=chunk) or refusal_of_the_way_back(*arrays, chunk=chunk)
