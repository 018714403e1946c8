"""Turns a result of bench.run into tables, and plots.

python -m bench.report bench/results/cpu/attention.json
python -m bench.report out/h200.json --plots out
"""

import argparse
import json
import math
import pathlib
from collections import defaultdict

OURS = "flashjax"
MODES = {"fwd": "forward", "bwd": "backward", "decode": "decode", "chain": "chained calls"}


def table(header, rows) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def geomean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def by_case(result, mode) -> dict[str, dict[str, dict]]:
    """case -> impl -> row, of one mode, in the order in which they were run."""
    cases = defaultdict(dict)
    for row in result["rows"]:
        if row["mode"] == mode:
            cases[row["case"]][row["impl"]] = row
    return cases


def problem(row) -> list[str]:
    heads = f"{row['h']}" if row["h"] == row["g"] else f"{row['h']}/{row['g']}"
    dims = f"{row['d']}" if row["d"] == row["e"] else f"{row['d']}/{row['e']}"
    length = f"{row['s']}" if row["s"] == row["t"] else f"{row['s']} x {row['t']}"
    mask = row["mask"] + (f" {row['window']}" if "window" in row else "")
    mask = row["case"].rsplit("-", 1)[1] + " " + mask if "packed" in row["case"] or "documents" in row["case"] else mask
    mask += f", page {row['page']}" if "page" in row else ""
    return [row["dtype"], f"{row['b']} x {length}", heads, dims, mask]


def unit(cases) -> tuple[str, float]:
    """(unit, factor) in which a table gives the rates of its rows: TFLOP/s on a GPU, GFLOP/s on a CPU."""
    row = next(iter(next(iter(cases.values())).values()))
    if row["mode"] == "chain":
        return "microseconds a call", 1.0
    key, name = ("tbps", "B/s of keys and values") if row["mode"] == "decode" else ("tflops", "FLOP/s")
    fastest = max(row[key] for impls in cases.values() for row in impls.values())
    return ("T" + name, 1.0) if fastest >= 1 else ("G" + name, 1e3)


def figure(row, factor) -> str:
    value = factor * row["us_per_call" if row["mode"] == "chain" else "tbps" if row["mode"] == "decode" else "tflops"]
    return f"{value:.0f}" if value >= 20 else f"{value:.2f}"


def ratios(cases, time="ms_median") -> dict[str, dict[str, float]]:
    """case -> peer -> how many times as long as ours the peer takes."""
    return {
        case: {name: row[time] / impls[OURS][time] for name, row in impls.items() if name != OURS}
        for case, impls in cases.items()
        if OURS in impls and len(impls) > 1
    }


def mode_table(result, mode) -> str:
    cases = by_case(result, mode)
    if not cases:
        return ""
    names = list(dict.fromkeys(name for impls in cases.values() for name in impls))
    names.sort(key=lambda name: name != OURS)
    faster, rows, (rate, factor) = ratios(cases), [], unit(cases)
    for case, impls in cases.items():
        best = min(faster[case].values(), default=None) if case in faster else None
        cells = [figure(impls[name], factor) if name in impls else "-" for name in names]
        rows.append([*problem(next(iter(impls.values()))), *cells, f"{best:.2f}x" if best else "-"])
    text = f"{MODES[mode].capitalize()}, {rate}\n\n"
    text += table(["dtype", "b x s", "heads", "d", "mask", *names, "to the best peer"], rows)
    if faster:
        best = [min(peers.values()) for peers in faster.values()]
        text += f"\n\nTo the best peer of each row: {geomean(best):.2f}x (geometric mean), {min(best):.2f}x (smallest)."
        measures = [("", faster)]
        if "cores" in result["device"]:  # a CPU, which may have had other work to do
            measures.append((" in processor time", ratios(cases, "cpu_ms")))
        for what, measured in measures:
            for name in names:
                against = [peers[name] for peers in measured.values() if name in peers]
                if against:
                    text += f" To {name}{what}: {geomean(against):.2f}x, {min(against):.2f}x."
    return text


def tables(result) -> str:
    parts = [mode_table(result, mode) for mode in MODES]
    return "\n\n".join(part for part in parts if part)


def heading(result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    ceilings = result["ceilings"]
    unit, scale = ("TFLOP/s", 1) if ceilings["matmul_tflops"] >= 1 else ("GFLOP/s", 1e3)
    busy = result.get("load", 0) > 1 and "cores" in result["device"]
    note = f" Other work ran beside it (load average {result['load']}): trust ratios, not rates." if busy else ""
    return (
        f"{result['device']}; {versions}. A matrix product ({ceilings['matmul']}) reached "
        f"{scale * ceilings['matmul_tflops']:.0f} {unit} in the same run.{note}"
    )


def plots(result, folder: pathlib.Path) -> list[pathlib.Path]:
    """One picture for each (mode, dtype, d, mask): the rate against sequence length, or bars for a single length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = defaultdict(lambda: defaultdict(dict))
    for row in result["rows"]:
        if row["mode"] in ("fwd", "bwd") and "packed" not in row["case"] and row["h"] == row["g"]:
            groups[row["mode"], row["mask"]][row["impl"]][row["dtype"], row["d"], row["b"], row["s"]] = row["tflops"]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (mode, mask), impls in groups.items():
        cells = list(dict.fromkeys(cell for rates in impls.values() for cell in rates))
        dims = list(dict.fromkeys((dtype, d) for dtype, d, _, _ in cells))
        scale, unit = (1, "TFLOP/s") if max(max(rates.values()) for rates in impls.values()) >= 1 else (1e3, "GFLOP/s")
        lines = [dim for dim in dims if len({s for dtype, d, _, s in cells if (dtype, d) == dim}) > 2]
        figure, axes = plt.subplots(1, len(lines) + 1 if lines else 1, figsize=(6 * (len(lines) + 1), 4), squeeze=False)
        for axis, dim in zip(axes[0], lines, strict=False):
            for name, rates in impls.items():
                points = sorted((s, scale * rate) for (dtype, d, _, s), rate in rates.items() if (dtype, d) == dim)
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(xscale="log", xlabel="sequence length", ylabel=unit, title=f"{dim[0]}, d = {dim[1]}")
            axis.grid(alpha=0.3)
        axis, rest = axes[0][-1], [cell for cell in cells if cell[:2] not in lines]
        width = 0.8 / len(impls)
        for i, (name, rates) in enumerate(impls.items()):
            heights = [scale * rates.get(cell, 0) for cell in rest]
            axis.bar([x + i * width for x in range(len(rest))], heights, width, label=name)
        labels = [f"{dtype}\nd = {d}\n{b} x {s}" for dtype, d, b, s in rest]
        axis.set_xticks([x + width * (len(impls) - 1) / 2 for x in range(len(rest))], labels, fontsize=8)
        axis.set(ylabel=unit)
        axis.legend(fontsize=8)
        figure.suptitle(f"attention, {MODES[mode]}, {mask}; {result['device']}")
        paths.append(folder / f"{mode}-{mask}.png")
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("--plots", type=pathlib.Path, help="a folder for pictures")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    print(heading(result) + "\n\n" + tables(result))
    for name, why in result["absent"].items():
        print(f"\nAbsent: {name} ({why})")
    for skip in result["skipped"]:
        print(f"\nNot run: {skip['case']}, {skip['impl']}: {skip['why']}")
    if args.plots:
        print("\n" + "\n".join(f"wrote {path}" for path in plots(result, args.plots)))


if __name__ == "__main__":
    main()
