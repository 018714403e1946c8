// Eight float lanes on AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include <cstdint>

// Simd loads and stores 16-bit floats.
#define FLASHJAX_SIMD_CONVERTS 1

namespace flashjax::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;           // of one panel
  static constexpr int kRows[3] = {0, 12, 6};  // micro-kernel height by its width in vectors
  using F = __m256;
  using I = __m256i;
  using M = __m256;

  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* x, F a) { _mm256_storeu_ps(x, a); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F zero() { return _mm256_setzero_ps(); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
  static F nfma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a * 2^n, n integral in [-127, 128], in two steps so that neither factor leaves the normal
  // numbers.
  static F scale2(F a, F n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(a, power2(half)), power2(_mm256_sub_epi32(whole, half)));
  }

  static I loadi(const int32_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static I seti(int32_t x) { return _mm256_set1_epi32(x); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static M less(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)); }
  static M equal(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M both(M a, M b) { return _mm256_and_ps(a, b); }
  static M andnot(M a, M b) { return _mm256_andnot_ps(a, b); }          // not a, and b
  static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }  // m ? a : b

  // a < b ? 0 : c, and c if unordered.
  static F zero_if_less(F a, F b, F c) { return _mm256_andnot_ps(less(a, b), c); }

  static F load_bf16(const uint16_t* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16));
  }
  static F load_f16(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static void store_f16(uint16_t* x, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bf16(uint16_t* x, F a) {
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    r = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan)), 16);
    __m128i lo = _mm256_castsi256_si128(r), hi = _mm256_extracti128_si256(r, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm_packus_epi32(lo, hi));
  }

  // y[c][r] = x[r][c] for a square of kLanes.
  static void transpose(const float* x, int64_t ldx, float* y, int64_t ldy) {
    __m256 r[8], q[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = load(x + i * ldx);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      q[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      q[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(q[i], q[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(q[i], q[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(q[i + 1], q[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(q[i + 1], q[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      store(y + c * ldy, _mm256_permute2f128_ps(r[c], r[c + 4], 0x20));
      store(y + (c + 4) * ldy, _mm256_permute2f128_ps(r[c], r[c + 4], 0x31));
    }
  }

 private:
  static F power2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace flashjax::cpu
