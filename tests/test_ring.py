"""Sequences split over devices: the results and gradients of one device, the communication of a ring, equal work."""

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashjax
from flashjax import SequenceLayout, _blocks, _ring, _support
from flashjax._operation import FORWARD, Call
from flashjax._types import Attrs

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

FLOAT = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
AXIS = {"q": 1, "k": 1, "v": 1, "segment_ids": 1, "bias": (2, 3)}  # where arrays have the sequence
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")
IN_ORDER = SequenceLayout()
LAYOUTS = pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])


def mesh(kind="auto", shape=(2, 4), axes=("data", "seq")):
    types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    return jax.make_mesh(shape, axes, axis_types=(types[kind],) * len(shape))


def dense(random, b=2, s=32, t=None, h=4, g=2, d=8, e=6, dtype=np.float32):
    shapes = {"q": (b, s, h, d), "k": (b, t or s, g, d), "v": (b, t or s, g, e)}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def along(move, name, x):
    axes = AXIS.get(name, ())
    for axis in (axes,) if isinstance(axes, int) else axes:
        x = move(x, axis) if x.shape[axis] > 1 else x
    return x


def in_layout(layout, arrays, move="reorder"):
    return {name: along(getattr(layout, move), name, x) for name, x in arrays.items()}


def loss(results):
    out, lse = results
    out, lse = out.astype(jnp.float32), jnp.where(lse == -jnp.inf, 0, lse)
    at = jnp.arange(out.shape[-1]) + 1.0
    return jnp.sum(jnp.sin(out * at)) + jnp.sum(jnp.cos(lse))


def derived(arrays, function=flashjax.flash_mha, **options):
    """Results and gradients, in one program."""
    floats = {name: x for name, x in arrays.items() if name in FLOAT}
    rest = {name: x for name, x in arrays.items() if name not in FLOAT}

    def run(floats):
        results = function(**floats, **rest, **options, return_lse=True)
        return loss(results), results

    (_, results), gradients = jax.value_and_grad(run, has_aux=True)(floats)
    return dict(zip(("out", "lse"), results, strict=True)), gradients


def close(got, want, tolerance=3e-5):
    assert got.keys() == want.keys()
    for name, x in got.items():
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (x, want[name])), tolerance, tolerance, name)


def used(text):
    return {name for name in COLLECTIVES if re.search(rf" {name}[\w-]*\(", text)}


def permutes(text):
    return len(re.findall(r" collective-permute(-start)?\(", text))


def place(arrays, on, specs):
    return {name: jax.device_put(x, NamedSharding(on, specs.get(name, P()))) for name, x in arrays.items()}


def check(arrays, on, specs, layout=None, tolerance=3e-5, expect=None, function=flashjax.flash_mha, **options):
    """Sharded and in `layout`, against one device and in order. Returns the text of the compiled program."""
    layout = layout or IN_ORDER
    strategy = options.pop("strategy", "auto")
    want, want_gradients = jax.jit(functools.partial(derived, function=function, **options))(arrays)
    function = functools.partial(function, sequence_layout=layout, strategy=strategy)
    with jax.set_mesh(on):
        placed = place(in_layout(layout, arrays), on, specs)
        program = jax.jit(functools.partial(derived, function=function, **options)).lower(placed).compile()
        got, gradients = program(placed)
    packed = got["out"].ndim == 3
    at = {"out": 0, "lse": 1} if packed else {"out": 1, "lse": 2}
    close({name: layout.restore(x, at[name]) for name, x in got.items()}, want, tolerance)
    if not packed:
        gradients = in_layout(layout, gradients, "restore")
    close(gradients, want_gradients, tolerance)
    assert expect is None or used(program.as_text()) == set(expect)
    return program.as_text()


SEQUENCE = {
    **dict.fromkeys(("q", "k", "v"), P("data", "seq")),
    "segment_ids": P("data", "seq"),
    "bias": P("data", None, "seq"),
}
RING = ("collective-permute",)


# Masks and options, in every layout.


@LAYOUTS
@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "window_size": (5, -1)},
        {"window_size": (13, 3)},
    ],
    ids=["full", "causal", "causal_window", "window"],
)
def test_masks(random, kind, mask):
    check(dense(random), mesh(), SEQUENCE, SequenceLayout(kind, 4), expect=RING, **mask)


@LAYOUTS
def test_everything_together(random, kind):
    arrays = dense(random, d=6, e=8) | {
        "sinks": random.normal(size=4).astype(np.float32),
        "segment_ids": np.sort(random.integers(0, 3, (2, 32)).astype(np.int32), axis=1),
        "bias": random.normal(size=(2, 4, 32, 32)).astype(np.float32),
    }
    options = {"is_causal": True, "window_size": (17, -1), "softcap": 3.0, "softmax_scale": 0.3, "deterministic": True}
    check(arrays, mesh(), SEQUENCE, SequenceLayout(kind, 4), expect=(*RING, "all-reduce"), **options)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (2, 4, 1, 32), (1, 4, 32, 1)], ids=str)
