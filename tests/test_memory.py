"""Memory grows with s + t: an s x t array of scores would show at once."""

import json
import subprocess
import sys
import textwrap

import pytest

from conftest import ON_GPU

SCRIPT = """
import json, resource, sys
import jax, jax.numpy as jnp
import flashjax

def attend(s, implementation, direction):
    shape = (1, s, 1, 16)
    q = k = v = jnp.ones(shape)
    options = dict(is_causal=True, implementation=implementation)
    f = lambda q, k, v: flashjax.flash_mha(q, k, v, **options).sum()
    if direction == "backward":
        f = jax.grad(f, argnums=(0, 1, 2))
    jax.block_until_ready(jax.jit(f)(q, k, v))

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
attend(256, IMPLEMENTATION, DIRECTION)
peaks = []
for s in SIZES:
    attend(s, IMPLEMENTATION, DIRECTION)
    peaks.append(peak())
print(json.dumps(peaks))
"""


def _peaks(implementation, direction, sizes):
    head = f"IMPLEMENTATION, DIRECTION, SIZES = {implementation!r}, {direction!r}, {sizes!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(ON_GPU, reason="measures the memory of the host")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_peak_is_linear(direction, name):
    """From 1k over 4k to 16k queries and keys; 16k scores of a head alone would be 1 GiB.

    The reference holds 2**23 scores at a time, some arrays of them: it is given a larger constant.
    """
    sizes = [1024, 4096, 16384]
    start, *_, end = _peaks(name, direction, sizes)
    scores = 4 * sizes[-1] ** 2
    rows = 4 * 16 * sizes[-1]  # one array of q, k, v, ...
    allowed = 40 * rows if name == "cpu" else 0.6 * scores
    assert end - start < allowed < scores, f"{(end - start) / 2**20:.0f} MiB"


@pytest.mark.skipif(ON_GPU, reason="measures the memory of the host")
def test_grouped_keys_are_not_repeated():
    """32 query heads on one key head: the keys of each would be 32 times the keys."""
    script = """
    import resource, jax, jax.numpy as jnp, flashjax
    def attend(t):
        q, k = jnp.ones((1, 8, 32, 64)), jnp.ones((1, t, 1, 64))
        f = lambda q, k: flashjax.flash_mha(q, k, k).sum()
        jax.block_until_ready(jax.jit(jax.grad(f, argnums=(0, 1)))(q, k))
    attend(64)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    attend(1 << 16)
    print((peak() - before) / (4 * 64 << 16))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 16, "times the keys"
