"""The meaning of the operation in numpy, and the rule by which results are compared with it.

Written from the documented semantics alone: it shares nothing with the package. Sequences are cut out first, so that
what lies outside of them is never touched; each one is then a dense softmax whose gradients are the textbook formulas.

`run(case, inputs)` works in float64. `run(..., naive=True)` is the yardstick of `compare`: the same formulas in
float32, with the weights, their gradients and every result rounded to the operand dtype.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cases import Case, Inputs


@dataclasses.dataclass
class Result:
    out: np.ndarray
    lse: np.ndarray
    grads: dict[str, np.ndarray]  # by argument name; empty without cotangents
    caches: tuple[np.ndarray, ...]  # k_cache and v_cache after the append; NaN where nobody wrote
    logit: float  # the largest finite |score|


class _Arithmetic:
    def __init__(self, dtype: np.dtype, naive: bool):
        self.real = np.float32 if naive else np.float64
        self.low = (lambda x: x.astype(dtype).astype(np.float32)) if naive else (lambda x: x)

    def load(self, x) -> np.ndarray:
        return np.asarray(x).astype(self.real)


@dataclasses.dataclass
class _Rules:
    scale: float
    softcap: float
    left: int | None
    right: int | None
    top_left: bool

    def sees(self, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Which keys each query may see, and the distance of each key from the query's own place."""
        offset = 0 if self.top_left else t - s
        sees = np.ones((s, t), bool)
        distance = np.zeros((s, t))
        for i in range(s):
            own = i + offset
            for_keys = np.arange(t)
            distance[i] = np.abs(for_keys - own)
            if self.left is not None:
                sees[i] &= for_keys >= own - self.left
            if self.right is not None:
                sees[i] &= for_keys <= own + self.right
        return sees, distance


def _rules(options, head_dim: int) -> _Rules:
    left, right = (None if x in (None, -1) else x for x in options.get("window_size", (-1, -1)))
    if options.get("is_causal", False):
        right = 0
    scale = options.get("softmax_scale")
    return _Rules(
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=options.get("softcap", 0.0),
        left=left,
        right=right,
        top_left=options.get("causal_alignment", "bottom_right") == "top_left",
    )