def test_broadcast_bias(random, shape):
    """Rows of a bias are split like queries; a gradient is summed over whatever shares the bias."""
    arrays = dense(random) | {"bias": random.normal(size=shape).astype(np.float32)}
    specs = SEQUENCE | {"bias": P("data" if shape[0] > 1 else None, None, "seq" if shape[2] > 1 else None)}
    check(arrays, mesh(), specs, SequenceLayout("zigzag", 4), expect=(*RING, "all-reduce"), is_causal=True)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", [{"is_causal": True}, {}], ids=["causal", "full"])
def test_alibi(random, kind, mask):
    arrays = dense(random)
    slopes = jnp.array([0.5, 0.25, 0.125, 0.0625])
    text = check(arrays, mesh(), SEQUENCE, SequenceLayout(kind, 4), alibi_slopes=slopes, **mask)
    assert used(text) == set(RING)


def test_gradient_of_alibi_slopes(random):
    """The reference's, which gathers."""
    arrays = dense(random, b=1, s=16) | {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32)}
    specs = dict.fromkeys("qkv", P(None, "seq"))
    check(arrays, mesh("auto", (4, 2)), specs, SequenceLayout("zigzag", 2), is_causal=True)


@LAYOUTS
@pytest.mark.parametrize("lengths", [(32, 64), (64, 32)], ids=str)
def test_cross_lengths(random, kind, lengths):
    """Aligned at the end, so that the first queries of more queries than keys see nothing at all."""
    arrays = dense(random, s=lengths[0], t=lengths[1])
    check(arrays, mesh(), SEQUENCE, SequenceLayout(kind, 4), expect=RING, is_causal=True, window_size=(9, -1))


def test_top_left(random):
    options = {"is_causal": True, "causal_alignment": "top_left"}
    check(dense(random, s=16, t=32), mesh(), SEQUENCE, SequenceLayout("zigzag", 4), expect=RING, **options)


def test_segments_that_are_not_sorted(random):
    """Ids of any order and sign, no two of them on any one device alone."""
    ids = random.integers(-2, 2, (2, 32)).astype(np.int32)
    check(dense(random) | {"segment_ids": ids}, mesh(), SEQUENCE, SequenceLayout("striped", 4), expect=RING)


def test_half_precision(random):
    """Hops are rounded to bfloat16, and added in float32."""
    arrays = {name: np.asarray(x, jnp.bfloat16) for name, x in dense(random, s=64).items()}
    exact = {name: x.astype(np.float32) for name, x in arrays.items()}
    layout = SequenceLayout("zigzag", 4)

    def results(arrays, layout=IN_ORDER, **specs):
        call = functools.partial(flashjax.flash_mha, sequence_layout=layout)
        placed = place(in_layout(layout, arrays), mesh(), specs)
        out, gradients = jax.jit(functools.partial(derived, function=call, is_causal=True))(placed)
        return [np.asarray(layout.restore(x), np.float32) for x in (out["out"], *gradients.values())]

    for ring, one, want in zip(results(arrays, layout, **SEQUENCE), results(arrays), results(exact), strict=True):
        error, allowed = np.abs(ring - want), np.abs(one - want)
        assert error.max() <= 3 * allowed.max()
        assert error.mean() <= 1.5 * allowed.mean()


@pytest.mark.parametrize("parts", [2, 8], ids="{} parts".format)
@pytest.mark.parametrize("kind", ["zigzag", "striped"])
def test_parts_that_are_not_the_devices(random, kind, parts):
    """A layout is what an array means, whatever the devices."""
    check(dense(random), mesh(), SEQUENCE, SequenceLayout(kind, parts), expect=RING, is_causal=True)


@LAYOUTS
def test_a_layout_on_one_device(random, kind):
    layout = SequenceLayout(kind, 4)
    arrays = dense(random) | {"bias": random.normal(size=(1, 1, 32, 32)).astype(np.float32)}
    want = flashjax.flash_mha(**arrays, is_causal=True)
    got = flashjax.flash_mha(**in_layout(layout, arrays), is_causal=True, sequence_layout=layout)
    close({"out": layout.restore(got)}, {"out": want})


