"""Peak memory of attention and its gradient on the CPU, against the sequence length.

    python -m bench.memory --out out/memory-cpu.json

Each size runs in a process of its own: inputs are made and the program is compiled, the kernel's high-water mark of
resident memory is reset, the program runs once, and the growth of the mark is what it took, results included.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

from bench.report import table
from bench.run import about, command

B, H, D = 1, 2, 64
SIZES = [1024 << i for i in range(7)]
XLA_UP_TO = 8192  # from there its scores take gigabytes


def _high_water_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def measure(impl: str, s: int) -> dict:
    import jax
    import jax.numpy as jnp

    import flashjax

    functions = {
        "flashjax": lambda q, k, v: flashjax.flash_mha(q, k, v, is_causal=True),
        "jax.nn-xla": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"),
    }
    f = functions[impl]
    q, k, v = jax.block_until_ready(tuple(jax.random.normal(jax.random.key(0), (3, B, s, H, D), jnp.float32)))
    result = {"impl": impl, "s": s, "array_bytes": q.nbytes}
    programs = {"fwd": f, "grad": jax.grad(lambda *qkv: f(*qkv).sum(), (0, 1, 2))}
    for mode, program in programs.items():
        compiled = jax.jit(program).lower(q, k, v).compile()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the mark becomes what is resident now
        before = _high_water_bytes()
        jax.block_until_ready(compiled(q, k, v))
        result[f"{mode}_bytes"] = _high_water_bytes() - before
    return result


def memory_table(result) -> str:
    rows = {(row["s"], row["impl"]): row for row in result["rows"]}
    lines = []
    for s in sorted({row["s"] for row in result["rows"]}):
        cells = [f"{rows[s, 'flashjax']['array_bytes'] / 2**20:.1f}"]
        for impl in ("flashjax", "jax.nn-xla"):
            row = rows.get((s, impl))
            cells += [f"{row[f'{mode}_bytes'] / 2**20:.1f}" if row else "-" for mode in ("fwd", "grad")]
        lines.append([f"{s}", *cells])
    header = ["s = t", "one input", "flashjax forward", "gradient", "jax.nn-xla forward", "gradient"]
    return f"Peak growth of resident memory in MiB (b={B}, h={H}, d={D}, float32, causal)\n\n" + table(header, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--show", type=pathlib.Path, metavar="RESULT", help="only print the table of a result")
    parser.add_argument("--one", nargs=2, metavar=("IMPL", "S"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    if args.show:
        print(memory_table(json.loads(args.show.read_text())))
        return
    result = {
        **about(),
        "command": command("bench.memory"),
        "rows": [],
    }
    for impl, s in [("flashjax", s) for s in SIZES] + [("jax.nn-xla", s) for s in SIZES if s <= XLA_UP_TO]:
        one = [sys.executable, "-m", "bench.memory", "--one", impl, str(s)]
        result["rows"].append(json.loads(subprocess.run(one, check=True, stdout=subprocess.PIPE).stdout))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(memory_table(result))


if __name__ == "__main__":
    main()
