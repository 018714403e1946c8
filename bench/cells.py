"""The problems that are timed, by suite. Plain data: no framework is imported here.

Letters as everywhere: b batch, s query length, t key length, h query heads, g key/value heads, d q/k dim, e v dim.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Cell:
    mode: str  # "fwd", "bwd": one attention call; "chain": 64 calls in one program; "decode": KV cache
    b: int
    s: int
    t: int
    h: int
    g: int
    d: int
    e: int
    mask: str = "full"  # "full", "causal", "window", "segments"
    dtype: str = "bfloat16"
    window: int = -1  # keys before its own that a query sees (mask "window", which is causal too)
    lengths: tuple[int, ...] = ()  # packed sequences in one row (b = 1, s = t = sum), or documents by segment ids
    packed: bool = False  # lengths by cu_seqlens
    page: int = 0  # page size of a paged cache; 0: contiguous
    deterministic: bool = False  # gradients with the same bits in every run
    shared: bool = False  # the values are columns of the keys
    bias: str = ""  # a letter or 1 for each dimension, as in "1 h s t"; of the operands' dtype
    frozen: bool = False  # the bias gets no gradient

    @property
    def id(self) -> str:
        heads = f"{self.h}" if self.h == self.g else f"{self.h}/{self.g}"
        dims = f"{self.d}" if self.d == self.e else f"{self.d}/{self.e}"
        lengths = f"{self.s}" if self.s == self.t else f"{self.s}x{self.t}"
        extra = [self.mask] if self.mask != "window" else [f"window{self.window}"]
        if self.lengths:
            longest, n = max(self.lengths), len(self.lengths)
            extra += [f"{'packed' if self.packed else 'documents'}{n}x{longest}"]
        if self.page:
            extra += [f"page{self.page}"]
        if self.deterministic:
            extra += ["deterministic"]
        if self.bias:
            extra += ["bias" + self.bias.replace(" ", "")] + ["frozen"] * self.frozen
        return "-".join([self.mode, self.dtype, f"b{self.b}", f"s{lengths}", f"h{heads}", f"d{dims}", *extra])

    def pairs(self) -> float:
        """Query-key pairs that the mask leaves, per head and batch entry, as the published counts have it.

        Causal counts half of s * t (also where the exact number is slightly more), a window what it leaves.
        """
        if self.lengths:
            full = float(sum(length**2 for length in self.lengths))
            return full / 2 if self.mask in ("causal", "segments") else full
        if self.mask == "window":
            rows = np.arange(self.s)
            return float(np.minimum(rows, self.window).sum() + self.s)
        if self.mask == "causal" and self.s == self.t:
            return self.s * self.t / 2
        if self.mask == "causal":  # a few queries at the end of a long cache
            return self.s * self.t - self.s * (self.s - 1) / 2
        return float(self.s * self.t)

    def blocks(self, tile: int = 128) -> int:
        """Tiles of queries x keys in which the mask leaves something, per head and batch entry (s = t)."""
        lengths = self.lengths or (self.s,)
        if self.mask == "full":
            return sum(math.ceil(length / tile) ** 2 for length in lengths)
        reach = self.window if self.mask == "window" else self.s
        return sum(
            row // tile - max(0, row - reach) // tile + 1 for length in lengths for row in range(0, length, tile)
        )

    def flops(self) -> float:
        """Of the two products forward, five backward: 2 (d + e) and 2 (3 d + 2 e) a pair. With d = e, 4 d and 10 d."""
        per_pair = 2 * (3 * self.d + 2 * self.e) if self.mode == "bwd" else 2 * (self.d + self.e)
        return per_pair * self.b * self.h * self.pairs()

    def cache_bytes(self) -> int:
        """What decoding must read: every key and value once."""
        width = self.d if self.shared else self.d + self.e
        return self.b * self.t * self.g * width * (4 if self.dtype == "float32" else 2)


def _square(mode, b, s, h, d, mask, g=None, e=None, **more):
    return Cell(mode, b, s, s, h, g or h, d, e or d, mask, **more)


def _train(shapes, masks=("full", "causal"), modes=("fwd", "bwd"), **more):
    return [_square(mode, *shape, mask, *rest, **more) for mode in modes for mask in masks for *shape, rest in shapes]


def _packed(mode, lengths):
    total = sum(lengths)
    return Cell(mode, 1, total, total, 16, 16, 128, 128, "causal", lengths=tuple(lengths), packed=True)


_TRAIN = (
    *((b, s, 16, 128, ()) for b, s in ((32, 512), (16, 1024), (4, 4096), (2, 8192), (1, 16384))),
    (2, 8192, 32, 128, (8,)),
    (4, 4096, 32, 64, ()),
    (1, 16384, 32, 64, ()),
    (4, 4096, 8, 256, ()),
)
_SKEWED = (16384, 8192, 4096, 2048, 1024, *(128,) * 8)  # 32,768 tokens

SUITES: dict[str, list[Cell]] = {
    "cpu": [
        _square(mode, 1, 4096, 8, d, mask, dtype=dtype)
        for mode in ("fwd", "bwd")
        for dtype in ("float32", "bfloat16")
        for d in (64, 128)
        for mask in ("full", "causal")
    ],
    "h200-forward": _train(_TRAIN, modes=("fwd",)),
    "h200-backward": _train(_TRAIN, modes=("bwd",)),
    "h200-long": _train([(1, 65536, 16, 128, ())]),
    # Causal rows to compare masks with: as long, and with as many blocks a tile of queries.
    "h200-masks": _train([(b, 16384 // b, 16, 128, ()) for b in (1, 8, 16)], ("causal",))
    + _train([(1, 16384, 16, 128, ())], ("window",), window=1024)
    + [
        _square(mode, 1, 16384, 16, 128, "segments", lengths=lengths)
        for mode in ("fwd", "bwd")
        for lengths in ((1024,) * 16, (8192, 4096, 2048, 1024, *(128,) * 8))
    ],
    "h200-deterministic": [
        _square("bwd", 4, 4096, h, d, mask, deterministic=True)
        for h, d in ((32, 64), (16, 128), (8, 256))
        for mask in ("full", "causal")
    ],
    "h200-bias": [
        *(
            _square("bwd", 1, 4096, h, d, mask, bias="1 h s t", frozen=frozen)
            for h, d in ((16, 64), (16, 128), (8, 256))
            for mask in ("full", "causal")
            for frozen in (False, True)
        ),
        *(
            _square("bwd", b, s, 16, 128, "full", bias=bias)
            for b, s, bias in ((1, 4096, "1 1 s t"), (4, 2048, "1 h s t"), (4, 2048, "b 1 1 t"))
        ),
    ],
    "h200-dispatch": [_square("chain", 1, 128, 1, 128, "full")],
    "h200-packed": [
        cell
        for mode in ("fwd", "bwd")
        for cell in (
            *(_packed(mode, lengths) for lengths in ((2048,) * 16, _SKEWED, (128,) * 256)),
            *(_square(mode, b, 32768 // b, 16, 128, "causal") for b in (16, 256)),  # rows of one length
        )
    ],
    "h200-decode": [
        *(
            Cell("decode", b, 1, t, 32, 8, 128, 128)
            for b, t in ((64, 16384), (64, 4096), (128, 2048), (16, 8192), (1, 131072), (1, 32768))
        ),
        Cell("decode", 32, 1, 8192, 64, 8, 64, 64),
        Cell("decode", 16, 1, 8192, 32, 32, 128, 128),
        *(Cell("decode", b, 4, t, 32, 8, 128, 128, "causal") for b, t in ((64, 16384), (16, 8192), (1, 32768))),
        *(Cell("decode", 64, 1, 16384, 32, 8, 128, 128, page=page) for page in (16, 64, 128, 256)),
        *(Cell("decode", 4, 512, 16384, 32, 8, 128, 128, "causal", page=page) for page in (0, 64)),  # chunked prefill
    ],
    "h200-mla": [
        *_train([(4, 4096, 16, 192, (None, 128))], ("causal",)),
        *(
            Cell("decode", b, 1, t, h, 1, 576, 512, shared=True, page=page)
            for b, t, h, page in ((32, 8192, 128, 0), (32, 8192, 128, 64), (128, 4096, 128, 0), (32, 8192, 16, 0))
        ),
    ],
    "upstream-h200": _train([(4, 4096, 32, 64, ()), (4, 4096, 16, 128, ()), (4, 4096, 8, 256, ())]),
    "smoke": [
        _square(mode, 1, 256, 4, 64, "causal", dtype="float32", g=2) for mode in ("fwd", "bwd")
    ] + [Cell("decode", 2, 1, 256, 4, 2, 64, 64, dtype="float32")],
}  # fmt: skip
