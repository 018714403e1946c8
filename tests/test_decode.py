"""Few queries against long caches, in 16 bits: what GPUs have kernels of their own for.

Lengths, pages and groups are such that tiles of 64 and 128 keys are cut in every way, and several blocks have a head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax
import oracle
from cases import Case
from conftest import ON_GPU
from harness import function, to_device

RAGGED = (0, 1, 63, 64, 65, 127, 128, 129, 300, 512)


def _cases():
    def case(name, reason, **options):
        options = {
            "b": 10,
            "s": 1,
            "t": 512,
            "h": 8,
            "g": 2,
            "d": 128,
            "dtype": "bfloat16",
            "lengths": RAGGED,
        } | options
        return Case(f"decode-{name}", reason, layout="cached", **options)

    for d in (64, 80, 128, 136, 256):
        for dtype in ("bfloat16", "float16"):
            yield case(f"d{d}-{dtype}", "each width of the kernels, full and zero-filled", d=d, dtype=dtype)
    yield case("values-narrow", "e < d", d=128, e=72)
    yield case("values-wide", "e > d: the row of the wider", d=64, e=128)
    for d in (64, 128, 256):
        yield case(f"causal-4-d{d}", "speculative decoding", d=d, s=4, causal=True)
        yield case(f"two-groups-d{d}", "more than 64 rows of a key head", d=d, s=16, h=16, causal=True)
    yield case("many-rows", "several blocks of 128 rows, the last not full", s=60, h=12, causal=True)
    yield case("odd-group", "a group that does not divide a block of rows", s=5, h=21, g=3, causal=True)
    yield case("mqa", "more heads in a group than rows in a block", h=150, g=1)
    yield case("mqa-3", "blocks of heads and of queries", h=150, g=1, s=3, causal=True)
    yield case("one-long", "a head in all blocks at a time", b=1, t=20000, lengths=(19999,))
    yield case("one-long-4", "the same with a mask", b=1, t=20000, lengths=(19001,), s=4, causal=True)
    yield case(
        "one-short", "clusters of which most CTAs have no tile", b=3, t=20000, lengths=(5, 130, 0), s=2, causal=True
    )
    yield case(
        "few-ragged", "clusters that end within heads", b=3, t=9000, lengths=(9000, 333, 4097), g=4, s=4, causal=True
    )
    yield case(
        "many-sequences", "more sequences than the prefix sum has entries", b=600, t=64, lengths=(0, 5, 64) * 200
    )
    lengths = tuple(int(x) for x in np.random.default_rng(0).integers(2000, 3001, 120))
    yield case("drawn", "enough for shares that are drawn", b=120, t=3000, lengths=lengths, d=64, s=2, h=4)
    for page in (16, 64, 128, 256, 48, 5, 1):
        t = page * -(-600 // page)
        yield case(f"page-{page}", "boxes of pages", t=t, page=page, lengths=(*RAGGED[:-1], t), s=2, causal=True)
    yield case("page-16-d64", "boxes of pages in tiles of 128", page=16, d=64)
    for d in (64, 128, 256):
        yield case(f"page-64-prefill-d{d}", "many queries against pages, some sequences shorter", s=130, page=64, d=d,
                   causal=True)  # fmt: skip
    yield case("page-16-prefill", "more queries than keys", s=700, page=16, h=2, g=1, causal=True, window=(200, 0))
    for name, reason, options in (
        ("page-16", "boxes of pages", {"page": 16}),
        ("page-64-f16", "the other type", {"page": 64, "dtype": "float16"}),
        ("page-128", "a box a tile", {"page": 128}),
        ("page-256", "boxes of a part of a page", {"page": 256}),
        ("page-48", "pages that begin within tiles", {"page": 48}),
        ("page-5", "boxes too small for tiles of many queries", {"page": 5}),
        ("page-16-d256", "boxes of pages in tiles of 80", {"page": 16, "d": 256}),
        ("page-80-d256", "a box a tile of 80", {"page": 80, "d": 256}),
        ("page-32-d80", "zero-filled", {"page": 32, "d": 80}),
        ("page-16-d64", "zero-filled", {"page": 16, "d": 40}),
        ("values-narrow", "e < d", {"page": 16, "e": 72}),
        ("full", "no mask", {"page": 64, "causal": False}),
        ("window", "tiles before the window are not read", {"page": 16, "window": (100, 3)}),
        ("top-left", "the diagonal starts at the first key", {"page": 16, "alignment": "top_left"}),
        ("sinks", "a term of the denominator", {"page": 64, "sinks": "normal"}),
        ("leftpad", "NaN before the first key", {"page": 64, "leftpad": (0, 0, 5, 63, 2, 65, 127, 100, 299, 7)}),
        ("softcap", "bent scores", {"page": 64, "softcap": 5.0}),
        ("alibi-softcap-d64", "both", {"page": 16, "softcap": 8.0, "alibi": "b h", "d": 64}),
        ("alibi-d256", "distances from the diagonal", {"page": 64, "alibi": "h", "d": 256}),
        ("scale-negative", "the greatest score is of the least product", {"page": 32, "scale": -0.1}),
        ("large", "scores of a hundred: references move", {"page": 32, "q_gain": 40.0}),
        ("odd-group", "a group of seven", {"page": 32, "h": 21, "g": 3}),
    ):
        t = options["page"] * -(-700 // options["page"])
        yield case(f"prefill-{name}", f"many queries: {reason}", **{"s": 150, "t": t, "causal": True,
                   "lengths": (*RAGGED[:-1], t)} | options)  # fmt: skip
    yield case("prefill-append", "many new keys into pages", s=140, new=140, causal=True, page=16, t=704, rotary=32,
               lengths=(0, 1, 63, 64, 65, 127, 128, 129, 300, 564))  # fmt: skip
    yield case("page-2-d64", "more boxes in a tile than lanes", page=2, d=64)
    yield case("window", "blocks before the window are not read", s=3, window=(70, 0))
    yield case("window-right", "a window that looks ahead", s=8, window=(130, 3))
    yield case("window-page", "a window within pages", s=2, window=(100, 0), page=16)
    yield case("top-left", "the diagonal starts at the first key", s=9, causal=True, alignment="top_left")
    yield case("softcap", "bent scores", softcap=5.0, s=2, causal=True)
    yield case("alibi", "distances from the diagonal", alibi="b h", s=3, causal=True)
    yield case("alibi-softcap-64", "both, in tiles of 128", alibi="h", softcap=8.0, d=64, s=2)
    yield case("scale-negative", "the greatest score is of the least product", scale=-0.1)
    yield case("sinks", "a term of the denominator, whole heads and shared ones", sinks="normal", s=4)
    yield case("sinks-long", "the same over many parts", sinks="high", b=1, t=20000, lengths=(19999,))
    yield case("leftpad", "NaN before the first key", leftpad=(0, 1, 5, 63, 64, 65, 127, 100, 299, 7), s=3, causal=True)
    yield case("leftpad-page", "within pages", leftpad=(0, 0, 5, 63, 2, 65, 127, 100, 299, 7), page=16, s=2)
    yield case("batch-idx", "entries in any order", batch_idx=(3, 3, 0, 11, 10, 1, 2, 5, 4, 7), lengths=(512,) * 10)
    yield case("append", "new keys, rotated", new=2, s=2, causal=True, rotary=64, lengths=(*RAGGED[:-1], 510))
    yield case("append-page", "new keys into pages", new=4, s=4, causal=True, page=16, rotary=32, interleaved=False,
               lengths=(*RAGGED[:-1], 508))  # fmt: skip
    yield case("append-leftpad", "new keys after padding", new=1, leftpad=(0, 1, 5, 63, 64, 65, 127, 100, 299, 7),
               lengths=(*RAGGED[:-1], 511), rotary=128)  # fmt: skip
    yield case("append-batch-idx", "new keys of other entries", new=1, batch_idx=(3, 8, 0, 11, 10, 1, 2, 5, 4, 7),
               lengths=(*RAGGED[:-1], 511), rotary=128, interleaved=False)  # fmt: skip
    yield case("large", "scores of a hundred", q_gain=40.0, s=4, causal=True)


DECODE = list(_cases())
BY_ID = {case.id: case for case in DECODE}
FEW = ("decode-causal-4-d64", "decode-page-5", "decode-append-page", "decode-batch-idx")  # elsewhere test_kvcache.py


def run(case, inputs, implementation, **options):
    return function(case, inputs, implementation, **options)(to_device(inputs.arrays))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in DECODE if ON_GPU or case.id in FEW])
def test_decode(case, implementation):
    inputs = case.build()
    more = {"update_cache": True} if case.new else {}
    results = run(case, inputs, implementation, **more)
    oracle.check(case, inputs, results)
    for x, y in zip(results, run(case, inputs, implementation, **more), strict=True):
        oracle.same_bits(x, y, "a second call")


def _latent_cases():
    def case(name, reason, **options):
        options = {"b": 10, "s": 1, "t": 512, "h": 128, "dtype": "bfloat16", "lengths": RAGGED} | options
        return Case(f"latent-{name}", reason, layout="cached", g=1, d=576, e=512, scale=192**-0.5, **options)

    short = {"b": 3, "s": 2, "t": 96, "h": 16, "lengths": (0, 33, 96), "causal": True}
    yield case("short", "few rows", **short)
    yield case("short-page", "keys in pages", page=16, **short)
    yield case("short-append", "new keys", new=2, **short | {"lengths": (0, 33, 94)})
    if not ON_GPU:
        return
    yield case("128", "two blocks of 64 heads share the keys")
    yield case("128-f16", "the other type", dtype="float16")
    yield case("64", "one block", h=64)
    yield case("21", "a block that is not full", h=21, s=4, causal=True)
    yield case("odd", "an odd number of blocks", h=96, s=3, causal=True)
    yield case("80", "blocks of heads that are not full", h=80, s=2)
    yield case("long", "a head in all blocks at a time", b=1, t=9000, lengths=(8999,), h=16, s=5, causal=True)
    yield case("many", "several heads to a cluster", b=200, t=300, lengths=(0, 5, 64, 129, 300) * 40, h=70)
    for page in (1, 5, 16, 48, 64, 256):
        t = page * -(-600 // page)
        yield case(f"page-{page}", "boxes of pages", t=t, page=page, lengths=(*RAGGED[:-1], t), s=2, causal=True)
    yield case("page-16-64", "boxes of one block", page=16, h=32, s=2)
    yield case("window", "keys before the window are not read", s=3, window=(70, 0))
    yield case("scores", "bent scores", softcap=5.0, alibi="h", s=2, causal=True, h=64)
    yield case("sinks", "a term of the denominator", sinks="normal", s=2)
    yield case("leftpad", "NaN before the first key", leftpad=(0, 1, 5, 63, 64, 65, 127, 100, 299, 7), causal=True)
    yield case("batch-idx", "entries in any order", batch_idx=(3, 3, 0, 11, 10, 1, 2, 5, 4, 7), lengths=(512,) * 10)
    yield case("large", "scores of a hundred: the reference moves", q_gain=40.0, s=2)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in _latent_cases()])
def test_latent(case):
    """Absorbed multi-head latent attention: one key head of 576, whose first 512 features are the values."""
    inputs = case.build()
    values = {f"v{x}": inputs.arrays[f"k{x}"][..., :512] for x in ("", "_cache") if f"k{x}" in inputs.arrays}
    inputs = dataclasses.replace(inputs, arrays=inputs.arrays | values)
    arrays = {name: x for name, x in inputs.arrays.items() if name not in values} | {"v_cache": None}
    more = {"update_cache": True} if case.new else {}
    call = functools.partial(
        flashjax.flash_mha_with_kvcache, value_dim=512, return_softmax_lse=True, **more, **inputs.options
    )
    device = to_device(arrays)
    if ON_GPU:
        (support,) = flashjax.support(call, **device)
        assert support.runs == "cuda", support
    run = jax.jit(lambda arrays: call(**arrays))
    out, lse, *caches = run(device)
    oracle.check(case, inputs, [out, lse, *(x for cache in caches for x in (cache, cache[..., :512]))])
    for x, y in zip((out, lse), run(device)[:2], strict=True):
        oracle.same_bits(x, y, "a second call")


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("num_splits", [1, 3, 1000])
def test_latent_splits(num_splits):
    case = next(case for case in _latent_cases() if case.id == "latent-odd")
    lengths = (0, 1, 1500, 127, 128, 129, 700, 1000, 1280, 1281)
    case = dataclasses.replace(case, h=24, s=5, t=1500, lengths=lengths)  # few heads, which the oracle repeats keys for
    inputs = case.build()
    inputs = dataclasses.replace(inputs, arrays=inputs.arrays | {"v_cache": inputs.arrays["k_cache"][..., :512]})
    options = inputs.options | {"num_splits": num_splits, "return_softmax_lse": True, "value_dim": 512}
    results = flashjax.flash_mha_with_kvcache(**to_device(inputs.arrays) | {"v_cache": None}, **options)
    oracle.check(case, inputs, results)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("h", [16, 128])
def test_latent_bad_values(h):
    """Pages that do not exist and lengths past the capacity, against the reference."""
    case = next(case for case in _latent_cases() if case.id == "latent-page-16")
    case = dataclasses.replace(case, h=h, lengths=(case.t,) * case.b)
    inputs = case.build()
    arrays = dict(inputs.arrays) | {"v_cache": None}
    arrays["k_cache"] = np.random.default_rng(1).standard_normal(arrays["k_cache"].shape).astype(arrays["q"].dtype)
    arrays["cache_seqlens"] = np.array([case.t, -1, case.t + 1, 2**31 - 1, -(2**31), *[case.t] * 5], np.int32)
    table = arrays["page_table"] = arrays["page_table"].copy()
    table[5:, ::3] = np.array([-1, 2**31 - 1, -(2**31), len(arrays["k_cache"]), 10**6])[:, None]
    table[6] = -7
    call = functools.partial(flashjax.flash_mha_with_kvcache, value_dim=512, return_softmax_lse=True, **inputs.options)
    got, want = (call(**to_device(arrays), implementation=x) for x in ("cuda", "reference"))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=2e-2, atol=1e-2)


def test_latent_values_are_not_copied():
    """A cache of values of their own would be as large as that of the keys: where a kernel serves there is none."""
    q, cache = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((2, 1, 16, 576), (2, 256, 1, 576)))
    call = jax.jit(lambda q, cache: flashjax.flash_mha_with_kvcache(q, cache, None, value_dim=512))
    if not ON_GPU:
        with pytest.raises(ValueError, match="`value_dim` must be at most d = 576; got int 600"):
            flashjax.flash_mha_with_kvcache(*(jnp.zeros(x.shape, x.dtype) for x in (q, cache)), None, value_dim=600)
        with pytest.raises(ValueError, match="`v_cache` must be None where `value_dim` says"):
            flashjax.flash_mha_with_kvcache(*(jnp.zeros(x.shape, x.dtype) for x in (q, cache, cache)), value_dim=512)
        return
    assert "bf16[2,256,1,512]" not in call.lower(q, cache).compile().as_text()


@pytest.mark.parametrize("num_splits", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "name", ["decode-page-16", "decode-sinks", "decode-many-rows"] if ON_GPU else ["decode-page-5"]
)
def test_splits(name, num_splits, implementation):
    """Parts that were asked for: the same result, and the same bits each time."""
    case = BY_ID[name]
    inputs = case.build()
    results = run(case, inputs, implementation, num_splits=num_splits)
    oracle.check(case, inputs, results)
    for x, y in zip(results, run(case, inputs, implementation, num_splits=num_splits), strict=True):
        oracle.same_bits(x, y, "a second call")


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="CPU kernels check ids and lengths on the host")
@pytest.mark.parametrize(
    ("page", "s", "d"), [(0, 4, 128), (16, 4, 128), (5, 4, 128), (16, 130, 128), (64, 130, 64), (16, 130, 256)]
)
def test_bad_values_are_skipped(page, s, d, implementation):
    """Ids that name no page, entries that do not exist and lengths past the capacity: their keys do not take part."""
    t = 512 - 512 % (page or 1)
    case = dataclasses.replace(BY_ID["decode-causal-4-d128"], s=s, d=d, t=t, page=page, lengths=(t,) * 10)
    case = dataclasses.replace(case, batch_idx=None if page else (0,) * 10)
    inputs = case.build()
    arrays = dict(inputs.arrays)
    arrays["cache_seqlens"] = np.array([t, -1, t + 1, 2**31 - 1, -(2**31), t, t, t, t, t], np.int32)
    for name in ("k_cache", "v_cache"):  # of every entry and page
        noise = np.random.default_rng(1).standard_normal(arrays[name].shape)
        arrays[name] = np.where(np.isnan(arrays[name]), noise.astype(arrays[name].dtype), arrays[name])
    if page:
        table = arrays["page_table"] = arrays["page_table"].copy()
        table[5:, ::3] = np.array([-1, 2**31 - 1, -(2**31), len(arrays["k_cache"]), 10**6])[:, None]
        table[6] = -7
    else:
        arrays["cache_batch_idx"] = np.array([0, 1, 2, 3, 4, -1, 12, 2**31 - 1, -(2**31), 1], np.int32)
    out, lse = run(case, dataclasses.replace(inputs, arrays=arrays), implementation)

    lengths = np.clip(arrays["cache_seqlens"], 0, t)
    caches = [arrays[name].astype(np.float64) for name in ("k_cache", "v_cache")]
    q = arrays["q"].astype(np.float64)
    for i in range(case.b):
        if page:
            ids = np.repeat(table[i], page)
            rows = np.flatnonzero((ids >= 0) & (ids < len(caches[0])) & (np.arange(t) < lengths[i]))
            keys, values = (x[ids[rows], rows % page] for x in caches)
        else:
            entry = arrays["cache_batch_idx"][i]
            rows = np.arange(lengths[i] if 0 <= entry < len(caches[0]) else 0)
            keys, values = (x[entry if len(rows) else 0][rows] for x in caches)
        length = lengths[i] if page or len(rows) else 0
        sees = rows[None, :] <= np.arange(case.s)[:, None] + length - case.s
        keys, values = (np.repeat(x.transpose(1, 0, 2), case.h // case.g, 0) for x in (keys, values))
        x = np.where(sees, q[i].transpose(1, 0, 2) @ keys.transpose(0, 2, 1) / case.d**0.5, -np.inf)
        weights = np.exp(x)
        total = weights.sum(-1, keepdims=True)
        want = np.where(total > 0, weights @ values / np.where(total > 0, total, 1), 0).transpose(1, 0, 2)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(np.asarray(lse)[i], np.log(total)[..., 0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(np.asarray(out)[i].astype(np.float64), want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("page", [0, 16])
def test_what_the_step_before_decides(page, implementation):
    """Lengths and pages that a program computes between its calls, with the bits of calls one by one: what a kernel
    looks at while the one before still runs is only a guess."""
    b, t, h, g, d = (16, 2048, 8, 2, 128) if ON_GPU else (3, 128, 4, 2, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (b, 1, h, d), jnp.bfloat16)
    shape = (b * t // page, page, g, d) if page else (b, t, g, d)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
    table = jnp.arange(b * t // page, dtype=jnp.int32).reshape(b, -1) if page else None

    def step(q, lengths, table, k, v):
        more = {"page_table": table} if page else {}
        call = functools.partial(flashjax.flash_mha_with_kvcache, implementation=implementation)
        out = call(q, k, v, cache_seqlens=lengths, **more)
        drawn = jnp.abs(out[:, 0, 0, 0].astype(jnp.float32) * 1e4).astype(jnp.int32) * 131
        table = jnp.roll(table[::-1], drawn[0] % table.shape[1], axis=1) if page else None
        return out, drawn % (t + 1), table

    def steps(q, lengths, table, k, v, step=step):
        results = []
        for _ in range(8):
            q, lengths, table = step(q, lengths, table, k, v)
            results.append((q, lengths))
        return results

    first = (q, jnp.full((b,), t, jnp.int32), table, k, v)
    at_once, one_by_one = jax.jit(steps)(*first), steps(*first, step=jax.jit(step))
    for x, y in zip(at_once, one_by_one, strict=True):
        oracle.same_bits(x[1], y[1], "lengths")
        oracle.same_bits(x[0], y[0], "results")
    assert len({int(lengths[0]) for _, lengths in at_once}) > 4


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_in_command_buffers():
    """A program of several calls, and of a loop, that XLA may record as a CUDA graph: run again with other values."""
    case = BY_ID["decode-append-page"]
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    call = functools.partial(
        flashjax.flash_mha_with_kvcache, update_cache=True, implementation="cuda", **inputs.options
    )

    def steps(q, arrays):
        caches, results = (arrays["k_cache"], arrays["v_cache"]), []
        lengths = jnp.minimum(arrays["cache_seqlens"], 400)
        for _ in range(4):
            rest = arrays | {"k_cache": caches[0], "v_cache": caches[1], "cache_seqlens": lengths}
            out, *caches = call(**rest | {"q": q})
            lengths, q = lengths + 4, out
            results.append(out)
        return jnp.stack(results)

    flags = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
    plain = jax.jit(steps, compiler_options={"xla_gpu_enable_command_buffer": ""})
    recorded = jax.jit(steps, compiler_options=flags)
    for seed in range(3):
        q = jax.random.normal(jax.random.key(seed), arrays["q"].shape, arrays["q"].dtype)
        for _ in range(2):
            oracle.same_bits(recorded(q, arrays), plain(q, arrays), f"seed {seed}")