# Meshes.


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("spec", "kv", "g"),
    [
        (P("x", "y", "z"), P("x", "y", "z"), 2),
        (P(None, ("x", "z"), "y"), P(None, ("x", "z"), "y"), 2),
        (P(None, ("z", "x")), P(None, ("z", "x")), 2),  # not the order of the mesh
        (P(None, "x", ("y", "z")), P(None, "x"), 1),  # more head shards than key heads
        (P("x", "y"), P("x"), 2),  # keys on every device
    ],
    ids=str,
)
def test_meshes(random, kind, spec, kv, g):
    on = mesh(kind, (2, 2, 2), ("x", "y", "z"))
    layout = SequenceLayout("zigzag", math.prod(2 for _ in jax.tree.leaves(spec[1]))) if spec[1] else None
    text = check(dense(random, s=16, g=g), on, {"q": spec, "k": kv, "v": kv}, layout, is_causal=True)
    gathers = {"all-gather"} if kv == P("x") and kind == "explicit" else set()  # gradients, of the type of the keys
    sums = {"all-reduce"} if g == 1 else set()
    assert used(text) == set(RING) | gathers | sums


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_results_lie_as_queries_do(random, kind):
    on = mesh(kind)
    arrays = place(dense(random), on, SEQUENCE)
    with jax.set_mesh(on):
        results, gradients = jax.jit(functools.partial(derived, is_causal=True))(arrays)
    assert results["out"].sharding.is_equivalent_to(NamedSharding(on, P("data", "seq")), 4)
    assert results["lse"].sharding.is_equivalent_to(NamedSharding(on, P("data", None, "seq")), 3)
    assert all(x.sharding.is_equivalent_to(arrays[name].sharding, 4) for name, x in gradients.items())


def test_what_does_not_divide_is_gathered(random):
    """20 positions do not split by 8; 2 axes of the three still do."""
    on = mesh("auto", (2, 2, 2), ("x", "y", "z"))
    arrays = dense(random, s=20)

    def constrained(**arrays):
        spec = NamedSharding(on, P(None, ("x", "y", "z")))
        arrays = {name: jax.lax.with_sharding_constraint(x, spec) for name, x in arrays.items()}
        return flashjax.flash_mha(**arrays)

    close({"out": jax.jit(lambda arrays: constrained(**arrays))(arrays)}, {"out": flashjax.flash_mha(**arrays)})


# What is sent, and what is computed.


