"""Writes the wrappers of wgmma.mma_async: one class a width and input type, C++ to the file named.

    Wgmma<N, F16>::ss<TA, TB>(d, a, b, add)           D (64 x N, f32) = A B (+ D), A and B in shared memory
    Wgmma<N, F16>::rs<TB>(d, a0, a1, a2, a3, b, add)  A in registers

TA, TB: 1 where the operand is MN-major. The instruction names every accumulator register, hence a script.
"""

import pathlib
import sys

WIDTHS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 256)


def wrapper(n: int, f16: bool) -> str:
    count = n // 2
    kind = "f16" if f16 else "bf16"
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
    registers = "{" + ",".join(f"%{i}" for i in range(count)) + "}"
    outputs = ",".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""template <>
struct Wgmma<{n}, {str(f16).lower()}> {{
  template <int TA, int TB>
  static DI void ss(float (&d)[{count}], u64 a, u64 b, int add) {{
    asm volatile(
        "{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; {name} "
        "{registers}, %{count}, %{count + 1}, p, 1, 1, %{count + 3}, %{count + 4};}}"
        : {outputs}
        : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  }}
  template <int TB>
  static DI void rs(float (&d)[{count}], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int add) {{
    asm volatile(
        "{{.reg .pred p; setp.ne.b32 p, %{count + 5}, 0; {name} "
        "{registers}, {{%{count},%{count + 1},%{count + 2},%{count + 3}}}, %{count + 4}, p, 1, 1, %{count + 6};}}"
        : {outputs}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add), "n"(TB));
  }}
}};
"""


text = '#pragma once\n#include "cuda/sm90/ptx.cuh"\n\nnamespace flashjax::sm90 {\n'
text += "template <int N, bool F16>\nstruct Wgmma;\n"
text += "".join(wrapper(n, f16) for f16 in (False, True) for n in WIDTHS)
text += "}  // namespace flashjax::sm90\n"
out = pathlib.Path(sys.argv[1])
if not out.exists() or out.read_text() != text:  # else every row would be compiled again
    out.write_text(text)
