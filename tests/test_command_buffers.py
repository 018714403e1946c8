"""XLA records our calls into CUDA graphs: the handlers say that they can be, and nothing they do keeps them from it.

A graph is recorded at one set of addresses and updated for others, so each program runs on several inputs that are
alive at the same time.
"""

import collections
import glob
import gzip
import json

import jax
import numpy as np
import pytest

import oracle
from cases import BY_ID, cotangents
from conftest import ON_GPU
from harness import differentiated, function, to_device

pytestmark = pytest.mark.skipif(not ON_GPU, reason="a CUDA graph needs a GPU")

RECORDED = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
LAUNCHED = {"xla_gpu_enable_command_buffer": ""}
CALLS = {  # case, whether it is differentiated
    "forward": ("causal-bfloat16", False),
    "backward": ("causal-bfloat16", True),
    "float32": ("causal-float32", True),
    "packed": ("packed-causal-bfloat16", False),
    "packed-backward": ("packed-causal-bfloat16", True),
    "decode": ("cached-decode-bfloat16", False),
    "paged": ("cached-paged-bfloat16", False),
    "append": ("cached-append-bfloat16", False),
    "splits": ("cached-splits", False),
}


def calls_of_the_driver(run, folder) -> collections.Counter:
    """How often each function was called while `run()` ran, by the profiler."""
    with jax.profiler.trace(folder):
        run()
    (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return collections.Counter(event["name"] for event in events if event.get("ph") == "X")


@pytest.mark.parametrize(("name", "backward"), CALLS.values(), ids=CALLS)
def test_recorded(name, backward, compiled, tmp_path):
    case = BY_ID[name]
    inputs = case.build()
    if backward:
        call = differentiated(case, inputs, compiled, deterministic=True)
        more = [cotangents(case, inputs, oracle.run(case, inputs).lse)]
    else:
        call, more = function(case, inputs, compiled), []
    recorded, launched = (jax.jit(call, compiler_options=options) for options in (RECORDED, LAUNCHED))
    arrays = [to_device(inputs.arrays) for _ in range(3)]
    others = [x | {"q": x["q"] * (1 + i)} for i, x in enumerate(arrays)]
    jax.block_until_ready(others)
    results = []
    recorded(others[0], *more), launched(others[0], *more)  # compiled by now

    def run():
        for x in others:
            results.append(jax.block_until_ready(recorded(x, *more)))

    calls = calls_of_the_driver(run, tmp_path / "recorded")
    assert calls["cuGraphLaunch"] == len(others), calls
    assert not [x for x in calls if x.startswith("cuLaunchKernel")], calls
    calls = calls_of_the_driver(lambda: launched(others[0], *more), tmp_path / "launched")
    assert not calls["cuGraphLaunch"], calls
    for x, result in zip(others, results, strict=True):
        for got, expected in zip(jax.tree.leaves(result), jax.tree.leaves(launched(x, *more)), strict=True):
            oracle.same_bits(np.asarray(got), np.asarray(expected), name)
