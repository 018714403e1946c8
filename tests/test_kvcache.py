"""Every cached case by every implementation, the append, and the cache as a functional value."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax
import oracle
from cases import BY_ID, CASES, Case
from conftest import ON_GPU
from harness import function, to_device

CACHED = [case for case in CASES if case.layout == "cached"]
if ON_GPU:  # where 16 bits have kernels of their own, with every head dim that is a multiple of 8
    CACHED += [
        dataclasses.replace(case, id=f"{case.id}-in-bfloat16", dtype="bfloat16")
        for case in CACHED
        if case.dtype == "float32"
    ]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CACHED])
def test_cached(case, implementation):
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    call = function(case, inputs, implementation, **({"update_cache": True} if case.new else {}))
    results = call(arrays)
    assert len(results) == (4 if case.new else 2)
    assert [x.dtype.name for x in results] == [case.dtype, "float32", case.dtype, case.dtype][: len(results)]
    oracle.check(case, inputs, results)
    for x, y in zip(results, call(arrays), strict=True):
        oracle.same_bits(x, y, "a second call")
    for name in ("k_cache", "v_cache"):
        oracle.same_bits(arrays[name], inputs.arrays[name], "the caller's cache")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"return_softmax_lse": True}, 2),
        ({"update_cache": True}, 3),
        ({"return_softmax_lse": True, "update_cache": True}, 4),
    ],
)
def test_results(options, count):
    inputs = BY_ID["cached-append-one"].build()
    results = flashjax.flash_mha_with_kvcache(**to_device(inputs.arrays), **inputs.options, **options)
    shapes = [(2, 1, 4, 16), (2, 4, 1), (2, 64, 2, 16), (2, 64, 2, 16)]
    kept = {1: [0], 2: [0, 1], 3: [0, 2, 3], 4: [0, 1, 2, 3]}[count]
    assert jax.tree.map(jnp.shape, results) == (shapes[0] if count == 1 else tuple(shapes[i] for i in kept))


@pytest.mark.parametrize("num_splits", [1, 2, 7, 100])
def test_splits_agree(num_splits, implementation):
    case = BY_ID["cached-splits"]
    inputs = case.build()
    oracle.check(case, inputs, function(case, inputs, implementation, num_splits=num_splits)(to_device(inputs.arrays)))


def test_length_int_or_array(implementation):
    case = BY_ID["cached-append-scalar"]
    inputs = case.build()
    call = functools.partial(flashjax.flash_mha_with_kvcache, implementation=implementation)
    arrays = to_device(inputs.arrays)
    results = [call(**arrays | {"cache_seqlens": x}) for x in (30, jnp.int32(30), jnp.full((2,), 30, jnp.int32))]
    for other in results[1:]:
        np.testing.assert_array_equal(np.asarray(results[0]), np.asarray(other))


# ------------------------------------------------------------------------------------------------------------ decode


def _decode_case(**options) -> Case:
    """What a decode loop must add up to: one causal prefill of all tokens."""
    return Case("decode", "the whole sequence at once", s=21, t=21, h=4, g=2, d=16, causal=True, **options)


@pytest.mark.parametrize("page", [0, 1, 4, 5])
@pytest.mark.parametrize("rotary", [False, True])
def test_decode_loop(page, rotary, implementation):
    """Prefill, then one token after the other in lax.scan, with the cache as carry: equal to one causal call."""
    prompt, b = 6, 2
    case = _decode_case(b=b)
    inputs = case.build()
    q, k, v = (jnp.asarray(inputs.arrays[name]) for name in "qkv")
    t = case.t
    extra = {}
    if rotary:
        turns = np.arange(t)[:, None] * 10.0 ** -np.linspace(0, 2, case.d // 2)
        extra = {"rotary_cos": jnp.asarray(np.cos(turns), q.dtype), "rotary_sin": jnp.asarray(np.sin(turns), q.dtype)}
    if page:
        per_row = -(-t // page)
        table = np.random.default_rng(3).permutation(b * per_row + 2)[: b * per_row].reshape(b, per_row)
        extra["page_table"] = jnp.asarray(table, jnp.int32)
        shape = (b * per_row + 2, page, case.g, case.d)
    else:
        shape = (b, t + 3, case.g, case.d)
    call = functools.partial(
        flashjax.flash_mha_with_kvcache, is_causal=True, update_cache=True, implementation=implementation, **extra
    )

    @jax.jit
    def decode(q, k, v):
        k_cache, v_cache = jnp.full(shape, jnp.nan, q.dtype), jnp.full(shape, jnp.nan, q.dtype)
        first, k_cache, v_cache = call(
            q[:, :prompt], k_cache, v_cache, k[:, :prompt], v[:, :prompt], cache_seqlens=jnp.zeros(b, jnp.int32)
        )

        def step(carry, i):
            k_cache, v_cache = carry
            now = [jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in (q, k, v)]
            out, k_cache, v_cache = call(now[0], k_cache, v_cache, now[1], now[2], cache_seqlens=jnp.full(b, i))
            return (k_cache, v_cache), out[:, 0]

        _, rest = jax.lax.scan(step, (k_cache, v_cache), jnp.arange(prompt, t, dtype=jnp.int32))
        return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)

    got = decode(q, k, v)
    if rotary:
        whole = Case("whole", "", layout="cached", b=b, s=t, t=t, h=4, g=2, d=16, causal=True, new=t, rotary=16)
        arrays = {
            **inputs.arrays,
            "k_cache": np.zeros((b, t, 2, 16), np.float32),
            "v_cache": np.zeros((b, t, 2, 16), np.float32),
            "cache_seqlens": np.zeros(b, np.int32),
            **{name: np.asarray(extra[name]) for name in ("rotary_cos", "rotary_sin")},
        }
        case, inputs = whole, type(inputs)(arrays, inputs.options)
    oracle.check(case, inputs, (got,))


# ------------------------------------------------------------------------------------------------- functional update


def _big():
    """A cache far larger than everything else, so that a copy of it stands out."""
    b, t, g, d = 2, 4096, 2, 32
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((b, 1, g, d)), jnp.float32) for _ in range(3))
    caches = [jnp.asarray(random.standard_normal((b, t, g, d)), jnp.float32) for _ in range(2)]
    return q, k, v, caches, jnp.array([5, 4000], jnp.int32)


def _append(implementation, q, k_cache, v_cache, k, v, lengths, **extra):
    return flashjax.flash_mha_with_kvcache(
        q, k_cache, v_cache, k, v, lengths, update_cache=True, implementation=implementation, **extra
    )


def _copies(text: str, elements: int) -> list[str]:
    """Instructions of compiled HLO that write a whole array of that size without computing anything."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= f32\[([\d,]+)\]\S* (copy|copy-start|broadcast|pad|concatenate|transpose)\(", line)
        if match and np.prod([int(x) for x in match[1].split(",")]) >= elements:
            found.append(line.strip())
    return found


