"""What the benchmark times, and what its report concludes from figures."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench import compare, overlap, reading, report, scaling, shares, timing
from bench.builds import Build
from bench.cells import SUITES
from bench.run import row as row_of

import flashjax

PEERS = ("dew-flash-attn", "fa4-jax", "jax.nn-cudnn")


def result(ratio, names=PEERS, slowest=None):
    """Training's cells, where the best peer takes `ratio` times as long as we do, the others longer."""
    rows = []
    cells = [*SUITES["h200-forward"], *SUITES["h200-backward"]]
    for cell in cells:
        factor = slowest if slowest is not None and cell is cells[0] else ratio
        for i, (name, ms) in enumerate(
            {"flashjax": 1.0, **{name: factor + 0.1 * i for i, name in enumerate(names)}}.items()
        ):
            row = {key: getattr(cell, key) for key in ("mode", "dtype", "b", "s", "t", "h", "g", "d", "e", "mask")}
            rows.append(row | {"case": cell.id, "impl": name, "ms_median": ms, "tflops": 500 / ms + i})
    return {"device": "a device", "rows": rows}


def verdicts(result, mode):
    return report.verdicts(report.ratios(report.by_case(result, mode)), mode)


def test_what_changed():
    """By clocks, where both results have them: twice the time at half the rate is no change."""
    before, after = result(1.1), result(1.1)
    for row in before["rows"]:
        row["sm_mhz"] = 1600.0
    for row in after["rows"]:
        row.update(sm_mhz=800.0, ms_median=row["ms_median"] * (2.1 if row["impl"] == "flashjax" else 2))
    after["rows"] = [row for row in after["rows"] if row["impl"] != "fa4-jax" and row["mode"] == "fwd"]
    for impls in compare.changes(before, after, "fwd").values():
        assert impls == pytest.approx({"flashjax": 1.05, "dew-flash-attn": 1.0, "jax.nn-cudnn": 1.0})
    assert compare.changes(before, after, "bwd") == {}
    assert compare.comparison(before, after, "bwd") is None
    assert "1.60 -> 1.68 | 1.050 | 1.000 | 1.000 |" in compare.comparison(before, after, "fwd")


@pytest.mark.parametrize(("ratio", "slowest", "met"), [(1.03, None, True), (1.01, None, False), (1.1, 0.95, False)])
def test_what_is_required(ratio, slowest, met):
    ((text, found),) = verdicts(result(ratio, slowest=slowest), "fwd")
    assert found == met
    assert ("met with" in text) == met
    assert f"{slowest or ratio:.3f}x." in text


def test_nothing_is_judged_without_every_peer_and_cell():
    assert not verdicts(result(2.0, names=PEERS[:2]), "fwd")
    some = result(2.0)
    some["rows"] = some["rows"][len(PEERS) + 1 :]
    assert not verdicts(some, "fwd")
    assert verdicts(some, "bwd")


def test_a_plot_knows_its_result(tmp_path):
    pytest.importorskip("matplotlib")
    one, other = result(1.0), result(2.0)
    report.plot(one, tmp_path / "plot.png")
    assert report.shows(tmp_path / "plot.png", one)
    assert not report.shows(tmp_path / "plot.png", other)
    assert not report.shows(tmp_path / "none.png", one)


def test_what_a_profile_hides():
    """Two kernels with a gap, and a transfer that starts under the first and ends in the gap."""
    spans = [(0.0, 4.0, "forward_kernel"), (3.0, 6.0, "ncclDevKernel_SendRecv"), (7.0, 9.0, "forward_kernel")]
    found = overlap.summary({"/device:GPU:0": spans, "/device:GPU:1": [*spans, (5.0, 5.5, "fusion")]}, hops=2)
    assert found["transfers_ms"] == pytest.approx(3000)
    assert found["hidden"] == pytest.approx((1.0 + 1.5) / 6)
    assert found["busy_ms"] == pytest.approx(6250)
    assert found["idle_ms_per_hop"] == pytest.approx(2750 / 2)
    assert found["largest_gap_ms"] == pytest.approx((3000 + 1500) / 2)
    with pytest.raises(ValueError, match="no events"):
        overlap.summary({"/device:GPU:0": []}, hops=1)


def test_another_build_takes_its_turn(tmp_path):
    """It runs in a process of its own; a folder without the package is not taken for one that has it."""
    cell = SUITES["smoke"][0]
    with contextlib.closing(Build(str(pathlib.Path(flashjax.__file__).parents[1]))) as build:
        build.load()
        runs = {"one": build.prepare(cell), "two": build.prepare(cell)}
        times = timing.interleaved(runs, rounds=2, min_burst=0.01)
        assert times["one"]["ms_median"] > 0
        assert times["two"]["rounds"] == 2
        with pytest.raises(NotImplementedError, match="float17"):
            build.prepare(dataclasses.replace(cell, dtype="float17"))
    with pytest.raises(ImportError, match="no flashjax in"):
        Build(str(tmp_path)).load()


