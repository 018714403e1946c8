// What is done to the results of FlashAttention-2's forward, around it: rows outside every
// sequence, rows that see no key (their lse is +inf there), and sinks.
#pragma once
#include "../launch.h"

namespace flashjax::upstream {

constexpr int kWarps = 8;  // of a block; a warp does a query of a head

// That query: x counts over [b, h, s].
struct Query {
  int64_t x, b, h, i;

  __device__ __forceinline__ explicit Query(const Problem& p)
      : x(int64_t{blockIdx.x} * kWarps + threadIdx.x / 32),
        b(x / p.h / p.s),
        h(x / p.s % p.h),
        i(x % p.s) {}

  __device__ __forceinline__ bool exists(const Problem& p) const { return b < p.b; }

  template <typename T>
  __device__ __forceinline__ T* out(const FwdParams& p) const {
    return static_cast<T*>(p.out) + ((b * p.s + i) * p.h + h) * p.e;
  }

  // Lane l holds sums of the columns l, l + 32, ..., in units of exp(most), as total is.
  template <typename T, int D>
  __device__ __forceinline__ void store(const FwdParams& p, const float (&sum)[D / 32], float total,
                                        float most) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < D / 32; ++j)
      if (32 * j + lane < p.e)
        out<T>(p)[32 * j + lane] = static_cast<T>(total == 0.f ? 0.f : sum[j] / total);
    if (lane == 0) p.lse[x] = total == 0.f ? -INFINITY : most + logf(total);
  }
};

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
  const Query query(p);
  if (!query.exists(p)) return;
  const float lse = p.lse[query.x];
  if (lse == -INFINITY) return;  // outside
  const float sink = sink_of(p, query.b, query.h), seen = lse == INFINITY ? -INFINITY : lse;
  const float most = fmaxf(seen, sink);
  const float total = most == -INFINITY ? most : most + logf(expf(seen - most) + expf(sink - most));
  __syncwarp();
  if (threadIdx.x % 32 == 0) p.lse[query.x] = total;
  if (sink == -INFINITY || seen == -INFINITY) return;
  const float share = expf(seen - total);
  T* out = query.out<T>(p);
  for (int64_t j = threadIdx.x % 32; j < p.e; j += 32)
    out[j] = static_cast<T>(static_cast<float>(out[j]) * share);
}

template <typename T>
cudaError_t finish(const FwdParams& p, cudaStream_t stream) {
  finish_rows<T><<<blocks_of(p.b * p.h * p.s), 32 * kWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flashjax::upstream
