"""The forward pass of every dense and packed case, by the compiled kernels, against the oracle.

The reference's is compared in test_backward.py, beside its gradients: it takes long to compile.
"""

import jax
import numpy as np
import pytest

import oracle
from cases import BY_ID, CASES, Case
from conftest import ON_GPU
from harness import expect_decline, function, to_device

TRAINED = [pytest.param(case, id=case.id) for case in CASES if case.layout != "cached"]


@pytest.mark.parametrize("case", TRAINED)
def test_forward(case, compiled):
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    call = function(case, inputs, compiled)
    with expect_decline(case, compiled):
        out, lse = call(arrays)
    if compiled in case.declined_by:
        return
    assert out.dtype == arrays["q"].dtype
    assert lse.dtype == np.float32
    oracle.check(case, inputs, (out, lse))

    again = call(arrays)
    oracle.same_bits(again[0], out, "out of a second call")
    oracle.same_bits(again[1], lse, "lse of a second call")


@pytest.mark.parametrize("name", ["causal-float32", "causal-bfloat16", "heads-8-2", "window-long-q", "everything"])
def test_batch_position(name, compiled):
    """A row of the batch gives the same bits wherever it stands."""
    case = BY_ID[name]
    inputs = case.build()
    flipped = {
        key: jax.tree.map(lambda x: x[::-1] if x.ndim > 1 and x.shape[0] == case.b else x, x)
        for key, x in inputs.arrays.items()
    }
    call = function(case, inputs, compiled)
    for x, y in zip(call(to_device(inputs.arrays)), call(to_device(flipped)), strict=True):
        oracle.same_bits(x, np.asarray(y)[::-1], "flipped batch")


def test_packed_position(compiled):
    """A sequence gives the same bits wherever it is packed."""
    case = BY_ID["packed-causal-float32"]
    inputs = case.build()
    call = function(case, inputs, compiled)
    out, lse = call(to_device(inputs.arrays))
    lengths = np.diff(case.cu_q)
    order = [3, 1, 0, 2]
    rows = np.concatenate([np.arange(case.cu_q[i], case.cu_q[i + 1]) for i in order])
    cu = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int32)
    moved = {key: inputs.arrays[key][rows] for key in "qkv"} | {"cu_seqlens_q": cu}
    out2, lse2 = call(to_device(moved))
    oracle.same_bits(np.asarray(out)[rows], out2, "out")
    oracle.same_bits(np.asarray(lse)[:, rows], lse2, "lse")


def test_returns_out_alone():
    import flashjax

    q = np.ones((1, 2, 2, 8), np.float32)
    cu = np.array([0, 2], np.int32)
    assert flashjax.flash_mha(q, q, q).shape == q.shape
    assert flashjax.flash_mha_varlen(q[0], q[0], q[0], cu).shape == q[0].shape
    assert flashjax.flash_mha_with_kvcache(q, q, q).shape == q.shape


def test_default_implementation():
    """Without `implementation=` the platform's own kernels run, not the reference."""
    import flashjax

    q = jax.ShapeDtypeStruct((2, 128, 8, 64), np.dtype("bfloat16"))
    here = "cuda" if ON_GPU else "cpu"
    calls = flashjax.support(jax.grad(lambda q: flashjax.flash_mha(q, q, q).astype(np.float32).sum()), q)
    assert [call.runs for call in calls] == [here, here]


TALL = {  # what Hopper's tiles of 192 queries serve: long rows at d = 128 without a bound on the left
    "causal": {"causal": True},
    "full": {"s": 8197, "t": 300},
    "right": {"window": (-1, 70), "t": 7000, "dtype": "float16"},
    "narrow": {"causal": True, "d": 104, "sinks": "normal", "t": 9000, "g": 1},
    "top-left": {"causal": True, "alignment": "top_left", "t": 1000},
    "packed": {"layout": "packed", "causal": True, "cu_q": (0, 2500, 2500, 5001, 8196)},
    "packed-keys": {"layout": "packed", "cu_q": (0, 5000, 8196), "cu_k": (0, 1, 777), "t": 777},
    "packed-used": {
        "layout": "packed",
        "causal": True,
        "cu_q": (0, 6000, 8196),
        "used_q": (5900, 0),
        "used_k": (5990, 9),
    },
}


@pytest.mark.skipif(not ON_GPU, reason="elsewhere rows of any length are one kernel's")
@pytest.mark.parametrize("options", TALL.values(), ids=TALL)
def test_tall_tiles(options):
    """Some rows of long calls, by hand: the oracle would take minutes for all."""
    sizes = {"b": 1, "s": 8196, "t": 8196, "h": 3, "g": 3, "d": 128, "dtype": "bfloat16"}
    case = Case("tall", "tiles of 192 queries", **(sizes | options))
    inputs = case.build()
    out, lse = function(case, inputs, "cuda")(to_device(inputs.arrays))
    packed = case.layout == "packed"
    q, k, v, out = (np.asarray(x, np.float64).reshape(-1, *x.shape[-2:]) for x in (*map(inputs.arrays.get, "qkv"), out))
    lse = np.asarray(lse).reshape(case.h, -1)
    ends = list(zip(case.cu_q, case.cu_q[1:], strict=False)) if packed else [(0, case.s)]
    of_keys = list(zip(case.cu_k, case.cu_k[1:], strict=False)) if case.cu_k else ends if packed else [(0, case.t)]
    random = np.random.default_rng(0)
    for i, ((q0, q1), (k0, k1)) in enumerate(zip(ends, of_keys, strict=True)):
        s = case.used_q[i] if case.used_q else q1 - q0
        t = case.used_k[i] if case.used_k else k1 - k0
        corner = 0 if case.alignment == "top_left" else t - s
        right = 0 if case.causal else case.window[1]
        edges = [x + y for x in (0, 64, 128, 192, 384, s) for y in (-1, 0, 1)]
        for row in {x for x in (*edges, *random.integers(0, max(s, 1), 20).tolist()) if 0 <= x < s}:
            seen = t if right < 0 else max(0, min(t, row + corner + right + 1))
            for head in range(case.h):
                g = head // (case.h // case.g)
                scores = k[k0 : k0 + seen, g] @ q[q0 + row, head] * case.d**-0.5
                more = [float(inputs.arrays["sinks"][head])] if case.sinks else []
                most = max([*scores, *more], default=0.0)
                p = np.exp(scores - most)
                total = p.sum() + sum(np.exp(x - most) for x in more)
                want = p @ v[k0 : k0 + seen, g] / total if total else np.zeros(v.shape[-1])
                found = out[q0 + row, head]
                assert np.linalg.norm(found - want) <= 8e-3 * np.linalg.norm(want), (i, row, head)
                expected = most + np.log(total) if total else -np.inf
                assert np.allclose(lse[head, q0 + row], expected, atol=2e-3), (i, row, head)
