// What both directions know of a problem: its sizes, which keys a tile of queries sees, and how a
// score is made of q.k.
#pragma once
#include "ptx.cuh"

namespace flashjax::sm90 {

// Ids of rows outside every sequence of a packed row, where everything may be NaN. They match
// nothing.
constexpr int kNoQuery = -1, kNoKey = -2;

struct Problem {
  int b, s, t, h, g, e;                              // as in params.h; all of them below 2^30
  int left, right;                                   // window; -1: unbounded. At most 2^30
  int diagonal;                                      // query i sits on key i + diagonal
  float scale, softcap, inv_cap;                     // softcap 0: off; 1 / softcap
  const void* bias;                                  // null: none, by positions within a sequence
  long long bias_b, bias_n, bias_h, bias_s, bias_t;  // its strides
  int bias_queries, bias_keys;                       // its extents
  int bias_f32;                                      // else in the operand dtype
  const float *alibi, *sinks;                        // null: none
  long long alibi_b, sinks_b;                        // stride of the batch; heads are contiguous
  const int *segment_q, *segment_k;                  // null: none
  const int* page_table;                             // [b, pages]; null: none
  int pages, page;                                   // pages of a row, keys of a page
  // For each tile of a direction (queries forward, keys backward): the first and the last + 1 of
  // the others whose segment can be one of the tile's. [b, tiles, 2]
  const int* near;
  int packed;  // the ids come from packed sequences
};

// A tile of one sequence: of its queries forward, of its keys backward. What sequences.cu plans,
// and all that a kernel for sequences knows of where its rows are. Rows of the others that the tile
// meets, keys forward and queries backward, lie in [begin, end).
struct alignas(64) Span {
  int b, n;   // row of the batch, and sequence of that row; n = -1: rows of no sequence
  int first;  // the tile's first row, counted within the sequence
  int q_len, k_len;
  int q_end, k_end;  // the rows after the last, counted over [b, s] and over [c, t]
  int k_begin;       // the first key, counted within the row
  int diagonal;      // query i sits on key i + diagonal
  int begin, end;
  int compare;  // segment ids within [begin, end) are not all the tile's only one
  int padded;   // backward: where the queries begin in arrays padded to whole tiles
  int head;     // while a CTA works on the tile; < 0: there is no more
  int unused[2];
};

struct Blocks {
  int begin, end;              // blocks with a key that some query sees
  int clear_begin, clear_end;  // those of them that need no mask
  DI bool masked(int n) const { return n < clear_begin || n >= clear_end; }
};

DI int clamp(int x, int lo, int hi) { return max(lo, min(x, hi)); }

// Key blocks of N for the queries [i0, i1), of the keys [begin, end).
template <int N>
DI Blocks key_blocks(const Problem& p, int diagonal, int i0, int i1, int begin, int end) {
  int first = p.left < 0 ? begin : clamp(i0 + diagonal - p.left, begin, end);
  int last = p.right < 0 ? end : clamp(i1 + diagonal + p.right, begin, end);
  int all_first = p.left < 0 ? begin : clamp(i1 - 1 + diagonal - p.left, begin, end);
  int all_last = p.right < 0 ? end : clamp(i0 + 1 + diagonal + p.right, begin, end);
  Blocks x;
  x.begin = first / N;
  x.end = last > first ? (last + N - 1) / N : x.begin;
  x.clear_begin = (all_first + N - 1) / N;
  x.clear_end = all_last / N;
  return x;
}

// Query blocks of M for the keys [j0, j1); `masked` is about the keys' bounds only, not about
// queries past the end.
template <int M>
DI Blocks query_blocks(const Problem& p, int j0, int j1, const int* near = nullptr) {
  int first = p.right < 0 ? 0 : clamp(j0 - p.diagonal - p.right, 0, p.s);
  int last = p.left < 0 ? p.s : clamp(j1 - p.diagonal + p.left, 0, p.s);
  if (near) first = max(first, near[0]), last = min(last, near[1]);
  int all_first = p.right < 0 ? 0 : clamp(j1 - 1 - p.diagonal - p.right, 0, p.s);
  int all_last = p.left < 0 ? p.s + M : clamp(j0 + 1 - p.diagonal + p.left, 0, p.s);
  Blocks x;
  x.begin = first / M;
  x.end = last > first ? (last + M - 1) / M : x.begin;
  x.clear_begin = (all_first + M - 1) / M;
  x.clear_end = p.segment_q ? 0 : all_last / M;
  return x;
}

// The scores of one query head of a sequence, in natural units.
template <bool F16>
struct Scores {
  const Problem& p;
  int diagonal;
  const char* bias;
  float slope;
  DI Scores(const Problem& p, int b, int n, int h, int diagonal)
      : p(p), diagonal(diagonal), slope(0.f) {
    bias =
        (const char*)p.bias + (b * p.bias_b + n * p.bias_n + h * p.bias_h) * (p.bias_f32 ? 4 : 2);
    if (p.alibi) slope = p.alibi[b * p.alibi_b + h];
  }
  // The bias of query i.
  DI const char* row(int i) const {
    return bias + min(i, p.bias_queries - 1) * p.bias_s * (p.bias_f32 ? 4 : 2);
  }
  // `bend`: the derivative by scale * dot, where it is not 1.
  DI float operator()(float dot, const char* row, int i, int j, float* bend = nullptr) const {
    float x = dot * p.scale;
    if (p.softcap != 0.f) {
      float y = tanh_ex2(x * p.inv_cap);
      x = p.softcap * y;
      if (bend) *bend = 1.f - y * y;
    }
    if (p.bias) {
      int at = min(j, p.bias_keys - 1) * (int)p.bias_t;
      x += p.bias_f32 ? ((const float*)row)[at] : to_float<F16>(((const unsigned short*)row)[at]);
    }
    if (p.alibi) x -= slope * fabsf((float)(j - i - diagonal));
    return x;
  }
};

}  // namespace flashjax::sm90
