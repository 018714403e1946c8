// The passes around the backward: statistics and a zeroed accumulator before it, the conversion of
// dQ after it, and the gradient of the sinks, which falls out of the statistics.
#pragma once
#include "backward_common.cuh"

namespace flashjax::sm90 {

struct PassArgs {
  const unsigned short *out, *dout;  // [b, s, h, e]
  const float *lse, *dlse;           // [b, h, s]; dlse null: 0
  float *lse2, *delta;               // [b * h, rows]
};

// delta = sum of dout * out - dlse, and lse2 = lse * log2(e); for a query that saw nothing, or is
// none, +inf and 0. What the kernel counts begins; a kernel that does not count finds its
// accumulator cleared. dq of tiles that no key block visits, and of rows of no sequence, is 0. 64
// rows, or a tile, a block of 256 threads; a row by E / 8 lanes.
template <class K, bool F16, int D, int E>
static __global__ void __launch_bounds__(256)
    backward_statistics(const PassArgs a, const BackwardArgs k) {
  constexpr int kLanes = E / 8, kRows = 256 / kLanes, M = K::kM, kBlock = kVisitRows<M>;
  static_assert(kBlock % kRows == 0 && M % kBlock == 0);
  const Problem& p = k.p;
  const int h = blockIdx.y, lane = threadIdx.x % kLanes;
  Queries x;
  int rows = kBlock;  // that exist in the arrays of this pass
  if constexpr (K::kSpan) {
    pdl_wait();  // for the plan
    if (blockIdx.x >= *k.query_tiles) return;
    x = queries(k, k.queries[blockIdx.x], h, kBlock * blockIdx.z);
    if (x.none) rows = 0;
  } else {
    const int b = blockIdx.z, r0 = blockIdx.x * kBlock;
    x = {b, 0, r0 - (K::kPlain ? k.lead : 0), p.s, ((long long)b * p.h + h) * k.rows + r0, false};
    rows = min(kBlock, k.rows - r0);
  }
  const long long bh = (long long)x.b * p.h + h;
  // A row a turn. What several turns read is asked for at once: one after the other, the waits for
  // the memory take longer than the bytes.
  constexpr int kTurns = kBlock / kRows, kBatch = kTurns % 4 ? kTurns : 4;
  const int own = threadIdx.x / kLanes, s0 = x.begin + x.first + own;
  const int step = kRows * p.h * p.e / 8;  // from turn to turn, in pieces of 8 values
  const long long piece = (((long long)x.b * p.s + s0) * p.h + h) * p.e / 8 + lane;
  const uint4 *out = (const uint4*)a.out + piece, *dout = (const uint4*)a.dout + piece;
#pragma unroll 1
  for (int q0 = 0; q0 < kTurns; q0 += kBatch, out += kBatch * step, dout += kBatch * step) {
    float l[kBatch], dl[kBatch];
    uint4 o[kBatch], y[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int r = (q0 + i) * kRows, s = x.first + own + r;
      const bool some = s >= 0 && s < x.length;
      const long long at = bh * p.s + s0 + r;
      l[i] = some ? a.lse[at] : -infinity(), dl[i] = some && a.dlse ? a.dlse[at] : 0.f;
      o[i] = y[i] = make_uint4(0, 0, 0, 0);
      if (some && lane * 8 < p.e) o[i] = out[i * step], y[i] = dout[i * step];
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int r = (q0 + i) * kRows + own;
      auto product = [&](u32 x, u32 y) {
        return low<F16>(x) * low<F16>(y) + high<F16>(x) * high<F16>(y);
      };
      float sum = product(o[i].x, y[i].x) + product(o[i].y, y[i].y) + product(o[i].z, y[i].z) +
                  product(o[i].w, y[i].w);
#pragma unroll
      for (int j = kLanes / 2; j; j /= 2) sum += __shfl_xor_sync(~0u, sum, j);
      if (lane == 0 && r < rows) {
        a.lse2[x.padded + r] = l[i] == -infinity() ? infinity() : l[i] * kLog2E;
        a.delta[x.padded + r] = l[i] == -infinity() ? 0.f : sum - dl[i];
      }
    }
  }
  const int row = (int)(x.padded - (K::kSpan ? bh - x.b : bh) * k.rows), m = row / M;  // the tile
  const bool begins = K::kSpan ? blockIdx.z == 0 : row == m * M;  // offsets that fall move it
  __shared__ int visited;
  if (threadIdx.x < 32) {
    int visits = x.none ? 0 : 1;
    if constexpr (K::kCounts) {
      visits = 0;
      if constexpr (K::kSpan) {
        // From the sequence's first tile on.
        for (int n = (row - x.first) / M + threadIdx.x; n <= m && rows > 0; n += 32)
          visits += k.changes[n];
        visits = __reduce_add_sync(~0u, visits);
      } else {
        for (int n = threadIdx.x; n - (int)threadIdx.x < k.nblocks; n += 32) {
          const Blocks y = queries_of<K>(k, min(n, k.nblocks - 1));
          visits += __popc(__ballot_sync(~0u, n < k.nblocks && m >= y.begin && m < y.end));
        }
      }
    }
    if (threadIdx.x == 0) visited = visits;
    if (threadIdx.x == 0 && begins && rows > 0) k.visits[x.template visits<M>()] = {0, visits};
  }
  __syncthreads();
  if (K::kCounts && !K::kSpan && row == 0 && bh == 0) {
    if (threadIdx.x == 0) *k.ticket = 0;
    for (int n = threadIdx.x; n < 2 * k.cut.ranges; n += 256) k.there[n] = 0;
  }
  if constexpr (!K::kCounts) {
    float4* acc = (float4*)(k.acc + x.padded * D);
    for (int i = threadIdx.x; i < rows * D / 4; i += 256) acc[i] = make_float4(0, 0, 0, 0);
  }
  if (visited == 0)
    for (int s = max(x.first, 0) + threadIdx.x / 32; s < min(x.first + kBlock, x.length); s += 8)
      for (int i = (threadIdx.x & 31) * 8; i < k.d; i += 256)
        *(uint4*)(k.dq + (((long long)x.b * p.s + x.begin + s) * p.h + h) * k.d + i) =
            make_uint4(0, 0, 0, 0);
}

// A block of 256 threads for a tile of M queries. dq of one that no key block visits, or of rows of
// no sequence, is 0 already.
template <class K, bool F16, int D>
static __global__ void __launch_bounds__(256) backward_convert(const BackwardArgs a) {
  constexpr int M = K::kM;
  const Problem& p = a.p;
  const int h = blockIdx.y, warp = threadIdx.x / 32;
  Queries x;
  if constexpr (K::kSpan) {
    if (blockIdx.x >= *a.query_tiles) return;
    x = queries(a, a.queries[blockIdx.x], h, 0);
    if (x.none) return;
  } else {
    const int b = blockIdx.z, first = blockIdx.x * M;
    x = {b,    0, first - (K::kPlain ? a.lead : 0), p.s, ((long long)b * p.h + h) * a.rows + first,
         false};
  }
  if (K::kCounts && a.visits[x.visits<M>()].all == 0) return;
  const float* from = a.acc + x.padded * D;
  const int begin = x.b * p.s + x.begin + x.first, rows = x.length - x.first;
  if constexpr (!K::kTransposed)
    convert_dq<F16, D, M, K::kByRows>(a, from, h, begin, rows, warp, M * D / 512, 8);
  else if (warp < 4)
    convert_dq_transposed<F16, D, M>(a, from, h, begin, rows, -x.first, warp);
}

// dsinks: a block for each element, over the batch entries that share it. A sink takes exp(sink -
// lse) of every query.
template <class K>
static __global__ void __launch_bounds__(256)
    backward_sinks(const PassArgs a, const BackwardArgs k, const float* sinks, float* dsinks,
                   int batches) {
  __shared__ float partial[256];
  const int h = blockIdx.x, own = blockIdx.y;
  const float sink = sinks[own * k.p.h + h];
  float total = 0.f;
  auto add = [&](long long at, long long padded) {
    const float l = a.lse[at];  // not lse2, which is rounded: the difference may be small
    if (l != -infinity()) total -= ex2((sink - l) * kLog2E) * a.delta[padded];
  };
  if constexpr (K::kSpan) {
    for (int i = threadIdx.x / 32; i < *k.query_tiles; i += 8) {
      const Queries x = queries(k, k.queries[i], h, 0);
      if (x.none || x.b / batches != own) continue;
      const long long at = ((long long)x.b * k.p.h + h) * k.p.s + x.begin + x.first;
      for (int r = max(-x.first, 0) + threadIdx.x % 32; r < min(K::kM, x.length - x.first); r += 32)
        add(at + r, x.padded + r);
    }
  } else {
    for (int b = own * batches; b < (own + 1) * batches; b++) {
      const long long bh = (long long)b * k.p.h + h;
      for (int s = threadIdx.x; s < k.p.s; s += 256)
        add(bh * k.p.s + s, bh * k.rows + s + (K::kPlain ? k.lead : 0));
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
