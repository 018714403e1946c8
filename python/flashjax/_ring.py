"""Attention of a sequence that is split over several devices, each with a part of the queries and of the keys.

ring: keys and values travel from device to device, and the results of all parts are merged by their log-sum-exp; in the
backward their gradients travel along. allgather: every device gets all keys. ulysses: every device gets the whole
sequence of some heads. Each is the function that one device runs, between collectives over a `Line`.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flashjax import _blocks, _support
from flashjax._blocks import Block, Mask
from flashjax._layouts import Piece, SequenceLayout
from flashjax._line import Line
from flashjax._operation import FORWARD, TANGENT, Call
from flashjax._slots import SLOTS, Slot, in_order
from flashjax._types import Arrays, Split

_KEY_SIDE = ("k", "v", "segment_ids_k")
_CACHE = ("leftpad", "batch_idx", "page_table", "shift")
_AT_ONCE = 4  # so many hops are added up in one pass over float32


class Extents(NamedTuple):
    """The whole sequence, and the heads that one device has of it."""

    s: int
    t: int
    h: int
    g: int


def split_axis(call: Call, slot: Slot, shape) -> int | None:
    """The dimension of an operand or result, without leading axes, that is split with the sequence."""
    if slot.name == "bias":
        return 3 if shape[3] > 1 and "cu_seqlens_q" not in call.names else None
    return next((i for i, letter in enumerate(slot.letters) if letter in "st"), None)


def has_parts(call: Call) -> bool:
    """Whether keys are a sequence of which each device may have a part, and no cache."""
    names = call.names
    return not any(name in names for name in _CACHE) and ("seqused_k" not in names or "cu_seqlens_k" in names)


# Which strategy, and why not another.


def choose(call: Call, extents: Extents, line: Line) -> str | None:
    """The strategy that serves a call; None if none does, so that sequences must be gathered."""
    asked = call.attrs.sequence.strategy
    parts = _why_no_parts(call, extents, line.n)
    why_not = {"ring": parts, "allgather": parts, "ulysses": _why_no_ulysses(call, extents, line.n)}
    if call.direction == TANGENT:
        asked, parts = "auto", "the forward mode needs whole sequences"
    if asked != "auto":
        if why_not[asked] is not None:
            others = [name for name in ("ring", "ulysses") if why_not[name] is None]
            raise ValueError(
                f'flashjax: strategy="{asked}" cannot split the sequence over the {line.n} devices of mesh axis '
                f"{' and '.join(map(repr, line.axes))}: {why_not[asked]}. "
                + (f'Use strategy="{others[0]}"' if others else 'Use strategy="auto", which gathers the sequence')
            )
        return asked
    if parts is None:
        return "allgather" if extents.t * 8 <= extents.s else "ring"
    return "ulysses" if why_not["ulysses"] is None else None


def _why_no_parts(call: Call, extents: Extents, n: int) -> str | None:
    """Why attention cannot be computed from parts of the keys."""
    names, attrs, layout = call.names, call.attrs, call.attrs.sequence.layout
    for letter, extent in (("s", extents.s), ("t", extents.t)):
        if not extent or layout.pieces(extent, n) is None:
            parts = "" if layout.is_natural else f" in the order of {layout}"
            return f"a length of {letter} = {extent}{parts} is not split evenly by {n}"
    if not has_parts(call):
        return "the keys of a cache have no even parts"
    if "dropout_seed" in names:
        return "dropout goes by positions in whole sequences"
    if "alibi_slopes" in names and layout.kind == "striped" and not layout.is_natural:
        return 'alibi_slopes need neighbouring positions (the "zigzag" layout has them)'
    if "cu_seqlens_q" not in names and "cu_seqlens_k" not in names:
        return None
    for name in ("bias", "segment_ids_q"):
        if name in names:
            return f"cu_seqlens together with {name.removesuffix('_q')}"
    is_positional = attrs.window_left >= 0 or attrs.window_right >= 0 or "alibi_slopes" in names
    is_cut = "seqused_q" in names or "seqused_k" in names or attrs.max_seqlen_q != attrs.max_seqlen_k
    if is_positional and not (attrs.sequence.is_self and (attrs.top_left or not is_cut)):
        return "packed keys that do not lie at the positions of their queries"
    return None


def _why_no_ulysses(call: Call, extents: Extents, n: int) -> str | None:
    for letter, extent in (("s", extents.s), ("t", extents.t)):
        if not extent or extent % n:
            return f"a length of {letter} = {extent} is not split evenly by {n}"
    if any(name in call.names for name in _CACHE):
        return "a cache is shared by its rows"
    if extents.h % math.lcm(extents.g, n):
        return f"h = {extents.h} query heads and g = {extents.g} key heads (of each device) are not split evenly by {n}"
    return None


def compute(call: Call, implementation: str, line: Line, operands) -> list[jax.Array]:
    """The results of one device, from its parts of the operands; both without leading axes.

    Gradients of what is not split along the sequence are this device's share: their sum over the line is due.
    """
    at = dict(zip(call.names, operands, strict=False))
    (_, s, h, _), (_, t, g, _) = at["q"].shape, at["k"].shape
    strategy = choose(call, Extents(s * line.n, t * line.n, h, g), line)
    if strategy in ("ring", "allgather"):
        return _Parts(call, implementation, line, strategy, operands).run()
    return (_ulysses if strategy == "ulysses" else _whole)(call, implementation, line, operands)


def run(call: Call, implementation: str, *operands) -> list[jax.Array]:
    """The results of operands without leading axes, all in the order of the call's layout and the parts of its line."""
    if call.attrs.sequence.line is not None:
        return compute(call, implementation, call.attrs.sequence.line, operands)
    if call.attrs.sequence.layout.is_natural:
        return call.compute(implementation, *operands)
    return _restored(call, functools.partial(call.compute, implementation), operands)


