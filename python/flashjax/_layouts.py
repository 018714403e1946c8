"""The order of a sequence in its array, so that devices that each hold a slice of the array have equal work.

A causal query at the end of a sequence sees all of it, one at the front next to nothing. Zigzag gives each part a chunk
from the front and its mirror image from the back; striped deals positions out one by one.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

KINDS = ("contiguous", "zigzag", "striped")


class Piece(NamedTuple):
    """Rows offset, offset + 1, ... of a device's slice: positions start, start + stride, ... of the sequence."""

    offset: int
    length: int
    start: int
    stride: int


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """The order in which an array holds the positions of a sequence.

    Args:
      kind: "contiguous" holds them in order. "zigzag" cuts the sequence into 2 * parts chunks, and part i of the array
        is chunks i and 2 * parts - 1 - i. "striped" makes part i of positions i, i + parts, i + 2 * parts, ...
      parts: the number of devices over which the sequence is split, or will be: one part for each has the least work.
        Any other number gives the same answers.

    Example:
      >>> import numpy as np, flashjax
      >>> layout = flashjax.SequenceLayout("zigzag", parts=2)
      >>> layout.reorder(np.arange(8), axis=0)
      array([0, 1, 6, 7, 2, 3, 4, 5])
    """

    kind: str = "contiguous"
    parts: int = 1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"SequenceLayout: `kind` must be one of {KINDS}; got {self.kind!r}")
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1:
            raise ValueError(f"SequenceLayout: `parts` must be a positive int; got {self.parts!r}")

    @property
    def is_natural(self) -> bool:
        """The array holds the sequence in order."""
        return self.kind == "contiguous" or self.parts == 1

    @property
    def unit(self) -> int:
        """What a sequence's length must be a multiple of."""
        return 1 if self.is_natural else 2 * self.parts if self.kind == "zigzag" else self.parts

    def positions(self, length: int) -> np.ndarray:
        """int32 (length,): the position in the sequence of each row of the array, as rotary embeddings need it."""
        return self.reorder(np.arange(length, dtype=np.int32), axis=0)

    def reorder(self, x: Any, axis: int = 1) -> Any:
        """`x` (values, positions, segment ids, targets), in order along `axis`, in the order of this layout."""
        if self._is_unchanged(x, axis):
            return x
        if self.kind == "striped":
            return self._transposed(x, axis, (-1, self.parts))
        order = np.arange(2 * self.parts).reshape(2, self.parts)
        return self._chunks(x, axis, np.stack([order[0], order[1, ::-1]], axis=1).ravel())

    def restore(self, x: Any, axis: int = 1) -> Any:
        """The inverse of `reorder`."""
        if self._is_unchanged(x, axis):
            return x
        if self.kind == "striped":
            return self._transposed(x, axis, (self.parts, -1))
        order = np.arange(2 * self.parts).reshape(self.parts, 2)
        return self._chunks(x, axis, np.concatenate([order[:, 0], order[::-1, 1]]))

    def _is_unchanged(self, x, axis) -> bool:
        if x.shape[axis] % self.unit:
            raise ValueError(
                f"{self}: the length of the sequence must be a multiple of {self.unit}; got {x.shape[axis]}. Pad it"
            )
        return self.is_natural or not x.shape[axis]

    def _chunks(self, x, axis, order):
        return _moved(_in_chunks, x, axis % x.ndim, tuple(order.tolist()))

    def _transposed(self, x, axis, shape):
        return _moved(_by_transposing, x, axis % x.ndim, shape)

    def pieces(self, length: int, devices: int) -> list[tuple[Piece, ...]] | None:
        """What each of the devices holds of a sequence split evenly over them; None if they cut through its pieces."""
        if length % devices or length % self.unit:
            return None
        own = length // devices
        run = own if self.is_natural else length // self.unit
        if not own or (own % run and run % own):
            return None
        size = min(run, own)
        stride = self.parts if self.kind == "striped" and not self.is_natural else 1
        return [
            tuple(Piece(at, size, self._position(i * own + at, run), stride) for at in range(0, own, size))
            for i in range(devices)
        ]

    def _position(self, row: int, run: int) -> int:
        """The position of a row of the array, in which `run` rows come from one stretch of the sequence."""
        i, at = divmod(row, run)
        if self.is_natural:
            return row
        if self.kind == "striped":
            return i + self.parts * at
        part, is_back = divmod(i, 2)
        return (2 * self.parts - 1 - part if is_back else part) * run + at


def _in_chunks(x, axis, order):
    """The chunks of `x` along `axis`, in that order."""
    size = x.shape[axis] // len(order)
    # No indices: custom_partitioning takes no constant arrays.
    chunks = [x[(slice(None),) * axis + (slice(i * size, (i + 1) * size),)] for i in order]
    return (np if isinstance(x, np.ndarray) else jnp).concatenate(chunks, axis=axis)


def _by_transposing(x, axis, shape):
    """`x`, of which `axis` is folded into that shape, the other way round."""
    folded = x.reshape((*x.shape[:axis], *shape, *x.shape[axis + 1 :]))
    return folded.swapaxes(axis, axis + 1).reshape(x.shape)


def _moved(function, x, axis, how):
    """function(x, axis, how), of the sharding of x."""
    if isinstance(x, np.ndarray):
        return function(x, axis, how)
    if isinstance(x, Tracer):
        sharding = jax.typeof(x).sharding
        if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
            return function(x, axis, how)
        # Explicit mesh axes would ask for a sharding at every step.
        return jax.sharding.auto_axes(lambda x: function(x, axis, how), out_sharding=sharding)(x)
    return _moved_at_once(x, function, axis, how, x.sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _moved_at_once(x, function, axis, how, sharding):
    """The same of an array: one program, not one for each step that its devices would have to meet for."""
    y = _moved(function, x, axis, how)
    is_auto = isinstance(sharding, jax.sharding.NamedSharding) and set(sharding.mesh.axis_types) == {
        jax.sharding.AxisType.Auto
    }
    return jax.lax.with_sharding_constraint(y, sharding) if is_auto else y
