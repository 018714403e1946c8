// The portable forward: every option of params.h, any dtype, any GPU. A block owns 64 rows of q for
// one head and 128 columns of out; it walks the sequences that own those rows, so rows that belong
// to none are written too.
#pragma once
#include "grid.cuh"
#include "score.cuh"

namespace flashjax::simt {

template <typename T>
static __global__ void __launch_bounds__(kThreads)
    forward(const __grid_constant__ FwdParams p, Grid grid) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float weights[kTile * kPitch];
  __shared__ Labels labels;

  int64_t x = blockIdx.x;
  const int64_t r0 = digit(x, grid.tiles) * kTile, c0 = digit(x, grid.chunks) * kColumns;
  const int64_t h = x % p.h, b = x / p.h, g = h / (p.h / p.g);
  const int64_t r1 = imin(r0 + kTile, p.s);

  const Lines<T> q{static_cast<const T*>(p.q) + h * p.d, p.h * p.d, p.d, labels.q_row};
  const Lines<T> k{static_cast<const T*>(p.k) + g * p.d, p.g * p.d, p.d, labels.k_row};
  const Lines<T> v{static_cast<const T*>(p.v) + g * p.e, p.g * p.e, p.e, labels.k_row};

  float out[4][8] = {}, top[4], total[4] = {};
  bool inside[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) top[i] = -INFINITY;

  const int32_t* cu = p.cu_seqlens_q ? p.cu_seqlens_q + b * (p.n + 1) : nullptr;
  const int64_t n1 = cu ? p.n : imin(p.n, 1);
  for (int64_t n = cu ? first_sequence(cu, p.n, r0) : 0; n < n1 && (!cu || cu[n] < r1); ++n) {
    const Sequence z = sequence(p, b, n);
    const Range mine{imax(r0 - z.q_begin, 0), imin(r1 - z.q_begin, z.q_len)};
    if (mine.begin >= mine.end) continue;
    const Head head(p, b, n, h, z);
    const int64_t i0 = r0 - z.q_begin;  // of the tile's first row; may be negative
    __syncthreads();
    labels.set_queries(p, z, b, i0, mine);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int64_t at = i0 + 4 * ty() + i;
      inside[i] |= at >= mine.begin && at < mine.end;
    }
    const Range keys = visible_keys(p, z, mine.begin, mine.end);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kTile) {
      labels.set_keys(p, z, b, j0, keys);
      float s[4][4] = {};
      dot(s, q, k, stage);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float most = top[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int64_t qi = i0 + 4 * ty() + i, kj = j0 + 4 * tx() + j;
          float bend;
          bool sees = labels.meet(4 * ty() + i, 4 * tx() + j) && head.in_window(qi, kj);
          s[i][j] = sees ? head.score(qi, kj, s[i][j], bend) : -INFINITY;
          most = fmaxf(most, s[i][j]);
        }
#pragma unroll
        for (int lane = 1; lane < 16; lane *= 2)
          most = fmaxf(most, __shfl_xor_sync(~0u, most, lane));
        const float from = most == -INFINITY ? 0.f : most;
        const float shrink = expf(top[i] - from);  // 0 while nothing was seen
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += s[i][j] = expf(s[i][j] - from);
        if (head.seed) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (s[i][j] != 0.f) s[i][j] *= head.kept(i0 + 4 * ty() + i, j0 + 4 * tx() + j);
        }
        total[i] = total[i] * shrink + sum;
        top[i] = most;
#pragma unroll
        for (int j = 0; j < 8; ++j) out[i][j] *= shrink;
      }
      put_transposed(weights, s);
      combine(out, weights, v, c0, stage);
    }
  }

  float factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int lane = 1; lane < 16; lane *= 2) total[i] += __shfl_xor_sync(~0u, total[i], lane);
    if (p.sinks && inside[i]) {
      const float sink = p.sinks[b * p.sinks_shape.stride[0] + h * p.sinks_shape.stride[1]];
      const float most = fmaxf(top[i], sink);
      if (most != -INFINITY) {
        const float shrink = expf(top[i] - most);
        total[i] = total[i] * shrink + expf(sink - most);
#pragma unroll
        for (int j = 0; j < 8; ++j) out[i][j] *= shrink;
        top[i] = most;
      }
    }
    factor[i] = total[i] == 0.f ? 0.f : 1.f / total[i];
    if (c0 == 0 && tx() == 0 && r0 + 4 * ty() + i < r1)
      p.lse[(b * p.h + h) * p.s + r0 + 4 * ty() + i] =
          total[i] == 0.f ? -INFINITY : top[i] + logf(total[i]);
  }
  write(static_cast<T*>(p.out) + h * p.e, p.h * p.e, b * p.s + r0, r1 - r0, c0, p.e, out, factor);
}

template <DType kType, int kD, int kE, int kM, int kN, cuda::Variant>
cudaError_t launch_forward(const FwdParams& p, const cuda::Device&, cudaStream_t stream) {
  static_assert(kM == kTile && kN == kTile, "the tile of kernels.def");
  const Grid grid{parts(p.s, kTile), parts(p.e, kColumns)};
  return launch(grid.tiles * grid.chunks * p.h * p.b, stream, forward<typename TypeOf<kType>::type>,
                p, grid);
}

}  // namespace flashjax::simt
