"""The laws of attention, against dense attention in float64, and of rotary positions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cases import programs
from hybridlm.ops import attention, attention_blocks
from hybridlm.ops.attention import attend, rotate

B, L, S, K, J, E = 2, 37, 41, 2, 3, 10
OPTIONS = {
  "defaults": {},
  "one_query_a_block": {"block": 1},
  "ragged_last_block": {"block": 8},
  "one_block": {"block": 64},
  "window": {"window": 5, "block": 8},
  "window_of_one": {"window": 1, "block": 16},
  "window_past_the_start": {"window": 60, "block": 8},
  "scale": {"scale": 0.3, "block": 16},
}


def make(*, queries=L, keys=S, heads=(K, J, E), resets=0.1, seed=0, dtype=jnp.float32):
  """Returns q, k, v and the keys' segments; ids come back after a gap only as padding."""
  rng = np.random.default_rng(seed)
  K, J, E = heads

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  segment_BS = np.cumsum(rng.random((B, keys)) < resets, axis=1) + 1
  segment_BS[0, -4:] = 0
  qkv = normal(B, queries, K, J, E), normal(B, keys, K, E), normal(B, keys, K, E)
  return *qkv, jnp.asarray(segment_BS, jnp.int32)


def dense(q_BLKJE, k_BSKE, v_BSKE, segment_BS=None, *, window=None, scale=None, block=None):
  """Returns attention in float64 with the whole L x S mask; `block` makes no difference."""
  del block
  q, k, v = (np.asarray(x, np.float64) for x in (q_BLKJE, k_BSKE, v_BSKE))
  L, S, E = q.shape[1], k.shape[1], q.shape[-1]
  behind_LS = np.arange(S - L, S)[:, None] - np.arange(S)
  seen_BLS = np.broadcast_to((behind_LS >= 0) & (behind_LS < (window or S)), (B, L, S))
  if segment_BS is not None:
    segment_BS = np.asarray(segment_BS)
    seen_BLS = seen_BLS & (segment_BS[:, -L:, None] == segment_BS[:, None, :])
  logit = np.einsum("blkje,bske->bkjls", q, k) * (E**-0.5 if scale is None else scale)
  weight = np.exp(logit - logit.max(axis=-1, keepdims=True)) * seen_BLS[:, None, None]
  return np.einsum("bkjls,bske->blkje", weight / weight.sum(axis=-1, keepdims=True), v)


@functools.partial(jax.jit, static_argnames=("window", "scale", "block"))
def segmented(arrays, **options):
  """Returns `attend` of what `make` returns."""
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = arrays
  queries = segment_BS[:, -q_BLKJE.shape[1] :]
  return attend(q_BLKJE, k_BSKE, v_BSKE, segment_BL=queries, segment_BS=segment_BS, **options)


