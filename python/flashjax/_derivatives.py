"""The operation as JAX primitives that can be differentiated in both modes, to any order.

flashjax_attention computes out and lse. Its derivative is flashjax_tangent, linear in the tangents and computed by the
reference; the transpose of that is flashjax_backward, which has kernels. Those two have the reference's derivatives.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flashjax import _batching, _compat, _partition, _reference, _ring
from flashjax._operation import BACKWARD, FORWARD, TANGENT, Call
from flashjax._slots import DIFFERENTIABLE, in_order
from flashjax._types import Arrays, Attrs

COMPILED_GRADIENTS = ("q", "k", "v", "bias", "sinks")  # what flashjax_backward can return


def attention(arrays: Arrays, attrs: Attrs) -> tuple[jax.Array, jax.Array]:
    """out (b, s, h, e) in the operand dtype and lse (b, h, s) in float32, of the arrays named as in _slots.py."""
    names = in_order(arrays)
    out, lse = _bind(Call(FORWARD, names, attrs), *(arrays[name] for name in names))
    return out, lse


def _bind(call: Call, *operands):
    # What varies in one operand varies in the results; said here, so that transposition sums over the devices.
    axes = frozenset().union(*(_compat.varying(x) for x in operands))
    operands = [_vary(x, axes - _compat.varying(x)) for x in operands]
    return _PRIMITIVES[call.direction].bind(*operands, names=call.names, attrs=call.attrs, wanted=call.wanted)


def _vary(x, axes):
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


# Every rule gets the call that a bind's parameters describe.


def _result_types(call: Call, *operands):
    axes = frozenset().union(*(_compat.varying(x) for x in operands))
    types = zip(call.result_types(operands), _partition.result_shardings(call, operands), strict=True)
    return [_compat.typed(operands[0], shape, dtype, sharding, axes) for (shape, dtype), sharding in types]


@functools.lru_cache(maxsize=1024)
def _compiled(call: Call):
    return jax.jit(functools.partial(_bind, call))


def _eager(call: Call, *operands):
    with jax.disable_jit(False):
        return _compiled(call)(*operands)


def _reference_of(call: Call):
    """The call in jnp, to be differentiated."""

    def run(*operands):
        shardings = _partition.result_shardings(call, [jax.typeof(x) for x in operands])
        function = _batching.folded(call, functools.partial(_ring.reference, call))
        return _partition.outside_types(function, shardings)(*operands)

    return run


def _attention_jvp(call: Call, primals, tangents):
    out, lse = _bind(call, *primals)
    # Named here, so that what a checkpoint policy saves is what the derivative reads.
    out, lse = checkpoint_name(out, "flashjax_out"), checkpoint_name(lse, "flashjax_lse")
    nonzero = {
        name: tangent
        for name, tangent in zip(call.names, tangents, strict=True)
        if name in DIFFERENTIABLE and type(tangent) is not ad.Zero
    }
    if not nonzero:
        return [out, lse], [_zero(x) for x in (out, lse)]
    linear = Call(TANGENT, call.names, call.attrs, tuple(nonzero))
    return [out, lse], _bind(linear, *primals, out, lse, *nonzero.values())


def _zero(x):
    type_: Any = jax.typeof(x)
    return ad.Zero(type_.to_tangent_aval())


def _reference_jvp(call: Call, primals, tangents):
    """out and lse are functions of the other operands here, and the reference computes them itself."""
    results = _bind(call, *primals)
    moving = [
        i
        for i, (slot, tangent) in enumerate(zip(call.operands, tangents, strict=True))
        if type(tangent) is not ad.Zero and slot.name not in ("out", "lse") and slot.type != "S32"
    ]
    if not moving:
        return results, [_zero(x) for x in results]

    def function(*xs):
        operands = list(primals)
        for i, x in zip(moving, xs, strict=True):
            operands[i] = x
        return _reference_of(call)(*operands)

    _, changes = jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])
    return results, list(changes)


def _tangent_transpose(call: Call, cotangents, *operands):
    n = len(call.names)
    primals, out, lse, tangents = operands[:n], *operands[n : n + 2], operands[n + 2 :]
    if all(type(ct) is ad.Zero for ct in cotangents):
        gradients = {name: ad.Zero(x.aval.to_ct_aval()) for name, x in zip(call.wanted, tangents, strict=True)}
    else:
        gradients = {}
        compiled = tuple(name for name in call.wanted if name in COMPILED_GRADIENTS)
        if compiled:
            rule = _gathered_gradients if call.is_indirect else _kernel_gradients
            dout, dlse = cotangents
            only = type(dlse) is ad.Zero
            of_out = dataclasses.replace(call, attrs=dataclasses.replace(call.attrs, out_only=only))
            gradients |= rule(of_out, compiled, primals, out, lse, [ad.instantiate_zeros(dout), lse if only else dlse])
        rest = tuple(name for name in call.wanted if name not in compiled)
        if rest:
            forward = _reference_of(Call(FORWARD, call.names, call.attrs))
            function, values = _in_slots(call, rest, primals, lambda xs: forward(*xs))
            cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
            gradients |= dict(zip(rest, jax.vjp(function, *values)[1](cotangents), strict=True))
    return [None] * (n + 2) + [gradients[name] for name in call.wanted]


def _in_slots(call: Call, names, primals, function):
    """`function` of all primals as a function of some slots, and the values of those."""
    at = [call.names.index(name) for name in names]

    def of_some(*xs):
        changed = list(primals)
        for i, x in zip(at, xs, strict=True):
            changed[i] = x
        return function(changed)

    return of_some, [primals[i] for i in at]


def _kernel_gradients(call: Call, wanted, primals, out, lse, cotangents):
    extra = tuple(name for name in wanted if name not in ("q", "k", "v"))
    results = _bind(Call(BACKWARD, call.names, call.attrs, extra), *primals, out, lse, *cotangents)
    gradients = dict(zip(("q", "k", "v", *extra), results, strict=True))
    return {name: gradients[name].astype(primals[call.names.index(name)].dtype) for name in wanted}


def _gathered_gradients(call: Call, wanted, primals, out, lse, cotangents):
    """No backward kernel reads through a table: gather the keys, and scatter their gradients."""
    whole = Call(BACKWARD, call.names, call.attrs, tuple(name for name in wanted if name not in ("q", "k", "v")))
    n = len(call.names)

    def run(*operands):
        def gather(changed):
            folded = _batching.fold(whole, [*changed, *operands[n:]])
            arrays = _reference.gather_cache(dict(zip(call.names, folded[:n], strict=True)))
            return [arrays[name] for name in wanted], (arrays, folded[n:])

        function, values = _in_slots(call, wanted, operands[:n], gather)
        pulled: Any = jax.vjp(function, *values, has_aux=True)
        _, scatter, (arrays, rest) = pulled
        names = in_order(arrays)
        dense = Call(TANGENT, names, call.attrs, wanted)
        out, lse, *cotangents = rest
        gradients = _kernel_gradients(dense, wanted, [arrays[name] for name in names], out, lse, cotangents)
        return list(scatter([gradients[name] for name in wanted]))

    shardings = [jax.typeof(primals[call.names.index(name)]).sharding for name in wanted]
    values: Any = _partition.outside_types(run, shardings)(*primals, out, lse, *cotangents)
    return dict(zip(wanted, values, strict=True))


def _with_call(direction, rule):
    """A rule of JAX, (*args, **parameters), from one that takes the call."""
    return lambda *args, names, attrs, wanted: rule(Call(direction, names, attrs, wanted), *args)


def _primitive(direction: str, jvp) -> Primitive:
    primitive = Primitive(f"flashjax_{'attention' if direction == FORWARD else direction}")
    primitive.multiple_results = True
    primitive.def_impl(_with_call(direction, _eager))
    primitive.def_abstract_eval(_with_call(direction, _result_types))
    ad.primitive_jvps[primitive] = _with_call(direction, jvp)

    def batch(call, operands, dims):
        return _batching.batching_rule(functools.partial(_bind, call), operands, dims, call)

    batching.primitive_batchers[primitive] = _with_call(direction, batch)
    for platform in ("cpu", "cuda", None):

        def lower(ctx, *values, names, attrs, wanted, platform=platform):
            named = platform or "/".join(ctx.platforms or ctx.module_context.platforms)
            return _partition.lower(ctx, Call(direction, names, attrs, wanted), named, *values)

        mlir.register_lowering(primitive, lower, platform=platform)
    _compat.requires_devices(primitive)
    return primitive


_PRIMITIVES = {
    FORWARD: _primitive(FORWARD, _attention_jvp),
    TANGENT: _primitive(TANGENT, _reference_jvp),
    BACKWARD: _primitive(BACKWARD, _reference_jvp),
}
ad.primitive_transposes[_PRIMITIVES[TANGENT]] = lambda cotangents, *operands, names, attrs, wanted: _tangent_transpose(
    Call(TANGENT, names, attrs, wanted), cotangents, *operands
)
