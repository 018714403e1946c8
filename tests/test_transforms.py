"""Every JAX transformation of the operation: derivatives of both modes and of second order, vmap, scan, checkpoint, jit
and its debugging modes, export. Derivatives are compared with float64 ones that share no code with flashjax.
"""

import dataclasses
import functools
import importlib
import itertools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashjax import _compat, _derivatives, _ffi, _reference
from flashjax._types import Attrs

DISABLED = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("flashjax_fwd", "flashjax_bwd")]
ATTRS = Attrs(scale=0.4, window_right=0, softcap=3.0)
TABLE = pathlib.Path(__file__).parents[1] / "csrc/attention/kernels.def"
INTEGER = ("segment", "cu_seqlens", "seqused", "leftpad", "shift", "batch_idx", "page_table")


def dense(random, b=2, s=4, t=6, h=4, g=2, d=5, e=3):
    """Every differentiable argument."""
    arrays = {
        "q": (b, s, h, d),
        "k": (b, t, g, d),
        "v": (b, t, g, e),
        "bias": (b, 1, 1, s, t),
        "alibi_slopes": (1, h),
        "sinks": (1, h),
    }
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}


def naive(arrays, attrs=ATTRS):
    """out and lse in float64, in the plainest way; for dense causal calls."""
    q, k, v, bias, alibi, sinks = (arrays[name] for name in ("q", "k", "v", "bias", "alibi_slopes", "sinks"))
    s, t, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = attrs.scale * jnp.einsum("bshd,bthd->bhst", q, k)
    scores = attrs.softcap * jnp.tanh(scores / attrs.softcap)
    distance = jnp.arange(t)[None, :] - jnp.arange(s)[:, None] - (t - s)
    scores = scores + bias[:, 0] - alibi[:, :, None, None] * abs(distance)
    scores = jnp.where(distance <= 0, scores, -jnp.inf)
    lse = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), sinks[:, :, None])
    return jnp.einsum("bhst,bthe->bshe", jnp.exp(scores - lse[..., None]), v), lse


def operation(arrays, attrs=ATTRS):
    return _derivatives.attention(arrays, attrs)


def loss(function, arrays):
    out, lse = function(arrays)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(lse == -jnp.inf, 0, lse)))


def close(got, want, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, want)


def in_float64(transformed, *args):
    """`transformed(naive)` of the arguments, in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)
        return jax.tree.map(np.asarray, jax.jit(functools.partial(transformed, naive))(*args))


def jvp_of_grad(function, arrays, tangents):
    return jax.jvp(jax.grad(functools.partial(loss, function)), (arrays,), (tangents,))


def grad_of_grad(function, arrays, tangents):
    def inner(arrays):
        got = jax.grad(functools.partial(loss, function))(arrays)
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(tangents), strict=True))

    return jax.grad(inner)(arrays)


def grad_of_jvp(function, arrays, tangents):
    return jax.grad(lambda arrays: loss(lambda x: jax.jvp(function, (x,), (tangents,))[1], arrays))(arrays)


def jvp_of_jvp(function, arrays, tangents):
    inner = lambda arrays: jax.jvp(function, (arrays,), (tangents,))[1]  # noqa: E731
    return jax.jvp(inner, (arrays,), (tangents,))


def jvp(function, arrays, tangents):
    return jax.jvp(function, (arrays,), (tangents,))


def linearized(function, arrays, tangents):
    results, linear = jax.linearize(function, arrays)
    return results, linear(tangents)


def transposed(function, arrays, tangents):
    """The transpose of the linear function that linearize returns, by jax.linear_transpose."""
    out, lse = jax.linearize(function, arrays)[0]
    linear = jax.linearize(function, arrays)[1]
    return jax.linear_transpose(linear, tangents)((jnp.cos(out), jnp.sin(lse)))


def grad(function, arrays, tangents):
    return jax.grad(functools.partial(loss, function))(arrays)


FIRST_ORDER = [jvp, linearized, transposed, grad]
SECOND_ORDER = [jvp_of_grad, grad_of_grad, grad_of_jvp, jvp_of_jvp]


@pytest.mark.parametrize("transformed", FIRST_ORDER + SECOND_ORDER, ids=lambda f: f.__name__)
def test_derivatives(random, transformed):
    arrays, tangents = dense(random), dense(random)
    got = jax.jit(functools.partial(transformed, operation))(arrays, tangents)
    close(got, in_float64(transformed, arrays, tangents), 2e-5 if transformed in FIRST_ORDER else 2e-4)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_in_every_mode(random, outer, inner):
    arrays = dense(random, b=1, s=2, t=2, h=2, g=1, d=2, e=2)

    def second(function, q, sinks, arrays):
        return outer(inner(lambda q, sinks: loss(function, arrays | {"q": q, "sinks": sinks}), (0, 1)), (0, 1))(
            q, sinks
        )

    args = arrays["q"], arrays["sinks"], arrays
    close(jax.jit(functools.partial(second, operation))(*args), in_float64(second, *args), 1e-4)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(random, used):
    arrays = dense(random)
    close(
        jax.jit(jax.grad(lambda arrays: jnp.sum(jnp.sin(operation(arrays)[used]))))(arrays),
        in_float64(lambda f, arrays: jax.grad(lambda x: jnp.sum(jnp.sin(f(x)[used])))(arrays), arrays),
    )


@pytest.mark.parametrize("wrt", ["q", "k", "v", "bias", "alibi_slopes", "sinks"])
def test_one_argument_alone(random, wrt):
    arrays = dense(random)
    function = lambda f, x: loss(f, arrays | {wrt: x})  # noqa: E731
    got = jax.jit(jax.grad(functools.partial(function, operation)))(arrays[wrt])
    close(got, in_float64(lambda f, x, arrays: jax.grad(lambda y: loss(f, arrays | {wrt: y}))(x), arrays[wrt], arrays))
    tangent = lambda f, x, t, arrays: jax.jvp(lambda y: f(arrays | {wrt: y}), (x,), (t,))[1]  # noqa: E731
    got = jax.jit(functools.partial(tangent, operation))(arrays[wrt], arrays[wrt], arrays)
    close(got, in_float64(tangent, arrays[wrt], arrays[wrt], arrays))


def equations(jaxpr, name):
    """The equations of a primitive, in a jaxpr and those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, name)


