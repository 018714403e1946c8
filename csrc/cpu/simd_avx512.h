// Sixteen float lanes on AVX-512 (F, BW, DQ, VL; the bf16 instructions are used only by the kernels
// named for them).
#pragma once
#include <immintrin.h>

#include <cstdint>

// Simd loads and stores 16-bit floats.
#define FLASHJAX_SIMD_CONVERTS 1

namespace flashjax::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 4;                  // of one panel
  static constexpr int kRows[5] = {0, 16, 12, 8, 6};  // micro-kernel height by its width in vectors
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* x, F a) { _mm512_storeu_ps(x, a); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
  static F nfma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, 8); }
  // a * 2^n, n integral in [-127, 128].
  static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }

  static I loadi(const int32_t* x) { return _mm512_loadu_si512(x); }
  static I seti(int32_t x) { return _mm512_set1_epi32(x); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static M less(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
  static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M both(M a, M b) { return a & b; }
  static M andnot(M a, M b) { return static_cast<M>(~a & b); }              // not a, and b
  static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }  // m ? a : b

  // a < b ? 0 : c, and c if unordered.
  static F zero_if_less(F a, F b, F c) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), c);
  }

  static F load_bf16(const uint16_t* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
  }
  static F load_f16(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static void store_f16(uint16_t* x, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bf16(uint16_t* x, F a) {
    __m512i u = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }

  // y[c][r] = x[r][c] for a square of kLanes.
  static void transpose(const float* x, int64_t ldx, float* y, int64_t ldy) {
    __m512i r[16], q[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x + i * ldx);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      q[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      q[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // After this, r[4 * i + c] holds column c + 4 * lane of rows 4 * i .. 4 * i + 3, a 128-bit lane
    // a column.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(q[i], q[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(q[i], q[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(q[i + 1], q[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(q[i + 1], q[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      __m512i lo0 = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88);  // columns c, c + 8
      __m512i hi0 = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xdd);  // columns c + 4, c + 12
      __m512i lo1 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
      __m512i hi1 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xdd);
      _mm512_storeu_si512(y + c * ldy, _mm512_shuffle_i32x4(lo0, lo1, 0x88));
      _mm512_storeu_si512(y + (c + 8) * ldy, _mm512_shuffle_i32x4(lo0, lo1, 0xdd));
      _mm512_storeu_si512(y + (c + 4) * ldy, _mm512_shuffle_i32x4(hi0, hi1, 0x88));
      _mm512_storeu_si512(y + (c + 12) * ldy, _mm512_shuffle_i32x4(hi0, hi1, 0xdd));
    }
  }
};

#ifdef __AVX512BF16__
#define FLASHJAX_HAS_BF16 1
// Pairs of bfloat16 in the 32 bits of a float.
struct Pairs {
  using F = Simd::F;
  // c + a.lo * b.lo + a.hi * b.hi
  static F madd(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Lane x: (lo[x], hi[x]).
  static F zip(F lo, F hi) {
    __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
  }
  // Neighbouring lanes of a paired: kLanes / 2 floats.
  static void store_flat(float* x, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
  // kLanes pairs from two rows of 16-bit values; null is a row of zeros.
  static F zip(const uint16_t* lo, const uint16_t* hi) {
    __m512i a = _mm512_setzero_si512(), b = a;
    if (lo) a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lo)));
    if (hi) b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(hi)));
    return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
};
#endif

}  // namespace
}  // namespace flashjax::cpu
