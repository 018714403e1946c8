"""How far results are from float64, ours and the peers', on the same inputs.

    python -m bench.accuracy --out out/accuracy.json
    python -m bench.accuracy --show bench/results/h200/accuracy.json

The figure is |R - E| / |E| over all elements (Frobenius), E computed in float64 from the 16-bit inputs. Fails if ours
is larger than that of dew-flash-attn (FlashAttention-3) where both ran.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys

from bench.cells import Cell
from bench.impls import IMPLS
from bench.report import OURS, table
from bench.run import about, command, load

RESULTS = ("o", "dq", "dk", "dv")
MARK = "dew-flash-attn"
SLACK = 1.01  # two orders of the same sums


@dataclasses.dataclass(frozen=True)
class Problem:
    inputs: str
    cell: Cell
    q_gain: float = 1.0  # scores of normal q and k have a deviation of 1


def _problems():
    def cell(b, s, h, g, d, mask="causal", dtype="bfloat16"):
        return Cell("bwd", b, s, s, h, g, d, d, mask, dtype)

    base = cell(2, 1024, 4, 2, 128)
    yield Problem("normal", base)
    yield Problem("q x 4", base, 4.0)
    yield Problem("logits to 1e3", base, 250.0)
    yield Problem("normal", cell(2, 1024, 4, 2, 128, "full"))
    yield Problem("normal", cell(2, 1024, 4, 2, 128, dtype="float16"))
    yield Problem("normal", cell(2, 1024, 4, 2, 64))
    yield Problem("normal", cell(2, 1024, 4, 2, 256))
    yield Problem("normal", cell(1, 65536, 2, 1, 128))


def arrays(problem):
    """q, k, v, dout."""
    q, k, v, dout = IMPLS[OURS].inputs(problem.cell, "q k v dout")
    return (q * problem.q_gain).astype(q.dtype), k, v, dout


@functools.cache
def _exact(causal, group, rows):
    import jax
    import jax.numpy as jnp

    def head(q, k, v, dout):
        """One query head: q [s, d], k [t, d], v [t, e], dout [s, e], `rows` queries at a time."""
        (s, d), t = q.shape, k.shape[0]
        scale = d**-0.5

        def some(sums, start):
            x, y = (jax.lax.dynamic_slice_in_dim(z, start, rows) for z in (q, dout))
            scores = scale * (x @ k.T)
            if causal:
                own = start + jnp.arange(rows)[:, None] + (t - s)
                scores = jnp.where(jnp.arange(t)[None] <= own, scores, -jnp.inf)
            p = jax.nn.softmax(scores, axis=-1)
            dp = y @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdims=True))
            dk, dv = sums
            return (dk + scale * (ds.T @ x), dv + p.T @ y), (p @ v, scale * (ds @ k))

        sums, (o, dq) = jax.lax.scan(some, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(0, s, rows))
        return o.reshape(s, -1), dq.reshape(s, -1), *sums

    def all_heads(q, k, v, dout):
        q, k, v, dout = (x.astype(jnp.float64).swapaxes(1, 2) for x in (q, k, v, dout))  # [b, heads, s, dim]
        k, v = (jnp.repeat(x, group, 1) for x in (k, v))
        o, dq, dk, dv = jax.lax.map(lambda b: jax.lax.map(lambda x: head(*x), b), (q, k, v, dout))
        b, h = q.shape[:2]
        dk, dv = (x.reshape(b, h // group, group, *x.shape[2:]).sum(2) for x in (dk, dv))
        return [x.swapaxes(1, 2) for x in (o, dq, dk, dv)]

    return jax.jit(all_heads)


def exact(problem, operands):
    import jax

    cell = problem.cell
    with jax.enable_x64(True):
        return _exact(cell.mask == "causal", cell.h // cell.g, min(cell.s, 256))(*operands)


def computed(problem, impl, operands):
    import jax

    f, more = impl.function(problem.cell)

    def both(q, k, v, dout):
        out, vjp = jax.vjp(lambda *qkv: f(*qkv, *more), q, k, v)
        return out, *vjp(dout)

    return jax.jit(both)(*operands)


@functools.cache
def _distance():
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda x, y: jnp.linalg.norm((x.astype(y.dtype) - y).ravel()) / jnp.linalg.norm(y.ravel()))


def measure(problem, impl, operands, expected) -> dict[str, float]:
    import jax

    results = computed(problem, impl, operands)
    with jax.enable_x64(True):
        return {name: float(_distance()(x, y)) for name, x, y in zip(RESULTS, results, expected, strict=True)}


def by_problem(result) -> dict[tuple, dict[str, dict]]:
    found = {}
    for row in result["rows"]:
        found.setdefault((row["inputs"], row["case"]), {})[row["impl"]] = row
    return found


def worse(result) -> list[str]:
    """Where our error is larger than the mark's."""
    return [
        f"{inputs}, {case}: {name} {impls[OURS][name]:.3e}, {MARK} {impls[MARK][name]:.3e}"
        for (inputs, case), impls in by_problem(result).items()
        if {OURS, MARK} <= impls.keys()
        for name in RESULTS
        if not impls[OURS][name] <= SLACK * impls[MARK][name]
    ]


def accuracy_table(result) -> str:
    lines = []
    for (inputs, _), impls in by_problem(result).items():
        for name, row in impls.items():
            shape = (
                f"{row['b']} x {row['s']}, {row['h']}/{row['g']} heads, d = {row['d']}, {row['mask']}, {row['dtype']}"
            )
            lines.append([inputs, shape, name, *(f"{row[x]:.2e}" for x in RESULTS)])
    return table(["inputs", "b x s", "implementation", *RESULTS], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--show", type=pathlib.Path, help="print the table of a result instead")
    parser.add_argument("--impl", action="append")
    parser.add_argument("--longest", type=int, default=1 << 16, help="leave out longer sequences")
    args = parser.parse_args()
    if args.show:
        print(accuracy_table(json.loads(args.show.read_text())))
        return
    impls, absent = load({name: IMPLS[name] for name in args.impl or [OURS, MARK, "fa4-jax", "jax.nn-cudnn"]})
    result = {
        **about(impls),
        "command": command("bench.accuracy"),
        "absent": absent,
        "skipped": [],
        "rows": [],
    }
    for problem in _problems():
        cell = problem.cell
        if cell.s > args.longest:
            continue
        operands = arrays(problem)
        expected = exact(problem, operands)
        for name, impl in impls.items():
            try:
                errors = measure(problem, impl, operands, expected)
            except Exception as error:  # recorded: a peer's failure must not end the run
                if name == OURS:
                    raise
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                result["skipped"].append({"case": cell.id, "impl": name, "why": why})
                continue
            shape = {key: getattr(cell, key) for key in ("dtype", "b", "s", "h", "g", "d", "mask")}
            result["rows"].append({"inputs": problem.inputs, "case": cell.id, "impl": name, **shape, **errors})
            print(
                f"{problem.inputs}, {cell.id}, {name}: {', '.join(f'{x} {errors[x]:.2e}' for x in RESULTS)}", flush=True
            )
            if args.out:  # what there is, for a run that is cut
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    for line in (found := worse(result)):
        print(f"less exact than {MARK}: {line}", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
