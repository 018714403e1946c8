"""Calls the public functions with the inputs of a case."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax
import oracle
from cases import DIFFERENTIABLE, Case, Inputs


def _compiler_options(implementation):
    """The reference is long to compile, and its results do not need to come fast."""
    cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 0} if implementation == "reference" and cpu else None


def expect_decline(case: Case, implementation: str):
    """Of a case that an implementation cannot serve, it must say so before anything runs."""
    if implementation in case.declined_by:
        return pytest.raises(NotImplementedError, match=f'implementation="{implementation}" cannot serve')
    return contextlib.nullcontext()


def to_device(arrays: dict) -> dict:
    return jax.tree.map(jnp.asarray, arrays)


def _public(case: Case, inputs: Inputs, implementation: str | None, **options):
    lse = "return_softmax_lse" if case.layout == "cached" else "return_lse"
    call = functools.partial(
        getattr(flashjax, case.function), **{lse: True, **inputs.options, **options}, implementation=implementation
    )
    return lambda arrays: call(**arrays)


def function(case: Case, inputs: Inputs, implementation: str | None, **options):
    """A jitted f(arrays) -> (out, lse[, k_cache, v_cache])."""
    call = _public(case, inputs, implementation, **options)
    return jax.jit(call, compiler_options=_compiler_options(implementation))


def differentiated(case: Case, inputs: Inputs, implementation: str | None, **options):
    """A jitted f(arrays, (dout, dlse)) -> ((out, lse), gradients by name); or (dout,) -> ((out,), ...)."""
    call = _public(case, inputs, implementation, **options)

    def run(arrays, cotangents):
        wanted = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
        rest = {name: x for name, x in arrays.items() if name not in wanted}
        results, vjp = jax.vjp(lambda wanted: call(wanted | rest)[: len(cotangents)], wanted)
        return results, vjp(cotangents)[0]

    return jax.jit(run, compiler_options=_compiler_options(implementation))


def check_repeatable(case: Case, implementation: str):
    """A deterministic backward: the same bits in every run; and but for rounding the gradients of the other order."""
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    out, lse = jax.eval_shape(function(case, inputs, implementation), arrays)
    cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype), jnp.ones(lse.shape)
    call = differentiated(case, inputs, implementation, deterministic=True)
    first = jax.tree.map(np.asarray, call(arrays, cotangent)[1])
    for run in range(5):
        again = call(arrays, cotangent)[1]
        for name in first:
            oracle.same_bits(again[name], first[name], f"gradient of {name}, run {run}")
    other = differentiated(case, inputs, implementation)(arrays, cotangent)[1]
    for name in first:
        x, y = (np.asarray(value, np.float64) for value in (first[name], other[name]))
        assert np.linalg.norm(x - y) <= 1e-3 * np.linalg.norm(y), name