def reference(call: Call, *operands) -> list[jax.Array]:
    """The same in jnp, to be differentiated again."""
    line = call.attrs.sequence.line
    return run(call, "reference", *operands) if line is None else _whole(call, "reference", line, operands)


def _without_line(call: Call) -> Call:
    sequence = dataclasses.replace(call.attrs.sequence, line=None)
    return dataclasses.replace(call, attrs=dataclasses.replace(call.attrs, sequence=sequence))


# Whole sequences.


def _restored(call: Call, compute, operands) -> list[jax.Array]:
    """`compute`, which knows no layout, for operands and results that are in the order of the call's."""
    layout = call.attrs.sequence.layout

    def change(move, slot, x):
        packed_bias = slot.name == "bias" and "cu_seqlens_q" in call.names
        for axis, letter in enumerate(slot.letters):
            if letter in "st" and not packed_bias and x.shape[axis] > 1:
                x = move(x, axis)
        return x

    operands = [change(layout.restore, slot, x) for slot, x in zip(call.operands, operands, strict=True)]
    return [change(layout.reorder, slot, x) for slot, x in zip(call.results, compute(*operands), strict=True)]


def _whole(call, implementation, line, operands):
    """Everything on every device: right answers for what can be had in no other way."""
    axes = [split_axis(call, slot, x.shape) for slot, x in zip(call.operands, operands, strict=True)]
    operands = [x if axis is None else line.gather(x, axis) for x, axis in zip(operands, axes, strict=True)]
    results = run(_without_line(call), implementation, *operands)

    def share(slot, x):
        axis = split_axis(call, slot, x.shape)
        return jnp.where(line.index() == 0, x, 0) if axis is None else line.own(x, axis)

    return [share(slot, x) for slot, x in zip(call.results, results, strict=True)]


