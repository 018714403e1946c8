"""vmap: a mapped axis becomes a leading axis of every operand, and is folded into the batch where the call computes.

Folding late keeps mapped axes apart from the batch for as long as shardings are decided, so that neither a sharded
mapped axis nor a sharded batch below it has to be gathered.
"""

import math

import jax
import jax.numpy as jnp

from flashjax._operation import BACKWARD, TANGENT, Call


def batching_rule(bind, operands, dims, call: Call):
    """The rule of all three primitives: `operands` mapped along `dims` (None: not mapped), results along axis 0.

    An operand that is not mapped gets an axis of size 1, unless it has a gradient or a tangent that is.
    """
    slots = call.operands
    mapped = {slot.name for slot, dim in zip(slots, dims, strict=True) if dim is not None}
    full = mapped & set(call.wanted) if call.direction == TANGENT else set()
    if call.direction == BACKWARD:
        full = {slot.name for slot in call.results}  # a gradient has its operand's shape, and all are mapped
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    types = [jax.typeof(x).sharding for x in operands]
    axis = next((t.spec[dim] for t, dim in zip(types, dims, strict=True) if dim is not None and t.spec[dim]), None)

    def lead(x, dim, slot):
        if dim is not None:
            return jnp.moveaxis(x, dim, 0)
        if slot.name not in full:
            return jnp.expand_dims(x, 0)
        sharding = jax.typeof(x).sharding
        if axis is None:
            return jnp.broadcast_to(x[None], (size, *x.shape))
        return jax.lax.broadcast(
            x, (size,), out_sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis, *sharding.spec))
        )

    # vmap hides the mesh axis of what it maps; these operands still have it.
    mesh = next((t.mesh for t in types if not t.mesh.empty), jax.sharding.get_abstract_mesh())
    with jax.sharding.use_abstract_mesh(mesh):
        results = bind(*(lead(*x) for x in zip(operands, dims, slots, strict=True)))
    return results, [0] * len(results)


def folded(call: Call, compute):
    """`compute`, which knows no leading axes, for operands that have them."""

    def run(*operands):
        lead = call.leading_sizes(operands)
        if not lead:
            return compute(*operands)
        results = compute(*fold(call, operands))
        shapes = [shape for shape, _ in call.result_types(operands)]
        return [_unfold(x, lead, operands[0].shape[-4], shape) for x, shape in zip(results, shapes, strict=True)]

    return run


def fold(call: Call, operands) -> list[jax.Array]:
    """The operands with their leading axes made part of the batch, or of the entries of a cache."""
    lead = call.leading_sizes(operands)
    n, axes = math.prod(lead), len(lead)
    b = operands[0].shape[-4]
    named = list(zip(call.operands, operands, strict=True))
    own_cache = any(slot.letters[0] == "c" and any(extent != 1 for extent in x.shape[:axes]) for slot, x in named)
    entries = next(x.shape[axes] for slot, x in named if slot.name == "k")

    def one(slot, x):
        own = x.shape[axes:]
        is_mapped = any(extent != 1 for extent in x.shape[:axes])
        if slot.letters[0] == "c" and call.is_indirect and not own_cache:
            return x.reshape(own)  # every table goes on pointing into the one cache
        may_be_one = slot.dims.split()[0].endswith("?")
        if (
            may_be_one
            and own[0] == 1
            and not is_mapped
            and not (call.direction == BACKWARD and slot.name in call.wanted)
        ):
            return x.reshape(own)
        first = b if may_be_one else own[0]
        x = jnp.broadcast_to(x, (*lead, first, *own[1:]))
        if slot.name in ("page_table", "batch_idx") and own_cache:
            start = entries * jnp.arange(n, dtype=x.dtype).reshape(*lead, *(1,) * len(own))
            x = jnp.where((x >= 0) & (x < entries), x + start, -1)
        return x.reshape(n * first, *own[1:])

    return [one(slot, x) for slot, x in named]


def _unfold(x, lead, b, shape):
    """A result of the folded call in its own shape; a gradient is summed over the axes that its operand lacks."""
    x = x.reshape(*lead, b, *x.shape[1:])
    lacking = tuple(i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want)
    return jnp.sum(x, axis=lacking, keepdims=True, dtype=x.dtype) if lacking else x
