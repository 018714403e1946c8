// exp2 and tanh on vectors, accurate to about 1 and 3 units in the last place of float32; and an
// exp2 for results that become bfloat16, good to 3e-6.
#pragma once

namespace flashjax::cpu {
namespace {

// 2^x; 0 below -126, so that nothing downstream meets denormal numbers; x < 128. NaN stays NaN.
template <bool kRough>
inline Simd::F exp2_to(Simd::F x) {
  using S = Simd;
  S::F n = S::round(x);
  S::F f = S::sub(x, n);  // in [-1/2, 1/2], exactly
  // 2^f = 1 + f P(f), P minimax.
  S::F y;
  if (kRough) {
    y = S::set(0x1.3a02ccp-7f);
    y = S::fma(y, f, S::set(0x1.c9fc46p-5f));
    y = S::fma(y, f, S::set(0x1.ec0378p-3f));
    y = S::fma(y, f, S::set(0x1.62e12cp-1f));
  } else {
    y = S::set(0x1.41fbbcp-13f);
    y = S::fma(y, f, S::set(0x1.5f3e54p-10f));
    y = S::fma(y, f, S::set(0x1.3b2d4cp-7f));
    y = S::fma(y, f, S::set(0x1.c6aee8p-5f));
    y = S::fma(y, f, S::set(0x1.ebfbdcp-3f));
    y = S::fma(y, f, S::set(0x1.62e430p-1f));
  }
  y = S::fma(y, f, S::set(1.f));
  return S::zero_if_less(x, S::set(-126.f), S::scale2(y, n));
}

inline Simd::F exp2(Simd::F x) { return exp2_to<false>(x); }

inline Simd::F tanh(Simd::F x) {
  using S = Simd;
  S::F a = S::abs(x), z = S::mul(x, x);
  // Small: x + x z P(z), P minimax for z in [0, 0.39].
  S::F y = S::set(0.002292828867211938f);
  y = S::fma(y, z, S::set(-0.008344028145074844f));
  y = S::fma(y, z, S::set(0.021768946200609207f));
  y = S::fma(y, z, S::set(-0.05395926535129547f));
  y = S::fma(y, z, S::set(0.13333304226398468f));
  y = S::fma(y, z, S::set(-0.3333333432674408f));
  S::F small = S::fma(S::mul(y, z), x, x);
  // Large: 1 - 2 / (e^(2 |x|) + 1); from 10 on that is 1. The order keeps NaN.
  S::F capped = S::select(S::less(S::set(10.f), a), S::set(10.f), a);
  S::F power = exp2(S::mul(capped, S::set(2.885390081777927f)));
  S::F large = S::sub(S::set(1.f), S::div(S::set(2.f), S::add(power, S::set(1.f))));
  large = S::select(S::less(x, S::zero()), S::sub(S::zero(), large), large);
  return S::select(S::less(a, S::set(0.625f)), small, large);
}

}  // namespace
}  // namespace flashjax::cpu
