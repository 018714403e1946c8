// From our parameters to FlashAttention-2's: what both directions share. Host.
#pragma once
#include <algorithm>
#include <cmath>

#include "flash.cuh"

namespace flashjax::upstream {

// The workspace, cut into arrays. Asked for more than there is, it says so once, at the end.
class Workspace {
 public:
  Workspace(void* data, int64_t bytes) : at_(static_cast<char*>(data)), left_(bytes) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    T* data = reinterpret_cast<T*>(at_);
    at_ += bytes, left_ -= bytes;
    return data;
  }
  bool suffices() const { return left_ >= 0; }
  int64_t left() const { return left_; }

 private:
  char* at_;
  int64_t left_;
};

// Does every query see a key?
inline bool all_see(const Problem& p) {
  if (!is_whole(p) || p.t == 0) return false;
  const int64_t diagonal = p.top_left ? 0 : p.t - p.s;
  return !(p.window_right >= 0 && diagonal + p.window_right < 0) &&
         !(p.window_left >= 0 && p.s - 1 + diagonal - p.window_left > p.t - 1);
}

// One query of a row, no distances: what it sees is a range of keys.
inline bool sees_a_range(const Problem& p) {
  return p.s == 1 && !p.alibi_slopes && (!p.page_table || p.window_left < 0);
}

// Which kernel of a row of head dim `head_dim` serves a call.
inline int options_of(const Problem& p, int head_dim) {
  const int extras = (p.alibi_slopes ? kWithAlibi : 0) | (p.softcap != 0 ? kWithSoftcap : 0) |
                     (p.dropout_seed ? kWithDropout : 0);
  if (extras || p.d != head_dim) return kLocal | extras;
  const bool corner = !p.shift && (!p.top_left || (is_whole(p) && p.s == p.t));
  const bool masked = p.window_left >= 0 || p.window_right >= 0;
  const bool causal = p.window_left < 0 && p.window_right == 0 && corner;
  if (masked && !causal) return kEvenDim | kLocal;
  // Full tiles alone, whatever their size; (blocks, heads, rows) is a grid.
  const bool even =
      is_whole(p) && p.n == 1 && p.b <= 65535 && p.t > 0 && p.s % 128 == 0 && p.t % 128 == 0;
  return kEvenDim | (causal ? kCausal : 0) | (even ? kEvenRows : 0);
}

template <typename Args>
Args translate(const Problem& p, int head_dim) {
  Args a{};
  a.q_ptr = const_cast<void*>(p.q), a.k_ptr = const_cast<void*>(p.k);
  a.v_ptr = const_cast<void*>(p.v);
  a.q_row_stride = p.h * p.d, a.k_row_stride = a.v_row_stride = p.g * p.d;
  a.q_head_stride = a.k_head_stride = a.v_head_stride = p.d;
  a.o_row_stride = a.q_row_stride, a.o_head_stride = p.d;
  a.h = static_cast<int>(p.h), a.h_k = static_cast<int>(p.g);
  a.h_h_k_ratio = static_cast<int>(p.h / p.g);
  a.b = static_cast<int>(p.n);  // where upstream adds room for each part of a row
  a.d = static_cast<int>(p.d), a.d_rounded = head_dim;
  a.seqlen_q = a.total_q = static_cast<int>(p.s), a.seqlen_k = static_cast<int>(p.t);
  a.seqlen_q_rounded = -1;  // see BlockInfo::q_offset
  a.unpadded_lse = true;
  const bool capped = p.softcap != 0;
  const float log2e = 1.44269504088896340736f;
  a.softcap = capped ? p.scale / p.softcap : 0.f;
  a.scale_softmax = capped ? p.softcap : p.scale;
  a.scale_softmax_log2 = a.scale_softmax * log2e;
  a.p_dropout = a.rp_dropout = 1.f;
  if (p.dropout_seed) {
    a.p_dropout_in_uint8_t = static_cast<uint8_t>(p.dropout_keep - 1);
    a.p_dropout = static_cast<float>(p.dropout_keep) / 256.f, a.rp_dropout = 1.f / a.p_dropout;
    a.seeds = p.dropout_seed;
  }
  a.scale_softmax_rp_dropout = a.scale_softmax * a.rp_dropout;
  // Windows count from the corner diagonal; without a bound, further than any key is away.
  const int64_t far = p.s + p.t, move = is_whole(p) && p.top_left ? p.s - p.t : 0;
  auto bound = [&](int64_t x) { return static_cast<int>(x < 0 || x > far ? far : x); };
  a.window_size_left = bound(p.window_left) - static_cast<int>(move);
  a.window_size_right = bound(p.window_right) + static_cast<int>(move);
  a.alibi_slopes_ptr = const_cast<float*>(p.alibi_slopes);
  a.parts = {nullptr,
             static_cast<int>(p.n),
             a.seqlen_q,
             a.seqlen_k,
             a.h,
             a.seqlen_q,
             static_cast<int>(p.s + kPad * p.n)};
  return a;
}

// Upstream reads a slope of each part.
static __global__ void spread_slopes(const float* slopes, int64_t row_stride, int h, int n,
                                     int64_t count, float* out) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x < count) out[x] = slopes[x / h / n * row_stride + x % h];
}

// The list of parts, and of their tiles; and what else goes by part.
template <typename Args>
cudaError_t list(const Problem& p, Args& a, Workspace& space, Walk walk, int64_t* tiles,
                 cudaStream_t stream) {
  const int64_t extent = walk.of_keys ? p.t : walk.fold ? walk.fold : p.s, parts = p.b * p.n;
  const bool masked = p.window_left >= 0 || p.window_right >= 0;
  const bool whole = is_whole(p) && p.n == 1 && !(walk.fold && masked);
  const bool tiled = !whole && (p.n > 1 || p.cu_seqlens_q || p.cu_seqlens_k);
  a.blocks = static_cast<int>((extent + walk.size - 1) / walk.size);
  *tiles = tiled ? tiles_of(p, extent, walk.size) : p.b * a.blocks;
  Part* part = whole ? nullptr : space.take<Part>(parts);
  Tile* tile = tiled ? space.take<Tile>(*tiles) : nullptr;
  const int64_t slopes = p.alibi_slopes && p.n > 1 && p.alibi_shape.stride[0] ? parts * p.h : 0;
  float* slope = slopes ? space.take<float>(slopes) : nullptr;
  if (!space.suffices()) return cudaErrorInvalidValue;
  // Upstream counts rows of statistics with ints.
  const bool countable = p.b * p.h * (p.s + kPad * p.n) <= INT32_MAX && p.s + p.t <= INT32_MAX;
  if (!countable || *tiles > INT32_MAX || p.h > 65535) return cudaErrorInvalidConfiguration;
  a.alibi_slopes_batch_stride = p.alibi_shape.stride[0];
  if (slopes) {
    spread_slopes<<<static_cast<unsigned>((slopes + 255) / 256), 256, 0, stream>>>(
        p.alibi_slopes, p.alibi_shape.stride[0], a.h, a.parts.n, slopes, slope);
    a.alibi_slopes_ptr = slope, a.alibi_slopes_batch_stride = p.h;
  }
  if (!whole) {
    list_parts<<<1, 1024, 0, stream>>>(p, part, tile, static_cast<int>(*tiles), walk);
    a.parts.list = part, a.tiles = tile;
  }
  return cudaGetLastError();
}

// Sets what a kernel needs of shared memory, and launches it.
template <typename Kernel, typename Args>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int smem, const Args& a,
                   cudaStream_t stream) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, smem, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace flashjax::upstream
