"""A few of the random cases that tests/soak.py makes; that program runs as many as there is time for."""

import jax
import pytest

import soak


@pytest.mark.parametrize("seed", range(8))
def test_random_case(seed, compiled):
    assert soak.check(soak.random_case(seed), compiled, repeat=2)


def test_a_wrong_result_is_found(compiled, monkeypatch):
    """One element of one gradient, off by a tenth."""
    right = soak.differentiated

    def wrong(*args, **kwargs):
        def call(arrays, cotangents):
            results, grads = right(*args, **kwargs)(arrays, cotangents)
            return results, {**grads, "v": grads["v"].at[(0,) * grads["v"].ndim].add(0.1)}

        return jax.jit(call)

    monkeypatch.setattr(soak, "differentiated", wrong)
    case = next(case for case in map(soak.random_case, range(99)) if case.layout == "dense" and case.dtype == "float32")
    with pytest.raises(AssertionError, match="gradient of v"):
        soak.check(case, compiled, repeat=1)