@LAYOUTS
@pytest.mark.parametrize("n", [1, 2, 4])
def test_blocks_are_the_mask(kind, n):
    """All blocks of all pairs of devices together: every score of the mask once, and no other."""
    windows = [(-1, -1), (-1, 0), (3, 0), (7, 2), (-1, 1), (2, -1), (0, 0), (40, 0)]
    for parts, (s, t), (left, right), at_end, positional in itertools.product(
        (1, 2, 4), ((16, 16), (16, 32), (32, 16)), windows, (False, True), (False, True)
    ):
        layout = SequenceLayout(kind, parts)
        if positional and kind == "striped":
            continue
        mask = _blocks.Mask(left, right, (t - s) * at_end, positional)
        distance = layout.positions(t)[None, :] - layout.positions(s)[:, None] - mask.offset
        want = (distance >= -left if left >= 0 else True) & (distance <= right if right >= 0 else distance == distance)
        got = np.zeros((s, t), int)
        queries, keys = layout.pieces(s, n), layout.pieces(t, n)
        for i, j in itertools.product(range(n), range(n)):
            for block in _blocks.blocks(queries[i], keys[j], mask):
                at = np.ix_(i * (s // n) + np.arange(*block.rows), j * (t // n) + np.arange(*block.cols))
                own = np.arange(at[1].size)[None, :] - np.arange(at[0].size)[:, None] - block.shift
                live = np.ones(own.shape, bool)
                live &= (own >= -block.left) | (block.left < 0)
                live &= (own <= block.right) | (block.right < 0)
                assert live.sum() == block.work > 0
                assert not positional or (own == distance[at]).all()
                got[at] += live
        np.testing.assert_array_equal(got, want.astype(int))


def test_no_transfer_is_wasted(random):
    """Keys travel n - 1 times, and so do their gradients; a window's dead distances are left out."""
    arrays, on = place(dense(random, s=64), mesh(), SEQUENCE), mesh()

    def count(**options):
        forward = jax.jit(functools.partial(flashjax.flash_mha, **options))
        backward = jax.jit(lambda arrays: derived(arrays, **options)[1])
        with jax.set_mesh(on):
            return [
                permutes(forward.lower(**arrays).compile().as_text()),
                permutes(backward.lower(arrays).compile().as_text()),
            ]

    # Keys and values in one; the backward has them once more, and their gradients.
    assert count() == [3, 3 + 3 + 3]
    assert count(is_causal=True) == [3, 3 + 3 + 3]
    # Keys from the device before and, of the next one, half the window: distances 0, 1 and 3.
    assert count(window_size=(8, 4)) == [2, 2 + 2 + 2]
    assert count(window_size=(16, 0)) == [1, 1 + 1 + 1]
    assert count(window_size=(0, 0)) == [0, 0]


@LAYOUTS
def test_transfers_are_in_the_input_dtype(random, kind):
    """Each part of a gradient too, which a kernel rounded to it; the device whose keys they are adds in float32."""
    arrays = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in dense(random).items()}
    options = {"is_causal": True, "sequence_layout": SequenceLayout(kind, 4), "axis_name": "seq"}

    def run(q, k, v):
        return derived({"q": q, "k": k, "v": v}, functools.partial(flashjax.flash_mha, **options))

    lse = {"out": P(None, "seq"), "lse": P(None, None, "seq")}
    specs = dict.fromkeys(("q", "k", "v"), P(None, "seq"))
    run = jax.shard_map(run, mesh=mesh(), in_specs=(P(None, "seq"),) * 3, out_specs=(lse, specs))
    text = jax.jit(run).lower(*arrays.values()).as_text()
    assert re.findall(r"collective_permute.*: \(tensor<[^>]*x(\w+)>", text) == ["bf16"] * 9


def test_a_transfer_waits_for_the_hop_before_the_one_beside_it(random):
    """Keys that hop i + 1 needs are sent while hop i computes, and so need hops up to i - 1. If they needed none, XLA
    might send all keys before anything is computed.
    """
    arrays = dense(random)
    run = jax.shard_map(
        functools.partial(flashjax.flash_mha, axis_name="seq"), mesh=mesh(), in_specs=P(None, "seq"),
        out_specs=P(None, "seq"),
    )  # fmt: skip
    needs, kernels, sent = {}, 0, []
    for line in jax.jit(run).lower(arrays["q"], arrays["k"], arrays["v"]).as_text().splitlines():
        name, _, rest = line.strip().partition(" = ")
        found = set().union(*(needs.get(x, set()) for x in re.findall(r"%\w+", rest)))
        if "collective_permute" in rest:
            sent.append(found)
        if "flashjax_fwd" in rest:
            found, kernels = found | {kernels}, kernels + 1
        needs[name.split(":")[0]] = found
    assert kernels == 4
    assert sent == [set(), {0}, {0, 1}]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its XLA holds the keys of all hops")
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_memory_does_not_grow_with_the_ring(monkeypatch, kind):
    """Twice as many devices, each with as much: of hops that are done, no keys are left, and few results."""
    monkeypatch.setattr(_ring, "_AT_ONCE", 2)

    def scratch(n, wanted):
        layout = SequenceLayout(kind, n)
        call = functools.partial(flashjax.flash_mha, is_causal=True, axis_name="seq", sequence_layout=layout)

        def both(q, k, v, dout):
            return jax.vjp(call, q, k, v)[1](dout)

        on, spec = mesh("auto", (n,), ("seq",)), P(None, "seq")
        run = jax.shard_map(call if wanted == "forward" else both, mesh=on, in_specs=spec, out_specs=spec)
        x = jax.ShapeDtypeStruct((1, 256 * n, 4, 64), jnp.float32)
        program = jax.jit(run).lower(*[x] * (3 if wanted == "forward" else 4)).compile()
        return program.memory_analysis().temp_size_in_bytes

    for wanted in ("forward", "both"):
        assert scratch(8, wanted) <= 1.5 * scratch(4, wanted)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(("kind", "bound"), [("zigzag", 1.05), ("striped", 1.05), ("contiguous", None)])
def test_work_is_balanced(n, kind, bound):
    """The scores that each device computes of a causal ring, from the plan that it follows."""
    pieces = SequenceLayout(kind, n).pieces(64 * n, n)
    work = np.zeros(n)
    for _, plans in _ring.hops(pieces, pieces, _blocks.Mask(-1, 0, 0, False)):
        work += [sum(block.work for block in plan) for plan in plans]
    total = 64 * n * (64 * n + 1) / 2
    assert work.sum() == total
    if bound:
        assert max(work) <= bound * total / n
    else:
        assert max(work) > 1.4 * total / n


@pytest.mark.parametrize("n", [2, 8])
def test_every_hop_of_zigzag_is_balanced(n):
    """A ring is as fast as its slowest device at every hop. After the first none has a mask."""
    pieces = SequenceLayout("zigzag", n).pieces(64 * n, n)
    for distance, plans in _ring.hops(pieces, pieces, _blocks.Mask(-1, 0, 0, False)):
        assert len({sum(block.work for block in plan) for plan in plans}) == 1
        assert all(len(plan) == 1 for plan in plans)
        assert distance == 0 or all(block.right < 0 for plan in plans for block in plan)


def test_one_program_serves_all_devices(random):
    """A causal ring of any layout has a call a hop, whose ends differ, and no condition. A bias needs conditions."""
    arrays = dense(random)

    def count(kind, **options):
        layout = SequenceLayout(kind, 4)
        call = functools.partial(flashjax.flash_mha, axis_name="seq", sequence_layout=layout, is_causal=True, **options)
        run = jax.shard_map(call, mesh=mesh(), in_specs=P(None, "seq"), out_specs=P(None, "seq"))
        text = jax.jit(run).lower(arrays["q"], arrays["k"], arrays["v"]).as_text()
        return text.count("stablehlo.case"), len(re.findall(r"custom_call @flashjax_fwd", text))

    for kind in ("contiguous", "zigzag"):
        assert count(kind) == (0, 4)
    assert count("striped") == (0, 4)
    assert count("contiguous", bias=jnp.ones((1, 1, 1, 32))) == (3, 4)


@pytest.fixture
def unserved_parts(monkeypatch):
    """Compiled kernels that take whole sequences, and no parts of them."""
    serves = _support.why_not

    def why_not(implementation, direction, arrays, attrs, platform):
        if attrs.part and implementation != "reference":
            return "of no parts"
        return serves(implementation, direction, arrays, attrs, platform)

    monkeypatch.setattr(_support, "why_not", why_not)


def test_the_reference_takes_parts(random, unserved_parts):
    check(dense(random), mesh(), SEQUENCE, expect=RING, is_causal=True)


def test_parts_that_what_was_asked_for_cannot_serve(random, unserved_parts):
    with pytest.raises(Exception, match='implementation="cpu" cannot serve a part of a sequence: of no parts'):
        check(dense(random), mesh(), SEQUENCE, is_causal=True, implementation="cpu")


def test_segments_that_cannot_meet_are_skipped():
    """By the ranges of their ids, at run time; each block is behind such a condition."""
    call = Call(FORWARD, ("q", "k", "v", "segment_ids_q", "segment_ids_k"), Attrs(scale=1.0))

    def meet(q, k):
        return bool(_ring._may_meet(call, [None] * 3 + [jnp.array(x, jnp.int32) for x in (q, k)]))

    assert not meet([[0, 1, 1]], [[2, 3]])
    assert not meet([[5, 5]], [[-2, 4]])
    assert meet([[0, 2]], [[2, 3]])
    assert meet([[0, 1], [7, 9]], [[2, 3], [8, 8]])  # in any row of the batch

    def run(q, k, v, ids):
        return flashjax.flash_mha(q, k, v, segment_ids=ids, axis_name="seq")

    x, ids = jax.ShapeDtypeStruct((1, 32, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, 32), jnp.int32)
    spec = P(None, "seq")
    text = jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=spec, out_specs=spec)).lower(x, x, x, ids).as_text()
    assert text.count("stablehlo.case") == len(re.findall(r"custom_call @flashjax_fwd", text)) == 4


