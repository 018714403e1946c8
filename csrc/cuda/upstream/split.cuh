// FlashAttention-2's forward with the keys of a sequence split over CTAs: for few queries, which
// would leave most of a GPU idle, and for keys in pages, which only this kernel of upstream's
// reads. Each CTA leaves a partial result in the workspace; `combine` adds them up.
#pragma once
#include "../simt/score.cuh"
#include "finish.cuh"
#include "translate.h"
// After ours, which have BlockInfo.
#include "flash_fwd_kernel.h"

namespace flashjax::upstream {

struct SplitArgs : Arguments<flash::Flash_fwd_params> {
  const int32_t* bad;  // [b]: rows with a page id that does not exist
  int fold;            // query heads that stand as queries of their key head; 1: none
};

template <typename Traits, int kOptions>
static __global__ void split_forward(const __grid_constant__ SplitArgs args) {
  const Tile tile = args.tile();
  SplitArgs a = args;
  if constexpr (kOptions & kLocal) move_window(a, tile.part);
  if (a.parts.list)
    a.seqlen_k = a.parts.list[tile.part].k_len;  // splits are parts of what is there
  flash::compute_attn_1rowblock_splitkv<
      Traits, false, bool(kOptions & kLocal), bool(kOptions & kWithAlibi), false,
      bool(kOptions & kEvenDim), bool(kOptions & kWithSoftcap), true, false>(
      a, tile.part, blockIdx.y, tile.index, blockIdx.z, gridDim.z);
}

// out and lse from the splits'; rows outside every sequence, and sinks. A warp does a query of a
// head.
template <typename T, int D>
static __global__ void __launch_bounds__(32 * kWarps)
    combine(const __grid_constant__ SplitArgs a, const __grid_constant__ FwdParams p, int splits) {
  const Query query(p);  // upstream's [b, a.h, a.seqlen_q] is [b, h, s] in memory
  if (!query.exists(p)) return;
  const int lane = threadIdx.x % 32;
  const int64_t count = p.b * p.h * p.s;
  const bool inside = !a.parts.list || query.i < a.parts.list[query.b].q_len;
  const float* lses = static_cast<const float*>(a.softmax_lseaccum_ptr) + query.x;
  const float sink = inside ? sink_of(p, query.b, query.h) : -INFINITY;
  float most = sink;
  for (int split = 0; inside && split < splits; ++split) most = fmaxf(most, lses[split * count]);
  float sum[D / 32] = {}, total = 0.f;
  if (most != -INFINITY) {
    total = expf(sink - most);
    for (int split = 0; split < splits; ++split) {
      const float weight = expf(lses[split * count] - most);
      total += weight;
      if (weight == 0.f) continue;
      const float* part = static_cast<const float*>(a.oaccum_ptr) + (split * count + query.x) * D;
#pragma unroll
      for (int j = 0; j < D / 32; ++j) sum[j] += weight * part[32 * j + lane];
    }
  }
  query.store<T, D>(p, sum, total, most);
}

// Page ids that exist, and which rows had others among the pages that they use.
static __global__ void check_pages(const __grid_constant__ Problem p, int32_t* table,
                                   int32_t* bad) {
  const int64_t b = blockIdx.x;
  const Sequence z = sequence(p, b, 0);
  int wrong = 0;
  for (int64_t x = threadIdx.x; x < p.p; x += blockDim.x) {
    const int32_t id = p.page_table[b * p.p + x];
    const bool exists = id >= 0 && id < p.c;
    table[b * p.p + x] = exists ? id : 0;
    wrong |= !exists && x * p.page < z.k_begin + z.k_len;
  }
  wrong = __syncthreads_or(wrong);
  if (threadIdx.x == 0) bad[b] = wrong;
}

// Rows with bad page ids, key by key: upstream cannot leave out a page. A warp does a query of a
// head.
template <typename T, int D>
static __global__ void __launch_bounds__(32 * kWarps)
    mend(const __grid_constant__ FwdParams p, const int32_t* bad) {
  const Query query(p);
  if (!query.exists(p)) return;
  const int64_t b = query.b, h = query.h, i = query.i, g = h / (p.h / p.g);
  const Sequence z = sequence(p, b, 0);
  if (!bad[b] || i >= z.q_len) return;
  const simt::Head head(p, b, 0, h, z);
  const int lane = threadIdx.x % 32;
  const T* q = static_cast<const T*>(p.q) + ((b * p.s + i) * p.h + h) * p.d;
  float sum[D / 32] = {}, most = sink_of(p, b, h), total = most == -INFINITY ? 0.f : 1.f;
  const Range keys = visible_keys(p, z, i, i + 1);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const int64_t row = key_row(p, b, z, j);
    if (row < 0) continue;
    const T* k = static_cast<const T*>(p.k) + (row * p.g + g) * p.d;
    const T* v = static_cast<const T*>(p.v) + (row * p.g + g) * p.e;
    float dot = 0.f, bend;
    for (int c = lane; c < p.d; c += 32) dot += static_cast<float>(q[c]) * static_cast<float>(k[c]);
#pragma unroll
    for (int c = 16; c; c /= 2) dot += __shfl_xor_sync(~0u, dot, c);
    const float score = head.score(i, j, dot, bend), top = fmaxf(most, score);
    const float shrink = most == -INFINITY ? 0.f : expf(most - top), weight = expf(score - top);
    most = top, total = total * shrink + weight;
#pragma unroll
    for (int c = 0; c < D / 32; ++c)
      sum[c] = sum[c] * shrink +
               (32 * c + lane < p.e ? weight * static_cast<float>(v[32 * c + lane]) : 0.f);
  }
  query.store<T, D>(p, sum, total, most);
}

