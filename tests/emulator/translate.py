"""Writes csrc as C++ for the emulator: csrc to the folder named, with what only nvcc understands replaced.

    python translate.py CSRC TO

Functions that are PTX are left out (include/ptx.h has them), `kernel<<<...>>>(...)` becomes a call, and variables in
shared memory become static ones, or a pointer to the block's. Handlers fill their results with NaN first.
"""

import pathlib
import re
import sys

FUNCTION = re.compile(
    r"^(?:template <[^\n]*>\n)?(?:DI|__device__ __forceinline__) [^\n;{]*(?:\n[^\n;{]+)*\{", re.MULTILINE
)
PTX = re.compile(r'\basm\b(?: volatile)?\(\s*("[^"]|"" : "\+f")')
REPLACED = (
    # The portable kernels' own, which ptx.h knows nothing of.
    (r'asm\("cvt.f32.f16 %0, %1;" : "=f"\((\S+)\) : "h"\((\S+bits)\)\);', r"\1 = emulator::from_half(\2);"),
    (r'asm\("cvt.rn.f16.f32 %0, %1;" : "=h"\((\S+)\) : "f"\((\S+)\)\);', r"\1 = emulator::to_half(\2);"),
    (r"extern __shared__ unsigned char (\w+)\[\];", r"unsigned char* const \1 = emulator::shared_memory();"),
    (r"\b__shared__\b", "static"),
    (r"(\w+(?:<[^<>;]*>)?)\s*<<<((?:.|\n)*?)>>>\(", r"emulator::Grid(\2)(\1, "),
    (r"ffi::PlatformStream<cudaStream_t>", "emulator::NoStream"),
    (r"^  Params params;\n", "  emulator::poison(rets);\n  Params params;\n"),
    (r'(#include "status.h"\n)(?=\nnamespace flashjax)', r'\1#include "stream.h"\n'),
)


def without_ptx(text: str) -> str:
    at = 0
    while found := FUNCTION.search(text, at):
        end, depth = found.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        body = text[found.start() : end]
        if PTX.search(body):
            text = text[: found.start()] + text[end:]
            at = found.start()
        else:
            at = found.end()
    return text


def translated(path: pathlib.Path) -> str:
    text = path.read_text()
    for pattern, by in REPLACED:
        text = re.sub(pattern, by, text, flags=re.MULTILINE)
    if path.suffix in (".cuh", ".cu"):
        text = without_ptx(text)
    if path.name == "ptx.cuh":
        text = text.replace("#pragma once\n", '#pragma once\n#include "ptx.h"\n', 1)
    return text


source, to = map(pathlib.Path, sys.argv[1:])
for path in sorted(source.rglob("*")):
    if path.suffix not in (".cuh", ".cu", ".h", ".cc", ".def") or "upstream" in path.parts:
        continue
    copy, text = to / path.relative_to(source), translated(path)
    if not copy.exists() or copy.read_text() != text:  # else all would be compiled again
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
