"""The forward pass of every dense and packed case, by the compiled kernels, against the oracle.

The reference's is compared in test_backward.py, beside its gradients: it takes long to compile.
"""

import jax
import numpy as np
import pytest

import oracle
from cases import BY_ID, CASES
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
    here = "cuda" if jax.default_backend() == "gpu" else "cpu"
    calls = flashjax.support(jax.grad(lambda q: flashjax.flash_mha(q, q, q).astype(np.float32).sum()), q)
    assert [call.runs for call in calls] == [here, here]
