"""Turns a result of bench.run into tables, and a plot.

    python -m bench.report bench/results/cpu/attention.json
    python -m bench.report bench/results/h200/forward.json --plot bench/results/h200/forward.png

The fastest of a row stands in bold. A picture carries the id of the result that it shows, so that
`python -m docs.tables` can tell whether it is of that file.
"""

import argparse
import hashlib
import json
import math
import pathlib
import re
from collections import defaultdict

from bench.cells import SUITES

OURS = "flashjax"
# suite -> how many times as fast as the best of these peers we mean to be: in the mean over the cells, and in each
REQUIRED = {
    "h200-forward": (1.02, 0.96, {"dew-flash-attn", "fa4-jax", "jax.nn-cudnn"}),
    "h200-backward": (1.02, 0.96, {"dew-flash-attn", "fa4-jax", "jax.nn-cudnn"}),
    "upstream-h200": (0.97, 0.97, {"torch-sdpa-cuda"}),
}
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
    if bias := re.search(r"-bias(\w+)(-frozen)?", row["case"]):
        mask += f", bias {' '.join(bias[1])}" + ", not its gradient" * bool(bias[2])
    mask += ", deterministic" * ("-deterministic" in row["case"])
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
    found = {}
    for case, impls in cases.items():
        ours = next((name for name in (OURS, f"{OURS}-upstream") if name in impls), None)
        if ours and len(impls) > 1:
            found[case] = {name: row[time] / impls[ours][time] for name, row in impls.items() if name != ours}
    return found


def mode_table(result, mode) -> str:
    cases = by_case(result, mode)
    if not cases:
        return ""
    names = list(dict.fromkeys(name for impls in cases.values() for name in impls))
    names.sort(key=lambda name: name != OURS)
    faster, rows, (rate, factor) = ratios(cases), [], unit(cases)
    only = result.get("reading") if mode == "decode" else None  # what reading the same bytes takes
    for case, impls in cases.items():
        best = min(faster[case].values(), default=None) if case in faster else None
        fastest = min(impls, key=lambda name: impls[name]["ms_median"])
        cells = [figure(impls[name], factor) if name in impls else "-" for name in names]
        if len(impls) > 1:
            cells[names.index(fastest)] = f"**{cells[names.index(fastest)]}**"
        rows.append([*problem(next(iter(impls.values()))), *cells, f"{best:.2f}x" if best else "-"])
        if only and case in only and OURS in impls:
            rows[-1].append(f"{100 * impls[OURS]['tbps'] / only[case]['tbps']:.0f} %")
        elif only:
            rows[-1].append("-")
    text = f"{MODES[mode].capitalize()}, {rate}\n\n"
    header = ["dtype", "b x s", "heads", "d", "mask", *names, "to the best peer", *(["of reading"] if only else [])]
    text += table(header, rows)
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
        text += "".join(f"\n\n{verdict}" for verdict, _ in verdicts(faster, mode))
    return text


def verdicts(faster, mode) -> list[tuple[str, bool]]:
    """What is required of the cells of a suite and whether it is met, if all cells and peers were run."""
    found = []
    for suite, (mean, least, peers) in REQUIRED.items():
        cells = [cell.id for cell in SUITES[suite] if cell.mode == mode]
        if cells and faster.keys() >= set(cells) and peers <= {name for case in cells for name in faster[case]}:
            best = [min(faster[case].values()) for case in cells]
            met = geomean(best) >= mean and min(best) >= least
            text = f"Required of the {len(cells)} cells of {suite}: {mean:.2f}x in the mean and {least:.2f}x in each; "
            text += f"{'met' if met else 'missed'} with {geomean(best):.3f}x and {min(best):.3f}x."
            found.append((text, met))
    return found


