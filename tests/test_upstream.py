"""FlashAttention-2's kernels: every case that they take against the oracle, and against our own kernels.

Skipped where the build does not hold them for this GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax
import oracle
import soak
import test_decode
import test_sequences
from cases import CASES, cotangents
from conftest import ON_GPU
from harness import differentiated, function, to_device

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")]


def _half(case):
    return case if case.dtype != "float32" else dataclasses.replace(case, dtype="bfloat16")


HALF = [_half(case) for case in (*CASES, *test_decode.DECODE, *(x.values[0] for x in test_sequences.CASES))]
ALL = [pytest.param(case, id=case.id) for case in HALF]
TRAINED = [pytest.param(case, id=case.id) for case in HALF if case.layout != "cached"]


@pytest.fixture(autouse=True)
def _served():
    """A call that upstream's kernels decline says why before it runs, and is skipped; so is all if there are none."""
    q = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(flashjax.flash_mha(q, q, q, implementation="upstream"))
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        if "is not in this build" not in str(error):
            raise
        pytest.skip(str(error))


def _yardstick(case, naive, expected):
    """Upstream's tanh is the fast one of the hardware, good for 11 bits: that is an error of each score, and of lse."""
    error = np.abs(naive - expected) + 2.0**-11 * case.softcap * np.abs(expected)
    return expected + error if case.softcap else naive


@pytest.mark.parametrize("case", ALL)
def test_forward(case):
    inputs = case.build()
    call = function(case, inputs, "upstream")
    out, lse, *_ = call(to_device(inputs.arrays))
    expected, naive = oracle.run(case, inputs), oracle.run(case, inputs, naive=True)
    tanh = 2.0**-12 * case.softcap  # half of the largest error, of which twice is allowed
    oracle.compare("lse", lse, expected.lse, naive.lse + tanh, expected.logit)
    oracle.compare("out", out, expected.out, _yardstick(case, naive.out, expected.out), expected.logit)
    again = call(to_device(inputs.arrays))
    oracle.same_bits(again[0], out, "out of a second call")


@pytest.mark.parametrize("case", TRAINED)
def test_backward(case):
    inputs = case.build()
    arrays = to_device(inputs.arrays)
    dout_dlse = cotangents(case, inputs, oracle.run(case, inputs).lse)
    expected, naive = (oracle.run(case, inputs, dout_dlse, naive=x) for x in (False, True))
    for deterministic in (False, True):
        call = differentiated(case, inputs, "upstream", deterministic=deterministic)
        _, grads = call(arrays, dout_dlse)
        for name, grad in grads.items():
            worse = _yardstick(case, naive.grads[name], expected.grads[name])
            if name == "sinks" or (case.h != case.g and name in "kv"):
                # Upstream rounds the gradient of each query head, and sinks are applied to an output that is rounded.
                worse = expected.grads[name] + 2 * (worse - expected.grads[name])
            what = f"gradient of {name}, deterministic={deterministic}"
            oracle.compare(what, grad, expected.grads[name], worse, expected.logit)
        if deterministic:
            again = call(arrays, dout_dlse)[1]
            for name in grads:
                oracle.same_bits(again[name], grads[name], f"gradient of {name}, second call")


def _random(count):
    """Of the soak's cases the first that these rows are made for, whatever else may be asked of them."""
    seed = 0
    while count:
        case = soak.random_case(seed)
        if case.d % 8 == 0 and case.d <= 256 and case.e in (None, case.d) and not (case.bias or case.segments):
            yield pytest.param(_half(case), id=case.id)
            count -= 1
        seed += 1


@pytest.mark.parametrize("case", list(_random(48)))
def test_random_calls(case):
    soak.poison()
    test_forward(case)
    if case.layout != "cached":
        soak.poison()
        test_backward(case)


@pytest.mark.parametrize("page", [0, 16])
def test_bad_values_are_skipped(page):
    test_decode.test_bad_values_are_skipped(page, 4, 128, "upstream")


