"""Random sequences of many lengths in one row, long enough for several tiles each, by the compiled kernels.

Gaps, unused tails, empty sequences and NaN outside of all of them come with each; options are drawn too.
"""

import numpy as np
import pytest

import oracle
from cases import Case, cotangents
from conftest import ON_GPU
from harness import check_repeatable, differentiated, function, to_device


def _offsets(random, lengths, gaps):
    """cu_seqlens cannot leave room between sequences: a gap before the first, the rest is unused tails."""
    room = lengths + (random.integers(0, 90, len(lengths)) if gaps else 0)
    return tuple(int(x) for x in np.concatenate([[0], np.cumsum(room)]) + (random.integers(0, 70) if gaps else 0))


def _case(seed: int) -> Case:
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 12))
    longest = int(random.choice([40, 200, 600] if ON_GPU else [20, 90]))
    queries = random.integers(0, longest, n) * (random.random(n) < 0.9)
    alike = random.random() < 0.3
    keys = queries if alike else random.integers(0, longest, n) * (random.random(n) < 0.9)
    used = random.random() < 0.6
    cu_q = _offsets(random, queries, used)
    cu_k = cu_q if alike else _offsets(random, keys, used)
    extra = int(random.integers(0, 200)) * used
    d = int(random.choice([64, 128, 256] if ON_GPU else [16]))
    h, g = random.choice([(1, 1), (4, 2), (3, 1)])
    return Case(
        f"sequences-{seed}",
        "",
        layout="packed",
        b=1,
        s=cu_q[-1] + extra,
        t=cu_k[-1] + extra,
        h=int(h),
        g=int(g),
        d=d,
        dtype=str(random.choice(["bfloat16", "float16"])) if ON_GPU else "float32",
        cu_q=cu_q,
        cu_k=None if alike else cu_k,
        used_q=tuple(int(x) for x in queries) if used else None,
        used_k=tuple(int(x) for x in keys) if used else None,
        causal=bool(random.random() < 0.6),
        window=(int(random.integers(0, longest)), -1) if random.random() < 0.3 else (-1, -1),
        alignment=str(random.choice(["top_left", "bottom_right"])),
        softcap=5.0 if random.random() < 0.2 else 0.0,
        alibi="h" if random.random() < 0.2 else None,
        sinks="normal" if random.random() < 0.3 else None,
        bias="b h s t" if random.random() < 0.15 else None,
        segments=("same" if alike and cu_q[-1] == cu_k[-1] else "pair") if random.random() < 0.2 else None,
    )


def _short(name: str, longest: int = 200, **options) -> Case:
    """Lengths around one tile of keys, in any mixture with those of the queries; `longest`: of keys."""
    random = np.random.default_rng(len(name))
    lengths = (0, 1, 63, 64, 65, 127, 128, 129, 200) if ON_GPU else (0, 1, 7, 30)
    of_keys = [x for x in lengths if x <= longest]
    cu_q, cu_k = (_offsets(random, random.choice(some, 24), False) for some in (lengths, of_keys))
    sizes = {"b": 1, "s": cu_q[-1], "t": cu_k[-1], "h": 12, "g": 6, "d": 64 if ON_GPU else 16}
    sizes |= {"dtype": "bfloat16" if ON_GPU else "float32", "layout": "packed", "cu_q": cu_q, "cu_k": cu_k}
    sizes |= {"promised": longest <= 128}
    return Case(f"short-{name}", "sequences of one key tile beside others", **(sizes | options))


CASES = [pytest.param(_case(seed), id=str(seed)) for seed in range(40 if ON_GPU else 6)]
CASES += [
    pytest.param(_short(name, **(options if ON_GPU else options | {"d": 16})), id=f"short-{name}")
    for name, options in {
        "full": {},
        "causal": {"d": 128, "causal": True},
        "left": {"d": 128, "causal": True, "alignment": "top_left"},
        "window": {"d": 64, "window": (20, 3)},
        "sinks": {"d": 128, "sinks": "normal", "causal": True},
        "softcap": {"d": 64, "softcap": 5.0},
        "wide": {"d": 256, "causal": True},
        "narrow-values": {"d": 192, "e": 128, "causal": True},
        "odd": {"d": 72, "window": (70, 0)},
        "one-tile": {"longest": 128},
        "one-tile-causal": {"longest": 128, "d": 128, "causal": True},
        "one-tile-window": {"longest": 128, "d": 128, "window": (70, 3), "dtype": "float16" if ON_GPU else "float32"},
        "one-tile-odd": {"longest": 128, "d": 72, "window": (20, 0)},
    }.items()
]
ROWS = {"layout": "dense", "b": 70 if ON_GPU else 3, "s": 150, "t": 100, "h": 8, "g": 4, "cu_q": None, "cu_k": None}
CASES += [
    pytest.param(_short(f"rows-{d}", d=d, causal=True, **ROWS), id=f"short-rows-{d}")
    for d in ((64, 128) if ON_GPU else (16,))
]