# Inside shard_map.


@LAYOUTS
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(random, kind, check_vma):
    layout = SequenceLayout(kind, 4)
    arrays = dense(random) | {
        "sinks": random.normal(size=4).astype(np.float32),
        "bias": random.normal(size=(1, 4, 32, 32)).astype(np.float32),
    }
    want = jax.jit(functools.partial(derived, is_causal=True))(arrays)
    call = functools.partial(
        flashjax.flash_mha, axis_name="seq", is_causal=True, sequence_layout=layout, return_lse=True
    )
    spec = P("data", "seq")
    mapped = jax.shard_map(
        lambda q, k, v, sinks, bias: call(q, k, v, sinks=sinks, bias=bias),
        mesh=mesh(), in_specs=(spec, spec, spec, P(), P(None, None, "seq")), out_specs=(spec, P("data", None, "seq")),
        check_vma=check_vma,
    )  # fmt: skip

    def function(q, k, v, sinks, bias, return_lse):
        return mapped(q, k, v, sinks, bias)

    program = jax.jit(functools.partial(derived, function=function)).lower(in_layout(layout, arrays)).compile()
    got, gradients = program(in_layout(layout, arrays))
    close({"out": layout.restore(got["out"]), "lse": layout.restore(got["lse"], 2)}, want[0])
    close(in_layout(layout, gradients, "restore"), want[1])
    assert used(program.as_text()) == {"collective-permute", "all-reduce"}


