"""Validation, complete and at trace time: from what the caller wrote to the canonical call (arrays by slot, Attrs).

Every message reads ``function: `argument` must be what was expected; got what came``.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flashjax._layouts import SequenceLayout
from flashjax._line import Line
from flashjax._types import Split

DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("cpu", "cuda", "upstream", "reference")
STRATEGIES = ("auto", "ring", "ulysses", "allgather")


def describe(x) -> str:
    """How an argument looks in a message: dtype and shape, or type and value."""
    if x is None:
        return "None"
    if isinstance(x, Tracer) and not x.shape:
        return "a traced value"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype} {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r}"


class Checker:
    """Checks the arguments of one call of `function`, binding dimension letters as arrays go by."""

    def __init__(self, function: str):
        self.function = function
        self.extent: dict[str, int] = {}

    def fail(self, name: str, expected: str, got, error: type[Exception] = ValueError, hint: str = "") -> NoReturn:
        raise error(
            f"{self.function}: `{name}` must be {expected}; got {describe(got)}" + (f". {hint}" if hint else "")
        )

    # Scalars.

    def static_bool(self, name, x) -> bool:
        if isinstance(x, (bool, np.bool_)):
            return bool(x)
        self.fail(name, "a bool known when the program is traced", x, TypeError)

    def static_float(self, name, x, hint: str = "") -> float:
        if isinstance(x, Tracer):
            self.fail(name, "a number known when the program is traced", x, TypeError, hint)
        if isinstance(x, (bool, np.bool_)) or not (isinstance(x, numbers.Real) or getattr(x, "shape", None) == ()):
            self.fail(name, "a real number", x, TypeError)
        if not math.isfinite(float(x)):
            self.fail(name, "finite", x)
        return float(x)

    def static_int(self, name, x, at_least: int = 0) -> int:
        if isinstance(x, Tracer):
            self.fail(name, "an int known when the program is traced", x, TypeError)
        if isinstance(x, (bool, np.bool_)) or not (
            isinstance(x, numbers.Integral)
            or (getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, jnp.integer))
        ):
            self.fail(name, "an int", x, TypeError)
        if not at_least <= int(x) < 2**31:
            self.fail(name, f"at least {at_least}" if int(x) < at_least else "less than 2**31", x)
        return int(x)

    def scale(self, x, d: int) -> float:
        if x is None:
            return d**-0.5 if d else 1.0
        return self.static_float("softmax_scale", x, hint="For a learned scale, multiply q by it")

    def window(self, x, is_causal) -> tuple[int, int]:
        """(left, right) with -1 for no bound; causal is right = 0."""
        if not isinstance(x, Sequence) or len(x) != 2:
            self.fail("window_size", "a pair (left, right)", x, TypeError)
        left, right = (-1 if w is None else self.static_int("window_size", w, at_least=-1) for w in x)
        return left, 0 if self.static_bool("is_causal", is_causal) else right

    def scores(self, softmax_scale, is_causal, window_size, softcap, causal_alignment) -> dict[str, Any]:
        """The attributes that say what becomes of a score."""
        left, right = self.window(window_size, is_causal)
        softcap = 0.0 if softcap is None else self.static_float("softcap", softcap)
        if softcap < 0:
            self.fail("softcap", "0 (off) or positive", softcap)
        if causal_alignment not in ("bottom_right", "top_left"):
            self.fail("causal_alignment", '"bottom_right" or "top_left"', causal_alignment)
        return {
            "scale": self.scale(softmax_scale, self.extent["d"]),
            "softcap": softcap,
            "window_left": left,
            "window_right": right,
            "top_left": causal_alignment == "top_left",
        }

    def implementation(self, x) -> dict[str, Any]:
        if x is not None and x not in IMPLEMENTATIONS:
            self.fail("implementation", f"None or one of {IMPLEMENTATIONS}", x)
        return {"implementation": x, "upstream": x == "upstream"}

    def split(self, layout, strategy, axis_name, is_self: bool = True) -> Split:
        """How the sequence lies in its arrays, and how devices share it."""
        layout = SequenceLayout() if layout is None else layout
        if not isinstance(layout, SequenceLayout):
            hint = f'For instance SequenceLayout("{layout}", parts=8)' if isinstance(layout, str) else ""
            self.fail("sequence_layout", "None or a flashjax.SequenceLayout", layout, TypeError, hint)
        if strategy not in STRATEGIES:
            self.fail("strategy", f"one of {STRATEGIES}", strategy)
        line = None if axis_name is None else self._line(axis_name)
        for letter in "st":
            extent = self.extent[letter] * (line.n if line else 1)
            if extent % layout.unit:
                self.fail("sequence_layout", f"of parts that divide {letter} = {extent}", str(layout), hint="Pad it")
        return Split(layout, strategy, line, is_self)

    def _line(self, axis_name) -> Line:
        names = (axis_name,) if isinstance(axis_name, str) else axis_name
        if not isinstance(names, Sequence) or not names or len(set(names)) < len(names):
            self.fail("axis_name", "None, a mesh axis, or several different ones", axis_name, TypeError)
        mesh = jax.sharding.get_abstract_mesh()
        for name in names:
            if name not in mesh.manual_axes:
                hint = "Outside of jax.shard_map leave it out: there the sharding of the arrays says how they are split"
                self.fail("axis_name", f"of {mesh.manual_axes}, the manual axes here", name, ValueError, hint)
        return Line.of(names, mesh.shape)

    def dropout(self, rate, key, b: int, h: int) -> tuple[dict[str, jax.Array], int]:
        """The slot `dropout_seed`, if there is dropout, and how many of 256 weights are kept."""
        rate = self.static_float("dropout_rate", rate)
        keep = round(256 * (1 - rate))
        if rate < 0 or keep < 1:
            self.fail("dropout_rate", "from 0 to 255 / 256", rate)
        if keep == 256:
            return {}, keep
        if key is None:
            self.fail("dropout_key", "a key of jax.random, given with `dropout_rate`", None)
        try:
            bits = jax.random.bits(key, (b, h, 2), jnp.uint32)
        except TypeError:
            self.fail("dropout_key", "one key of jax.random", key, TypeError)
        return {"dropout_seed": jax.lax.bitcast_convert_type(bits, jnp.int32)}, keep

    # Arrays.

    def array(self, name, x, dims: str, dtypes: Sequence[str] = (), why: str = ""):
        """`x` as a jax array whose dimensions are `dims`: letters bound so far, or new ones, or `n+1`."""
        if isinstance(x, (bool, int, float, list, tuple, str)) or x is None:
            self.fail(name, f"an array ({self._show(dims)})", x, TypeError)
        try:
            x = jnp.asarray(x)
        except TypeError:
            self.fail(name, f"an array ({self._show(dims)})", x, TypeError)
        expected = f"{' or '.join(dtypes)} ({self._show(dims)})" if dtypes else f"({self._show(dims)})"
        if dtypes and x.dtype.name not in dtypes:
            self.fail(name, expected, x, TypeError, why)
        letters = dims.split()
        if x.ndim != len(letters):
            self.fail(name, expected, x, ValueError, why)
        for letter, extent in zip(letters, x.shape, strict=True):
            plus = letter.endswith("+1")
            key = letter[:-2] if plus else letter
            if self.extent.setdefault(key, extent - plus) != extent - plus or extent - plus < 0:
                self.fail(name, expected + self._bound(letters), x, ValueError, why)
        return x

    def _show(self, dims: str) -> str:
        letters = dims.split()
        return ", ".join(letters) + ("," if len(letters) == 1 else "")

    def _bound(self, letters) -> str:
        known = {letter.removesuffix("+1") for letter in letters} & self.extent.keys()
        return " with " + ", ".join(f"{key} = {self.extent[key]}" for key in sorted(known)) if known else ""

    def operands(self, q, k, v, q_dims: str, k_dims: str, v_dims: str, names=("q", "k", "v")):
        q = self.array(names[0], q, q_dims, DTYPES)
        k = self.array(names[1], k, k_dims, DTYPES)
        v = self.array(names[2], v, v_dims, DTYPES)
        for name, x in ((names[1], k), (names[2], v)):
            if x.dtype != q.dtype:
                self.fail(name, f"of the dtype of `{names[0]}`, {q.dtype}", x, TypeError)
        self.extent.setdefault("d", 0)
        h, g = self.extent["h"], self.extent["g"]
        if g == 0 or h % g:
            self.fail(names[0], f"of h heads, a multiple of the g = {g} heads of `{names[1]}`", q)
        return q, k, v

    def integers(self, name, x, dims: str):
        return self.array(name, x, dims, ("int32",))

    def segments(self, x, q_dims: str, k_dims: str) -> dict[str, jax.Array]:
        """`segment_ids`: one array for queries and keys, or a pair."""
        if x is None:
            return {}
        if isinstance(x, (tuple, list)) and len(x) == 2:
            ids_q, ids_k = x
        elif isinstance(x, (tuple, list)):
            self.fail("segment_ids", f"one int32 array or a pair (({q_dims}), ({k_dims}))", x, TypeError)
        else:
            ids_q = ids_k = x
        ids_q = self.integers("segment_ids", ids_q, q_dims)
        return {"segment_ids_q": ids_q, "segment_ids_k": self.integers("segment_ids", ids_k, k_dims)}

    def bias(self, x, full: Mapping[str, int | None], operand_dtype):
        """A bias broadcastable to `full` (4 letters -> extent; None: any), as (b?, n?, h?, s?, t?)."""
        if x is None:
            return None
        shape = f"({', '.join(full)})"
        expected = f"a floating point array broadcastable to {shape} = {tuple(full.values())}"
        if not hasattr(x, "shape"):
            self.fail("bias", expected, x, TypeError)
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            hint = "For a boolean mask, pass jnp.where(mask, 0.0, -jnp.inf)" if x.dtype == bool else ""
            self.fail("bias", expected, x, TypeError, hint)
        if x.ndim > 4:
            self.fail("bias", expected, x)
        extents = tuple(full.values())
        for extent, want in zip(x.shape[::-1], extents[::-1], strict=False):
            if extent != 1 and want is not None and extent != want:
                self.fail("bias", expected, x)
        if x.dtype != operand_dtype:
            x = x.astype(jnp.float32)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        return x[:, None] if "b" in full else x[None]

    def per_head(self, alibi_slopes, sinks, batched: bool) -> dict[str, jax.Array | None]:
        """Both as float32 (b?, h); `batched`: slopes may differ along the batch."""
        return {
            "alibi_slopes": self._per_head("alibi_slopes", alibi_slopes, batched),
            "sinks": self._per_head("sinks", sinks, batched=False),
        }

    def _per_head(self, name, x, batched: bool):
        if x is None:
            return None
        dims = "b h" if batched and getattr(x, "ndim", 1) == 2 else "h"
        x = self.array(name, x, dims)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            self.fail(name, f"a floating point array ({self._show(dims)})", x, TypeError)
        return x.astype(jnp.float32) if x.ndim == 2 else x.astype(jnp.float32)[None]


def drop_absent(values: dict) -> dict[str, Any]:
    return {name: x for name, x in values.items() if x is not None}
