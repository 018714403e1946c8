"""What one bind of a primitive computes: its operands, its results, and the function that relates them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _ffi, _reference, _support
from flashjax._slots import SLOTS, Slot
from flashjax._types import Attrs

FORWARD, TANGENT, BACKWARD = "forward", "tangent", "backward"


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a bind.

    forward: the slots `names` -> out, lse.
    tangent: `names`, out, lse, and tangents of the slots `wanted` -> tangents of out and lse.
    backward: `names`, out, lse, dout, dlse -> gradients of q, k, v, and float32 ones of the slots `wanted`. With
    `attrs.out_only` lse stands for dlse, which is 0: nobody makes zeros.

    Every operand may have leading axes, which vmap adds: as many for all, each of one size or 1 (see _batching.py).
    """

    direction: str
    names: tuple[str, ...]
    attrs: Attrs
    wanted: tuple[str, ...] = ()
    in_parts: bool = False  # gradients of the slots `wanted` are added to others after, so none is rounded before

    @property
    def operands(self) -> tuple[Slot, ...]:
        more = {FORWARD: (), TANGENT: ("out", "lse", *self.wanted), BACKWARD: ("out", "lse", "dout", "dlse")}
        return tuple(SLOTS[name] for name in self.names + more[self.direction])

    @property
    def results(self) -> tuple[Slot, ...]:
        names = ("q", "k", "v", *self.wanted) if self.direction == BACKWARD else ("out", "lse")
        return tuple(SLOTS[name] for name in names)

    @property
    def is_indirect(self) -> bool:
        """Rows find their keys through a table, so that k and v have no batch axis of their own."""
        return "page_table" in self.names or "batch_idx" in self.names

    def result_types(self, operands) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of the results, from those of the operands."""
        at = dict(zip(self.names, operands, strict=False))
        q, v = at["q"], at["v"]
        if self.direction == BACKWARD:
            return [
                (at[slot.name].shape, q.dtype if slot.type == "T" else np.dtype(np.float32)) for slot in self.results
            ]
        b, s, h, _ = q.shape[-4:]
        lead = self.leading_sizes(operands)
        return [((*lead, b, s, h, v.shape[-1]), q.dtype), ((*lead, b, h, s), np.dtype(np.float32))]

    def leading_sizes(self, operands) -> tuple[int, ...]:
        """The sizes of the axes that vmap added."""
        leads = [x.shape[: len(x.shape) - slot.rank] for x, slot in zip(operands, self.operands, strict=True)]
        return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*leads, strict=True))

    def implementation(self, operands, platform: str) -> str:
        """What computes this call on a platform: one of _checks.IMPLEMENTATIONS."""
        if self.direction == TANGENT:
            return "reference"
        return _support.resolve(self.direction, dict(zip(self.names, operands, strict=False)), self.attrs, platform)

    def compute(self, implementation: str, *operands) -> list[jax.Array]:
        """The results, from operands without leading axes."""
        n = len(self.names)
        arrays = dict(zip(self.names, operands[:n], strict=True))
        if self.direction == FORWARD:
            if implementation == "reference":
                return list(_reference.attention(arrays, self.attrs))
            return _ffi.forward(arrays, self.attrs, implementation)
        if self.direction == BACKWARD:
            out, lse, dout, dlse = operands[n:]
            dlse = jnp.zeros_like(dlse) if self.attrs.out_only and implementation == "reference" else dlse
            if implementation != "reference":
                arrays |= {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
                return _ffi.backward(arrays, self.attrs, self.wanted, implementation, self.in_parts)
            names = [slot.name for slot in self.results]
            own, vjp = jax.vjp(self._reference_in(names, arrays), *(arrays[name] for name in names))
            if self.attrs.part:
                dout, dlse = _of_part(*own, out, lse, dout, dlse)
            types = self.result_types(operands)
            return [x.astype(dtype) for x, (_, dtype) in zip(vjp((dout, dlse)), types, strict=True)]
        tangents = operands[n + 2 :]
        primals = [arrays[name] for name in self.wanted]
        return list(jax.jvp(self._reference_in(self.wanted, arrays), primals, list(tangents))[1])

    def _reference_in(self, names, arrays):
        """The reference as a function of some slots."""
        return lambda *xs: _reference.attention(arrays | dict(zip(names, xs, strict=True)), self.attrs)


def _of_part(own_out, own_lse, out, lse, dout, dlse):
    """Cotangents of what some of the keys give, from those of what all give, who take it by exp(own_lse - lse)."""
    weight = jnp.where(own_lse > -jnp.inf, jnp.exp(own_lse - lse), 0)  # (b, h, s)
    seen = weight > 0
    by_row = jnp.moveaxis(weight, 1, 2)[..., None]
    dout = jnp.where(by_row > 0, dout.astype(jnp.float32), 0)
    more = jnp.sum(dout * (own_out.astype(jnp.float32) - out.astype(jnp.float32)), axis=-1)
    own_dlse = jnp.where(seen, weight * (dlse + jnp.moveaxis(more, 1, 2)), 0)
    return (by_row * dout).astype(own_out.dtype), own_dlse
