"""Eight CPU devices, the implementations under test, and one seed for each test."""

import os

if "FLASHJAX_TEST_GPUS" in os.environ:  # each worker takes one of them
    _gpus = os.environ["FLASHJAX_TEST_GPUS"].split(",")
    _worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ["CUDA_VISIBLE_DEVICES"] = _gpus[_worker % len(_gpus)]
# Eight devices on two busy cores may wait long for each other, after which XLA ends the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import zlib

import hypothesis
import jax
import numpy as np
import pytest

import emulated

hypothesis.settings.register_profile(
    "flashjax", deadline=None, derandomize=True, max_examples=12, database=None, print_blob=False
)
hypothesis.settings.load_profile("flashjax")

ON_GPU = emulated.installed or jax.default_backend() == "gpu"
IMPLEMENTATIONS = ("cuda",) if ON_GPU else ("cpu", "reference")


def pytest_generate_tests(metafunc):
    """`implementation`: every one that this machine can run; `compiled`: those that are not the reference."""
    for fixture, names in (
        ("implementation", IMPLEMENTATIONS),
        ("compiled", tuple(name for name in IMPLEMENTATIONS if name != "reference")),
    ):
        if fixture in metafunc.fixturenames:
            marks = {"cuda": (pytest.mark.cuda,)}
            metafunc.parametrize(fixture, [pytest.param(name, marks=marks.get(name, ())) for name in names])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """A CUDA kernel may decline a call; then the case is skipped, with its reason. Nothing else may decline."""
    outcome = yield
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    named = any(isinstance(x, str) and x == "cuda" for x in parameters.values())
    on_cuda = named or item.get_closest_marker("cuda")
    if outcome.excinfo is not None and outcome.excinfo[0] is NotImplementedError and on_cuda:
        try:
            pytest.skip(str(outcome.excinfo[1]))
        except pytest.skip.Exception as skip:
            outcome.force_exception(skip)


def pytest_runtest_setup(item):
    """Under the emulator each test has an order of its own, the same in every run."""
    os.environ["FLASHJAX_EMULATOR_SEED"] = str(zlib.crc32(item.nodeid.encode()))


@pytest.fixture
def random(request) -> np.random.Generator:
    """A generator that depends on the test's id and on nothing else."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