class _Sequence:
    """Attention of one sequence: q [s, h, d], k [t, g, d], v [t, g, e] without padding."""

    def __init__(self, arith, rules, q, k, v, bias=None, slopes=None, sinks=None, ids_q=None, ids_k=None, kept=None):
        low, real = arith.low, arith.real
        (s, h, _), (t, g, _) = q.shape, k.shape
        self.arith, self.rules, self.group = arith, rules, h // g
        self.q = q.transpose(1, 0, 2)  # [h, s, d]
        self.k = np.repeat(k.transpose(1, 0, 2), self.group, 0)  # [h, t, d]: head i reads head i // group
        self.v = np.repeat(v.transpose(1, 0, 2), self.group, 0)
        sees, self.distance = rules.sees(s, t)
        self.distance = self.distance.astype(real)
        if ids_q is not None:
            sees &= ids_q[:, None] == ids_k[None, :]
        x = self.q @ self.k.transpose(0, 2, 1) * real(rules.scale)
        self.logit = float(np.max(np.abs(x), initial=0.0))
        self.slope_of_cap = 1.0
        if rules.softcap:
            bent = np.tanh(x / real(rules.softcap))
            x = real(rules.softcap) * bent
            self.slope_of_cap = 1 - bent**2
        if bias is not None:
            x = x + bias
        if slopes is not None:
            x = x - slopes[:, None, None] * self.distance
        self.logit = max(self.logit, float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x) & sees)))
        x = np.where(sees, x, real(-np.inf))
        top = np.max(x, axis=-1, initial=-np.inf)
        if sinks is not None:
            top = np.maximum(top, sinks[:, None])
        safe = np.where(np.isfinite(top), top, 0)[..., None]
        p = np.exp(x - safe)
        total = p.sum(-1, keepdims=True)
        if sinks is not None:
            self.sink_weight = np.exp(sinks[:, None, None] - safe)
            total = total + self.sink_weight
        divisor = np.where(total > 0, total, 1)
        self.p = p / divisor
        if sinks is not None:
            self.sink_weight = (self.sink_weight / divisor)[..., 0]  # [h, s]
        self.kept = real(1) if kept is None else kept.astype(real)  # [h, s, t]: 0, or what makes up for the dropped
        self.out = low(low(self.p * self.kept) @ self.v)  # [h, s, e]
        with np.errstate(divide="ignore"):
            self.lse = np.where(total > 0, safe + np.log(total), -np.inf)[..., 0]

    def gradients(self, dout, dlse):
        """dout [s, h, e] and dlse [h, s]; the latter counts only where the lse is finite."""
        low, real, group = self.arith.low, self.arith.real, self.group
        dout = dout.transpose(1, 0, 2)
        dlse = np.where(np.isneginf(self.lse), 0, dlse)
        surplus = dlse - (dout * self.out).sum(-1)  # [h, s]
        dx = self.p * (
            dout @ self.v.transpose(0, 2, 1) * self.kept + surplus[..., None]
        )  # of the scores as softmax sees them
        grads = {"bias": dx, "alibi_slopes": -(dx * self.distance).sum((1, 2))}
        if hasattr(self, "sink_weight"):
            grads["sinks"] = (self.sink_weight * surplus).sum(-1)
        raw = low(dx * self.slope_of_cap)
        scale = real(self.rules.scale)

        def per_kv_head(x):  # [h, t, ·] -> [t, g, ·]
            return low(x.reshape(len(x) // group, group, *x.shape[1:]).sum(1)).transpose(1, 0, 2)

        grads["q"] = low(raw @ self.k * scale).transpose(1, 0, 2)
        grads["k"] = per_kv_head(raw.transpose(0, 2, 1) @ self.q * scale)
        grads["v"] = per_kv_head(low(self.p * self.kept).transpose(0, 2, 1) @ dout)
        return grads


def _philox(counter, key):
    """Philox 4x32 of Salmon et al. (2011), 7 rounds: arrays of four counter words, and two words of key."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, np.uint64) for x in counter]
    k = [np.uint64(x) for x in key]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & mask, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c


def _kept(options, seed, n, s, t):
    """[h, s, t]: what dropout multiplies the weights of sequence n of a row by; seed [h, 2].

    A block of 16 queries and 32 keys has one counter for each lane of a warp: lane 4 r + c has the queries r and r + 8
    and of each eight keys the two at 2 c. Its 16 bytes are in the order: eights of keys, queries, keys.
    """
    if seed is None:
        return None
    keep = round(256 * (1 - options["dropout_rate"]))
    rows, columns = -(-s // 16), -(-t // 32)
    block_row, block_column, lane = np.meshgrid(np.arange(rows), np.arange(columns), np.arange(32), indexing="ij")
    result = np.empty((len(seed), rows, 2, 8, columns, 4, 4, 2))  # (queries: 8s, in 8), (keys: 8s, lanes, in lane)
    for head, key in enumerate(seed):
        words = _philox([32 * n + lane, 0 * lane, block_row, block_column], key)
        octets = np.stack(words, -1).astype("<u4")[..., None].view(np.uint8)  # [rows, columns, 32, 4, 4]
        octets = octets.reshape(rows, columns, 8, 4, 4, 2, 2)  # r, c, eights of keys, queries, keys
        result[head] = np.where(octets < keep, 256 / keep, 0).transpose(0, 5, 2, 1, 4, 3, 6)
    return result.reshape(len(seed), 16 * rows, 32 * columns)[:, :s, :t]


def _seeds(arrays, b, h):
    """The words that the key stands for: uint32 [b, h, 2]."""
    if "dropout_key" not in arrays:
        return [None] * b
    return np.asarray(jax.random.bits(jnp.asarray(arrays["dropout_key"]), (b, h, 2), jnp.uint32))


def _rotate(arith, x, cos, sin, positions, interleaved):
    """x [rows, heads, dim]: pairs of the first 2 * cos.shape[1] dims turn by the angle of the row's position."""
    half = cos.shape[1]
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + 1 if interleaved else first + half
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    y = x.copy()
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., first] * s + x[..., second] * c
    return arith.low(y)


def run(case: Case, inputs: Inputs, cotangents=None, naive: bool = False) -> Result:
    """`cotangents` is (dout, dlse), shaped as the public function's results."""
    arith = _Arithmetic(inputs.arrays["q"].dtype, naive)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return {"dense": _dense, "packed": _packed, "cached": _cached}[case.layout](arith, inputs, cotangents)


def _ids(arrays):
    ids = arrays.get("segment_ids")
    return ids if isinstance(ids, tuple) else (ids, ids)


def _zeros(arith, arrays, names=("q", "k", "v", "bias", "alibi_slopes", "sinks")):
    return {name: np.zeros(arrays[name].shape, arith.real) for name in names if name in arrays}


def _accumulate(target: np.ndarray, gradient: np.ndarray):
    """Adds `gradient` to a smaller array that was broadcast to its shape."""
    missing = gradient.ndim - target.ndim
    gradient = gradient.sum(tuple(range(missing)))
    axes = tuple(i for i, n in enumerate(target.shape) if n == 1 and gradient.shape[i] != 1)
    target += gradient.sum(axes, keepdims=True)


def _rounded(arith, gradient, like):
    return gradient if arith.real == np.float64 else gradient.astype(like.dtype).astype(arith.real)


def _broadcast_bias(arrays, arith, shape):
    if "bias" not in arrays:
        return None
    return np.broadcast_to(arith.load(arrays["bias"]), shape)


def _dense(arith, inputs, cotangents):
    arrays = inputs.arrays
    q, k, v = (arith.load(arrays[name]) for name in "qkv")
    (b, s, h, d), t, e = q.shape, k.shape[1], v.shape[3]
    rules = _rules(inputs.options, d)
    bias = _broadcast_bias(arrays, arith, (b, h, s, t))
    slopes = np.broadcast_to(arith.load(arrays["alibi_slopes"]), (b, h)) if "alibi_slopes" in arrays else None
    sinks = arith.load(arrays["sinks"]) if "sinks" in arrays else None
    ids_q, ids_k = _ids(arrays)
    seeds = _seeds(arrays, b, h)
    out, lse = np.zeros((b, s, h, e), arith.real), np.full((b, h, s), -np.inf, arith.real)
    grads = _zeros(arith, arrays) if cotangents else {}
    dbias = np.zeros((b, h, s, t), arith.real)
    dslopes = np.zeros((b, h), arith.real)
    logit = 0.0
    for i in range(b):
        one = _Sequence(
            arith,
            rules,
            q[i],
            k[i],
            v[i],
            bias=None if bias is None else bias[i],
            slopes=None if slopes is None else slopes[i],
            sinks=sinks,
            ids_q=None if ids_q is None else ids_q[i],
            ids_k=None if ids_k is None else ids_k[i],
            kept=_kept(inputs.options, seeds[i], 0, s, t),
        )
        out[i], lse[i] = one.out.transpose(1, 0, 2), one.lse
        logit = max(logit, one.logit)
        if cotangents:
            part = one.gradients(arith.load(cotangents[0][i]), arith.load(cotangents[1][i]))
            for name in "qkv":
                grads[name][i] = part[name]
            dbias[i], dslopes[i] = part["bias"], part["alibi_slopes"]
            if sinks is not None:
                grads["sinks"] += part["sinks"]
    if "bias" in grads:
        _accumulate(grads["bias"], dbias)
        grads["bias"] = _rounded(arith, grads["bias"], arrays["bias"])
    if "alibi_slopes" in grads:
        _accumulate(grads["alibi_slopes"], dslopes)
    return Result(out, lse, grads, (), logit)


def _packed(arith, inputs, cotangents):
    arrays = inputs.arrays
    q, k, v = (arith.load(arrays[name]) for name in "qkv")
    (s, h, d), e = q.shape, v.shape[2]
    cu_q = arrays["cu_seqlens_q"]
    cu_k = arrays.get("cu_seqlens_k", cu_q)
    n = len(cu_q) - 1
    used_q = arrays.get("seqused_q", np.diff(cu_q))
    used_k = arrays.get("seqused_k", np.diff(cu_k))
    rules = _rules(inputs.options, d)
    bias = None
    if "bias" in arrays:
        bias = _broadcast_bias(arrays, arith, (n, h, inputs.options["max_seqlen_q"], inputs.options["max_seqlen_k"]))
    slopes = arith.load(arrays["alibi_slopes"]) if "alibi_slopes" in arrays else None
    sinks = arith.load(arrays["sinks"]) if "sinks" in arrays else None
    ids_q, ids_k = _ids(arrays)
    (seed,) = _seeds(arrays, 1, h)
    out, lse = np.zeros((s, h, e), arith.real), np.full((h, s), -np.inf, arith.real)
    grads = _zeros(arith, arrays) if cotangents else {}
    dbias = None if bias is None else np.zeros(bias.shape, arith.real)
    logit = 0.0
    for i in range(n):
        rows = slice(cu_q[i], cu_q[i] + used_q[i])
        keys = slice(cu_k[i], cu_k[i] + used_k[i])
        corner = (i, slice(None), slice(0, used_q[i]), slice(0, used_k[i]))
        one = _Sequence(
            arith,
            rules,
            q[rows],
            k[keys],
            v[keys],
            bias=None if bias is None else bias[corner],
            slopes=slopes,
            sinks=sinks,
            ids_q=None if ids_q is None else ids_q[rows],
            ids_k=None if ids_k is None else ids_k[keys],
            kept=_kept(inputs.options, seed, i, used_q[i], used_k[i]),
        )
        out[rows], lse[:, rows] = one.out.transpose(1, 0, 2), one.lse
        logit = max(logit, one.logit)
        if cotangents:
            part = one.gradients(arith.load(cotangents[0][rows]), arith.load(cotangents[1][:, rows]))
            grads["q"][rows], grads["k"][keys], grads["v"][keys] = part["q"], part["k"], part["v"]
            if dbias is not None:
                dbias[corner] = part["bias"]
            for name in ("alibi_slopes", "sinks"):
                if name in grads:
                    grads[name] += part[name]
    if dbias is not None and cotangents:
        _accumulate(grads["bias"], dbias)
        grads["bias"] = _rounded(arith, grads["bias"], arrays["bias"])
    return Result(out, lse, grads, (), logit)


def _cached(arith, inputs, cotangents):
    assert cotangents is None, "the cached function is not trained through"
    arrays, options = inputs.arrays, inputs.options
    q, k_cache, v_cache = (arith.load(arrays[name]) for name in ("q", "k_cache", "v_cache"))
    b, s, h, d = q.shape
    e = v_cache.shape[3]
    rules = _rules(options, d)
    table = arrays.get("page_table")
    page = k_cache.shape[1]
    capacity = page if table is None else page * table.shape[1]
    lengths = np.broadcast_to(arrays.get("cache_seqlens", np.int32(capacity)), (b,))
    pad = arrays.get("cache_leftpad", np.zeros(b, np.int32))
    entry = arrays.get("cache_batch_idx", np.arange(b))
    new = arrays["k"].shape[1] if "k" in arrays else 0
    bias = _broadcast_bias(arrays, arith, (b, h, s, capacity))
    slopes = np.broadcast_to(arith.load(arrays["alibi_slopes"]), (b, h)) if "alibi_slopes" in arrays else None
    sinks = arith.load(arrays["sinks"]) if "sinks" in arrays else None
    out, lse = np.zeros((b, s, h, e), arith.real), np.full((b, h, s), -np.inf, arith.real)
    logit = 0.0

    def place(i, position):
        if table is None:
            return entry[i], position
        return table[i, position // page], position % page

    own_place = rules.left is not None or rules.right is not None  # causal or windowed: queries turn by their own place
    for i in range(b):
        queries = q[i]
        if "rotary_cos" in arrays:
            cos, sin = arith.load(arrays["rotary_cos"]), arith.load(arrays["rotary_sin"])
            interleaved = options.get("rotary_interleaved", True)
            at = lengths[i] + (np.arange(s) if own_place else np.zeros(s, int))
            queries = _rotate(arith, queries, cos, sin, at, interleaved)
        if new:
            fresh_k, fresh_v = arith.load(arrays["k"][i]), arith.load(arrays["v"][i])
            if "rotary_cos" in arrays:
                fresh_k = _rotate(arith, fresh_k, cos, sin, lengths[i] + np.arange(new), interleaved)
            for j in range(new):
                k_cache[place(i, lengths[i] + j)] = fresh_k[j]
                v_cache[place(i, lengths[i] + j)] = fresh_v[j]
        count = lengths[i] + new
        where = [place(i, j) for j in range(pad[i], count)]
        keys = np.array([k_cache[x] for x in where]).reshape(-1, *k_cache.shape[2:])
        values = np.array([v_cache[x] for x in where]).reshape(-1, *v_cache.shape[2:])
        one = _Sequence(
            arith,
            rules,
            queries,
            keys,
            values,
            bias=None if bias is None else bias[i, :, :, : count - pad[i]],
            slopes=None if slopes is None else slopes[i],
            sinks=sinks,
        )
        out[i], lse[i] = one.out.transpose(1, 0, 2), one.lse
        logit = max(logit, one.logit)
    return Result(out, lse, {}, (k_cache, v_cache), logit)


# -------------------------------------------------------------------------------------------------------- comparison


def check(case: Case, inputs: Inputs, results=(), cotangents=None, grads=None) -> None:
    """Raises AssertionError unless a call gave what it should: (out, lse, k_cache, v_cache), as far as `results` goes,
    and gradients by name. What the caches held must have kept its bits."""
    expected, naive = (run(case, inputs, cotangents, naive=x) for x in (False, True))
    for name, got in zip(("out", "lse"), results, strict=False):
        compare(name, got, getattr(expected, name), getattr(naive, name), expected.logit)
    caches = zip(("k_cache", "v_cache"), results[2:], expected.caches, naive.caches, strict=False)
    for name, cache, want, rounded in caches:
        compare(name, cache, want, rounded)
        before = inputs.arrays[name]
        held = ~np.isnan(before)
        same_bits(np.asarray(cache)[held], before[held], f"what {name} held")
    if grads is not None:
        assert grads.keys() == expected.grads.keys()
        for name, grad in grads.items():
            assert grad.dtype == inputs.arrays[name].dtype
            # That of the sinks is a sum of what `out` had been rounded to.
            given = inputs.arrays["q"].dtype if name == "sinks" else grad.dtype
            compare(f"gradient of {name}", grad, expected.grads[name], naive.grads[name], expected.logit, given)


def same_bits(x, y, what: str) -> None:
    """Raises AssertionError unless the two arrays hold the same bytes."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    differ = np.ascontiguousarray(x).view(f"u{x.itemsize}") != np.ascontiguousarray(y).view(f"u{y.itemsize}")
    assert not differ.any(), f"{what}: {differ.sum()} of {x.size} differ, first at {np.argwhere(differ)[0].tolist()}"


_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def compare(name: str, got, expected: np.ndarray, naive: np.ndarray, logit: float = 0.0, given=None) -> None:
    """Raises AssertionError unless `got` is as good as can be asked of its dtype.

    NaN and infinities must sit exactly where they are expected. The largest error may be twice that of the naive
    computation plus a floor, the mean error one and a half times plus a smaller floor. The floor: some units of
    float32 at the size of the result, more where scores are large, since an error of one unit in a score is a relative
    error of that size in its weight; and a fraction of a unit of the result's dtype, or of the dtype of what was
    `given`. Of few numbers the errors scatter, and both of these factors are wider: 4 times for one, 1.75 times for
    sixteen, hardly for thousands.
    """
    got = np.asarray(got)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    unit = _UNIT[np.dtype(given or got.dtype).name]
    got = got.astype(np.float64)
    for what, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(test(got) != test(expected))
        assert not len(wrong), (
            f"{name}: {what} at {len(wrong)} wrong places of {got.size}, first {tuple(wrong[0].tolist())}: "
            f"got {got[tuple(wrong[0])]}, expected {expected[tuple(wrong[0])]}"
        )
    finite = np.isfinite(expected)
    if not finite.any():
        return
    size = np.abs(expected[finite])
    error = np.abs(got[finite] - expected[finite])
    naive_error = np.abs(naive.astype(np.float64)[finite] - expected[finite])
    float_unit = 2 * _UNIT["float32"] * (16 + logit)
    scatter = 1 + 3 / np.sqrt(len(size))
    for which, number, factor, extra in (("largest", np.max, 2.0, 1.0), ("mean", np.mean, 1.5, 0.5)):
        scale = number(size)
        floor = extra * (float_unit * (scale + 0.5) + (0.25 * unit * scale if unit > 1e-6 else 0.0))
        limit = factor * scatter * number(naive_error) + floor
        if not number(error) <= limit:
            at = np.unravel_index(
                np.argmax(np.where(finite, np.abs(got - np.where(finite, expected, 0)), -1)), got.shape
            )
            raise AssertionError(
                f"{name}: {which} error {number(error):.3g} > {limit:.3g} (naive {number(naive_error):.3g}, size "
                f"{scale:.3g}); worst at {tuple(map(int, at))}: got {got[at]:.9g}, expected {expected[at]:.9g}"
            )