def test_zero_tangents_are_dropped(random):
    arrays = dense(random)
    jaxpr = jax.make_jaxpr(lambda v: jax.jvp(lambda v: operation(arrays | {"v": v}), (v,), (v,)))(arrays["v"])
    (tangent,) = equations(jaxpr.jaxpr, "flashjax_tangent")
    assert tangent.params["wanted"] == ("v",)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: loss(operation, arrays | {"q": q})))(arrays["q"])
    (backward,) = equations(jaxpr.jaxpr, "flashjax_backward")
    assert backward.params["wanted"] == ()  # neither dbias nor dsinks is computed
    jaxpr = jax.make_jaxpr(lambda q: jax.jvp(lambda q: operation(arrays | {"q": jax.lax.stop_gradient(q)}), (q,), (q,)))
    assert not list(equations(jaxpr(arrays["q"]).jaxpr, "flashjax_tangent"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_of_derivatives(random, dtype):
    arrays = {name: jnp.asarray(x, dtype if name in "qkv" else None) for name, x in dense(random).items()}
    arrays["bias"] = arrays["bias"].astype(dtype)
    got = jax.jit(jax.grad(functools.partial(loss, operation)))(arrays)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, arrays)
    results, tangents = jax.jit(lambda x: jax.jvp(operation, (x,), (x,)))(arrays)
    assert [x.dtype for x in (*results, *tangents)] == [dtype, jnp.float32] * 2
    want = in_float64(lambda f, x: jax.grad(functools.partial(loss, f))(x), jax.tree.map(np.float32, arrays))
    close(jax.tree.map(np.float32, got), want, 0.1)


def test_integer_arguments_have_no_gradient(random):
    arrays = calls(random)["packed"]
    got = jax.jit(jax.grad(functools.partial(loss, operation), allow_int=True))(arrays)
    assert {name for name, x in got.items() if x.dtype == jax.dtypes.float0} == {"cu_seqlens_q", "cu_seqlens_k"}
    assert np.abs(got["q"]).max() > 0


# ---------------------------------------------------------------------------------------------------------------- vmap


def calls(random):
    """A call of each kind; together they have every argument."""

    def f32(*shape):
        return random.normal(size=shape).astype(np.float32)

    def s32(*values):
        return np.array(values, np.int32)

    qkv = {"q": f32(2, 4, 4, 4), "k": f32(2, 6, 2, 4), "v": f32(2, 6, 2, 3)}
    cache = {"q": f32(2, 2, 4, 4), "k": f32(5, 4, 2, 4), "v": f32(5, 4, 2, 3)}
    return {
        "dense": qkv
        | {"bias": f32(1, 1, 4, 4, 1), "alibi_slopes": f32(2, 4), "sinks": f32(1, 4)}
        | {"seqused_q": s32([4], [3]), "seqused_k": s32([5], [6]), "leftpad": s32(1, 0), "shift": s32(1, 0)},
        "segments": qkv
        | {
            "segment_ids_q": s32([0, 0, 1, 1], [0, 1, 1, 2]),
            "segment_ids_k": s32([0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]),
        }
        | {"bias": f32(2, 1, 1, 4, 6), "sinks": f32(2, 4)},
        "packed": qkv
        | {"cu_seqlens_q": s32([0, 1, 4], [0, 2, 3]), "cu_seqlens_k": s32([0, 2, 6], [0, 3, 5])}
        | {"alibi_slopes": f32(1, 4)},
        "indexed": cache | {"batch_idx": s32(3, 1), "seqused_k": s32([3], [4])},
        "paged": cache | {"page_table": s32([4, 0, -1], [2, 2, 3]), "seqused_k": s32([7], [8])},
    }


def other(name, x, random):
    """Other values that the argument may have."""
    if not name.startswith(INTEGER):
        return random.normal(size=x.shape).astype(np.float32)
    return np.where(x > 0, x - 1, x) if name.startswith(("seqused", "leftpad")) else x[::-1].copy()


def subsets(names):
    """Each argument mapped alone, each alone not mapped, and all."""
    return [{name} for name in names] + [set(names) - {name} for name in names] + [set(names)]


CALLS = list(calls(np.random.default_rng(0)))
KERNELS = ("q", "k", "v", "bias", "sinks")  # arguments whose gradients kernels compute


def gradients(function, arrays, names=KERNELS):
    """Results and gradients."""
    floats = {name: x for name, x in arrays.items() if name in names}
    rest = {name: x for name, x in arrays.items() if name not in names}
    call = lambda floats: function(floats | rest)  # noqa: E731
    return call(floats), jax.grad(functools.partial(loss, call))(floats)


def derive(function, arrays):
    """Results, all gradients, and tangents of the results; the last two take long to compile, being the reference's."""
    floats = {name: x for name, x in arrays.items() if name in (*KERNELS, "alibi_slopes")}
    tangents = jax.jvp(lambda floats: function(arrays | floats), (floats,), (floats,))[1]
    return *gradients(function, arrays, tuple(floats)), tangents


@pytest.mark.parametrize("kind", CALLS)
def test_vmap(random, kind):
    call = functools.partial(operation, attrs=Attrs(scale=0.5, window_left=3, window_right=1))
    arrays = calls(random)[kind]
    some = [arrays] + [{name: other(name, x, random) for name, x in arrays.items()} for _ in range(2)]
    compiled = {derived: jax.jit(functools.partial(derived, call)) for derived in (derive, gradients)}
    for mapped in subsets(arrays):
        # The last axis of q is the mapped one, so that not all are mapped along the first.
        axes = {name: (-1 if name == "q" else 0) if name in mapped else None for name in arrays}
        stacked = {
            name: x if axes[name] is None else np.stack([y[name] for y in some], axes[name])
            for name, x in arrays.items()
        }
        derived = derive if mapped == set(arrays) else gradients
        want = [compiled[derived]({name: (x if name in mapped else arrays)[name] for name in arrays}) for x in some]
        want = jax.tree.map(lambda *xs: np.stack(xs), *want)
        close(jax.jit(jax.vmap(functools.partial(derived, call), in_axes=(axes,)))(stacked), want, 1e-4)
        results, of_vmap, *_ = jax.jit(functools.partial(derived, jax.vmap(call, in_axes=(axes,))))(stacked)
        close(results, want[0], 1e-4)
        for name, x in want[1].items():
            x = x.sum(0) if axes[name] is None else np.moveaxis(x, 0, axes[name])
            np.testing.assert_allclose(of_vmap[name], x, 2e-4, 2e-4, err_msg=f"{name}, mapped {mapped}")


def test_nested_vmap(random):
    """Two mapped axes: of q and bias, and of k and bias; v has none."""
    arrays = {name: x for name, x in dense(random).items() if name in ("q", "k", "v", "bias")}
    q, k, bias = (random.normal(size=(n, *arrays[name].shape)) for n, name in ((3, "q"), (2, "k"), (3, "bias")))
    bias = np.stack([bias, bias + 1])
    q, k, bias = (x.astype(np.float32) for x in (q, k, bias))

    def derived(q, k, bias):
        return gradients(operation, {"q": q, "k": k, "v": arrays["v"], "bias": bias})

    got = jax.jit(jax.vmap(jax.vmap(derived, (0, None, 0)), (None, 0, 0)))(q, k, bias)
    one = jax.jit(derived)
    want = [jax.tree.map(lambda *x: np.stack(x), *[one(q[i], k[j], bias[j, i]) for i in range(3)]) for j in range(2)]
    close(got, jax.tree.map(lambda *x: np.stack(x), *want), 1e-4)


@pytest.mark.parametrize("mapped", ["q", "k"])
def test_vmap_over_nothing(random, mapped):
    arrays = dense(random)
    axes = {name: 0 if name == mapped else None for name in arrays}
    empty = arrays | {mapped: np.zeros((0, *arrays[mapped].shape), np.float32)}
    out, lse = jax.jit(jax.vmap(operation, in_axes=(axes,)))(empty)
    assert out.shape == (0, 2, 4, 4, 3)
    assert lse.shape == (0, 2, 4, 4)
    got = jax.jit(jax.grad(functools.partial(loss, jax.vmap(operation, in_axes=(axes,)))))(empty)
    close(got, jax.tree.map(np.zeros_like, empty))


def test_vmap_keeps_a_shared_cache_shared(random):
    """Mapped queries that read one cache do not copy it."""
    arrays = calls(random)["paged"]
    axes = {name: None if name in ("k", "v") else 0 for name in arrays}
    stacked = {name: x if axes[name] is None else np.stack([x] * 3) for name, x in arrays.items()}
    text = jax.jit(jax.vmap(operation, in_axes=(axes,))).lower(stacked).as_text()
    assert "tensor<15x4x2x4xf32>" not in text
    assert "tensor<5x4x2x4xf32>" in text


# -------------------------------------------------------------------------------------------- control flow, checkpoint


def test_scan(random):
    arrays = dense(random, s=4, t=4, h=2, g=2, d=3, e=3)

    def scanned(function, arrays):
        def body(q, _):
            out, lse = function(arrays | {"q": q})
            return out + q, lse

        q, lses = jax.lax.scan(body, arrays["q"], length=3)
        return q, lses

    def gradient(function, arrays):
        return jax.grad(lambda x: loss(functools.partial(scanned, function), x))(arrays)

    got = jax.jit(functools.partial(gradient, operation))(arrays)
    close(got, in_float64(gradient, arrays), 1e-4)


POLICIES = {
    "none": (lambda f: f, 3),
    "nothing saved": (jax.checkpoint, 6),
    "out and lse saved": (
        functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("flashjax_out", "flashjax_lse")
        ),
        3,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mapped", [False, True])
def test_checkpoint(random, policy, mapped):
    """A policy that saves the two names computes no forward twice."""
    arrays = dense(random, s=4, t=4, h=2, g=2, d=3, e=3)
    checkpoint, forwards = POLICIES[policy]

    @checkpoint
    def layer(q, w):
        return jnp.tanh(operation(arrays | {"q": q @ w})[0] + q)

    def net(w, q):
        for _ in range(3):
            q = layer(q, w)
        return jnp.sum(q)

    q, w = arrays["q"], np.eye(3, dtype=np.float32)
    function = jax.grad(net)
    if mapped:
        function, q = jax.vmap(function, in_axes=(None, 0)), q[None]
    jaxpr = jax.make_jaxpr(function)(w, q).jaxpr
    assert len(list(equations(jaxpr, "flashjax_backward"))) == 3
    assert len(list(equations(jaxpr, "flashjax_attention"))) == forwards
    close(np.reshape(jax.jit(function)(w, q), (3, 3)), jax.grad(net)(w, arrays["q"]), 1e-5)


# ----------------------------------------------------------------------------------------------- jit, modes, platforms


def test_eager_is_the_same(random):
    arrays = dense(random)
    close(operation(arrays), jax.jit(operation)(arrays), 1e-6)
    gradient = jax.grad(functools.partial(loss, operation))
    close(gradient(arrays), jax.jit(gradient)(arrays), 1e-6)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: jax.disable_jit(True),
        lambda: jax.debug_nans(True),
        lambda: jax.enable_x64(True),
        lambda: jax.enable_checks(True),
        lambda: jax.checking_leaks(),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["disable_jit", "debug_nans", "enable_x64", "enable_checks", "checking_leaks", "strict_promotion"],
)
def test_modes(random, mode):
    arrays = jax.tree.map(jnp.asarray, dense(random))
    values = jax.jit(functools.partial(gradients, operation))(arrays)
    with mode():
        again = jax.jit(lambda arrays: gradients(operation, arrays))(arrays)
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, values)
    close(again, values, 1e-6)


