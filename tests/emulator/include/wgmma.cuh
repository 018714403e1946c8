// The products of a warpgroup, under the names that csrc/cuda/sm90/wgmma.py gives them.
#pragma once
#include "cuda/sm90/ptx.cuh"

namespace flashjax::sm90 {

template <int N, bool F16>
struct Wgmma {
  template <int TA, int TB>
  static void ss(float (&d)[N / 2], u64 a, u64 b, int add) {
    emulator::multiply({N, F16, false, TA != 0, TB != 0, add != 0, a, b}, d, nullptr);
  }
  template <int TB>
  static void rs(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int add) {
    const u32 a[4] = {a0, a1, a2, a3};
    emulator::multiply({N, F16, true, false, TB != 0, add != 0, 0, b}, d, a);
  }
};

}  // namespace flashjax::sm90
