"""The one FFI call of each direction, and the registration of what it calls.

Arguments cross packed, in the order of the slots, with a mask of those present; every attribute has one C++ type.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import max_dim, min_dim

from flashjax import _support
from flashjax._slots import BIT, in_order
from flashjax._types import Arrays, Attrs

_CAST = {int: np.int64, float: np.float32, bool: bool}
_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}  # extension module -> platform as XLA calls it


def forward(arrays: Arrays, attrs: Attrs, implementation: str) -> list[jax.Array]:
    """out (b, s, h, e) and lse (b, h, s), by the compiled kernels that `implementation` names."""
    q, v = arrays["q"], arrays["v"]
    b, s, h, _ = q.shape
    results = [
        jax.ShapeDtypeStruct((b, s, h, v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((b, h, s), jnp.float32),
    ]
    return _call("flashjax_fwd", results, arrays, attrs, (), implementation)


def backward(
    arrays: Arrays, attrs: Attrs, wanted: tuple[str, ...], implementation: str, in_parts: bool
) -> list[jax.Array]:
    """dq, dk, dv, and the float32 gradients of the slots `wanted`. `arrays` also has out, lse, dout and dlse.

    in_parts: those gradients are added to others.
    """
    results = [jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in ("q", "k", "v")]
    on_gpu = _support.PLATFORM[implementation] == "cuda"
    types, keys = dict.fromkeys(wanted, jnp.dtype(jnp.float32)), None
    if "bias" in arrays and arrays["q"].dtype != jnp.float32 and 1 not in arrays["bias"].shape[3:] and on_gpu:
        bias = arrays["bias"]
        if "bias" in wanted and bias.dtype == arrays["q"].dtype:
            if in_parts or not _is_by_itself(arrays):
                bias = bias.astype(jnp.float32)  # as its gradient, which is a sum
            types["bias"] = bias.dtype
        if isinstance(bias.shape[4], int):  # kernels that move it by tiles want rows of whole units of 16 bytes
            keys, unit = bias.shape[4], 16 // bias.dtype.itemsize
            bias = jnp.pad(bias, [(0, 0)] * 4 + [(0, -keys % unit)])
        arrays = arrays | {"bias": bias}
    results += [jax.ShapeDtypeStruct(arrays[name].shape, types[name]) for name in wanted]
    values = _call("flashjax_bwd", results, arrays, attrs, wanted, implementation)
    gradients = dict(zip(wanted, values[3:], strict=True))
    if keys is not None and "bias" in wanted:
        gradients["bias"] = gradients["bias"][..., :keys]
    return [*values[:3], *(x.astype(jnp.float32) for x in gradients.values())]


def _is_by_itself(arrays):
    """No two scores share an element of the bias."""
    (b, _, h, _), bias = arrays["q"].shape, arrays["bias"]
    n = next((arrays[name].shape[-1] - 1 for name in ("cu_seqlens_q", "cu_seqlens_k") if name in arrays), 1)
    return bias.shape[:3] == (b, n, h)


def _call(target, results, arrays, attrs, wanted, implementation):
    direction = "backward" if target == "flashjax_bwd" else "forward"
    if not _support.values_stay_in_keys(implementation, direction, arrays, attrs):
        attrs = dataclasses.replace(attrs, shared_e=0)
    scratch = workspace_bytes(target, arrays, attrs) if _support.PLATFORM[implementation] == "cuda" else 0
    if scratch:
        results = [*results, jax.ShapeDtypeStruct((scratch,), jnp.uint8)]
    # Values that are columns of the keys are not sent, so that nobody makes an array of them.
    names = [name for name in in_order(arrays) if not (name == "v" and attrs.shared_e)]
    # Attributes are cached by equality, where 1 == 1.0 == True: each must always come with the same type.
    scalars = {
        field.name: _CAST[field.type](getattr(attrs, field.name))
        for field in dataclasses.fields(attrs)
        if field.type in _CAST
    }
    present, asked = (np.int64(sum(BIT[name] for name in some)) for some in (names, wanted))
    operands = [arrays[name] for name in names]
    values = list(jax.ffi.ffi_call(target, results)(*operands, present=present, wanted=asked, **scalars))
    return values[:-1] if scratch else values


def workspace_bytes(target: str, arrays: Arrays, attrs: Attrs) -> int:
    """Bytes of scratch memory that the CUDA kernels need for a call; 0: none.

    A function of shapes alone, since the platform's kernel is chosen when the program runs. Where a program is exported
    for shapes of any size, an expression of those.
    """
    return max_dim(_own_bytes(target, arrays, attrs), _upstream_bytes(target, arrays, attrs))


def _rows(family: str, *columns: str) -> list[dict]:
    """Those of the kernel table that have these columns."""
    module = _support.extension("cuda")
    asked = {family, *columns}
    return [row for row in module.kernels if asked <= {*row.values()}] if module else []


@functools.cache
def _own_width(widest: int, *columns: str) -> int:
    """Columns of our rows that serve heads so wide. Where a build has left some of those out, a wider one may."""
    width = next(x for x in (64, 128, 256) if widest <= x)
    rows = [(256 if row["d"] > 128 else row["d"], row["built"]) for row in _rows("sm90", *columns)]
    if all(built for own, built in rows if own == width):
        return width
    return max((own for own, built in rows if built and own >= width), default=width)


def _own_bytes(target, arrays, attrs):
    """For our own kernels."""
    (b, s, h, d), (_, t, g, e) = arrays["q"].shape, arrays["v"].shape
    widest = max(d, e)
    if attrs.shared_e:
        return _partial_results_bytes(arrays, attrs)
    if arrays["q"].dtype == jnp.float32 or widest > 256:
        return 0
    packed = [arrays[name].shape[-1] - 1 for name in ("cu_seqlens_q", "cu_seqlens_k") if name in arrays]
    n = max(packed, default=1)

    def plan(rows, tile):  # counters, 64 bytes for each tile of a sequence or of a gap, and where they lie
        return 256 + 64 * b * (rows // tile + 2 * n + 1) + 64 * -(-b * (n + 1) // 4)

    if target == "flashjax_fwd":
        return max_dim(plan(s, 128), _partial_results_bytes(arrays, attrs))
    width = _own_width(widest, str(arrays["q"].dtype), "backward")
    rows = -(-s // 128) * 128 + (128 * n if packed else 64)  # each sequence begins a tile, of any size
    statistics = 4 * b * h * rows * (width + 2)  # dq in float32, and two numbers of each query
    counters = (8 * h + 4) * b * (rows // 64) + 16  # of each 64 queries
    pieces = 0  # of key tiles without a mask, on no more multiprocessors than any such GPU has: dk and dv in float32
    if max(attrs.window_left, attrs.window_right) < 0 and not attrs.deterministic and width <= 128:
        pieces = min_dim(144, 8 * b * g * -(-t // 128)) * (1024 * width + 8)
    return -(-(statistics + counters) // 256) * 256 + plan(t, 64) + plan(s, 64) + pieces


def _partial_results_bytes(arrays: Arrays, attrs: Attrs) -> int:
    """For few queries against many keys, which are split: launch_blocks in csrc/cuda/sm90/decode.cuh."""
    (b, s, h, d), (_, t, g, e) = arrays["q"].shape, arrays["v"].shape
    shared, paged, known = bool(attrs.shared_e), "page_table" in arrays, isinstance(s, int)
    t *= arrays["page_table"].shape[1] if paged else 1
    ratio = h // g if g else 0
    most = s if known else 64 if paged or not ratio else min(64, 512 // ratio)  # what s can be at most, if few
    few = 0 < most <= 64 and (shared or most * ratio <= 512) and not (known and isinstance(t, int) and t < 4 * s)
    if not b * s * h or not (few or paged):
        return 0
    block = 64 if shared or most * ratio <= 64 else 128
    cluster = 2 if shared and most * ratio > 64 else 1
    heads = min(ratio, block)
    queries = min(most, block // heads)
    blocks = b * g * -(-(-(-ratio // heads) * -(-(s if paged else most) // queries)) // cluster)
    width = 512 if shared else _own_width(max(d, e), str(arrays["q"].dtype), "kDecode")
    slot = 4 * cluster * heads * queries * (width + 1)
    tiles = max_dim(-(-t // 64), 1)
    if attrs.num_splits > 0:
        return 16 + blocks * min_dim(attrs.num_splits, tiles) * slot
    ctas = 144 * (2 if block == 64 and width < 256 else 1) // cluster  # as many as any such GPU runs at a time
    return 16 + min_dim(ctas, blocks * tiles) * (16 + 2 * slot)


@functools.cache
def _upstream_width(d: int, *columns: str) -> int:
    """The head dim of FlashAttention-2's row that serves d, of those in this build with these columns; 0: none."""
    rows = [row for row in _rows("upstream", *columns) if row["built"] and row["d"] >= d]
    return min((row["d"] for row in rows), default=0)


