"""Calls the public functions with the inputs of a case."""

import functools

import jax
import jax.numpy as jnp

import flashjax
from cases import DIFFERENTIABLE, Case, Inputs


def to_device(arrays: dict) -> dict:
    return jax.tree.map(jnp.asarray, arrays)


def function(case: Case, inputs: Inputs, implementation: str | None, **options):
    """A jitted f(arrays) -> (out, lse[, k_cache, v_cache])."""
    lse = "return_softmax_lse" if case.layout == "cached" else "return_lse"
    call = functools.partial(
        getattr(flashjax, case.function), **{lse: True, **inputs.options, **options}, implementation=implementation
    )
    return jax.jit(lambda arrays: call(**arrays))


def differentiated(case: Case, inputs: Inputs, implementation: str | None, **options):
    """A jitted f(arrays, (dout, dlse)) -> ((out, lse), gradients by name)."""
    forward = function(case, inputs, implementation, **options)

    def run(arrays, cotangents):
        wanted = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
        rest = {name: x for name, x in arrays.items() if name not in wanted}
        results, vjp = jax.vjp(lambda wanted: forward(wanted | rest), wanted)
        return results, vjp(cotangents)[0]

    return jax.jit(run)
