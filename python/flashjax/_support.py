"""What runs where, and why not."""

import dataclasses
import functools
import importlib
from collections.abc import Iterator

import jax

from flashjax._types import Attrs

PLATFORM = {"cpu": "cpu", "cuda": "cuda", "upstream": "cuda"}  # of each compiled implementation
MAX_HEAD_DIM = 512  # of the compiled CPU kernels


@functools.cache
def extension(platform: str):
    """The extension module of a platform, or None if it was not built."""
    try:
        return importlib.import_module(f"flashjax._{platform}")
    except ModuleNotFoundError:
        return None


def why_not(implementation: str, direction: str, arrays, attrs: Attrs, platform: str) -> str | None:
    """Why an implementation cannot serve a call on a platform; None if it can. `arrays`: slot -> shape and dtype."""
    if implementation == "reference":
        return None
    if PLATFORM[implementation] != platform:
        return f"the program is lowered for {platform}"
    module = extension(platform)
    if module is None:
        return f"flashjax was built without its {platform} module (see Install in README)"
    d, e = arrays["q"].shape[-1], arrays["v"].shape[-1]
    if implementation == "cpu":
        if min(d, e) < 1 or max(d, e) > MAX_HEAD_DIM:
            return f"the CPU kernels take head dims from 1 to {MAX_HEAD_DIM}; got d = {d}, e = {e}"
        if direction == "backward" and ("page_table" in arrays or "batch_idx" in arrays):
            return "no backward kernel reads through a page table"
        return None
    reason = _why_no_kernel(implementation, direction, arrays, attrs, 0)
    return None if values_stay_in_keys(implementation, direction, arrays, attrs) else reason


def values_stay_in_keys(implementation: str, direction: str, arrays, attrs: Attrs) -> bool:
    """No kernel takes the values of a call as an array, but one takes them as what they are, columns of the keys."""
    if not attrs.shared_e or implementation != "cuda" or not _why_no_kernel("cuda", direction, arrays, attrs, 0):
        return False
    return not _why_no_kernel("cuda", direction, arrays, attrs, attrs.shared_e)


def _why_no_kernel(implementation, direction, arrays, attrs, shared_e):
    """Of the CUDA module, for any GPU."""
    module = extension("cuda")
    assert module is not None
    shapes = {name: _sizes(x.shape) for name, x in arrays.items()}
    asked = dataclasses.asdict(attrs) | {"upstream": implementation == "upstream", "shared_e": shared_e}
    return module.why_not(direction, arrays["q"].dtype.name, shapes, asked) or None


def _sizes(shape) -> list[int]:
    """Sizes for the module, which decides without those that an exported program leaves open: they are large and odd,
    and equal only where they have one expression.
    """
    return [size if isinstance(size, int) else 2**20 + 2 * (hash(size) % 2**20) + 1 for size in shape]


def resolve(direction: str, arrays, attrs: Attrs, platform: str) -> str:
    """The implementation that serves a call on the platform that the program is lowered for."""
    platform = "cuda" if platform in ("cuda", "gpu") else platform
    if attrs.implementation is not None:
        reason = why_not(attrs.implementation, direction, arrays, attrs, platform)
        if reason is not None:
            raise NotImplementedError(f'flashjax: implementation="{attrs.implementation}" cannot serve: {reason}')
        return attrs.implementation
    if platform in ("cpu", "cuda") and why_not(platform, direction, arrays, attrs, platform) is None:
        return platform
    return "reference"


@dataclasses.dataclass(frozen=True)
class Support:
    """One attention call found in a function: what would run it, and why the others would not."""

    runs: str  # "cpu", "cuda", "upstream" or "reference"; "" if what was asked for cannot serve
    why_not: dict[str, str]
    call: str  # the arguments' shapes

    def __str__(self):
        reasons = "".join(f"\n  not {name}: {reason}" for name, reason in self.why_not.items())
        return f"{self.call}: runs on {self.runs or 'nothing'}{reasons}"


def support(function, *args, platform: str | None = None, **kwargs) -> list[Support]:
    """What would run the attention calls that `function(*args, **kwargs)` makes, without running it.

    Args:
      function: any function that JAX can trace: `flash_mha` itself, a model, its gradient.
      *args, **kwargs: its arguments; arrays may be `jax.ShapeDtypeStruct`s.
      platform: "cpu", "cuda", "tpu", ...; by default the one that JAX would use.

    Returns:
      One `Support` for each forward or backward call, in the order in which they are traced.

    Example:
      >>> import jax, jax.numpy as jnp, flashjax
      >>> q = jax.ShapeDtypeStruct((2, 128, 8, 64), jnp.float32)
      >>> [call.runs for call in flashjax.support(flashjax.flash_mha, q, q, q, platform="cpu")]
      ['cpu']
    """
    platform = platform or jax.default_backend()
    platform = "cuda" if platform in ("cuda", "gpu") else platform
    dynamic = {name: x for name, x in kwargs.items() if hasattr(x, "shape")}
    static = {name: x for name, x in kwargs.items() if name not in dynamic}
    is_array = [hasattr(x, "shape") for x in jax.tree.leaves(args)]
    leaves, tree = jax.tree.flatten(args)

    def traced(arrays, named):
        arrays = iter(arrays)
        filled = [next(arrays) if a else x for a, x in zip(is_array, leaves, strict=True)]
        return function(*jax.tree.unflatten(tree, filled), **named, **static)

    jaxpr = jax.make_jaxpr(traced)([x for a, x in zip(is_array, leaves, strict=True) if a], dynamic)
    return [_describe(eqn, platform) for eqn in _attention_calls(jaxpr.jaxpr)]


def _attention_calls(jaxpr) -> Iterator:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("flashjax_attention", "flashjax_backward"):
            yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _attention_calls(inner)


def _describe(eqn, platform) -> Support:
    direction = "forward" if eqn.primitive.name == "flashjax_attention" else "backward"
    attrs = eqn.params["attrs"]
    arrays = dict(zip(eqn.params["names"], (var.aval for var in eqn.invars), strict=False))
    reasons = {name: why_not(name, direction, arrays, attrs, platform) for name in (*PLATFORM, "reference")}
    try:
        runs = resolve(direction, arrays, attrs, platform)
    except NotImplementedError:
        runs = ""
    shapes = ", ".join(f"{name} {x.dtype.name}{list(x.shape)}" for name, x in arrays.items())
    return Support(runs, {name: why for name, why in reasons.items() if why}, f"{direction} of {shapes}")
