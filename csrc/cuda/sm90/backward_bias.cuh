// The bias and its gradient in the backward kernels: by tiles, or element by element.
#pragma once
#include "problem.cuh"

namespace flashjax::sm90 {

// dbias has the shape of the bias. An element that belongs to one score alone is stored; one that
// rows, sequences or heads share is added to, and so are the sums of columns, of a bias that all
// queries share: these are cleared before.
struct BiasArgs {
  enum By : int { kNone, kStore, kAdd, kColumns };
  int by;
  float* sums;            // dbias
  unsigned short* whole;  // instead of it, in the dtype of the bias: kStore only
  // Of tiles: bias and dbias as planes x queries x keys, and how far apart the planes of a row, a
  // sequence and a head are.
  TMap from, to;
  int of_b, of_n, of_h;
  DI int plane(int b, int n, int h) const { return b * of_b + n * of_n + h * of_h; }
};

DI void write(float* to, float x, bool on, int by) {
  asm volatile(
      "{.reg .pred s, r; setp.eq.s32 s, %2, 1; setp.gt.s32 r, %2, 1;"
      " @s st.global.cs.f32 [%0], %1; @r red.relaxed.gpu.global.add.f32 [%0], %1;}" ::"l"(to),
      "f"(x), "r"(on ? by : 0)
      : "memory");
}
DI void write2(float* to, float x, float y, bool on, int by) {
  asm volatile(
      "{.reg .pred s, r; setp.eq.s32 s, %3, 1; setp.gt.s32 r, %3, 1;"
      " @s st.global.cs.v2.f32 [%0], {%1, %2};"
      " @r red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};}" ::"l"(to),
      "f"(x), "f"(y), "r"(on ? by : 0)
      : "memory");
}
static_assert(BiasArgs::kStore == 1 && BiasArgs::kAdd > 1 && BiasArgs::kColumns > 1);

// Element by element, of one query head of a sequence. dS comes as a warpgroup's accumulator.
template <bool F16>
struct BiasGradient {
  const Problem& p;
  const BiasArgs& a;
  long long plane;
  DI BiasGradient(const Problem& p, const BiasArgs& a, int b, int n, int h)
      : p(p), a(a), plane(b * p.bias_b + n * p.bias_n + h * p.bias_h) {}

  // Sums over the queries. Its rows are keys, of which this thread has `key` and key + 8, and its
  // columns are queries.
  template <int kCount>
  DI void add_rows(const float (&x)[kCount], int key) const {
#pragma unroll
    for (int hh = 0; hh < 2; hh++) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kCount / 4; j++) sum += x[4 * j + 2 * hh] + x[4 * j + 2 * hh + 1];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const bool on = (threadIdx.x & 3) == 0 && key + 8 * hh < p.bias_keys;
      write(a.sums + plane + key + 8 * hh, sum, on, a.by);
    }
  }

  // Its rows are queries, of which this thread has `query` and query + 8, and its columns keys, of
  // which it has key + 8 j + {0, 1}.
  template <int kCount>
  DI void put_queries(const float (&x)[kCount], int query, int key) const {
    if (a.by == BiasArgs::kColumns) {
#pragma unroll
      for (int j = 0; j < kCount / 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float sum = x[4 * j + e] + x[4 * j + 2 + e];
#pragma unroll
          for (int i = 4; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
          const int at = key + 8 * j + e;
          write(a.sums + plane + at, sum, (threadIdx.x & 31) < 4 && at < p.bias_keys, a.by);
        }
      return;
    }
    const bool even = p.bias_keys % 2 == 0;
#pragma unroll
    for (int hh = 0; hh < 2; hh++, query += 8) {
      const int width = query < p.bias_queries ? p.bias_keys - key : 0;
      const long long at = plane + query * p.bias_s + key;
#pragma unroll
      for (int j = 0; j < kCount / 4; j++) {
        const float y = x[4 * j + 2 * hh], z = x[4 * j + 2 * hh + 1];
        if (a.whole) {
          if (8 * j < width) *(u32*)(a.whole + at + 8 * j) = pack<F16>(y, z);
        } else if (even) {
          write2(a.sums + at + 8 * j, y, z, 8 * j < width, a.by);
        } else {
          write(a.sums + at + 8 * j, y, 8 * j < width, a.by);
          write(a.sums + at + 8 * j + 1, z, 8 * j + 1 < width, a.by);
        }
      }
    }
  }
};

}  // namespace flashjax::sm90
