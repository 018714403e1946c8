// Which queries meet which keys: the one place where lengths, alignment and windows turn into
// ranges. Both backends use it. Every value read from an array is clamped, so no index that follows
// from it leaves its array.
#pragma once
#include "params.h"

#ifdef __CUDACC__
#define FLASHJAX_HD __host__ __device__ __forceinline__
#else
// static: the CPU kernels are compiled once per instruction set, and a linker must not mix their
// copies.
#define FLASHJAX_HD static inline
#endif

namespace flashjax {

FLASHJAX_HD int64_t imin(int64_t x, int64_t y) { return x < y ? x : y; }
FLASHJAX_HD int64_t imax(int64_t x, int64_t y) { return x < y ? y : x; }
FLASHJAX_HD int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return imax(lo, imin(x, hi)); }

struct Range {
  int64_t begin, end;  // begin <= end
};

// Sequence i of row b. Query i of it is row q_begin + i of q[b]; key j of it is key k_begin + j of
// the row.
struct Sequence {
  int64_t q_begin, q_len;
  int64_t k_begin, k_len;
  int64_t diagonal;  // query i sits on key i + diagonal
};

FLASHJAX_HD Sequence sequence(const Problem& p, int64_t b, int64_t i) {
  Sequence z{0, p.s, 0, p.t, 0};
  if (p.cu_seqlens_q) {
    const int32_t* cu = p.cu_seqlens_q + b * (p.n + 1) + i;
    z.q_begin = clamp(cu[0], 0, p.s);
    z.q_len = clamp(cu[1], z.q_begin, p.s) - z.q_begin;
  }
  if (p.cu_seqlens_k) {
    const int32_t* cu = p.cu_seqlens_k + b * (p.n + 1) + i;
    z.k_begin = clamp(cu[0], 0, p.t);
    z.k_len = clamp(cu[1], z.k_begin, p.t) - z.k_begin;
  }
  if (p.max_seqlen_q >= 0) z.q_len = imin(z.q_len, p.max_seqlen_q);
  if (p.max_seqlen_k >= 0) z.k_len = imin(z.k_len, p.max_seqlen_k);
  if (p.seqused_q) z.q_len = clamp(p.seqused_q[b * p.n + i], 0, z.q_len);
  if (p.seqused_k) z.k_len = clamp(p.seqused_k[b * p.n + i], 0, z.k_len);
  if (p.leftpad) {
    int64_t pad = clamp(p.leftpad[b], 0, z.k_len);
    z.k_begin += pad;
    z.k_len -= pad;
  }
  if (p.batch_idx && (p.batch_idx[b] < 0 || p.batch_idx[b] >= p.c)) z.k_len = 0;
  z.diagonal = p.top_left ? 0 : z.k_len - z.q_len;
  if (p.shift) z.diagonal += p.shift[b];
  return z;
}

// The keys that at least one of the queries [i0, i1) may see, masks by value (segments) aside.
FLASHJAX_HD Range visible_keys(const Problem& p, const Sequence& z, int64_t i0, int64_t i1) {
  int64_t begin = p.window_left < 0 ? 0 : clamp(i0 + z.diagonal - p.window_left, 0, z.k_len);
  int64_t end = p.window_right < 0 ? z.k_len : clamp(i1 + z.diagonal + p.window_right, 0, z.k_len);
  return {begin, imax(begin, end)};
}

// The queries that may see at least one of the keys [j0, j1).
FLASHJAX_HD Range visible_queries(const Problem& p, const Sequence& z, int64_t j0, int64_t j1) {
  int64_t begin = p.window_right < 0 ? 0 : clamp(j0 - z.diagonal - p.window_right, 0, z.q_len);
  int64_t end = p.window_left < 0 ? z.q_len : clamp(j1 - z.diagonal + p.window_left, 0, z.q_len);
  return {begin, imax(begin, end)};
}

// Every one of the queries [i0, i1) sees all keys of this range (empty if there is none).
FLASHJAX_HD Range common_keys(const Problem& p, const Sequence& z, int64_t i0, int64_t i1) {
  int64_t begin = p.window_left < 0 ? 0 : clamp(i1 - 1 + z.diagonal - p.window_left, 0, z.k_len);
  int64_t end =
      p.window_right < 0 ? z.k_len : clamp(i0 + 1 + z.diagonal + p.window_right, 0, z.k_len);
  return {begin, imax(begin, end)};
}

// Row of k (and v), counted over [c, t] or [c, page], that holds key j of a sequence of row b; -1:
// the page id is bad.
FLASHJAX_HD int64_t key_row(const Problem& p, int64_t b, const Sequence& z, int64_t j) {
  int64_t row = z.k_begin + j;
  if (p.page_table) {
    int64_t id = p.page_table[b * p.p + row / p.page];
    return id < 0 || id >= p.c ? -1 : id * p.page + row % p.page;
  }
  return (p.batch_idx ? p.batch_idx[b] : b) * p.t + row;
}

}  // namespace flashjax
