"""Fails if a Hopper kernel waits for an answer from memory where it asks for it.

    python csrc/cuda/check_waits.py BUILD_DIR

An `atom.or` is asked for a step before its answer is wanted (backward_kernel.cuh, Visits). ptxas may copy the answer
right behind the ATOMG, and a copy waits for the memory: then every step does. Reads the machine code of the build's
objects; cuobjdump is CUDA's, or that of the package nvidia-cuda-cuobjdump.
"""

import pathlib
import re
import shutil
import subprocess
import sys

SOON = 8  # instructions; in source order a step is hundreds


def cuobjdump() -> str:
    folders = [pathlib.Path(path) / "nvidia" / "cu13" / "bin" for path in sys.path]
    found = shutil.which("cuobjdump") or next((x for y in folders if (x := shutil.which("cuobjdump", path=y))), None)
    return found or sys.exit("no cuobjdump: pip install nvidia-cuda-cuobjdump")


def functions(code: str):
    """Instructions, without predicates, by function."""
    for function in code.split("Function : ")[1:]:
        yield function.split()[0], re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;", function)


def waits(code: str):
    for name, instructions in functions(code):
        for i, instruction in enumerate(instructions):
            if asked := re.match(r"ATOMG\S*\.OR\S* PT, (R\d+),", instruction):
                for reader in instructions[i + 1 : i + 1 + SOON]:
                    if re.search(rf"\b{asked[1]}\b", reader):
                        yield f"{name}: {instruction}; then {reader}"
                        break


def main() -> int:
    objects = sorted(pathlib.Path(sys.argv[1]).rglob("sm90_bwd_*.cu.o"))
    asked, wrong = 0, []
    for path in objects:
        code = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout
        asked += len(re.findall(r"ATOMG\S*\.OR", code))
        wrong += [f"{path.name}: {x}" for x in waits(code)]
    print(*wrong, f"{asked} answers in {len(objects)} objects, {len(wrong)} waited for at once", sep="\n")
    return 1 if wrong or not asked else 0


if __name__ == "__main__":
    sys.exit(main())