def test_shard_map_forward_mode_and_second_order(random):
    arrays, tangents = dense(random, b=1, s=16), dense(random, b=1, s=16)
    spec = P(None, "seq")
    mapped = jax.shard_map(
        functools.partial(flashjax.flash_mha, axis_name="seq", is_causal=True, return_lse=True),
        mesh=mesh(), in_specs=(spec, spec, spec), out_specs=(spec, P(None, None, "seq")),
    )  # fmt: skip
    plain = functools.partial(flashjax.flash_mha, is_causal=True, return_lse=True)

    def forward(call, arrays, tangents):
        return jax.jvp(lambda x: call(**x), (arrays,), (tangents,))[1]

    def second(call, arrays, tangents):
        gradient = jax.grad(lambda x: loss(call(**x)))
        return jax.jvp(gradient, (arrays,), (tangents,))[1]

    def positional(call):
        return lambda q, k, v: call(q, k, v)

    for derivative in (forward, second):
        got, want = (jax.jit(functools.partial(derivative, positional(f)))(arrays, tangents) for f in (mapped, plain))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 2e-4, 2e-4), got, want)


def test_partly_manual(random):
    """The sequence by hand, the heads and the batch by rule."""
    arrays, on = dense(random, s=16), mesh("explicit", (2, 2, 2), ("x", "y", "seq"))
    want = flashjax.flash_mha(**arrays, is_causal=True)
    run = jax.shard_map(
        functools.partial(flashjax.flash_mha, axis_name="seq", is_causal=True),
        in_specs=P(None, "seq"), out_specs=P(None, "seq"), axis_names={"seq"},
    )  # fmt: skip
    with jax.set_mesh(on):
        placed = place(arrays, on, dict.fromkeys(arrays, P("x", "seq", "y")))
        program = jax.jit(lambda q, k, v: run(q, k, v)).lower(**placed).compile()
        close({"out": program(**placed)}, {"out": want})
    older = {"all-gather"} if jax.__version_info__ < (0, 11) else set()  # of what is not manual
    assert used(program.as_text()) == set(RING) | older


@LAYOUTS
@pytest.mark.parametrize("kind_of_mesh", ["auto", "explicit"])
def test_reordered_arrays_stay_where_they_are(random, kind, kind_of_mesh):
    """Of an array that is there: one program, whose result is spread as the array is."""
    on, layout = mesh(kind_of_mesh), SequenceLayout(kind, 4)
    x = random.normal(size=(2, 32, 3)).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(on, P("data", "seq")))
    moved = layout.reorder(placed)
    np.testing.assert_array_equal(moved, layout.reorder(x))
    back = layout.restore(moved)
    np.testing.assert_array_equal(back, x)
    assert moved.sharding.is_equivalent_to(placed.sharding, 3)
    assert back.sharding.is_equivalent_to(placed.sharding, 3)


# Packed sequences.


def packed(random, cu_seqlens, s=64, **sizes):
    arrays = {name: x[0] for name, x in dense(random, b=1, s=s, **sizes).items()}
    return arrays | {"cu_seqlens_q": np.array(cu_seqlens, np.int32)}


def reorder_packed(layout, arrays):
    return {name: layout.reorder(x, 0) if name in ("q", "k", "v") else x for name, x in arrays.items()}


@LAYOUTS
@pytest.mark.parametrize("mask", [{"is_causal": True}, {"window_size": (6, 2)}, {}], ids=["causal", "window", "full"])
def test_packed(random, kind, mask):
    """Sequences that cross several devices, empty ones, and rows outside of all, which may hold anything."""
    arrays = packed(random, [3, 9, 9, 50, 61])
    want, want_gradients = jax.jit(functools.partial(derived, function=flashjax.flash_mha_varlen, **mask))(arrays)
    for name in ("q", "k", "v"):
        arrays[name][[0, 2, 61, 63]] = np.nan
    layout, on = SequenceLayout(kind, 8), mesh("auto", (8,), ("seq",))
    call = functools.partial(flashjax.flash_mha_varlen, sequence_layout=layout, **mask)
    placed = place(reorder_packed(layout, arrays), on, dict.fromkeys("qkv", P("seq")))
    program = jax.jit(functools.partial(derived, function=call)).lower(placed).compile()
    got, gradients = program(placed)
    close({"out": layout.restore(got["out"], 0), "lse": layout.restore(got["lse"], 1)}, want)
    close({name: layout.restore(x, 0) for name, x in gradients.items()}, want_gradients)
    assert used(program.as_text()) == set(RING)


def test_packed_in_shard_map(random):
    arrays, layout = packed(random, [0, 20, 64]), SequenceLayout("zigzag", 4)
    want = flashjax.flash_mha_varlen(**arrays, is_causal=True)
    call = functools.partial(flashjax.flash_mha_varlen, is_causal=True, axis_name="seq", sequence_layout=layout)
    run = jax.shard_map(call, mesh=mesh(), in_specs=(P("seq"), P("seq"), P("seq"), P()), out_specs=P("seq"))
    got = jax.jit(run)(*reorder_packed(layout, arrays).values())
    close({"out": layout.restore(got, 0)}, {"out": want})


