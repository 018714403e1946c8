"""The oracle and the cases themselves: wrong yardsticks and blind cases are found here."""

import numpy as np
import pytest

import oracle
from cases import BY_ID, CASES, DIFFERENTIABLE, Inputs, cotangents

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["everything", "packed-everything", "bias-rows-sinks", "empty-rows-sinks"])
def test_gradients_by_differences(name):
    case = BY_ID[name]
    inputs = case.build()
    lse = oracle.run(case, inputs).lse
    weights = tuple(np.where(np.isnan(x), 0, x).astype(np.float64) for x in cotangents(case, inputs, lse))
    grads = oracle.run(case, inputs, weights).grads
    random = np.random.default_rng(case.seed)
    wide = {key: np.asarray(inputs.arrays[key]).astype(np.float64) for key in DIFFERENTIABLE if key in inputs.arrays}

    def value(arrays):
        result = oracle.run(case, Inputs(inputs.arrays | arrays, inputs.options))
        finite = np.isfinite(result.lse)
        return (result.out * weights[0]).sum() + (np.where(finite, result.lse, 0) * weights[1]).sum()

    for key, x in wide.items():
        direction = random.standard_normal(x.shape)
        step = 1e-6 * direction
        difference = (value(wide | {key: x + step}) - value(wide | {key: x - step})) / 2e-6
        slope = np.where(grads[key] == 0, 0, grads[key] * direction).sum()
        assert difference == pytest.approx(slope, rel=1e-5, abs=1e-6), key


def _change(case, expected, inputs) -> float:
    try:
        other = oracle.run(case, inputs)
    except (IndexError, ValueError):  # without it the call does not fit its arrays
        return np.inf
    for x, y in ((other.out, expected.out), (other.lse, expected.lse)):
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return np.inf
    finite = np.isfinite(expected.lse)
    size = np.abs(expected.out).max(initial=1e-30)
    return max(
        np.abs(other.out - expected.out).max(initial=0) / size,
        np.abs(other.lse[finite] - expected.lse[finite]).max(initial=0),
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES if case.features])
def test_every_option_matters(case):
    """Each option that a case turns on changes what is expected of it; the inert ones must not.

    A case that passes without its option tests nothing. Empty problems are excused.
    """
    inputs = case.build()
    expected = oracle.run(case, inputs)
    seen = np.isfinite(expected.lse).any()
    for feature in case.features:
        change = _change(case, expected, case.disabled(feature, inputs))
        if feature in case.inert:
            assert change < 1e-9, f"`{feature}` should change nothing here"
        elif seen or feature == "sinks":
            assert change > 0.02, f"`{feature}` changes the result by {change:.3g} only"


def test_naive_is_close():
    """The yardstick is near the truth, so that twice its error means something."""
    for name, limit in (("causal-float32", 3e-6), ("causal-float16", 3e-3), ("causal-bfloat16", 2e-2)):
        case = BY_ID[name]
        inputs = case.build()
        expected, naive = oracle.run(case, inputs), oracle.run(case, inputs, naive=True)
        assert np.abs(naive.out - expected.out).max() < limit


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x * (1 + 1e-5),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size // 2, x + 1e-4, x),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.nan, x),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.inf, x),
        lambda x: np.roll(x, 1, axis=1),
        lambda x: x[:, :-1],
    ],
)
def test_compare_sees_damage(damage):
    case = BY_ID["causal-float32"]
    inputs = case.build()
    expected, naive = oracle.run(case, inputs), oracle.run(case, inputs, naive=True)
    oracle.compare("out", expected.out.astype(np.float32), expected.out, naive.out, expected.logit)
    with pytest.raises(AssertionError):
        oracle.compare("out", damage(expected.out).astype(np.float32), expected.out, naive.out, expected.logit)
