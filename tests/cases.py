"""The cases: one list, read by the tests and by the benchmarks. Needs numpy and ml_dtypes only.

A case names its problem, its options and the reason for which it exists; `Case.build` makes its inputs, a function of
the case's id alone. Whatever lies outside the valid lengths is filled with NaN, so that a kernel that reads it shows.

Letters as everywhere: b batch, s queries, t keys, h query heads, g key/value heads, d q/k dim, e v dim, n sequences.
"""

import dataclasses
import math
import zlib

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
FUNCTION = {"dense": "flash_mha", "packed": "flash_mha_varlen", "cached": "flash_mha_with_kvcache"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one call of the public function takes, by argument name."""

    arrays: dict[str, object]  # numpy arrays; `segment_ids` may be a pair of them
    options: dict[str, object]  # Python values, static under jit

    def without(self, *names: str, **replace) -> "Inputs":
        drop = set(names) | set(replace)
        arrays = {k: v for k, v in self.arrays.items() if k not in drop}
        options = {k: v for k, v in self.options.items() if k not in drop}
        for name, value in replace.items():
            (arrays if isinstance(value, np.ndarray) else options)[name] = value
        return Inputs(arrays, options)


@dataclasses.dataclass(frozen=True)
class Case:
    id: str
    reason: str
    layout: str = "dense"
    b: int = 2
    s: int = 33  # packed: rows of q in all
    t: int = 33  # packed: rows of k in all; cached: capacity of one sequence
    h: int = 4
    g: int = 2
    d: int = 16
    e: int | None = None  # None: d
    dtype: str = "float32"
    # scores
    scale: float | None = None
    causal: bool = False
    window: tuple[int | None, int | None] = (-1, -1)
    alignment: str = "bottom_right"
    softcap: float = 0.0
    bias: str | None = None  # a letter or 1 for each dimension, as in "b 1 s t"; b is n when packed
    bias_values: str = "normal"  # "holes": a third is -inf; "rows": every third query has -inf everywhere
    bias_dtype: str | None = None
    alibi: str | None = None  # "h" or "b h"
    sinks: str | None = None  # "normal"; "low": far below the scores; "high": far above them
    dropout: float = 0.0
    segments: str | None = None  # "same": documents in order; "pair": shuffled ids, unequal on the two sides
    # packed
    cu_q: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None  # None: the caller leaves cu_seqlens_k out
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    promised: bool = False  # the caller gives max_seqlen_q and max_seqlen_k, as always with a bias
    # cached
    lengths: tuple[int, ...] | int | None = None
    new: int = 0  # keys appended to each sequence
    leftpad: tuple[int, ...] | None = None
    batch_idx: tuple[int, ...] | None = None
    page: int = 0  # rows of one page; 0: not paged
    rotary: int = 0  # leading dims that turn
    interleaved: bool = True
    num_splits: int = 0
    # values
    q_gain: float = 1.0
    kv_equal: bool = False  # all keys equal: every visible key has the same weight
    inert: tuple[str, ...] = ()  # features that are set and must change nothing
    declined_by: tuple[str, ...] = ()  # implementations that say that they cannot; the reference takes everything

    @property
    def v_dim(self) -> int:
        return self.d if self.e is None else self.e

    @property
    def function(self) -> str:
        return FUNCTION[self.layout]

    @property
    def seed(self) -> int:
        return zlib.crc32(self.id.encode())

    @property
    def sequences(self) -> int:
        return len(self.cu_q) - 1 if self.layout == "packed" else self.b

    @property
    def longest(self) -> tuple[int, int]:
        """The extents of a bias in s and t, and the lengths that are promised."""
        if self.layout != "packed":
            return self.s, self.t
        return max(np.diff(self.cu_q), default=0), max(np.diff(self.cu_k or self.cu_q), default=0)

    @property
    def features(self) -> tuple[str, ...]:
        """The options that are on, by the names that `disabled` knows."""
        on = {
            "scale": self.scale is not None,
            "causal": self.causal,
            "window": self.window != (-1, -1),
            "alignment": self.alignment != "bottom_right",
            "softcap": self.softcap > 0,
            "bias": self.bias is not None,
            "alibi": self.alibi is not None,
            "sinks": self.sinks is not None,
            "segments": self.segments is not None,
            "dropout": self.dropout > 0,
            "used_q": self.used_q is not None,
            "used_k": self.used_k is not None,
            "cu_k": self.cu_k is not None,
            "leftpad": self.leftpad is not None,
            "batch_idx": self.batch_idx is not None,
            "lengths": self.lengths is not None,
            "new": self.new > 0,
            "rotary": self.rotary > 0,
            "interleaved": self.rotary > 0,
        }
        return tuple(name for name, value in on.items() if value)

    def disabled(self, feature: str, inputs: Inputs) -> Inputs:
        """The same inputs with one option off (or, where it has no off, with its other value)."""
        match feature:
            case "scale":
                return inputs.without("softmax_scale")
            case "causal":
                return inputs.without("is_causal")
            case "window":
                return inputs.without("window_size")
            case "alignment":
                return inputs.without("causal_alignment")
            case "interleaved":
                return inputs.without(rotary_interleaved=not self.interleaved)
            case "rotary":
                return inputs.without("rotary_cos", "rotary_sin")
            case "new":
                return inputs.without("k", "v", "rotary_cos", "rotary_sin")
            case "dropout":
                return inputs.without("dropout_rate", "dropout_key")
            case "batch_idx":
                return inputs.without(cache_batch_idx=np.arange(self.b, dtype=np.int32))
            case "cu_k":
                return inputs.without(cu_seqlens_k=inputs.arrays["cu_seqlens_q"])
        name = {
            "alibi": "alibi_slopes",
            "segments": "segment_ids",
            "used_q": "seqused_q",
            "used_k": "seqused_k",
            "leftpad": "cache_leftpad",
            "lengths": "cache_seqlens",
        }
        return inputs.without(name.get(feature, feature))

    def build(self) -> Inputs:
        random = np.random.default_rng(self.seed)
        return getattr(self, f"_build_{self.layout}")(random)

    def _normal(self, random, *shape, gain=1.0):
        return (gain * random.standard_normal(shape)).astype(np.float32).astype(DTYPES[self.dtype])

    def _options(self) -> dict[str, object]:
        options = {}
        if self.scale is not None:
            options["softmax_scale"] = self.scale
        if self.causal:
            options["is_causal"] = True
        if self.window != (-1, -1):
            options["window_size"] = self.window
        if self.alignment != "bottom_right":
            options["causal_alignment"] = self.alignment
        if self.softcap:
            options["softcap"] = self.softcap
        if self.dropout:
            options["dropout_rate"] = self.dropout
        return options

    def _score_arrays(self, random) -> dict[str, object]:
        arrays = {}
        if self.bias is not None:
            s, t = self.longest
            extent = {"b": self.sequences, "h": self.h, "s": s, "t": t, "1": 1}
            letters = self.bias.split()
            bias = random.standard_normal([extent[x] for x in letters])
            if self.bias_values == "holes":
                bias[random.random(bias.shape) < 1 / 3] = -np.inf
            elif self.bias_values == "rows":
                np.moveaxis(bias, letters.index("s"), 0)[::3] = -np.inf
            self._poison_bias(bias, letters)
            arrays["bias"] = bias.astype(np.float32).astype(DTYPES[self.bias_dtype or self.dtype])
        if self.alibi is not None:
            slopes = 2.0 ** -np.linspace(1, 6, self.h)
            if self.alibi == "b h":
                slopes = slopes * np.linspace(1, 2, self.b)[:, None]
            arrays["alibi_slopes"] = slopes.astype(np.float32)
        if self.dropout:
            arrays["dropout_key"] = random.integers(0, 2**32, 2, np.uint32)  # as jax.random.PRNGKey makes them
        if self.sinks is not None:
            centre = {"normal": 1.0, "low": -60.0, "high": 40.0}[self.sinks]
            arrays["sinks"] = (centre + random.standard_normal(self.h)).astype(np.float32)
        if self.segments is not None:
            shape = [(self.b, x) for x in (self.s, self.t)] if self.layout == "dense" else [(self.s,), (self.t,)]
            if self.segments == "same":
                ids = np.sort(random.integers(-1, 4, shape[0]), axis=-1)
                arrays["segment_ids"] = ids.astype(np.int32)
            else:
                arrays["segment_ids"] = tuple(
                    random.integers(0, 3 + i, x).astype(np.int32) for i, x in enumerate(shape)
                )
        return arrays

    def _poison_bias(self, bias, letters):
        """NaN where a sequence has no such query or key, as far as the dims of the bias can tell."""
        if letters[0] != "b" or self.layout == "dense":
            return
        for i in range(self.sequences):
            if self.layout == "packed":
                queries = np.diff(self.cu_q)[i] if self.used_q is None else self.used_q[i]
                keys = np.diff(self.cu_k or self.cu_q)[i] if self.used_k is None else self.used_k[i]
            else:
                queries, keys = self.s, np.broadcast_to(self.lengths, self.b)[i] + self.new
                keys -= self.leftpad[i] if self.leftpad else 0
            if letters[2] == "s":
                bias[i, :, queries:] = np.nan
            if letters[3] == "t":
                bias[i, :, :, keys:] = np.nan

    def _build_dense(self, random) -> Inputs:
        q = self._normal(random, self.b, self.s, self.h, self.d, gain=self.q_gain)
        k = self._normal(random, self.b, self.t, self.g, self.d)
        v = self._normal(random, self.b, self.t, self.g, self.v_dim)
        if self.kv_equal:
            k[:] = k[:, :1]
        return Inputs({"q": q, "k": k, "v": v, **self._score_arrays(random)}, self._options())

    def _build_packed(self, random) -> Inputs:
        q = self._normal(random, self.s, self.h, self.d, gain=self.q_gain)
        k = self._normal(random, self.t, self.g, self.d)
        v = self._normal(random, self.t, self.g, self.v_dim)
        inside_q, inside_k = np.zeros(self.s, bool), np.zeros(self.t, bool)
        for i in range(self.sequences):
            for inside, cu, used in (
                (inside_q, self.cu_q, self.used_q),
                (inside_k, self.cu_k or self.cu_q, self.used_k),
            ):
                end = cu[i + 1] if used is None else cu[i] + used[i]
                inside[cu[i] : end] = True
        q[~inside_q] = np.nan
        k[~inside_k] = np.nan
        v[~inside_k] = np.nan
        arrays = {"q": q, "k": k, "v": v, "cu_seqlens_q": np.asarray(self.cu_q, np.int32)}
        for name, value in (("cu_seqlens_k", self.cu_k), ("seqused_q", self.used_q), ("seqused_k", self.used_k)):
            if value is not None:
                arrays[name] = np.asarray(value, np.int32)
        options = self._options()
        if self.bias is not None or self.promised:
            longest = self.longest
            options |= {"max_seqlen_q": int(longest[0]), "max_seqlen_k": int(longest[1])}
        return Inputs({**arrays, **self._score_arrays(random)}, options)

    def _build_cached(self, random) -> Inputs:
        q = self._normal(random, self.b, self.s, self.h, self.d, gain=self.q_gain)
        arrays = {"q": q}
        lengths = np.broadcast_to(np.asarray(self.t if self.lengths is None else self.lengths), (self.b,))
        pad = np.broadcast_to(np.asarray(self.leftpad or 0), (self.b,))
        entries = self.b + 2 if self.batch_idx is not None else self.b
        caches = []
        for dim in (self.d, self.v_dim):
            cache = np.full((entries, self.t, self.g, dim), np.nan, np.float32).astype(DTYPES[self.dtype])
            for i in range(self.b):
                row = self.batch_idx[i] if self.batch_idx is not None else i
                cache[row, pad[i] : lengths[i]] = self._normal(random, lengths[i] - pad[i], self.g, dim)
            caches.append(cache)
        if self.page:
            used = math.ceil(self.t / self.page)
            assert used * self.page == self.t, "the capacity is whole pages"
            count = self.b * used + 3
            ids = random.permutation(count)[: self.b * used].reshape(self.b, used)
            for which, cache in enumerate(caches):
                pages = np.full((count, self.page, *cache.shape[2:]), np.nan, np.float32).astype(cache.dtype)
                pages[ids] = cache.reshape(self.b, used, self.page, *cache.shape[2:])
                caches[which] = pages
            table = ids.astype(np.int32)
            for i in range(self.b):  # entries that no key needs may hold anything
                needed = math.ceil((lengths[i] + self.new) / self.page)
                table[i, needed:] = random.choice([-1, 10**6, np.iinfo(np.int32).max, count], used - needed)
            arrays["page_table"] = table
        arrays |= {"k_cache": caches[0], "v_cache": caches[1]}
        if self.new:
            arrays["k"] = self._normal(random, self.b, self.new, self.g, self.d)
            arrays["v"] = self._normal(random, self.b, self.new, self.g, self.v_dim)
        if self.lengths is not None:
            arrays["cache_seqlens"] = np.asarray(self.lengths, np.int32)
        if self.leftpad is not None:
            arrays["cache_leftpad"] = np.asarray(self.leftpad, np.int32)
        if self.batch_idx is not None:
            arrays["cache_batch_idx"] = np.asarray(self.batch_idx, np.int32)
        options = self._options()
        if self.rotary:
            turns = np.arange(self.t + self.s)[:, None] * 10.0 ** -np.linspace(0, 2, self.rotary // 2)
            arrays["rotary_cos"] = np.cos(turns).astype(np.float32).astype(DTYPES[self.dtype])
            arrays["rotary_sin"] = np.sin(turns).astype(np.float32).astype(DTYPES[self.dtype])
            options["rotary_interleaved"] = self.interleaved
        if self.num_splits:
            options["num_splits"] = self.num_splits
        return Inputs({**arrays, **self._score_arrays(random)}, options)


def cotangents(case: Case, inputs: Inputs, lse: np.ndarray):
    """(dout, dlse) of a case. NaN in dlse where lse is -inf, as a loss that reads it gives; NaN in both outside."""
    random = np.random.default_rng(case.seed + 1)
    q, v = inputs.arrays["q"], inputs.arrays["v"]
    dout = random.standard_normal((*q.shape[:-1], v.shape[-1])).astype(np.float32).astype(q.dtype)
    dlse = random.standard_normal(lse.shape).astype(np.float32)
    dlse[np.isneginf(lse)] = np.nan
    dout[np.isnan(q).all((-1, -2))] = np.nan  # the builder marks the rows outside every sequence
    return dout, dlse


# --------------------------------------------------------------------------------------------------------- the list


def _dense():
    for dtype in DTYPES:
        yield Case(f"plain-{dtype}", "the plain call in each dtype", s=65, t=65, d=64, dtype=dtype)
        yield Case(f"causal-{dtype}", "the training call in each dtype", s=129, t=129, d=64, causal=True, dtype=dtype)
    lengths = [
        (1, 1, False, "one query, one key: the weight is 1 and its gradient 0"),
        (1, 257, True, "one query sits on the last key, whatever the length: causal hides nothing"),
        (2, 1, True, "one key, more queries than keys"),
        (63, 64, True, "one short of a block of queries"),
        (64, 65, False, "one key past a block"),
        (65, 63, False, "one query past a block"),
        (127, 129, True, "around a block of 128"),
        (128, 128, True, "exactly one block: no tail to mask"),
        (192, 192, False, "64 past a block of 128: NaN in the gradient of q elsewhere"),
        (255, 257, False, "around two blocks of 128"),
        (257, 255, True, "more queries than keys around two blocks"),
        (300, 513, True, "several blocks and a tail on both sides"),
        (513, 300, False, "several blocks and a tail on both sides, longer in q"),
        (17, 23, False, "primes, shorter than any block"),
        (101, 103, True, "primes, between blocks"),
        (113, 7, False, "hardly any key for many queries"),
    ]
    for i, (s, t, causal, reason) in enumerate(lengths):
        dtype = "bfloat16" if i % 5 == 4 else "float32"
        inert = ("causal",) if s == 1 else ()
        yield Case(f"length-{s}x{t}", reason, b=1, s=s, t=t, h=2, g=1, causal=causal, dtype=dtype, inert=inert)
    yield Case("no-keys", "t = 0: every row sees nothing", t=0)
    yield Case("no-keys-causal", "t = 0 under a mask, by kernels that size their sections by the keys", t=0,
               causal=True, dtype="bfloat16", inert=("causal",))  # fmt: skip
    yield Case("no-keys-sinks", "t = 0 with sinks: the lse is the sink", t=0, sinks="normal")
    yield Case("no-queries", "s = 0: empty results, zero gradients of k and v", s=0)
    yield Case("no-queries-causal", "s = 0 under a mask", s=0, causal=True, dtype="bfloat16", inert=("causal",))
    yield Case("no-batch", "b = 0: everything is empty", b=0)

    dims = [
        (1, None, "float32", "the smallest head"),
        (5, None, "float32", "odd: rows are not even aligned to two elements"),
        (40, None, "bfloat16", "not a power of two, a multiple of 8"),
        (48, None, "bfloat16", "a multiple of 16, no power of two: wrong gradients elsewhere"),
        (72, 72, "float16", "not a multiple of 16"),
        (80, None, "bfloat16", "as 48"),
        (96, None, "bfloat16", "between the usual sizes"),
        (112, None, "float16", "as 48"),
        (128, None, "bfloat16", "the usual size"),
        (256, None, "float16", "the largest usual size"),
        (512, None, "float32", "larger than any tile"),
        (192, 128, "bfloat16", "latent attention: v is narrower"),
        (64, 256, "float32", "v is much wider"),
        (128, 64, "float16", "v is half as wide"),
        (33, 7, "float32", "odd and unequal"),
        (576, 512, "float32", "latent attention in absorbed form"),
    ]
    for d, e, dtype, reason in dims:
        name = f"dim-{d}" if e in (None, d) else f"dim-{d}-{e}"
        declined = ("cpu",) if d > 512 else ()
        yield Case(
            name, reason, b=1, s=35, t=67, h=2, g=1, d=d, e=e, dtype=dtype, causal=d % 2 == 0, declined_by=declined
        )

    for h, g, reason in [
        (1, 1, "a single head"),
        (4, 4, "no grouping"),
        (8, 2, "four query heads share a key head"),
        (6, 3, "two share, a head count that is no power of two"),
        (8, 1, "one key head for all"),
        (7, 1, "a prime number of heads on one key head"),
    ]:
        yield Case(f"heads-{h}-{g}", reason, s=39, t=41, h=h, g=g, causal=True)
    # More key tiles than a GPU has multiprocessors: a block goes on to other heads, and adds to what others began.
    many = dict(b=5, h=16, dtype="bfloat16")
    yield Case("many-heads", "several key tiles for each block", **many, g=16, s=130, t=257, d=128)
    yield Case(
        "many-heads-causal", "as before, with groups and unequal tiles", **many, g=8, s=130, t=400, d=64, causal=True
    )
    yield Case("many-heads-window", "as before, with query tiles that nothing visits", **many, g=16, s=300, t=150, d=64,
               window=(20, 10))  # fmt: skip
    # Values that are narrower than keys, over several tiles of both.
    narrow = dict(b=2, d=192, e=128, dtype="bfloat16")
    yield Case("narrow-values", "no mask, a ragged last tile of keys", **narrow, s=130, t=250, h=2, g=2)
    yield Case("narrow-values-causal", "as before, with groups", **narrow, s=250, t=340, h=4, g=2, causal=True)
    yield Case("narrow-values-window", "as before, with rows without keys", **narrow, s=300, t=150, h=2, g=1,
               window=(20, 10))  # fmt: skip
    yield Case("narrow-values-bias", "scores that are bent, in more than one tile", **narrow, s=130, t=210, h=2, g=1,
               bias="b h s t", window=(150, 0))  # fmt: skip
    yield Case("narrow-values-packed", "sequences of several tiles", **(narrow | {"b": 1}), layout="packed", s=400,
               t=500, h=4, g=2, cu_q=(0, 140, 141, 400), cu_k=(0, 250, 300, 500), causal=True)  # fmt: skip
    # The forward's other tiles on Hopper, which take more than one to a multiprocessor.
    tall = dict(b=5, h=14, g=7, d=128, dtype="bfloat16")
    yield Case("many-heads-tall", "tiles of 192 queries", **tall, s=190, t=210)
    yield Case("many-heads-tall-causal", "as before, whose rows end in three blocks", **tall, s=190, t=270, causal=True)
    yield Case("many-heads-tall-window", "as before, with rows without keys", **tall, s=190, t=150, window=(40, 0))
    yield Case("many-heads-short", "tiles of 128 queries", **tall, s=120, t=200, causal=True)
    yield Case("heads-8-2-bfloat16", "key gradients of a group add up before they round", h=8, t=65, dtype="bfloat16")

    yield Case("align-right-long-k", "bottom-right: query 0 already sees t - s + 1 keys", s=37, t=91, causal=True)
    yield Case("align-right-long-q", "bottom-right: the first s - t queries see nothing", s=91, t=37, causal=True)
    yield Case(
        "align-left-long-k", "top-left: the last keys are never seen", s=37, t=91, causal=True, alignment="top_left"
    )
    yield Case(
        "align-left-long-q", "top-left: the last queries see everything", s=91, t=37, causal=True, alignment="top_left"
    )
    yield Case("empty-rows-block", "a whole block of queries sees nothing and the next one something", s=300, t=100,
               causal=True, h=2, dtype="bfloat16")  # fmt: skip
    yield Case(
        "empty-rows-sinks", "rows that see only the sink: out 0, lse the sink", s=70, t=20, causal=True, sinks="normal"
    )

    windows = [
        ("left", dict(window=(5, -1)), "bounded to the left only"),
        ("right", dict(window=(-1, 5)), "bounded to the right only"),
        ("both", dict(window=(7, 3)), "unequal bounds"),
        ("zero", dict(window=(0, 0)), "each query sees exactly one key"),
        ("left-zero", dict(window=(0, -1)), "nothing before the diagonal"),
        ("right-zero", dict(window=(-1, 0)), "written as a window: causal"),
        ("none-bound", dict(window=(4, None)), "None is unbounded, as -1 is"),
        ("causal", dict(window=(16, 0), causal=True, inert=("causal",)), "sliding window of a decoder"),
        ("causal-right", dict(window=(9, 6), causal=True), "causal overrules a bound to the right"),
        ("long-k", dict(window=(7, 3), s=37, t=91), "bottom-right, fewer queries than keys"),
        ("long-q", dict(window=(7, 3), s=91, t=37), "bottom-right, rows without keys at the top"),
        ("left-long-k", dict(window=(7, 3), s=37, t=91, alignment="top_left"), "top-left: most keys are unseen"),
        ("left-long-q", dict(window=(7, 3), s=91, t=37, alignment="top_left"), "top-left: empty rows at the bottom"),
        ("wide", dict(window=(33, 40), inert=("window",)), "wider than the sequence: nothing is hidden"),
        ("blocks", dict(window=(20, 10), s=300, t=300, h=2), "whole blocks lie outside on both sides"),
        (
            "blocks-shifted",
            dict(window=(130, 1), s=200, t=333, h=2, dtype="bfloat16"),
            "block borders and the diagonal do not coincide",
        ),
    ]
    for name, options, reason in windows:
        yield Case(f"window-{name}", reason, **options)

    yield Case("softcap", "caps scores that it really bends", softcap=2.0, q_gain=4.0)
    yield Case(
        "softcap-causal", "cap with a mask: masked stays masked", softcap=3.0, q_gain=4.0, causal=True, s=70, t=70
    )
    yield Case("softcap-bfloat16", "Gemma's cap", softcap=5.0, q_gain=4.0, dtype="bfloat16", d=64, window=(20, 0))
    yield Case("softcap-bias", "the bias comes after the cap", softcap=1.0, q_gain=4.0, bias="b h s t")

    for bias in [
        "b h s t",
        "1 h s t",
        "b 1 s t",
        "1 1 s t",
        "b h 1 t",
        "b h s 1",
        "b 1 1 t",
        "1 h 1 1",
        "h s t",
        "s t",
        "t",
    ]:
        name = bias.replace(" ", "")
        yield Case(f"bias-{name}", "bias broadcast, its gradient summed", s=21, t=37, bias=bias)
    yield Case("bias-causal-long-q", "bias with rows that see nothing", s=50, t=35, bias="1 h s t", causal=True)
    yield Case("bias-bfloat16", "bias in the operand dtype", bias="b h s t", dtype="bfloat16", s=65, t=66)
    yield Case("bias-float32-of-bfloat16", "float32 bias of bfloat16 operands", bias="1 h s t", dtype="bfloat16",
               bias_dtype="float32")  # fmt: skip
    yield Case("bias-float16", "bias in the operand dtype, wide block", bias="b 1 s t", dtype="float16", s=66, t=130)
    yield Case("bias-holes", "-inf hides single keys", bias="b h s t", bias_values="holes", t=70)
    yield Case(
        "bias-holes-bfloat16", "-inf hides single keys", bias="h s t", bias_values="holes", t=70, dtype="bfloat16"
    )
    yield Case("bias-rows", "-inf over a whole row: nothing is seen", bias="b 1 s t", bias_values="rows", t=70)
    yield Case(
        "bias-rows-sinks", "-inf over a whole row leaves the sink", bias="s t", bias_values="rows", sinks="normal"
    )

    yield Case("alibi", "one slope for each head", alibi="h", causal=True)
    yield Case("alibi-batch", "slopes for each batch row", alibi="b h", causal=True, t=70)
    yield Case("alibi-full", "distance is absolute on both sides of the diagonal", alibi="h", s=29, t=67)
    yield Case("alibi-top-left", "the distance follows the alignment", alibi="h", s=29, t=67, alignment="top_left")
    yield Case("alibi-bfloat16", "slopes stay float32", alibi="b h", s=70, t=130, window=(90, 0), dtype="bfloat16")

    # Head dims that would leave columns of a wide kernel's boxes empty.
    for d, e in ((128, 64), (256, 80), (160, 160), (136, 40)):
        more = {"d": d, "e": e, "dtype": "bfloat16", "causal": True}
        yield Case(f"alibi-dims-{d}-{e}", "scores that are bent, in narrow values", alibi="h", s=70, t=70, **more)
        sizes = {"b": 1, "s": 200, "t": 200, "cu_q": (0, 90, 170)}
        yield Case(f"packed-dims-{d}-{e}", "sequences with narrow values", layout="packed", **sizes, **more)

    yield Case("sinks", "the denominator only", sinks="normal")
    yield Case(
        "sinks-causal-bfloat16", "sinks of a decoder", sinks="normal", causal=True, dtype="bfloat16", d=64, s=129, t=129
    )
    yield Case("sinks-window", "sinks beside a sliding window", sinks="normal", window=(8, 0), s=70, t=70)
    yield Case(
        "sinks-low", "a sink far below every score changes nothing and overflows nowhere", sinks="low", inert=("sinks",)
    )
    yield Case("sinks-high", "a sink far above every score takes all the weight", sinks="high")

    yield Case("segments", "documents in order, negative ids among them", segments="same", s=70, t=70)
    yield Case("segments-causal", "packed training", segments="same", causal=True, s=129, t=129)
    yield Case("segments-pair", "ids of queries and keys differ, in any order", segments="pair", s=40, t=71)
    yield Case("segments-pair-empty", "queries whose id no key has", segments="pair", s=40, t=3)
    yield Case(
        "segments-bfloat16", "documents in order", segments="same", causal=True, s=140, t=140, dtype="bfloat16", d=64
    )

    yield Case("scale", "a scale of the caller", scale=0.3)
    yield Case("scale-one", "no scaling", scale=1.0, d=5)
    yield Case("scale-zero", "all weights are equal, the gradients of q and k are 0", scale=0.0, causal=True)
    yield Case("scale-negative", "a maximum over scaled scores, not a scale of the maximum", scale=-0.5, causal=True)
    yield Case("sharp", "four times the usual scores", q_gain=4.0, causal=True, s=65, t=65)
    yield Case(
        "huge-logits", "scores of a thousand: only the difference to the maximum may be exponentiated", q_gain=1e3
    )
    yield Case("huge-logits-bfloat16", "scores of a thousand", q_gain=1e3, dtype="bfloat16", causal=True, s=70, t=70)
    yield Case(
        "huge-logits-sinks", "scores of a thousand on both sides of the sink", q_gain=1e3, sinks="normal", causal=True
    )
    yield Case("dropout", "most weights are dropped", dropout=0.75, s=70, t=130)
    yield Case("dropout-causal", "the usual rate, with a mask", dropout=0.1, causal=True, s=129, t=129)
    yield Case("dropout-causal-bfloat16", "in 16 bits", dropout=0.1, causal=True, s=200, t=333, d=64, dtype="bfloat16")
    yield Case("dropout-float16", "full attention in 16 bits", dropout=0.5, s=65, t=200, d=128, dtype="float16")
    yield Case("dropout-scores", "what else changes weights; the log-sum-exp is that of all of them", dropout=0.3, s=50,
               t=70, softcap=3.0, q_gain=4.0, alibi="b h", sinks="normal", bias="b h s t", window=(30, 5))  # fmt: skip
    yield Case("equal-keys", "every visible key has the same weight", kv_equal=True, causal=True)

    yield Case("everything", "all score options at once", s=77, t=131, h=6, g=2, d=24, e=40, scale=0.4, causal=True,
               window=(40, -1), softcap=4.0, bias="b 1 s t", bias_values="holes", alibi="b h", sinks="normal",
               segments="pair")  # fmt: skip
    yield Case("everything-bfloat16", "all score options at once", s=131, t=77, h=4, g=1, d=64, dtype="bfloat16",
               window=(30, 9), alignment="top_left", softcap=4.0, bias="1 h s t", alibi="h", sinks="normal",
               segments="pair")  # fmt: skip


def _packed():
    def packed(name, reason, cu_q, cu_k=None, **options):
        cu = cu_k or cu_q
        options = {"s": cu_q[-1], "t": cu[-1], **options}
        return Case(f"packed-{name}", reason, layout="packed", b=1, cu_q=cu_q, cu_k=cu_k, **options)

    a = (0, 17, 63, 130)
    yield packed("plain", "three sequences", a)
    for dtype in DTYPES:
        yield packed(
            f"causal-{dtype}", "packed training", (0, 65, 66, 195, 300), causal=True, dtype=dtype, d=64, h=2, g=1
        )
    yield packed("one", "a single sequence", (0, 33))
    yield packed("single-tokens", "sequences of one token: each sees itself", (0, 1, 2, 3, 4, 5))
    yield packed("empty-first", "an empty sequence at the front", (0, 0, 20, 45))
    yield packed("empty-middle", "empty sequences one after the other", (0, 20, 20, 20, 45), causal=True)
    yield packed("empty-last", "an empty sequence at the end", (0, 20, 45, 45))
    yield packed("all-empty", "no token belongs to a sequence", (0, 0, 0), s=19, t=19)
    yield packed("no-tokens", "total = 0", (0, 0))
    yield packed("gap-end", "rows past cu_seqlens[-1] belong to no sequence", (0, 17, 50), s=81, t=81, causal=True)
    yield packed("gap-front", "rows before cu_seqlens[0] belong to no sequence", (9, 30, 61))
    yield packed(
        "gap-end-sinks", "a row outside every sequence has no sink either", (0, 17, 50), s=70, t=70, sinks="normal"
    )
    yield packed("keys-longer", "own key offsets, more keys", (0, 9, 26, 40), (0, 31, 96, 130), causal=True)
    yield packed(
        "keys-shorter", "own key offsets, fewer keys: rows without keys", (0, 31, 96, 130), (0, 9, 26, 40), causal=True
    )
    yield packed("keys-none", "queries of a sequence that has no keys", (0, 10, 20, 30), (0, 12, 12, 30))
    yield packed("keys-only", "keys of a sequence that has no queries", (0, 10, 10, 30), (0, 12, 20, 30))
    yield packed("keys-gap", "gaps of different size on both sides", (0, 10, 25), (3, 22, 41), s=33, t=60, causal=True)
    yield packed(
        "keys-top-left", "alignment inside each sequence", (0, 9, 40), (0, 31, 50), causal=True, alignment="top_left"
    )
    yield packed("used-k", "the tail of each key sequence is unused", a, used_k=(3, 46, 20), causal=True)
    yield packed("used-q", "the tail of each query sequence is unused", a, used_q=(17, 0, 44), causal=True)
    yield packed("used-both", "both tails, a length of 0", a, (0, 30, 60, 99), used_q=(5, 46, 44), used_k=(30, 0, 21),
                 causal=True)  # fmt: skip
    yield packed("used-both-bfloat16", "both tails", a, used_q=(5, 46, 44), used_k=(9, 1, 21), dtype="bfloat16", d=64)
    yield packed("window", "the window counts inside each sequence", (0, 17, 90, 130), window=(6, 2))
    yield packed("window-keys", "window, own key offsets", (0, 9, 60), (0, 31, 131), window=(11, 0))
    yield packed("scale", "a scale of the caller", a, scale=0.5, d=5)
    yield packed("softcap", "the cap", a, softcap=2.0, q_gain=4.0)
    yield packed("bias", "bias by positions inside each sequence", a, bias="b h s t")
    yield packed("bias-shared", "one bias for all sequences", a, (0, 20, 60, 99), bias="1 1 s t", causal=True)
    yield packed("bias-keys", "bias of keys only", a, bias="b 1 1 t", used_k=(3, 46, 20))
    yield packed("bias-heads", "a bias of three dims", a, bias="h s t", bias_values="holes", dtype="bfloat16")
    yield packed("alibi", "distance inside each sequence", a, (0, 20, 60, 99), alibi="h", causal=True)
    yield packed("sinks", "sinks in each sequence", a, sinks="normal", causal=True)
    yield packed("sinks-empty", "rows without keys see the sink", (0, 10, 20, 30), (0, 12, 12, 30), sinks="normal")
    yield packed("segments", "segments inside the sequences", a, segments="same")
    yield packed(
        "segments-pair", "segments inside the sequences, own keys", a, (0, 20, 60, 99), segments="pair", causal=True
    )
    yield packed("mqa-dims", "one key head, v narrower", (0, 65, 70), h=4, g=1, d=40, e=24, causal=True)
    yield packed("many", "more sequences than blocks", tuple(range(0, 200, 5)), causal=True)
    yield packed("no-grouping", "as many key heads as query heads", a, h=3, g=3)
    yield packed("everything", "all options at once", (2, 17, 63, 63, 130), (1, 40, 77, 90, 160), s=140, t=171,
                 used_q=(15, 40, 0, 60), used_k=(20, 37, 13, 66), d=24, e=16, causal=True, window=(25, -1), softcap=4.0,
                 bias="b h s t", alibi="h", sinks="normal", segments="pair")  # fmt: skip
    yield packed("dropout", "which weights are dropped goes by positions within a sequence", (0, 40, 40, 75),
                 dropout=0.4, causal=True)  # fmt: skip
    yield packed("dropout-unequal-bfloat16", "unequal lengths in 16 bits", (0, 70, 77, 210), (0, 33, 133, 180),
                 dropout=0.2, d=64, dtype="bfloat16")  # fmt: skip


def _cached():
    def cached(name, reason, **options):
        return Case(f"cached-{name}", reason, layout="cached", **{"s": 1, "t": 64, "h": 4, "g": 2, **options})

    yield cached("full", "the whole cache is valid", causal=True, inert=("causal",))
    for dtype in DTYPES:
        yield cached(f"decode-{dtype}", "decode: lengths differ", t=129, d=64, lengths=(7, 100), causal=True,
                     inert=("causal",), dtype=dtype)  # fmt: skip
    yield cached("scalar-length", "one length for all rows", lengths=21, b=3)
    yield cached("length-zero", "an empty cache: nothing is seen", lengths=(0, 33))
    yield cached("length-zero-sinks", "an empty cache leaves the sink", lengths=(0, 33), sinks="normal")
    yield cached("several-queries", "several queries at the end of the cache", s=5, lengths=(9, 64), causal=True)
    yield cached("more-queries", "more queries than keys: empty rows", s=9, lengths=(4, 30), causal=True)
    yield cached("window", "sliding window at the end of the cache", s=3, lengths=(9, 60), window=(5, 0))
    yield cached("top-left", "top-left on a cache", s=3, lengths=(9, 60), causal=True, alignment="top_left")
    yield cached("append-one", "decode with append", lengths=(7, 40), new=1, causal=True, inert=("causal",))
    yield cached("append-empty", "prefill of an empty cache", s=17, new=17, lengths=(0, 0), causal=True)
    yield cached("append-chunk", "chunked prefill", s=9, new=9, lengths=(0, 50), causal=True)
    yield cached("append-fill", "the append ends exactly at the capacity", s=4, new=4, lengths=(60, 3), causal=True)
    yield cached("append-unequal", "fewer queries than appended keys", s=2, new=6, lengths=(5, 31), causal=True)
    yield cached("append-scalar", "append at one place", new=1, lengths=30)
    yield cached(
        "append-bfloat16", "append in bfloat16", s=3, new=3, lengths=(5, 31), causal=True, dtype="bfloat16", d=64
    )
    yield cached("leftpad", "the front of each sequence is padding", lengths=(20, 50), leftpad=(3, 0))
    yield cached("leftpad-all", "padding up to the length: nothing is seen", lengths=(20, 50), leftpad=(20, 11))
    yield cached(
        "leftpad-append", "append after a padded prompt", s=3, new=3, lengths=(20, 50), leftpad=(3, 17), causal=True
    )
    yield cached("leftpad-top-left", "top-left starts after the padding", s=4, lengths=(20, 50), leftpad=(3, 7),
                 causal=True, alignment="top_left")  # fmt: skip
    yield cached("batch-idx", "rows live anywhere in the cache", b=3, lengths=(20, 50, 9), batch_idx=(4, 0, 2))
    yield cached("batch-idx-append", "append to the entry that a row names", b=2, s=2, new=2, lengths=(20, 50),
                 batch_idx=(3, 1), causal=True)  # fmt: skip
    yield cached(
        "batch-idx-leftpad", "with padding", b=2, lengths=(20, 50), batch_idx=(3, 1), leftpad=(5, 6), window=(9, -1)
    )
    for page in (1, 3, 16, 64):
        yield cached(
            f"paged-{page}", "pages of any size, in any order", page=page, t=-(-70 // page) * page, lengths=(7, 65)
        )
    yield cached("paged-full", "every page is full", page=16, t=48)
    yield cached(
        "paged-causal", "several queries across a page border", page=4, t=40, s=6, lengths=(17, 40), causal=True
    )
    yield cached(
        "paged-bfloat16", "pages of 16 in bfloat16", page=16, t=160, d=128, lengths=(15, 129), dtype="bfloat16", g=1
    )
    yield cached("paged-float16", "pages of 64 in float16", page=64, t=192, d=64, lengths=(64, 129), dtype="float16",
                 s=2, causal=True)  # fmt: skip
    yield cached("paged-zero", "a sequence without a page", page=16, t=64, lengths=(0, 33))
    yield cached(
        "paged-window", "the window skips the first pages", page=8, t=96, s=2, lengths=(90, 33), window=(10, 0)
    )
    yield cached("paged-append", "append inside a page", page=16, t=64, lengths=(5, 33), new=1)
    yield cached("paged-append-border", "append that starts on a new page", page=16, t=64, lengths=(16, 48), new=1)
    yield cached(
        "paged-append-straddle", "append across page borders", page=4, t=40, s=7, new=7, lengths=(2, 29), causal=True
    )
    yield cached("paged-append-straddle-odd", "append across pages of three", page=3, t=42, s=5, new=5, lengths=(1, 37),
                 causal=True, dtype="bfloat16")  # fmt: skip
    yield cached("paged-leftpad", "padding inside the first pages", page=4, t=40, s=2, new=2, lengths=(20, 30),
                 leftpad=(3, 9), causal=True)  # fmt: skip
    yield cached(
        "rotary", "rotary of all dims, interleaved", rotary=16, new=1, lengths=(7, 40), causal=True, inert=("causal",)
    )
    yield cached("rotary-halves", "rotary by halves", rotary=16, interleaved=False, new=1, lengths=(7, 40))
    yield cached("rotary-partial", "only the first dims turn", rotary=6, new=1, lengths=(7, 40))
    yield cached("rotary-partial-halves", "halves of the first dims", rotary=6, interleaved=False, s=3, new=3,
                 lengths=(7, 40), causal=True)  # fmt: skip
    yield cached("rotary-chunk", "queries turn by their own place when causal", rotary=16, s=5, new=5, lengths=(0, 40),
                 causal=True)  # fmt: skip
    yield cached("rotary-chunk-window", "and with a window", rotary=8, s=5, new=5, lengths=(0, 40), window=(9, 2))
    yield cached("rotary-chunk-full", "all queries turn by one place otherwise", rotary=16, s=5, new=5, lengths=(0, 40))
    yield cached("rotary-paged-bfloat16", "rotary, pages, append", rotary=32, d=64, page=16, t=64, s=4, new=4,
                 lengths=(14, 40), causal=True, dtype="bfloat16")  # fmt: skip
    yield cached("softcap", "the cap on a cache", lengths=(20, 50), softcap=2.0, q_gain=4.0)
    yield cached("alibi", "slopes on a cache", s=2, lengths=(20, 50), alibi="h", causal=True)
    yield cached("sinks", "sinks on a cache", lengths=(20, 50), sinks="normal")
    yield cached("bias", "bias by cache position", lengths=(20, 50), bias="b h s t")
    yield cached("bias-leftpad", "the bias counts from the first key after the padding", lengths=(20, 50),
                 leftpad=(3, 17), bias="b 1 s t")  # fmt: skip
    yield cached("splits", "keys split into three parts", t=300, lengths=(100, 299), num_splits=3)
    yield cached("splits-empty", "some parts hold no key", t=300, lengths=(5, 0), num_splits=8, sinks="normal")
    yield cached("dims", "v narrower, one key head", h=6, g=1, d=40, e=24, lengths=(20, 50), new=1)
    yield cached("everything", "all options at once", b=3, s=3, t=72, h=6, g=2, d=24, e=40, new=3, page=8,
                 lengths=(31, 69, 6), leftpad=(4, 9, 0), rotary=12, interleaved=False, scale=0.4, causal=True,
                 window=(20, -1), softcap=4.0, alibi="h", sinks="normal", num_splits=2)  # fmt: skip


CASES: tuple[Case, ...] = (*_dense(), *_packed(), *_cached())
BY_ID: dict[str, Case] = {case.id: case for case in CASES}
assert len(BY_ID) == len(CASES), "ids are unique"