def test_packed_keys_at_other_positions(random):
    """No ring knows the distances then; heads can be exchanged instead."""
    arrays = packed(random, [0, 20, 64]) | {"cu_seqlens_k": np.array([0, 30, 64], np.int32)}
    want = flashjax.flash_mha_varlen(**arrays, is_causal=True)
    placed = place(arrays, mesh(), dict.fromkeys("qkv", P("seq")))
    program = jax.jit(functools.partial(flashjax.flash_mha_varlen, is_causal=True)).lower(**placed).compile()
    close({"out": program(**placed)}, {"out": want})
    assert used(program.as_text()) == {"all-to-all"}
    full = jax.jit(flashjax.flash_mha_varlen).lower(**placed).compile()
    close({"out": full(**placed)}, {"out": flashjax.flash_mha_varlen(**arrays)})
    assert used(full.as_text()) == set(RING)


@pytest.mark.parametrize("check_vma", [True, False])
def test_what_neither_parts_nor_heads_can_do(random, check_vma):
    """Whole sequences on every device; each returns its share of the gradients."""
    arrays = packed(random, [0, 20, 64], h=2) | {"sinks": random.normal(size=2).astype(np.float32)}
    arrays["cu_seqlens_k"] = np.array([0, 30, 64], np.int32)
    layout = SequenceLayout("zigzag", 4)
    want = jax.jit(functools.partial(derived, function=flashjax.flash_mha_varlen, is_causal=True))(arrays)
    call = functools.partial(
        flashjax.flash_mha_varlen, is_causal=True, axis_name="seq", sequence_layout=layout, return_lse=True
    )
    mapped = jax.shard_map(
        lambda q, k, v, cu_seqlens_q, cu_seqlens_k, sinks: call(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks=sinks),
        mesh=mesh(), in_specs=(P("seq"), P("seq"), P("seq"), P(), P(), P()), out_specs=(P("seq"), P(None, "seq")),
        check_vma=check_vma,
    )  # fmt: skip

    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, return_lse):
        return mapped(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks)

    run = jax.jit(functools.partial(derived, function=function))
    got, gradients = run(reorder_packed(layout, arrays))
    close({"out": layout.restore(got["out"], 0), "lse": layout.restore(got["lse"], 1)}, want[0])
    gradients = {name: x if name == "sinks" else layout.restore(x, 0) for name, x in gradients.items()}
    close(gradients, want[1])


# Strategies.


@LAYOUTS
@pytest.mark.parametrize("strategy", ["ulysses", "allgather"])
def test_strategies(random, kind, strategy):
    arrays = dense(random) | {
        "sinks": random.normal(size=4).astype(np.float32),
        "segment_ids": np.sort(random.integers(0, 3, (2, 32)).astype(np.int32), axis=1),
        "bias": random.normal(size=(1, 4, 32, 32)).astype(np.float32),
    }
    options = {"is_causal": True, "window_size": (17, -1), "softcap": 3.0}
    text = check(arrays, mesh(), SEQUENCE | {"bias": P(None, None, "seq")}, SequenceLayout(kind, 4), strategy=strategy,
                 **options)  # fmt: skip
    assert "collective-permute" not in used(text)
    assert ("all-to-all" in used(text)) == (strategy == "ulysses")
    assert "all-gather" in used(text)


def test_ulysses_with_a_shared_bias_and_alibi(random):
    arrays = dense(random, g=1) | {"bias": random.normal(size=(2, 1, 32, 32)).astype(np.float32)}
    slopes = jnp.array([0.5, 0.25, 0.125, 0.0625])
    check(arrays, mesh(), SEQUENCE, SequenceLayout("striped", 4), strategy="ulysses", alibi_slopes=slopes)


def test_auto_gathers_few_keys(random):
    arrays = place(dense(random, s=64, t=8), mesh(), SEQUENCE)
    program = jax.jit(flashjax.flash_mha).lower(**arrays).compile()
    assert used(program.as_text()) == {"all-gather"}


# Transformations.


