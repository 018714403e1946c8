"""Several devices: right results and gradients for every placement, and no communication where none belongs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashjax import _derivatives
from flashjax._types import Attrs

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

AXES = ("x", "y", "z")  # of two devices each
DISABLED = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("flashjax_fwd", "flashjax_bwd")]
ATTRS = Attrs(scale=0.4, window_right=0)
FLOAT = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
ALL = ("x", "y", "z")


def mesh(kind):
    """ "auto", "explicit", or "mixed": the first axis Explicit, the others Auto."""
    explicit = {"auto": 0, "mixed": 1, "explicit": 3}[kind]
    types = (AxisType.Explicit,) * explicit + (AxisType.Auto,) * (3 - explicit)
    return jax.make_mesh((2, 2, 2), AXES, axis_types=types)


def dense(random, b=4, s=8, h=8, g=4, lead=()):
    shapes = {"q": (b, s, h, 8), "k": (b, s, g, 8), "v": (b, s, g, 8)}
    return {name: random.normal(size=lead + shape).astype(np.float32) for name, shape in shapes.items()}


def put(arrays, specs, on):
    """`specs`: by name, or one for q, k and v."""
    if isinstance(specs, P):
        specs = dict.fromkeys(("q", "k", "v"), specs)
    return {name: jax.device_put(x, NamedSharding(on, specs.get(name, P()))) for name, x in arrays.items()}


def operation(arrays, attrs=ATTRS):
    return _derivatives.attention(arrays, attrs)


def loss(function, arrays):
    out, lse = function(arrays)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def derive(function, arrays):
    """Results and gradients."""
    floats = {name: x for name, x in arrays.items() if name in FLOAT}
    return function(arrays), jax.grad(lambda floats: loss(function, arrays | floats))(floats)


def close(got, want, tolerance=3e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, want)


COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")


def collectives(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return {name for name in COLLECTIVES if re.search(rf" {name}[\w-]*\(", text)}


def check(random, kind, specs, forward=(), backward=(), function=operation, lead=(), **sizes):
    """Compares results and gradients with those of one device, and the collectives with those that must be there."""
    arrays = dense(random, lead=lead, **sizes) if "arrays" not in sizes else sizes["arrays"]
    derived = functools.partial(derive, function)
    want = jax.jit(derived)(arrays)
    on = mesh(kind)
    with jax.set_mesh(on):
        placed = put(arrays, specs, on)
        results, gradients = jax.jit(derived)(placed)
        close((results, gradients), want)
        assert collectives(function, placed) == set(forward)
        assert collectives(lambda x: derive(function, x)[1], placed) == set(backward)
    return placed, results, gradients


KINDS = pytest.mark.parametrize("kind", ["auto", "explicit", "mixed"])


@KINDS
@pytest.mark.parametrize(
    "spec", [P("x"), P(("x", "z")), P(None, None, "y"), P(("x", "z"), None, "y"), P("y", None, "x")]
)
def test_batch_and_heads(random, kind, spec):
    placed, results, gradients = check(random, kind, spec)
    assert results[0].sharding.is_equivalent_to(placed["q"].sharding, 4)
    assert results[1].sharding.is_equivalent_to(NamedSharding(mesh(kind), P(*(*spec, None, None)[:3:2])), 3)
    assert all(x.sharding.is_equivalent_to(placed[name].sharding, 4) for name, x in gradients.items())


@KINDS
@pytest.mark.parametrize(
    ("heads", "kv"),
    [
        ((8, 8), P(None, None, ALL)),  # a key head each
        ((8, 4), P(None, None, ("x", "y"))),  # two devices share a key head
        ((8, 2), P(None, None, "x")),
        ((8, 1), P()),  # all share one
        ((16, 1), P()),
    ],
)
def test_more_parts_than_key_heads(random, kind, heads, kv):
    """Each device takes the key heads that it needs out of what it has; only their gradients are summed."""
    h, g = heads
    specs = {"q": P(None, None, ALL), "k": kv, "v": kv}
    check(random, kind, specs, b=1, h=h, g=g, backward=() if g == 8 else ("all-reduce",))


def test_groups_that_do_not_divide(random):
    """12 heads over 8 devices cannot be split 8 ways; 6 key heads not even 4 ways."""
    check(
        random,
        "auto",
        {"q": P(None, None, ("x", "y")), "k": P(None, None, "x"), "v": P(None, None, "x")},
        h=12,
        g=6,
        forward=("all-gather",),
        backward=("all-gather",),
    )
    arrays = dense(random, h=12, g=4)
    want = operation(arrays)
    on = mesh("auto")
    close(jax.jit(operation)(put(arrays, {"q": P(None, None, "x"), "k": P(None, None, ("x", "y"))}, on)), want)


@KINDS
def test_multi_query_with_batch(random, kind):
    specs = {"q": P("z", None, ("x", "y")), "k": P("z"), "v": P("z")}
    check(random, kind, specs, g=1, backward=("all-reduce",))


@KINDS
def test_replicated_keys(random, kind):
    """Each device takes its rows of k and v. The types of Explicit gradients say that they are replicated too."""
    specs = {"q": P("x", None, "y")}
    backward = ("all-gather",) if kind == "explicit" else ()
    check(random, kind, specs, backward=backward)


@KINDS
@pytest.mark.parametrize(
    ("spec", "used"),
    [
        (P("x", "z", "y"), "collective-permute"),
        (P(None, ("x", "y")), "collective-permute"),
        (P(None, None, None, "z"), "all-gather"),
    ],
)
def test_sharded_sequences_are_a_ring_and_dims_are_gathered(random, kind, spec, used):
    check(random, kind, spec, forward=(used,), backward=(used,))


@KINDS
def test_a_batch_that_does_not_divide(random, kind):
    """What is not sharded need not divide."""
    check(random, kind, P(None, None, "y"), b=3)


@KINDS
@pytest.mark.parametrize(
    "spec", [P("x", None, None, "y"), P(None, "x", None, "y"), P("z", "x", None, "y"), P("z", None, None, ("x", "y"))]
)
def test_vmap(random, kind, spec):
    """Neither a sharded mapped axis nor a sharded batch below one is gathered."""
    placed, results, _ = check(random, kind, spec, lead=(2,), function=jax.vmap(operation))
    assert results[0].sharding.is_equivalent_to(placed["q"].sharding, 5)


@KINDS
def test_nested_vmap(random, kind):
    check(random, kind, P(None, "x", "z", None, "y"), lead=(3, 2), function=jax.vmap(jax.vmap(operation)))


@KINDS
def test_vmap_over_queries_alone(random, kind):
    """Keys that all elements share get the sum of their gradients."""
    arrays = dense(random, b=2)
    arrays["q"] = np.stack([arrays["q"], arrays["q"] + 1])
    function = lambda x: jax.vmap(lambda q: operation(x | {"q": q}))(x["q"])  # noqa: E731
    check(
        random,
        kind,
        {"q": P("x", None, None, "y")},
        arrays=arrays,
        function=function,
        backward=("all-gather", "all-reduce") if kind == "explicit" else ("all-reduce",),
    )


def with_all(random):
    arrays = dense(random, b=2)
    return arrays | {
        "bias": random.normal(size=(1, 1, 8, 8, 8)).astype(np.float32),
        "sinks": random.normal(size=(1, 8)).astype(np.float32),
        "segment_ids_q": np.repeat(np.array([[0, 1], [1, 2]], np.int32), 4, axis=1),
        "segment_ids_k": np.repeat(np.array([[0, 1], [1, 2]], np.int32), 4, axis=1),
        "seqused_k": np.array([[7], [8]], np.int32),
    }


@KINDS
def test_other_arguments(random, kind, implementation):
    """Those without a batch axis are replicated, and their gradients summed."""
    spec = P("x", None, "y")
    specs = {"q": spec, "k": spec, "v": spec, "bias": P(None, None, "y"), "sinks": P(None, "y"), "seqused_k": P("x")}
    attrs = Attrs(scale=0.4, softcap=5.0, window_left=4, implementation=implementation)
    function = functools.partial(operation, attrs=attrs)
    check(random, kind, specs, arrays=with_all(random), function=function, backward=("all-reduce",))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_packed(random, kind, implementation):
    arrays = dense(random, b=2)
    arrays |= {f"cu_seqlens_{x}": np.array([[0, 3, 8], [0, 5, 6]], np.int32) for x in "qk"}
    spec = P("x", None, "y")
    specs = {"q": spec, "k": spec, "v": spec, "cu_seqlens_q": P("x")}
    function = functools.partial(operation, attrs=Attrs(scale=0.4, implementation=implementation))
    check(random, kind, specs, arrays=arrays, function=function)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("shared", ["page_table", "batch_idx"])
def test_a_cache_that_rows_look_up(random, kind, shared):
    """k and v have no batch axis to split, only heads; rows are split all the same."""
    arrays = dense(random, b=2) | {"seqused_k": np.array([[7], [8]], np.int32)}
    arrays |= {"k": dense(random, b=5)["k"], "v": dense(random, b=5)["v"]}
    arrays[shared] = np.array([[4, 0], [2, 1]] if shared == "page_table" else [4, 1], np.int32)
    specs = {"q": P("x", None, "y"), "k": P(None, None, "y"), "v": P(None, None, "y"), shared: P("x")}
    want = operation(arrays)
    on = mesh(kind)
    with jax.set_mesh(on):
        placed = put(arrays, specs, on)
        results = jax.jit(operation)(placed)
        close(results, want)
        assert not collectives(operation, placed)
        assert results[0].sharding.is_equivalent_to(placed["q"].sharding, 4)
        close(jax.jit(functools.partial(derive, operation))(placed), derive(operation, arrays))


@KINDS
def test_forward_mode_and_second_order(random, kind):
    arrays = dense(random, b=2, s=4)
    jvp = lambda x: jax.jvp(operation, (x,), (x,))[1]  # noqa: E731
    second = lambda x: jax.jvp(jax.grad(functools.partial(loss, operation)), (x,), (x,))[1]  # noqa: E731
    want = jax.jit(lambda x: (jvp(x), second(x)))(arrays)
    on = mesh(kind)
    with jax.set_mesh(on):
        placed = put(arrays, P("x", None, "y"), on)
        close(jax.jit(lambda x: (jvp(x), second(x)))(placed), want, 2e-4)
        assert not collectives(jvp, placed)


def test_constraints_and_out_shardings(random):
    """Placements said inside jit, or only for the results, reach the operation; eager calls follow their operands."""
    arrays = dense(random)
    on, want = mesh("auto"), operation(arrays)
    by_heads = NamedSharding(on, P(None, None, ALL[:2]))

    def constrained(arrays):
        q = jax.lax.with_sharding_constraint(arrays["q"], by_heads)
        return jax.lax.with_sharding_constraint(operation(arrays | {"q": q})[0], by_heads)

    placed = put(arrays, P(), on)
    out = jax.jit(constrained)(placed)
    close(out, want[0])
    assert out.sharding.is_equivalent_to(by_heads, 4)
    assert not collectives(constrained, placed)

    text = jax.jit(operation, out_shardings=(by_heads, None)).lower(placed).compile().as_text()
    assert not any(f" {name}(" in text for name in COLLECTIVES)

    out, lse = operation(put(arrays, P("x", None, "y"), on))
    close((out, lse), want)
    assert out.sharding.is_equivalent_to(NamedSharding(on, P("x", None, "y")), 4)


# ----------------------------------------------------------------------------------------------------------- shard_map


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(random, kind, check_vma):
    arrays = dense(random)
    on, spec = mesh(kind), P(("x", "z"), None, "y")
    function = jax.shard_map(
        operation, mesh=on, in_specs=(spec,), out_specs=(spec, P(("x", "z"), "y")), check_vma=check_vma
    )
    placed = put(arrays, spec, on)
    close(jax.jit(functools.partial(derive, function))(placed), derive(operation, arrays))
    tangents = jax.jit(lambda x: jax.jvp(function, (x,), (x,)))(placed)
    close(tangents, jax.jit(lambda x: jax.jvp(operation, (x,), (x,)))(arrays), 1e-4)
    assert not collectives(function, placed)
    if check_vma:
        assert not collectives(lambda x: derive(function, x)[1], placed)


def test_gradients_inside_shard_map_are_summed(random):
    """With check_vma, what every device has alike gets the gradient of all of them."""
    arrays = dense(random, b=2)
    k, v = arrays["k"][:1], arrays["v"][:1]
    on = mesh("auto")

    def local(q, k, v):
        def total(q, k, v):
            return jax.lax.psum(loss(operation, {"q": q, "k": k, "v": v}), "x")

        tangents = jax.jvp(jax.grad(total, (0, 1, 2)), (q, k, v), (q, k, v))[1]
        return jax.grad(total, (0, 1, 2))(q, k, v), tangents

    specs = (P("x"), P(), P())
    function = jax.shard_map(local, mesh=on, in_specs=specs, out_specs=(specs, specs))

    def whole(q, k, v):
        call = lambda q, k, v: loss(operation, {"q": q, "k": jnp.repeat(k, 2, 0), "v": jnp.repeat(v, 2, 0)})  # noqa: E731
        gradient = jax.grad(call, (0, 1, 2))
        return gradient(q, k, v), jax.jvp(gradient, (q, k, v), (q, k, v))[1]

    close(jax.jit(function)(arrays["q"], k, v), jax.jit(whole)(arrays["q"], k, v), 2e-4)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_partly_manual(random, kind, check_vma):
    """One axis manual, the others left to JAX: Explicit ones are partitioned, Auto ones gathered."""
    arrays = dense(random)
    on = mesh(kind)
    with jax.set_mesh(on):
        function = jax.shard_map(
            operation, in_specs=(P("x"),), out_specs=(P("x"), P("x")), axis_names={"x"}, check_vma=check_vma
        )
        placed = put(arrays, P("x", None, "y"), on)
        close(jax.jit(functools.partial(derive, function))(placed), derive(operation, arrays))
        gathers = kind == "auto" or jax.__version_info__ < (0, 11)
        assert collectives(function, placed) == ({"all-gather"} if gathers else set())


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_export(random, kind):
    """Programs for 8 devices survive their bytes. Under Auto axes the exported program gathers: JAX cannot serialize
    custom_partitioning."""
    pytest.importorskip("flatbuffers")
    arrays, spec = dense(random), P("x", None, "y")
    on = mesh("explicit" if kind == "explicit" else "auto")
    function = operation
    if kind == "shard_map":
        function = jax.shard_map(operation, mesh=on, in_specs=(spec,), out_specs=(spec, P("x", "y")))
    with jax.set_mesh(on):
        placed = put(arrays, spec, on)
        exported = jax.export.export(jax.jit(functools.partial(derive, function)), disabled_checks=DISABLED)(placed)
        again = jax.export.deserialize(exported.serialize())
        assert again.nr_devices == 8
        close(jax.jit(again.call)(placed), derive(operation, arrays))
        assert collectives(again.call, placed) == ({"all-gather"} if kind == "auto" else set())
