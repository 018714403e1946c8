// One tile of the backward: its queries' statistics, and the gradients of its scores.
#pragma once
#include "grid.cuh"
#include "score.cuh"

namespace flashjax::simt {

// The statistics of a tile's queries; in shared memory. A query that saw nothing has no gradient,
// whatever its dout.
struct Statistics {
  int64_t live_row[kTile];  // q_row, or -1 where lse is -inf
  float lse[kTile], delta[kTile];

  // delta = sum of dout * out - dlse. `labels.q_row` must be visible; the caller's next barrier
  // publishes the result.
  template <typename T>
  __device__ __forceinline__ void set(const BwdParams& p, const Labels& labels, int64_t b,
                                      int64_t h) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = warp; r < kTile; r += kThreads / 32) {
      const int64_t row = labels.q_row[r];
      const int64_t at = (b * p.h + h) * p.s + (row - b * p.s);
      const float l = row >= 0 ? p.lse[at] : -INFINITY;
      float sum = 0.f;
      if (l != -INFINITY) {
        const T* dout = static_cast<const T*>(p.dout) + (row * p.h + h) * p.e;
        const T* out = static_cast<const T*>(p.out) + (row * p.h + h) * p.e;
        for (int64_t x = lane; x < p.e; x += 32) sum += to_float(dout[x]) * to_float(out[x]);
      }
#pragma unroll
      for (int x = 16; x; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
      if (lane == 0) {
        live_row[r] = l == -INFINITY ? -1 : row;
        lse[r] = l;
        delta[r] = l == -INFINITY ? 0.f : sum - (p.dlse ? p.dlse[at] : 0.f);
      }
    }
  }
};

template <typename T>
struct Operands {
  Lines<T> q, k, v, dout;
  __device__ __forceinline__ Operands(const BwdParams& p, int64_t h, const Labels& labels,
                                      const Statistics& stats)
      : q{static_cast<const T*>(p.q) + h * p.d, p.h * p.d, p.d, stats.live_row},
        k{static_cast<const T*>(p.k) + h / (p.h / p.g) * p.d, p.g * p.d, p.d, labels.k_row},
        v{static_cast<const T*>(p.v) + h / (p.h / p.g) * p.e, p.g * p.e, p.e, labels.k_row},
        dout{static_cast<const T*>(p.dout) + h * p.e, p.h * p.e, p.e, stats.live_row} {}
};

// The weights of a tile (after dropout), the gradient of its scores, and of scale * q.k. The tile's
// first query is i0, its first key j0.
template <typename T>
__device__ __forceinline__ void gradients(const Head& head, const Operands<T>& x,
                                          const Labels& labels, const Statistics& stats, int64_t i0,
                                          int64_t j0, float* stage, float (&weight)[4][4],
                                          float (&dscore)[4][4], float (&ddot)[4][4]) {
  float dweight[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) weight[i][j] = 0.f;
  dot(weight, x.q, x.k, stage);
  dot(dweight, x.dout, x.v, stage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = 4 * ty() + i, c = 4 * tx() + j;
      float bend = 0.f;
      const bool sees =
          stats.live_row[r] >= 0 && labels.meet(r, c) && head.in_window(i0 + r, j0 + c);
      const float kept = sees ? head.kept(i0 + r, j0 + c) : 0.f;
      const float share =
          sees ? expf(head.score(i0 + r, j0 + c, weight[i][j], bend) - stats.lse[r]) : 0.f;
      weight[i][j] = share * kept;
      dscore[i][j] = sees ? share * (kept * dweight[i][j] - stats.delta[r]) : 0.f;
      ddot[i][j] = dscore[i][j] * bend;
    }
}

// Enqueues dbias alone: any dtype, any head dim. In bias.cu, for the backward of every family.
cudaError_t launch_backward_bias(const BwdParams& p, cudaStream_t stream);

}  // namespace flashjax::simt
