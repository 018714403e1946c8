// The portable backward: every option but keys read through a table. Nothing is added by two
// blocks, so it is deterministic, and it needs no workspace: dq, then dk and dv, then what was
// asked for of dbias and dsinks, each by a kernel that recomputes the tiles it needs.
#pragma once
#include "../launch.h"
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
        delta[r] = l == -INFINITY ? 0.f : sum - p.dlse[at];
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

// The weights of a tile, the gradient of its scores, and of scale * q.k. The tile's first query is
// i0, its first key j0.
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
      weight[i][j] =
          sees ? expf(head.score(i0 + r, j0 + c, weight[i][j], bend) - stats.lse[r]) : 0.f;
      dscore[i][j] = sees ? weight[i][j] * (dweight[i][j] - stats.delta[r]) : 0.f;
      ddot[i][j] = dscore[i][j] * bend;
    }
}

struct BackwardGrid {
  int64_t tiles, chunks;
};

// dq: a block owns 64 rows of q for one head and 128 columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_q(const __grid_constant__ BwdParams p, BackwardGrid grid) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float tile[kTile * kPitch];
  __shared__ Labels labels;
  __shared__ Statistics stats;

  int64_t x = blockIdx.x;
  const int64_t r0 = x % grid.tiles * kTile;
  x /= grid.tiles;
  const int64_t c0 = x % grid.chunks * kColumns;
  x /= grid.chunks;
  const int64_t h = x % p.h, b = x / p.h;
  const int64_t r1 = imin(r0 + kTile, p.s);
  const Operands<T> operands(p, h, labels, stats);

  float dq[4][8] = {};
  const int32_t* cu = p.cu_seqlens_q ? p.cu_seqlens_q + b * (p.n + 1) : nullptr;
  const int64_t n1 = cu ? p.n : imin(p.n, 1);
  for (int64_t n = cu ? first_sequence(cu, p.n, r0) : 0; n < n1 && (!cu || cu[n] < r1); ++n) {
    const Sequence z = sequence(p, b, n);
    const Range mine{imax(r0 - z.q_begin, 0), imin(r1 - z.q_begin, z.q_len)};
    if (mine.begin >= mine.end) continue;
    const Head head(p, b, n, h, z);
    const int64_t i0 = r0 - z.q_begin;
    __syncthreads();
    labels.set_queries(p, z, b, i0, mine);
    __syncthreads();
    stats.set<T>(p, labels, b, h);
    const Range keys = visible_keys(p, z, mine.begin, mine.end);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kTile) {
      labels.set_keys(p, z, b, j0, keys);
      float weight[4][4], dscore[4][4], ddot[4][4];
      gradients(head, operands, labels, stats, i0, j0, stage, weight, dscore, ddot);
      put_transposed(tile, ddot);
      combine(dq, tile, operands.k, c0, stage);
    }
  }
  const float factor[4] = {p.scale, p.scale, p.scale, p.scale};
  write(static_cast<T*>(p.dq) + h * p.d, p.h * p.d, b * p.s + r0, r1 - r0, c0, p.d, dq, factor);
}

