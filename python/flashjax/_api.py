"""The public functions: signatures, defaults, documentation, and the way to the one operation beneath."""

import functools

import jax
import jax.numpy as jnp

from flashjax import _cache, _derivatives
from flashjax._checks import Checker, drop_absent
from flashjax._types import Attrs

# Jitted, since an FFI call outside a compiled program costs a hundred times what it does inside.
_attention = jax.jit(_derivatives.attention, static_argnames="attrs")


def flash_mha(
    q,
    k,
    v,
    softmax_scale=None,
    is_causal=False,
    window_size=(-1, -1),
    *,
    softcap=0.0,
    bias=None,
    alibi_slopes=None,
    sinks=None,
    segment_ids=None,
    causal_alignment="bottom_right",
    return_lse=False,
    dropout_rate=0.0,
    dropout_key=None,
    deterministic=False,
    implementation=None,
    sequence_layout=None,
    strategy="auto",
    axis_name=None,
):
    """Multi-head attention, softmax(scale * q k^T) v, in memory that grows with s + t.

    Args:
      q: queries (b, s, h, d), float32, bfloat16 or float16.
      k: keys (b, t, g, d); h is a multiple of g, and query head i reads key head i // (h // g).
      v: values (b, t, g, e).
      softmax_scale: factor of the scores; d ** -0.5 by default.
      is_causal: a query sees no key after its own position.
      window_size: (left, right), how many keys before and after its own position a query sees; -1 or None: all.
      softcap: if positive, scores become softcap * tanh(score / softcap).
      bias: added to the (capped) scores, broadcastable to (b, h, s, t), each dimension 1 or full; -inf masks.
      alibi_slopes: (h,) or (b, h); slope * distance is subtracted from the scores.
      sinks: (h,); exp(sink) is added to the softmax's denominator.
      segment_ids: int32 (b, s), or a pair ((b, s), (b, t)); a query sees keys of its own segment only.
      causal_alignment: where s != t, "bottom_right" puts the last query on the last key, "top_left" the first on the
        first. It places windows and alibi's distances too.
      return_lse: also return the log-sum-exp of the scores, float32 (b, h, s), differentiable.
      dropout_rate: the share of attention weights that are dropped, rounded to a 256th; the others are scaled up. Which
        ones depends on the key, the batch entry, the head and the positions alone, on every backend.
      dropout_key: a key of jax.random, needed where dropout_rate > 0.
      deterministic: the backward adds in a fixed order, bitwise repeatable.
      implementation: "cpu", "cuda", "upstream" (FlashAttention-2's CUDA kernels) or "reference" to insist on one; by
        default the best for the platform.
      sequence_layout: a `SequenceLayout`, the order in which q, k, v, bias, segment_ids and the results hold the
        sequence; by default as it is.
      strategy: how devices share a sequence that is split over them: "ring", "ulysses", "allgather", or "auto".
      axis_name: inside jax.shard_map, the axis or axes over which the sequence is split; a bias then has this device's
        rows and all columns. (Elsewhere the sharding of the arrays says how they are split.)

    Returns:
      out (b, s, h, e) in the dtype of q, or (out, lse). A query that sees no key gives 0, and -inf as lse.

    Example:
      >>> import jax, flashjax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 8))
      >>> flashjax.flash_mha(q, k, v, is_causal=True).shape
      (2, 16, 4, 8)
    """
    check = Checker("flash_mha")
    q, k, v = check.operands(q, k, v, "b s h d", "b t g d", "b t g e")
    split = check.split(sequence_layout, strategy, axis_name)
    extent = {letter: check.extent[letter] for letter in "bhst"}
    extent["t"] *= split.line.n if split.line else 1  # a device's rows of the bias have all columns
    bias = check.bias(bias, extent, q.dtype)
    seed, keep = check.dropout(dropout_rate, dropout_key, q.shape[0], q.shape[2])
    attrs = Attrs(
        **check.scores(softmax_scale, is_causal, window_size, softcap, causal_alignment),
        **check.implementation(implementation),
        deterministic=check.static_bool("deterministic", deterministic),
        dropout_keep=keep,
        sequence=split,
    )
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        **check.per_head(alibi_slopes, sinks, batched=True),
        **check.segments(segment_ids, "b s", "b t"),
        **seed,
    }
    return_lse = check.static_bool("return_lse", return_lse)
    out, lse = _attention(drop_absent(arrays), attrs=attrs)
    return (out, lse) if return_lse else out


