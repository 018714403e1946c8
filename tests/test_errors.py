"""What a caller can do wrong: each mistake has its message; nothing that is wrong at run time crashes."""

import json
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashjax

F32, I32 = jnp.float32, jnp.int32


def floats(*shape, dtype=F32):
    return jnp.zeros(shape, dtype)


def ints(*shape):
    return jnp.zeros(shape, I32)


DENSE = {"q": floats(2, 5, 4, 8), "k": floats(2, 6, 2, 8), "v": floats(2, 6, 2, 8)}
PACKED = {
    "q": floats(10, 4, 8),
    "k": floats(10, 2, 8),
    "v": floats(10, 2, 8),
    "cu_seqlens_q": jnp.array([0, 4, 7, 10], I32),
}
CACHED = {"q": floats(2, 1, 4, 8), "k_cache": floats(2, 16, 2, 8), "v_cache": floats(2, 16, 2, 8)}
APPEND = CACHED | {"k": floats(2, 1, 2, 8), "v": floats(2, 1, 2, 8), "cache_seqlens": jnp.array([3, 5], I32)}
TABLE = {
    "k_cache": floats(6, 4, 2, 8),
    "v_cache": floats(6, 4, 2, 8),
    "page_table": jnp.array([[0, 1, 2, 3], [5, 4, 3, 2]], I32),
}
BASE = {"flash_mha": DENSE, "flash_mha_varlen": PACKED, "flash_mha_with_kvcache": CACHED}

