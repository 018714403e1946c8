"""Dropout beyond the cases: its statistics, and that transformations leave it the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flashjax
import oracle

KEY = np.array([7, 11], np.uint32)


def _operands(random, b=2, s=64, h=4, d=16):
    return [jnp.asarray(random.standard_normal((b, s, h, d)), jnp.float32) for _ in range(3)]


def _dropped(q, k, v, rate=0.25, key=KEY, **options):
    return flashjax.flash_mha(q, k, v, dropout_rate=rate, dropout_key=key, **options)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_and_mean(rate, compiled):
    """Equal keys and unit values: a result is the share of weights that are kept, scaled up; 1 in the mean."""
    b, s, h = 2, 512, 4
    q, k = jnp.zeros((b, s, h, 8)), jnp.zeros((b, s, h, 8))
    out, lse = _dropped(q, k, jnp.ones((b, s, h, 8)), rate, return_lse=True, implementation=compiled)
    kept = round(256 * (1 - rate)) / 256
    np.testing.assert_allclose(lse, np.log(s), rtol=1e-6)
    deviation = np.sqrt((1 - kept) / kept / s)
    assert abs(float(out[..., 0].mean()) - 1) < 5 * deviation / np.sqrt(b * s * h)
    assert 0.9 < float(out[..., 0].std()) / deviation < 1.1
    columns = _dropped(q[:, :1], k, jnp.eye(s)[None, :, None, :].repeat(b, 0).repeat(h, 2), rate)
    assert set(np.unique(np.round(np.asarray(columns) * s * kept, 4))) == {0, 1}


def test_keys(random, implementation):
    q, k, v = _operands(random)
    call = jax.jit(lambda key: _dropped(q, k, v, key=key, implementation=implementation))
    first = call(KEY)
    oracle.same_bits(call(KEY), first, "the same key")
    oracle.same_bits(call(jax.random.wrap_key_data(KEY)), first, "the same key, typed")
    assert np.mean(np.asarray(call(KEY + 1)) != np.asarray(first)) > 0.9
    oracle.same_bits(_dropped(q, k, v, rate=0, implementation=implementation),
                     flashjax.flash_mha(q, k, v, implementation=implementation), "no dropout")  # fmt: skip


def test_vmap(random, compiled):
    q, k, v = (x.reshape(2, 1, *x.shape[1:]) for x in _operands(random))
    keys = jax.random.split(jax.random.key(1), 2)
    mapped = jax.vmap(lambda q, k, v, key: _dropped(q, k, v, key=key, implementation=compiled))(q, k, v, keys)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], _dropped(q[i], k[i], v[i], key=keys[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("spec", [P("x", None, "y"), P("x", "y")], ids=["heads", "sequence"])
def test_sharded(random, spec):
    """Which weights are dropped does not depend on the devices."""
    q, k, v = _operands(random)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))

    def value(q, k, v):
        out = _dropped(q, k, v, is_causal=True)
        return jnp.sum(out**2), out

    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))
    expected = gradient(q, k, v)
    got = gradient(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_ring_is_declined(random):
    q, k, v = _operands(random)
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    split = [jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in (q, k, v)]
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"dropout goes by positions.*ulysses"):
        jax.jit(lambda q, k, v: _dropped(q, k, v, strategy="ring"))(*split)


@pytest.mark.parametrize(
    ("rate", "key", "error", "words"),
    [
        (0.5, None, ValueError, "`dropout_key` must be a key of jax.random, given with `dropout_rate`; got None"),
        (-0.1, KEY, ValueError, "`dropout_rate` must be from 0 to 255 / 256"),
        (1.0, KEY, ValueError, "`dropout_rate` must be from 0 to 255 / 256"),
        ("half", KEY, TypeError, "`dropout_rate` must be a real number"),
        (0.5, np.zeros(3, np.float32), TypeError, "`dropout_key` must be one key of jax.random"),
    ],
)
def test_bad_arguments(random, rate, key, error, words):
    q, k, v = _operands(random)
    with pytest.raises(error, match=words):
        _dropped(q, k, v, rate=rate, key=key)
