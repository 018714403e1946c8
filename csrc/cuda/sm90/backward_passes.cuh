// The passes around the backward: statistics and a zeroed accumulator before it, the conversion of
// dQ after it, and the gradient of the sinks, which falls out of the statistics.
#pragma once
#include "backward_common.cuh"

namespace flashjax::sm90 {

struct PassArgs {
  const unsigned short *out, *dout;  // [b, s, h, e]
  const float *lse, *dlse;           // [b, h, s]
  float *lse2, *delta;               // [b * h, rows]
};

// delta = sum of dout * out - dlse, and lse2 = lse * log2(e); for a query that saw nothing, or is
// none, +inf and 0. What the kernel counts begins, and dq of tiles that no key block visits is 0;
// a kernel that does not count finds its accumulator cleared. 64 rows a block of 256 threads; a row
// by D / 8 lanes.
template <class K, bool F16, int D>
static __global__ void __launch_bounds__(256)
    backward_statistics(const PassArgs a, const BackwardArgs k) {
  constexpr int kLanes = D / 8, kRows = 256 / kLanes, M = K::kM;
  const Problem& p = k.p;
  const int h = blockIdx.y, b = blockIdx.z, r0 = blockIdx.x * 64, lane = threadIdx.x % kLanes;
  const long long bh = (long long)b * p.h + h;
#pragma unroll
  for (int q = 0; q < 64 / kRows; q++) {
    const int s = r0 + q * kRows + threadIdx.x / kLanes;
    const float l = s < p.s ? a.lse[bh * p.s + s] : -infinity();
    float sum = 0.f;
    if (l != -infinity() && lane * 8 < p.e) {
      const long long at = (((long long)b * p.s + s) * p.h + h) * p.e + lane * 8;
      const uint4 x = *(const uint4*)(a.out + at), y = *(const uint4*)(a.dout + at);
      auto add = [&](u32 x, u32 y) {
        sum += low<F16>(x) * low<F16>(y) + high<F16>(x) * high<F16>(y);
      };
      add(x.x, y.x), add(x.y, y.y), add(x.z, y.z), add(x.w, y.w);
    }
#pragma unroll
    for (int i = kLanes / 2; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0 && s < k.rows) {
      a.lse2[bh * k.rows + s] = l == -infinity() ? infinity() : l * kLog2E;
      a.delta[bh * k.rows + s] = l == -infinity() ? 0.f : sum - a.dlse[bh * p.s + s];
    }
  }
  if constexpr (K::kPersistent) {
    const int m = r0 / M, first = threadIdx.x & ~31;
    int visits = 0;
    for (int n = threadIdx.x & 31; n - (int)(threadIdx.x & 31) < k.nblocks; n += 32) {
      const Blocks x = queries_of<K>(k, min(n, k.nblocks - 1), b);
      visits += __popc(__ballot_sync(~0u, n < k.nblocks && m >= x.begin && m < x.end));
    }
    if (threadIdx.x == 0) {
      if (r0 % M == 0 && r0 < k.rows) k.visits[(bh * k.rows + r0) / 64] = Visits::initial(visits);
      if (r0 == 0 && bh == 0) *k.ticket = 0;
    }
    if (visits == 0)
      for (int s = r0 + first / 32; s < min(r0 + 64, p.s); s += 8)
        for (int i = (threadIdx.x & 31) * 8; i < k.d; i += 256)
          *(uint4*)(k.dq + (((long long)b * p.s + s) * p.h + h) * k.d + i) = make_uint4(0, 0, 0, 0);
  } else {
    float4* acc = (float4*)(k.acc + (bh * k.rows + r0) * D);
    const int count = min(64, k.rows - r0) * D / 4;
    for (int i = threadIdx.x; i < count; i += 256) acc[i] = make_float4(0, 0, 0, 0);
  }
}

// A block of 256 threads for a tile of M queries, which is 0 already if no key block visits it.
template <class K, bool F16, int D>
static __global__ void __launch_bounds__(256) backward_convert(const BackwardArgs a) {
  const int m = blockIdx.x, bh = blockIdx.z * a.p.h + blockIdx.y;
  const long long row = (long long)bh * a.rows + (long long)m * K::kM;
  if (K::kPersistent && Visits{a.visits[row / 64]}.all() == 0) return;
  convert_dq<F16, D, K::kM, K::kByRows>(a, a.acc + row * D, bh, m, threadIdx.x / 32,
                                        K::kM * D / 512, 8);
}

// dsinks: a block for each element, over the batch entries that share it. A sink takes exp(sink -
// lse) of every query.
template <bool F16>
static __global__ void __launch_bounds__(256)
    backward_sinks(const PassArgs a, const BackwardArgs k, const float* sinks, float* dsinks,
                   int batches) {
  __shared__ float partial[256];
  const int h = blockIdx.x, own = blockIdx.y;
  const float sink = sinks[own * k.p.h + h];
  float total = 0.f;
  for (int b = own * batches; b < (own + 1) * batches; b++) {
    const long long bh = (long long)b * k.p.h + h;
    for (int s = threadIdx.x; s < k.p.s; s += 256) {
      const float l =
          a.lse[bh * k.p.s + s];  // not lse2, which is rounded: the difference may be small
      if (l != -infinity()) total -= ex2((sink - l) * kLog2E) * a.delta[bh * k.rows + s];
    }
  }
  partial[threadIdx.x] = total;
  for (int i = 128; i; i /= 2) {
    __syncthreads();
    if (threadIdx.x < i) partial[threadIdx.x] += partial[threadIdx.x + i];
  }
  if (threadIdx.x == 0) dsinks[own * k.p.h + h] = partial[0];
}

}  // namespace flashjax::sm90
