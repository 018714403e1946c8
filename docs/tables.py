"""Fills in the tables of README.md and docs/*.md: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    python -m docs.tables            # rewrite them
    python -m docs.tables --check    # exit 1 if one is out of date

Every table comes from a source of truth in this repository: the kernel table, the slots, committed results.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import sys

from bench import accuracy, memory, report, shares
from bench.run import csrc_tree

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


# The kernel table.


def features() -> tuple[dict[str, int], list[str]]:
    """The feature sets of csrc/attention/select.h by name, and what each bit is called in select.cc."""
    header = (ROOT / "csrc/attention/select.h").read_text()
    sets = {name: 1 << int(bit) for name, bit in re.findall(r"(k\w+)\s*=\s*1u\s*<<\s*(\d+)", header)}
    for name, value in re.findall(r"constexpr uint32_t (k\w+)\s*=\s*([^;]+);", header):
        sets[name] = eval(" ".join(value.split()), {"__builtins__": {}}, sets)
    names = re.search(r"kFeatureNames\[\] = \{(.*?)\};", (ROOT / "csrc/attention/select.cc").read_text(), re.DOTALL)[1]
    return sets, re.findall(r'"([^"]+)"', names)


def kernels() -> list[dict]:
    """The rows of csrc/attention/kernels.def; its header names the columns."""
    text = (ROOT / "csrc/attention/kernels.def").read_text()
    columns = re.search(r"^// KERNEL\(([^)]*)\)", text, re.MULTILINE)[1].split(", ")
    rows = re.findall(r"^KERNEL\(([^)]*)\)", text, re.MULTILINE)
    return [dict(zip(columns, (cell.strip() for cell in row.split(",")), strict=True)) for row in rows]


def support() -> str:
    """One line for each family, direction and set of options; rows that another one contains are left out."""
    sets, names = features()
    dtypes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    rows = [row | {"set": eval(row["features"], {"__builtins__": {}}, sets)} for row in kernels()]
    for row in rows:
        if row["direction"] == "Forward":
            row["set"] |= sets["kDeterministic"]  # every forward is

    def contains(big, small):
        same = all(big[key] == small[key] for key in ("family", "direction", "dtype", "d", "e"))
        same &= all((big["variant"] == x) == (small["variant"] == x) for x in ("kDecode", "kLatent"))
        return same and big["set"] != small["set"] and big["set"] & small["set"] == small["set"]

    merged = {}
    for row in rows:
        if any(contains(other, row) for other in rows):
            continue
        arch = f"sm_{row['arch_min']}a" if row["arch_min"] == row["arch_max"] else f"sm_{row['arch_min']} and later"
        dims = row["d"] if row["d"] == row["e"] else f"{row['d']}/{row['e']}"
        unit = f" (multiples of {row['unit']})" if int(row.get("unit", 1)) > 1 else ""
        lacks = [name for bit, name in enumerate(names) if not row["set"] >> bit & 1]
        if row["variant"] in ("kDecode", "kLatent"):
            lacks.append(f"more than {row['m']} queries of a key head, but in pages")
        if row["variant"] == "kLatent":
            lacks.append("values that are no columns of the keys")
        if row["variant"] in ("kPaged", "kPagedScores"):
            lacks.append("few queries, left padding, pages of no multiple of 16 keys, keys in no pages")
        missing = ", ".join(lacks) or "none"
        key = ("CUDA, " + arch, row["family"], row["direction"].lower(), unit, missing)
        found = merged.setdefault(key, ({}, {}))
        found[0][dtypes[row["dtype"]]] = found[1][dims] = None
    every = ", ".join(dtypes.values())
    lines = [
        ["CPU", "cpu", "forward", every, "512", "none"],
        ["CPU", "cpu", "backward", every, "512", "batch_idx, page_table"],
        *(
            [where, family, direction, ", ".join(types), ", ".join(dims) + unit, missing]
            for (where, family, direction, unit, missing), (types, dims) in merged.items()
        ),
        ["any platform", "reference (jnp)", "forward, backward, jvp, second order", every, "any", "none"],
    ]
    return report.table(["runs on", "kernels", "direction", "dtypes", "head dims up to", "options not served"], lines)


# The slots.


def slots() -> str:
    spec = importlib.util.spec_from_file_location("_slots", ROOT / "python/flashjax/_slots.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_slots"] = module
    spec.loader.exec_module(module)
    types = {"T": "operand dtype", "F": "operand dtype or float32", "F32": "float32", "S32": "int32"}
    lines = [[f"`{x.name}`", types[x.type], f"({', '.join(x.dims.split())})", "yes" if x.grad else ""]
             for x in module.SLOTS.values()]  # fmt: skip
    return report.table(["slot", "dtype", "shape", "differentiable"], lines)


# Results.


def command(text) -> str:
    return f"\n\n```bash\n{text}\n```"


def age(data) -> str:
    """Says so where a result is of other kernels than those here."""
    then = data.get("csrc_tree")
    changed = then is not None and then != csrc_tree()
    return f" The kernels have changed since: `git rev-parse HEAD:csrc` was {then[:12]}." if changed else ""


def result(path, text=report.tables, show="python -m bench.report") -> str:
    if not (RESULTS / path).exists():
        return ""
    data = json.loads((RESULTS / path).read_text())
    source = f"Measured on {report.heading(data)}" if "ceilings" in data else f"Measured on {data['device']}."
    source += age(data)
    if "note" in data:
        source += f" Taken {data['note']}."
    if data.get("absent"):
        source += f" Asked for, but not there: {', '.join(data['absent'])}."
    run = re.sub(r"--out \S+", f"--out out/{pathlib.Path(path).name}", data["command"])
    shown = f"{show} bench/results/{path}"
    picture = (RESULTS / path).with_suffix(".png")
    if report.shows(picture, data):
        name = picture.relative_to(ROOT)
        source += f"\n\n![{data['device']}: rates against sequence length]({name})"
        shown += f" --plot {name}"
    return f"{source}\n\n{text(data)}" + command(f"{run}\n{shown}")


def benchmarks(folder) -> list[pathlib.Path]:
    return [path for path in sorted((RESULTS / folder).glob("*.json")) if "ceilings" in json.loads(path.read_text())]


def all_results(folder) -> str:
    return "\n\n".join(result(path.relative_to(RESULTS)) for path in benchmarks(folder))


def memory_result() -> str:
    return result("cpu/memory.json", memory.memory_table, "python -m bench.memory --show")


def accuracy_result() -> str:
    return result("h200/accuracy.json", accuracy.accuracy_table, "python -m bench.accuracy --show")


def scaling_result() -> str:
    """The results of bench.scaling, fewest devices first, and last of those that which is drawn."""
    paths = sorted(
        RESULTS.glob("*/scaling*.json"),
        key=lambda path: (json.loads(path.read_text())["devices"], path.name == "scaling.json"),
    )
    parts = [f"![share of one device's rate](../{paths[-1].with_suffix('.png').relative_to(ROOT)})"] if paths else []
    for path in paths:
        data = json.loads(path.read_text())
        row = data["rows"][0]
        parts.append(
            f"{data['devices']} x {data['device']}, {row['tokens']} tokens a device, {row['h']} heads, d = {row['d']}, "
            f"{row['dtype']}; TFLOP/s a device, and their share of what one alone reaches.{age(data)}\n\n"
            + "\n\n".join(filter(None, (shares.table(data), shares.skipped(data))))
            + command(data["command"])
        )
    return "\n\n".join(parts)


def checks() -> str:
    """How right the kernels are, as far as a GPU has said, and which kernels those were."""
    lines = []
    for path in (RESULTS / "h200" / f"{name}.json" for name in ("tests", "quality")):
        data = json.loads(path.read_text())
        found = {"tests": f"{data['passed']} passed, {data['failed']} failed"} if "passed" in data else {}
        for step in ("soak", "jitter"):
            if step in data:
                x = data[step]
                found[step] = f"{x['cases']} calls in {x['seconds']:.0f} s, {len(x['failures'])} wrong"
        for row in data.get("sanitize", {}).get("rows", []):
            found[row["tool"]] = f"{len(row['reports'])} lines of reports, {len(row['not_run'])} not run"
        kernels = f"`{data['csrc_tree'][:12]}`" + (", older than these" if age(data) else "")
        lines += [[step, outcome, kernels] for step, outcome in found.items()]
    return report.table(["step", "outcome", "kernels (`git rev-parse HEAD:csrc`)"], lines)


BLOCKS = {
    "scaling": scaling_result,
    "support": support,
    "checks": checks,
    "slots": slots,
    "cpu": lambda: all_results("cpu"),
    "memory": memory_result,
    "accuracy": accuracy_result,
    "h200": lambda: all_results("h200"),
}


def filled(text: str) -> str:
    def fill(match):
        content = BLOCKS[match[1]]()
        return f"<!-- begin {match[1]} -->\n" + (f"\n{content}\n\n" if content else "") + f"<!-- end {match[1]} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", fill, text, flags=re.DOTALL)


def stale() -> dict[pathlib.Path, str]:
    """The files whose tables are out of date, and what they should be."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path: new for path in paths if (new := filled(path.read_text())) != path.read_text()}


def strays() -> list[pathlib.Path]:
    """Pictures next to results that show something else."""
    return [
        path
        for path in sorted(RESULTS.rglob("*.png"))
        if not report.shows(path, json.loads(path.with_suffix(".json").read_text()))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {'out of date: run python -m docs.tables' if args.check else 'rewritten'}")
        if not args.check:
            path.write_text(text)
    for path in strays():
        print(f"{path.relative_to(ROOT)} is of another result: run python -m bench.report with --plot")
    raise SystemExit(1 if (found and args.check) or strays() else 0)


if __name__ == "__main__":
    main()