def _ulysses(call, implementation, line, operands):
    g = operands[1].shape[2]
    copies = math.lcm(g, line.n) // g  # so that every device has a key head

    def head_axis(slot, x):
        return next((i for i, letter in enumerate(slot.letters) if letter in "hg" and x.shape[i] > 1), None)

    def send(slot, x):
        if "g" in slot.letters and copies > 1:
            x = jnp.repeat(x, copies, axis=2)
        sequence, heads = split_axis(call, slot, x.shape), head_axis(slot, x)
        if sequence is None:
            return x if heads is None else line.own_heads(x, heads)
        return line.gather(x, sequence) if heads is None else line.to_heads(x, sequence, heads)

    def receive(slot, x, had):
        sequence, heads = split_axis(call, slot, x.shape), had
        if sequence is None:
            return x if heads is None else line.among_heads(x, heads)
        x = line.scatter_sum(x, sequence) if heads is None else line.to_sequence(x, sequence, heads)
        if "g" in slot.letters and copies > 1:
            x = jnp.sum(x.reshape(*x.shape[:2], g, copies, -1), axis=3, dtype=jnp.float32).astype(x.dtype)
        return x

    full = dict(zip((slot.name for slot in call.operands), operands, strict=True))
    had = {
        slot.name: 2 if slot.letters[2:3] in (("h",), ("g",)) else 1 if slot.name == "lse" else None
        for slot in call.results
    }
    had |= {name: head_axis(SLOTS[name], full[name]) for name in call.wanted if name in full}
    operands = [send(slot, x) for slot, x in zip(call.operands, operands, strict=True)]
    results = run(_without_line(call), implementation, *operands)
    return [receive(slot, x, had[slot.name]) for slot, x in zip(call.results, results, strict=True)]


# Parts of sequences.


def hops(queries, keys, mask: Mask) -> list[tuple[int, list[tuple[Block, ...]]]]:
    """For each distance over which keys are needed at all: the blocks of each device."""
    n = len(queries)
    found = [(d, [_blocks.blocks(queries[i], keys[(i - d) % n], mask) for i in range(n)]) for d in range(n)]
    return [(d, plans) for d, plans in found if any(plans)]


class _Spot(NamedTuple):
    """A call: the part of the arrays, the window, and what of the part is this device's, known at run time only."""

    block: Block  # shift means nothing here
    top_left: bool
    shift: jax.Array | None
    ends: tuple[jax.Array, jax.Array] | None  # (first, last + 1) of the block's rows, and of its columns; None: all