ARRAY, VARLEN, CACHE = "flash_mha", "flash_mha_varlen", "flash_mha_with_kvcache"
# arguments, exception, how the message goes on after "function: " (or what it has in it)
MISTAKES = {
    ARRAY: [
        ({"q": [[1.0]]}, TypeError, "`q` must be an array (b, s, h, d); got list"),
        ({"q": floats(5, 4, 8)}, ValueError, "`q` must be FLOATS (b, s, h, d); got float32 (5, 4, 8)"),
        ({"q": ints(2, 5, 4, 8)}, TypeError, "`q` must be float32 or bfloat16 or float16 (b, s, h, d); got int32"),
        ({"q": None}, TypeError, "`q` must be an array (b, s, h, d); got None"),
        (
            {"k": floats(2, 6, 2, 8, dtype=jnp.bfloat16)},
            TypeError,
            "`k` must be of the dtype of `q`, float32; got bfloat1",
        ),
        (
            {"v": floats(2, 6, 2, 8, dtype=jnp.float16)},
            TypeError,
            "`v` must be of the dtype of `q`, float32; got float16",
        ),
        ({"k": floats(3, 6, 2, 8)}, ValueError, "`k` must be float32 or bfloat16 or float16 (b, t, g, d) with b = 2"),
        ({"k": floats(2, 6, 2, 9)}, ValueError, "`k` must be float32 or bfloat16 or float16 (b, t, g, d) with"),
        ({"v": floats(2, 7, 2, 8)}, ValueError, "`v` must be float32 or bfloat16 or float16 (b, t, g, e) with"),
        ({"v": floats(2, 6, 4, 8)}, ValueError, "`v` must be float32 or bfloat16 or float16 (b, t, g, e) with"),
        (
            {"q": floats(2, 5, 3, 8)},
            ValueError,
            "`q` must be of h heads, a multiple of the g = 2 heads of `k`; got float32 (2, 5, 3, 8)",
        ),
        ({"softmax_scale": "big"}, TypeError, "`softmax_scale` must be a real number; got str 'big'"),
        ({"softmax_scale": float("nan")}, ValueError, "`softmax_scale` must be finite; got float nan"),
        ({"softmax_scale": True}, TypeError, "`softmax_scale` must be a real number; got bool True"),
        ({"is_causal": 1}, TypeError, "`is_causal` must be a bool known when the program is traced; got int 1"),
        ({"window_size": 4}, TypeError, "`window_size` must be a pair (left, right); got int 4"),
        ({"window_size": (4,)}, TypeError, "`window_size` must be a pair (left, right); got tuple (4,)"),
        ({"window_size": (4, -2)}, ValueError, "`window_size` must be at least -1; got int -2"),
        ({"window_size": (4.0, 1)}, TypeError, "`window_size` must be an int; got float 4.0"),
        ({"window_size": (2**31, 1)}, ValueError, "`window_size` must be less than 2**31; got int"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be 0 (off) or positive; got float -1.0"),
        ({"softcap": float("inf")}, ValueError, "`softcap` must be finite; got float inf"),
        ({"causal_alignment": "left"}, ValueError, '`causal_alignment` must be "bottom_right" or "top_left"; got str'),
        (
            {"implementation": "tpu"},
            ValueError,
            "`implementation` must be None or one of ('cpu', 'cuda', 'upstream', 'reference'); go",
        ),
        (
            {"return_lse": "yes"},
            TypeError,
            "`return_lse` must be a bool known when the program is traced; got str 'yes'",
        ),
        ({"deterministic": 0}, TypeError, "`deterministic` must be a bool known when the program is traced; got int 0"),
        (
            {"bias": 1.0},
            TypeError,
            "`bias` must be a floating point array broadcastable to (b, h, s, t) = (2, 4, 5, 6); g",
        ),
        (
            {"bias": floats(5, 5)},
            ValueError,
            "`bias` must be a floating point array broadcastable to (b, h, s, t) = (2, 4",
        ),
        ({"bias": floats(2, 2, 5, 6)}, ValueError, "`bias` must be a floating point array broadcastable to"),
        ({"bias": floats(1, 1, 1, 5, 6)}, ValueError, "`bias` must be a floating point array broadcastable to"),
        (
            {"bias": jnp.ones((5, 6), bool)},
            TypeError,
            "got bool (5, 6). For a boolean mask, pass jnp.where(mask, 0.0, -jn",
        ),
        ({"bias": ints(5, 6)}, TypeError, "`bias` must be a floating point array broadcastable to"),
        ({"alibi_slopes": floats(3)}, ValueError, "`alibi_slopes` must be (h,) with h = 4; got float32 (3,)"),
        (
            {"alibi_slopes": floats(3, 4)},
            ValueError,
            "`alibi_slopes` must be (b, h) with b = 2, h = 4; got float32 (3, 4)",
        ),
        ({"alibi_slopes": ints(4)}, TypeError, "`alibi_slopes` must be a floating point array (h,); got int32 (4,)"),
        ({"sinks": floats(2)}, ValueError, "`sinks` must be (h,) with h = 4; got float32 (2,)"),
        ({"sinks": floats(2, 4)}, ValueError, "`sinks` must be (h,); got float32 (2, 4)"),
        ({"segment_ids": floats(2, 5)}, TypeError, "`segment_ids` must be int32 (b, s); got float32 (2, 5)"),
        (
            {"segment_ids": ints(2, 5)},
            ValueError,
            "`segment_ids` must be int32 (b, t) with b = 2, t = 6; got int32 (2, 5)",
        ),
        (
            {"segment_ids": (ints(2, 5),)},
            TypeError,
            "`segment_ids` must be one int32 array or a pair ((b s), (b t)); got",
        ),
    ],
    VARLEN: [
        ({"cu_seqlens_q": floats(4)}, TypeError, "`cu_seqlens_q` must be int32 (n+1,); got float32 (4,)"),
        ({"cu_seqlens_q": [0, 4, 10]}, TypeError, "`cu_seqlens_q` must be an array (n+1,); got list [0, 4, 10]"),
        ({"cu_seqlens_q": ints(1, 4)}, ValueError, "`cu_seqlens_q` must be int32 (n+1,); got int32 (1, 4)"),
        ({"cu_seqlens_q": ints(0)}, ValueError, "`cu_seqlens_q` must be int32 (n+1,)"),
        ({"cu_seqlens_k": ints(5)}, ValueError, "`cu_seqlens_k` must be int32 (n+1,) with n = 3; got int32 (5,)"),
        (
            {"k": floats(9, 2, 8), "v": floats(9, 2, 8)},
            ValueError,
            "`cu_seqlens_k` must be given, since q and k have diff",
        ),
        ({"max_seqlen_q": 2.5}, TypeError, "`max_seqlen_q` must be an int; got float 2.5"),
        ({"max_seqlen_k": -3}, ValueError, "`max_seqlen_k` must be at least 0; got int -3"),
        ({"seqused_q": ints(2)}, ValueError, "`seqused_q` must be int32 (n,) with n = 3; got int32 (2,)"),
        ({"seqused_k": floats(3)}, TypeError, "`seqused_k` must be int32 (n,); got float32 (3,)"),
        ({"alibi_slopes": floats(3, 4)}, ValueError, "`alibi_slopes` must be (h,); got float32 (3, 4)"),
        ({"segment_ids": ints(2, 5)}, ValueError, "`segment_ids` must be int32 (s,); got int32 (2, 5)"),
        (
            {"bias": floats(2, 4, 4, 4)},
            ValueError,
            "`bias` must be a floating point array broadcastable to (n, h, max_seq",
        ),
        (
            {"bias": floats(3, 4, 5, 4), "max_seqlen_q": 4, "max_seqlen_k": 4},
            ValueError,
            "`bias` must be a floating point",
        ),
    ],
    CACHE: [
        ({"k_cache": floats(3, 16, 2, 8)}, ValueError, "`k_cache` must be FLOATS (b, t, g, d) with b = 2"),
        ({"v_cache": floats(2, 15, 2, 8)}, ValueError, "`v_cache` must be FLOATS (b, t, g, e) with"),
        ({"cache_batch_idx": ints(3)}, ValueError, "`cache_batch_idx` must be int32 (b,) with b = 2; got int32 (3,)"),
        ({"cache_leftpad": ints(3)}, ValueError, "`cache_leftpad` must be int32 (b,) with b = 2; got int32 (3,)"),
        ({"cache_seqlens": ints(3)}, ValueError, "`cache_seqlens` must be int32 (b,) with b = 2; got int32 (3,)"),
        ({"cache_seqlens": floats(2)}, TypeError, "`cache_seqlens` must be int32 (b,); got float32 (2,)"),
        ({"cache_seqlens": 17}, ValueError, "`cache_seqlens` must be in [0, 16], what the cache can hold; got int 17"),
        ({"cache_seqlens": -1}, ValueError, "`cache_seqlens` must be in [0, 16], what the cache can hold; got int -1"),
        ({"cache_seqlens": True}, TypeError, "`cache_seqlens` must be an array"),
        (
            TABLE | {"page_table": ints(3, 4)},
            ValueError,
            "`page_table` must be int32 (b, p) with b = 2; got int32 (3, 4)",
        ),
        (TABLE | {"page_table": floats(2, 4)}, TypeError, "`page_table` must be int32 (b, p); got float32 (2, 4)"),
        (
            TABLE | {"cache_batch_idx": ints(2)},
            ValueError,
            "`cache_batch_idx` must be absent where `page_table` says whic",
        ),
        ({"k": floats(2, 1, 2, 8)}, ValueError, "`v` must be given together with the other; got None"),
        ({"v": floats(2, 1, 2, 8)}, ValueError, "`k` must be given together with the other; got None"),
        (
            {"k": floats(2, 1, 2, 8), "v": floats(2, 1, 2, 8)},
            ValueError,
            "`cache_seqlens` must be given with `k`: it says",
        ),
        (APPEND | {"v": floats(2, 2, 2, 8)}, ValueError, "`v` must be float32 (b, new, g, e) with"),
        (
            APPEND | {"k": floats(2, 1, 2, 8, dtype=jnp.bfloat16)},
            TypeError,
            "`k` must be float32 (b, new, g, d); got bflo",
        ),
        (
            APPEND | {"k": floats(2, 17, 2, 8), "v": floats(2, 17, 2, 8)},
            ValueError,
            "`k` must be of at most 16 new keys",
        ),
        (
            APPEND | {"cache_seqlens": 16},
            ValueError,
            "`cache_seqlens` must be in [0, 15], what the cache can hold; got in",
        ),
        (
            {"update_cache": True},
            ValueError,
            "`update_cache` must be False without new keys `k` and `v`; got bool True",
        ),
        (
            APPEND | {"rotary_cos": floats(16, 4)},
            ValueError,
            "`rotary_sin` must be given together with the other; got Non",
        ),
        (
            {"rotary_cos": floats(16, 4), "rotary_sin": floats(16, 4)},
            ValueError,
            "`rotary_cos` must be absent without new",
        ),
        (
            APPEND | {"rotary_cos": floats(16, 5), "rotary_sin": floats(16, 5)},
            ValueError,
            "`rotary_cos` must be (position",
        ),
        (
            APPEND | {"rotary_cos": floats(16, 4), "rotary_sin": floats(16, 3)},
            ValueError,
            "`rotary_sin` must be FLOATS (p",
        ),
        ({"num_splits": -1}, ValueError, "`num_splits` must be at least 0; got int -1"),
        ({"num_splits": 1.5}, TypeError, "`num_splits` must be an int; got float 1.5"),
        (
            {"bias": floats(15)},
            ValueError,
            "`bias` must be a floating point array broadcastable to (b, h, s, t) = (2, 4",
        ),
        (
            {"return_softmax_lse": None},
            TypeError,
            "`return_softmax_lse` must be a bool known when the program is traced",
        ),
        ({"rotary_interleaved": 1}, TypeError, "`rotary_interleaved` must be a bool known when the program is traced"),
    ],
}


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        pytest.param(function, *row, id=f"{function.removeprefix('flash_mha_')}-{i}-{list(row[0])[-1]}")
        for function, rows in MISTAKES.items()
        for i, row in enumerate(rows)
    ],
)
def test_mistake(function, arguments, error, message):
    with pytest.raises(error) as caught:
        getattr(flashjax, function)(**BASE[function] | arguments)
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(f"{function}: `")
    assert "; got " in text
    assert message.replace("FLOATS", "float32 or bfloat16 or float16") in text