// dk and dv: a block owns 64 rows of k for one key head and 128 columns of each; it walks all query
// heads of the group.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kv(const __grid_constant__ BwdParams p, BackwardGrid grid) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float tile[kTile * kPitch];
  __shared__ Labels labels;
  __shared__ Statistics stats;

  int64_t x = blockIdx.x;
  const int64_t r0 = x % grid.tiles * kTile;
  x /= grid.tiles;
  const int64_t c0 = x % grid.chunks * kColumns;
  x /= grid.chunks;
  const int64_t g = x % p.g, b = x / p.g, group = p.h / p.g;
  const int64_t r1 = imin(r0 + kTile, p.t);

  float dk[4][8] = {}, dv[4][8] = {};
  const int32_t* cu = p.cu_seqlens_k ? p.cu_seqlens_k + b * (p.n + 1) : nullptr;
  const int64_t n1 = cu ? p.n : imin(p.n, 1);
  for (int64_t n = cu ? first_sequence(cu, p.n, r0) : 0; n < n1 && (!cu || cu[n] < r1); ++n) {
    const Sequence z = sequence(p, b, n);
    const Range mine{imax(r0 - z.k_begin, 0), imin(r1 - z.k_begin, z.k_len)};
    if (mine.begin >= mine.end) continue;
    const int64_t j0 = r0 - z.k_begin;
    __syncthreads();
    labels.set_keys(p, z, b, j0, mine);
    const Range queries = visible_queries(p, z, mine.begin, mine.end);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      const Head head(p, b, n, h, z);
      const Operands<T> operands(p, h, labels, stats);
      for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kTile) {
        __syncthreads();
        labels.set_queries(p, z, b, i0, queries);
        __syncthreads();
        stats.set<T>(p, labels, b, h);
        __syncthreads();
        float weight[4][4], dscore[4][4], ddot[4][4];
        gradients(head, operands, labels, stats, i0, j0, stage, weight, dscore, ddot);
        put(tile, weight);
        combine(dv, tile, operands.dout, c0, stage);
        put(tile, ddot);
        combine(dk, tile, operands.q, c0, stage);
      }
    }
  }
  const float scale[4] = {p.scale, p.scale, p.scale, p.scale}, one[4] = {1.f, 1.f, 1.f, 1.f};
  write(static_cast<T*>(p.dk) + g * p.d, p.g * p.d, b * p.t + r0, r1 - r0, c0, p.d, dk, scale);
  write(static_cast<T*>(p.dv) + g * p.e, p.g * p.e, b * p.t + r0, r1 - r0, c0, p.e, dv, one);
}

// dbias: a block owns a 64 x 64 tile of one [s?, t?] plane, and walks everything that was broadcast
// from it.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_bias(const __grid_constant__ BwdParams p) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float tile[kTile * kPitch];
  __shared__ Labels labels;
  __shared__ Statistics stats;

  const Broadcast<5>& shape = p.bias_shape;
  const bool all_i = shape.dim[3] == 1, all_j = shape.dim[4] == 1;
  const int64_t tiles_i = (shape.dim[3] + kTile - 1) / kTile,
                tiles_j = (shape.dim[4] + kTile - 1) / kTile;
  int64_t x = blockIdx.x;
  const int64_t own_j = x % tiles_j * kTile;
  x /= tiles_j;
  const int64_t own_i = x % tiles_i * kTile;
  x /= tiles_i;
  const int64_t at[3] = {x / shape.dim[2] / shape.dim[1], x / shape.dim[2] % shape.dim[1],
                         x % shape.dim[2]};
  const int64_t extent[3] = {p.b, p.n, p.h};
  Range over[3];
  for (int a = 0; a < 3; ++a)
    over[a] = shape.dim[a] == 1 ? Range{0, extent[a]} : Range{at[a], at[a] + 1};

  float sum[4][4] = {};
  for (int64_t b = over[0].begin; b < over[0].end; ++b)
    for (int64_t n = over[1].begin; n < over[1].end; ++n) {
      const Sequence z = sequence(p, b, n);
      const Range queries = all_i ? Range{0, z.q_len} : Range{own_i, imin(own_i + kTile, z.q_len)};
      for (int64_t h = over[2].begin; h < over[2].end; ++h) {
        const Head head(p, b, n, h, z);
        const Operands<T> operands(p, h, labels, stats);
        for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kTile) {
          const Range rows{i0, imin(i0 + kTile, queries.end)};
          Range keys = visible_keys(p, z, rows.begin, rows.end);
          if (!all_j) keys = {imax(keys.begin, own_j), imin(keys.end, own_j + kTile)};
          if (keys.begin >= keys.end) continue;
          __syncthreads();
          labels.set_queries(p, z, b, i0, rows);
          __syncthreads();
          stats.set<T>(p, labels, b, h);
          for (int64_t j0 = all_j ? keys.begin : own_j; j0 < keys.end; j0 += kTile) {
            __syncthreads();
            labels.set_keys(p, z, b, j0, keys);
            float weight[4][4], dscore[4][4], ddot[4][4];
            gradients(head, operands, labels, stats, i0, j0, stage, weight, dscore, ddot);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j) sum[i][j] += dscore[i][j];
          }
        }
      }
    }

  put(tile, sum);
  __syncthreads();
  float* dbias =
      p.dbias + at[0] * shape.stride[0] + at[1] * shape.stride[1] + at[2] * shape.stride[2];
  for (int y = threadIdx.x; y < kTile * kTile; y += kThreads) {
    const int r = y / kTile, c = y % kTile;
    if (own_i + r >= shape.dim[3] || own_j + c >= shape.dim[4]) continue;
    float total = 0.f;  // rows and columns that were broadcast add up here
    for (int i = r; i < (all_i ? kTile : r + 1); ++i)
      for (int j = c; j < (all_j ? kTile : c + 1); ++j) total += tile[i * kPitch + j];
    dbias[(own_i + r) * shape.stride[3] + (own_j + c) * shape.stride[4]] = total;
  }
}