template <typename T, int D, int N, int kOptions>
cudaError_t launch_split(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  using Traits = Flash_fwd_kernel_traits<D, 64, N, 4, false, false, T>;
  auto a = translate<SplitArgs>(p, D);
  Workspace space(p.workspace, p.workspace_bytes);
  const int64_t ratio = p.h / p.g, rows = p.b * p.h * p.s;
  a.b = static_cast<int>(p.b);
  // One query: a window says which keys, and the heads that share a key head are its queries.
  const bool one = sees_a_range(p);
  a.fold = one ? static_cast<int>(ratio) : 1;
  if (one) {
    a.h = static_cast<int>(p.g), a.h_h_k_ratio = 1;
    a.seqlen_q = a.parts.s = static_cast<int>(ratio), a.parts.h = a.h;
    a.window_size_left = a.window_size_right = static_cast<int>(p.t + ratio);
    a.q_head_stride = ratio * p.d, a.q_row_stride = p.d, a.parts.pitch = static_cast<int>(p.h);
  }
  int32_t* table = p.page_table ? space.take<int32_t>(p.b * p.p) : nullptr;
  int32_t* bad = p.page_table ? space.take<int32_t>(p.b) : nullptr;
  Problem shown = p;
  if (p.page_table && p.c == 0) shown.t = 0;
  int64_t tiles = 0;
  cudaError_t error = list(shown, a, space, {64, false, one ? a.fold : 0}, &tiles, stream);
  if (error != cudaSuccess) return error;
  if (p.page_table) {
    check_pages<<<static_cast<unsigned>(p.b), 128, 0, stream>>>(shown, table, bad);
    a.block_table = table, a.block_table_batch_stride = p.p;
    a.page_block_size = static_cast<int>(p.page);
    a.k_batch_stride = a.v_batch_stride = p.page * p.g * p.d;
  }
  const int64_t ctas = tiles * a.h, blocks = std::max<int64_t>((p.t + N - 1) / N, 1);
  int64_t splits = p.num_splits > 0 ? p.num_splits : std::max<int64_t>(2 * device.sms / ctas, 1);
  splits = std::min({splits, blocks, space.left() / ((rows * (D + 1) + 128) * 4)});
  if (splits < 1) return cudaErrorInvalidValue;
  a.oaccum_ptr = space.take<float>(splits * rows * D);
  a.softmax_lseaccum_ptr = space.take<float>(splits * rows);
  if (!space.suffices() || splits > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.h),
                  static_cast<unsigned>(splits));
  // Upstream's size leaves out the result in float32, which is larger than small blocks of keys.
  const int smem = std::max<int>(Traits::kSmemSize, 64 * D * 4);
  error = launch(split_forward<Traits, kOptions>, grid, Traits::kNThreads, smem, a, stream);
  if (error != cudaSuccess) return error;
  combine<T, D><<<blocks_of(rows), 32 * kWarps, 0, stream>>>(a, p, static_cast<int>(splits));
  if (p.page_table) mend<T, D><<<blocks_of(rows), 32 * kWarps, 0, stream>>>(p, bad);
  return cudaGetLastError();
}

template <typename T, int D, int N>
cudaError_t launch_split_row(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  // Upstream's has no dropout, and none for a diagonal or for full tiles.
  int options = options_of(p, D) & ~kEvenRows;
  if (options & kCausal) options ^= kCausal | kLocal;
  if (options == (kEvenDim | kLocal) && sees_a_range(p)) options = kEvenDim;
  return with_options<kCausal | kEvenRows | kWithDropout>(options, [&](auto x) {
    return launch_split<T, D, N, decltype(x)::value>(p, device, stream);
  });
}

template <typename T, int D, int N>
cudaError_t launch_split_forward(const FwdParams& p, const cuda::Device& device,
                                 cudaStream_t stream) {
  // A block of keys lies in one page.
  constexpr int kSmall = D % 64 == 0 ? 16 : 32;
  if (!p.page_table) return launch_split_row<T, D, N>(p, device, stream);
  if (p.page % 64 == 0) return launch_split_row<T, D, 64>(p, device, stream);
  return launch_split_row<T, D, kSmall>(p, device, stream);
}

}  // namespace flashjax::upstream