@pytest.mark.parametrize("function", BASE)
def test_the_base_of_the_mistakes_is_right(function):
    getattr(flashjax, function)(**BASE[function])
    flashjax.flash_mha_with_kvcache(**APPEND, update_cache=True)
    flashjax.flash_mha_with_kvcache(**CACHED | TABLE)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("softmax_scale", TypeError, "For a learned scale, multiply q by it"),
        ("softcap", TypeError, "`softcap` must be a number known when the program is traced; got a traced value"),
    ],
)
def test_traced_scalar(name, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.jit(lambda x: flashjax.flash_mha(**DENSE, **{name: x}))(0.5)


def test_scalars_of_numpy_and_jax():
    """What is a number is taken as one."""
    random = np.random.default_rng(0)
    q = jnp.asarray(random.standard_normal((1, 4, 1, 8)), F32)
    expected = flashjax.flash_mha(q, q, q, 0.5, False, (1, 2))
    for scale, window in (
        (np.float32(0.5), [np.int64(1), np.int32(2)]),
        (jnp.float32(0.5), (jnp.int32(1), 2)),
        (np.array(0.5), (1, np.uint8(2))),
    ):
        got = flashjax.flash_mha(q, q, q, scale, np.bool_(False), window)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_implementation_of_another_platform():
    other = "cpu" if jax.default_backend() == "gpu" else "cuda"
    with pytest.raises(NotImplementedError, match=f'implementation="{other}" cannot serve'):
        flashjax.flash_mha(**DENSE, implementation=other)


# --------------------------------------------------------------------------------------------------- known at run time


def _random(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), F32)


