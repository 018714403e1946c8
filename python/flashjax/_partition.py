"""Several devices: every device computes its part of the batch, the heads and the sequence, and nothing is gathered.

The plan is one for all three ways in which JAX says where arrays are: Auto meshes, where the partitioner asks
(custom_partitioning); Explicit ones, where the types say (lowered as a shard_map); manual ones, where the call already
is one device's. Sharded dims are gathered, and sequences where _ring.py knows no way to split them.
"""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.core
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashjax import _batching, _compat, _ring
from flashjax._line import Line
from flashjax._operation import BACKWARD, Call
from flashjax._slots import Slot

Axes = tuple[str, ...]  # mesh axes over which one dimension is split, major first
_NO_MESH = AbstractMesh((), ())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mesh axes that split each thing that can be split."""

    lead: tuple[Axes, ...]  # the axes that vmap added
    b: Axes
    s: Axes  # what the types of results say of their queries
    ring: Axes  # over queries and keys, where the computation is split so
    kv: Axes  # over key heads
    extra: Axes  # over the query heads of one part of the key heads

    @property
    def computing(self) -> frozenset[str]:
        return frozenset(sum(self.lead, ()) + self.b + self.ring + self.kv + self.extra)

    def spec(self, call: Call, slot: Slot, shape, lead_sizes, of_type=False) -> P:
        """Where an array of the plan's call is: split as it is computed with, or as its type says."""
        axes = {"b": self.b, "g": self.kv, "h": self.kv + self.extra}
        axes |= {"s": self.s} if of_type else {"s": self.ring, "t": self.ring}
        axes |= {i: axes_ for i, axes_ in enumerate(self.lead)}
        keys = _keys(call, slot, shape, lead_sizes)
        return P(*(axes.get(key, ()) or None for key in keys))


def _keys(call: Call, slot: Slot, shape, lead_sizes) -> list:
    """What each dimension of an array is: a leading axis (its number), "b", "s", "t", "h", "g", or None."""
    keys: list = [
        i if extent == size else None for i, (extent, size) in enumerate(zip(shape, lead_sizes, strict=False))
    ]
    own = shape[len(lead_sizes) :]
    sequence = _ring.split_axis(call, slot, own)
    for i, (dim, extent) in enumerate(zip(slot.dims.split(), own, strict=True)):
        letter = "b" if dim == "c" and not call.is_indirect else dim[0]
        splits = i == sequence or (letter in "bhg" and not (dim.endswith("?") and extent == 1))
        keys.append(letter if splits else None)
    return keys