// dsinks: a block owns one element; a sink takes the weight exp(sink - lse) from every query of its
// head.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_sinks(const __grid_constant__ BwdParams p) {
  __shared__ float partial[kThreads / 32];
  const int64_t h = blockIdx.x % p.h, own = blockIdx.x / p.h;
  const Range rows = p.sinks_shape.dim[0] == 1 ? Range{0, p.b} : Range{own, own + 1};
  const float sink = p.sinks[own * p.sinks_shape.stride[0] + h * p.sinks_shape.stride[1]];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total = 0.f;
  for (int64_t b = rows.begin; b < rows.end; ++b)
    for (int64_t n = 0; n < p.n; ++n) {
      const Sequence z = sequence(p, b, n);
      for (int64_t i = warp; i < z.q_len; i += kThreads / 32) {
        const int64_t row = z.q_begin + i, at = (b * p.h + h) * p.s + row;
        const float lse = p.lse[at];
        if (lse == -INFINITY) continue;
        const T* dout = static_cast<const T*>(p.dout) + ((b * p.s + row) * p.h + h) * p.e;
        const T* out = static_cast<const T*>(p.out) + ((b * p.s + row) * p.h + h) * p.e;
        float sum = 0.f;
        for (int64_t x = lane; x < p.e; x += 32) sum += to_float(dout[x]) * to_float(out[x]);
#pragma unroll
        for (int x = 16; x; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
        total += expf(sink - lse) * (p.dlse[at] - sum);
      }
    }
  if (lane == 0) partial[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0.f;
    for (float x : partial) total += x;
    p.dsinks[own * p.sinks_shape.stride[0] + h * p.sinks_shape.stride[1]] = total;
  }
}

template <DType kType, int kD, int kE, int kM, int kN, cuda::Variant>
cudaError_t launch_backward(const BwdParams& p, const cuda::Device&, cudaStream_t stream) {
  static_assert(kM == kTile && kN == kTile, "the tile of kernels.def");
  using T = typename TypeOf<kType>::type;
  auto launch = [&](int64_t blocks, auto kernel, auto... more) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, more...);
    return cudaGetLastError();
  };
  auto over = [](int64_t extent, int64_t part) { return (extent + part - 1) / part; };
  const BackwardGrid q{over(p.s, kTile), over(p.d, kColumns)};
  const BackwardGrid kv{over(p.t, kTile), over(imax(p.d, p.e), kColumns)};
  cudaError_t error = launch(q.tiles * q.chunks * p.h * p.b, backward_q<T>, q);
  error = cuda::first_error(error, launch(kv.tiles * kv.chunks * p.g * p.b, backward_kv<T>, kv));
  if (p.dbias) {
    const int64_t* dim = p.bias_shape.dim;
    error = cuda::first_error(
        error, launch(dim[0] * dim[1] * dim[2] * over(dim[3], kTile) * over(dim[4], kTile),
                      backward_bias<T>));
  }
  if (p.dsinks)
    error = cuda::first_error(
        error, launch(p.sinks_shape.dim[0] * p.sinks_shape.dim[1], backward_sinks<T>));
  return error;
}

}  // namespace flashjax::simt