def _i32(*values):
    return jnp.array(values, I32)


P = {"q": _random(10, 4, 8), "k": _random(10, 2, 8), "v": _random(10, 2, 8), "cu_seqlens_q": _i32(0, 4, 7, 10)}
C = {"q": _random(2, 1, 4, 8), "k_cache": _random(2, 16, 2, 8), "v_cache": _random(2, 16, 2, 8)}
A = C | {"k": _random(2, 2, 2, 8), "v": _random(2, 2, 2, 8), "cache_seqlens": _i32(3, 5)}
T = C | {
    "k_cache": _random(6, 4, 2, 8),
    "v_cache": _random(6, 4, 2, 8),
    "page_table": _i32([0, 1, 2, 3], [5, 4, 3, 2]),
}
RUN_TIME = [
    # id, function, arguments, argument, what the message says of index and value
    ("cu-decreasing", VARLEN, P | {"cu_seqlens_q": _i32(0, 7, 4, 10)}, "cu_seqlens_q", "2] is 4"),
    ("cu-past-the-end", VARLEN, P | {"cu_seqlens_q": _i32(0, 4, 7, 11)}, "cu_seqlens_q", "3] is 11"),
    ("cu-negative", VARLEN, P | {"cu_seqlens_q": _i32(-1, 4, 7, 10)}, "cu_seqlens_q", "0] is -1"),
    ("cu-k-past-the-end", VARLEN, P | {"cu_seqlens_k": _i32(0, 4, 7, 99)}, "cu_seqlens_k", "3] is 99"),
    ("cu-k-decreasing", VARLEN, P | {"cu_seqlens_k": _i32(0, 4, 3, 10)}, "cu_seqlens_k", "2] is 3"),
    ("cu-extreme", VARLEN, P | {"cu_seqlens_q": _i32(-(2**31), 2**31 - 1, -5, 9)}, "cu_seqlens_q", "0] is -2147483648"),
    ("seqused-q-long", VARLEN, P | {"seqused_q": _i32(4, 4, 3)}, "seqused_q", "1] is 4"),
    ("seqused-k-negative", VARLEN, P | {"seqused_k": _i32(4, 3, -2)}, "seqused_k", "2] is -2"),
    ("max-seqlen-q-short", VARLEN, P | {"max_seqlen_q": 3}, "max_seqlen_q", "4"),
    ("max-seqlen-k-short", VARLEN, P | {"max_seqlen_k": 3}, "max_seqlen_k", "4"),
    ("bias-short", VARLEN, P | {"bias": _random(3, 4, 3, 4)}, "bias", "4"),
    ("seqlens-long", CACHE, C | {"cache_seqlens": _i32(3, 17)}, "cache_seqlens", "1] is 17"),
    ("seqlens-negative", CACHE, C | {"cache_seqlens": _i32(-3, 1)}, "cache_seqlens", "0] is -3"),
    ("append-long", CACHE, A | {"cache_seqlens": _i32(3, 15)}, "cache_seqlens", "17"),
    ("append-negative", CACHE, A | {"cache_seqlens": _i32(-1, 5)}, "cache_seqlens", "-1"),
    ("append-wraps", CACHE, A | {"cache_seqlens": _i32(3, 2**31 - 1)}, "cache_seqlens", "2147483647"),
    ("leftpad-negative", CACHE, C | {"cache_leftpad": _i32(0, -4)}, "leftpad", "1] is -4"),
    ("leftpad-long", CACHE, C | {"cache_leftpad": _i32(0, 9), "cache_seqlens": _i32(5, 8)}, "leftpad", "1] is 9"),
    ("page-past-the-end", CACHE, T | {"page_table": _i32([0, 1, 6, 3], [5, 4, 3, 2])}, "page_table", "[0, 2] is 6"),
    ("page-negative", CACHE, T | {"page_table": _i32([0, 1, 2, 3], [-7, 4, 3, 2])}, "page_table", "[1, 0] is -7"),
    ("batch-idx-past-the-end", CACHE, C | {"cache_batch_idx": _i32(0, 2)}, "batch_idx", "1] is 2"),
    ("batch-idx-negative", CACHE, C | {"cache_batch_idx": _i32(-1, 0)}, "batch_idx", "0] is -1"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "argument", "value"), [pytest.param(*row[1:], id=row[0]) for row in RUN_TIME]
)
def test_run_time(function, arguments, argument, value, implementation):
    """On the CPU an error that names argument, index and value; elsewhere a result without NaN."""
    call = getattr(flashjax, function)
    if implementation == "cpu":
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT") as caught:
            jax.block_until_ready(call(**arguments, implementation=implementation))
        assert f"{argument}`" in str(caught.value)
        assert value in str(caught.value)
    else:
        assert np.isfinite(np.asarray(call(**arguments, implementation=implementation))).all()


