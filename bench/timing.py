"""Times several implementations of one problem against each other, in one process.

Rounds are interleaved: each round times a burst of every implementation, so that whatever else the machine does hits
them alike. A burst enqueues n calls and blocks once, n so large that it lasts `min_burst` seconds: on a GPU the time is
then the device's and not the dispatch's.

A large GPU is limited by its power, averaged over a second: it runs too fast for a second after it was idle, then too
slow for a while (each by 5 %). So it is kept busy with all implementations for `SETTLE` seconds first, and each burst
is led in by `LEAD` seconds of the same calls, untimed. What ran before still shows in the clock (by up to 3 %), so over
the rounds each implementation follows each of the others equally often: see `orders`.
"""

import bisect
import ctypes
import math
import os
import statistics
import threading
import time
from collections.abc import Callable

Run = Callable[[int], None]  # enqueues n calls and waits for the last

SETTLE, LEAD = 0.7, 0.2  # seconds, on an NVIDIA GPU


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


def orders(n: int, rounds: int) -> list[list[int]]:
    """Of 0 … n - 1, one a round: in n rounds (2 n for odd n) each has every place once, or twice, and follows each of
    the others as often (Williams' design)."""
    first = [(i + 1) // 2 if i % 2 else -(i // 2) % n for i in range(n)]  # 0 1 n-1 2 n-2 ...
    square = [[(x + turn) % n for x in first] for turn in range(n)]
    if n % 2:
        square += [row[::-1] for row in square]
    return [square[i % len(square)] for i in range(rounds)]


def interleaved(runs: dict[str, Run], rounds: int, min_burst: float, pause: float = 0.0) -> dict[str, dict]:
    """name -> {"ms_median", "ms_min", "spread", "cpu_ms", "calls", "rounds"}, milliseconds a call.

    spread is (max - min) / median over the rounds. cpu_ms is the processor time of the whole process, median: on a
    machine with other work to do it says more about a CPU kernel than the time that passed. On an NVIDIA GPU also
    "sm_mhz", "watts": medians while it ran.
    """
    calls = {name: burst_length(run, min_burst) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    with GpuMonitor() as gpu:
        until = time.perf_counter() + (SETTLE if gpu.works else 0.0)
        while time.perf_counter() < until:
            for name, run in runs.items():
                run(math.ceil(calls[name] * LEAD / min_burst))
        for order in orders(len(names), rounds):
            for name in (names[i] for i in order):
                time.sleep(pause)  # lets the other frameworks' idle threads fall asleep
                if gpu.works:
                    runs[name](math.ceil(calls[name] * LEAD / min_burst))
                busy, start = time.process_time(), time.perf_counter()
                times[name].append(1e3 * _seconds(runs[name], calls[name]) / calls[name])
                processor[name].append(1e3 * (time.process_time() - busy) / calls[name])
                spans[name].append((start, time.perf_counter()))
    return {
        name: {
            "ms_median": statistics.median(ms),
            "ms_min": min(ms),
            "spread": (max(ms) - min(ms)) / statistics.median(ms),
            "cpu_ms": statistics.median(processor[name]),
            "calls": calls[name],
            "rounds": rounds,
            **gpu.medians(spans[name]),
        }
        for name, ms in times.items()
    }


class GpuMonitor:
    """Samples the SM clock and power of the process' first GPU, by NVIDIA's management library, while it is entered.

    Where that library is not, `works` is false and there are no samples.
    """

    def __init__(self):
        self.samples: list[tuple[float, float, float]] = []  # time, MHz, watts
        self.works = False
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self._device = ctypes.c_void_p()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # which the library does not heed
            if first.isdigit():
                find, name = self._nvml.nvmlDeviceGetHandleByIndex_v2, int(first)
            else:
                find, name = self._nvml.nvmlDeviceGetHandleByUUID, first.encode()
            self.works = self._nvml.nvmlInit_v2() == 0 and find(name, ctypes.byref(self._device)) == 0
        except (OSError, AttributeError):
            pass

    def __enter__(self):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self.works:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self.works:
            self._thread.join()

    def _sample(self):
        clock, milliwatts = ctypes.c_uint(), ctypes.c_uint()
        while not self._stop.wait(0.02):
            graphics = 0  # NVML_CLOCK_GRAPHICS: that of the multiprocessors
            failed = self._nvml.nvmlDeviceGetClockInfo(self._device, graphics, ctypes.byref(clock))
            if not failed and not self._nvml.nvmlDeviceGetPowerUsage(self._device, ctypes.byref(milliwatts)):
                self.samples.append((time.perf_counter(), float(clock.value), milliwatts.value / 1e3))

    def medians(self, spans: list[tuple[float, float]]) -> dict[str, float]:
        """Of what was sampled in these spans of time.perf_counter()."""
        times = [sample[0] for sample in self.samples]
        inside = [
            sample
            for start, end in spans
            for sample in self.samples[bisect.bisect(times, start) : bisect.bisect(times, end)]
        ]
        if not inside:
            return {}
        _, clock, power = (statistics.median(x) for x in zip(*inside, strict=True))
        return {"sm_mhz": clock, "watts": power}
