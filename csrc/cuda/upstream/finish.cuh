// What is done to the results of FlashAttention-2's forward, around it: rows outside every
// sequence, rows that see no key (their lse is +inf there), and sinks.
#pragma once
#include "../launch.h"

namespace flashjax::upstream {

constexpr int kWarps = 8;  // of a block; a warp does a query of a head

inline unsigned blocks_of(int64_t warps) {
  return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

static __global__ void fill(float* data, int64_t count, float value) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x < count) data[x] = value;
}

// Results as a call without any query has them.
inline cudaError_t clear(const FwdParams& p, cudaStream_t stream) {
  const int64_t rows = p.b * p.h * p.s;
  cudaError_t error = cudaMemsetAsync(p.out, 0, rows * p.e * 2, stream);
  fill<<<static_cast<unsigned>((rows + 255) / 256), 256, 0, stream>>>(p.lse, rows, -INFINITY);
  return cuda::first_error(error, cudaGetLastError());
}

__device__ __forceinline__ float sink_of(const Problem& p, int64_t b, int64_t h) {
  return p.sinks ? p.sinks[b * p.sinks_shape.stride[0] + h] : -INFINITY;
}

template <typename T>
static __global__ void __launch_bounds__(32 * kWarps)
    finish_rows(const __grid_constant__ FwdParams p) {
  const int64_t x = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;  // over [b, h, s]
  if (x >= p.b * p.h * p.s) return;
  const int64_t i = x % p.s, h = x / p.s % p.h, b = x / p.s / p.h;
  const float lse = p.lse[x];
  if (lse == -INFINITY) return;  // outside
  const float sink = sink_of(p, b, h), seen = lse == INFINITY ? -INFINITY : lse;
  const float most = fmaxf(seen, sink);
  const float total = most == -INFINITY ? most : most + logf(expf(seen - most) + expf(sink - most));
  __syncwarp();
  if (threadIdx.x % 32 == 0) p.lse[x] = total;
  if (sink == -INFINITY || seen == -INFINITY) return;
  const float share = expf(seen - total);
  T* out = static_cast<T*>(p.out) + ((b * p.s + i) * p.h + h) * p.e;
  for (int64_t j = threadIdx.x % 32; j < p.e; j += 32)
    out[j] = static_cast<T>(static_cast<float>(out[j]) * share);
}

template <typename T>
cudaError_t finish(const FwdParams& p, cudaStream_t stream) {
  finish_rows<T><<<blocks_of(p.b * p.h * p.s), 32 * kWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flashjax::upstream
