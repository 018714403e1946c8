"""Random calls for a number of seconds, each compared with the oracle.

    python tests/soak.py --seconds 60 --jobs 8 --out out/soak.json
    python tests/soak.py --only 1234      # one seed again

A seed makes a case: shape, dtype, options and values. On a GPU free memory is filled with NaN before every call, so a
result or a piece of workspace that a kernel forgets to write shows. Calls are repeated: the forward must give the same
bits each time, and so must the backward where it is told to be deterministic.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

if __name__ == "__main__":  # before JAX starts: a pool of our own, which poison() fills
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.02")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one oracle a process
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np

import emulated
import oracle
from cases import Case, cotangents
from harness import differentiated, function, to_device

EDGES = [1, 2, 17, 63, 64, 65, 80, 127, 128, 129, 160, 176, 177, 192, 255, 256, 257, 320, 384, 513, 700, 1025]
LARGEST = 2_000_000  # scores of a case in all: what the oracle does in a second


def random_case(seed: int) -> Case:
    """Half of the cases are what the fast kernels serve; the other half is anything."""
    random = np.random.default_rng(seed)

    def pick(*values):
        return values[random.integers(len(values))]

    def often(probability):
        return random.random() < probability

    def length(most):
        fits = [x for x in EDGES if x <= most]
        return int(pick(*fits)) if often(0.7) else int(random.integers(1, most + 1))

    fast = often(0.5)
    layout = pick("dense", "dense", "packed", "cached")
    options = {"layout": layout, "dtype": pick("bfloat16", "float16") if fast or often(0.5) else "float32"}
    options["g"] = int(pick(1, 1, 2, 3))
    options["h"] = options["g"] * int(pick(1, 1, 2, 4))
    options["d"] = int(pick(64, 128, 256, 8 * random.integers(1, 33)) if fast else random.integers(1, 300))
    options["e"] = None if often(0.8) else 128 if options["d"] == 192 else int(8 * random.integers(1, 17))
    if often(0.5):
        options["causal"] = True
    elif often(0.4):
        options["window"] = tuple(int(random.integers(-1, 300)) if often(0.8) else -1 for _ in range(2))
    if often(0.2):
        options["alignment"] = "top_left"
    if often(0.15):
        options |= {"softcap": float(pick(2.0, 20.0)), "q_gain": 3.0}
    elif often(0.1):
        options["q_gain"] = float(pick(4.0, 50.0))
    if often(0.2):
        options["sinks"] = str(pick("normal", "low", "high"))
    if often(0.1):
        options["alibi"] = "h"
    most = int(min(1100, (LARGEST / options["h"]) ** 0.5))
    if layout == "packed":
        options |= _random_packed(random, length, often, most)
    elif layout == "cached":
        options |= _random_cached(random, length, often, pick, most)
    else:
        options |= {"b": int(pick(1, 1, 2, 3)), "s": length(most), "t": length(most)}
        options["t"] = options["s"] if often(0.6) else options["t"]
        if options["b"] * options["h"] * options["s"] * options["t"] > LARGEST:
            options["b"] = 1
        if often(0.15):
            options["segments"] = str(pick("same", "pair")) if options["s"] == options["t"] else "pair"
        elif often(0.1):
            options["bias"] = str(pick("b h s t", "1 h s t", "s t", "b 1 1 t"))
    if options["dtype"] != "float32" and options["d"] * (options["e"] or options["d"]) > 256 * 256:
        options["d"] = 256
    return Case(f"soak-{seed}", "soak", **options)


def _random_packed(random, length, often, most):
    n = int(random.integers(1, 7))

    def sequences():
        lengths = [0 if often(0.1) else length(most // 2) for _ in range(n)]
        start = int(random.integers(0, 40)) if often(0.2) else 0
        return tuple(int(x) for x in np.cumsum([start, *lengths]))

    cu_q = sequences()
    cu_k = None if often(0.6) else sequences()
    found = {"b": 1, "cu_q": cu_q, "cu_k": cu_k}
    found["s"] = cu_q[-1] + (int(random.integers(0, 99)) if often(0.3) else 0)
    found["t"] = found["s"] if cu_k is None else cu_k[-1] + (int(random.integers(0, 99)) if often(0.3) else 0)
    for name, cu in (("used_q", cu_q), ("used_k", cu_k or cu_q)):
        if often(0.25):
            found[name] = tuple(int(random.integers(0, x + 1)) for x in np.diff(cu))
    return found


def _random_cached(random, length, often, pick, most):
    b, page = int(pick(1, 2, 5)), int(pick(0, 0, 1, 16, 24, 64, 128, 256))
    s = int(pick(1, 1, 2, 4, 9, 64, 130))
    t = max(length(most), s)
    t = -(-t // page) * page if page else t
    new = s if often(0.3) else 0
    lengths = tuple(int(random.integers(0, t - new + 1)) for _ in range(b))
    found = {"b": b, "s": s, "t": t, "page": page, "lengths": lengths, "new": new, "alibi": None}
    if often(0.2):
        found["leftpad"] = tuple(int(random.integers(0, x + 1)) for x in lengths)
    if not page and often(0.3):
        found["batch_idx"] = tuple(int(x) for x in random.permutation(b + 2)[:b])
    if often(0.3):
        found["num_splits"] = int(pick(1, 2, 3, 7, 32))
    return found


def poison():
    """NaN in free memory of the GPU, in whatever type it is read: in what the next allocations get."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        size = min(int(0.9 * free), 2 << 30)  # JAX keeps what it once took, and other processes want some too
        jnp.full((size // 4,), 0xFFFFFFFF, jnp.uint32).block_until_ready().delete()


def judge(name, got, case: Case, inputs, expected, naive):
    """As in the tests. But the plain computation may have been lucky where the errors of a gradient are few, or have
    few sources: one number of a sink, keys that see one query. Then its error with other cotangents, which says as much
    about what can be asked, counts too, that of the unluckiest of eight."""
    slot = name.removeprefix("gradient of ")
    is_gradient = slot in expected.grads

    def of(result):
        return np.asarray(result.grads[slot] if is_gradient else getattr(result, name), np.float64)

    want = of(expected)
    given = inputs.arrays["q"].dtype if slot == "sinks" else got.dtype
    try:
        return oracle.compare(name, got, want, of(naive), expected.logit, given)
    except AssertionError:
        if not is_gradient:
            raise
        for i in range(1, 9):
            backward = cotangents(dataclasses.replace(case, id=f"{case.id} {i}"), inputs, expected.lse)
            exact, plain = (of(oracle.run(case, inputs, backward, naive=x)) for x in (False, True))
            try:
                return oracle.compare(name, got, want, want + (plain - exact), expected.logit, given)
            except AssertionError:
                pass
        raise


def check(case: Case, implementation: str | None, repeat: int = 3) -> bool:
    """Whether the implementation takes the case; AssertionError if it is wrong."""
    inputs = case.build()
    trained, deterministic = case.layout != "cached", case.seed % 2 == 0
    backward = cotangents(case, inputs, oracle.run(case, inputs).lse) if trained else None
    expected, naive = (oracle.run(case, inputs, backward, naive=x) for x in (False, True))
    if trained:
        call = differentiated(case, inputs, implementation, deterministic=deterministic)
    else:
        call = function(case, inputs, implementation)
    arrays = to_device(inputs.arrays)
    first = None
    for _ in range(repeat):
        poison()
        try:
            results = call(arrays, backward) if trained else call(arrays)
        except NotImplementedError:
            return False
        (out, lse), grads = results if trained else (results[:2], {})
        results = {"out": out, "lse": lse, **{f"gradient of {name}": x for name, x in grads.items()}}
        results = {name: np.asarray(x) for name, x in results.items()}
        first = first or results
        for name, value in results.items():
            if first is not results and (deterministic or name in ("out", "lse")):
                oracle.same_bits(value, first[name], f"{name}, repeated")
                continue
            judge(name, value, case, inputs, expected, naive)
    return True


# ------------------------------------------------------------------------------------------------------ the program


def describe(case: Case) -> str:
    plain = Case("", "")
    return ", ".join(
        f"{field.name}={getattr(case, field.name)}"
        for field in dataclasses.fields(case)
        if field.name not in ("id", "reason") and getattr(case, field.name) != getattr(plain, field.name)
    )


def work(args):
    """Seeds start, start + stride, ... until time is up: a line of JSON before each and after each."""
    end = time.monotonic() + args.seconds
    implementation = "cuda" if jax.default_backend() == "gpu" or emulated.installed else "cpu"
    seed = args.seed if args.only is None else args.only
    while time.monotonic() < end or args.only is not None:
        case = random_case(seed)
        os.environ["FLASHJAX_EMULATOR_SEED"] = str(seed)
        print(json.dumps({"seed": seed, "case": describe(case)}), flush=True)
        try:
            row = {"taken": check(case, implementation)}
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps({"seed": seed, **row}), flush=True)
        seed += args.stride
        jax.clear_caches()
        if args.only is not None:
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="the first; default: the time")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, help="one seed")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--stride", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stride or args.only is not None:
        work(args)
        return
    first = int(time.time()) % 10**7 * 1000 if args.seed is None else args.seed
    print(f"seeds from {first}", flush=True)
    command = [sys.executable, __file__, "--seconds", str(args.seconds), "--stride", str(args.jobs), "--seed"]
    workers = [
        subprocess.Popen([*command, str(first + i)], stdout=subprocess.PIPE, text=True) for i in range(args.jobs)
    ]
    end = time.monotonic() + args.seconds + 90
    begun, ended, failures = {}, {}, []
    for worker in workers:
        try:
            text = worker.communicate(timeout=max(1.0, end - time.monotonic()))[0]
            died = f"the process ended with {worker.returncode}"
        except subprocess.TimeoutExpired:
            worker.kill()
            text, died = worker.communicate()[0], "did not end"
        for line in map(json.loads, text.splitlines()):
            (begun if "case" in line else ended)[line["seed"]] = line
        failures += [
            {"seed": seed, "case": row["case"], "error": died}
            for seed, row in begun.items()
            if seed not in ended and (seed - first) % args.jobs == workers.index(worker)
        ]
        if not text:
            failures.append({"seed": None, "case": "", "error": died})
    failures += [{**begun[seed], "error": row["error"]} for seed, row in ended.items() if "error" in row]
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "seconds": args.seconds,
        "first_seed": first,
        "cases": len(ended),
        "declined": sum(row.get("taken") is False for row in ended.values()),
        "failures": failures,
    }
    for failure in failures:
        print(f"seed {failure['seed']}: {failure['error']}\n    {failure['case']}", flush=True)
    print(f"{result['cases']} cases, {result['declined']} declined, {len(failures)} failures")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(1 if failures or not ended else 0)


if __name__ == "__main__":
    main()