@pytest.mark.parametrize("case", CASES)
def test_forward(case, compiled):
    inputs = case.build()
    call = function(case, inputs, compiled)
    results = call(to_device(inputs.arrays))
    oracle.check(case, inputs, results)
    for x, y in zip(call(to_device(inputs.arrays)), results, strict=True):
        oracle.same_bits(x, y, "a second call")


@pytest.mark.parametrize("case", CASES)
def test_backward(case, compiled):
    inputs = case.build()
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    _, grads = differentiated(case, inputs, compiled)(to_device(inputs.arrays), dout_dlse)
    oracle.check(case, inputs, cotangents=dout_dlse, grads=grads)


MANY_BLOCKS = {  # more blocks than a GPU has multiprocessors, whose turns to add to dq differ
    "causal": {"d": 128, "causal": True},
    "full": {"d": 64},
    "used-top-left": {"d": 128, "used_q": (1500, 0, 100, 130), "causal": True, "alignment": "top_left"},
    "window": {"d": 128, "window": (300, 40)},
    "segments": {"d": 64, "segments": "same", "causal": True},
    "scores": {"d": 128, "softcap": 5.0, "causal": True},
    "wide": {"d": 256, "causal": True},
    "narrow-values": {"d": 192, "e": 128, "causal": True},
    "wide-window": {"d": 256, "window": (200, -1), "dtype": "float16"},
    "short": {"d": 128, "causal": True, "cu_q": (*range(0, 2048, 128), 2050, 3000, 3100, 4096)},
}


@pytest.mark.skipif(not ON_GPU, reason="the order of additions is fixed where nothing runs at the same time")
@pytest.mark.parametrize("options", MANY_BLOCKS.values(), ids=MANY_BLOCKS)
def test_deterministic(options):
    offsets = (0, 2000, 2000, 2700, 4096)
    defaults = {"b": 1, "s": 4096, "t": 4096, "h": 8, "g": 4, "dtype": "bfloat16", "layout": "packed", "cu_q": offsets}
    check_repeatable(Case("many-blocks", "blocks that wait for each other", **(defaults | options)), "cuda")


@pytest.mark.skipif(not ON_GPU, reason="an error on the CPU, tested in test_errors.py")
@pytest.mark.parametrize(
    "offsets",
    [(0, 300, 100, 400, 500), (0, 500, 0, 500, 500), (-5, 90, 2**31 - 1, -(2**31), 77), (400, 300, 200, 100, 0)],
    ids=["back", "twice", "outside", "falling"],
)
@pytest.mark.parametrize("keys", ["alike", "good"])
@pytest.mark.parametrize("longest", [500, 125])
def test_bad_offsets(offsets, keys, longest, compiled):
    """Offsets that fall, or lie outside of the row, give a result without NaN, and the same each time."""
    sizes = {"b": 1, "s": 500, "t": 500, "h": 2, "g": 1, "d": 64, "cu_q": tuple(range(0, 501, longest))}
    case = Case("bad", "", layout="packed", dtype="bfloat16", promised=longest < 500, **sizes)
    inputs = case.build()
    arrays = inputs.arrays | {"cu_seqlens_q": np.asarray(offsets, np.int64).astype(np.int32)}
    if keys == "good":
        arrays["cu_seqlens_k"] = np.array([0, 100, 210, 390, 500], np.int32)
    arrays = to_device(arrays)
    call = function(case, inputs, compiled)
    out, lse = call(arrays)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert not np.isnan(np.asarray(lse)).any()
    for x, y in zip(call(arrays), (out, lse), strict=True):
        oracle.same_bits(x, y, "a second call")
    dout_dlse = (np.ones(out.shape, inputs.arrays["q"].dtype), np.ones(lse.shape, np.float32))
    _, grads = differentiated(case, inputs, compiled)(arrays, dout_dlse)
    for name, grad in grads.items():
        assert np.isfinite(np.asarray(grad, np.float32)).all(), name
