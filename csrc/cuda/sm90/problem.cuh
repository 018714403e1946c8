// What both directions know of a problem: its sizes, which keys a tile of queries sees, and how a
// score is made of q.k.
#pragma once
#include "ptx.cuh"

namespace flashjax::sm90 {

// n / d for 0 <= n < 2^31 and 0 < d < 2^31, by a product: on the way to a first tile divisions are
// slow.
struct Divider {
  u32 factor;
  int shift;
  Divider() = default;
  explicit Divider(int d) : shift(31) {
    while (u64{1} << (shift - 31) < static_cast<u64>(d)) shift++;
    factor = static_cast<u32>((u64{1} << shift) / d + 1);
  }
  DI int operator()(int n) const { return (int)(((u64)(u32)n * factor) >> shift); }
};

struct Problem {
  int b, s, t, h, g, d, e;                           // as in params.h; all of them below 2^30
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
  int clean;    // backward: some query may have seen nothing
  // While a CTA works on the tile: of queries or keys, < 0 if there is no more; backward, its place
  // in the list.
  int head, rank;
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

// Query blocks of `size` for the keys [j0, j1), of the queries [begin, end) of q_len. With `past`
// `masked` is not about queries past the last, whose log-sum-exp takes care of them unless they are
// NaN.
DI Blocks query_blocks(const Problem& p, int size, bool past, int diagonal, int j0, int j1,
                       int begin, int end, int q_len) {
  int first = p.right < 0 ? begin : clamp(j0 - diagonal - p.right, begin, end);
  int last = p.left < 0 ? end : clamp(j1 - diagonal + p.left, begin, end);
  if (past && end == q_len) end += size;
  int all_first = p.right < 0 ? begin : clamp(j1 - 1 - diagonal - p.right, begin, end);
  int all_last = p.left < 0 ? end : clamp(j0 + 1 - diagonal + p.left, begin, end);
  Blocks x;
  x.begin = first / size;
  x.end = last > first ? (last + size - 1) / size : x.begin;
  x.clear_begin = (all_first + size - 1) / size;
  x.clear_end = all_last / size;
  return x;
}

// A value that all threads of the warp have. Where control flow depends on one that was loaded, the
// compiler has to know, or barriers and matrix descriptors leave the uniform registers.
DI int agreed(int x) { return __shfl_sync(~0u, x, 0); }

// Where the rows of a tile are: in rows of one length by three numbers, else in its Span, which
// lies in shared memory, for registers are short. It is read by whole warps, or by one thread.
template <bool kSpan, bool kOneThread = false>
struct Rows {
  int dense_first, dense_b, dense_head;
  u32 span;
  static DI int load(u32 at) {
    const int x = load_int(at);
    return kOneThread ? x : agreed(x);
  }
#define SPAN(name, dense)                                                    \
  DI int name(const Problem& p) const {                                      \
    if constexpr (kSpan) return load(span + __builtin_offsetof(Span, name)); \
    return dense;                                                            \
  }
  SPAN(first, dense_first)
  SPAN(b, dense_b)
  SPAN(head, dense_head)
  SPAN(n, 0)
  SPAN(q_len, p.s)
  SPAN(k_len, p.t)
  SPAN(q_end, (dense_b + 1) * p.s)
  SPAN(k_end, (dense_b + 1) * p.t)
  SPAN(k_begin, 0)
  SPAN(diagonal, p.diagonal)
  SPAN(begin, 0)
  SPAN(end, p.t)
  SPAN(compare, 0)
  SPAN(padded, 0)
  SPAN(rank, 0)
#undef SPAN
  // The coordinates of query i, and of key j, in the maps: b, or a sequence's end.
  DI int q_row(const Problem& p, int i) const { return kSpan ? p.s - q_len(p) + i : i; }
  DI int k_row(const Problem& p, int j) const { return kSpan ? p.t - k_len(p) + j : j; }
  DI int q_box(const Problem& p) const { return kSpan ? q_end(p) : dense_b; }
  DI int k_box(const Problem& p) const { return kSpan ? k_end(p) : dense_b; }
  DI const int* query_ids(const Problem& p) const { return p.segment_q + (q_end(p) - q_len(p)); }
  DI const int* key_ids(const Problem& p) const {
    return p.segment_k + (long long)b(p) * p.t + k_begin(p);
  }
};

// A thread's columns of a row of an accumulator are 8 j + {0, 1}: bits 2 j + {0, 1}, 32 at most, of
// those before column n. Bits, and not comparisons, since a predicate each costs less than half.
DI u32 columns_before(int n) {
  const int x = max(n, 0), bits = x / 8 * 2 + min(x % 8, 2);
  return ~__funnelshift_lc(0u, ~0u, bits);
}

// Of a warpgroup's accumulator of 64 rows, pairs of two segments become -inf: this thread has the
// rows `row` and row + 8 of `own`, and the columns first + 2 (lane % 4) + {0, 1, 8, 9, ...} of
// `others`. Rows and columns from their counts on are somebody's, of whom it does not matter. Each
// warp looks first whether all its ids are one.
template <int kCount>
DI void mask_segments(float (&s)[kCount], const int* own, int row, int rows, const int* others,
                      int first, int columns) {
  constexpr int kIds = (kCount + 15) / 16;
  const int lane = threadIdx.x & 31;
  const int mine[2] = {own[min(row, rows - 1)], own[min(row + 8, rows - 1)]};
  int ids[kIds];  // of columns lane, lane + 32, ...
#pragma unroll
  for (int i = 0; i < kIds; i++) ids[i] = others[min(first + 32 * i + lane, columns - 1)];
  int least = ids[0], greatest = ids[0];
#pragma unroll
  for (int i = 1; i < kIds; i++) least = min(least, ids[i]), greatest = max(greatest, ids[i]);
  if (__all_sync(~0u, least == mine[0] && least == mine[1] && least == greatest) &&
      __reduce_min_sync(~0u, least) == __reduce_max_sync(~0u, least))
    return;
#pragma unroll
  for (int j = 0; j < kCount / 4; j++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int id = __shfl_sync(~0u, ids[j / 4], 8 * (j % 4) + 2 * (lane & 3) + e);
      if (id != mine[0]) s[4 * j + e] = -infinity();
      if (id != mine[1]) s[4 * j + 2 + e] = -infinity();
    }
  }
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
  DI float bias_at(const char* row, int j) const {
    const int at = min(j, p.bias_keys - 1) * (int)p.bias_t;
    return p.bias_f32 ? ((const float*)row)[at] : to_float<F16>(((const unsigned short*)row)[at]);
  }
  DI float operator()(float dot, const char* row, int i, int j, float* bend = nullptr) const {
    return with(p.bias ? bias_at(row, j) : 0.f, dot, i, j, bend);
  }
  // Those of the queries i and i + 8 and of the keys j + 8 k + {0, 1}, as in an accumulator.
  template <int kCount>
  DI void biases(float (&x)[kCount], int i, int j) const {
    const bool pairs = p.bias_t != 0 && p.bias_keys % 2 == 0;
#pragma unroll
    for (int k = 0; k < kCount; k++) x[k] = 0.f;
    if (!p.bias) return;
#pragma unroll
    for (int hh = 0; hh < 2; hh++) {
      const char* at = row(i + 8 * hh);
#pragma unroll
      for (int k = 0; k < kCount / 4; k++) {
        float &a = x[4 * k + 2 * hh], &b = x[4 * k + 2 * hh + 1];
        const int key = min(j + 8 * k, (p.bias_keys - 1) & ~1);
        if (!pairs) {
          a = bias_at(at, j + 8 * k), b = bias_at(at, j + 8 * k + 1);
        } else if (p.bias_f32) {
          const float2 y = *(const float2*)(at + 4 * key);
          a = y.x, b = y.y;
        } else {
          const u32 y = *(const u32*)(at + 2 * key);
          a = low<F16>(y), b = high<F16>(y);
        }
      }
    }
  }
  // `bend`: the derivative by scale * dot, where it is not 1.
  DI float with(float bias, float dot, int i, int j, float* bend) const {
    float x = dot * p.scale;
    if (p.softcap != 0.f) {
      float y = tanh_ex2(x * p.inv_cap);
      x = p.softcap * y;
      if (bend) *bend = 1.f - y * y;
    }
    x += bias;
    if (p.alibi) x -= slope * fabsf((float)(j - i - diagonal));
    return x;
  }
};

}  // namespace flashjax::sm90