def _axes(entry) -> Axes:
    """An entry of a PartitionSpec, which writes a single axis without its tuple."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _check_cache(call: Call, slot: Slot, spec, leading: int, mesh_shape):
    """Gathering a whole cache at every step would be right, and what nobody wants."""
    split = _axes(spec[leading]) if call.is_indirect and slot.letters[0] == "c" and len(spec) > leading else ()
    split = [axis for axis in split if mesh_shape[axis] > 1]
    if split:
        table, unit = ("page_table", "pages") if "page_table" in call.names else ("cache_batch_idx", "entries")
        raise ValueError(
            f"flash_mha_with_kvcache: the {unit} of `{slot.name}_cache` (dimension {leading}) are split over mesh axis "
            f"{' and '.join(map(repr, split))}, but any row may look up any of them through `{table}`. Split its heads "
            f"(dimension {leading + 2}) instead; or give each device a cache and a table of its own, in jax.shard_map"
        )


def plan(call: Call, operands, mesh_shape, placed) -> Plan:
    """The plan that follows what is `placed`, (slot, shape, spec) each, where the first to split a thing decides."""
    lead_sizes = call.leading_sizes(operands)
    q, k = operands[0], operands[1]
    b, s, h, _ = q.shape[-4:]
    t, g = k.shape[-3:-1]
    wish: dict = {}
    for slot, shape, spec in placed:
        _check_cache(call, slot, spec, len(lead_sizes), mesh_shape)
        for key, entry in zip(_keys(call, slot, shape, lead_sizes), spec, strict=False):
            axes = _axes(entry)
            wish.setdefault(key, axes) if axes else None
    used: set[str] = set()

    def grant(key, fits):
        axes = tuple(axis for axis in wish.get(key, ()) if axis not in used)
        while axes and not fits(axes):
            axes = axes[:-1]
        used.update(axes)
        return axes

    def parts(axes):
        return math.prod(mesh_shape[axis] for axis in axes)

    def split_of_heads(axes):
        """How many of the axes split the key heads; None if some part would need parts of several key heads."""
        if h % parts(axes):
            return None
        count = max(i for i in range(len(axes) + 1) if all(g % parts(axes[:j]) == 0 for j in range(i + 1)))
        group, own = h // g if g else 1, h // parts(axes)
        return count if count == len(axes) or own % group == 0 or group % own == 0 else None

    lead = tuple(grant(i, lambda axes, n=n: n % parts(axes) == 0) for i, n in enumerate(lead_sizes))
    rows = grant("b", lambda axes: b % parts(axes) == 0)
    heads = grant("h" if "h" in wish else "g", lambda axes: split_of_heads(axes) is not None)
    count = split_of_heads(heads) or 0
    ring = sequence = grant("s" if "s" in wish else "t", lambda axes: s % parts(axes) == 0)
    own, own_keys = h // parts(heads), g // parts(heads[:count])
    extents = _ring.Extents(s, t, own, max(1, own * g // h) if heads[count:] else own_keys)
    while ring and (parts(ring) == 1 or _ring.choose(call, extents, Line.of(ring, mesh_shape)) is None):
        ring = ring[:-1]
    return Plan(lead, rows, sequence if "s" in wish else (), ring, heads[:count], heads[count:])


def part(call: Call, how: Plan, implementation: str, mesh_shape, operands):
    """What one device computes: a function of its parts of the operands, and where those and the results are."""
    lead_sizes = call.leading_sizes(operands)
    in_specs = [how.spec(call, slot, x.shape, lead_sizes) for slot, x in zip(call.operands, operands, strict=True)]
    types = call.result_types(operands)
    out_specs = [how.spec(call, slot, t[0], lead_sizes) for slot, t in zip(call.results, types, strict=True)]
    heads_axis = len(lead_sizes) + 2
    group = operands[0].shape[-2] // max(1, operands[1].shape[-2])

    def missing(spec):  # from a gradient: the axes over which the parts of it lie
        present = {axis for entry in spec for axis in _axes(entry)}
        return tuple(axis for axis in mesh_shape if axis in how.computing - present)

    in_parts = lead_sizes or how.ring or (call.direction == BACKWARD and any(missing(spec) for spec in out_specs[3:]))
    call = dataclasses.replace(call, in_parts=bool(in_parts))

    def compute(*xs):
        if how.ring:
            return _ring.compute(call, implementation, Line.of(how.ring, mesh_shape), xs)
        return _ring.run(call, implementation, *xs)

    def first_head(own):
        index = 0
        for axis in how.extra:
            index = index * mesh_shape[axis] + jax.lax.axis_index(axis)
        return index * own // group

    def run(*xs):
        own = xs[0].shape[-2]  # query heads of this device
        kept = {}
        if how.extra:  # more parts than key heads: these queries need a few, or one, of those here
            for i, slot in enumerate(call.operands):
                if "g" in slot.letters:
                    kept[slot.name] = xs[i]
            xs = [
                jax.lax.dynamic_slice_in_dim(x, first_head(own), max(1, own // group), heads_axis)
                if slot.name in kept
                else x
                for slot, x in zip(call.operands, xs, strict=True)
            ]
        results = _batching.folded(call, compute)(*xs)
        if call.direction != BACKWARD:
            return tuple(results)
        return tuple(
            whole(slot, x, kept, spec, own) for slot, x, spec in zip(call.results, results, out_specs, strict=True)
        )

    def whole(slot, x, kept, spec, own):
        """A gradient, with the parts of it that other devices computed."""
        if slot.name in kept:
            x = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(kept[slot.name]), x, first_head(own), heads_axis)
        axes = missing(spec)
        return jax.lax.psum(x, axes) if axes else x

    return run, tuple(in_specs), tuple(out_specs)


def result_shardings(call: Call, operands) -> list[NamedSharding]:
    """The shardings in the results' types, under Explicit meshes: out and lse lie as q does, gradients as operands."""
    mesh = next((x.sharding.mesh for x in operands if not x.sharding.mesh.empty), operands[0].sharding.mesh)
    types = call.result_types(operands)
    if call.direction == BACKWARD:
        at = dict(zip(call.names, operands, strict=False))
        return [NamedSharding(mesh, at[slot.name].sharding.spec) for slot in call.results]
    placed = [(slot, x.shape, x.sharding.spec) for slot, x in zip(call.operands, operands, strict=True)]
    how = plan(call, operands, mesh.shape, placed)
    lead = call.leading_sizes(operands)
    specs = [how.spec(call, slot, t[0], lead, of_type=True) for slot, t in zip(call.results, types, strict=True)]
    return [NamedSharding(mesh, spec) for spec in specs]


