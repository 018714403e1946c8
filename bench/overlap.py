"""How much of the transfers between devices a program hides behind its kernels, from a profile of it.

`recorded` runs a program under JAX's profiler; `summary` takes what ran on each device as (start, end, name), in
seconds. A transfer is hidden as far as any other kernel of its device runs meanwhile. Idle is the time in which a
device, between its first kernel and its last, runs nothing but transfers or nothing at all.
"""

import itertools
import pathlib
import re
import statistics
import tempfile
import warnings

TRANSFER = re.compile(r"nccl|sendrecv|send_recv|collective|all-?to-?all|all-?gather|memcpyp2p", re.IGNORECASE)

Span = tuple[float, float, str]


def union(spans: list[Span]) -> list[tuple[float, float]]:
    """The times that spans cover, without overlaps, in order."""
    merged: list[tuple[float, float]] = []
    for start, end, _ in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def covered(start: float, end: float, times: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in times)


def of_device(spans: list[Span]) -> dict[str, float]:
    kernels = union([span for span in spans if not TRANSFER.search(span[2])])
    transfers = union([span for span in spans if TRANSFER.search(span[2])])
    busy = sum(b - a for a, b in kernels)
    sent = sum(b - a for a, b in transfers)
    gaps = [b[0] - a[1] for a, b in itertools.pairwise(kernels)]
    return {
        "transfers": sent,
        "hidden": sum(covered(a, b, kernels) for a, b in transfers),
        "busy": busy,
        "idle": kernels[-1][1] - kernels[0][0] - busy if kernels else 0.0,
        "largest_gap": max(gaps, default=0.0),
    }


def summary(devices: dict[str, list[Span]], hops: int) -> dict[str, float]:
    """Means over the devices, in milliseconds; `hidden` as a share of the transfers' time, `idle` a hop as well."""
    found = [of_device(spans) for spans in devices.values() if spans]
    if not found:
        raise ValueError("the profile has no events of a GPU")
    mean = {key: 1e3 * statistics.mean(device[key] for device in found) for key in found[0]}
    share = mean.pop("hidden") / mean["transfers"] if mean["transfers"] else 1.0
    result = {f"{key}_ms": value for key, value in mean.items()}
    return {**result, "hidden": share, "idle_ms_per_hop": mean["idle"] / max(hops, 1)}


def events(folder: pathlib.Path) -> dict[str, list[Span]]:
    """device -> what ran on it, from the profile that JAX wrote."""
    import jax

    found: dict[str, list[Span]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for path in folder.rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                found[plane.name] = [
                    (event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9, event.name)
                    for line in plane.lines
                    if line.name.startswith("Stream")
                    for event in line.events
                ]
    return found


def recorded(call, keep: pathlib.Path | None = None) -> dict[str, list[Span]]:
    """What one call of a compiled program runs on each device. `keep`: a folder for the profile."""
    import jax

    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        where = keep or pathlib.Path(folder)
        with jax.profiler.trace(str(where)):
            jax.block_until_ready(call())
        return events(where)