def flash_mha_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    is_causal=False,
    window_size=(-1, -1),
    *,
    seqused_q=None,
    seqused_k=None,
    softcap=0.0,
    bias=None,
    alibi_slopes=None,
    sinks=None,
    segment_ids=None,
    causal_alignment="bottom_right",
    return_lse=False,
    dropout_rate=0.0,
    dropout_key=None,
    deterministic=False,
    implementation=None,
    sequence_layout=None,
    strategy="auto",
    axis_name=None,
):
    """Attention within each of n sequences of different lengths, packed one after the other.

    Args:
      q: queries (s, h, d), where s is the total length.
      k: keys (t, g, d).
      v: values (t, g, e).
      cu_seqlens_q: int32 (n+1,), never decreasing; sequence i is rows cu_seqlens_q[i] to cu_seqlens_q[i+1] of q.
      cu_seqlens_k: likewise for k and v; cu_seqlens_q by default.
      max_seqlen_q: the longest query sequence, if you know it; a promise, checked on the CPU. Elsewhere what lies past
        it counts as outside the sequence.
      max_seqlen_k: likewise for keys.
      seqused_q: int32 (n,), how many queries of each sequence are valid; all by default.
      seqused_k: int32 (n,), how many keys are.
      bias: broadcastable to (n, h, max_seqlen_q, max_seqlen_k), indexed by positions within a sequence.
      alibi_slopes: (h,).
      segment_ids: int32 (s,), or a pair ((s,), (t,)).
      softmax_scale, is_causal, window_size, softcap, sinks, causal_alignment, return_lse, dropout_rate, dropout_key,
      deterministic, implementation: as for `flash_mha`, for each sequence by itself.
      sequence_layout, strategy, axis_name: as for `flash_mha`, for the s rows of all sequences together; cu_seqlens
        count rows in their natural order, and with `axis_name` those of all devices.

    Returns:
      out (s, h, e), or (out, lse) with lse (h, s). Rows outside every sequence are 0, and -inf in lse.

    Example:
      >>> import jax, jax.numpy as jnp, flashjax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 16, 4, 8))
      >>> cu_seqlens = jnp.array([0, 5, 5, 16], jnp.int32)  # lengths 5, 0 and 11
      >>> flashjax.flash_mha_varlen(q, k, v, cu_seqlens, is_causal=True).shape
      (16, 4, 8)
    """
    check = Checker("flash_mha_varlen")
    q, k, v = check.operands(q, k, v, "s h d", "t g d", "t g e")
    cu_seqlens_q = check.integers("cu_seqlens_q", cu_seqlens_q, "n+1")
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        check.fail("cu_seqlens_k", "given, since q and k have different total lengths", None)
    is_self = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else check.integers("cu_seqlens_k", cu_seqlens_k, "n+1")
    longest = {
        name: None if x is None else check.static_int(name, x)
        for name, x in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
    }
    extent = {"n": check.extent["n"], "h": check.extent["h"], **longest}
    bias = check.bias(bias, extent, q.dtype)
    seed, keep = check.dropout(dropout_rate, dropout_key, 1, q.shape[1])
    attrs = Attrs(
        **check.scores(softmax_scale, is_causal, window_size, softcap, causal_alignment),
        **check.implementation(implementation),
        deterministic=check.static_bool("deterministic", deterministic),
        dropout_keep=keep,
        **drop_absent(longest),
        sequence=check.split(sequence_layout, strategy, axis_name, is_self),
    )
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": None if seqused_q is None else check.integers("seqused_q", seqused_q, "n"),
        "seqused_k": None if seqused_k is None else check.integers("seqused_k", seqused_k, "n"),
        **check.segments(segment_ids, "s", "t"),
    }
    arrays = {name: x[None] for name, x in drop_absent(arrays).items()}  # one row of n sequences
    arrays |= drop_absent({"bias": bias, **check.per_head(alibi_slopes, sinks, batched=False), **seed})
    return_lse = check.static_bool("return_lse", return_lse)
    out, lse = _attention(arrays, attrs=attrs)
    return (out[0], lse[0]) if return_lse else out[0]