def test_unused_page_entries_may_be_anything(implementation):
    arguments = T | {"page_table": _i32([0, 1, 2, 99], [5, -1, 2**31 - 1, -(2**31)]), "cache_seqlens": _i32(12, 4)}
    out = flashjax.flash_mha_with_kvcache(**arguments, implementation=implementation)
    good = flashjax.flash_mha_with_kvcache(**T | {"cache_seqlens": _i32(12, 4)}, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(good))


ANY_INT = st.one_of(st.integers(-3, 14), st.sampled_from([-(2**31), 2**31 - 1, 10**6, 2**30]))


def _any(count):
    return st.lists(ANY_INT, min_size=count, max_size=count)


@settings(max_examples=60)
@given(cu_q=_any(4), cu_k=_any(4), used=_any(6))
def test_any_lengths(cu_q, cu_k, used):
    """Whatever the index arrays hold: an error that says so, or finite results and gradients."""
    _error_or_finite(_varlen, jnp.array(cu_q, I32), jnp.array(cu_k, I32), _i32(*used[:3]), _i32(*used[3:]))


@settings(max_examples=60)
@given(lengths=_any(2), pad=_any(2), table=_any(8))
def test_any_pages(lengths, pad, table):
    _error_or_finite(_paged, _i32(*lengths), _i32(*pad), jnp.array(table, I32).reshape(2, 4))


