"""What JAX does not offer under a public name, or under one that changes. tests/test_transforms.py watches it."""

import contextlib
import importlib
from typing import Any

import jax
import jax.core


def requires_devices(primitive) -> None:
    """Makes jit hand its devices to the primitive's lowering, which custom_partitioning needs to make its mesh.

    Without this, a program for several devices gathers the operands: see `devices_are_known`.
    """
    dispatch = importlib.import_module("jax._src.dispatch")
    getattr(dispatch, "prim_requires_devices_during_lowering", set()).add(primitive)


def devices_are_known(ctx) -> bool:
    """Whether the lowering is for several devices, all given, under a mesh that JAX partitions over."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "abstract_mesh", None)
    return getattr(context, "device_assignment", None) is not None and mesh is not None and mesh.size > 1


def is_for_export(ctx) -> bool:
    """Whether the lowering is one that jax.export will serialize."""
    return ctx.module_context.lowering_parameters.for_export


def varying(x) -> frozenset:
    """The manual mesh axes over which an array, or its type, varies (shard_map with check_vma)."""
    type_: Any = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    return type_.manual_axis_type.varying


def typed(like, shape, dtype, sharding, axes):
    """The type of a result, on the mesh and in the memory of `like`, varying over `axes`."""
    axes = like.manual_axis_type.update(varying=axes)
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding, manual_axis_type=axes)


@contextlib.contextmanager
def manual_axes(sizes):
    """A context in which a lowering may name mesh axes that are manual around its call, on values without types."""
    core, config = (importlib.import_module(f"jax._src.{name}") for name in ("core", "config"))
    with core.extend_axis_env_nd(list(sizes.items())), config._check_vma(False):
        yield
