"""The scan as Pallas kernels for TPUs: forward, backward, and what they can run.

Positions lie in the lanes and channels in the sublanes, [B, G, H*P, L]: the layout that XLA gives
an array of P = 64 channels by itself, because it needs no padding. A head is then a run of
rows, and what every position has of its own (dt, decays) is a row that spreads over them.
A grid step is one chunk of some heads of one group; chunks run in order with the state in VMEM,
and a chunk runs in tiles of 128 positions. Merged axes keep their letters: `x_HPQ` has the
dimensions H*P and Q. K counts blocks of heads over all groups.
"""

from hybridlm.ops.ssd.pallas_tpu.backward import backward
from hybridlm.ops.ssd.pallas_tpu.forward import forward
from hybridlm.ops.ssd.pallas_tpu.table import default_chunk, refusal

__all__ = ["backward", "default_chunk", "forward", "refusal"]