@settings(max_examples=60)
@given(lengths=_any(2), entries=_any(2))
def test_any_entries(lengths, entries):
    _error_or_finite(_entries, _i32(*lengths), _i32(*entries))


@jax.jit
def _varlen(cu_q, cu_k, used_q, used_k):
    def loss(q, k, v):
        out = flashjax.flash_mha_varlen(q, k, v, cu_q, cu_k, seqused_q=used_q, seqused_k=used_k, is_causal=True)
        return (out * out).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(P["q"], P["k"], P["v"])


@jax.jit
def _paged(lengths, pad, table):
    arguments = T | {"k": A["k"], "v": A["v"], "cache_seqlens": lengths, "cache_leftpad": pad, "page_table": table}
    return flashjax.flash_mha_with_kvcache(**arguments, update_cache=True)


@jax.jit
def _entries(lengths, entries):
    return flashjax.flash_mha_with_kvcache(
        **A | {"cache_seqlens": lengths, "cache_batch_idx": entries}, update_cache=True
    )


def _error_or_finite(call, *arguments):
    try:
        results = jax.block_until_ready(call(*arguments))
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jit's fast path turns every status into a ValueError
        assert "INVALID_ARGUMENT" in str(error)  # noqa: PT017
        assert jax.default_backend() == "cpu"
        return
    for x in jax.tree.leaves(results):
        assert np.isfinite(np.asarray(x)).all()


# ------------------------------------------------------------------------------------------------ beside the Python API


