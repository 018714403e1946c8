"""What a run of .ci/gpu found, in one file for the record.

    python -m bench.quality OUT      # reads what .ci/gpu left in OUT; writes OUT/quality.json, and OUT/tests.json

Says which kernels were tried (the git tree of csrc/), where, and the outcome of each step.
"""

import json
import pathlib
import sys
import xml.etree.ElementTree as xml

from bench.run import about

JUNIT = pathlib.Path("build/gpu/tests.xml")


def tests() -> dict:
    suite = xml.parse(JUNIT).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "failures": sorted(
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ),
    }


def main():
    out = pathlib.Path(sys.argv[1])
    origin = about()
    if (out / "tests.log").exists():
        (out / "tests.json").write_text(json.dumps(origin | tests(), indent=1) + "\n")
    steps = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in ("build", "sanitize", "soak", "jitter")
        if (out / f"{name}.json").exists()
    }
    if steps:
        (out / "quality.json").write_text(json.dumps(origin | steps, indent=1) + "\n")


if __name__ == "__main__":
    main()
