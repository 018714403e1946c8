"""XLA records our calls into CUDA graphs: the handlers say that they can be, and nothing they do keeps them from it.

A graph is recorded at one set of addresses and updated for others, so each program runs on several inputs that are
alive at the same time.
"""

import glob
import pathlib

import jax
import numpy as np
import pytest

import oracle
from cases import BY_ID, cotangents
from conftest import ON_GPU
from harness import differentiated, function, to_device

pytestmark = pytest.mark.skipif(not ON_GPU, reason="a CUDA graph needs a GPU")

# Only custom calls may be recorded, so whatever is recorded is ours.
RECORDED = {"xla_gpu_enable_command_buffer": "CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
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


def compiled_to(call, options, folder):
    """The jitted function, and whether its program has a command buffer, once it has been compiled."""
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}

    def has_command_buffer():
        texts = [pathlib.Path(x).read_text() for x in glob.glob(f"{folder}/*thunk_sequence*.txt")]
        assert texts, "XLA wrote down no thunks"
        return any("kCommandBuffer" in text for text in texts)

    return jax.jit(call, compiler_options=options | dump), has_command_buffer


@pytest.mark.parametrize(("name", "backward"), CALLS.values(), ids=CALLS)
def test_recorded(name, backward, compiled, tmp_path):
    case = BY_ID[name]
    inputs = case.build()
    if backward:
        call = differentiated(case, inputs, compiled, deterministic=True)
        more = [cotangents(case, inputs, oracle.run(case, inputs).lse)]
    else:
        call, more = function(case, inputs, compiled), []
    recorded, has_command_buffer = compiled_to(call, RECORDED, tmp_path / "recorded")
    launched, has_none = compiled_to(call, LAUNCHED, tmp_path / "launched")
    arrays = [to_device(inputs.arrays) for _ in range(3)]
    others = [x | {"q": x["q"] * (1 + i)} for i, x in enumerate(arrays)]
    results = [recorded(x, *more) for x in [*others, *others]]  # all alive
    for x, result in zip([*others, *others], results, strict=True):
        for got, expected in zip(jax.tree.leaves(result), jax.tree.leaves(launched(x, *more)), strict=True):
            oracle.same_bits(np.asarray(got), np.asarray(expected), name)
    assert has_command_buffer()
    assert not has_none()
