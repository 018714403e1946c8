// Four float lanes in plain C++, for every architecture; loops of four are what compilers
// vectorize.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace flashjax::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 2;          // of one panel
  static constexpr int kRows[3] = {0, 8, 4};  // micro-kernel height by its width in vectors
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  using M = I;

  static F load(const float* x) {
    F a;
    memcpy(&a, x, sizeof a);
    return a;
  }
  static void store(float* x, F a) { memcpy(x, &a, sizeof a); }
  static F set(float x) { return F{x, x, x, x}; }
  static F zero() { return F{}; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F nfma(F a, F b, F c) { return c - a * b; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return select(b < a, a, b); }
  static F abs(F a) { return bits(bits(a) & 0x7fffffff); }
  // To the nearest integer, for |a| < 2^22.
  static F round(F a) {
    const F magic = set(12582912.f);
    return (a + magic) - magic;
  }
  // a * 2^n, n integral in [-127, 128], in two steps so that neither factor leaves the normal
  // numbers.
  static F scale2(F a, F n) {
    I whole = __builtin_convertvector(n, I), half = whole >> 1;
    return a * bits((half + 127) << 23) * bits((whole - half + 127) << 23);
  }

  static I loadi(const int32_t* x) {
    I a;
    memcpy(&a, x, sizeof a);
    return a;
  }
  static I seti(int32_t x) { return I{x, x, x, x}; }
  static F to_float(I a) { return __builtin_convertvector(a, F); }
  static M less(I a, I b) { return a < b; }
  static M equal(I a, I b) { return a == b; }
  static M less(F a, F b) { return a < b; }
  static M both(M a, M b) { return a & b; }
  static M andnot(M a, M b) { return ~a & b; }                                     // not a, and b
  static F select(M m, F a, F b) { return bits((bits(a) & m) | (bits(b) & ~m)); }  // m ? a : b

  // a < b ? 0 : c, and c if unordered.
  static F zero_if_less(F a, F b, F c) { return bits(bits(c) & ~(a < b)); }

  // y[c][r] = x[r][c] for a square of kLanes.
  static void transpose(const float* x, int64_t ldx, float* y, int64_t ldy) {
    for (int r = 0; r < kLanes; ++r)
      for (int c = 0; c < kLanes; ++c) y[c * ldy + r] = x[r * ldx + c];
  }

 private:
  static I bits(F a) {
    I b;
    memcpy(&b, &a, sizeof b);
    return b;
  }
  static F bits(I a) {
    F b;
    memcpy(&b, &a, sizeof b);
    return b;
  }
};

}  // namespace
}  // namespace flashjax::cpu
