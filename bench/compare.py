"""How calls changed from one result of bench.run to another, beside calls that did not.

    python -m bench.compare BEFORE.json AFTER.json

Machines and their clocks differ, so times of two runs do not compare. Clocks do, better: time by the clock of the
multiprocessors, where a result has that. The peers of both runs say what the rest of the difference is worth: a call
of ours that takes more clocks than before, where those of the peers do not, has become slower.
"""

import argparse
import json
import pathlib

from bench.report import MODES, OURS, by_case, geomean, problem, table


def clocks(row) -> float:
    """Millions; of a result without a clock, milliseconds."""
    return row["ms_median"] * row.get("sm_mhz", 1e3) / 1e3


def changes(before, after, mode) -> dict[str, dict[str, float]]:
    """case -> impl -> clocks after over clocks before, of what both results have."""
    old, new = by_case(before, mode), by_case(after, mode)
    found = {
        case: {name: clocks(row) / clocks(old[case][name]) for name, row in impls.items() if name in old[case]}
        for case, impls in new.items()
        if case in old
    }
    return {case: impls for case, impls in found.items() if impls}


def comparison(before, after, mode) -> str | None:
    """A table of a mode; None if the results have nothing of it in common."""
    found = changes(before, after, mode)
    if not found:
        return None
    names = list(dict.fromkeys(name for impls in found.values() for name in impls))
    rows = []
    for case, impls in found.items():
        old, new = (by_case(result, mode)[case] for result in (before, after))
        ours = f"{clocks(old[OURS]):.2f} -> {clocks(new[OURS]):.2f}" if OURS in impls else "-"
        rows.append(
            [*problem(next(iter(new.values()))), ours, *(f"{impls[x]:.3f}" if x in impls else "-" for x in names)]
        )
    means = [f"{geomean(impls[x] for impls in found.values() if x in impls):.3f}" for x in names]
    rows.append(["mean", *[""] * 5, *means])
    return table(["dtype", "b x s", "heads", "d", "mask", f"{OURS}, million clocks", *names], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    options = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    print(f"From csrc {before['csrc_tree'][:12]} to {after['csrc_tree'][:12]}: clocks after / before.")
    for mode in MODES:
        if text := comparison(before, after, mode):
            print(f"\n{MODES[mode].capitalize()}\n\n{text}")


if __name__ == "__main__":
    main()