@jax.jit
def slope_of_queries(arrays):
  """Returns the gradient of the summed output for the queries, in blocks of 8."""
  return jax.grad(lambda q: jnp.sum(segmented((q, *arrays[1:]), block=8)))(arrays[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_dense_attention(options):
  arrays = make()
  got = segmented(arrays, **options)
  np.testing.assert_allclose(got, dense(*arrays, **options), atol=2e-6)


def test_without_segments_and_with_as_many_keys_as_queries_it_is_causal_attention():
  q_BLKJE, k_BSKE, v_BSKE, _ = make(keys=L)
  got = attend(q_BLKJE, k_BSKE, v_BSKE, block=8)
  np.testing.assert_allclose(got, dense(q_BLKJE, k_BSKE, v_BSKE), atol=2e-6)


def test_segments_of_the_keys_default_to_those_of_the_queries():
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = make(keys=L)
  got = attend(q_BLKJE, k_BSKE, v_BSKE, segment_BL=segment_BS)
  np.testing.assert_allclose(got, dense(q_BLKJE, k_BSKE, v_BSKE, segment_BS), atol=2e-6)


@pytest.mark.parametrize("name", ["defaults", "ragged_last_block", "window"])
def test_gradients_are_the_slopes_of_dense_attention(name):
  arrays, options = make(), OPTIONS[name]
  rng = np.random.default_rng(1)
  weight = rng.standard_normal(arrays[0].shape)

  def loss(floats):
    return jnp.sum(weight * segmented((*floats, arrays[3]), **options))

  slopes = jax.jit(jax.grad(loss))(arrays[:3])
  for i, slope in enumerate(slopes):
    direction = rng.standard_normal(slope.shape)

    def moved(step, i=i, direction=direction):
      floats = [np.asarray(v, np.float64) for v in arrays[:3]]
      floats[i] = floats[i] + step * direction
      return np.sum(weight * dense(*floats, arrays[3], **options))

    want = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert np.sum(slope * direction) == pytest.approx(want, rel=2e-5)


def test_large_logits_neither_overflow_nor_lose_the_largest():
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = make()
  arrays = 100 * q_BLKJE, k_BSKE, v_BSKE, segment_BS
  np.testing.assert_allclose(segmented(arrays, block=8), dense(*arrays), atol=2e-5)
  slopes = slope_of_queries(arrays)
  assert np.all(np.isfinite(slopes))


def test_bfloat16_inputs_have_a_float32_softmax():
  arrays = make(dtype=jnp.bfloat16)
  got = segmented(arrays, block=8)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(got), dense(*arrays), atol=2**-7)
  slopes = slope_of_queries(arrays)
  assert slopes.dtype == jnp.bfloat16


def test_a_query_that_sees_no_key_returns_zero_and_moves_nothing():
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = make()
  segment_BL = segment_BS[:, -L:].at[:, 11].set(99)

  @jax.jit
  def run(k_BSKE):
    return attend(q_BLKJE, k_BSKE, v_BSKE, segment_BL=segment_BL, segment_BS=segment_BS, block=8)

  assert not np.any(run(k_BSKE)[:, 11])
  assert not np.any(jax.grad(lambda k: jnp.sum(run(k)[:, 11]))(k_BSKE))
  others = dense(q_BLKJE, k_BSKE, v_BSKE, segment_BS)
  np.testing.assert_allclose(
    np.delete(run(k_BSKE), 11, axis=1), np.delete(others, 11, axis=1), atol=2e-6
  )


@pytest.mark.parametrize(("window", "first"), [(None, 0), (6, 14)])
def test_later_tokens_never_change_earlier_outputs(window, first):
  q_BLKJE, k_BSKE, v_BSKE, _ = make(keys=L)
  at = 19

  def output(k_BSKE, v_BSKE):
    return jnp.sum(jnp.sin(attend(q_BLKJE, k_BSKE, v_BSKE, window=window, block=8)[:, at]))

  for slope in jax.jit(jax.grad(output, argnums=(0, 1)))(k_BSKE, v_BSKE):
    reached_L = np.flatnonzero(np.abs(slope).sum(axis=(0, 2, 3)))
    assert reached_L.tolist() == list(range(first, at + 1))


def test_packed_documents_give_what_each_gives_alone():
  q_BLKJE, k_BSKE, v_BSKE, _ = make(keys=L)
  edges = [0, 1, 3, 20, 33, L]
  row_L = np.repeat([1, 2, 3, 4, 0], np.diff(edges))
  segment_BL = jnp.asarray(np.broadcast_to(row_L, (B, L)), jnp.int32)
  packed = attend(q_BLKJE, k_BSKE, v_BSKE, segment_BL=segment_BL, block=8)
  for start, stop in itertools.pairwise(edges):
    span = slice(start, stop)
    alone = jax.jit(attend)(q_BLKJE[:, span], k_BSKE[:, span], v_BSKE[:, span])
    np.testing.assert_allclose(packed[:, span], alone, atol=2e-6)


def test_new_queries_after_a_prefix_give_the_last_rows_of_all():
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = make(queries=S)
  whole = segmented((q_BLKJE, k_BSKE, v_BSKE, segment_BS), block=8)
  for new in (1, 6):
    last = segmented((q_BLKJE[:, -new:], k_BSKE, v_BSKE, segment_BS), block=4)
    np.testing.assert_allclose(last, whole[:, -new:], atol=2e-6)


@pytest.mark.parametrize("window", [None, 11])
def test_no_array_is_as_large_as_queries_times_keys_or_repeats_the_keys(window):
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = make(queries=64, keys=64)

  def loss(q_BLKJE, k_BSKE, v_BSKE):
    out = segmented((q_BLKJE, k_BSKE, v_BSKE, segment_BS), window=window, block=8)
    return jnp.sum(jnp.sin(out))

  held = programs.shapes(jax.grad(loss, argnums=(0, 1, 2)), q_BLKJE, k_BSKE, v_BSKE)
  # A quarter of the queries at a time, so that early ones skip late keys; or a window's keys.
  sizes = (16, 32, 48, 64) if window is None else (8 + window - 1,)
  assert all((B, K, 8, J, size) in held for size in sizes)
  wide = sizes[-1]
  for shape in held:
    assert shape.count(64) <= 1, shape
    assert int(np.prod(shape)) <= B * K * J * 8 * max(wide, 8 * E), shape


@pytest.mark.parametrize("window", [None, 50])
def test_the_kernel_for_tpus_agrees_where_it_can_be_interpreted(window):
  arrays = make(queries=128, keys=256, heads=(2, 2, 16), resets=0.02)
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = arrays
  form = {"window": window, "scale": 0.25}

  def outputs(run):
    def loss(q_BLKJE, k_BSKE, v_BSKE):
      out = run(q_BLKJE, k_BSKE, v_BSKE, segment_BS[:, -128:], segment_BS, **form)
      return jnp.sum(jnp.sin(out)), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q_BLKJE, k_BSKE, v_BSKE)
    return out, *grads

  def kernel(*args, **form):
    return attention._splash(*args, **form, interpret=True)

  def portable(*args, **form):
    return attention_blocks.attend(*args, **form, block=64)

  for got, want in zip(outputs(kernel), outputs(portable), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_rotation_of_the_half_layout_turns_channel_pairs_by_their_angles():
  x_BLKE = make()[1][:, :L]
  rotary, base = 6, 100.0
  got = rotate(x_BLKE, jnp.arange(L), base=base, rotary=rotary)
  x = np.asarray(x_BLKE, np.float64)
  angle = np.arange(L)[:, None] * base ** (-np.arange(3) / 3)
  pair = x[..., :3] + 1j * x[..., 3:6]
  turned = pair * np.exp(1j * angle)[:, None, :]
  want = np.concatenate([turned.real, turned.imag, x[..., 6:]], axis=-1)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_array_equal(got[..., 6:], x_BLKE[..., 6:])


def test_only_the_distance_of_rotated_positions_matters():
  q_BLKJE, k_BSKE, _, _ = make(keys=L)

  def logits(start):
    position_L = start + jnp.arange(L)
    q = rotate(q_BLKJE, position_L, base=50.0, rotary=8)
    k = rotate(k_BSKE, position_L, base=50.0, rotary=8)
    return jnp.einsum("blkje,bske->bkjls", q, k)

  np.testing.assert_allclose(logits(0), logits(91), atol=2e-4)
  assert np.abs(logits(0) - jnp.einsum("blkje,bske->bkjls", q_BLKJE, k_BSKE)).max() > 1


def test_positions_may_differ_by_row_and_frequencies_may_be_given():
  x_BLKE = make()[1][:, :L]
  frequency = jnp.array([1.0, 0.3, 0.01])
  position_BL = jnp.stack([jnp.arange(L), 5 + jnp.arange(L)])
  got = rotate(x_BLKE, position_BL, base=1.0, rotary=6, frequency=frequency)
  for row in range(B):
    want = rotate(x_BLKE[row : row + 1], position_BL[row], base=1.0, rotary=6, frequency=frequency)
    np.testing.assert_allclose(got[row], want[0], atol=1e-6)
  powers = 100.0 ** (-jnp.arange(3) / 3)
  given = rotate(x_BLKE, jnp.arange(L), base=1.0, rotary=6, frequency=powers)
  np.testing.assert_allclose(
    given, rotate(x_BLKE, jnp.arange(L), base=100.0, rotary=6), atol=1e-5
  )


def test_no_rotary_channels_leave_the_input_and_bfloat16_stays_bfloat16():
  x_BLKE = make(dtype=jnp.bfloat16)[1]
  got = rotate(x_BLKE, jnp.arange(S), base=10.0, rotary=0)
  np.testing.assert_array_equal(got, x_BLKE)
  assert rotate(x_BLKE, jnp.arange(S), base=10.0, rotary=10).dtype == jnp.bfloat16


@pytest.mark.parametrize("window", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_keys_of_a_prefix_are_seen_from_everywhere_and_values_have_a_width_of_their_own(window):
  rng = np.random.default_rng(4)
  q_BLKJE, k_BLKE, _, segment_BL = make(keys=L)
  v_BLKU, before_MKE, value_MKU, bar = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((B, L, K, 7), (6, K, E), (6, K, 7), (B, L, K, J, 7)))
  stay_M, own_BL = np.array([1, 0, 1, 1, 1, 0], bool), np.asarray(segment_BL)

  def by_blocks(q_BLKJE, k_BLKE, v_BLKU, before_MKE, value_MKU):
    prefix = attention_blocks.Prefix(before_MKE[None], value_MKU[None], stay_M[None])
    return attend(q_BLKJE, k_BLKE, v_BLKU, segment_BL=segment_BL, prefix=prefix, window=window,
                  block=8)

  def dense(q_BLKJE, k_BLKE, v_BLKU, before_MKE, value_MKU):
    behind_LS = np.arange(L)[:, None] - np.arange(L)
    seen_BLS = (behind_LS >= 0) & (behind_LS < (window or L))
    seen_BLS = seen_BLS & (own_BL[:, :, None] == own_BL[:, None])
    seen_BLS = np.concatenate([np.broadcast_to(stay_M, (B, L, 6)), seen_BLS], axis=2)
    keys, values = (
      jnp.concatenate([jnp.broadcast_to(first, (B, *first.shape)), rest], axis=1)
      for first, rest in ((before_MKE, k_BLKE), (value_MKU, v_BLKU)))
    logit = jnp.einsum("blkje,bske->bkjls", q_BLKJE, keys) * E**-0.5
    weight = jax.nn.softmax(jnp.where(seen_BLS[:, None, None], logit, -jnp.inf))
    return jnp.einsum("bkjls,bsku->blkju", weight, values)

  @jax.jit
  def both(*arrays):
    pairs = (jax.vjp(run, *arrays) for run in (by_blocks, dense))
    return [(out, back(bar)) for out, back in pairs]

  got, want = both(q_BLKJE, k_BLKE, v_BLKU, before_MKE, value_MKU)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


ONES = np.ones
BAD = {
  "name": ({"impl": "fast"}, "attention 'fast' is not one of xla, cudnn, splash"),
  "no gpu": ({"impl": "cudnn"}, "attention 'cudnn' needs a GPU, not 'cpu'"),
  "no tpu": ({"impl": "splash"}, "attention 'splash' needs a TPU, not 'cpu'"),
  "window": ({"window": 0}, "window 0 is below 1 position"),
  "block": ({"block": 0}, "block 0 is below 1 position"),
  "heads": ({"k_BSKE": ONES((2, 37, 3, 10))}, r"k_BSKE has shape .* ask for \(2, 37, 2, 10\)"),
  "values": ({"v_BSKU": ONES((2, 37, 3, 10))}, "v_BSKU has shape"),
  "axes": ({"q_BLKJE": ONES((2, 37, 6, 10))}, "must have axes BLKJE"),
  "prefix": (
    {"prefix": attention_blocks.Prefix(ONES((1, 4, 2, 9)), ONES((1, 4, 2, 10)))},
    r"k_BMKE of a prefix has shape .* ask for \(1, 4, 2, 10\)",
  ),
  "kernel's prefix": (
    {"impl": "splash", "prefix": attention_blocks.Prefix(ONES((1, 4, 2, 10)), ONES((1, 4, 2, 10)))},
    "attention 'splash' cannot express a prefix",
  ),
  "kernel's values": (
    {"impl": "cudnn", "v_BSKU": ONES((2, 37, 2, 9))},
    "attention 'cudnn' cannot express values of width 9 and keys of 10",
  ),
  "nothing": ({"q_BLKJE": ONES((2, 0, 2, 3, 10))}, "0 queries cannot be the last of 37"),
  "too few keys": ({"q_BLKJE": ONES((2, 38, 2, 3, 10))}, "38 queries cannot be the last of 37"),
  "segments": ({"segment_BL": ONES((2, 36), np.int32)}, "segment_BL has shape"),
  "keys' segments": ({"segment_BS": ONES((2, 37), np.int32)}, "without segment_BL"),
  "one's segments": (
    {"q_BLKJE": ONES((2, 5, 2, 3, 10)), "segment_BL": ONES((2, 5), np.int32)},
    "segments of both the 5 queries and the 37 keys",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  q_BLKJE, k_BSKE, v_BSKE, _ = make(keys=L)
  changes, message = BAD[case]
  with pytest.raises(ValueError, match=message) as caught:
    attend(**({"q_BLKJE": q_BLKJE, "k_BSKE": k_BSKE, "v_BSKU": v_BSKE} | changes))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rotary": 5}, "rotary 5 is not an even number of the 10 channels"),
    ({"rotary": -2}, "rotary -2 is not an even number of the 10 channels"),
    ({"rotary": 12}, "rotary 12 is not an even number of the 10 channels"),
    ({"frequency": jnp.ones(4)}, r"frequency has shape \(4,\), not \(3,\) for rotary 6"),
  ],
)
def test_a_rotation_that_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    rotate(make()[1], jnp.arange(S), **({"base": 10.0, "rotary": 6} | changes))


@pytest.mark.parametrize(
  ("impl", "backend", "change", "message"),
  [
    ("cudnn", "gpu", "segments", "cannot express segments"),
    ("cudnn", "gpu", "keys", "as many queries as keys, not 37 and 41"),
    ("splash", "tpu", "keys", "multiples of 128, not 37 queries, 41 keys"),
  ],
)
def test_a_named_kernel_refuses_what_it_cannot_express(impl, backend, change, message, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  q_BLKJE, k_BSKE, v_BSKE, segment_BS = make(keys=L if change == "segments" else S)
  segments = {"segment_BL": segment_BS} if change == "segments" else {}
  with pytest.raises(ValueError, match=message):
    attend(q_BLKJE, k_BSKE, v_BSKE, impl=impl, **segments)