def flash_mha_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    rotary_cos=None,
    rotary_sin=None,
    softmax_scale=None,
    is_causal=False,
    window_size=(-1, -1),
    num_splits=0,
    return_softmax_lse=False,
    *,
    value_dim=None,
    rotary_interleaved=True,
    update_cache=False,
    softcap=0.0,
    bias=None,
    alibi_slopes=None,
    sinks=None,
    causal_alignment="bottom_right",
    implementation=None,
):
    """Attention of a few new queries to a cache of keys and values, to which new ones may be appended first.

    Args:
      q: queries (b, s, h, d).
      k_cache: keys (b, t, g, d); (c, t, g, d) with `cache_batch_idx`; (pages, page size, g, d) with `page_table`.
      v_cache: values, likewise, of dimension e; None with `value_dim`.
      k: new keys (b, new, g, d), put into the cache at positions cache_seqlens, cache_seqlens + 1, ...
      v: new values (b, new, g, e).
      cache_seqlens: int or int32 (b,), how many keys the cache holds before the append, left padding included; its
        whole capacity by default.
      cache_batch_idx: int32 (b,), the cache entry that each row of q uses.
      cache_leftpad: int32 (b,), how many keys at the front of the cache to skip.
      page_table: int32 (b, p), the pages that make up each row's cache, in order. Any page size will do.
      rotary_cos: (positions, r / 2), r <= d: rotates the first r features of the new keys at their cache positions, and
        of the queries (at cache_seqlens + i if causal or windowed, else all at cache_seqlens).
      rotary_sin: likewise.
      num_splits: into how many parts the keys are split; 0 lets the kernel choose. Of results it moves the rounding
        alone; kernels for many queries, which need no parts to keep a GPU busy, make one.
      return_softmax_lse: also return the log-sum-exp, float32 (b, h, s).
      value_dim: the values are the first so many features of the keys, as in absorbed latent attention: e. There is one
        cache then, `k_cache`, and `v_cache` and `v` are None. Among GPUs d > 512 needs a Hopper one when the program
        runs; for others ask for `implementation="reference"`.
      rotary_interleaved: rotate features (0, 1), (2, 3), ...; else (0, r/2), (1, r/2 + 1), ...
      update_cache: also return the caches with the new keys and values. They are written in place where the caches
        are donated (or carried by a loop), on a copy otherwise; the arrays that you passed never change.
      bias: broadcastable to (b, h, s, capacity); its columns count from the first key after the left padding.
      softmax_scale, is_causal, window_size, softcap, alibi_slopes, sinks, causal_alignment, implementation: as for
        `flash_mha`, over the cache_seqlens + new keys.

    Returns:
      out (b, s, h, e), followed by lse if `return_softmax_lse`, followed by k_cache and v_cache if `update_cache`; with
      `value_dim` there is no v_cache.

    Example:
      >>> import jax, jax.numpy as jnp, flashjax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 4, 8))
      >>> cache = jnp.zeros((2, 32, 4, 8))
      >>> out, k_cache, v_cache = flashjax.flash_mha_with_kvcache(
      ...     q, cache, cache, k, v, cache_seqlens=0, update_cache=True
      ... )
      >>> out.shape, k_cache.shape
      ((2, 1, 4, 8), (2, 32, 4, 8))
    """
    check = Checker("flash_mha_with_kvcache")
    if cache_batch_idx is not None and page_table is not None:
        check.fail("cache_batch_idx", "absent where `page_table` says which pages to use", cache_batch_idx)
    indirect = cache_batch_idx is not None or page_table is not None
    cache_dims = "c t" if indirect else "b t"
    names = ("q", "k_cache", "v_cache")
    shared_e = 0 if value_dim is None else check.static_int("value_dim", value_dim, at_least=1)
    if shared_e:
        for name, x in (("v_cache", v_cache), ("v", v)):
            if x is not None:
                check.fail(name, "None where `value_dim` says that the values are features of the keys", x)
    q, k_cache, v_cache = check.operands(
        q, k_cache, k_cache if shared_e else v_cache, "b s h d", f"{cache_dims} g d", f"{cache_dims} g e", names
    )
    if shared_e > q.shape[-1]:
        check.fail("value_dim", f"at most d = {q.shape[-1]}", value_dim)
    b = q.shape[0]
    if page_table is not None:
        page_table = check.integers("page_table", page_table, "b p")
        capacity = page_table.shape[1] * k_cache.shape[1]
    else:
        capacity = k_cache.shape[1]
    if cache_batch_idx is not None:
        cache_batch_idx = check.integers("cache_batch_idx", cache_batch_idx, "b")
    if cache_leftpad is not None:
        cache_leftpad = check.integers("cache_leftpad", cache_leftpad, "b")

    if not shared_e and (k is None) != (v is None):
        check.fail("v" if v is None else "k", "given together with the other", None)
    if k is not None:
        k = check.array("k", k, "b new g d", (q.dtype.name,))
        v = None if shared_e else check.array("v", v, "b new g e", (q.dtype.name,))
        if cache_seqlens is None:
            check.fail("cache_seqlens", "given with `k`: it says where the new keys go", None)
        if k.shape[1] > capacity:
            check.fail("k", f"of at most {capacity} new keys, the capacity of the cache", k)
    elif update_cache:
        check.fail("update_cache", "False without new keys `k` and `v`", update_cache)
    if cache_seqlens is None:
        seqlens = jnp.full((b,), capacity, jnp.int32)
    elif isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        new = 0 if k is None else k.shape[1]
        if not 0 <= cache_seqlens <= capacity - new:
            check.fail("cache_seqlens", f"in [0, {capacity - new}], what the cache can hold", cache_seqlens)
        seqlens = jnp.full((b,), cache_seqlens, jnp.int32)
    elif getattr(cache_seqlens, "shape", None) == ():
        seqlens = jnp.broadcast_to(check.integers("cache_seqlens", cache_seqlens, ""), (b,))
    else:
        seqlens = check.integers("cache_seqlens", cache_seqlens, "b")

    if (rotary_cos is None) != (rotary_sin is None):
        missing = "rotary_cos" if rotary_cos is None else "rotary_sin"
        check.fail(missing, "given together with the other", None)
    rotary_interleaved = check.static_bool("rotary_interleaved", rotary_interleaved)
    if rotary_cos is not None:
        if shared_e:
            check.fail("rotary_cos", "absent with `value_dim`: it would rotate the values", rotary_cos)
        if k is None:
            check.fail("rotary_cos", "absent without new keys `k`: there is nothing to rotate them against", rotary_cos)
        rotary_cos = check.array("rotary_cos", rotary_cos, "positions half", _FLOATS)
        rotary_sin = check.array("rotary_sin", rotary_sin, "positions half", _FLOATS)
        if 2 * rotary_cos.shape[1] > q.shape[-1] or not rotary_cos.shape[0]:
            check.fail("rotary_cos", f"(positions, r / 2) with positions > 0 and r <= d = {q.shape[-1]}", rotary_cos)

    bias = check.bias(bias, {"b": b, "h": q.shape[2], "s": q.shape[1], "t": capacity}, q.dtype)
    attrs = Attrs(
        **check.scores(softmax_scale, is_causal, window_size, softcap, causal_alignment),
        **check.implementation(implementation),
        num_splits=check.static_int("num_splits", num_splits),
        shared_e=shared_e,
    )
    out, lse, k_cache, v_cache = _cached_attention(
        drop_absent({"k": k, "v": v, "cos": rotary_cos, "sin": rotary_sin}),
        drop_absent(
            {
                "q": q,
                "k": k_cache,
                "v": None if shared_e else v_cache,
                "bias": bias,
                **check.per_head(alibi_slopes, sinks, batched=True),
                "seqused_k": seqlens[:, None],
                "leftpad": cache_leftpad,
                "batch_idx": cache_batch_idx,
                "page_table": page_table,
            }
        ),
        attrs=attrs,
        rotary_interleaved=rotary_interleaved,
        update_cache=check.static_bool("update_cache", update_cache),
    )
    lse = (lse,) if check.static_bool("return_softmax_lse", return_softmax_lse) else ()
    caches = tuple(x for x in (k_cache, v_cache) if x is not None) if update_cache else ()
    return (out, *lse, *caches) if lse or caches else out


