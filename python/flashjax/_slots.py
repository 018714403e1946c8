"""The array arguments of the operation: the Python half of csrc/attention/slots.def.

Everything that depends on which array has which dimension is derived from this table: the order across the FFI, shape
checks, the fold of a vmapped axis, the sharding rule, the table in the documentation.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array argument. `dims` holds a letter a dimension; `x?` may be 1, `n1` is n + 1 (see slots.def)."""

    name: str
    type: str  # "T" operand dtype, "F" operand dtype or float32, "F32", "S32"
    dims: str
    grad: bool = False  # the operation is differentiable in it

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(dim[0] for dim in self.dims.split())

    @property
    def rank(self) -> int:
        return len(self.letters)


_FORWARD = (
    Slot("q", "T", "b s h d", grad=True),
    Slot("k", "T", "c t g d", grad=True),
    Slot("v", "T", "c t g e", grad=True),
    Slot("bias", "F", "b? n? h? s? t?", grad=True),
    Slot("alibi_slopes", "F32", "b? h", grad=True),
    Slot("sinks", "F32", "b? h", grad=True),
    Slot("segment_ids_q", "S32", "b s"),
    Slot("segment_ids_k", "S32", "b t"),
    Slot("cu_seqlens_q", "S32", "b n1"),
    Slot("cu_seqlens_k", "S32", "b n1"),
    Slot("seqused_q", "S32", "b n"),
    Slot("seqused_k", "S32", "b n"),
    Slot("leftpad", "S32", "b"),
    Slot("batch_idx", "S32", "b"),
    Slot("page_table", "S32", "b p"),
    Slot("shift", "S32", "b"),
    Slot("dropout_seed", "S32", "b h w"),
)
_BACKWARD = (
    Slot("out", "T", "b s h e"),
    Slot("lse", "F32", "b h s"),
    Slot("dout", "T", "b s h e"),
    Slot("dlse", "F32", "b h s"),
)

SLOTS: dict[str, Slot] = {slot.name: slot for slot in _FORWARD + _BACKWARD}
BIT: dict[str, int] = {name: 1 << i for i, name in enumerate(SLOTS)}
FORWARD: tuple[str, ...] = tuple(slot.name for slot in _FORWARD)
DIFFERENTIABLE: tuple[str, ...] = tuple(slot.name for slot in _FORWARD if slot.grad)


def in_order(names) -> tuple[str, ...]:
    """`names`, as they cross the FFI."""
    return tuple(name for name in SLOTS if name in names)