def test_handlers_survive_wrong_calls(tmp_path):
    """An exported program may be of another version: handlers refuse wrong calls, and the process lives on."""
    script = """
    import json, itertools
    import jax, jax.numpy as jnp, numpy as np
    import flashjax
    from flashjax import _ffi
    from flashjax._slots import BIT, SLOTS

    scalars = dict(scale=np.float32(1), softcap=np.float32(0), window_left=np.int64(-1), window_right=np.int64(-1),
        top_left=False, max_seqlen_q=np.int64(-1), max_seqlen_k=np.int64(-1), deterministic=False,
        num_splits=np.int64(0), yields=False, part=False, out_only=False, dropout_keep=np.int64(256),
        shared_e=np.int64(0), upstream=False)
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
    good = {"q": q, "k": k, "v": k}
    S = jax.ShapeDtypeStruct
    results = [S(q.shape, jnp.float32), S((2, 4, 3), jnp.float32)]
    answers = {}

    def call(name, arrays=good, target="flashjax_fwd", results=results, present=None, scalars=scalars, wanted=0):
        if present is None:
            present = sum(BIT[x] for x in arrays)
        try:
            jax.block_until_ready(jax.ffi.ffi_call(target, results)(
                *arrays.values(), present=np.int64(present), wanted=np.int64(wanted), **scalars))
            answers[name] = "ok"
        except jax.errors.JaxRuntimeError as error:
            known = any(x in str(error) for x in ("INVALID_ARGUMENT", "Unexpected attribute", "scalar data type"))
            answers[name] = "error" if known else str(error)

    call("good")
    call("too few arguments", present=BIT["q"] | BIT["k"] | BIT["v"] | BIT["bias"])
    call("too many arguments", present=BIT["q"] | BIT["k"])
    call("unknown slot", present=BIT["q"] | BIT["k"] | 1 << 40)
    call("all slots", present=-1)
    call("rank", good | {"q": q[0]})
    call("dtype of q", good | {"q": q.astype(jnp.int32)})
    call("dtype of k", good | {"k": k.astype(jnp.bfloat16)})
    call("batch", good | {"k": k[:1], "v": k[:1]})
    call("keys", good | {"v": k[:, :3]})
    call("heads", good | {"k": k[:, :, [0, 0, 0]], "v": k[:, :, [0, 0, 0]]})
    call("no heads", good | {"k": k[:, :, :0], "v": k[:, :, :0]})
    call("values twice", scalars=scalars | {"shared_e": np.int64(8)})
    if jax.default_backend() == "cpu":  # no kernel of a GPU serves float32 so
        call("values in the keys", {"q": q, "k": k}, scalars=scalars | {"shared_e": np.int64(8)})
    call("small out", results=[S((2, 3, 4, 7), jnp.float32), results[1]])
    call("small lse", results=[results[0], S((2, 4, 2), jnp.float32)])
    call("dtype of out", results=[S(q.shape, jnp.bfloat16), results[1]])
    call("one result", results=results[:1])
    call("many results", results=results + results)
    call("segments of one side", good | {"segment_ids_q": jnp.zeros((2, 3), jnp.int32)})
    call("bias rows", good | {"bias": jnp.zeros((1, 1, 1, 2, 5))})
    call("bias columns", good | {"bias": jnp.zeros((1, 1, 1, 3, 4))})
    call("bias dtype", good | {"bias": jnp.zeros((1, 1, 1, 3, 5), jnp.float16)})
    call("sinks", good | {"sinks": jnp.zeros((1, 3))})
    call("sinks dtype", good | {"sinks": jnp.zeros((1, 4), jnp.bfloat16)})
    call("cu_seqlens rows", good | {"cu_seqlens_q": jnp.zeros((1, 3), jnp.int32)})
    call("cu_seqlens empty", good | {"cu_seqlens_q": jnp.zeros((2, 0), jnp.int32)})
    seed = {"dropout_seed": jnp.zeros((2, 4, 2), jnp.int32)}
    call("words of a seed", good | {"dropout_seed": jnp.zeros((2, 4, 1), jnp.int32)})
    call("heads of a seed", good | {"dropout_seed": jnp.zeros((2, 3, 2), jnp.int32)})
    call("nothing kept", good | seed, scalars=scalars | {"dropout_keep": np.int64(0)})
    call("too much kept", good | seed, scalars=scalars | {"dropout_keep": np.int64(257)})
    call("seqused", good | {"seqused_k": jnp.zeros((2, 2), jnp.int32)})
    call("page table of another batch", good | {"page_table": jnp.zeros((3, 2), jnp.int32)})
    call("attribute missing", scalars={x: y for x, y in scalars.items() if x != "softcap"})
    call("attribute type", scalars=scalars | {"scale": np.float64(0.3)})
    back = [S(q.shape, jnp.float32), S(k.shape, jnp.float32), S(k.shape, jnp.float32)]
    full = good | {"out": q, "lse": jnp.zeros((2, 4, 3)), "dout": q, "dlse": jnp.zeros((2, 4, 3))}
    call("good backward", full, "flashjax_bwd", back)
    call("no out", good, "flashjax_bwd", back)
    call("short lse", full | {"lse": jnp.zeros((2, 4, 2))}, "flashjax_bwd", back)
    call("gradient of an absent bias", full, "flashjax_bwd", back, wanted=BIT["bias"])
    bias = {"bias": jnp.zeros((2, 1, 4, 3, 8))}  # more columns than there are keys: never read
    call("good bias", good | bias)
    narrow = {x: y if x in ("lse", "dlse") else y.astype(jnp.bfloat16) for x, y in (good | bias | full).items()}
    halves = [S(x.shape, jnp.bfloat16) for x in (*back, bias["bias"])]
    if jax.default_backend() == "cpu":
        call("gradient of a bias in 16 bits", narrow, "flashjax_bwd", halves, wanted=BIT["bias"])
    call("small dk", full, "flashjax_bwd", [back[0], S((2, 4, 2, 8), jnp.float32), back[2]])
    print(json.dumps(answers))
    """
    path = tmp_path / "calls.py"
    path.write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(answers.pop(name) == "ok" for name in ("good", "good backward", "good bias"))
    wrong = {name: answer for name, answer in answers.items() if answer != "error"}
    assert not wrong


def test_import_refuses_an_older_runtime(monkeypatch):
    """A module built for a newer FFI says so at import, before it takes the backend down."""
    from flashjax import _ffi

    monkeypatch.setattr(_ffi, "runtime_ffi_api", lambda: (0, 0))
    with pytest.raises(ImportError, match="was built for XLA FFI"):
        _ffi.register("cuda" if jax.default_backend() == "gpu" else "cpu")