_FLOATS = ("float32", "bfloat16", "float16")


@functools.partial(jax.jit, static_argnames=("attrs", "rotary_interleaved", "update_cache"))
def _cached_attention(new, arrays, attrs, rotary_interleaved, update_cache):
    """Rotate, append, attend. The caches come back only if asked for, so that nothing is kept alive for nothing."""
    if "k" in new:
        seqlens = arrays["seqused_k"][:, 0]
        at = _cache.positions(seqlens, new["k"].shape[1])
        # A bad length stays as it is: the sum might look good, or wrap around.
        capacity = arrays["k"].shape[1] * (arrays["page_table"].shape[1] if "page_table" in arrays else 1)
        fits = (seqlens >= 0) & (seqlens <= capacity)
        if "cos" in new:
            rotate = functools.partial(_cache.rotate, cos=new["cos"], sin=new["sin"], interleaved=rotary_interleaved)
            new = new | {"k": rotate(new["k"], at=at)}
            ordered = attrs.window_left >= 0 or attrs.window_right >= 0
            at_q = _cache.positions(seqlens, arrays["q"].shape[1])
            arrays = arrays | {
                "q": rotate(arrays["q"], at=at_q if ordered else jnp.broadcast_to(at_q[:, :1], at_q.shape))
            }
        where = {name: arrays[name] for name in ("batch_idx", "page_table") if name in arrays}
        appended = {x: _cache.append(arrays[x], new[x], at, **where) for x in ("k", "v") if x in new}
        seqlens = jnp.where(fits, seqlens + new["k"].shape[1], seqlens)
        arrays = arrays | appended | {"seqused_k": seqlens[:, None]}
    caches = (arrays["k"], arrays.get("v")) if update_cache else (None, None)
    if attrs.shared_e:
        arrays = arrays | {"v": arrays["k"][..., : attrs.shared_e]}
    out, lse = _derivatives.attention(arrays, attrs)
    return out, lse, *caches
