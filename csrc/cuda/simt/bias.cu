// The gradient of the bias, by itself: where a faster family does not write it.
#include "gradient.cuh"

namespace flashjax::simt {
namespace {

// dbias: a block owns a 64 x 64 tile of one [s?, t?] plane, and walks everything that was broadcast
// from it.
template <typename T>
static __global__ void __launch_bounds__(kThreads)
    backward_bias(const __grid_constant__ BwdParams p) {
  __shared__ __align__(16) float stage[kStage];
  __shared__ __align__(16) float tile[kTile * kPitch];
  __shared__ Labels labels;
  __shared__ Statistics stats;

  const Broadcast<5>& shape = p.bias_shape;
  const bool all_i = shape.dim[3] == 1, all_j = shape.dim[4] == 1;
  const int64_t tiles_i = (shape.dim[3] + kTile - 1) / kTile,
                tiles_j = (shape.dim[4] + kTile - 1) / kTile;
  int64_t x = blockIdx.x;
  const int64_t own_j = digit(x, tiles_j) * kTile, own_i = digit(x, tiles_i) * kTile;
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
  const int64_t plane = at[0] * shape.stride[0] + at[1] * shape.stride[1] + at[2] * shape.stride[2];
  for (int y = threadIdx.x; y < kTile * kTile; y += kThreads) {
    const int r = y / kTile, c = y % kTile;
    if (own_i + r >= shape.dim[3] || own_j + c >= shape.dim[4]) continue;
    float total = 0.f;  // rows and columns that were broadcast add up here
    for (int i = r; i < (all_i ? kTile : r + 1); ++i)
      for (int j = c; j < (all_j ? kTile : c + 1); ++j) total += tile[i * kPitch + j];
    const int64_t to = plane + (own_i + r) * shape.stride[3] + (own_j + c) * shape.stride[4];
    if (p.dbias16)
      store(static_cast<T*>(p.dbias16) + to, total);
    else
      p.dbias[to] = total;
  }
}

template <DType kType>
cudaError_t launch_as(const BwdParams& p, cudaStream_t stream) {
  const int64_t* dim = p.bias_shape.dim;
  const int64_t planes = dim[0] * dim[1] * dim[2];
  return launch(planes * parts(dim[3], kTile) * parts(dim[4], kTile), stream,
                backward_bias<typename TypeOf<kType>::type>, p);
}

}  // namespace

cudaError_t launch_backward_bias(const BwdParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kF32:
      return launch_as<DType::kF32>(p, stream);
    case DType::kBF16:
      return launch_as<DType::kBF16>(p, stream);
    default:
      return launch_as<DType::kF16>(p, stream);
  }
}

}  // namespace flashjax::simt
