"""Small calls under NVIDIA's compute-sanitizer, one run for each of its tools; needs a GPU that its tools support.

    python tests/sanitize.py --out out/sanitize.json [--tool memcheck --tool racecheck --tool synccheck]

Only kernels of flashjax are checked. Every array is an allocation of its own, so that memcheck knows its end. Among the
calls are lengths, page ids and offsets that point anywhere. A kernel with a planted fault shows that the tool reports
one.

racecheck leaves out the bulk copies, and its reports do not count where the warps of a kernel have roles (ROLES): where
all threads read, meet at a barrier, and one of them then tells the producer by an mbarrier that it may write again, it
does not see that the reads came first. Runs with jitter try that order.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
    )

import jax
import numpy as np

import oracle
from cases import BY_ID, Case, Inputs, cotangents
from harness import differentiated, function, to_device

FOUND = 9  # exit status where something was reported
TOOLS = {"memcheck": [], "racecheck": ["--check-bulk-copy", "no", "--print-limit", "100000"], "synccheck": []}
ROLES = re.compile(r"flashjax::sm90::(forward|backward|decode|latent)_kernel<")
CASES = (
    "causal-bfloat16",
    "causal-float16",
    "causal-float32",
    "heads-8-2-bfloat16",
    "dim-192-128",
    "narrow-values-causal",
    "narrow-values-packed",
    "everything-bfloat16",
    "packed-causal-bfloat16",
    "packed-used-both-bfloat16",
    "packed-everything",
    "cached-decode-bfloat16",
    "cached-paged-bfloat16",
    "cached-paged-float16",
    "cached-append-bfloat16",
    "cached-splits",
    "cached-everything",
)
# Several tiles each way, for every head dim of the Hopper kernels, without and with scores to transform.
TILES = {"b": 1, "h": 2, "g": 1, "dtype": "bfloat16", "causal": True}
DIMS = (64, 128, 256)
LARGER = tuple(
    Case(f"tiles-{d}-{name}", "", s=300, t=280, d=d, **TILES, **options)
    for d in DIMS
    for name, options in (("plain", {}), ("scores", {"softcap": 5.0, "sinks": "normal"}))
)
ROWS = {"layout": "packed", "s": 700, "t": 700, "cu_q": (0, 300, 300, 310, 650)}
PACKED = tuple(Case(f"packed-tiles-{d}", "", d=d, segments="same" if d == 64 else None, **TILES, **ROWS) for d in DIMS)
HUGE = np.iinfo(np.int32).max
# case, argument -> what stands in all its elements but the first
BAD = (
    ("packed-causal-bfloat16", {"cu_seqlens_q": HUGE}),
    ("packed-causal-bfloat16", {"cu_seqlens_q": -7}),
    ("packed-causal-float32", {"cu_seqlens_q": 10**6}),
    ("packed-used-both-bfloat16", {"seqused_q": HUGE, "seqused_k": -1}),
    ("packed-used-both-bfloat16", {"seqused_q": -HUGE, "seqused_k": HUGE}),
    ("packed-tiles-64", {"cu_seqlens_q": HUGE}),
    ("packed-tiles-128", {"cu_seqlens_q": -HUGE}),
    ("packed-tiles-128", {"cu_seqlens_q": 400}),
    ("packed-tiles-256", {"cu_seqlens_q": -1}),
    ("cached-paged-bfloat16", {"page_table": HUGE}),
    ("cached-paged-bfloat16", {"page_table": -1, "cache_seqlens": HUGE}),
    ("cached-paged-float16", {"page_table": 10**6, "cache_seqlens": -5}),
    ("cached-decode-bfloat16", {"cache_seqlens": HUGE}),
    ("cached-batch-idx", {"cache_batch_idx": HUGE}),
    ("cached-batch-idx", {"cache_batch_idx": -1}),
    ("cached-leftpad", {"cache_leftpad": HUGE}),
    ("cached-leftpad", {"cache_leftpad": -HUGE}),
)

PLANTED = r"""
#include <cstdio>
namespace flashjax {
__global__ void memcheck(int* p) { p[threadIdx.x] = 1; }
__global__ void racecheck(int* p) {
  __shared__ int x[64];
  x[threadIdx.x] = threadIdx.x;
  p[0] = x[63 - threadIdx.x];
}
__global__ void synccheck(int* p) {
  if (threadIdx.x < 16) __syncthreads();
  p[0] = 1;
}
}  // namespace flashjax
int main() {
  int* p;
  cudaMalloc(&p, 4);
  flashjax::FAULT<<<1, 64>>>(p);
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
"""


def spoiled(inputs: Inputs, values: dict[str, int]) -> Inputs:
    arrays = {name: np.array(inputs.arrays[name]) for name in values}
    for name, value in values.items():
        flat = arrays[name].reshape(-1)
        flat[1 if len(flat) > 1 else 0 :] = value
    return inputs.without(**arrays)


def calls():
    """(name, case, inputs)"""
    cases = {case.id: case for case in (*(BY_ID[name] for name in CASES), *LARGER, *PACKED)}
    for case in cases.values():
        yield case.id, case, case.build()
    for name, values in BAD:
        case = cases.get(name) or BY_ID[name]
        yield f"{name} with {values}", case, spoiled(case.build(), values)


def run(which, implementation):
    for i, (name, case, inputs) in enumerate(calls()):
        if i not in which:
            continue
        arrays = to_device(inputs.arrays)
        try:
            if case.layout == "cached":
                jax.block_until_ready(function(case, inputs, implementation)(arrays))
            else:
                dout_dlse = cotangents(case, case.build(), oracle.run(case, case.build()).lse)
                for deterministic in (False, True):
                    call = differentiated(case, inputs, implementation, deterministic=deterministic)
                    jax.block_until_ready(call(arrays, dout_dlse))
        except NotImplementedError:
            if implementation == "cuda":  # which takes them all
                raise
            name += ": declined"
        print(f"ran {i}, {name}", flush=True)


def sanitized(tool, command):
    options = ["--tool", tool, "--kernel-name", "kns=flashjax", "--error-exitcode", str(FOUND)]
    return ["compute-sanitizer", "--target-processes", "application-only", *options, *TOOLS[tool], *command]


def planted(tool, folder) -> bool:
    """Whether the tool reports a fault that is there."""
    source = pathlib.Path(folder) / f"{tool}.cu"
    source.write_text(PLANTED.replace("FAULT", tool))
    subprocess.run(["nvcc", "-arch=native", "-o", source.with_suffix(""), source], check=True)
    return subprocess.run(sanitized(tool, [str(source.with_suffix(""))]), capture_output=True).returncode == FOUND


def counted(tool, text) -> list[str]:
    """The lines of what a tool reported: of racecheck, about other kernels than those with roles."""
    if tool == "racecheck":
        races = re.split(r"^(?========== *(?:Error|Warning): )", text, flags=re.MULTILINE)[1:]
        text = "".join(race for race in races if not ROLES.search(race))
    return [line for line in text.splitlines() if line.startswith("=========")][:60]


def without_folders(line: str) -> str:
    """Results are kept: they name files, and not where a machine has them."""
    return re.sub(r"/(?:[^\s/\"]+/)+", "", line)


def checked(tool, which: list[int], end: float, implementation: str) -> tuple[list[int], list[str]]:
    """The calls that ran to their end, and what the tool reported. After a crash, of the tool itself too, it goes on
    with the calls after the one that was running."""
    ran, reports = [], []
    program = [sys.executable, __file__, "--implementation", implementation]
    while which and time.monotonic() < end:
        command = sanitized(tool, [*program, "--run", *map(str, which)])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        try:
            text = process.communicate(timeout=max(1.0, end - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it runs, too, which has the other end of the pipe
            text = process.communicate()[0]
        done = [int(i) for i in re.findall(r"^ran (\d+),", text, re.MULTILINE)]
        ran += done
        print(f"{tool}: exit {process.returncode}, ran {done} of {which}", flush=True)
        if process.returncode == 0:
            return ran, reports
        if process.returncode == FOUND:
            reports += counted(tool, text)
        rest = [i for i in which if i not in done]
        if rest:
            reports.append(f"call {rest[0]} did not end: exit {process.returncode}")
            reports += [line for line in text.splitlines() if not line.startswith("ran")][-8:]
        which = rest[1:]
    return ran, reports


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=4, help="processes for each tool; the tools run side by side")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th call from the i-th on")
    parser.add_argument("--implementation", default="cuda", help="or upstream; what it declines counts as run")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--run", type=int, nargs="+", metavar="CALL", help="these calls alone, under no tool")
    args = parser.parse_args()
    if args.run:
        run(args.run, args.implementation)
        return
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on PATH")
    tools, start = args.tool or list(TOOLS), time.monotonic()
    names = [name for name, *_ in calls()]
    part, parts = map(int, args.part.split("/"))
    asked = range(part, len(names), parts)
    rows = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(64) as pool:
        slices = [list(asked)[i :: args.jobs] for i in range(args.jobs)]
        found = {tool: pool.submit(planted, tool, folder) for tool in tools}
        how = (start + args.seconds, args.implementation)
        running = {tool: [pool.submit(checked, tool, part, *how) for part in slices] for tool in tools}
        for tool, results in running.items():
            ran = {i for result in results for i in result.result()[0]}
            reports = [line for result in results for line in result.result()[1]]
            row = {
                "tool": tool,
                "finds_a_planted_fault": found[tool].result(),
                "calls": len(ran),
                "not_run": [names[i] for i in asked if i not in ran],
                "seconds": round(time.monotonic() - start),
                "reports": [without_folders(line) for line in reports],
            }
            rows.append(row)
            print(json.dumps(row, indent=1), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        result = {"date": date, "device": jax.devices()[0].device_kind, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    good = [row["finds_a_planted_fault"] and not row["not_run"] and not row["reports"] for row in rows]
    print(", ".join(f"{row['tool']} {'clean' if ok else 'NOT clean'}" for row, ok in zip(rows, good, strict=True)))
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
