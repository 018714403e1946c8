"""Plants faults in the emulated kernels, one at a time, and runs the tests, which must find each.

    python tests/emulator/faults.py BUILD [NAME]    # BUILD: a build of the emulator, with ninja or make

Each is a mistake that a GPU may get away with: a fence, a wait or a barrier less, or late. A few minutes.
"""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Fault(NamedTuple):
    name: str
    file: str  # of csrc/cuda/sm90
    old: str
    new: str
    test: str = "test_forward.py"
    k: str = "bfloat16 or tall"


FAULTS = (
    Fault(
        "out leaves without a fence",
        "forward_kernel.cuh",
        "        fence_async();\n        bar_sync(kBarOut + cw, 128);\n        if (elect) {",
        "        bar_sync(kBarOut + cw, 128);\n        if (elect) {",
    ),
    Fault(
        "out is staged while the last one leaves",
        "forward_kernel.cuh",
        "        if (elect) bulk_wait_read<0>();\n        bar_sync(kBarOut + cw, 128);\n        int rr",
        "        bar_sync(kBarOut + cw, 128);\n        int rr",
    ),
    Fault(
        "V is handed back before its product is done",
        "forward_kernel.cuh",
        "      wg_wait<0>();\n      pin(o);\n      if (elect) mb_arrive(x.v_empty + 8 * sv);",
        "      if (elect) mb_arrive(x.v_empty + 8 * sv);\n      wg_wait<0>();\n      pin(o);",
    ),
    Fault(
        "K is handed back before its product is done",
        "forward_kernel.cuh",
        "      wg_wait<1>();\n      pin(s);\n      free_k();",
        "      free_k();\n      wg_wait<1>();\n      pin(s);",
    ),
    Fault(
        "S is read before it is there",
        "forward_kernel.cuh",
        "      wg_wait<1>();\n      pin(s);\n      free_k();",
        "      wg_wait<2>();\n      pin(s);\n      free_k();",
    ),
    Fault("one named barrier for all turns", "forward_kernel.cuh", "kBarTurn + 2 * cw + turn", "kBarTurn + 2 * cw"),
    Fault(
        "blocks are handed back before all warps have seen them",
        "forward_kernel.cuh",
        "          bar_sync(kBarOut + cw, 128);\n          if (elect) mb_arrive(x.k_empty",
        "          if (elect) mb_arrive(x.k_empty",
    ),
    Fault(
        "Q is handed back before all warps have read it",
        "forward_kernel.cuh",
        "      bar_sync(kBarOut + cw, 128);\n      if (elect) mb_arrive(x.q_empty);",
        "      if (elect) mb_arrive(x.q_empty);",
    ),
    Fault(
        "dQ is staged without a fence",
        "backward_kernel.cuh",
        "      fence_async();\n      bar_arrive(kBarDqFull + cw, 160);",
        "      bar_arrive(kBarDqFull + cw, 160);",
        "test_backward.py",
        "bfloat16",
    ),
    Fault(
        "dQ is staged while the last one is added",
        "backward_kernel.cuh",
        "      if (elect) bulk_wait_read<1>();\n      __syncwarp();\n      bar_arrive(kBarDqFree, 160);",
        "      bar_arrive(kBarDqFree, 160);\n      if (elect) bulk_wait_read<1>();\n      __syncwarp();",
        "test_backward.py",
        "pieces and not last",
    ),
    Fault(
        "dS is multiplied without a fence",
        "backward_kernel.cuh",
        "      fence_async();\n      bar_sync(kBarDs, kDsReaders);\n      float dq[kDqFloats];\n      product",
        "      bar_sync(kBarDs, kDsReaders);\n      float dq[kDqFloats];\n      product",
        "test_backward.py",
        "bfloat16",
    ),
    Fault(
        "Q is handed back before dK is done",
        "backward_kernel.cuh",
        "      wg_wait<0>();\n      pin(dk);\n      if (elect) mb_arrive(x.q_empty + 8 * s);",
        "      if (elect) mb_arrive(x.q_empty + 8 * s);\n      wg_wait<0>();\n      pin(dk);",
        "test_backward.py",
        "bfloat16",
    ),
    Fault(
        "rows of V are cleared without a fence",
        "decode_kernel.cuh",
        "          fence_async();\n          bar_sync(1 + cw, 128);",
        "          bar_sync(1 + cw, 128);",
        "test_decode.py",
        "test_decode",
    ),
    Fault(
        "Q is handed back before the decoding warps have read it",
        "decode_kernel.cuh",
        "        fence_async();\n        mb_arrive_warp(x.q_empty);",
        "        fence_async();\n        if (lane == 0) mb_arrive(x.q_empty);",
        "test_decode.py",
        "test_decode",
    ),
)


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def build(folder) -> None:
    done = run("cmake", "--build", folder, "-j", str(os.cpu_count()))
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def main():
    folder = pathlib.Path(sys.argv[1]).resolve()
    environment = os.environ | {"FLASHJAX_EMULATOR": str(folder), "OPENBLAS_NUM_THREADS": "1"}
    missed = []
    for fault in FAULTS:
        if sys.argv[2:] not in ([], [fault.name]):
            continue
        path = folder / "csrc/cuda/sm90" / fault.file
        good = path.read_text()
        if good.count(fault.old) != 1:
            sys.exit(f"{fault.name}: where it goes is {good.count(fault.old)} times in {fault.file}")
        try:
            path.write_text(good.replace(fault.old, fault.new))
            build(folder)
            pytest = (sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", f"tests/{fault.test}", "-k", fault.k)
            found = run(*pytest, cwd=ROOT, env=environment)
        finally:
            path.write_text(good)
        last = found.stdout.strip().splitlines()[-1] if found.stdout else found.stderr[-200:]
        print(f"{'found ' if ' failed' in last else 'MISSED'} {fault.name}: {last}", flush=True)
        if " failed" not in last:
            missed.append(fault.name)
    build(folder)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