class _Parts:
    """Ring and allgather: the attention of this device's queries to the keys of one device after the other."""

    def __init__(self, call: Call, implementation: str, line: Line, strategy: str, operands):
        arrays = dict(zip((slot.name for slot in call.operands), operands, strict=True))
        self.call, self.implementation, self.line, self.strategy = call, implementation, line, strategy
        self.s, self.t = arrays["q"].shape[1] * line.n, arrays["k"].shape[1] * line.n
        layout = call.attrs.sequence.layout
        self.queries, self.keys = _pieces(layout, self.s, line.n), _pieces(layout, self.t, line.n)
        self.is_packed = "cu_seqlens_q" in call.names or "cu_seqlens_k" in call.names
        if self.is_packed:
            arrays = self._unpacked(arrays)
        self.arrays: Arrays = {name: arrays[name] for name in arrays if name not in _KEY_SIDE}
        self.key_side: Arrays = {name: arrays[name] for name in _KEY_SIDE if name in arrays}
        offset = 0 if call.attrs.top_left or self.is_packed else self.t - self.s
        self.mask = Mask(call.attrs.window_left, call.attrs.window_right, offset, "alibi_slopes" in call.names)

    def run(self) -> list[jax.Array]:
        route = hops(self.queries, self.keys, self.mask) if self.strategy == "ring" else None
        if self.call.direction == FORWARD:
            return self._forward(route)
        return self._backward(route)

    def _all_at_once(self):
        """All keys here, in order if they can be; the blocks of each device; and the way back."""
        layout = self.call.attrs.sequence.layout
        gathered = {name: self.line.gather(x, 1) for name, x in self.key_side.items()}
        bias, back = self.arrays.get("bias"), SequenceLayout()
        if layout.kind == "zigzag":
            gathered, back = {name: layout.restore(x) for name, x in gathered.items()}, layout
            bias = layout.restore(bias, 4) if bias is not None and bias.shape[4] > 1 else bias
        if bias is not None:
            gathered["bias"] = bias
        keys = _pieces(SequenceLayout() if layout.kind == "zigzag" else layout, self.t, 1)[0]
        return gathered, [_blocks.blocks(queries, keys, self.mask) for queries in self.queries], back

    # Forward.

    def _forward(self, route):
        q, v = self.arrays["q"], self.key_side["v"]
        b, s, h, _ = q.shape
        out = jnp.zeros((b, s, h, v.shape[-1]), jnp.float32)
        lse = jnp.full((b, h, s), -jnp.inf, jnp.float32)
        if "sinks" in self.arrays:
            lse = jnp.broadcast_to(self.arrays["sinks"].astype(jnp.float32)[:, :, None], lse.shape)
            if self.is_packed:
                lse = jnp.where(self.arrays["segment_ids_q"][:, None] >= 0, lse, -jnp.inf)
        so_far = (out, lse) if "sinks" in self.arrays else None
        if route is None:
            keys, plans, _ = self._all_at_once()
            out, lse = self._attend(plans, keys, so_far, (out, lse))[0] or (out, lse)
            return [out.astype(q.dtype), lse]

        def hop(i, _, plans, keys):
            nonlocal so_far
            so_far, ready = self._attend(plans, keys, so_far, (out, lse))
            return (ready, so_far) if i % _AT_ONCE == _AT_ONCE - 1 else ready

        self._go_around(route, hop)
        out, lse = so_far or (out, lse)
        return [out.astype(q.dtype), lse]

    def _attend(self, plans, keys, so_far, nothing):
        """(out, lse) of what was so far and these keys, and what to wait for until they are used.

        None: nothing so far. To wait for the sum would let XLA send the next keys beside the addition.
        """

        def branch(spots, so_far):
            ready = None
            for spot in spots:
                so_far, ready = self._attend_block(spot, keys, so_far, nothing)
            return so_far, ready

        if self._is_one_program(plans):
            return branch(self._spots(plans), so_far)
        so_far = self._switch(plans, lambda *operands: branch(*operands)[0], so_far or nothing)
        return so_far, so_far[1]

    def _attend_block(self, spot, keys, so_far, nothing):
        call, operands = self._block_call(spot, self.arrays | keys)
        compute = functools.partial(call.compute, self._implementation(call, operands))

        def merged(so_far, out, lse):
            out = out.astype(jnp.float32)
            if so_far is None:
                if out.shape == nothing[0].shape:
                    return out, lse
                so_far = nothing
            at = {1: spot.block.rows}, {2: spot.block.rows}
            old_out, old_lse = (_cut(x, y) for x, y in zip(so_far, at, strict=True))
            new_lse = jnp.logaddexp(old_lse, lse)
            new_out = old_out * _weight(old_lse, new_lse) + out * _weight(lse, new_lse)
            return tuple(_put(x, y, z) for x, y, z in zip(so_far, (new_out, new_lse), at, strict=True))

        if "segment_ids_q" in call.names:
            either = lambda so_far: merged(so_far, *compute(*operands)), lambda so_far: so_far
            so_far = jax.lax.cond(_may_meet(call, operands), *either, so_far or nothing)
            return so_far, so_far[1]
        out, lse = compute(*operands)
        return merged(so_far, out, lse), lse

    # Backward.

    def _backward(self, route):
        arrays, line = self.arrays, self.line
        sums = {"q": jnp.zeros(arrays["q"].shape, jnp.float32)}
        if "bias" in self.call.wanted:
            sums["bias"] = jnp.zeros(arrays["bias"].shape, jnp.float32)
        if route is None:
            keys, plans, layout = self._all_at_once()
            parts = self._gradients(plans, keys)
            for name in ("k", "v"):
                sums[name] = line.scatter_sum(layout.reorder(parts[name].astype(jnp.float32)), 1)
            sums["q"] = parts["q"]
            if "bias" in parts:
                sums["bias"] = layout.reorder(parts["bias"], 4) if parts["bias"].shape[4] > 1 else parts["bias"]
        else:
            # What is left of the own keys' gradients comes home while they are used, which therefore are last.
            def hop(i, distance, plans, keys):
                parts = self._gradients(plans, keys)
                ready = [parts["k"]]  # what the transfer waits for must have another use, or XLA drops it
                if i % _AT_ONCE == _AT_ONCE - 1:
                    ready += [sums[name] for name in ("q", "k", "v")]
                sums["q"] = sums["q"] + parts["q"]
                if "bias" in sums:
                    sums["bias"] = self._add_bias(sums["bias"], parts["bias"], distance)
                parcels, unpack = _parcels({name: parts[name] for name in ("k", "v")})
                for name, x in unpack([line.shift(x, -distance) for x in parcels]).items():
                    sums[name] = sums[name] + x
                return ready

            sums |= {name: jnp.zeros(self.key_side[name].shape, jnp.float32) for name in ("k", "v")}
            self._go_around(sorted(route, key=lambda hop: hop[0] or line.n), hop, arrays["dout"])
        if "sinks" in self.call.wanted:
            sums["sinks"] = self._sinks_gradient()
        dtypes = [jnp.float32 if slot.type != "T" else arrays["q"].dtype for slot in self.call.results]
        return [sums[slot.name].astype(dtype) for slot, dtype in zip(self.call.results, dtypes, strict=True)]

    def _gradients(self, plans, keys):
        """Gradients by name, of the part of the scores that these keys have: float32 where parts were added."""
        present = self.arrays | keys
        wanted = ("q", "k", "v", *(("bias",) if "bias" in self.call.wanted else ()))
        alone = self._is_one_program(plans)

        def branch(spots):
            sums = {}
            for spot in spots:
                for name, x in self._block_gradients(spot, present, wanted).items():
                    if name not in sums:
                        if alone and len(spots) == 1 and x.shape == present[name].shape:
                            sums[name] = x
                            continue
                        sums[name] = jnp.zeros(present[name].shape, jnp.float32)
                    at = self._extent(name, present[name].shape, spot)
                    sums[name] = _put(sums[name], _cut(sums[name], at) + x, at)
            return [sums.get(name, jnp.zeros(present[name].shape, jnp.float32)) for name in wanted]

        results = branch(self._spots(plans)) if alone else self._switch(plans, branch)
        return dict(zip(wanted, results, strict=True))

    def _block_gradients(self, spot, present, wanted):
        call, operands = self._block_call(spot, present)
        compute = functools.partial(call.compute, self._implementation(call, operands))

        if "segment_ids_q" in call.names:
            nothing = lambda *_: [jnp.zeros(shape, dtype) for shape, dtype in call.result_types(operands)]  # noqa: E731
            results = jax.lax.cond(_may_meet(call, operands), compute, nothing, *operands)
        else:
            results = compute(*operands)
        return dict(zip(wanted, results, strict=True))

    def _sinks_gradient(self):
        x = {name: self.arrays[name].astype(jnp.float32) for name in ("out", "lse", "dout", "dlse", "sinks")}
        delta = jnp.moveaxis(jnp.sum(x["out"] * x["dout"], axis=-1), 1, 2)
        delta = delta if self.call.attrs.out_only else delta - x["dlse"]
        weight = jnp.where(x["lse"] > -jnp.inf, jnp.exp(x["sinks"][:, :, None] - x["lse"]), 0)
        gradient = -jnp.sum(jnp.where(weight > 0, weight * delta, 0), axis=2)
        return gradient if x["sinks"].shape[0] > 1 else jnp.sum(gradient, axis=0, keepdims=True)

    # The way around the ring.

    def _go_around(self, route, hop, start=None):
        """hop(i, distance, plans, keys) for each hop; it returns what it computed.

        The next keys are sent for before these are used, but not before the last hop is done: they need nothing else,
        so XLA might send all of them first, and would hold the keys of all devices at once.
        """
        parcels, unpack = _parcels(self.key_side)
        at, done = 0, start

        def send(distance):
            waiting = parcels if done is None else jax.lax.optimization_barrier((parcels, done))[0]
            return [self.line.shift(x, distance - at) for x in waiting]

        for i, (distance, plans) in enumerate(route):
            if i == 0 and distance:
                parcels, at = send(distance), distance
            ahead = route[i + 1][0] if i + 1 < len(route) else 0
            sent = send(ahead) if ahead else parcels
            done = hop(i, distance, plans, (unpack(parcels) if distance else self.key_side) | self._bias_of(distance))
            parcels, at = sent, ahead

    def _bias_of(self, distance):
        bias = self.arrays.get("bias")
        if bias is None or bias.shape[4] == 1:
            return {}
        own = self.t // self.line.n
        start = (self.line.index() - distance) % self.line.n * own
        return {"bias": jax.lax.dynamic_slice_in_dim(bias, start, own, 4)}

    def _add_bias(self, total, part, distance):
        if total.shape[4] == 1:
            return total + part
        start = (self.line.index() - distance) % self.line.n * (self.t // self.line.n)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, 4)

    # One block.

    def _is_one_program(self, plans) -> bool:
        """Whether one program serves all devices; a bias has its rows, which packed calls count otherwise."""
        return "bias" not in self.arrays or len(set(plans)) == 1

    def _switch(self, plans, function, *operands):
        """function(spots of this device, *operands), by conditions."""
        return self.line.switch(plans, lambda plan: functools.partial(function, self._spots([plan])), *operands)

    def _spots(self, plans) -> list[_Spot]:
        """The blocks of all devices as calls: where they differ, packed ones whose ends are known at run time.

        Where a device has fewer blocks of a window than others, it has an empty sequence.
        """
        spots = []
        for left, right in dict.fromkeys((x.left, x.right) for plan in plans for x in plan):
            alike = [[x for x in plan if (x.left, x.right) == (left, right)] for plan in plans]
            for own in itertools.zip_longest(*alike):
                some = [x for x in own if x is not None]
                rows, cols = (
                    (min(first for first, _ in ranges), max(end for _, end in ranges))
                    for ranges in ([x.rows for x in some], [x.cols for x in some])
                )
                empty = Block((rows[0],) * 2, (cols[0],) * 2, left, right, 0)
                own = [x or empty for x in own]
                ends = None
                if len({(x.rows, x.cols) for x in own}) > 1:
                    ends = (
                        self._pick_range([x.rows for x in own], rows[0]),
                        self._pick_range([x.cols for x in own], cols[0]),
                    )
                at_end = all(x.shift == x.cols[1] - x.cols[0] - (x.rows[1] - x.rows[0]) for x in own)
                shifts = [x.shift for x in own]
                shift = self.line.pick(shifts) if any(shifts) and not at_end else None
                spots.append(_Spot(Block(rows, cols, left, right, 0), not at_end, shift, ends))
        return spots

    def _pick_range(self, ranges, origin: int):
        """This device's (first, last + 1), counted from the origin."""
        return jnp.stack([self.line.pick([x[i] - origin for x in ranges]) for i in range(2)])

    def _extent(self, name, shape, spot: _Spot):
        """What a spot takes of an array: axis -> (first, last + 1), of the axes that it cuts."""
        return {
            axis: spot.block.rows if letter == "s" else spot.block.cols
            for axis, letter in enumerate(SLOTS[name].letters)
            if letter in "st" and not (name == "bias" and shape[axis] == 1)
        }

    def _block_call(self, spot: _Spot, arrays):
        """An ordinary call, on what a spot is about."""
        arrays = {
            name: _cut(x, self._extent(name, x.shape, spot))
            for name, x in arrays.items()
            if name != "sinks"  # which all keys share
        }
        b = arrays["q"].shape[0]
        if spot.shift is not None:
            arrays["shift"] = jnp.broadcast_to(spot.shift, (b,))
        if spot.ends is not None:
            arrays |= {
                f"cu_seqlens_{side}": jnp.broadcast_to(x, (b, 2)) for side, x in zip("qk", spot.ends, strict=True)
            }
        attrs = dataclasses.replace(
            self.call.attrs,
            window_left=spot.block.left,
            window_right=spot.block.right,
            top_left=spot.top_left,
            max_seqlen_q=-1,
            max_seqlen_k=-1,
            yields=self.strategy == "ring",
            part=True,
            sequence=Split(),
        )
        names = tuple(name for name in in_order(arrays) if name not in ("out", "lse", "dout", "dlse"))
        wanted = tuple(name for name in self.call.wanted if name == "bias")
        call = Call(self.call.direction, names, attrs, wanted, in_parts=True)
        return call, [arrays[slot.name] for slot in call.operands]

    def _implementation(self, call: Call, operands) -> str:
        """What serves the whole need not serve a part, which may have a shift or segments instead."""
        arrays = dict(zip(call.names, operands, strict=False))
        why_not = _support.why_not(
            self.implementation, call.direction, arrays, call.attrs, _support.PLATFORM.get(self.implementation, "")
        )
        if why_not is None:
            return self.implementation
        asked = call.attrs.implementation
        if asked is not None:
            raise NotImplementedError(
                f'flashjax: implementation="{asked}" cannot serve a part of a sequence: {why_not}'
            )
        return "reference"

    # Packed sequences.

    def _unpacked(self, arrays: Arrays) -> Arrays:
        """Sequences told apart by segment ids. What lies outside all of them is 0, since it may have been NaN."""
        arrays = dict(arrays)
        ids = {}
        for side, extent, pieces, outside in (("q", self.s, self.queries, -1), ("k", self.t, self.keys, -2)):
            cu = jnp.clip(arrays.pop(f"cu_seqlens_{side}"), 0, extent)
            row = jnp.concatenate(
                [
                    self.line.pick([own[i].start for own in pieces]) + piece.stride * jnp.arange(piece.length)
                    for i, piece in enumerate(pieces[0])
                ]
            ).astype(jnp.int32)
            index = jax.vmap(lambda c, row=row: jnp.searchsorted(c, row, side="right"))(cu).astype(jnp.int32) - 1
            inside = (index >= 0) & (index < cu.shape[1] - 1)
            index = jnp.clip(index, 0, cu.shape[1] - 2)
            length = jnp.diff(cu)
            bound = getattr(self.call.attrs, f"max_seqlen_{side}")
            length = length if bound < 0 else jnp.minimum(length, bound)
            if f"seqused_{side}" in arrays:
                length = jnp.clip(arrays.pop(f"seqused_{side}"), 0, length)
            at = row - jnp.take_along_axis(cu, index, axis=1)
            inside &= at < jnp.take_along_axis(length, index, axis=1)
            ids[side] = jnp.where(inside, index, outside)
        for name, x in arrays.items():
            letters = SLOTS[name].letters
            if x.dtype != jnp.int32 and name != "lse" and ("s" in letters or "t" in letters):
                side = "q" if "s" in letters else "k"
                inside = ids[side] >= 0
                inside = inside[:, None] if name == "dlse" else inside[..., None, None]
                arrays[name] = jnp.where(inside, x, 0)
        return arrays | {"segment_ids_q": ids["q"], "segment_ids_k": ids["k"]}


def _pieces(layout: SequenceLayout, length: int, devices: int) -> list[tuple[Piece, ...]]:
    pieces = layout.pieces(length, devices)
    assert pieces is not None  # or `choose` would have said so
    return pieces


def _may_meet(call: Call, operands):
    """Whether the ranges of the segment ids overlap; where they do not, a block has nothing to compute."""
    q, k = (operands[call.names.index(f"segment_ids_{side}")] for side in "qk")
    return jnp.any((jnp.max(q, 1) >= jnp.min(k, 1)) & (jnp.min(q, 1) <= jnp.max(k, 1)))


def _weight(part, total):
    """exp(part - total), (b, h, s) -> (b, s, h, 1); 0 where neither has seen a key."""
    return jnp.moveaxis(jnp.where(total > -jnp.inf, jnp.exp(part - total), 0), 1, 2)[..., None]


def _cut(x, at):
    """What lies between the indices `at` of some axes."""
    for axis, (start, end) in at.items():
        x = jax.lax.slice_in_dim(x, start, end, axis=axis)
    return x


def _put(x, part, at):
    """x with `part` there."""
    if part.shape == x.shape:
        return part
    return jax.lax.dynamic_update_slice(x, part, [at.get(axis, (0, 0))[0] for axis in range(x.ndim)])


def _parcels(arrays):
    """Arrays to send, and what takes them apart: all of a dtype in one, because XLA may send but one at a time."""
    groups = {}
    for name, x in arrays.items():
        groups.setdefault(x.dtype, []).append(name)
    groups = list(groups.values())

    def unpack(parcels):
        found = {}
        for names, parcel in zip(groups, parcels, strict=True):
            start = 0
            for name in names:
                x = arrays[name]
                found[name] = parcel[start : start + x.size].reshape(x.shape) if len(names) > 1 else parcel
                start += x.size
        return found

    return [
        jnp.concatenate([arrays[name].ravel() for name in names]) if len(names) > 1 else arrays[names[0]]
        for names in groups
    ], unpack
