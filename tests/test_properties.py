"""Laws that hold for any sizes: hypothesis looks for sizes that break them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

import flashjax

LENGTH = st.sampled_from([1, 2, 7, 31, 64, 65, 130])
DIM = st.sampled_from([4, 16, 33])


@dataclasses.dataclass
class Problem:
    q: jnp.ndarray
    k: jnp.ndarray
    v: jnp.ndarray


@st.composite
def problems(draw, square=False):
    s = draw(LENGTH)
    t = s if square else draw(LENGTH)
    g, group, d, e = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), draw(DIM), draw(DIM)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = (2, s, g * group, d), (2, t, g, d), (2, t, g, e)
    return Problem(*(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes))


def close(x, y, scale=1.0):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=1e-5 * scale)


def mha(p, implementation, **options):
    return flashjax.flash_mha(p.q, p.k, p.v, return_lse=True, implementation=implementation, **options)


@given(p=problems(), seed=st.integers(0, 9))
def test_order_of_keys_does_not_matter(p, seed, compiled):
    order = np.random.default_rng(seed).permutation(p.k.shape[1])
    out, lse = mha(p, compiled)
    out2, lse2 = mha(dataclasses.replace(p, k=p.k[:, order], v=p.v[:, order]), compiled)
    close(out, out2)
    close(lse, lse2)


@given(p=problems(), part=st.floats(0, 1), causal=st.booleans())
def test_parts_merge_by_lse(p, part, causal, compiled):
    """Attention to two parts of the keys, merged by their lse, is attention to all; causal by a bias of positions."""
    s, t = p.q.shape[1], p.k.shape[1]
    cut = round(part * t)
    hidden = np.arange(t)[None] > np.arange(s)[:, None] + (t - s)
    mask = jnp.asarray(np.where(hidden & causal, -np.inf, 0), jnp.float32)
    whole, lse = mha(p, compiled, is_causal=causal)
    outs, lses = zip(
        *(
            mha(dataclasses.replace(p, k=p.k[:, x], v=p.v[:, x]), compiled, bias=mask[:, x])
            for x in (slice(0, cut), slice(cut, t))
        ),
        strict=True,
    )
    merged = np.logaddexp(np.asarray(lses[0]), np.asarray(lses[1]))
    close(merged, lse)
    finite = np.where(np.isneginf(merged), 0, merged)
    out = sum(
        np.asarray(o) * np.exp(np.asarray(x) - finite).swapaxes(1, 2)[..., None]
        for o, x in zip(outs, lses, strict=True)
    )
    close(out, whole)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 17, 64, 65]), min_size=1, max_size=4),
    key_lengths=st.none() | st.lists(st.sampled_from([0, 1, 9, 64, 70]), min_size=4, max_size=4),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_packed_is_each_sequence_alone(lengths, key_lengths, causal, seed, compiled):
    keys = lengths if key_lengths is None else key_lengths[: len(lengths)]
    random = np.random.default_rng(seed)
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths, keys))
    q, k, v = (
        jnp.asarray(random.standard_normal((n, heads, 8)), jnp.float32)
        for n, heads in ((cu_q[-1], 4), (cu_k[-1], 2), (cu_k[-1], 2))
    )
    options = {"is_causal": causal, "return_lse": True, "implementation": compiled}
    out, lse = flashjax.flash_mha_varlen(q, k, v, jnp.asarray(cu_q), jnp.asarray(cu_k), **options)
    for i in range(len(lengths)):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one, one_lse = flashjax.flash_mha(q[None, rows], k[None, columns], v[None, columns], **options)
        close(out[rows], one[0])
        close(lse[:, rows], one_lse[0])


@given(p=problems(square=True), prefix=st.integers(1, 130))
def test_causal_prefix(p, prefix, compiled):
    """The first rows of a causal call do not know of later ones."""
    assume(prefix <= p.q.shape[1])
    out, lse = mha(p, compiled, is_causal=True)
    first = dataclasses.replace(p, q=p.q[:, :prefix], k=p.k[:, :prefix], v=p.v[:, :prefix])
    out2, lse2 = mha(first, compiled, is_causal=True)
    close(out[:, :prefix], out2)
    close(lse[..., :prefix], lse2)


@given(p=problems(), causal=st.booleans())
def test_groups_are_repeated_keys(p, causal, compiled):
    group = p.q.shape[2] // p.k.shape[2]
    repeated = dataclasses.replace(p, k=jnp.repeat(p.k, group, 2), v=jnp.repeat(p.v, group, 2))
    for x, y in zip(mha(p, compiled, is_causal=causal), mha(repeated, compiled, is_causal=causal), strict=True):
        close(x, y)


@given(p=problems(), scale=st.floats(-2, 2, width=32))
def test_scale_folds_into_q(p, scale, compiled):
    folded = dataclasses.replace(p, q=p.q * jnp.float32(scale))
    for x, y in zip(mha(p, compiled, softmax_scale=scale), mha(folded, compiled, softmax_scale=1.0), strict=True):
        close(x, y, scale=20)


@given(p=problems(), extra=st.integers(0, 2**20), left=st.booleans())
def test_wide_window_is_none(p, extra, left, compiled):
    reach = max(p.q.shape[1], p.k.shape[1]) + extra
    for x, y in zip(
        mha(p, compiled, window_size=(reach, -1) if left else (-1, reach)),
        mha(p, compiled),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@given(p=problems(), left=st.integers(0, 70), right=st.integers(0, 70), top_left=st.booleans())
def test_window_is_a_mask(p, left, right, top_left, compiled):
    s, t = p.q.shape[1], p.k.shape[1]
    offset = np.arange(t)[None] - np.arange(s)[:, None] - (0 if top_left else t - s)
    mask = jnp.where((offset >= -left) & (offset <= right), 0.0, -jnp.inf)
    alignment = {"causal_alignment": "top_left"} if top_left else {}
    for x, y in zip(mha(p, compiled, window_size=(left, right), **alignment), mha(p, compiled, bias=mask), strict=True):
        close(x, y)


@given(
    page=st.sampled_from([1, 2, 5, 16]),
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=2),
    seed=st.integers(0, 9),
)
def test_pages_are_a_cache(page, lengths, seed, compiled):
    """A paged cache is the contiguous one that it stores."""
    p = -(-40 // page)
    random = np.random.default_rng(seed)
    q = jnp.asarray(random.standard_normal((2, 3, 4, 8)), jnp.float32)
    pages = [jnp.asarray(random.standard_normal((2 * p + 1, page, 2, 8)), jnp.float32) for _ in range(2)]
    table = random.permutation(2 * p + 1)[: 2 * p].reshape(2, p).astype(np.int32)
    options = {
        "cache_seqlens": jnp.asarray(lengths, jnp.int32),
        "is_causal": True,
        "return_softmax_lse": True,
        "implementation": compiled,
    }
    paged = flashjax.flash_mha_with_kvcache(q, *pages, page_table=jnp.asarray(table), **options)
    caches = [x[table].reshape(2, p * page, 2, 8) for x in pages]
    for x, y in zip(paged, flashjax.flash_mha_with_kvcache(q, *caches, **options), strict=True):
        close(x, y)
