// Register-tiled matrix products: c [m, n] from a [m, k] and b [k, n], elements of a broadcast
// against vectors of b. An element is a float, or with Op = Pairs two bfloat16 along k. Nothing is
// packed here: a is [m, k] or [k, m].
#pragma once

namespace flashjax::cpu {
namespace {

struct Floats {
  using F = Simd::F;
  static F madd(F a, F b, F c) { return Simd::fma(a, b, c); }
};

enum class Into { kStore, kAdd, kScaleAdd };  // c = ab, c += ab, c = c * alpha[n] + ab

struct Gemm {
  int64_t m, n, k;  // n: a multiple of kLanes
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  Into into;
  const float* alpha = nullptr;
  // Of a only: k runs over `pieces` of x.k each, piece_a floats apart (b goes on as if there were
  // no pieces).
  int64_t pieces = 1, piece_a = 0;
};

template <class Op, bool kTransposed, int kM, int kN>
inline void micro(const Gemm& x, const float* __restrict a, const float* __restrict b,
                  float* __restrict c, const float* alpha) {
  using S = Simd;
  typename S::F sum[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) sum[i][j] = S::zero();
  const int64_t lda = x.lda, ldb = x.ldb, ldc = x.ldc;
  for (int64_t piece = 0; piece < x.pieces; ++piece) {
    const float* from = a + piece * x.piece_a;
    for (int64_t k = 0; k < x.k; ++k, b += ldb) {
      typename S::F row[kN];
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) row[j] = S::load(b + j * S::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) {
        typename S::F element = S::set(kTransposed ? from[i] : from[i * lda]);
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) sum[i][j] = Op::madd(element, row[j], sum[i][j]);
      }
      from += kTransposed ? lda : 1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      float* to = c + i * ldc + j * S::kLanes;
      if (x.into == Into::kAdd)
        sum[i][j] = S::add(S::load(to), sum[i][j]);
      else if (x.into == Into::kScaleAdd)
        sum[i][j] = S::fma(S::load(to), S::load(alpha + j * S::kLanes), sum[i][j]);
      S::store(to, sum[i][j]);
    }
}

// Rows from i on, in micro-kernels of kM rows, then of the next power of two below.
template <class Op, bool kTransposed, int kM, int kN>
inline void gemm_rows(const Gemm& x, int64_t i, const float* b, float* c, const float* alpha) {
  for (; i + kM <= x.m; i += kM)
    micro<Op, kTransposed, kM, kN>(x, x.a + i * (kTransposed ? 1 : x.lda), b, c + i * x.ldc, alpha);
  constexpr int kNext = kM > 8 ? 8 : kM > 4 ? 4 : kM > 2 ? 2 : 1;
  if constexpr (kM > 1)
    if (i < x.m) gemm_rows<Op, kTransposed, kNext, kN>(x, i, b, c, alpha);
}

template <class Op, bool kTransposed, int kN = Simd::kVectors>
inline void gemm_columns(const Gemm& x, int64_t j) {
  for (; j + kN * Simd::kLanes <= x.n; j += kN * Simd::kLanes)
    gemm_rows<Op, kTransposed, Simd::kRows[kN], kN>(x, 0, x.b + j, x.c + j, x.alpha + j);
  if constexpr (kN > 1)
    if (j < x.n) gemm_columns<Op, kTransposed, kN - 1>(x, j);
}

// Out of line: one copy of each, whoever calls.
template <class Op, bool kTransposed>
__attribute__((noinline)) void gemm(const Gemm& x) {
  gemm_columns<Op, kTransposed>(x, 0);
}

}  // namespace
}  // namespace flashjax::cpu
