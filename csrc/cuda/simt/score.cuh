// From q.k to the score that softmax sees, and which pairs take part at all.
#pragma once
#include "../../attention/dropout.h"
#include "tile.cuh"

namespace flashjax::simt {

// One query head of one sequence.
struct Head {
  const Problem& p;
  Sequence z;
  int64_t bias;         // offset of [b, n, h, 0, 0]
  float slope;          // of alibi
  int64_t n;            // the sequence's place in its row
  const int32_t* seed;  // of dropout, or null

  __device__ __forceinline__ Head(const Problem& p, int64_t b, int64_t n, int64_t h,
                                  const Sequence& z)
      : p(p), z(z), bias(0), slope(0.f), n(n), seed(nullptr) {
    if (p.dropout_seed) seed = dropout_seed(p, b, h);
    if (p.bias)
      bias = b * p.bias_shape.stride[0] + n * p.bias_shape.stride[1] + h * p.bias_shape.stride[2];
    if (p.alibi_slopes)
      slope = p.alibi_slopes[b * p.alibi_shape.stride[0] + h * p.alibi_shape.stride[1]];
  }

  __device__ __forceinline__ int64_t bias_at(int64_t i, int64_t j) const {
    const Broadcast<5>& x = p.bias_shape;
    return bias + imin(i, x.dim[3] - 1) * x.stride[3] + imin(j, x.dim[4] - 1) * x.stride[4];
  }

  // `bend` is the derivative of the score by scale * dot.
  __device__ __forceinline__ float score(int64_t i, int64_t j, float dot, float& bend) const {
    float x = p.scale * dot;
    bend = 1.f;
    if (p.softcap != 0.f) {
      float y = tanhf(x / p.softcap);
      x = p.softcap * y;
      bend = 1.f - y * y;
    }
    if (p.bias) {
      int64_t at = bias_at(i, j);
      x += p.bias_dtype == DType::kF32    ? static_cast<const float*>(p.bias)[at]
           : p.bias_dtype == DType::kBF16 ? to_float(static_cast<const BF16*>(p.bias)[at])
                                          : to_float(static_cast<const F16*>(p.bias)[at]);
    }
    if (p.alibi_slopes) {
      int64_t distance = j - i - z.diagonal;
      x -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
    return x;
  }

  // What dropout multiplies a weight by.
  __device__ __forceinline__ float kept(int64_t i, int64_t j) const {
    return seed ? dropout_factor(p, seed, n, i, j) : 1.f;
  }

  __device__ __forceinline__ bool in_window(int64_t i, int64_t j) const {
    int64_t distance = j - i - z.diagonal;
    return (p.window_left < 0 || distance >= -p.window_left) &&
           (p.window_right < 0 || distance <= p.window_right);
  }
};

// What a block knows of the queries and of the keys of its tile; in shared memory.
struct Labels {
  int64_t q_row[kTile],
      k_row[kTile];  // over [b, s] and over [c, t] or [c, page]; -1: not a query (key) of this tile
  int32_t q_segment[kTile], k_segment[kTile];

  __device__ __forceinline__ void set_queries(const Problem& p, const Sequence& z, int64_t b,
                                              int64_t i_first, Range i) {
    int r = threadIdx.x;
    if (r >= kTile) return;
    int64_t row = z.q_begin + i_first + r;
    bool in = i_first + r >= i.begin && i_first + r < i.end;
    q_row[r] = in ? b * p.s + row : -1;
    q_segment[r] = in && p.segment_ids_q ? p.segment_ids_q[b * p.s + row] : 0;
  }
  __device__ __forceinline__ void set_keys(const Problem& p, const Sequence& z, int64_t b,
                                           int64_t j_first, Range j) {
    int r = threadIdx.x - kTile;
    if (r < 0 || r >= kTile) return;
    bool in = j_first + r >= j.begin && j_first + r < j.end;
    k_row[r] = in ? key_row(p, b, z, j_first + r) : -1;
    k_segment[r] = in && p.segment_ids_k ? p.segment_ids_k[b * p.t + z.k_begin + j_first + r] : 0;
  }
  __device__ __forceinline__ bool meet(int r, int c) const {
    return q_row[r] >= 0 && k_row[c] >= 0 && q_segment[r] == k_segment[c];
  }
};

}  // namespace flashjax::simt
