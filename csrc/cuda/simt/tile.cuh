// A 64 x 64 tile by 256 threads in plain CUDA: staging through shared memory, and the two products
// that attention is made of. Rows come as a list of row numbers in shared memory, where -1 stands
// for a row of zeros: nothing outside the valid rows is ever read, so a NaN there cannot reach a
// product.
#pragma once
#include "../../attention/sequence.h"

namespace flashjax::simt {

inline constexpr int kTile = 64;      // queries, and keys, of a tile
inline constexpr int kThreads = 256;  // 16 x 16, each with 4 x 4 elements of the tile
inline constexpr int kDepth = 32;     // of one staging step
inline constexpr int kPitch =
    68;  // floats of a staged line: 64 and a pad that keeps 16-byte alignment
inline constexpr int kColumns = 128;  // of an accumulator that outlives a tile (out, dq, dk, dv)
inline constexpr int kWidePitch = 132;
inline constexpr int kStage = 2 * kDepth * kPitch;  // floats; also holds kDepth lines of kWidePitch
static_assert(kDepth * kWidePitch <= kStage);

struct BF16 {
  unsigned short bits;
};
struct F16 {
  unsigned short bits;
};
template <DType>
struct TypeOf;
template <>
struct TypeOf<DType::kF32> {
  using type = float;
};
template <>
struct TypeOf<DType::kBF16> {
  using type = BF16;
};
template <>
struct TypeOf<DType::kF16> {
  using type = F16;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BF16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}
__device__ __forceinline__ float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(F16* p, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
}
__device__ __forceinline__ void store(
    BF16* p, float x) {  // to nearest, ties to even; sm_75 has no instruction for it
  uint32_t bits = __float_as_uint(x);
  p->bits = static_cast<unsigned short>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ int tx() { return threadIdx.x % 16; }
__device__ __forceinline__ int ty() { return threadIdx.x / 16; }

// A matrix of which `rows` picks the lines: line r starts at data + rows[r] * stride, and is
// `width` long.
template <typename T>
struct Lines {
  const T* data;
  int64_t stride;
  int64_t width;
  const int64_t* rows;  // shared memory, kTile of them

  __device__ __forceinline__ float at(int r, int64_t column) const {
    int64_t row = rows[r];
    return row >= 0 && column < width ? to_float(data[row * stride + column]) : 0.f;
  }
};

// acc[i][j] += x[4 ty + i] * y[column(j)], of lines in shared memory.
__device__ __forceinline__ int column(int j) { return 64 * (j / 4) + 4 * tx() + j % 4; }
template <int N>
__device__ __forceinline__ void add_outer(float (&acc)[4][N], const float* x, const float* y) {
  float a[4], b[N];
  *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(x + 4 * ty());
#pragma unroll
  for (int j = 0; j < N; j += 4)
    *reinterpret_cast<float4*>(b + j) = *reinterpret_cast<const float4*>(y + column(j));
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) acc[i][j] += a[i] * b[j];
}

// acc[i][j] += sum over k of a(4 ty + i, k) * b(4 tx + j, k). Begins and ends with a barrier.
template <typename A, typename B>
__device__ __forceinline__ void dot(float (&acc)[4][4], const Lines<A>& a, const Lines<B>& b,
                                    float* stage) {
  float* sa = stage;
  float* sb = stage + kDepth * kPitch;
  const int k = threadIdx.x % kDepth;
  for (int64_t k0 = 0; k0 < a.width; k0 += kDepth) {
    __syncthreads();
#pragma unroll
    for (int r = threadIdx.x / kDepth; r < kTile; r += kThreads / kDepth) {
      sa[k * kPitch + r] = a.at(r, k0 + k);
      sb[k * kPitch + r] = b.at(r, k0 + k);
    }
    __syncthreads();
#pragma unroll 8
    for (int kk = 0; kk < kDepth; ++kk) add_outer(acc, sa + kk * kPitch, sb + kk * kPitch);
  }
  __syncthreads();
}

// acc[i][j] += sum over r of weights[r][4 ty + i] * b(r, c0 + column(j)). Begins and ends with a
// barrier.
template <typename T>
__device__ __forceinline__ void combine(float (&acc)[4][8], const float* weights, const Lines<T>& b,
                                        int64_t c0, float* stage) {
  for (int r0 = 0; r0 < kTile; r0 += kDepth) {
    __syncthreads();
#pragma unroll 8
    for (int x = threadIdx.x; x < kDepth * kColumns; x += kThreads)
      stage[x / kColumns * kWidePitch + x % kColumns] = b.at(r0 + x / kColumns, c0 + x % kColumns);
    __syncthreads();
#pragma unroll 8
    for (int r = 0; r < kDepth; ++r)
      add_outer(acc, weights + (r0 + r) * kPitch, stage + r * kWidePitch);
  }
  __syncthreads();
}

// A thread's 4 x 4 elements to shared memory, as [query][key] or as [key][query].
__device__ __forceinline__ void put(float* tile, const float (&x)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<float4*>(tile + (4 * ty() + i) * kPitch + 4 * tx()) =
        make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
}
__device__ __forceinline__ void put_transposed(float* tile, const float (&x)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    *reinterpret_cast<float4*>(tile + (4 * tx() + j) * kPitch + 4 * ty()) =
        make_float4(x[0][j], x[1][j], x[2][j], x[3][j]);
}

// Rows first + r of the accumulator to dst, scaled; dst is [rows, stride] and takes columns c0 +
// ... < width.
template <typename T>
__device__ __forceinline__ void write(T* dst, int64_t stride, int64_t first, int64_t rows,
                                      int64_t c0, int64_t width, const float (&acc)[4][8],
                                      const float (&factor)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * ty() + i >= rows) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (c0 + column(j) < width)
        store(dst + (first + 4 * ty() + i) * stride + c0 + column(j), acc[i][j] * factor[i]);
  }
}

// The first sequence of row b that can reach past `row`, when `cu` (of row b) holds n + 1
// boundaries.
__device__ __forceinline__ int64_t first_sequence(const int32_t* cu, int64_t n, int64_t row) {
  int64_t lo = 0, hi = n;
  while (lo < hi) {
    int64_t mid = (lo + hi) / 2;
    if (cu[mid + 1] > row)
      hi = mid;
    else
      lo = mid + 1;
  }
  return lo;
}

}  // namespace flashjax::simt