def test_rows_without_keys_are_no_nans(random):
    """A query that sees nothing has lse = -inf, which debug_nans lets through, and gradients of zero."""
    arrays = {name: x for name, x in dense(random, s=6, t=2).items() if name in "qkv"}
    with jax.debug_nans(True):
        out, lse = jax.jit(operation)(arrays)
        got = jax.jit(jax.grad(functools.partial(loss, operation)))(arrays)
    assert np.all(lse[:, :, :4] == -np.inf)
    assert np.all(out[:, :4] == 0)
    assert np.all(got["q"][:, :4] == 0)


def custom_calls(text):
    return set(re.findall(r"flashjax_(?:fwd|bwd)", text))


def test_kernels_are_called(random, compiled):
    arrays = dense(random)
    attrs = Attrs(scale=0.4, implementation=compiled)
    text = jax.jit(jax.grad(lambda x: loss(lambda y: operation(y, attrs), x))).lower(arrays).as_text()
    assert custom_calls(text) == {"flashjax_fwd", "flashjax_bwd"}
    attrs = Attrs(scale=0.4, implementation="reference")
    text = jax.jit(jax.grad(lambda x: loss(lambda y: operation(y, attrs), x))).lower(arrays).as_text()
    assert not custom_calls(text)


def test_other_platforms_run_the_reference(random):
    traced = jax.jit(functools.partial(gradients, operation)).trace(dense(random))
    assert not custom_calls(traced.lower(lowering_platforms=("tpu",)).as_text())
    attrs = Attrs(scale=0.4, implementation="cpu")
    with pytest.raises(NotImplementedError, match='implementation="cpu" cannot serve: the program is lowered for tpu'):
        jax.jit(lambda x: operation(x, attrs)).trace(dense(random)).lower(lowering_platforms=("tpu",))


