// What both directions know of a problem: its sizes, which keys a tile of queries sees, and how a
// score is made of q.k.
#pragma once
#include "ptx.cuh"

namespace flashjax::sm90 {

// Ids of rows outside every sequence of a packed row, where everything may be NaN. They match
// nothing.
constexpr int kNoQuery = -1, kNoKey = -2;

struct Problem {
  int b, s, t, h, g, e;                      // as in params.h; all of them below 2^30
  int left, right;                           // window; -1: unbounded. At most 2^30
  int diagonal;                              // query i sits on key i + diagonal
  float scale, softcap, inv_cap;             // softcap 0: off; 1 / softcap
  const void* bias;                          // null: none
  long long bias_b, bias_h, bias_s, bias_t;  // its strides
  int bias_f32;                              // else in the operand dtype
  const float *alibi, *sinks;                // null: none
  long long alibi_b, sinks_b;                // stride of the batch; heads are contiguous
  const int *segment_q, *segment_k;          // null: none
  // For each tile of a direction (queries forward, keys backward): the first and the last + 1 of
  // the others whose segment can be one of the tile's. [b, tiles, 2]
  const int* near;
  int packed;  // the ids come from packed sequences
};

struct Blocks {
  int begin, end;              // blocks with a key that some query sees
  int clear_begin, clear_end;  // those of them that need no mask
  DI bool masked(int n) const { return n < clear_begin || n >= clear_end; }
};

DI int clamp(int x, int lo, int hi) { return max(lo, min(x, hi)); }

// Key blocks of N for the queries [i0, i1).
template <int N>
DI Blocks key_blocks(const Problem& p, int i0, int i1, const int* near = nullptr) {
  int first = p.left < 0 ? 0 : clamp(i0 + p.diagonal - p.left, 0, p.t);
  int last = p.right < 0 ? p.t : clamp(i1 + p.diagonal + p.right, 0, p.t);
  if (near) first = max(first, near[0]), last = min(last, near[1]);
  int all_first = p.left < 0 ? 0 : clamp(i1 - 1 + p.diagonal - p.left, 0, p.t);
  int all_last = p.right < 0 ? p.t : clamp(i0 + 1 + p.diagonal + p.right, 0, p.t);
  Blocks x;
  x.begin = first / N;
  x.end = last > first ? (last + N - 1) / N : x.begin;
  x.clear_begin = (all_first + N - 1) / N;
  x.clear_end = p.segment_q ? 0 : all_last / N;
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

// The scores of one query head, in natural units.
template <bool F16>
struct Scores {
  const Problem& p;
  const char* bias;
  float slope;
  DI Scores(const Problem& p, int b, int h) : p(p), slope(0.f) {
    bias = (const char*)p.bias + (b * p.bias_b + h * p.bias_h) * (p.bias_f32 ? 4 : 2);
    if (p.alibi) slope = p.alibi[b * p.alibi_b + h];
  }
  // The bias of query i.
  DI const char* row(int i) const {
    return bias + min(i, p.s - 1) * p.bias_s * (p.bias_f32 ? 4 : 2);
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
      int at = min(j, p.t - 1) * (int)p.bias_t;
      x += p.bias_f32 ? ((const float*)row)[at] : to_float<F16>(((const unsigned short*)row)[at]);
    }
    if (p.alibi) x -= slope * fabsf((float)(j - i - p.diagonal));
    return x;
  }
};

}  // namespace flashjax::sm90