def test_what_reads_all_of_it():
    """Each step reads every word, with what the last row of the step before gave."""
    (width, run), *others = reading.runs(1 << 20, 3).items()
    assert len(others) == len(reading.WIDTHS) - 1
    run(1)
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 12, np.uint32)
    last = np.zeros(1, np.uint32)
    for _ in range(3):
        last = (words.reshape(-1, width) ^ last[-1]).max(axis=1)
    np.testing.assert_array_equal(jax.jit(reading.program(width, 3))(words), last)
    assert reading.fastest_width(1 << 20, 3) in reading.WIDTHS


def test_the_share_of_reading_is_shown():
    cells = [cell for cell in SUITES["h200-decode"] if not cell.page][:2]
    rows = [
        row_of(cell, name, {"ms_median": ms})
        for cell in cells
        for name, ms in (("flashjax", 1.0), ("jax.nn-cudnn", 2.0))
    ]
    found = {"device": "a device", "rows": rows, "reading": {cells[0].id: {"tbps": cells[0].cache_bytes() / 0.9e9}}}
    first, second = report.mode_table(found, "decode").splitlines()[4:6]
    assert first.endswith("| 2.00x | 90 % |")
    assert second.endswith("| 2.00x | - |")
    assert "of reading" not in report.mode_table({"device": "a device", "rows": rows}, "decode")


@pytest.mark.parametrize(("ms", "burst", "calls"), [(2, 0.02, 10), (2, 0.1, 50), (0.1, 0.02, 200), (50, 0.02, 1)])
def test_a_burst_is_as_long_as_asked(monkeypatch, ms, burst, calls):
    # A clock that only the calls move: on a busy machine a sleep lasts as long as it likes.
    monkeypatch.setattr(timing, "_seconds", lambda run, n: run(n))
    assert timing.burst_length(lambda n: ms * 1e-3 * n, burst) == pytest.approx(calls, abs=1)


@pytest.mark.parametrize("n", range(1, 8))
def test_orders_are_fair(n):
    rounds = timing.orders(n, 2 * n)
    assert all(sorted(order) == list(range(n)) for order in rounds)
    places = collections.Counter((place, name) for order in rounds for place, name in enumerate(order))
    follows = collections.Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert set(places.values()) == {2}
    assert len(places) == n * n
    assert set(follows.values()) <= {2}
    assert len(follows) == n * (n - 1)


def test_peer_with_wrong_gradients(monkeypatch):
    """Its forward is timed, its gradients are not, and what is missing altogether does not end the run."""

    def right(mask, mesh):
        yield "ring", functools.partial(flashjax.flash_mha, is_causal=mask == "causal")

    def broken(mask, mesh):
        ((case, of),) = right(mask, mesh)
        attend = jax.custom_vjp(lambda *arrays: of(*arrays))
        attend.defvjp(lambda *arrays: (of(*arrays), arrays), lambda arrays, dout: tuple(x * jnp.nan for x in arrays))
        yield case, attend

    def missing(mask, mesh):
        raise ImportError("none here")

    def refuses(mask, mesh):
        def attend(q, k, v):
            raise ValueError("no rings here")

        yield "ring", attend

    kinds = {"broken": broken, "right": right, "missing": missing, "refuses": refuses}
    monkeypatch.setattr(scaling, "PEERS", kinds)
    args = argparse.Namespace(tokens=32, heads=2, kv_heads=2, dim=16)
    wrong = scaling.check_peers(list(kinds), jax.devices()[:2], args)
    assert {key[0] for key in wrong} == {"broken", "refuses"}
    assert {key[2:] for key in wrong if key[0] == "broken"} == {("full", "fwd+bwd"), ("causal", "fwd+bwd")}
    assert "nan" in wrong["broken", "ring", "full", "fwd+bwd"]
    assert len([key for key in wrong if key[0] == "refuses"]) == 4
    assert scaling.peers(["missing"], "full", None) == ({}, {"missing": "ImportError: none here"})


def test_what_scaling_did_not_time():
    why = [
        {"impl": "a", "case": "ring", "mask": "full", "mode": "fwd+bwd", "why": "wrong"},
        {"impl": "flashjax", "case": "ring", "mask": "full", "mode": "fwd", "why": "no profile: none"},
    ]
    assert shares.skipped({"skipped": why}) == "Not timed: a, ring (full, forward and backward): wrong."
    assert shares.skipped({}) == ""


def test_shares_of_several_records_have_a_mean():
    def record(devices, share):
        rows = [
            {"impl": impl, "case": case, "mask": "full", "mode": "fwd", "of_single": share}
            for impl, case in (("flashjax", "single"), ("flashjax", "ring-contiguous"), ("other", "ring-contiguous"))
        ]
        return {"devices": devices, "rows": rows}

    lines = shares.means([record(2, 0.9), record(4, 0.8), record(2, 0.94)]).splitlines()[2:]
    assert lines == [
        "| 2 | full | ring-contiguous | forward | 92.0 % | 90.0, 94.0 |",
        "| 4 | full | ring-contiguous | forward | 80.0 % | 80.0 |",
    ]
