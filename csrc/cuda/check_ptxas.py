"""Fails if ptxas spilled registers, or serialised matrix instructions, in a kernel of a build.

    python csrc/cuda/check_ptxas.py BUILD_DIR [--family sm90]

Reads the logs that the build keeps next to its objects (log_ptxas.py), and prints a line a kernel.
"""

import argparse
import pathlib
import re
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--family", default="sm90", help="rows whose id starts so; '' for all")
    options = parser.parse_args()
    logs = sorted(options.build.rglob(f"{options.family}*.ptxas"))
    bad = 0
    for log in logs:
        text = log.read_text()
        spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", text))
        stack = max((int(x) for x in re.findall(r"(\d+) bytes stack frame", text)), default=0)
        registers = max((int(x) for x in re.findall(r"Used (\d+) registers", text)), default=0)
        warnings = sorted(set(re.findall(r"C75\d\d", text)))
        wrong = bool(spills or stack or warnings)
        bad += wrong
        name = log.name.split(".")[0]
        print(f"{'BAD' if wrong else 'ok '} {name}: {registers} registers, {spills} bytes spilled, "
              f"{stack} bytes of stack{', ' + ' '.join(warnings) if warnings else ''}")  # fmt: skip
    if not logs:
        print(f"no logs of {options.family}* under {options.build}", file=sys.stderr)
    return 1 if bad or not logs else 0


if __name__ == "__main__":
    sys.exit(main())
