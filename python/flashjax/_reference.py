"""The operation in readable jnp: what every kernel must compute, and what runs where no kernel serves.

Differentiable to any order in either mode. Memory is O(s + t): queries are taken in chunks, and each chunk's scores are
recomputed in its derivative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import max_dim, min_dim

from flashjax import _dropout
from flashjax._types import Arrays, Attrs

_CHUNK_ELEMENTS = 1 << 23  # scores held at a time


class _Tokens(NamedTuple):
    """For each row of q (or of k): which sequence it belongs to, where in it, and whether it takes part at all."""

    sequence: jax.Array
    position: jax.Array
    valid: jax.Array


def attention(arrays: Arrays, attrs: Attrs) -> tuple[jax.Array, jax.Array]:
    """out (b, s, h, e) in the operand dtype, lse (b, h, s) in float32."""
    arrays = gather_cache(arrays)
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    b, s, h, _ = q.shape
    t = k.shape[1]
    queries, keys, diagonal = _layout(arrays, attrs)

    # What is outside every sequence may be NaN, and 0 * NaN is NaN: it must not reach a product.
    q = jnp.where(queries.valid[..., None, None], q, 0)
    k = jnp.where(keys.valid[..., None, None], k, 0)
    v = jnp.where(keys.valid[..., None, None], v, 0)

    per_query = {"q": q, "tokens": queries}
    if "segment_ids_q" in arrays:
        per_query["segment"] = arrays["segment_ids_q"]
    bias = arrays.get("bias")
    if bias is not None and "cu_seqlens_q" not in arrays and bias.shape[3] == s:
        per_query["bias"] = jnp.moveaxis(bias, 3, 1)  # goes with its rows; packed rows look theirs up

    @jax.checkpoint
    def chunk(x):
        scores = attrs.scale * _grouped_scores(x["q"], k)
        if attrs.softcap:
            scores = attrs.softcap * jnp.tanh(scores / attrs.softcap)
        at = x["tokens"].position + _lookup(diagonal, x["tokens"].sequence)  # the diagonal's key, for each query
        distance = keys.position[:, None, :] - at[:, :, None]
        if bias is not None:
            scores += _bias(jnp.moveaxis(x["bias"], 1, 3) if "bias" in x else bias, x["tokens"], keys, arrays)
        if "alibi_slopes" in arrays:
            slopes = arrays["alibi_slopes"].astype(jnp.float32)
            scores -= slopes[:, :, None, None] * jnp.abs(distance)[:, None].astype(jnp.float32)

        mask = x["tokens"].valid[:, :, None] & keys.valid[:, None, :]
        mask &= x["tokens"].sequence[:, :, None] == keys.sequence[:, None, :]
        if attrs.window_left >= 0:
            mask &= distance >= -attrs.window_left
        if attrs.window_right >= 0:
            mask &= distance <= attrs.window_right
        if "segment" in x:
            mask &= x["segment"][:, :, None] == arrays["segment_ids_k"][:, None, :]
        scores = jnp.where(mask[:, None], scores, -jnp.inf)

        sinks = None
        if "sinks" in arrays:
            sinks = jnp.where(x["tokens"].valid[:, None], arrays["sinks"].astype(jnp.float32)[:, :, None], -jnp.inf)
        kept = None
        if "dropout_seed" in arrays:
            kept = _dropout.weights(arrays["dropout_seed"], attrs.dropout_keep, x["tokens"], keys.position)
        return _softmax_times(scores, sinks, v, kept)

    size = max_dim(1, min_dim(s, _CHUNK_ELEMENTS // max_dim(1, b * h * t)))
    count = -(-s // size)  # an expression, in a program that is exported for any size
    if isinstance(count, int) and count <= 1:
        out, lse = chunk(per_query)
    else:
        pad = count * size - s

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

        out, lse = jax.lax.map(chunk, jax.tree.map(split, per_query))
        out = jnp.moveaxis(out, 0, 1).reshape(b, count * size, h, v.shape[-1])[:, :s]
        lse = jnp.moveaxis(lse, 0, 2).reshape(b, h, count * size)[:, :, :s]
    return out.astype(q.dtype), lse


def gather_cache(arrays: Arrays) -> Arrays:
    """The same call with k and v gathered to (b, t, ...), without page_table and batch_idx.

    Keys behind a page id or an entry that does not exist are masked.
    """
    arrays = dict(arrays)
    k, v = arrays["k"], arrays["v"]
    if "page_table" in arrays:
        table = arrays.pop("page_table")
        b, p = table.shape
        exists = (table >= 0) & (table < k.shape[0])
        arrays["k"], arrays["v"] = (_take(x, table).reshape(b, p * x.shape[1], *x.shape[2:]) for x in (k, v))
        arrays["segment_ids_q"] = jnp.zeros(arrays["q"].shape[:2], jnp.int32)
        arrays["segment_ids_k"] = jnp.repeat(jnp.where(exists, 0, -1), k.shape[1], axis=1)
    elif "batch_idx" in arrays:
        entry = arrays.pop("batch_idx")
        exists = (entry >= 0) & (entry < k.shape[0])
        arrays["k"], arrays["v"] = _take(k, entry), _take(v, entry)
        used = arrays.get("seqused_k", jnp.full((entry.shape[0], 1), k.shape[1], jnp.int32))
        arrays["seqused_k"] = jnp.where(exists[:, None], used, 0)
    return arrays


def _take(x, index):
    if not x.shape[0]:
        return jnp.zeros(index.shape + x.shape[1:], x.dtype)
    return jnp.take(x, index, axis=0, mode="clip")


def _layout(arrays, attrs):
    """Tokens of q, tokens of k, and the diagonal (b, n) of every sequence: query i sits on key i + diagonal."""
    b, s = arrays["q"].shape[:2]
    t = arrays["k"].shape[1]
    q_cu, k_cu = (_boundaries(arrays.get(f"cu_seqlens_{x}"), b, extent) for x, extent in (("q", s), ("k", t)))
    q_begin, k_begin = q_cu[:, :-1], k_cu[:, :-1]
    q_len, k_len = jnp.maximum(jnp.diff(q_cu), 0), jnp.maximum(jnp.diff(k_cu), 0)
    q_begin, k_begin, q_len, k_len = jnp.broadcast_arrays(q_begin, k_begin, q_len, k_len)
    if attrs.max_seqlen_q >= 0:
        q_len = jnp.minimum(q_len, attrs.max_seqlen_q)
    if attrs.max_seqlen_k >= 0:
        k_len = jnp.minimum(k_len, attrs.max_seqlen_k)
    if "seqused_q" in arrays:
        q_len = jnp.clip(arrays["seqused_q"], 0, q_len)
    if "seqused_k" in arrays:
        k_len = jnp.clip(arrays["seqused_k"], 0, k_len)
    if "leftpad" in arrays:
        pad = jnp.clip(arrays["leftpad"][:, None], 0, k_len)
        k_begin, k_len = k_begin + pad, k_len - pad
    diagonal = jnp.zeros_like(q_len) if attrs.top_left else k_len - q_len
    if "shift" in arrays:
        diagonal = diagonal + arrays["shift"][:, None]
    return _tokens(s, q_cu, q_begin, q_len), _tokens(t, k_cu, k_begin, k_len), diagonal


def _boundaries(cu, b, extent):
    if cu is None:
        return jnp.broadcast_to(extent * jnp.arange(2, dtype=jnp.int32), (b, 2))  # not a constant: see _partition.py
    return jnp.clip(cu, 0, extent)


def _tokens(extent, cu, begin, length):
    row = jnp.arange(extent, dtype=jnp.int32)
    sequence = jax.vmap(lambda c: jnp.searchsorted(c, row, side="right"))(cu).astype(jnp.int32) - 1
    inside = (sequence >= 0) & (sequence < begin.shape[1])
    sequence = jnp.clip(sequence, 0, begin.shape[1] - 1)
    position = row - _lookup(begin, sequence)
    return _Tokens(sequence, position, inside & (position >= 0) & (position < _lookup(length, sequence)))


def _lookup(table, sequence):
    """table (b, n), sequence (b, s) -> (b, s)"""
    return jnp.take_along_axis(table, sequence, axis=1)


def _bias(bias, queries, keys, arrays):
    """The bias (b?, h?, rows, t) of some rows of q."""
    if "cu_seqlens_q" not in arrays and "cu_seqlens_k" not in arrays and "leftpad" not in arrays:
        return bias[:, 0].astype(jnp.float32)
    rows = bias.shape[3]
    position_q = jnp.zeros_like(queries.position) if rows == 1 else jnp.clip(queries.position, 0, rows - 1)
    if "cu_seqlens_q" not in arrays:  # these rows already are the queries'
        position_q = jnp.zeros_like(position_q) if rows == 1 else jnp.arange(rows)[None]
    columns = bias.shape[4]
    position_k = jnp.zeros_like(keys.position) if columns == 1 else jnp.clip(keys.position, 0, columns - 1)
    sequence = jnp.zeros_like(queries.sequence) if bias.shape[1] == 1 else queries.sequence
    row = jnp.arange(queries.position.shape[0]) if bias.shape[0] > 1 else jnp.zeros_like(queries.position[:, 0])
    i = (row[:, None, None], sequence[:, :, None], slice(None), position_q[:, :, None], position_k[:, None, :])
    return jnp.moveaxis(bias[i], -1, 1).astype(jnp.float32)  # (b, rows, t, h?) -> (b, h?, rows, t)


def _grouped_scores(q, k):
    b, s, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, s, g, h // g if g else 0, d).astype(jnp.float32)
    scores = jnp.einsum("bsgrd,btgd->bgrst", q, k.astype(jnp.float32), precision="highest")
    return scores.reshape(b, h, s, k.shape[1])


def _softmax_times(scores, sinks, v, kept):
    """softmax(scores (b, h, s, t)) @ v (b, t, g, e), and its log-sum-exp; a row of -inf gives 0 and -inf.

    `kept` multiplies the weights: dropout.
    """
    b, h, s, t = scores.shape
    g, e = v.shape[2:]
    top = jnp.max(scores, axis=-1, initial=-jnp.inf)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    sees = total > 0
    safe = jnp.where(sees, total, 1.0)
    if kept is not None:
        weights *= kept
    weights = weights.reshape(b, g, h // g if g else 0, s, t)
    out = jnp.einsum("bgrst,btge->bsgre", weights, v.astype(jnp.float32), precision="highest").reshape(b, s, h, e)
    sees_out, divisor = (jnp.moveaxis(x, 1, 2)[..., None] for x in (sees, safe))
    out = jnp.where(sees_out, out / divisor, 0.0)  # a choice, so that no cotangent of a row without keys gets through
    return out, jnp.where(sees, top + jnp.log(safe), -jnp.inf)