def against_dense(result, mode) -> str:
    """The rate on the blocks that a mask leaves, relative to causal rows: as long, and with as many blocks a tile."""
    cells = {cell.id: cell for suite in SUITES.values() for cell in suite}
    ours = {case: impls[OURS] for case, impls in by_case(result, mode).items() if OURS in impls and case in cells}
    shape = ("dtype", "h", "g", "d", "e")
    masked, causal = [], defaultdict(list)
    for case, row in ours.items():
        cell, tiles = cells[case], row["b"] * -(-row["s"] // 128)
        blocks = row["b"] * cell.blocks()
        found = (row, blocks / tiles, blocks / row["ms_median"])
        if cell.mask in ("window", "segments"):
            masked.append(found)
        elif cell.mask == "causal" and not cell.packed and row["s"] == row["t"]:
            causal[tuple(row[key] for key in shape)].append(found)
    parts = []
    for row, blocks, rate in masked:
        dense = causal[tuple(row[key] for key in shape)]
        as_long = [x for x in dense if (x[0]["b"], x[0]["s"]) == (row["b"], row["s"])]
        alike = [x for x in dense if 0.8 < x[1] / blocks < 1.25 and x not in as_long]
        against = [f"{rate / other:.2f}x that of {x['b']} x {x['s']} ({n:.1f})" for x, n, other in as_long + alike]
        if against:
            parts.append(f"{problem(row)[-1]} ({blocks:.1f} a tile) {', '.join(against)}")
    return (
        f"The rate on the blocks of 128 x 128 that a mask leaves, beside causal rows: {'; '.join(parts)}."
        if parts
        else ""
    )


def of_matmul(result, mode) -> str:
    """The largest rate under each mask as a share of the matrix product of the same run."""
    if mode not in ("fwd", "bwd") or not result["ceilings"]["matmul_tflops"] >= 1:  # a GPU's
        return ""
    best = {}
    for row in result["rows"]:
        if row["mode"] == mode and row["impl"] == OURS and row["mask"] in ("full", "causal") and row["d"] == 128:
            best[row["mask"]] = max(best.get(row["mask"], 0.0), row["tflops"])
    shares = ", ".join(f"{x} {100 * rate / result['ceilings']['matmul_tflops']:.0f} %" for x, rate in best.items())
    return f"At most, at d = 128, of the rate of the matrix product: {shares}." if best else ""


def tables(result) -> str:
    parts = [f(result, mode) for mode in MODES for f in (mode_table, of_matmul, against_dense)]
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


def digest(result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def curves(result) -> dict[str, dict[tuple, dict[str, list[tuple[int, float]]]]]:
    """mode -> (dtype, d, mask) -> impl -> points (sequence length, rate), of cells that differ in nothing else."""
    found = {}
    for row in result["rows"]:
        plain = row["mask"] in ("full", "causal") and "packed" not in row["case"] and row["h"] == row["g"]
        if row["mode"] in ("fwd", "bwd") and plain and row["d"] == row["e"]:
            lines = found.setdefault(row["mode"], {}).setdefault((row["dtype"], row["d"], row["mask"]), {})
            lines.setdefault(row["impl"], []).append((row["s"], row["tflops"]))
    return found


def plot(result, path: pathlib.Path) -> None:
    """The rate against sequence length, a line for each implementation; bars where there is one length only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = curves(result)
    panels = list(dict.fromkeys(panel for lines in modes.values() for panel in lines))
    several = [panel for panel in panels if any(len(x) > 1 for m in modes.values() for x in m.get(panel, {}).values())]
    panels = several or panels
    names = list(dict.fromkeys(row["impl"] for row in result["rows"]))
    rates = [rate for lines in modes.values() for impls in lines.values() for x in impls.values() for _, rate in x]
    scale, unit = (1, "TFLOP/s") if max(rates) >= 1 else (1e3, "GFLOP/s")
    size = (3.2 * len(panels) + 1, 2.8 * len(modes))
    figure, axes = plt.subplots(len(modes), len(panels), figsize=size, squeeze=False, sharey="row")
    for axis_row, (mode, lines) in zip(axes, modes.items(), strict=True):
        axis_row[0].set_ylabel(f"{MODES[mode]}, {unit}")
        for axis, panel in zip(axis_row, panels, strict=True):
            dtype, d, mask = panel
            axis.set_title(f"{dtype}, d = {d}, {mask}", fontsize=9)
            axis.grid(alpha=0.3)
            for i, name in enumerate(names):
                points = sorted((s, scale * rate) for s, rate in lines.get(panel, {}).get(name, []))
                style = {"color": f"C{i}", "label": name, "zorder": 3 if name == OURS else 2}
                if not several:
                    axis.bar([i], [rate for _, rate in points] or [0], **style)
                elif points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
            if several:
                axis.set_xscale("log", base=2)
            else:
                axis.set_xticks([])
    if several:
        for axis in axes[-1]:
            axis.set_xlabel("sequence length")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, -0.04))
    figure.suptitle(result["device"], fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Comment": digest(result), "Software": None})
    plt.close(figure)


def shows(path: pathlib.Path, result) -> bool:
    """Whether a picture is there, and of this result."""
    return path.exists() and digest(result).encode() in path.read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, help="a picture to write, .png")
    parser.add_argument("--require", action="store_true", help="fail if what is required is missed")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    print(heading(result) + "\n\n" + tables(result))
    for name, why in result["absent"].items():
        print(f"\nAbsent: {name} ({why})")
    for skip in result["skipped"]:
        print(f"\nNot run: {skip['case']}, {skip['impl']}: {skip['why']}")
    if args.plot:
        plot(result, args.plot)
        print(f"\nwrote {args.plot}")
    if args.require:
        met = [met for mode in MODES for _, met in verdicts(ratios(by_case(result, mode)), mode)]
        raise SystemExit(not met or not all(met))


if __name__ == "__main__":
    main()
