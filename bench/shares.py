"""Turns results of bench.scaling into tables, and a plot.

    python -m bench.shares bench/results/*/scaling.json --plot bench/results/h200-x4/scaling.png
    python -m bench.shares bench/results/h200-x4/scaling.json bench/results/h200-x4/tried/rings-*.json --mean

The last sets several records of as many devices beside each other. The picture shows all of its files, and carries
their ids (see bench.report), so that `python -m docs.tables` can tell whether it is of the file beside it.
"""

import argparse
import json
import pathlib
import statistics

from bench import report

MODES = {"fwd": "forward", "fwd+bwd": "forward and backward"}
BASELINES = ("single", "apart")


def by_devices(paths) -> list[dict]:
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda result: result["devices"])


def label(row) -> str:
    return row["case"] if row["impl"] == report.OURS else f"{row['impl']}, {row['case']}"


def table(result) -> str:
    """TFLOP/s a device, and their share of what one device alone reaches."""
    rows = {(row["mask"], row["case"], row["impl"], row["mode"]): row for row in result["rows"]}
    impls = list(dict.fromkeys(row["impl"] for row in result["rows"]))
    lines = []
    for mask, case, impl in dict.fromkeys(key[:3] for key in rows):
        cells = [rows.get((mask, case, impl, mode)) for mode in MODES]
        name = case if len(impls) == 1 else f"{impl}, {case}"
        lines.append([mask, name, *(f"{x['tflops']:.0f}, {100 * x['of_single']:.0f} %" if x else "" for x in cells)])
    return report.table(["mask", "case", *MODES.values()], lines)


def means(results) -> str:
    """Of records of as many devices, our rings' shares in each, and their mean."""
    lines = []
    for devices in dict.fromkeys(result["devices"] for result in results):
        found: dict[tuple, list[float]] = {}
        for result in results:
            for row in result["rows"] if result["devices"] == devices else ():
                if row["impl"] == report.OURS and row["case"] not in BASELINES:
                    found.setdefault((row["mask"], row["case"], row["mode"]), []).append(100 * row["of_single"])
        for (mask, case, mode), shares in found.items():
            each = ", ".join(f"{x:.1f}" for x in shares)
            lines.append([str(devices), mask, case, MODES[mode], f"{statistics.mean(shares):.1f} %", each])
    return report.table(["devices", "mask", "case", "mode", "mean", "each"], lines)


def skipped(result) -> str:
    """What was not timed, and why; what could only not be profiled was timed."""
    found = [
        f"{x['impl']}, {x['case']} ({x['mask']}, {MODES[x['mode']]}): {x['why']}"
        for x in result.get("skipped", ())
        if not x["why"].startswith("no profile")
    ]
    return f"Not timed: {'; '.join(found)}." if found else ""


def plot(results, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(mode, mask) for mode in MODES for mask in ("full", "causal")]
    names = [label(row) for x in results for row in x["rows"] if row["case"] not in BASELINES]
    names = list(dict.fromkeys(names))
    ours = {row["case"] for x in results for row in x["rows"] if row["impl"] == report.OURS}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels) + 1, 2.8), squeeze=False, sharey=True)
    for axis, (mode, mask) in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            shares = {
                result["devices"]: 100 * row["of_single"]
                for result in results
                for row in result["rows"]
                if (row["mode"], row["mask"], label(row)) == (mode, mask, name)
            }
            if shares:
                # A peer on one device does not reach our rate there: no line of its begins at 100 %.
                start, marker = ({1: 100}, "o") if name in ours else ({}, "x")
                points = start | shares
                axis.plot([*points], [*points.values()], color=f"C{i}", marker=marker, markersize=4, label=name)
        axis.set(title=f"{MODES[mode]}, {mask}", xlabel="devices", xticks=[1, *(x["devices"] for x in results)])
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower left")
    axes[0][0].set_ylabel("% of one device's rate")
    figure.suptitle(results[0]["device"], fontsize=10)
    figure.tight_layout()
    ids = " ".join(report.digest(result) for result in results)
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Comment": ids, "Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    parser.add_argument("--mean", action="store_true", help="instead: our rings, over all records of as many devices")
    parser.add_argument("--plot", type=pathlib.Path, help="a picture to write, .png")
    args = parser.parse_args()
    results = by_devices(args.results)
    if args.mean:
        print(means(results))
    for result in () if args.mean else results:
        print(f"{result['devices']} x {result['device']}\n\n{table(result)}\n\n{skipped(result)}".rstrip() + "\n")
    if args.plot:
        plot(results, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
