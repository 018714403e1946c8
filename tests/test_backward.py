"""Every gradient of every dense and packed case, by every implementation, against the oracle.

The cotangent of lse is NaN where the lse is -inf, and both are NaN outside of every sequence: neither may reach a
gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from cases import BY_ID, CASES, Case, cotangents
from conftest import ON_GPU
from flashjax._operation import Call
from flashjax._slots import in_order
from flashjax._types import Attrs
from harness import check_repeatable, differentiated, expect_decline, function, to_device

TRAINED = [pytest.param(case, id=case.id) for case in CASES if case.layout != "cached"]


@pytest.mark.parametrize("case", TRAINED)
def test_backward(case, implementation):
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    call = differentiated(case, inputs, implementation, deterministic=True)
    with expect_decline(case, implementation):
        results, grads = call(arrays, dout_dlse)
    if implementation in case.declined_by:
        return
    oracle.check(case, inputs, results, dout_dlse, grads)

    again = call(arrays, dout_dlse)[1]
    for name in grads:
        oracle.same_bits(again[name], grads[name], f"gradient of {name}, second call")


SOME = ("causal-float32", "heads-8-2-bfloat16", "packed-causal-float32", "window-long-k")
HALF = [  # not with sinks: their float32 gradient asks for more than an out of 16 bits holds
    pytest.param(dataclasses.replace(case, dtype="bfloat16" if half else case.dtype), id=case.id)
    for case in CASES
    if case.layout != "cached"
    for half in [case.dtype == "float32" and case.sinks is None]
]


@pytest.mark.parametrize("case", HALF if ON_GPU else [pytest.param(BY_ID[name], id=name) for name in SOME])
def test_deterministic_is_the_same_function(case, implementation):
    """`deterministic=False` may add in another order and nothing more. On a GPU other kernels serve it, in 16 bits."""
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    with expect_decline(case, implementation):
        _, grads = differentiated(case, inputs, implementation)(arrays, dout_dlse)
    if implementation in case.declined_by:
        return
    oracle.check(case, inputs, cotangents=dout_dlse, grads=grads)


OF_OUT = (*SOME, "sinks", "packed-sinks")


@pytest.mark.parametrize("case", TRAINED if ON_GPU else [pytest.param(BY_ID[name], id=name) for name in OF_OUT])
def test_loss_of_out_alone(case, implementation):
    """Of a loss that does not read lse the gradients are those of dlse = 0, to the bit, and nobody makes the zeros."""
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    lse = oracle.run(case, inputs).lse
    dout, _ = cotangents(case, inputs, lse)
    call = differentiated(case, inputs, implementation, deterministic=True)
    with expect_decline(case, implementation):
        _, grads = call(arrays, (dout,))
    if implementation in case.declined_by:
        return
    zeros = np.zeros(lse.shape, np.float32)
    for name, grad in call(arrays, (dout, zeros))[1].items():
        oracle.same_bits(grads[name], grad, f"gradient of {name}")
    if case.id in SOME:  # those of others may come from a slope's gradient, or a seed
        traced = _equations(call.trace(arrays, (dout,)).jaxpr.jaxpr)
        made = [x.outvars[0].aval.shape for x in traced if x.primitive.name == "broadcast_in_dim"]
        assert not [shape for shape in made if shape[-3:] == lse.shape]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)


MANY_BLOCKS = {  # more blocks than a GPU has multiprocessors, whose turns to add to dq differ
    "full": {"d": 64, "b": 4},
    "ragged-f16": {"d": 256, "s": 1990, "t": 2021, "dtype": "float16"},
    "causal-heads-8-2": {"b": 5, "d": 128, "g": 2, "causal": True},
    "causal-256": {"d": 256, "causal": True},
    "causal-192-128": {"d": 192, "e": 128, "causal": True},
    "ragged-192-128-f16": {"d": 192, "e": 128, "s": 1990, "t": 2021, "dtype": "float16"},
    "short-queries": {"d": 128, "s": 130, "causal": True, "window": (700, None)},
    "left-window": {"d": 64, "window": (300, -1)},
    "window": {"d": 256, "window": (500, 100)},
    "bias": {"d": 128, "s": 700, "bias": "b h s t"},
    "bias-of-keys": {"d": 64, "bias": "b h 1 t"},
    "bias-of-keys-256": {"d": 256, "bias": "b h 1 t"},
}


@pytest.mark.skipif(not ON_GPU, reason="the order of additions is fixed where nothing runs at the same time")
@pytest.mark.parametrize("options", MANY_BLOCKS.values(), ids=MANY_BLOCKS)
def test_deterministic_with_many_blocks(options):
    defaults = {"b": 2, "s": 2048, "t": 2048, "h": 8, "g": 8, "dtype": "bfloat16"}
    check_repeatable(Case("many-blocks", "blocks that wait for each other", **(defaults | options)), "cuda")


PARTS = {  # of what a ring computes; on a GPU kernels of one key tile serve most of them
    "dense": {"b": 2, "h": 2, "s": 150},
    "many-heads": {"b": 66, "g": 4, "h": 4, "s": 40},
    "packed": {"h": 4, "g": 2, "s": 300, "layout": "packed", "cu_q": (0, 300), "cu_k": (0, 256)},
    "window": {"h": 2, "s": 256, "window": (100, 0)},
    "nothing-seen": {"h": 2, "s": 256, "causal": True, "alignment": "top_left"},
}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_keys_in_parts(options, implementation):
    """Gradients from 128 keys at a time, whose `out` and `lse` are those of all 256, as a ring has them."""
    case = Case("parts", "", **{"b": 1, "t": 256, "d": 64, "dtype": "bfloat16" if ON_GPU else "float32", **options})
    inputs = case.build()
    dout, dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    want = oracle.run(case, inputs, (dout, dlse)).grads
    out, lse = function(case, inputs, implementation)(to_device(inputs.arrays))
    is_packed = case.layout == "packed"
    q, k, v, *given = (x[None] if is_packed else x for x in (*(inputs.arrays[n] for n in "qkv"), out, lse, dout, dlse))
    b, s = q.shape[:2]
    diagonal = 256 - s if case.alignment == "bottom_right" else 0
    left, right = (-1, 0) if case.causal else case.window
    attrs = Attrs(case.d**-0.5, window_left=left, window_right=right, top_left=True, part=True)
    found = {name: np.zeros(want[name].shape) for name in "qkv"}
    for keys in (slice(0, 128), slice(128, 256)):
        part = {"q": q, "k": k[:, keys], "v": v[:, keys], "shift": np.full(b, diagonal - keys.start, np.int32)}
        if is_packed:
            part |= {"cu_seqlens_q": np.array([[0, s]], np.int32), "cu_seqlens_k": np.array([[0, 128]], np.int32)}
        call = Call("backward", in_order(part), attrs, in_parts=True)
        compute = jax.jit(functools.partial(call.compute, implementation))
        dq, dk, dv = (np.asarray(x, np.float64) for x in compute(*(part[name] for name in call.names), *given))
        found["q"] += dq.reshape(found["q"].shape)
        for name, x in (("k", dk), ("v", dv)):
            found[name][(keys,) if is_packed else (slice(None), keys)] = x[0] if is_packed else x
    for name, x in found.items():
        error = np.linalg.norm(x - want[name]) / np.linalg.norm(want[name])
        assert error < (1e-2 if ON_GPU else 1e-5), (name, error)


FEW_TILES = {  # key tiles that are fewer than multiprocessors, or leave some without one at the end
    "one-head": {"s": 1024, "t": 300, "h": 1},
    "one-key": {"s": 1024, "t": 1, "h": 3},
    "heads-8-1": {"s": 600, "t": 640, "h": 8, "dtype": "float16"},
    "columns-40": {"s": 1500, "t": 700, "h": 5, "g": 5, "d": 40},
    "columns-64": {"b": 2, "s": 2000, "t": 900, "h": 4, "g": 2, "d": 64},
    "columns-96": {"b": 3, "s": 777, "t": 1000, "h": 4, "g": 2, "d": 96, "dtype": "float16"},
    "last-wave": {"b": 4, "s": 1024, "t": 1900, "h": 6, "g": 3},
}


@pytest.mark.skipif(not ON_GPU, reason="elsewhere no key tile is cut")
@pytest.mark.parametrize("options", FEW_TILES.values(), ids=FEW_TILES)
def test_key_tiles_in_pieces(options):
    """Whose queries several multiprocessors share: gradients are right, and those of k and v have the same bits."""
    defaults = {"b": 1, "g": 1, "d": 128, "dtype": "bfloat16"}
    case = Case("pieces", "dk and dv are sums over multiprocessors", **(defaults | options))
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    call = differentiated(case, inputs, "cuda")
    grads = call(arrays, dout_dlse)[1]
    oracle.check(case, inputs, cotangents=dout_dlse, grads=grads)
    for run in range(3):
        again = call(arrays, dout_dlse)[1]
        for name in "kv":
            oracle.same_bits(again[name], grads[name], f"gradient of {name}, run {run}")


TALL = {  # what Hopper's tiles of 80 queries serve, and windows that are too narrow for them
    "full": {"s": 4100, "t": 4205},
    "causal": {"causal": True, "g": 1, "dtype": "float16"},
    "top-left": {"causal": True, "alignment": "top_left", "t": 2000, "d": 72},
    "window": {"window": (5000, 0)},
    "narrow-window": {"window": (1000, 0), "g": 1},
    "right": {"window": (-1, 50), "s": 8300, "t": 8200},
    "packed": {"layout": "packed", "s": 7600, "t": 7600, "cu_q": (5, 4200, 7590), "g": 1},
    "packed-causal": {
        "layout": "packed", "causal": True, "s": 12500, "t": 12500, "cu_q": (0, 4000, 4080, 8500, 12499),
        "dtype": "float16",
    },
    "packed-clean": {  # queries without a key, whose cotangents are NaN; and a sequence of one tile and one key
        "layout": "packed", "causal": True, "s": 10010, "t": 8000, "cu_q": (3, 5000, 5070, 10007),
        "cu_k": (0, 4300, 4301, 7999), "d": 72,
    },
    "packed-used": {
        "layout": "packed", "causal": True, "s": 8196, "t": 8196, "cu_q": (0, 6000, 8196), "used_q": (5900, 0),
        "used_k": (5990, 9),
    },
    "packed-deterministic": {"layout": "packed", "causal": True, "s": 5000, "t": 5000, "cu_q": (0, 5000)},
}  # fmt: skip


@pytest.mark.skipif(not ON_GPU, reason="elsewhere rows of any length are one kernel's")
@pytest.mark.parametrize("name", TALL)
def test_tall_rows(name):
    """Some rows of the gradients of long calls, by hand: the oracle would take minutes for all."""
    sizes = {"b": 1, "s": 8300, "t": 8300, "h": 2, "g": 2, "d": 128, "dtype": "bfloat16"}
    case = Case("tall", "", **(sizes | TALL[name]))
    check_some_rows(case, "cuda", deterministic="deterministic" in name)


def check_some_rows(case, implementation, **options):
    inputs = case.build()
    arrays, packed = to_device(inputs.arrays), case.layout == "packed"
    random = np.random.default_rng(1)
    ends = {"q": case.cu_q, "k": case.cu_k or case.cu_q} if packed else {"q": (0, case.s), "k": (0, case.t)}
    used = {"q": case.used_q, "k": case.used_k}
    spans = {  # of the sequences
        x: [(y, y + used[x][i] if used[x] else z) for i, (y, z) in enumerate(zip(ends[x], ends[x][1:], strict=False))]
        for x in "qk"
    }
    shape = inputs.arrays["q"].shape
    dout = np.full((case.s, case.h, case.d), np.nan)
    for (first, last), (k0, k1) in zip(*spans.values(), strict=True):
        first += max(0, last - first - (k1 - k0)) if case.causal and packed else 0
        dout[first:last] = random.standard_normal((last - first, case.h, case.d))
    dout = dout.astype(inputs.arrays["q"].dtype)
    dlse = np.zeros((case.h, case.s) if packed else (1, case.h, case.s), np.float32)
    call = differentiated(case, inputs, implementation, **options)
    (out, lse), grads = call(arrays, (dout.reshape(shape), dlse))
    q, k, v, out, dq, dk, dv = (
        np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])
        for x in (*map(inputs.arrays.get, "qkv"), out, *map(grads.get, "qkv"))
    )
    dout, lse = np.nan_to_num(dout.astype(np.float64)), np.asarray(lse, np.float64).reshape(case.h, -1)
    of_key = case.h // case.g

    def close(found, want, what):
        assert np.isfinite(found).all(), what
        assert np.linalg.norm(found - want) <= 1.2e-2 * np.linalg.norm(want) + 1e-6, what

    for at, ((q0, q1), (k0, k1)) in enumerate(zip(spans["q"], spans["k"], strict=True)):
        s, t = q1 - q0, k1 - k0
        i, j = np.arange(s)[:, None], np.arange(t)
        i += 0 if case.alignment == "top_left" else t - s  # the key that a query sits on
        left, right = (-1, 0) if case.causal else case.window
        seen = np.ones((s, t), bool)
        if right >= 0:
            seen &= j <= i + right
        if left >= 0:
            seen &= j >= i - left

        def weights(head, rows, keys, q0=q0, k0=k0, seen=seen):
            """P and dS of some rows and keys of the sequence."""
            own = head // of_key
            mask, x = seen[np.ix_(rows, keys)], q0 + rows
            scores = np.where(mask, q[x, head] @ k[k0 + keys, own].T * case.d**-0.5, 0)
            p = np.where(mask, np.exp(scores - np.where(mask, lse[head, x][:, None], 0)), 0)
            delta = (out[x, head] * dout[x, head]).sum(-1)
            return p, p * (dout[x, head] @ v[k0 + keys, own].T - delta[:, None]) * case.d**-0.5

        queries, keys = np.arange(s), np.arange(t)
        edges = [0, 31, 32, 63, 64, 79, 80, 127, 128]
        some_q, some_k = (
            np.unique(np.concatenate([near[near < n], n - 1 - near[near < n]]))
            for n in (s, t)
            for near in [np.concatenate([edges, random.integers(0, max(n, 1), 24)])]
        )
        for head in range(case.h):
            close(dq[q0 + some_q, head], weights(head, some_q, keys)[1] @ k[k0:k1, head // of_key], ("dq", at, head))
        for own in range(case.g):
            parts = [(x, *weights(x, queries, some_k)) for x in range(own * of_key, (own + 1) * of_key)]
            close(dv[k0 + some_k, own], sum(p.T @ dout[q0:q1, x] for x, p, _ in parts), ("dv", at, own))
            close(dk[k0 + some_k, own], sum(ds.T @ q[q0:q1, x] for x, _, ds in parts), ("dk", at, own))
    for x, grad in (("q", dq), ("k", dk), ("k", dv)):  # what belongs to no sequence
        inside = np.zeros(len(grad), bool)
        for first, last in spans[x]:
            inside[first:last] = True
        assert not grad[~inside].any(), ("outside", x)


BIASES = ("b h s t", "1 h s t", "1 1 s t", "b h 1 t", "b 1 1 t")
BESIDE = {  # several tiles both ways, ragged; what a bias meets
    "alone": {},
    "odd": {"t": 333, "bias_dtype": "float32"},
    "causal": {"causal": True, "dtype": "float16"},
    "window": {"window": (70, 40), "bias_dtype": "float32", "t": 334},
    "segments": {"segments": "same", "causal": True, "t": 300, "bias_dtype": "float32"},
    "documents": {"segments": "pair", "t": 360},
    "softcap": {"softcap": 2.0, "q_gain": 4.0, "t": 137},
    "alibi-sinks": {"alibi": "h", "sinks": "low", "s": 517, "g": 4},
    "packed": {"layout": "packed", "s": 420, "t": 500, "cu_q": (3, 140, 141, 420), "cu_k": (0, 304, 350, 500)},
    "used": {"layout": "packed", "s": 420, "t": 420, "cu_q": (0, 140, 420), "used_q": (100, 280), "used_k": (140, 120)},
}


@pytest.mark.skipif(not ON_GPU, reason="elsewhere the cases of one block have all that there is")
@pytest.mark.parametrize(
    ("bias", "beside", "d"),
    [
        pytest.param(bias, beside, d, id=f"{bias.replace(' ', '')}-{beside}-{d}")
        for i, bias in enumerate(BIASES)
        for j, beside in enumerate(BESIDE)
        for d in [(64, 128, 256)[(i + j) % 3]]
    ],
)
def test_bias(bias, beside, d):
    """The gradient of a bias of many blocks: of those that masks skip it is 0, whatever the memory held."""
    options = {"s": 300, "t": 336, "dtype": "bfloat16"} | BESIDE[beside]
    case = Case(f"bias-{bias}-{d}-{beside}", "the gradient of a bias", d=d, bias=bias, **options)
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    call = differentiated(case, inputs, "cuda")
    call(arrays, dout_dlse)
    for size in (1 << 14, 1 << 18, inputs.arrays["bias"].size, 1 << 22, 1 << 24):  # free memory becomes NaN
        jnp.full((size,), jnp.nan).block_until_ready()
    _, grads = call(arrays, dout_dlse)
    oracle.check(case, inputs, cotangents=dout_dlse, grads=grads)


def test_lse_alone(implementation):
    """A loss of the lse alone (z-loss): the cotangent of out is a symbolic zero."""
    case = BY_ID["sinks-causal-bfloat16"]
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    import flashjax

    def loss(q, k, v, sinks):
        _, lse = flashjax.flash_mha(
            q, k, v, sinks=sinks, return_lse=True, implementation=implementation, **inputs.options
        )
        return (lse**2).sum()

    names = ("q", "k", "v", "sinks")
    grads = jax.jit(jax.grad(loss, argnums=range(4)))(*(arrays[name] for name in names))
    lse = oracle.run(case, inputs).lse
    zero = np.zeros((*inputs.arrays["q"].shape[:3], case.v_dim))
    oracle.check(case, inputs, cotangents=(zero, 2 * lse), grads=dict(zip(names, grads, strict=True)))


def test_out_alone(implementation):
    """A loss of out alone, the usual one, of a call that returns no lse."""
    case = BY_ID["causal-float32"]
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    import flashjax

    dout, _ = cotangents(case, inputs, oracle.run(case, inputs).lse)
    _, vjp = jax.vjp(
        lambda q, k, v: flashjax.flash_mha(q, k, v, implementation=implementation, **inputs.options),
        *(arrays[name] for name in "qkv"),
    )
    grads = vjp(jnp.asarray(dout))
    zero = np.zeros((case.b, case.h, case.s))
    oracle.check(case, inputs, cotangents=(dout, zero), grads=dict(zip("qkv", grads, strict=True)))


@pytest.mark.parametrize("position", [0, 1])
def test_gradient_per_row(position, compiled):
    """The gradients of one row of a batch do not depend on its neighbours, and land on that row."""
    case = BY_ID["heads-8-2"]
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    dout, dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    call = differentiated(case, inputs, compiled, deterministic=True)
    _, whole = call(arrays, (dout, dlse))
    keep = np.arange(case.b) == position
    _, one = call(arrays, (dout * keep[:, None, None, None].astype(dout.dtype), dlse * keep[:, None, None]))
    for name in "qkv":
        np.testing.assert_array_equal(np.asarray(one[name])[position], np.asarray(whole[name])[position])
        assert not np.asarray(one[name])[1 - position].any()
