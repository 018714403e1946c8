"""The CPU kernels exist for several instruction sets; each of them gives the same results."""

import os
import subprocess
import sys

import jax
import pytest

import oracle
from cases import BY_ID, cotangents
from harness import differentiated, function, to_device

TRAINED = [
    "causal-float32",
    "causal-bfloat16",
    "causal-float16",
    "length-2x1",
    "dim-5",
    "dim-192-128",
    "heads-7-1",
    "window-long-q",
    "huge-logits-sinks",
    "everything",
    "everything-bfloat16",
    "packed-everything",
]
CACHED = ["cached-decode-bfloat16", "cached-decode-float16", "cached-paged-3", "cached-splits", "cached-everything"]

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernels of the CPU")


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def instructions(request, monkeypatch):
    monkeypatch.setenv("FLASHJAX_CPU_SIMD", request.param)
    case = BY_ID["packed-one"]
    inputs = case.build()
    try:
        jax.block_until_ready(function(case, inputs, "cpu")(to_device(inputs.arrays)))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        assert f"FLASHJAX_CPU_SIMD={request.param}" in str(error)  # noqa: PT017
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.mark.parametrize("name", TRAINED)
def test_trained(name, instructions):
    case = BY_ID[name]
    inputs = case.build()
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    results, grads = differentiated(case, inputs, "cpu")(to_device(inputs.arrays), dout_dlse)
    oracle.check(case, inputs, results, dout_dlse, grads)


@pytest.mark.parametrize("name", CACHED)
def test_cached(name, instructions):
    case = BY_ID[name]
    inputs = case.build()
    oracle.check(case, inputs, function(case, inputs, "cpu")(to_device(inputs.arrays)))


def test_unknown_instructions(monkeypatch):
    case = BY_ID["packed-one"]
    inputs = case.build()
    monkeypatch.setenv("FLASHJAX_CPU_SIMD", "sse9")
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="FLASHJAX_CPU_SIMD=sse9 is not among"):
        jax.block_until_ready(function(case, inputs, "cpu")(to_device(inputs.arrays)))


SCRIPT = """
import hashlib, jax, numpy as np
import harness, oracle
from cases import BY_ID, cotangents

digest = hashlib.sha256()
for name in ("heads-8-2-bfloat16", "packed-causal-float32", "length-300x513"):
    case = BY_ID[name]
    inputs = case.build()
    back = cotangents(case, inputs, oracle.run(case, inputs).lse)
    results = harness.differentiated(case, inputs, "cpu")(harness.to_device(inputs.arrays), back)
    for x in jax.tree.leaves(results):
        digest.update(np.asarray(x).tobytes())
print(digest.hexdigest())
"""


def test_threads_do_not_change_bits():
    """Work is cut by the problem alone: any number of threads gives the same bits."""
    digests = set()
    for threads in ("1", "2", "5"):  # what sizes XLA's pool
        environment = {**os.environ, "NPROC": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1