def test_cuda_lowers_without_a_gpu(random):
    traced = jax.jit(functools.partial(derive, operation)).trace(dense(random))
    assert traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("platforms", [None, ["cpu", "cuda"], ["cpu", "tpu"]])
def test_export(random, platforms):
    pytest.importorskip("flatbuffers")
    arrays = dense(random)
    function = jax.jit(functools.partial(gradients, operation))
    exported = jax.export.export(function, platforms=platforms, disabled_checks=DISABLED)(arrays)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == tuple(platforms or [jax.default_backend().replace("gpu", "cuda")])
    if jax.default_backend() in again.platforms:
        close(again.call(arrays), function(arrays), 1e-6)


@pytest.mark.parametrize("asked", [None, "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_any_batch_and_length(random, dtype, asked, monkeypatch):
    monkeypatch.setattr(_reference, "_CHUNK_ELEMENTS", 64)  # several chunks of queries
    function = functools.partial(operation, attrs=dataclasses.replace(ATTRS, implementation=asked))
    arrays = {name: x.astype(dtype) for name, x in dense(random).items() if name in "qkv"}
    b, s, t = jax.export.symbolic_shape("b,s,t")
    extents = {"q": (b, s), "k": (b, t), "v": (b, t)}
    types = {name: jax.ShapeDtypeStruct(extents[name] + x.shape[2:], x.dtype) for name, x in arrays.items()}
    built = [x for x in ("cpu", "cuda") if _ffi._support.extension(x)]
    exported = jax.export.export(jax.jit(function), platforms=built, disabled_checks=DISABLED)(types)
    close(exported.call(arrays), function(arrays), 1e-6)


@pytest.mark.parametrize(
    ("columns", "widest", "left_out", "width"),
    [
        (("bfloat16", "backward"), 64, (), 64),
        (("bfloat16", "backward"), 64, ("sm90_bwd_bf16_64", "sm90_bwd_bf16_64_seq"), 256),
        (("bfloat16", "backward"), 64, ("_64", "_256", "_192"), 128),
        (("bfloat16", "backward"), 160, ("_64",), 256),
        (("float16", "kDecode"), 40, ("sm90_decode_f16_64",), 256),
        (("float16", "kDecode"), 40, ("sm90_decode_bf16_64",), 64),
        (("float16", "kDecode"), 128, ("sm90_",), 128),
    ],
)
def test_workspace_of_a_build_without_some_rows(columns, widest, left_out, width, monkeypatch):
    """A wider row may serve there, and needs more."""
    table = re.findall(r"^KERNEL\(([^)]*)\)", TABLE.read_text(), re.MULTILINE)
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    rows = []
    for id, direction, family, _, _, dtype, d, e, *_, variant, _ in (row.split(", ") for row in table):
        row = {"id": id, "direction": direction.lower(), "family": family, "dtype": names[dtype], "variant": variant}
        rows.append(row | {"d": int(d), "e": int(e), "built": not any(x in id for x in left_out)})
    monkeypatch.setattr(_ffi._support, "extension", lambda platform: types.SimpleNamespace(kernels=rows))
    assert _ffi._own_width.__wrapped__(widest, *columns) == width


@pytest.mark.parametrize("target", ["flashjax_fwd", "flashjax_bwd"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (24, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, {"deterministic": True}], ids=str)
def test_workspace_of_any_size(target, heads, options, monkeypatch):
    """What a program that is exported for any size allocates suffices for each."""
    monkeypatch.setattr(_ffi, "_upstream_width", lambda d, *columns: d)  # as if its rows were built
    h, g = heads
    attrs = Attrs(0.1, **options)

    def types(b, s, t):
        shapes = {"q": (b, s, h, 128), "k": (b, t, g, 128), "v": (b, t, g, 128)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def sizes(arrays):
        ours, theirs = _ffi._own_bytes(target, arrays, attrs), _ffi._upstream_bytes(target, arrays, attrs)
        return jnp.stack([jnp.asarray(ours), jnp.asarray(theirs)])

    exported = jax.export.export(jax.jit(sizes))(types(*jax.export.symbolic_shape("b,s,t")))
    for b, s, t in [(1, 1, 7), (3, 1, 900), (1, 4, 4000), (2, 64, 256), (2, 65, 65), (1, 700, 900)]:
        arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types(b, s, t))
        assert (np.asarray(exported.call(arrays)) >= np.asarray(sizes(arrays))).all(), (b, s, t)


def test_export_with_derivative(random):
    pytest.importorskip("flatbuffers")
    arrays = dense(random)
    exported = jax.export.export(jax.jit(operation), disabled_checks=DISABLED)(arrays)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    gradient = jax.jit(jax.grad(functools.partial(loss, operation)))
    close(jax.jit(jax.grad(functools.partial(loss, again.call)))(arrays), gradient(arrays), 1e-6)


# ------------------------------------------------------------------------------------------------ the FFI, and private


def test_attributes_have_one_type(random, compiled):
    """JAX caches attributes by equality, and 1 == 1.0 == True: a call must not depend on what was called before."""
    arrays = {name: x for name, x in dense(random).items() if name in "qkv"}
    results = []
    for scale, softcap, deterministic in itertools.permutations([1, 1.0, True]):
        attrs = Attrs(scale, softcap, deterministic=deterministic, implementation=compiled)
        results.append(jax.jit(lambda x, attrs=attrs: operation(x, attrs))(arrays))
    for result in results:
        close(result, results[0], 0)


def test_a_module_that_is_too_new_is_refused(monkeypatch):
    registered = []
    module = types.SimpleNamespace(ffi_api=(0, 999), targets={"flashjax_fwd": None})
    monkeypatch.setattr(_ffi._support, "extension", lambda platform: module)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **kwargs: registered.append(args))
    with pytest.raises(ImportError, match=r"built for XLA FFI 0\.999, and the installed jaxlib has 0\.\d+"):
        _ffi.register("cpu")
    assert not registered
    module.ffi_api = _ffi.runtime_ffi_api()
    _ffi.register("cpu")
    assert registered == [("flashjax_fwd", None)]


def test_the_private_name_that_is_used_exists():
    dispatch = importlib.import_module("jax._src.dispatch")
    primitives = set(_derivatives._PRIMITIVES.values())
    assert primitives <= dispatch.prim_requires_devices_during_lowering
    marker = object()
    _compat.requires_devices(marker)
    assert marker in dispatch.prim_requires_devices_during_lowering
    dispatch.prim_requires_devices_during_lowering.discard(marker)


def test_manual_axes_can_be_named():
    """What `_compat.manual_axes` takes from JAX is there, and makes an axis known to collectives."""
    with _compat.manual_axes({"x": 4}):
        jaxpr = jax.make_jaxpr(lambda y: jax.lax.psum(y, "x"))(1.0)
    assert "psum" in str(jaxpr)
    with pytest.raises(NameError):
        jax.make_jaxpr(lambda y: jax.lax.psum(y, "x"))(1.0)
