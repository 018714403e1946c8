"""Memory grows with s + t: an s x t array of scores would show at once."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax

ON_GPU = jax.default_backend() == "gpu"
pytestmark = pytest.mark.slow

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


def test_more_than_2_to_31_elements(compiled):
    """The last key of 2**20 + 64 decides, of a cache with more elements than an int32 counts; then of its pages."""
    if not ON_GPU and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 << 30:
        pytest.skip("needs 8 GiB")
    t, g, d, page = (1 << 20) + 64, 16, 128, 64
    last = jnp.asarray(np.random.default_rng(0).standard_normal((g, d)), jnp.bfloat16)

    @jax.jit
    def fill(last):
        return jnp.where(jnp.arange(t)[:, None, None] == t - 1, last, jnp.bfloat16(0))[None]

    @functools.partial(jax.jit, donate_argnums=0)
    def cut(cache):
        return cache.reshape(t // page, page, g, d)

    def check(cache, **extra):
        assert cache.size > 2**31
        out = flashjax.flash_mha_with_kvcache(
            last[None, None], cache, cache, softmax_scale=1.0, implementation=compiled, **extra
        )
        np.testing.assert_allclose(np.asarray(out[0, 0], np.float32), np.asarray(last, np.float32), rtol=1e-2)

    cache = fill(last)
    check(cache)
    check(cut(cache), page_table=jnp.arange(t // page, dtype=jnp.int32)[None])


@pytest.mark.parametrize(("s", "h"), [(1 << 16, 88) if ON_GPU else (300, 2)])
def test_offsets(s, h, compiled):
    """The last of three batch entries is as it is alone; on a GPU an int32 does not hold its offsets (60 GB)."""
    d, gains = 128, jnp.asarray([1, -0.5, 2], jnp.bfloat16)[:, None, None, None]

    @functools.partial(jax.jit, static_argnums=1)
    def operand(gains, seed):
        return gains * jax.random.normal(jax.random.key(seed), (1, s, h, d), jnp.bfloat16)

    @jax.jit
    def attend(q, k, v, dout):
        f = functools.partial(flashjax.flash_mha, window_size=(127, 0), implementation=compiled)
        out, vjp = jax.vjp(f, q, k, v)
        return [out, *vjp(dout)]

    @jax.jit
    def distance(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.abs(x - y).max() / jnp.abs(y).max()

    whole = attend(*(operand(gains, seed) for seed in range(4)))
    alone = attend(*(operand(gains[-1:], seed) for seed in range(4)))
    for name, x, y in zip(("out", "dq", "dk", "dv"), whole, alone, strict=True):
        assert not ON_GPU or x.size > 2**31
        assert distance(x[-1:], y) < 0.01, name
