"""flashjax as on a GPU, whose kernels a model of one runs on the CPU: FLASHJAX_EMULATOR is a build of tests/emulator.

    FLASHJAX_EMULATOR=BUILD python -m pytest tests

Import it before flashjax. The platform "cpu" then stands for "cuda", and there is no CPU module: docs/emulator.md.
"""

import importlib.util
import os
import pathlib
import sys

import jax

installed = "FLASHJAX_EMULATOR" in os.environ


def _install(build: pathlib.Path) -> None:
    (path,) = build.glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("flashjax._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["flashjax._cuda"] = module
    sys.modules["flashjax._cpu"] = None  # type: ignore[assignment]
    register = jax.ffi.register_ffi_target
    jax.ffi.register_ffi_target = lambda name, handler, platform: register(name, handler, platform="cpu")
    try:
        from flashjax import _support
    finally:
        jax.ffi.register_ffi_target = register
    why_not, resolve = _support.why_not, _support.resolve

    def there(platform):
        return "cuda" if platform == "cpu" else platform

    _support.why_not = lambda *args: why_not(*args[:4], there(args[4]))
    _support.resolve = lambda *args: resolve(*args[:3], there(args[3]))


if installed:
    _install(pathlib.Path(os.environ["FLASHJAX_EMULATOR"]))
