"""A few of the random cases that tests/soak.py makes; that program runs as many as there is time for."""

import jax
import numpy as np
import pytest

import oracle
import soak
from cases import cotangents


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


def test_luck_excuses_no_more_than_rounding():
    """Two sinks' gradients for which the plain computation is lucky: its error is 2e-4, elsewhere about 2e-3."""
    case = soak.random_case(5366279051)
    inputs = case.build()
    backward = cotangents(case, inputs, oracle.run(case, inputs).lse)
    expected, naive = (oracle.run(case, inputs, backward, naive=x) for x in (False, True))
    want = expected.grads["sinks"]
    for error, right in ((1.7e-3, True), (1.7e-2, False)):
        got = (want + error).astype(np.float32)
        with pytest.raises(AssertionError):
            oracle.compare("sinks", got, want, naive.grads["sinks"], expected.logit, inputs.arrays["q"].dtype)
        if right:
            soak.judge("gradient of sinks", got, case, inputs, expected, naive)
        else:
            with pytest.raises(AssertionError, match="gradient of sinks"):
                soak.judge("gradient of sinks", got, case, inputs, expected, naive)
