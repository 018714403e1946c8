"""Devices in a line, or a ring: the mesh axes over which a sequence is split, and how they exchange arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Line:
    """The devices of some mesh axes, the first of them major, in the order in which they hold a sequence."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    in_mesh_order: tuple[str, ...]  # the axes as ppermute wants them

    @classmethod
    def of(cls, axes: Sequence[str], mesh_shape: Mapping[str, int]) -> "Line":
        sizes = tuple(mesh_shape[axis] for axis in axes)
        return cls(tuple(axes), sizes, tuple(axis for axis in mesh_shape if axis in axes))

    @property
    def n(self) -> int:
        return math.prod(self.sizes)

    @property
    def sizes_by_name(self) -> dict[str, int]:
        return dict(zip(self.axes, self.sizes, strict=True))

    def index(self):
        """The place of this device."""
        place = 0
        for axis, size in zip(self.axes, self.sizes, strict=True):
            place = place * size + jax.lax.axis_index(axis)
        return place

    def pick(self, values: Sequence[int]):
        """The value of this device, int32."""
        if len(set(values)) == 1:
            return jnp.int32(values[0])
        place = self.index()  # no table: custom_partitioning takes no constant arrays
        return functools.reduce(
            lambda found, i: jnp.where(place == i, jnp.int32(values[i]), found), range(1, self.n), jnp.int32(values[0])
        )

    def switch(self, cases: Sequence, function: Callable, *operands):
        """function(case of this device)(*operands), compiled once for each case that there is."""
        distinct = list(dict.fromkeys(cases))
        if len(distinct) == 1:
            return function(distinct[0])(*operands)
        return jax.lax.switch(
            self.pick([distinct.index(case) for case in cases]), [function(case) for case in distinct], *operands
        )

    def shift(self, x, distance: int):
        """What the device `distance` places before this one holds, around the ring."""
        if distance % self.n == 0:
            return x
        sizes = [self.sizes[self.axes.index(axis)] for axis in self.in_mesh_order]
        order = [self.in_mesh_order.index(axis) for axis in self.axes]
        ids = np.arange(self.n).reshape(sizes).transpose(order).ravel()
        pairs = [(int(ids[i]), int(ids[(i + distance) % self.n])) for i in range(self.n)]
        return jax.lax.ppermute(x, self.in_mesh_order, pairs)

    def gather(self, x, axis: int):
        """The parts of all devices, one after the other along `axis`."""
        for name in reversed(self.axes):
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
        return x

    def scatter_sum(self, x, axis: int):
        """This device's part of the sum over all devices: the transpose of `gather`."""
        for name in self.axes:
            x = jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
        return x

    def own(self, x, axis: int):
        """This device's part of what all hold."""
        size = x.shape[axis] // self.n
        return jax.lax.dynamic_slice_in_dim(x, self.index() * size, size, axis)

    # Heads for sequences: every device gets the whole sequence of some heads, which are split by the last axis first.

    def to_heads(self, x, sequence: int, heads: int):
        for name in reversed(self.axes):
            x = jax.lax.all_to_all(x, name, split_axis=heads, concat_axis=sequence, tiled=True)
        return x

    def to_sequence(self, x, sequence: int, heads: int):
        for name in self.axes:
            x = jax.lax.all_to_all(x, name, split_axis=sequence, concat_axis=heads, tiled=True)
        return x

    def _first_head(self, own: int):
        place = 0
        for axis, size in zip(reversed(self.axes), reversed(self.sizes), strict=True):
            place = place * size + jax.lax.axis_index(axis)
        return place * own

    def own_heads(self, x, heads: int):
        own = x.shape[heads] // self.n
        return jax.lax.dynamic_slice_in_dim(x, self._first_head(own), own, heads)

    def among_heads(self, x, heads: int):
        """The heads of this device in their place among all, which are 0."""
        own = x.shape[heads]
        zeros = jnp.zeros((*x.shape[:heads], own * self.n, *x.shape[heads + 1 :]), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, x, self._first_head(own), heads)
