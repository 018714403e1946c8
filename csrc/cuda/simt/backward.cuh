// The portable backward: every option but keys read through a table. Nothing is added by two
// blocks, so it is deterministic, and it needs no workspace: dq, then dk and dv, then what was
// asked for of dbias and dsinks, each by a kernel that recomputes the tiles it needs.
#pragma once
#include "gradient.cuh"

namespace flashjax::simt {

// dq: a block owns 64 rows of q for one head and 128 columns.
template <typename T>
static __global__ void __launch_bounds__(kThreads)
    backward_q(const __grid_constant__ BwdParams p, Grid grid) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float tile[kTile * kPitch];
  __shared__ Labels labels;
  __shared__ Statistics stats;

  int64_t x = blockIdx.x;
  const int64_t r0 = digit(x, grid.tiles) * kTile, c0 = digit(x, grid.chunks) * kColumns;
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
static __global__ void __launch_bounds__(kThreads)
    backward_kv(const __grid_constant__ BwdParams p, Grid grid) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float tile[kTile * kPitch];
  __shared__ Labels labels;
  __shared__ Statistics stats;

  int64_t x = blockIdx.x;
  const int64_t r0 = digit(x, grid.tiles) * kTile, c0 = digit(x, grid.chunks) * kColumns;
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

// dsinks: a block owns one element; a sink takes the weight exp(sink - lse) from every query of its
// head.
template <typename T>
static __global__ void __launch_bounds__(kThreads)
    backward_sinks(const __grid_constant__ BwdParams p) {
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
        total += expf(sink - lse) * ((p.dlse ? p.dlse[at] : 0.f) - sum);
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
  const Grid q{parts(p.s, kTile), parts(p.d, kColumns)};
  const Grid kv{parts(p.t, kTile), parts(imax(p.d, p.e), kColumns)};
  cudaError_t error = launch(q.tiles * q.chunks * p.h * p.b, stream, backward_q<T>, p, q);
  error = cuda::first_error(
      error, launch(kv.tiles * kv.chunks * p.g * p.b, stream, backward_kv<T>, p, kv));
  if (p.dbias || p.dbias16) error = cuda::first_error(error, launch_backward_bias(p, stream));
  if (p.dsinks)
    error = cuda::first_error(
        error, launch(p.sinks_shape.dim[0] * p.sinks_shape.dim[1], stream, backward_sinks<T>, p));
  return error;
}

}  // namespace flashjax::simt
