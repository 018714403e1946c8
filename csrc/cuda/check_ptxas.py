"""Fails if ptxas spilled registers or serialised matrix instructions in a kernel of a build, or a limit is passed.

    python csrc/cuda/check_ptxas.py BUILD_DIR [--family sm90] [--out build.json]

Reads the logs that the build keeps next to its objects (log_ptxas.py), and prints a line a kernel. The limits: what one
kernel and all of them may take to compile, and the size of the modules in a wheel. Times are of the processor; objects
out of a compiler cache count nothing, nor do FlashAttention-2's, which a default build has none of.
"""

import argparse
import json
import pathlib
import re
import sys
import zlib

ROW_SECONDS = 10.0
ALL_SECONDS = 2 * 180.0  # three minutes of two cores
WHEEL_BYTES = 15e6


def read(log: pathlib.Path) -> dict:
    text = log.read_text()
    time = re.search(r"^processor time: ([\d.]+) s", text, re.MULTILINE)
    return {
        "kernel": log.name.split(".")[0],
        "registers": max((int(x) for x in re.findall(r"Used (\d+) registers", text)), default=0),
        "spilled": sum(int(x) for x in re.findall(r"(\d+) bytes spill", text)),
        "stack": max((int(x) for x in re.findall(r"(\d+) bytes stack frame", text)), default=0),
        "warnings": sorted(set(re.findall(r"C75\d\d", text))),
        "seconds": float(time[1]) if time else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--family", default="sm90", help="rows whose id starts so; '' for all")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file of the figures")
    options = parser.parse_args()
    rows = [read(log) for log in sorted(options.build.rglob(f"{options.family}*.ptxas"))]
    if not rows:
        print(f"no logs of {options.family}* under {options.build}", file=sys.stderr)
        return 1
    wrong = []
    for row in rows:
        clean = row["registers"] and not (row["spilled"] or row["stack"] or row["warnings"])
        if not clean or row["seconds"] > ROW_SECONDS:
            wrong.append(row["kernel"])
        print(f"{'BAD' if row['kernel'] in wrong else 'ok '} {row['kernel']}: {row['registers']} registers, "
              f"{row['spilled']} bytes spilled, {row['stack']} bytes of stack, {row['seconds']:.1f} s"
              f"{''.join(', ' + x for x in row['warnings'])}")  # fmt: skip
    total = sum(read(log)["seconds"] for log in options.build.rglob("*.ptxas") if "upstream" not in log.name)
    packed = sum(len(zlib.compress(module.read_bytes())) for module in options.build.glob("_*.so"))
    print(f"all kernels: {total:.0f} s of the processor; modules in a wheel: {packed / 1e6:.1f} MB")
    if total > ALL_SECONDS:
        wrong.append(f"compile time over {ALL_SECONDS:.0f} s")
    if packed > WHEEL_BYTES:
        wrong.append(f"modules over {WHEEL_BYTES / 1e6:.0f} MB")
    if options.out:
        figures = {"wrong": wrong, "seconds": round(total, 1), "wheel_bytes": packed, "kernels": rows}
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
