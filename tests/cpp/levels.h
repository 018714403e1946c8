// The instruction sets that this CPU has, and forcing one of them for a while.
#pragma once
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

namespace flashjax::test {

struct Level {
  explicit Level(const char* name) { setenv("FLASHJAX_CPU_SIMD", name, 1); }
  ~Level() { unsetenv("FLASHJAX_CPU_SIMD"); }
};

inline std::vector<const char*> levels() {
  std::vector<const char*> x;
  for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16"}) {
    Level forced(name);
    if (cpu::select_kernels()) x.push_back(name);
  }
  return x;
}

}  // namespace flashjax::test