def _upstream_bytes(target, arrays, attrs):
    """For FlashAttention-2's, as csrc/cuda/upstream takes them."""
    b, s, h, d = arrays["q"].shape
    c, t, g, _ = arrays["k"].shape
    columns = str(arrays["q"].dtype), "backward" if target == "flashjax_bwd" else "forward"
    width = _upstream_width(d, *columns)
    if not width:
        return 0
    n = arrays["cu_seqlens_q"].shape[1] - 1 if "cu_seqlens_q" in arrays else 1
    lists = (24 + 8 + 4 * h) * b * n + 8 * b * -(-max_dim(s, t) // 32) + 1024  # sequences, their tiles, and slopes
    if target == "flashjax_bwd":
        rows = b * h * (s + 128 * n)
        copies = min_dim(-(-128 // max_dim(b * n * h, 1)), max_dim(-(-t // 128), 1)) if attrs.deterministic else 1
        heads = 4 * c * t * h * d if h > g else 0  # dk and dv of each query head
        return 4 * rows * (copies * width + 1) + heads + 3 * lists + 1024
    pages = arrays["page_table"].shape[1] if "page_table" in arrays else 0
    known = isinstance(s, int)
    width = _upstream_width(d, *columns, "kSplit")
    if not width or (known and s > 64 and not pages):
        return lists
    tiles = b * (h if known and s > 1 else g) * -(-s // 64)
    splits = min_dim(attrs.num_splits or -(-320 // max_dim(tiles, 1)), max_dim(-(-t * (pages or 1) // 64), 1))
    return splits * 4 * (b * h * s * (width + 1) + 128) + lists + 4 * b * (pages + 1) + 1024


def runtime_ffi_api() -> tuple[int, int] | None:
    """The FFI version of the installed jaxlib, from its headers; None if it ships none."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    header = pathlib.Path(spec.submodule_search_locations[0]) / "include/xla/ffi/api/c_api.h"
    if not header.exists():
        return None
    text = header.read_text()
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else None


def register(platform: str) -> None:
    """Registers the handlers of a platform's extension module, if it was built."""
    module = _support.extension(platform)
    if module is None:
        return
    # A handler that is newer than the runtime takes the whole CPU backend down with it, so look first.
    runtime = runtime_ffi_api()
    if runtime is not None and runtime < tuple(module.ffi_api):
        raise ImportError(
            f"flashjax._{platform} was built for XLA FFI {'.'.join(map(str, module.ffi_api))}, and the installed "
            f"jaxlib has {'.'.join(map(str, runtime))}: install a newer jax, or build flashjax against this jaxlib"
        )
    for name, handler in module.targets.items():
        jax.ffi.register_ffi_target(name, handler, platform=_PLATFORMS[platform])


for _platform in _PLATFORMS:
    register(_platform)
