"""Times attention of a sequence that is split over all devices, against one device of the same run.

    python -m bench.scaling --out out/scaling.json [--tokens 32768] [--check] [--peers] [--profile]

Every device has `--tokens` tokens. A row's `tflops` are those of one device, `of_single` their ratio to what one device
computes of a sequence of `--tokens` tokens with the same mask while the others idle. In case "apart" every device
computes such a sequence of its own at the same time: what the slowest of them, and the power that they share, leave of
`single`. On a CPU with virtual devices the figures mean nothing, but the program runs.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flashjax
from bench import overlap, timing
from bench.run import about, command


class Disagreement(Exception):
    """A split sequence does not give what one device does."""


MODES = ("fwd", "fwd+bwd")
CASES = [  # mask, layout, strategy
    ("full", "contiguous", "ring"),
    ("full", "contiguous", "ulysses"),
    ("full", "contiguous", "allgather"),
    ("causal", "zigzag", "ring"),
    ("causal", "striped", "ring"),
    ("causal", "contiguous", "ring"),
    ("causal", "contiguous", "ulysses"),
    ("causal", "zigzag", "allgather"),
]


def operands(tokens, args, sharding):
    shapes = [(1, tokens, heads, args.dim) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)]
    make = jax.jit(
        lambda keys: [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)],
        out_shardings=[sharding] * 4,
    )
    return make(jax.random.split(jax.random.key(0), 4))


def program(mode, attend=flashjax.flash_mha, **options):
    def forward(q, k, v, dout):
        return attend(q, k, v, **options)

    def both(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, **options), q, k, v)
        return out, vjp(dout)

    return jax.jit(forward if mode == "fwd" else both)


def flash_attn3_jax(mask, mesh):
    attend = importlib.import_module("flash_attn3_jax").flash_mha
    yield "ring-contiguous", functools.partial(attend, is_causal=mask == "causal")


def jax_linear_attention(mask, mesh):
    """Its arrays lie in their natural order; its ring takes them to the zigzag and back."""
    if mask != "causal":  # it has no other
        return
    attend = importlib.import_module("jla.distributed.context_parallel_attention").context_parallel_attention
    for case in ("ulysses-contiguous", "ring-contiguous"):
        yield case, functools.partial(attend, mesh=mesh, axis="seq", strategy=case.split("-")[0])


PEERS = {"flash-attn3-jax": flash_attn3_jax, "jax-linear-attention": jax_linear_attention}


def peers(names, mask, mesh):
    """((implementation, case), function of q, k and v), and (implementation, why it is absent)."""
    found, absent = {}, {}
    for name in names:
        try:
            found |= {(name, case): attend for case, attend in PEERS[name](mask, mesh)}
        except Exception as error:  # not installed, or not made for this jax
            absent[name] = reason(error)
    return found, absent


def reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def runner(function, arrays):
    def run(n):
        for _ in range(n):
            result = function(*arrays)
        jax.block_until_ready(result)

    return run


def flops(tokens, args, mask, mode):
    scores = tokens * (tokens + 1) / 2 if mask == "causal" else tokens**2
    return 4 * scores * args.heads * args.dim * (1 if mode == "fwd" else 3.5)


def option_sets(tokens, args):
    """Options to check besides, each with the dimension along which its arrays have the sequence."""
    segments = jnp.asarray(np.arange(tokens)[None] // 100, jnp.int32)
    bias = jax.random.normal(jax.random.key(1), (1, 1, tokens, tokens), jnp.float32)
    yield {}, {}
    yield {"window_size": (300, -1)}, {}
    yield {"softcap": 20.0, "sinks": jnp.linspace(-1, 3, args.heads)}, {}
    yield {"segment_ids": segments}, {"segment_ids": (1,)}
    yield {"bias": bias}, {"bias": (2, 3)}


def check_options(devices, args):
    """Every option in a causal zigzag ring over the devices, against one of them."""
    tokens = 256 * len(devices)
    mesh = Mesh(np.asarray(devices), ("seq",), axis_types=(AxisType.Auto,))
    layout = flashjax.SequenceLayout("zigzag", len(devices))
    one = operands(tokens, args, jax.sharding.SingleDeviceSharding(devices[0]))
    many = jax.device_put([layout.reorder(x) for x in one], NamedSharding(mesh, P(None, "seq")))
    for options, axes in option_sets(tokens, args):
        moved = dict(options)
        for name, dimensions in axes.items():
            for dimension in dimensions:
                moved[name] = layout.reorder(moved[name], dimension)
        moved = {name: np.asarray(x) if hasattr(x, "shape") else x for name, x in moved.items()}
        want = jax.tree.leaves(program("fwd+bwd", is_causal=True, **options)(*one))
        got = jax.tree.leaves(program("fwd+bwd", is_causal=True, sequence_layout=layout, **moved)(*many))
        compare(f"causal zigzag ring with {list(options)}", layout, got, want)


def compare(name, layout, got, want):
    """The largest errors, relative to the largest values, of the result and, if they are there, of the gradients."""
    errors = []
    for x, y in zip(got, want, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (layout.restore(x), y))
        errors.append(float(np.abs(x - y).max() / np.abs(y).max()))
    shown = ", ".join(f"{x:.1e}" for x in errors)
    print(f"check {name}: {shown}", flush=True)
    if not all(x < 2e-2 for x in errors):  # nor are they nan
        raise Disagreement(f"errors of {shown}")


def check(devices, args):
    """Results and gradients of every case, against one device; errors are relative to the largest value."""
    tokens = 256 * len(devices)
    mesh = Mesh(np.asarray(devices), ("seq",), axis_types=(AxisType.Auto,))
    one = operands(tokens, args, jax.sharding.SingleDeviceSharding(devices[0]))
    for mask, kind, strategy in CASES:
        options = {"is_causal": mask == "causal"}
        layout = flashjax.SequenceLayout(kind, len(devices))
        many = jax.device_put([layout.reorder(x) for x in one], NamedSharding(mesh, P(None, "seq")))
        want = jax.tree.leaves(program("fwd+bwd", **options)(*one))
        got = jax.tree.leaves(program("fwd+bwd", sequence_layout=layout, strategy=strategy, **options)(*many))
        compare(f"{mask} {kind} {strategy}", layout, got, want)


def check_peers(names, devices, args):
    """What of other packages does not give our answers on one device: (implementation, case, mask, mode) -> why.

    Where gradients are wrong the result may be right, and is timed. The size is nearer to what a ring is for than that
    of `check`.
    """
    tokens = min(args.tokens, 2048) * len(devices)
    mesh = Mesh(np.asarray(devices), ("seq",), axis_types=(AxisType.Auto,))
    one = operands(tokens, args, jax.sharding.SingleDeviceSharding(devices[0]))
    many = jax.device_put(one, NamedSharding(mesh, P(None, "seq")))
    wrong = {}
    for mask in ("full", "causal"):
        theirs = peers(names, mask, mesh)[0]
        for mode in MODES if theirs else ():
            want = jax.tree.leaves(program(mode, is_causal=mask == "causal")(*one))
            for (impl, case), attend in theirs.items():
                try:
                    got = jax.tree.leaves(program(mode, attend)(*many))
                    compare(f"{mode} {mask} {impl} {case}", flashjax.SequenceLayout(), got, want)
                except Disagreement as error:  # must not end the run, nor be timed as if it were right
                    wrong[impl, case, mask, mode] = f"wrong: {error} at {tokens} tokens"
                except Exception as error:
                    wrong[impl, case, mask, mode] = reason(error)
    for (impl, case, mask, mode), why in wrong.items():
        print(f"check {mode} {mask} {impl} {case}: {why}", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768, help="of each device")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--devices", type=int, default=len(jax.devices()))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--min-burst", type=float, default=0.3)
    parser.add_argument("--only", nargs="*", help="these cases alone, as in ring-zigzag, besides single and apart")
    parser.add_argument("--check", action="store_true", help="compare results and gradients with one device first")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="check and time these packages too; by default all")
    parser.add_argument("--profile", action="store_true", help="say what of the transfers is hidden, and the idle time")
    parser.add_argument("--trace", type=pathlib.Path, help="keep the profiles here")
    args = parser.parse_args()
    args.profile |= args.trace is not None
    names = list(PEERS) if args.peers == [] else args.peers or []

    devices = jax.devices()[: args.devices]
    n = len(devices)
    if args.check:
        check(devices, args)
        check_options(devices, args)
    wrong = check_peers(names, devices, args)
    mesh = Mesh(np.asarray(devices), ("seq",), axis_types=(AxisType.Auto,))
    alone = operands(args.tokens, args, jax.sharding.SingleDeviceSharding(devices[0]))
    split = operands(args.tokens * n, args, NamedSharding(mesh, P(None, "seq")))
    flags = os.environ.get("XLA_FLAGS")
    result = {
        **about(names),
        "devices": n,
        "command": (f'XLA_FLAGS="{flags}" ' if flags else "") + command("bench.scaling"),
        "skipped": [],
        "rows": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for mode in MODES:
        for mask in ("full", "causal"):
            causal = {"is_causal": mask == "causal"}
            apart = jax.shard_map(program(mode, **causal), mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
            calls = {}
            for _, kind, strategy in [case for case in CASES if case[0] == mask]:
                if args.only is None or f"{strategy}-{kind}" in args.only:
                    layout = flashjax.SequenceLayout(kind, n)
                    call = program(mode, **causal, sequence_layout=layout, strategy=strategy)
                    calls["flashjax", f"{strategy}-{kind}"] = call

            def skip(impl, case, why, mode=mode, mask=mask):
                result["skipped"].append({"case": case, "impl": impl, "mode": mode, "mask": mask, "why": why})

            theirs, absent = peers(names, mask, mesh)
            for impl, why in absent.items():
                skip(impl, "all", why)
            for (impl, case), attend in theirs.items():
                if (impl, case, mask, mode) in wrong:
                    skip(impl, case, wrong[impl, case, mask, mode])
                else:
                    calls[impl, case] = program(mode, attend)
            runs = {
                ("flashjax", "single"): runner(program(mode, **causal), alone),
                ("flashjax", "apart"): runner(jax.jit(apart), split),
            }
            for key, call in calls.items():
                try:
                    jax.block_until_ready(call(*split))
                    runs[key] = runner(call, split)
                except Exception as error:  # recorded: a peer's failure must not end the run, nor vanish
                    if key[0] == "flashjax":
                        raise
                    skip(*key, reason(error))
            measured = timing.interleaved(runs, args.repeat, args.min_burst)
            own = {key: 1 if key[1] in ("single", "apart") else n for key in runs}  # devices that share a sequence
            rate = {
                key: flops(args.tokens * own[key], args, mask, mode) / own[key] / (times["ms_median"] * 1e9)
                for key, times in measured.items()
            }
            for (impl, name), times in measured.items():
                row = {"case": name, "impl": impl, "mode": mode, "mask": mask, "dtype": "bfloat16", "b": 1}
                row |= {"tokens": args.tokens, "h": args.heads, "g": args.kv_heads, "d": args.dim, **times}
                tflops = rate[impl, name]
                row |= {"tflops": tflops, "of_single": tflops / rate["flashjax", "single"]}
                if args.profile and (impl, name) in calls and impl == "flashjax":
                    keep = args.trace and args.trace / f"{mode}-{mask}-{name}"
                    try:
                        spans = overlap.recorded(functools.partial(calls[impl, name], *split), keep)
                        row["profile"] = overlap.summary(spans, n - 1)
                    except Exception as error:  # no profiler here: the times above stand
                        skip(impl, name, f"no profile: {reason(error)}")
                result["rows"].append(row)
                print(f"{n} devices, {mode}, {mask}, {impl} {name}: {times['ms_median']:.3f} ms, {tflops:.1f} TFLOP/s "
                      f"a device, {100 * row['of_single']:.1f} % of one alone", flush=True)  # fmt: skip
                if "profile" in row:
                    x = row["profile"]
                    print(f"    transfers {x['transfers_ms']:.3f} ms, {100 * x['hidden']:.0f} % hidden; idle "
                          f"{x['idle_ms']:.3f} ms, {x['idle_ms_per_hop']:.3f} a hop, largest gap "
                          f"{x['largest_gap_ms']:.3f}", flush=True)  # fmt: skip
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    for x in result["skipped"]:
        print(f"skipped: {x['mode']}, {x['mask']}: {x['impl']} {x['case']}: {x['why']}", file=sys.stderr)


if __name__ == "__main__":
    main()
