"""The KV cache as plain functions: where new keys go, and rotary embedding.

Both are jnp, so they are differentiable, batched and sharded by JAX itself; the write is a scatter, which XLA does in
place when the cache is donated (or carried by a loop) and on a copy otherwise.
"""

import jax
import jax.numpy as jnp


def positions(cache_seqlens: jax.Array, new: int) -> jax.Array:
    """(b, new): the cache position of each new token."""
    return cache_seqlens[:, None] + jnp.arange(new, dtype=jnp.int32)


def append(cache, x, at, batch_idx=None, page_table=None):
    """`cache` (c, t, g, d) with x (b, new, g, d) written at positions `at` (b, new).

    What falls outside (past the capacity, or behind a page id or entry that does not exist) is not written.
    """
    c, rows = cache.shape[:2]
    if page_table is None:
        entry = jnp.arange(x.shape[0], dtype=jnp.int32) if batch_idx is None else batch_idx
        entry = jnp.broadcast_to(entry[:, None], at.shape)
        row, capacity = at, rows
    else:
        p = page_table.shape[1]
        page = jnp.clip(at // max(rows, 1), 0, max(p - 1, 0))
        entry = jnp.take_along_axis(page_table, page, axis=1) if p else jnp.full_like(at, -1)
        row, capacity = at - page * rows, p * rows
    inside = (at >= 0) & (at < capacity) & (entry >= 0)
    entry = jnp.where(inside, entry, c)  # c is out of bounds: dropped
    return cache.at[entry, row].set(x.astype(cache.dtype), mode="drop")


def rotate(x, cos, sin, at, interleaved: bool):
    """Rotary embedding of the first 2 * cos.shape[1] features of x (b, s, h, d) at positions `at` (b, s)."""
    half = cos.shape[1]
    cos, sin = (jnp.take(table.astype(jnp.float32), at, axis=0, mode="clip")[:, :, None] for table in (cos, sin))
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        x0, x1 = turned[..., 0::2], turned[..., 1::2]
    else:
        x0, x1 = turned[..., :half], turned[..., half:]
    y0, y1 = x0 * cos - x1 * sin, x0 * sin + x1 * cos
    y = jnp.stack((y0, y1), axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate((y0, y1), axis=-1)
    return jnp.concatenate((y.astype(x.dtype), rest), axis=-1)
