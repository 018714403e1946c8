"""The benchmark: times a suite of cells and writes one JSON file.

    python -m bench.run --suite cpu --out out/bench-cpu.json
    python -m bench.run --suite h200-forward --suite h200-packed --filter d128 --out out/h200.json
    python -m bench.report out/bench-cpu.json

`--impl flashjax --impl jax.nn-xla` restricts who is timed; `--build before=SITE` adds another build of flashjax. What
is measured and how: bench/timing.py, bench/impls.py.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import time

from bench import reading, timing
from bench.builds import Build
from bench.cells import SUITES, Cell
from bench.impls import CHAIN, IMPLS, PEERS, steps_of

PACKAGES = {
    "torch-sdpa-cpu": ["torch"],
    "torch-sdpa-cuda": ["torch"],
    "dew-flash-attn": ["dew-flash-attn-cu13", "dew-flash-attn-cu12"],
    "fa4-jax": ["fa4-jax", "nvidia-cutlass-dsl"],
    "flash-attn3-jax": ["flash-attn3-jax"],
    "jax-linear-attention": ["jax-linear-attention"],
}


READING = "reading"


def csrc_tree(folder: pathlib.Path = pathlib.Path(__file__).parents[1] / "csrc") -> str:
    """The git tree id of csrc/ as it stands in the working tree, so that a result says which kernels it timed."""

    def git_id(kind: bytes, data: bytes) -> bytes:
        return hashlib.sha1(kind + b" %d\0" % len(data) + data).digest()

    def tree(folder: pathlib.Path) -> bytes:
        entries = []
        for path in folder.iterdir():
            if path.is_dir():
                if any(path.iterdir()):
                    entries.append((path.name + "/", b"40000 ", path.name, tree(path)))
            else:
                mode = b"100755 " if os.access(path, os.X_OK) else b"100644 "
                entries.append((path.name, mode, path.name, git_id(b"blob", path.read_bytes())))
        return git_id(b"tree", b"".join(mode + name.encode() + b"\0" + id for _, mode, name, id in sorted(entries)))

    return tree(folder).hex()


def device() -> str:
    import jax

    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    try:
        model = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def versions(impls) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ["flashjax", "jax", "jaxlib", *(p for impl in impls for p in PACKAGES.get(impl, []))]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "flashjax":  # on PYTHONPATH
                found[package] = importlib.import_module(package).__version__
    return found


def about(impls=()) -> dict[str, object]:
    """What every result says of its origin."""
    return {
        "device": device(),
        "versions": versions(impls),
        "csrc_tree": csrc_tree(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def command(program: str) -> str:
    """The command that is running, with its results in out/."""
    return re.sub(r"(--out|--trace)[ =](\S*/)?", r"\1 out/", " ".join(["python -m", program, *sys.argv[1:]]))


def ceilings() -> dict[str, float]:
    """What the machine gives: a large matrix product, and reading a large array once."""
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    n, dtype = (2048, jnp.float32) if cpu else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    x = jnp.ones((1 << 26 if cpu else 1 << 31,), jnp.float32 if cpu else jnp.bfloat16)
    product = jax.jit(lambda a: jnp.dot(a, a))
    total = jax.jit(lambda x: x.sum(dtype=jnp.float32))

    def runner(f, arg):
        def run(n):
            for _ in range(n):
                out = f(arg)
            jax.block_until_ready(out)

        return run

    runs = {"matmul": runner(product, a), "read": runner(total, x)}
    times = timing.interleaved(runs, rounds=5, min_burst=0.3)
    return {
        "matmul_tflops": 2 * n**3 / times["matmul"]["ms_median"] / 1e9,
        "matmul": f"{n}^3 {jnp.dtype(dtype).name}",
        "read_tbps": x.nbytes / times["read"]["ms_median"] / 1e9,
    }


def row(cell: Cell, impl: str, measured: dict) -> dict:
    ms = measured["ms_median"]
    result = {
        "case": cell.id,
        "impl": impl,
        **{key: getattr(cell, key) for key in ("mode", "dtype", "b", "s", "t", "h", "g", "d", "e", "mask")},
        **{key: getattr(cell, key) for key in ("window", "page") if getattr(cell, key) > 0},
        **measured,
    }
    if cell.mode == "chain":
        result["us_per_call"] = 1e3 * ms / CHAIN
    elif cell.mode == "decode":
        result["tbps"] = cell.cache_bytes() / ms / 1e9
        result["tflops"] = cell.flops() / ms / 1e9
    else:
        result["tflops"] = cell.flops() / ms / 1e9
    return result


def load(wanted: dict):
    loaded, absent = {}, {}
    for name, impl in wanted.items():
        try:
            impl.load()
            loaded[name] = impl
        except Exception as error:  # a peer that breaks on import is as absent as one that is not there
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"absent: {name}: {absent[name]}", file=sys.stderr)
    return loaded, absent


def main():
    import jax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list(SUITES), required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--filter", default="", help="a regular expression on the cells' ids")
    parser.add_argument("--impl", action="append", choices=list(IMPLS), help="time only these")
    parser.add_argument("--build", action="append", default=[], metavar="NAME=SITE", help="time another build, too")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of interleaved bursts")
    parser.add_argument("--min-burst", type=float, default=0.3, help="seconds")
    args = parser.parse_args()

    names = args.impl or list(dict.fromkeys(name for suite in args.suite for name in PEERS[suite.split("-")[0]]))
    builds = {name: Build(site) for name, site in (build.split("=", 1) for build in args.build)}
    impls, absent = load({name: IMPLS[name] for name in names} | builds)
    result = {
        **about(impls),
        "command": command("bench.run"),
        "load": round(os.getloadavg()[0], 1),  # other work on the machine, if much more than 0
        "absent": absent,
        "ceilings": ceilings(),
        "skipped": [],
        "reading": {},  # case -> what a program takes that reads the same bytes and does nothing else
        "rows": [],
    }
    print(f"{result['device']}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in result["ceilings"].items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pause = 0.05 if len({PACKAGES.get(name, ["jax"])[0] for name in impls} & {"jax", "torch"}) > 1 else 0.0
    start = time.perf_counter()
    for cell in (cell for suite in args.suite for cell in SUITES[suite] if re.search(args.filter, cell.id)):
        runs = {}
        for name, impl in impls.items():
            try:
                runs[name] = impl.prepare(cell)
                runs[name](1)
            except Exception as error:  # recorded: a peer's failure must not end the run, nor vanish
                runs.pop(name, None)
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                result["skipped"].append({"case": cell.id, "impl": name, "why": why})
        if cell.mode == "decode" and jax.default_backend() != "cpu":  # whose caches hold these
            runs[READING] = reading.fastest(cell.cache_bytes(), steps_of(cell))
        measured = timing.interleaved(runs, args.repeat, args.min_burst, pause=pause)
        for times in measured.values():  # a program may hold several decode steps
            times.update({key: times[key] / steps_of(cell) for key in ("ms_median", "ms_min", "cpu_ms")})
        if only := measured.pop(READING, None):
            result["reading"][cell.id] = {"tbps": cell.cache_bytes() / only["ms_median"] / 1e9, **only}
        for name, times in measured.items():
            result["rows"].append(row(cell, name, times))
        shown = ", ".join(f"{name} {times['ms_median']:.4g} ms" for name, times in measured.items())
        print(f"[{time.perf_counter() - start:5.0f} s] {cell.id}: {shown}", flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")  # after every cell: a cut run keeps what it has
    for build in builds.keys() & impls.keys():
        builds[build].close()
    for skip in result["skipped"]:
        print(f"skipped: {skip['case']}: {skip['impl']}: {skip['why']}", file=sys.stderr)


if __name__ == "__main__":
    main()