def test_donated_cache_is_not_copied(compiled):
    q, k, v, caches, lengths = _big()
    call = jax.jit(functools.partial(_append, compiled), donate_argnums=(1, 2))
    executable = call.lower(q, *caches, k, v, lengths).compile()
    text = executable.as_text()
    header = text.splitlines()[0]
    assert re.search(r"input_output_alias=\{.*\{1\}: \(1,.*\{2\}: \(2,", header), header
    assert not _copies(text, caches[0].size)
    where = [x.unsafe_buffer_pointer() for x in caches]
    results = executable(q, *caches, k, v, lengths)
    assert all(x.is_deleted() for x in caches)
    assert [x.unsafe_buffer_pointer() for x in results[1:]] == where
    np.testing.assert_array_equal(np.asarray(results[1])[[0, 1], [5, 4000]], np.asarray(k)[:, 0])


def test_kept_cache_is_copied_once(compiled):
    """Without donation the input stays as it was, and the results are those of the donated call."""
    q, k, v, caches, lengths = _big()
    before = [np.asarray(x).copy() for x in caches]
    kept = jax.jit(functools.partial(_append, compiled))(q, *caches, k, v, lengths)
    for x, y in zip(caches, before, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)
    donated = jax.jit(functools.partial(_append, compiled), donate_argnums=(1, 2))(q, *caches, k, v, lengths)
    for x, y in zip(kept, donated, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("paged", [False, True])
def test_scan_does_not_copy_the_cache(paged, compiled):
    q, k, v, caches, lengths = _big()
    extra = {}
    if paged:
        caches = [x.reshape(512, 16, 2, 32) for x in caches]
        extra = {"page_table": jnp.arange(512, dtype=jnp.int32).reshape(2, 256)}

    def decode(q, k_cache, v_cache, k, v, lengths):
        def step(carry, _):
            k_cache, v_cache, lengths = carry
            out, k_cache, v_cache = _append(compiled, q, k_cache, v_cache, k, v, lengths, **extra)
            return (k_cache, v_cache, lengths + 1), out

        return jax.lax.scan(step, (k_cache, v_cache, lengths), None, length=4)

    text = jax.jit(decode, donate_argnums=(1, 2)).lower(q, *caches, k, v, lengths).compile().as_text()
    assert not _copies(text, caches[0].size)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("donated", [True, False])
def test_memory_of_an_append(donated, paged, compiled):
    """What a compiled step takes beside its arguments, caches of 2 GiB or more: nothing of their size, if donated."""
    b, t, g, d = 64, 16384, 8, 128
    held = jnp.bfloat16 if ON_GPU else jnp.float32  # in which older XLAs append on a CPU, whatever the cache holds

    def struct(*shape, dtype=held):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, new = struct(b, 1, 4 * g, d), struct(b, 1, g, d)
    cache = struct(b * t // 64, 64, g, d) if paged else struct(b, t, g, d)
    table = {"page_table": struct(b, t // 64, dtype=jnp.int32)} if paged else {}
    cos = struct(t, d // 2)

    def step(q, k_cache, v_cache, k, v, lengths, cos, table):
        return _append(compiled, q, k_cache, v_cache, k, v, lengths, rotary_cos=cos, rotary_sin=cos, **table)

    call = jax.jit(step, donate_argnums=(1, 2) if donated else ())
    executable = call.lower(q, cache, cache, new, new, struct(b, dtype=jnp.int32), cos, table).compile()
    memory = executable.memory_analysis()
    size = 2 * cache.size * held.dtype.itemsize
    assert memory.alias_size_in_bytes == (size if donated else 0)
    assert memory.output_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 16


def test_without_update_the_cache_is_not_returned(implementation):
    """The new keys take part though nobody asked for the cache."""
    case = BY_ID["cached-append-chunk"]
    inputs = case.build()
    out, lse = function(case, inputs, implementation)(to_device(inputs.arrays))
    oracle.check(case, inputs, (out, lse))


def test_append_past_the_capacity(implementation):
    """Python knows an int; an array's overrun is an error on the CPU, and never a write elsewhere."""
    case = BY_ID["cached-append-fill"]
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    with pytest.raises(ValueError, match="`cache_seqlens` must be in"):
        flashjax.flash_mha_with_kvcache(**arrays | {"cache_seqlens": 61})
    over = arrays | {"cache_seqlens": jnp.array([62, 3], jnp.int32)}
    call = function(case, inputs, implementation, update_cache=True)
    if implementation == "cpu":
        with pytest.raises(jax.errors.JaxRuntimeError, match="66"):
            jax.block_until_ready(call(over))
    else:
        k_cache = np.asarray(call(over)[2])
        np.testing.assert_array_equal(k_cache[0, 62:], inputs.arrays["k"][0, :2])
        np.testing.assert_array_equal(k_cache[1, :3], inputs.arrays["k_cache"][1, :3])
        np.testing.assert_array_equal(k_cache[1, 7:], inputs.arrays["k_cache"][1, 7:])


def test_query_gradient(implementation):
    """The cached function is differentiable in q and in the new keys and values (contiguous caches)."""
    case = Case("cached-gradient", "", layout="cached", s=3, t=40, new=3, lengths=(5, 20), causal=True, h=4, g=2, d=16)
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    arrays = {name: jnp.nan_to_num(x) if name.endswith("cache") else x for name, x in arrays.items()}

    def loss(q, k, v, implementation):
        rest = {name: x for name, x in arrays.items() if name not in ("q", "k", "v")}
        out = flashjax.flash_mha_with_kvcache(q, k=k, v=v, is_causal=True, implementation=implementation, **rest)
        return (jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)).sum()

    operands = tuple(arrays[name] for name in "qkv")
    grads = jax.grad(loss, argnums=(0, 1, 2))(*operands, implementation)
    step = 1e-2
    random = np.random.default_rng(1)
    for i, (x, grad) in enumerate(zip(operands, grads, strict=True)):
        direction = jnp.asarray(random.standard_normal(x.shape), x.dtype)
        ends = [loss(*operands[:i], x + sign * step * direction, *operands[i + 1 :], "reference") for sign in (1, -1)]
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float((grad * direction).sum()), rel=2e-2)


@pytest.mark.parametrize("mapped", ["all", "new and lengths", "cache and pages"])
def test_vmap_of_append_and_gradients(mapped, random):
    """Rotary embedding, append, paged attention and their gradients, for each element of a mapped axis."""
    n, b, s, pages, page, p = 3, 2, 2, 10, 4, 3

    def floats(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    cos, sin = floats(20, 3), floats(20, 3)
    values = {
        "q": floats(n, b, s, 4, 8),
        "k_cache": floats(n, pages, page, 2, 8),
        "v_cache": floats(n, pages, page, 2, 8),
        "k": floats(n, b, s, 2, 8),
        "v": floats(n, b, s, 2, 8),
        "cache_seqlens": jnp.asarray(random.integers(0, page * p - s, (n, b)), jnp.int32),
        "page_table": jnp.asarray([random.permutation(pages)[: b * p].reshape(b, p) for _ in range(n)], jnp.int32),
    }
    some = {
        "new and lengths": ("q", "k", "v", "cache_seqlens"),
        "cache and pages": ("k_cache", "v_cache", "page_table"),
    }
    axes = {name: 0 if name in some.get(mapped, values) else None for name in values}
    arguments = {name: x if axes[name] == 0 else x[0] for name, x in values.items()}

    def call(arguments):
        return flashjax.flash_mha_with_kvcache(
            **arguments, rotary_cos=cos, rotary_sin=sin, is_causal=True, return_softmax_lse=True, update_cache=True
        )

    def gradients(arguments):
        floating = {name: arguments.pop(name) for name in ("q", "k_cache", "v_cache", "k", "v")}
        return jax.grad(lambda x: sum((y**2).sum() for y in call(x | arguments)[:2]))(floating)

    def both(arguments):
        return call(dict(arguments)), gradients(dict(arguments))

    together = jax.vmap(both, in_axes=(axes,))(arguments)
    alone = [both({name: x[i] if axes[name] == 0 else x for name, x in arguments.items()}) for i in range(n)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *alone)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), together, stacked)