@pytest.mark.parametrize("offsets", [(0, 300, 100, 400, 500), (-5, 90, 2**31 - 1, -(2**31), 77)])
@pytest.mark.parametrize("keys", ["alike", "good"])
def test_bad_offsets(offsets, keys):
    test_sequences.test_bad_offsets(offsets, keys, 500, "upstream")


def test_in_command_buffers(random):
    """A program of two layers and their gradients that XLA may record as a CUDA graph: run again with other values."""
    cu = jnp.array([0, 100, 350, 350, 600], jnp.int32)

    def step(x):
        def loss(x):
            for _ in range(2):
                x = flashjax.flash_mha_varlen(
                    x, x, x, cu, is_causal=True, deterministic=True, implementation="upstream"
                )
            return (x.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(x)

    flags = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
    plain = jax.jit(step, compiler_options={"xla_gpu_enable_command_buffer": ""})
    recorded = jax.jit(step, compiler_options=flags)
    for seed in range(3):
        x = jnp.asarray(random.standard_normal((600, 4, 64)), jnp.bfloat16)
        for _ in range(2):
            oracle.same_bits(recorded(x), plain(x), f"seed {seed}")


# Problems larger than the oracle can do: implementations that share nothing but the interface.
LARGE = {
    "causal": dict(is_causal=True),
    "full": dict(),
    "window": dict(window_size=(300, 50)),
    "grouped": dict(is_causal=True, heads=(8, 2)),
    "uneven": dict(is_causal=True, shape=(2, 1000, 1777)),
    "softcap": dict(is_causal=True, softcap=2.0),
    "dropout": dict(is_causal=True, dropout_rate=0.2, dropout_key=np.array([3, 4], np.uint32)),
}


@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LARGE)
def test_against_ours(name, dtype, d, random):
    options = dict(LARGE[name])
    b, s, t = options.pop("shape", (2, 2048, 2048))
    h, g = options.pop("heads", (4, 4))
    q, dout = (jnp.asarray(random.standard_normal((b, s, h, d)), dtype) for _ in range(2))
    k, v = (jnp.asarray(random.standard_normal((b, t, g, d)), dtype) for _ in range(2))

    def run(implementation):
        def call(q, k, v):
            return flashjax.flash_mha(q, k, v, implementation=implementation, return_lse=True, **options)

        (out, lse), vjp = jax.vjp(call, q, k, v)
        return [out, lse, *vjp((dout, jnp.ones_like(lse)))]

    unit = 2.0**-8 if dtype == "bfloat16" or name == "softcap" else 2.0**-11  # see _yardstick
    limits = {"lse": 1e-4 if name == "softcap" else 1e-5}
    names, theirs = ("out", "lse", "dq", "dk", "dv"), run("upstream")
    # Of dropout upstream's rows are ours.
    for other in ("reference",) if name == "dropout" else ("cuda", "reference"):
        for what, x, y in zip(names, run(other), theirs, strict=True):
            x, y = (np.asarray(array, np.float64) for array in (x, y))
            assert np.isfinite(y).all(), what
            error = np.linalg.norm(x - y) / np.linalg.norm(x)
            assert error < limits.get(what, 1.5 * unit), f"{what}, beside {other}: {error:.3g}"


def test_errors_are_raised():
    """What CUDA says of a launch comes back as an error, after which calls are served; upstream ends the process."""
    q = jnp.ones((2**16, 8, 1, 32), jnp.bfloat16)

    def gradient(q, **options):
        return jax.grad(lambda q: flashjax.flash_mha(q, q, q, implementation="upstream", **options).sum())(q)

    with pytest.raises(jax.errors.JaxRuntimeError, match="invalid configuration"):
        jax.block_until_ready(gradient(q, deterministic=True))  # more rows than a grid has room for
    assert np.isfinite(np.asarray(gradient(q[:4], deterministic=True), np.float32)).all()