def test_vmap_and_remat(random):
    """A mapped axis on "data", a checkpoint that keeps what the backward reads: the ring runs forward once."""
    layout, on = SequenceLayout("zigzag", 4), mesh()
    arrays = dense(random, b=2, s=32)
    lead = {name: x[:, None] for name, x in arrays.items()}
    policy = jax.checkpoint_policies.save_only_these_names("flashjax_out", "flashjax_lse")

    @functools.partial(jax.checkpoint, policy=policy)
    def attend(q, k, v):
        return jax.vmap(functools.partial(flashjax.flash_mha, is_causal=True, sequence_layout=layout))(q, k, v)

    def run(arrays):
        return jax.grad(lambda x: jnp.sum(jnp.sin(attend(**x))))(arrays)

    def plain(arrays):
        return jax.grad(lambda x: jnp.sum(jnp.sin(flashjax.flash_mha(**x, is_causal=True))))(arrays)

    specs = dict.fromkeys("qkv", P("data", None, "seq"))
    placed = place({name: layout.reorder(x, 2) for name, x in lead.items()}, on, specs)
    program = jax.jit(run).lower(placed).compile()
    got = {name: layout.restore(x, 2)[:, 0] for name, x in program(placed).items()}
    close(got, plain(arrays))
    assert used(program.as_text()) == set(RING)
    assert permutes(program.as_text()) == 3 + 3 + 3


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "mesh"}, ValueError, "`strategy` must be one of"),
        ({"sequence_layout": "zigzag"}, TypeError, r'For instance SequenceLayout\("zigzag", parts=8\)'),
        ({"sequence_layout": SequenceLayout("zigzag", 3)}, ValueError, "parts that divide s = 32"),
        ({"axis_name": "seq"}, ValueError, "Outside of jax.shard_map leave it out"),
        ({"axis_name": ("seq", "seq")}, TypeError, "several different ones"),
    ],
    ids=str,
)
def test_refused_at_trace_time(random, options, error, message):
    with pytest.raises(error, match=message):
        flashjax.flash_mha(**dense(random), **options)


def test_a_layout_that_is_none():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        SequenceLayout("diagonal", 2)
    with pytest.raises(ValueError, match="`parts` must be a positive int"):
        SequenceLayout("zigzag", 0)
    with pytest.raises(ValueError, match="must be a multiple of 8; got 12"):
        SequenceLayout("zigzag", 4).reorder(np.zeros((1, 12)))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"h": 6}, {"strategy": "ulysses"}, 'h = 6 query heads .* are not split evenly by 4.*strategy="ring"'),
        ({"s": 36}, {"strategy": "ring", "sequence_layout": SequenceLayout("zigzag", 3)}, "not split evenly by 4"),
        (
            {},
            {"strategy": "ring", "sequence_layout": SequenceLayout("striped", 4), "alibi_slopes": jnp.ones(4)},
            "alibi_slopes need neighbouring positions",
        ),
    ],
    ids=["heads", "length", "alibi"],
)
def test_a_strategy_that_cannot_serve(random, sizes, options, message):
    """Asked for by name, it says over which axis, and what to do instead."""
    arrays = dense(random, **sizes)
    on = mesh("explicit")
    with jax.set_mesh(on), pytest.raises(ValueError, match=f"mesh axis 'seq': .*{message}"):
        jax.jit(functools.partial(flashjax.flash_mha, **options)).lower(
            **place(arrays, on, dict.fromkeys("qkv", P(None, "seq")))
        )


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("through", ["page_table", "cache_batch_idx"])
def test_a_cache_whose_pages_are_split(random, kind, through):
    """Tables count the pages of all devices, so pages must not be split; said with the axis and the way out."""
    on = mesh(kind)
    arrays = dense(random, b=4)
    arrays = {"q": arrays["q"][:2, :1], "k_cache": arrays["k"], "v_cache": arrays["v"]}
    table = np.array([[3, 1], [0, 2]] if through == "page_table" else [3, 0], np.int32)
    specs = {"k_cache": P("data"), "v_cache": P("data")}
    placed = place(arrays | {through: table}, on, specs)
    with jax.set_mesh(on), pytest.raises(Exception, match=f"over mesh axis 'data', .* `{through}`. Split its heads"):
        jax.jit(flashjax.flash_mha_with_kvcache)(**placed)


# Several processes.


def test_two_processes(tmp_path):
    """2 processes of 4 devices, a ring across both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = pathlib.Path(__file__).with_name("multiprocess_ring.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context((tmp_path / f"{i}.log").open("w")) for i in range(2)]
        processes = [
            subprocess.Popen([sys.executable, script, str(i), str(port)], env=environment, stdout=log, stderr=log)
            for i, log in enumerate(logs)
        ]
        for process in processes:
            stack.callback(process.kill)
        codes = [process.wait(timeout=120) for process in processes]
    texts = [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    assert codes == [0, 0], "\n".join(texts)
    assert all("the ring agrees" in text for text in texts)


# The example.


def test_example_trains_as_on_one_device():
    pytest.importorskip("optax")
    path = pathlib.Path(__file__).parents[1] / "examples" / "train_parallel.py"
    specification = importlib.util.spec_from_file_location("train_parallel", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    many = example.train(jax.devices()[:8], data_parallel=2, steps=5, batch=2, length=64)
    one = example.train(jax.devices()[:1], data_parallel=1, steps=5, batch=2, length=64)
    np.testing.assert_allclose(many, one, rtol=1e-4)
    assert one[-1] < one[0] - 0.3
