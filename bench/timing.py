"""Times several implementations of one problem against each other, in one process.

Rounds are interleaved: each round times a burst of every implementation in turn, so that whatever else the machine does
hits them alike. A burst enqueues n calls and blocks once, n so large that it lasts `min_burst` seconds: on a GPU the
time is then the device's and not the dispatch's.
"""

import math
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

Run = Callable[[int], None]  # enqueues n calls and waits for the last


def _seconds(run: Run, n: int) -> float:
    start = time.perf_counter()
    run(n)
    return time.perf_counter() - start


def burst_length(run: Run, min_burst: float) -> int:
    """How many calls last `min_burst` seconds. Runs twice before it measures."""
    once = min(_seconds(run, 1) for _ in range(2))
    n = 1
    while once * n < min_burst / 4 and n < 1 << 14:
        n = min(1 << 14, max(2 * n, math.ceil(min_burst / 4 / max(once, 1e-7))))
        once = _seconds(run, n) / n
    return max(1, math.ceil(min_burst / once))


def interleaved(runs: dict[str, Run], rounds: int, min_burst: float, pause: float = 0.0) -> dict[str, dict]:
    """name -> {"ms_median", "ms_min", "spread", "cpu_ms", "calls", "rounds"}, milliseconds a call.

    spread is (max - min) / median over the rounds. cpu_ms is the processor time of the whole process, median: on a
    machine with other work to do it says more about a CPU kernel than the time that passed.
    """
    calls = {name: burst_length(run, min_burst) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            time.sleep(pause)  # lets the other frameworks' idle threads fall asleep
            busy = time.process_time()
            times[name].append(1e3 * _seconds(runs[name], calls[name]) / calls[name])
            processor[name].append(1e3 * (time.process_time() - busy) / calls[name])
        order.append(order.pop(0))  # nobody is always first
    return {
        name: {
            "ms_median": statistics.median(ms),
            "ms_min": min(ms),
            "spread": (max(ms) - min(ms)) / statistics.median(ms),
            "cpu_ms": statistics.median(processor[name]),
            "calls": calls[name],
            "rounds": rounds,
        }
        for name, ms in times.items()
    }


class ClockMonitor:
    """Samples the GPU's SM clock and power while it is entered; `summary` is empty without nvidia-smi."""

    def __enter__(self):
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _sample(self):
        query = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        while not self._stop.wait(0.25):
            try:
                out = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
                self.samples.append(tuple(float(x) for x in out.strip().split(",")))
            except (OSError, ValueError, subprocess.SubprocessError):
                return

    def summary(self) -> dict:
        if not self.samples:
            return {}
        clock, power = (statistics.median(x) for x in zip(*self.samples, strict=True))
        return {"sm_mhz": clock, "watts": power}
