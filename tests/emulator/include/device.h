// CUDA C++ as the kernels use it: keywords, builtin variables, and functions of the language.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../machine.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __CUDACC__ 1

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

// ---- vectors
#define VECTORS(type, name)                                        \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(float, float)
#undef VECTORS

// ---- numbers
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename To, typename From>
inline To emulator_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(uint64_t{x} * y >> 32);
}
inline int __vimax3_s32(int x, int y, int z) { return max(x, max(y, z)); }
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<unsigned>(both << min(shift, 32u) >> 32);
}

// ---- memory
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T x) {
  *p = x;
}
// One thread runs at a time, and none stops within these.
template <typename T, typename U>
T atomicAdd(T* p, U x) {
  const T before = *p;
  *p = static_cast<T>(before + x);
  return before;
}
template <typename T, typename U>
T atomicMin(T* p, U x) {
  const T before = *p;
  *p = min(before, static_cast<T>(x));
  return before;
}
template <typename T, typename U>
T atomicMax(T* p, U x) {
  const T before = *p;
  *p = max(before, static_cast<T>(x));
  return before;
}
template <typename T, typename U>
T atomicOr(T* p, U x) {
  const T before = *p;
  *p = before | static_cast<T>(x);
  return before;
}
inline void __nanosleep(unsigned) { emulator::yield(); }
inline uint64_t __cvta_generic_to_shared(const void* p) { return emulator::address_of(p); }

// ---- the block and the warp
inline void __syncthreads() { emulator::block_barrier(0); }
inline int __syncthreads_or(int x) { return emulator::block_barrier(x != 0); }
inline void __syncwarp(unsigned mask = ~0u) {
  int none = 0;
  emulator::together(mask, "__syncwarp", none, [](int* const*) {});
}

namespace emulator {
template <typename T>
struct Lane {
  T in, out;
  int other;
};
// `from`: the lane whose value this one gets; of a lane that is not there, its own.
template <typename T>
T shuffle(u32 mask, const char* what, T x, int from) {
  Lane<T> mine{x, x, from};
  together(mask, what, mine, [mask](Lane<T>* const* all) {
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1 && all[i]->other >= 0 && all[i]->other < 32 && mask >> all[i]->other & 1)
        all[i]->out = all[all[i]->other]->in;
  });
  return mine.out;
}
template <typename T, typename Reduce>
T reduce(u32 mask, const char* what, T x, Reduce both) {
  Lane<T> mine{x, x, 0};
  together(mask, what, mine, [&](Lane<T>* const* all) {
    bool first = true;
    T y{};
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) y = first ? all[i]->in : both(y, all[i]->in), first = false;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) all[i]->out = y;
  });
  return mine.out;
}
}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, "__shfl_sync", x, lane / width * width + from % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int with) {
  return emulator::shuffle(mask, "__shfl_xor_sync", x, emulator::lane() ^ with);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int by) {
  return emulator::shuffle(mask, "__shfl_up_sync", x, emulator::lane() - by);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return emulator::reduce(mask, "__ballot_sync", x ? 1u << emulator::lane() : 0u,
                          [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, int x) { return __ballot_sync(mask, !x) == 0; }
#define REDUCE(name, type, what)                                                     \
  inline type name(unsigned mask, type x) {                                          \
    return emulator::reduce(mask, #name, x,                                          \
                            [](type a, type b) { return static_cast<type>(what); }); \
  }
REDUCE(__reduce_add_sync, int, a + b)
REDUCE(__reduce_min_sync, int, min(a, b))
REDUCE(__reduce_max_sync, int, max(a, b))
REDUCE(__reduce_add_sync, unsigned, a + b)
REDUCE(__reduce_min_sync, unsigned, min(a, b))
REDUCE(__reduce_max_sync, unsigned, max(a, b))
#undef REDUCE
