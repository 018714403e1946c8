// The passes around the backward: statistics and a zeroed accumulator before it, the conversion of
// dQ after it, and the gradient of the sinks, which falls out of the statistics.
#pragma once
#include "problem.cuh"

namespace flashjax::sm90 {

struct PassArgs {
  const unsigned short *out, *dout;  // [b, s, h, e]
  const float *lse, *dlse;           // [b, h, s]
  float *lse2, *delta, *acc;         // [b * h, rows], and [b * h, rows * D]
  unsigned short* dq;                // [b, s, h, d]
  int s, h, d, e, rows;
  float scale;
};

// delta = sum of dout * out - dlse, and lse2 = lse * log2(e); for a query that saw nothing, or is
// none, +inf and 0. The accumulator becomes 0. 64 rows a block of 256 threads; a row by D / 8
// lanes.
template <bool F16, int D>
static __global__ void __launch_bounds__(256) backward_statistics(const PassArgs a) {
  constexpr int kLanes = D / 8, kRows = 256 / kLanes;
  const int h = blockIdx.y, b = blockIdx.z, r0 = blockIdx.x * 64, lane = threadIdx.x % kLanes;
  const long long bh = (long long)b * a.h + h;
#pragma unroll
  for (int q = 0; q < 64 / kRows; q++) {
    const int s = r0 + q * kRows + threadIdx.x / kLanes;
    const float l = s < a.s ? a.lse[bh * a.s + s] : -infinity();
    float sum = 0.f;
    if (l != -infinity() && lane * 8 < a.e) {
      const long long at = (((long long)b * a.s + s) * a.h + h) * a.e + lane * 8;
      const uint4 x = *(const uint4*)(a.out + at), y = *(const uint4*)(a.dout + at);
      auto add = [&](u32 x, u32 y) {
        sum += low<F16>(x) * low<F16>(y) + high<F16>(x) * high<F16>(y);
      };
      add(x.x, y.x), add(x.y, y.y), add(x.z, y.z), add(x.w, y.w);
    }
#pragma unroll
    for (int i = kLanes / 2; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0 && s < a.rows) {
      a.lse2[bh * a.rows + s] = l == -infinity() ? infinity() : l * kLog2E;
      a.delta[bh * a.rows + s] = l == -infinity() ? 0.f : sum - a.dlse[bh * a.s + s];
    }
  }
  float4* acc = (float4*)(a.acc + (bh * a.rows + r0) * D);
  const int count = min(64, a.rows - r0) * D / 4;
  for (int i = threadIdx.x; i < count; i += 256) acc[i] = make_float4(0, 0, 0, 0);
}

// dq = scale * accumulator, out of register order. A block of 256 threads for a tile of M queries.
template <bool F16, int D, int M, bool kByRows>
static __global__ void __launch_bounds__(256) backward_convert(const PassArgs a) {
  constexpr int kChunks = D / 8;
  const int m = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const float* tile = a.acc + (((long long)b * a.h + h) * a.rows + (long long)m * M) * D;
  unsigned short* dq = a.dq + (((long long)b * a.s + m * M) * a.h + h) * a.d;
  auto put = [&](int row, int chunk, const float* v) {
    if (m * M + row >= a.s || chunk * 8 >= a.d) return;
    *(uint4*)(dq + (long long)row * a.h * a.d + chunk * 8) = make_uint4(
        pack<F16>(v[0] * a.scale, v[1] * a.scale), pack<F16>(v[2] * a.scale, v[3] * a.scale),
        pack<F16>(v[4] * a.scale, v[5] * a.scale), pack<F16>(v[6] * a.scale, v[7] * a.scale));
  };
#pragma unroll
  for (int i = threadIdx.x; i < M * kChunks / 2; i += 256) {
    const int chunk = i % kChunks, rp = i / kChunks, g = rp & 7, w = (rp >> 3) & 3;
    const int cw = kByRows ? rp >> 5 : chunk / (kChunks / 2),
              j = kByRows ? chunk : chunk % (kChunks / 2);
    const int row = (kByRows ? cw * 64 : 0) + w * 16 + g;
    const float4* f = (const float4*)tile + cw * (M * D / 8) + j * 128 + w * 32 + 4 * g;
    float lower[8], upper[8];
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float4 x = f[q];
      lower[2 * q] = x.x, lower[2 * q + 1] = x.y, upper[2 * q] = x.z, upper[2 * q + 1] = x.w;
    }
    put(row, chunk, lower);
    put(row + 8, chunk, upper);
  }
}

// dsinks: a block for each element, over the batch entries that share it. A sink takes exp(sink -
// lse) of every query.
template <bool F16>
static __global__ void __launch_bounds__(256)
    backward_sinks(const PassArgs a, const float* sinks, float* dsinks, int batches) {
  __shared__ float partial[256];
  const int h = blockIdx.x, own = blockIdx.y;
  const float sink = sinks[own * a.h + h];
  float total = 0.f;
  for (int b = own * batches; b < (own + 1) * batches; b++) {
    const long long bh = (long long)b * a.h + h;
    for (int s = threadIdx.x; s < a.s; s += 256) {
      const float l =
          a.lse[bh * a.s + s];  // not lse2, which is rounded: the difference may be small
      if (l != -infinity()) total -= ex2((sink - l) * kLog2E) * a.delta[bh * a.rows + s];
    }
  }
  partial[threadIdx.x] = total;
  for (int i = 128; i; i /= 2) {
    __syncthreads();
    if (threadIdx.x < i) partial[threadIdx.x] += partial[threadIdx.x + i];
  }
  if (threadIdx.x == 0) dsinks[own * a.h + h] = partial[0];
}

}  // namespace flashjax::sm90