def lower(ctx, call: Call, platform: str, *values):
    """The lowering of all three primitives, for one platform."""
    operands = ctx.avals_in
    implementation = call.implementation(operands, platform)
    mesh = next((x.sharding.mesh for x in operands if not x.sharding.mesh.empty), _NO_MESH)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {axis for axis, kind in kinds.items() if kind == AxisType.Explicit}
    is_empty = any(0 in shape for shape in [x.shape for x in operands])
    if call.leading_sizes(operands) or call.attrs.sequence.line is not None:
        call = dataclasses.replace(call, in_parts=True)
    context = _NO_MESH

    if explicit and AxisType.Auto not in kinds.values():
        # The same mesh as far as this lowering goes: types have done their work, and what follows is for XLA.
        kinds = tuple(kind if kind == AxisType.Manual else AxisType.Auto for kind in mesh.axis_types)
        context = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
        run = _in_shard_map(call, implementation, operands, mesh, explicit)
    elif (
        isinstance(ctx.module_context.axis_context, mlir.ShardingContext)
        and _compat.devices_are_known(ctx)
        and not _compat.is_for_export(ctx)  # what it emits cannot leave the process; without it, XLA gathers
        and not is_empty
    ):
        run = _in_custom_partitioning(call, implementation)
    else:
        run = _batching.folded(call, functools.partial(_ring.run, call, implementation))

    line = call.attrs.sequence.line

    def without_types(*xs):
        manual = _compat.manual_axes(line.sizes_by_name) if line else contextlib.nullcontext()
        with jax.sharding.use_abstract_mesh(context), manual:
            return run(*xs)

    plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in operands]
    return mlir.lower_fun(without_types, multiple_results=True)(ctx.replace(avals_in=plain), *values)


def outside_types(function, shardings):
    """`function` with Explicit axes made Auto inside; its results, a list, then get these shardings in their types."""

    def run(*operands):
        mesh = next((t.mesh for x in operands if not (t := jax.typeof(x).sharding).mesh.empty), _NO_MESH)
        if AxisType.Explicit not in mesh.axis_types:
            return function(*operands)
        typed = [NamedSharding(mesh, sharding.spec) for sharding in shardings]
        return jax.sharding.auto_axes(function, out_sharding=typed)(*operands)

    return run


def _in_shard_map(call, implementation, operands, mesh, axes):
    placed = [(slot, x.shape, x.sharding.spec) for slot, x in zip(call.operands, operands, strict=True)]
    how = plan(call, operands, mesh.shape, placed)
    run, in_specs, out_specs = part(call, how, implementation, mesh.shape, operands)
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _in_custom_partitioning(call, implementation):
    @custom_partitioning
    def run(*xs):
        return tuple(_batching.folded(call, functools.partial(_ring.run, call, implementation))(*xs))

    def partition(mesh, operands, results):
        slots = call.results + call.operands
        placed = [(slot, x.shape, x.sharding.spec) for slot, x in zip(slots, (*results, *operands), strict=True)]
        how = plan(call, operands, mesh.shape, placed)
        compute, in_specs, out_specs = part(call, how, implementation, mesh.shape, operands)

        def without_mesh(*xs):
            with jax.sharding.use_abstract_mesh(_NO_MESH):
                return compute(*xs)

        in_shardings, out_shardings = (
            tuple(NamedSharding(mesh, spec) for spec in specs) for specs in (in_specs, out_specs)
        )
        return mesh, without_mesh, out_shardings, in_shardings

    def sharding_rule(mesh, operands, results):
        return _rule(call, operands, results)

    run.def_partition(partition=partition, sharding_rule=sharding_rule)
    return run


def _rule(call: Call, operands, results) -> SdyShardingRule:
    """Which dimensions are split alike, for the propagation of shardings."""
    lead_sizes = call.leading_sizes(operands)
    (s, h), (t, g) = (x.shape[-3:-1] for x in operands[:2])
    group = h // g
    # Query head i reads key head i // group, so key heads are the major factor. A factor in a compound may not be 1.
    heads = CompoundFactor("g", "group") if g > 1 and group > 1 else "g" if group == 1 else "group"
    sizes: dict = {"group": group} if g > 1 and group > 1 else {}
    count = 0

    def mapping(slot, x):
        nonlocal count
        dims = []
        for key, extent in zip(_keys(call, slot, x.shape, lead_sizes), x.shape, strict=True):
            if key is None or extent == 1:
                count += 1
                dims.append(f"own{count}")
            elif key == "t":  # where queries are split, so are their keys
                dims.append("s" if s == t and _ring.has_parts(call) else key)
            else:
                dims.append(heads if key == "h" else f"lead{key}" if isinstance(key, int) else key)
        return ArrayMapping(*dims)

    mappings = [
        tuple(mapping(*x) for x in zip(slots, values, strict=True))
        for slots, values in ((call.operands, operands), (call.results, results))
    ]
    return SdyShardingRule(operand_mappings=mappings[0], result_mappings=mappings[1], **sizes)
