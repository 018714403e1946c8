// FlashAttention-2's device code, with sequences that come as parts. Upstream asks one type where a
// sequence lies, BlockInfo; its own is read under another name, and ours takes its place.
#pragma once
#define BlockInfo UpstreamBlockInfo
#include "block_info.h"
#undef BlockInfo

#include <type_traits>

#include "flash.h"
#include "parts.cuh"

namespace flash {

// `kVarlen` false: whole rows, whose lengths are multiples of the tile.
template <bool kVarlen = true>
struct BlockInfo {
  int row, in_row;  // part = row * n + in_row
  int q_begin, actual_seqlen_q, actual_seqlen_k;
  int64_t k_row;
  flashjax::upstream::Parts parts;
  static constexpr int leftpad_k = 0, seqlen_k_cache = 0;  // of a cache that upstream appends to

  template <typename Params>
  __device__ __forceinline__ BlockInfo(const Params& p, int part) : parts(p.parts) {
    if (!kVarlen || !parts.list) {
      row = part, in_row = 0, q_begin = 0;
      actual_seqlen_q = parts.s, actual_seqlen_k = parts.t;
      k_row = static_cast<int64_t>(part) * parts.t;
    } else {
      const flashjax::upstream::Part x = parts.list[part];
      row = part / parts.n, in_row = part % parts.n, q_begin = x.q_begin;
      actual_seqlen_q = x.q_len, actual_seqlen_k = x.k_len, k_row = x.k_row;
    }
  }

  // Offset of the part's first query. Upstream asks for it in arrays [row, h, s] of statistics,
  // with ints, and in arrays [row, s, ...], with index_t. Of both kinds some are the backward's
  // own, with room after each part; their batch stride is set negative. To those of statistics
  // upstream adds 128 for each part itself, as to none of the others.
  template <typename Index>
  __device__ __forceinline__ Index q_offset(Index batch_stride, Index row_stride, int) const {
    using flashjax::upstream::kPad;
    const bool own = batch_stride < 0;
    if constexpr (std::is_same_v<Index, int>)
      return own ? row * (parts.h * parts.rows - kPad * parts.n) + q_begin
                 : row * parts.h * parts.s + q_begin;
    else
      return (own ? Index{row} * parts.rows + q_begin + kPad * in_row
                  : Index{row} * parts.pitch + q_begin) *
             row_stride;
  }

  template <typename Index>
  __device__ __forceinline__ Index k_offset(Index, Index row_stride, int) const {
    return static_cast<Index>(k_row) * row_stride;
  }
};

}  // namespace flash

#include "kernel_traits.h"

namespace flashjax::upstream {

// What a kernel is compiled for.
enum Option : int {
  kCausal = 1,    // the diagonal ends at the last key, nothing else masks
  kLocal = 2,     // any window, any diagonal
  kEvenRows = 4,  // whole rows that fill their tiles
  kEvenDim = 8,   // d is the tile's
  kWithAlibi = 16,
  kWithSoftcap = 32,
  kWithDropout = 64,
};

// function(value, as a constant), if it is one of kEach and has no bit of kWithout; else `error`.
template <int kWithout, int... kEach, typename Function>
cudaError_t with_constant(int value, cudaError_t error, Function function) {
  auto attempt = [&](auto x) {
    if constexpr (!(decltype(x)::value & kWithout))
      if (value == x) error = function(x);
  };
  (attempt(std::integral_constant<int, kEach>{}), ...);
  return error;
}

// The kernels of a row: plain calls have some of their own, extras one for each set of them.
template <int kWithout, typename Function>
cudaError_t with_options(int options, Function function) {
  return with_constant<
      kWithout, kEvenDim, kEvenDim | kEvenRows, kEvenDim | kCausal, kEvenDim | kCausal | kEvenRows,
      kEvenDim | kLocal, kLocal, kLocal | kWithAlibi, kLocal | kWithSoftcap, kLocal | kWithDropout,
      kLocal | kWithAlibi | kWithSoftcap, kLocal | kWithAlibi | kWithDropout,
      kLocal | kWithSoftcap | kWithDropout, kLocal | kWithAlibi | kWithSoftcap | kWithDropout>(
      options, cudaErrorInvalidValue, function);
}

template <typename Params>
struct Arguments : Params {
  Parts parts;
  const Tile* tiles;  // null: blocks [0, blocks) of each row
  int blocks;
  const int32_t* seeds;  // [b, h, 2]

  // The part and the block of it that are this CTA's.
  __device__ __forceinline__ Tile tile() const {
    const int x = blockIdx.x;
    return tiles ? tiles[x] : Tile{x / blocks, x % blocks};
  }
};

// The random numbers of a part's head: a Philox stream of 64 bits of key, with the part's place in
// its row in the counter. Upstream adds 32 * (part * h + head) to the offset.
struct Stream {
  unsigned long long seed, offset;
  template <typename Args>
  __device__ __forceinline__ Stream(const Args& a, int part, int head) {
    const int row = part / a.parts.n, in_row = part % a.parts.n;
    const int32_t* words = a.seeds + 2 * (int64_t{row} * a.parts.h + head);
    seed = static_cast<unsigned long long>(static_cast<uint32_t>(words[1])) << 32 |
           static_cast<uint32_t>(words[0]);
    offset = 32ull * in_row - 32ull * (static_cast<unsigned long long>(part) * a.parts.h + head);
  }
};

// A window that upstream measures from the corner diagonal, for a part whose own is off it.
template <typename Args>
__device__ __forceinline__ void move_window(Args& a, int part) {
  if (!a.parts.list) return;
  const int move = a.parts.list[part].move;
  a.window_size_left -= move, a.window_size_right += move;
}

}  // namespace flashjax::upstream
